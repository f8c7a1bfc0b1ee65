"""Means over the pairs j < k of a prompt's responses, and the two losses of a single margin.

All arrays have passed `inputs.responses`: padding is 0 and the mask says where it is.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rmd_jax.objectives.inputs import Scalar, expect_one_of

FORMS = ("square", "bernoulli")


def centred(values: Float[Array, "*K N"], mask: Bool[Array, "*K N"]) -> Float[Array, "*K N"]:
  """Values minus their mean over the responses that exist; 0 elsewhere."""
  count = jnp.maximum(mask.sum(-1, keepdims=True), 1)
  mean = jnp.where(mask, values, 0.0).sum(-1, keepdims=True) / count
  return jnp.where(mask, values - mean, 0.0)


def pair_scale(mask: Bool[Array, "B N"], dtype: jnp.dtype) -> Float[Array, " B"]:
  """2 / (n - 1): a sum of squares of n centred values times this is their mean over pairs."""
  return 2.0 / jnp.maximum(mask.sum(-1) - 1, 1).astype(dtype)


def mean_square_over_pairs(
  values: Float[Array, "B N"], mask: Bool[Array, "B N"]
) -> Float[Array, " B"]:
  """Mean over j < k of (values_j - values_k)^2, in O(N): 2 n / (n - 1) times the variance.

  Fewer than two responses give 0.
  """
  return pair_scale(mask, values.dtype) * (centred(values, mask) ** 2).sum(-1)


def pair_differences(values: Float[Array, "*B N"]) -> Float[Array, "*B P"]:
  """values_j - values_k for the P = N (N - 1) / 2 pairs j < k."""
  j, k = jnp.triu_indices(values.shape[-1], 1)
  return values[..., j] - values[..., k]


def mean_over_pairs(losses: Float[Array, "B P"], mask: Bool[Array, "B N"]) -> Float[Array, " B"]:
  """Mean over the pairs whose two responses exist; 0 where there is none."""
  j, k = jnp.triu_indices(mask.shape[-1], 1)
  both = mask[:, j] & mask[:, k]
  return jnp.where(both, losses, 0.0).sum(-1) / jnp.maximum(both.sum(-1), 1)


def margin_loss(
  target: Float[Array, "B P"], margin: Float[Array, "B P"], form: str
) -> Float[Array, "B P"]:
  """The distance of an implicit margin from a target: squared, or KL(σ(target) ‖ σ(margin))."""
  expect_one_of("form", form, FORMS)
  if form == "square":
    return (target - margin) ** 2
  log_sigmoid = jax.nn.log_sigmoid
  # σ(-target), not 1 - σ(target): the small one of the two probabilities keeps its digits.
  wins = jax.nn.sigmoid(target) * (log_sigmoid(target) - log_sigmoid(margin))
  loses = jax.nn.sigmoid(-target) * (log_sigmoid(-target) - log_sigmoid(-margin))
  return wins + loses


def logistic(
  margin: Float[Array, " B"], preference: Float[Array, " B"], label_smoothing: Scalar
) -> Float[Array, " B"]:
  """Cross-entropy of the smoothed preference against σ(margin)."""
  first = preference * (1.0 - label_smoothing) + (1.0 - preference) * label_smoothing
  return first * jax.nn.softplus(-margin) + (1.0 - first) * jax.nn.softplus(margin)
