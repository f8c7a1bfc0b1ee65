"""Means with intervals, win rates, divergences: what an evaluation says, and how sure it is.

Every interval is a percentile bootstrap. The unit that is resampled is the prompt, because several
samples of one prompt are not independent; without `prompts` each value is its own prompt.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, Real, Shaped

_CHUNK = 4_000_000  # resampled values held at once: the bootstrap of a large set must not need GBs
_NORMAL_WIDTH = 2 * 1.959963984540054  # width of a 95 % interval, in standard errors
_FEW = 0.05  # fewer comparisons than this on one side of equal lengths: a value there is a guess


class Interval(NamedTuple):
  """A mean and its interval; `low` and `high` are NaN where one unit gives no interval."""

  mean: float
  low: float
  high: float

  def json(self, **more: Any) -> dict[str, Any]:
    """A JSON object, with null for NaN (which strict JSON lacks), and `more` beside it."""
    return {**{name: _finite_or_none(value) for name, value in self._asdict().items()}, **more}


class LengthControlled(NamedTuple):
  """A length-controlled win rate and what it rests on.

  Attributes:
    mean: win probability at equal lengths.
    low: lower end of its interval.
    high: upper end of its interval.
    length_effect: change of the log-odds when the length difference goes from 0 to very large.
    extrapolates: True where under 5 % of the comparisons lie on one side of equal lengths, so that
      the win rate at equal lengths is the model's guess rather than the data's.
  """

  mean: float
  low: float
  high: float
  length_effect: float
  extrapolates: bool

  def json(self, **more: Any) -> dict[str, Any]:
    """A JSON object, with null for NaN (which strict JSON lacks), and `more` beside it."""
    return {**{name: _finite_or_none(value) for name, value in self._asdict().items()}, **more}


def bootstrap_interval(
  values: Real[np.ndarray, " n"],
  seed: int,
  *,
  prompts: Shaped[np.ndarray, " n"] | None = None,
  level: float = 0.95,
  samples: int = 2000,
) -> Interval:
  """Mean of `values` with a percentile bootstrap interval.

  Args:
    values: one number per sample.
    seed: of the resampling; the same seed gives the same interval.
    prompts: which prompt each value belongs to; values are averaged per prompt first, and prompts
      are resampled. None: every value is a prompt of its own.
    level: coverage of the interval.
    samples: bootstrap resamples.

  Returns:
    The mean over prompts and its interval, NaN-bounded for a single prompt.

  Raises:
    ValueError: no values, non-finite values, or a level outside (0, 1).
  """
  _check_level(level, samples)
  means = prompt_means(values, prompts)
  draws = _resampled_means(means, np.random.default_rng(seed), samples)
  return _interval(means.mean(), draws, level, units=len(means))


def bootstrap_over_seeds(
  values: Sequence[Real[np.ndarray, " _"]],
  seed: int,
  *,
  prompts: Sequence[Shaped[np.ndarray, " _"]] | None = None,
  level: float = 0.95,
  samples: int = 2000,
) -> Interval:
  """Mean over training seeds; resamples the seeds, and within each of them its prompts.

  Args:
    values: one array per training seed.
    seed: of the resampling.
    prompts: beside each array of values, the prompts they belong to.
    level: coverage of the interval.
    samples: bootstrap resamples.

  Returns:
    The mean of the seeds' means. With one seed this is `bootstrap_interval`: the interval then
    speaks of prompts only, not of what another training seed would give.

  Raises:
    ValueError: no seed, or what `bootstrap_interval` raises.
  """
  _check_level(level, samples)
  if not values:
    raise ValueError("bootstrap_over_seeds: no seeds were given")
  if prompts is not None and len(prompts) != len(values):
    raise ValueError(
      f"bootstrap_over_seeds: {len(values)} arrays of values but {len(prompts)} arrays of prompts"
    )
  groups = prompts if prompts is not None else [None] * len(values)
  means = [prompt_means(v, p) for v, p in zip(values, groups, strict=True)]
  generator = np.random.default_rng(seed)
  count = len(means)
  # A seed drawn twice in one resample is resampled twice independently, as bootstrap theory asks.
  within = np.stack(
    [[_resampled_means(m, generator, samples) for m in means] for _ in range(count)]
  )  # [slot, seed, samples]
  chosen = generator.integers(count, size=(count, samples))
  draws = within[np.arange(count)[:, None], chosen, np.arange(samples)[None, :]].mean(0)
  units = len(means[0]) if count == 1 else count
  return _interval(float(np.mean([m.mean() for m in means])), draws, level, units=units)


def combine_seeds(
  intervals: Sequence[Interval], seed: int, *, level: float = 0.95, samples: int = 2000
) -> Interval:
  """The same over seeds of which only (mean, low, high) are known.

  Seeds are resampled, and each draw adds normal noise of the standard error that its 95 % interval
  implies; a seed without an interval adds none. One seed: its own interval, unchanged.

  Args:
    intervals: one 95 % interval per training seed; a bare number has NaN bounds.
    seed: of the resampling.
    level: coverage of the result.
    samples: bootstrap resamples.

  Raises:
    ValueError: no interval, or a mean that is not finite.
  """
  _check_level(level, samples)
  if not intervals:
    raise ValueError("combine_seeds: no seeds were given")
  means = _finite(np.array([i.mean for i in intervals], float), "combine_seeds: mean")
  if len(means) == 1:
    return Interval(*(float(x) for x in intervals[0][:3]))
  errors = np.array([(i.high - i.low) / _NORMAL_WIDTH for i in intervals], float)
  errors = np.where(np.isfinite(errors), errors, 0.0)
  generator = np.random.default_rng(seed)
  chosen = generator.integers(len(means), size=(samples, len(means)))
  noise = generator.standard_normal(chosen.shape) * errors[chosen]
  return _interval(means.mean(), (means[chosen] + noise).mean(1), level, units=len(means))


def prompt_means(
  values: Real[np.ndarray, " n"], prompts: Shaped[np.ndarray, " n"] | None
) -> Float[np.ndarray, " p"]:
  """Values averaged per prompt, prompts in the order of their sorted ids.

  Raises:
    ValueError: no values, non-finite values, or ids of another length.
  """
  values = _finite(values, "values")
  if prompts is None:
    return values
  index, count = _clusters(prompts, len(values))
  return np.bincount(index, values, count) / np.bincount(index, minlength=count)


def wins(
  policy_scores: Real[np.ndarray, " n"], reference_scores: Real[np.ndarray, " n"]
) -> Float[np.ndarray, " n"]:
  """1 where the policy scores higher, 0 where it scores lower, one half for a tie."""
  policy, reference = _paired(policy_scores, reference_scores, "policy", "reference")
  return (np.sign(policy - reference) + 1) / 2


def win_rate(
  policy_scores: Real[np.ndarray, " n"],
  reference_scores: Real[np.ndarray, " n"],
  seed: int,
  *,
  prompts: Shaped[np.ndarray, " n"] | None = None,
  level: float = 0.95,
  samples: int = 2000,
) -> Interval:
  """Fraction of comparisons that the policy wins, ties counting one half."""
  won = wins(policy_scores, reference_scores)
  return bootstrap_interval(won, seed, prompts=prompts, level=level, samples=samples)


def paired_difference(
  first: Real[np.ndarray, " n"],
  second: Real[np.ndarray, " n"],
  seed: int,
  *,
  prompts: Shaped[np.ndarray, " n"] | None = None,
  level: float = 0.95,
  samples: int = 2000,
) -> Interval:
  """Mean of `first - second`, two objectives' scores on the same prompts, row by row.

  Tighter than two intervals of their own, since what makes a prompt easy cancels.
  """
  a, b = _paired(first, second, "first", "second")
  return bootstrap_interval(a - b, seed, prompts=prompts, level=level, samples=samples)


def length_controlled_win_rate(
  policy_scores: Real[np.ndarray, " n"],
  reference_scores: Real[np.ndarray, " n"],
  policy_lengths: Real[np.ndarray, " n"],
  reference_lengths: Real[np.ndarray, " n"],
  seed: int,
  *,
  prompts: Shaped[np.ndarray, " n"] | None = None,
  level: float = 0.95,
  samples: int = 2000,
  prior_scale: float = 2.5,
) -> LengthControlled:
  """The win rate that the policy would have if its responses were as long as the reference's.

  Fits, by maximum penalised likelihood, wins w (ties one half) to

      P(w = 1) = sigmoid(theta + phi * tanh(d / sd(d))),   d = policy length - reference length,

  and reports sigmoid(theta), the prediction at d = 0. phi has a Gaussian prior of scale
  `prior_scale`, which keeps it finite where lengths separate wins from losses; theta has none, so
  that without any length effect this is the plain win rate. Each prompt weighs the same, and the
  interval resamples prompts and refits; sd(d) stays that of the whole sample.

  It is AlpacaEval 2's regression less its instruction-difficulty term: that term is estimated from
  many models' outputs on the same instructions, which a single run does not have; so there is one
  intercept and no intercept per prompt (with one comparison per prompt it could not be estimated).
  Where all length differences are equal, phi cannot be told from theta, and this is the win rate.

  Args:
    policy_scores: the judge's scores of the policy's samples.
    reference_scores: of the reference's, on the same prompts.
    policy_lengths: tokens of the policy's samples.
    reference_lengths: tokens of the reference's.
    seed: of the resampling.
    prompts: which prompt each comparison belongs to.
    level: coverage of the interval.
    samples: bootstrap resamples.
    prior_scale: standard deviation of phi's prior, in log-odds.

  Source: Dubois et al., arXiv 2404.04475, simplified as said above.
  """
  _check_level(level, samples)
  won = wins(policy_scores, reference_scores)
  longer, shorter = _paired(policy_lengths, reference_lengths, "policy", "reference")
  difference = longer - shorter
  if difference.shape != won.shape:
    raise ValueError(f"length_controlled_win_rate: {won.size} scores but {difference.size} lengths")
  groups = np.arange(won.size) if prompts is None else prompts
  index, count = _clusters(groups, won.size)
  weights = 1.0 / np.bincount(index, minlength=count)[index]  # [n]; each prompt sums to 1
  centre = np.average(difference, weights=weights)
  scale = math.sqrt(np.average((difference - centre) ** 2, weights=weights))
  # A spread at the level of rounding carries no information about length.
  constant = scale <= 1e-9 * max(1.0, float(np.abs(difference).max()))
  feature = np.zeros_like(difference) if constant else np.tanh(difference / scale)
  ridge = prior_scale**-2

  start = _logistic(feature, won, weights[None], ridge, np.zeros(2))
  generator = np.random.default_rng(seed)
  rates = [
    _logistic(feature, won, counts[:, index] * weights, ridge, start[0, :2])[:, 2]
    for counts in _resampled_counts(count, won.size, generator, samples)
  ]
  interval = _interval(float(start[0, 2]), np.concatenate(rates), level, units=count)
  sides = min(np.average(difference <= 0), np.average(difference >= 0))
  extrapolates = bool(sides < _FEW) and not constant
  return LengthControlled(*interval, float(start[0, 1]), extrapolates)


def implicit_accuracy(
  margins: Real[np.ndarray, " n"],
  *,
  preference: Real[np.ndarray, " n"] | None = None,
  weights: Real[np.ndarray, " n"] | None = None,
) -> float:
  """How often the margin's sign is the preference's; a zero margin counts one half.

  Args:
    margins: implicit (or explicit) reward of response 0 less that of response 1.
    preference: probability that response 0 is preferred; None: it always is.
    weights: of the pairs; None: equal.
  """
  margins = _finite(margins, "margins")
  first = np.ones_like(margins) if preference is None else _finite(preference, "preference")
  ahead = (np.sign(margins) + 1) / 2
  return float(np.average(first * ahead + (1 - first) * (1 - ahead), weights=weights))


def correlation(first: Real[np.ndarray, " n"], second: Real[np.ndarray, " n"]) -> float:
  """Pearson's correlation; NaN, without a warning, where either side is constant."""
  a, b = _paired(first, second, "first", "second")
  a, b = a - a.mean(), b - b.mean()
  sizes = math.sqrt(float(a @ a)), math.sqrt(float(b @ b))
  floors = [1e-12 * math.sqrt(a.size) * max(1.0, float(np.abs(x).max())) for x in (first, second)]
  if sizes[0] <= floors[0] or sizes[1] <= floors[1]:
    return math.nan
  return float(np.clip((a / sizes[0]) @ (b / sizes[1]), -1.0, 1.0))


