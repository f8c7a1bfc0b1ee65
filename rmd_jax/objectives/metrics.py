"""Diagnostics of degeneracy: what is logged at every step, whatever the objective."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from rmd_jax.objectives.distillation import distill
from rmd_jax.objectives.divergence import forward_kl
from rmd_jax.objectives.ensemble import Selection, ensemble_disagreement
from rmd_jax.objectives.inputs import (
  Scalar,
  example_weights,
  expect_shape,
  floats,
  members,
  responses,
  scalar,
  weighted_mean,
)

COLLAPSED = -2.302585092994046  # -log 10: a tenth of the reference's probability


def diagnostics(
  log_ratios: Float[Array, "B N"],
  rewards: Float[Array, "K B N"] | None = None,
  lengths: Num[Array, "B N"] | None = None,
  *,
  beta: Scalar,
  mask: Bool[Array, "B N"] | None = None,
  selection: Selection | None = None,
  weights: Float[Array, " B"] | None = None,
  ranks: Num[Array, "B N"] | None = None,
  first_member: int = 0,
) -> dict[str, Float[Array, ""]]:
  """A flat dict of scalars that show whether, and how, a policy degenerates.

  Of a pair, the first response is the chosen one. With ranks, the chosen response is the best and
  the rejected one the worst; without ranks, N > 2 responses are ordered by their mean reward.

  Args:
    log_ratios: h = log π_θ - log π_ref, summed over the response's tokens, EOS included.
    rewards: each member's scores; adds `ensemble/…` and the margins' correlation.
    lengths: tokens of each response; adds `margin/length_correlation`.
    beta: inverse temperature; β h is the implicit reward.
    mask: True where a response exists; rows with fewer than two count nowhere.
    selection: what `ensemble_distill` returned; adds `select/member_i`.
    weights: example weights. 0 marks a row that only fills the batch; percentiles count each row of
      positive weight once.
    ranks: lower is better.
    first_member: the number of the first member in the metrics' names.

  Returns:
    `margin/implicit_mean`, `margin/implicit_p95`, `margin/accuracy` (ties count one half),
    `margin/length_correlation`, `margin/reward_mean`, `margin/reward_correlation`,
    `logp/chosen_minus_ref`, `logp/chosen_minus_ref_p5`, the same of rejected,
    `degeneracy/chosen_collapsed` (fraction with h < -log 10), `kl/forward_pairs` (no KL unless the
    responses came from the reference), `ensemble/disagreement`, `ensemble/distance_i` (mean squared
    distance to member i's margins) and `select/member_i` (its mean weight). Without any row that
    counts all are 0.

  Raises:
    TypeError: log_ratios is None or no array.
    ValueError: shapes differ, or N > 2 with neither ranks nor rewards.

  >>> metrics = diagnostics(jnp.array([[-3.0, -7.0], [-1.0, -1.0]]), beta=0.5)
  >>> float(metrics["margin/accuracy"]), float(metrics["degeneracy/chosen_collapsed"])
  (0.75, 0.5)
  """
  if rewards is None:
    mask, h = responses(mask, log_ratios=log_ratios)
  else:
    mask, h, rewards = members(rewards, log_ratios, mask)
  weights = example_weights(weights, h)
  weights = jnp.where(mask.sum(-1) >= 2, weights, 0.0)
  beta = scalar("beta", beta, h.dtype)
  chosen, rejected = _ends(h, rewards, ranks, mask)

  def margin(values: Array) -> Array:
    return _pick(values, chosen) - _pick(values, rejected)

  def mean(values: Array) -> Array:
    return weighted_mean(values, weights)

  implicit = beta * margin(h)
  metrics = {
    "margin/implicit_mean": mean(implicit),
    "margin/implicit_p95": _quantile(implicit, weights, 0.95),
    "margin/accuracy": mean(0.5 * (1.0 + jnp.sign(implicit))),
    "degeneracy/chosen_collapsed": mean((_pick(h, chosen) < COLLAPSED).astype(h.dtype)),
    "kl/forward_pairs": mean(forward_kl(h, mask=mask)),
  }
  for name, index in {"chosen": chosen, "rejected": rejected}.items():
    values = _pick(h, index)
    metrics[f"logp/{name}_minus_ref"] = mean(values)
    metrics[f"logp/{name}_minus_ref_p5"] = _quantile(values, weights, 0.05)
  if lengths is not None:
    (lengths,) = floats(lengths=lengths)
    expect_shape("lengths", lengths, h.shape)
    longer_by = margin(lengths.astype(h.dtype))
    metrics["margin/length_correlation"] = _correlation(implicit, longer_by, weights)
  if rewards is not None:
    explicit = margin(rewards.mean(0))
    metrics["margin/reward_mean"] = mean(explicit)
    metrics["margin/reward_correlation"] = _correlation(implicit, explicit, weights)
    metrics["ensemble/disagreement"] = ensemble_disagreement(rewards, mask=mask, weights=weights)
    distances = mean(jax.vmap(lambda r: distill(h, r, beta=beta, mask=mask))(rewards))
    metrics |= _numbered("ensemble/distance", distances, first_member)
  if selection is not None:
    picked = selection.weights
    picked = mean(picked) if picked.ndim == 2 else picked
    metrics |= _numbered("select/member", picked, first_member)
  return metrics


def _numbered(name: str, values: Float[Array, " K"], first: int) -> dict[str, Float[Array, ""]]:
  """One scalar a member."""
  return {f"{name}_{first + i}": value for i, value in enumerate(values)}


def _ends(
  h: Float[Array, "B N"],
  rewards: Float[Array, "K B N"] | None,
  ranks: Num[Array, "B N"] | None,
  mask: Bool[Array, "B N"],
) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
  """The index of each row's chosen and of its rejected response."""
  if ranks is not None:
    _, order = responses(mask, ranks=ranks)
  elif h.shape[1] == 2:
    order = jnp.broadcast_to(jnp.arange(2.0, dtype=h.dtype), h.shape)
  elif rewards is not None:
    order = -rewards.mean(0)
  else:
    raise ValueError(
      f"diagnostics: {h.shape[1]} responses a prompt have no implied order; pass ranks or rewards"
    )
  best = jnp.where(mask, order, jnp.inf).argmin(-1)
  worst = jnp.where(mask, order, -jnp.inf).argmax(-1)
  return best, worst


def _pick(values: Float[Array, "B N"], index: Int[Array, " B"]) -> Float[Array, " B"]:
  """One response of each row."""
  return jnp.take_along_axis(values, index[:, None], axis=1)[:, 0]


def _quantile(
  values: Float[Array, " B"], weights: Float[Array, " B"], q: float
) -> Float[Array, ""]:
  """The linearly interpolated quantile of the rows of positive weight; 0 if there are none."""
  counts = weights > 0
  last = jnp.maximum(counts.sum() - 1, 0)
  ordered = jnp.sort(jnp.where(counts, values, jnp.inf))
  place = q * last.astype(values.dtype)
  low = jnp.floor(place).astype(int)
  high = jnp.minimum(low + 1, last)
  between = ordered[low] + (place - low) * (ordered[high] - ordered[low])
  return jnp.where(counts.any(), between, 0.0)


def _correlation(
  first: Float[Array, " B"], second: Float[Array, " B"], weights: Float[Array, " B"]
) -> Float[Array, ""]:
  """Pearson's correlation; 0 where one of the two does not vary."""
  first = first - weighted_mean(first, weights)
  second = second - weighted_mean(second, weights)
  scale = weighted_mean(first**2, weights) * weighted_mean(second**2, weights)
  covariance = weighted_mean(first * second, weights)
  return jnp.where(scale > 0, covariance / jnp.sqrt(jnp.where(scale > 0, scale, 1.0)), 0.0)
