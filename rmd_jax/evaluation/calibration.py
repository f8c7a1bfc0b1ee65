"""How good reward models are on held-out pairs: accuracy, calibration, agreement, length bias.

Margins are Δr = r(response 0) - r(response 1); the model's probability that response 0 wins is
sigmoid(Δr) (Bradley-Terry). Response 0 is usually the preferred one, so calibration is measured on
the response that the model itself prefers: its confidence, sigmoid(|Δr|), against how often that
response is the preferred one.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Real

from rmd_jax.evaluation.statistics import implicit_accuracy

ALL_DATA = "all data"


def reward_report(
  rewards: Float[np.ndarray, "K M 2"],
  lengths: Real[np.ndarray, "M 2"],
  *,
  preference: Real[np.ndarray, " M"] | None = None,
  weights: Real[np.ndarray, " M"] | None = None,
  names: Sequence[str] | None = None,
  family_start: int = 1,
  bins: int = 10,
  buckets: int = 5,
) -> dict[str, Any]:
  """The contents of evaluate/reward.json.

  Args:
    rewards: each model's scores of held-out pairs.
    lengths: the responses' lengths in tokens.
    preference: probability that response 0 wins; None: it always does.
    weights: of the pairs; None: equal.
    names: of the models; None: "all data" before the family, and "member_i" for row i within it,
      as metrics and stored scores number them.
    family_start: first row of the family, over which disagreement is taken; rows before it were
      trained on all the data. Ignored when it leaves no row.
    bins: of the reliability curve, of equal width on confidence 0.5 to 1.
    buckets: of length, at quantiles; equal quantiles share a bucket.

  Returns:
    {"pairs", "members": [{"name", "accuracy", "nll", "ece", "reliability", "by_length",
    "by_response_length"}], "agreement" [K][K], "family_start", "disagreement_mean"}, plain numbers
    all through. `by_length` buckets the difference in length, response 0 less response 1;
    `by_response_length` the two responses' mean length.

  Raises:
    ValueError: shapes that do not fit, non-finite numbers, weights that sum to 0.
  """
  margins, first, weights = _checked(rewards, preference, weights)
  lengths = np.asarray(lengths, float)
  if lengths.shape != (margins.shape[1], 2):
    raise ValueError(
      f"lengths: expected shape {(margins.shape[1], 2)}, one per response, got {lengths.shape}"
    )
  names = list(names) if names is not None else _default_names(len(margins), family_start)
  if len(names) != len(margins):
    raise ValueError(f"names: {len(names)} names for {len(margins)} reward models")
  members = []
  for name, margin in zip(names, margins, strict=True):
    curve = reliability(margin, preference=first, weights=weights, bins=bins)
    members.append(
      {
        "name": name,
        "accuracy": implicit_accuracy(margin, preference=first, weights=weights),
        "nll": nll(margin, preference=first, weights=weights),
        "ece": calibration_error(curve),
        "reliability": curve,
        "by_length": accuracy_by(
          margin, lengths[:, 0] - lengths[:, 1], first, weights, buckets=buckets
        ),
        "by_response_length": accuracy_by(margin, lengths.mean(1), first, weights, buckets=buckets),
      }
    )
  family = margins[family_start:] if family_start < len(margins) else margins
  return {
    "pairs": int(margins.shape[1]),
    "members": members,
    "agreement": agreement(margins, weights=weights).tolist(),
    "family_start": family_start if family_start < len(margins) else 0,
    "disagreement_mean": float(np.average(disagreement(family), weights=weights)),
  }


def nll(
  margins: Real[np.ndarray, " M"],
  *,
  preference: Real[np.ndarray, " M"] | None = None,
  weights: Real[np.ndarray, " M"] | None = None,
) -> float:
  """Bradley-Terry negative log-likelihood per pair, in nats; finite for any finite margin."""
  margins = np.asarray(margins, float)
  first = np.ones_like(margins) if preference is None else np.asarray(preference, float)
  losses = first * np.logaddexp(0, -margins) + (1 - first) * np.logaddexp(0, margins)
  return float(np.average(losses, weights=weights))


def reliability(
  margins: Real[np.ndarray, " M"],
  *,
  preference: Real[np.ndarray, " M"] | None = None,
  weights: Real[np.ndarray, " M"] | None = None,
  bins: int = 10,
) -> list[dict[str, float]]:
  """Confidence against accuracy, over equal bins of confidence from 0.5 to 1.

  Returns:
    One entry per bin that has pairs: {"confidence": mean, "accuracy", "count", "weight": share of
    all weight}. A margin of 0 has confidence 0.5 and counts one half.
  """
  margins = np.asarray(margins, float)
  first = np.ones_like(margins) if preference is None else np.asarray(preference, float)
  weights = np.ones_like(margins) if weights is None else np.asarray(weights, float)
  if bins < 1:
    raise ValueError(f"bins: expected at least 1, got {bins}")
  confidence = np.exp(-np.logaddexp(0, -np.abs(margins)))
  ahead = (np.sign(margins) + 1) / 2
  correct = first * ahead + (1 - first) * (1 - ahead)
  index = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
  curve = []
  for bin_ in range(bins):
    rows = index == bin_
    weight = float(weights[rows].sum())
    if weight > 0:
      curve.append(
        {
          "confidence": float(np.average(confidence[rows], weights=weights[rows])),
          "accuracy": float(np.average(correct[rows], weights=weights[rows])),
          "count": int(rows.sum()),
          "weight": weight / float(weights.sum()),
        }
      )
  return curve


def calibration_error(curve: Sequence[dict[str, float]]) -> float:
  """Expected calibration error: the weighted mean gap between confidence and accuracy."""
  return float(sum(b["weight"] * abs(b["confidence"] - b["accuracy"]) for b in curve))


def agreement(
  margins: Real[np.ndarray, "K M"], *, weights: Real[np.ndarray, " M"] | None = None
) -> Float[np.ndarray, "K K"]:
  """Fraction of pairs on which two models' margins have the same sign.

  A pair that either model ties counts one half, so a model that always ties agrees one half with
  everyone, itself included.
  """
  signs = np.sign(np.asarray(margins, float))
  weights = np.ones(signs.shape[1]) if weights is None else np.asarray(weights, float)
  shares = (1 + (signs * (weights / weights.sum())) @ signs.T) / 2
  return np.clip(shares, 0.0, 1.0)  # rounding must not print as -0.00


def disagreement(margins: Real[np.ndarray, "K M"]) -> Float[np.ndarray, " M"]:
  """Population variance over models of each pair's margin; its mean is METHOD's E[Var_i Δr_i]."""
  return np.asarray(margins, float).var(0)


def accuracy_by(
  margins: Real[np.ndarray, " M"],
  by: Real[np.ndarray, " M"],
  preference: Real[np.ndarray, " M"],
  weights: Real[np.ndarray, " M"],
  *,
  buckets: int,
) -> list[dict[str, float]]:
  """Accuracy within quantile buckets of `by`.

  Returns:
    One entry per bucket that has weight: {"low", "high", "accuracy", "count"}; low and high are the
    least and greatest value **in** the bucket, so that touching buckets never overlap.
  """
  if buckets < 1:
    raise ValueError(f"buckets: expected at least 1, got {buckets}")
  by = np.asarray(by, float)
  inner = np.unique(np.quantile(by, np.arange(1, buckets) / buckets)) if buckets > 1 else by[:0]
  index = np.searchsorted(inner, by, side="left")  # values equal to an edge stay together, below it
  result = []
  for bucket in range(len(inner) + 1):
    rows = index == bucket
    if weights[rows].sum() > 0:
      accuracy = implicit_accuracy(
        margins[rows], preference=preference[rows], weights=weights[rows]
      )
      result.append(
        {
          "low": float(by[rows].min()),
          "high": float(by[rows].max()),
          "accuracy": accuracy,
          "count": int(rows.sum()),
        }
      )
  return result


def _checked(
  rewards: np.ndarray, preference: np.ndarray | None, weights: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  rewards = np.asarray(rewards, float)
  if rewards.ndim != 3 or rewards.shape[2] != 2 or not rewards.size:
    raise ValueError(f"rewards: expected shape [models, pairs, 2], got {rewards.shape}")
  if not np.isfinite(rewards).all():
    model, pair, _ = np.argwhere(~np.isfinite(rewards))[0]
    raise ValueError(f"rewards: not finite, first for model {model} on pair {pair}")
  count = rewards.shape[1]
  first = np.ones(count) if preference is None else np.asarray(preference, float)
  weights = np.ones(count) if weights is None else np.asarray(weights, float)
  for name, values in (("preference", first), ("weights", weights)):
    if values.shape != (count,) or not np.isfinite(values).all() or values.min() < 0:
      raise ValueError(f"{name}: expected {count} finite numbers, none negative")
  if first.max() > 1:
    raise ValueError(f"preference: expected probabilities, got {first.max()}")
  if weights.sum() <= 0:
    raise ValueError("weights: they sum to 0, so no pair counts")
  return rewards[..., 0] - rewards[..., 1], first, weights


def _default_names(count: int, family_start: int) -> list[str]:
  """The all-data models first, then the family numbered as in `select/member_i`."""
  ahead = min(family_start, count)
  before = [ALL_DATA] if ahead == 1 else [f"{ALL_DATA} {i}" for i in range(ahead)]
  return before + [f"member_{i}" for i in range(ahead, count)]