def kl_forward(
  log_ratios: Real[np.ndarray, " n"],
  seed: int,
  *,
  prompts: Shaped[np.ndarray, " n"] | None = None,
  level: float = 0.95,
  samples: int = 2000,
) -> Interval:
  """KL(reference ‖ policy) in nats: the mean of -h over samples of the **reference**.

  h = log policy - log reference, summed over tokens. An unbiased estimate, so it may fall below 0.
  """
  values = -_finite(log_ratios, "log_ratios")
  return bootstrap_interval(values, seed, prompts=prompts, level=level, samples=samples)


def kl_reverse(
  log_ratios: Real[np.ndarray, " n"],
  seed: int,
  *,
  prompts: Shaped[np.ndarray, " n"] | None = None,
  level: float = 0.95,
  samples: int = 2000,
) -> Interval:
  """KL(policy ‖ reference) in nats: the mean of h over samples of the **policy**.

  h = log policy - log reference, summed over tokens. An unbiased estimate, so it may fall below 0.
  """
  values = _finite(log_ratios, "log_ratios")
  return bootstrap_interval(values, seed, prompts=prompts, level=level, samples=samples)


def _logistic(
  feature: Float[np.ndarray, " n"],
  won: Float[np.ndarray, " n"],
  weights: Float[np.ndarray, "s n"],
  ridge: float,
  start: Float[np.ndarray, "2"],
) -> Float[np.ndarray, "s 3"]:
  """Newton's method on s weighted data sets at once: columns theta, phi, sigmoid(theta)."""
  total = weights.sum(1)
  rate = weights @ won / total
  solvable = (rate > 1e-12) & (rate < 1 - 1e-12)  # else theta is infinite and the rate is 0 or 1
  result = np.stack([np.where(rate > 0.5, np.inf, -np.inf), np.zeros_like(rate), rate], 1)
  if not solvable.any():
    return result
  weights = weights[solvable]
  guess = start if np.isfinite(start).all() else np.zeros(2)
  point = np.tile(guess, (len(weights), 1))

  def loss(p: np.ndarray) -> np.ndarray:
    logit = p[:, :1] + p[:, 1:] * feature
    negative_log = np.logaddexp(0.0, logit) - won * logit
    return (weights * negative_log).sum(1) + 0.5 * ridge * p[:, 1] ** 2

  value = loss(point)
  for _ in range(50):
    chance = _sigmoid(point[:, :1] + point[:, 1:] * feature)
    error = weights * (chance - won)
    gradient = np.stack([error.sum(1), error @ feature + ridge * point[:, 1]], 1)
    curve = weights * chance * (1 - chance)
    a, b = curve.sum(1) + 1e-12, curve @ feature
    c = curve @ feature**2 + ridge
    determinant = a * c - b * b
    step = np.stack(
      [c * gradient[:, 0] - b * gradient[:, 1], a * gradient[:, 1] - b * gradient[:, 0]], 1
    )
    step /= np.maximum(determinant, 1e-300)[:, None]
    size = np.ones(len(point))
    for _ in range(30):  # halve the steps that do not descend: far from the optimum Newton leaps
      trial = point - size[:, None] * step
      trial_value = loss(trial)
      worse = ~(trial_value <= value + 1e-12 * np.abs(value))
      if not worse.any():
        break
      size = np.where(worse, size / 2, size)
    point = np.where(worse[:, None], point, trial)
    value = np.where(worse, value, trial_value)
    if (np.abs(step) * size[:, None]).max() < 1e-8:
      break
  result[solvable] = np.column_stack([point, _sigmoid(point[:, 0])])
  return result


def _resampled_means(
  values: Float[np.ndarray, " n"], generator: np.random.Generator, samples: int
) -> Float[np.ndarray, " s"]:
  draws = []
  for size in _chunks(samples, len(values)):
    index = generator.integers(len(values), size=(size, len(values)))
    draws.append(values[index].mean(1))
  return np.concatenate(draws)


def _resampled_counts(
  count: int, rows: int, generator: np.random.Generator, samples: int
) -> Iterator[Int[np.ndarray, "s p"]]:
  """How often each of `count` units is drawn, in chunks whose expansion to `rows` stays small."""
  for size in _chunks(samples, rows):
    offsets = np.arange(size)[:, None] * count
    index = generator.integers(count, size=(size, count)) + offsets
    yield np.bincount(index.ravel(), minlength=size * count).reshape(size, count)


def _chunks(samples: int, width: int) -> Iterator[int]:
  size = max(1, min(samples, _CHUNK // max(width, 1)))
  for start in range(0, samples, size):
    yield min(size, samples - start)


def _interval(mean: float, draws: np.ndarray, level: float, *, units: int) -> Interval:
  if units < 2:
    return Interval(float(mean), math.nan, math.nan)
  low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
  return Interval(float(mean), float(low), float(high))


def _clusters(prompts: np.ndarray, size: int) -> tuple[np.ndarray, int]:
  prompts = np.asarray(prompts)
  if prompts.shape != (size,):
    raise ValueError(f"prompts: expected {size} ids, one per value, got shape {prompts.shape}")
  unique, index = np.unique(prompts, return_inverse=True)
  return index, len(unique)


def _finite(values: np.ndarray, name: str) -> Float[np.ndarray, " n"]:
  values = np.asarray(values, float)
  if values.ndim != 1 or not values.size:
    raise ValueError(f"{name}: expected a non-empty vector, got shape {values.shape}")
  bad = np.flatnonzero(~np.isfinite(values))
  if bad.size:
    raise ValueError(f"{name}: {bad.size} of {values.size} are not finite, the first at {bad[0]}")
  return values


def _paired(
  first: np.ndarray, second: np.ndarray, first_name: str, second_name: str
) -> tuple[np.ndarray, np.ndarray]:
  a, b = _finite(first, first_name), _finite(second, second_name)
  if a.shape != b.shape:
    raise ValueError(f"{first_name} has {a.size} values but {second_name} has {b.size}")
  return a, b


def _check_level(level: float, samples: int) -> None:
  if not 0 < level < 1:
    raise ValueError(f"level: expected a number between 0 and 1, such as 0.95, got {level}")
  if samples < 1:
    raise ValueError(f"samples: expected at least 1 resample, got {samples}")


def _sigmoid(x: np.ndarray) -> np.ndarray:
  return np.exp(-np.logaddexp(0.0, -x))


def _finite_or_none(value: Any) -> Any:
  return None if isinstance(value, float) and not math.isfinite(value) else value
