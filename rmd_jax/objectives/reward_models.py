"""Losses that fit explicit reward models: to pairs, to rankings, to ratings."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Num

from rmd_jax.objectives.inputs import (
  Scalar,
  is_concrete,
  preferences,
  responses,
  scalar,
)
from rmd_jax.objectives.pairs import logistic, mean_square_over_pairs


def bradley_terry(
  rewards: Float[Array, "B 2"],
  *,
  label_smoothing: Scalar = 0.0,
  margin: Scalar = 0.0,
  centre: Scalar = 0.0,
  preference: Float[Array, " B"] | None = None,
) -> Float[Array, " B"]:
  """Bradley-Terry negative log-likelihood: -log σ(r_w - r_l - margin) + centre (r_w + r_l)^2.

  Args:
    rewards: one reward model's scores; the preferred response comes first.
    label_smoothing: probability that a label is wrong; it flips the sign of Δr - margin.
    margin: by how much the preferred response has to be better.
    centre: penalty that keeps rewards around 0, a constant that no margin sees.
    preference: probability that the first response wins, 1 by default.

  Returns:
    Losses [B], float32 (float64 if the input is).

  Raises:
    TypeError: rewards is None or no array.
    ValueError: rewards are not [B, 2].

  Source: Bradley and Terry (1952); the centring penalty is Eisenstein et al., arXiv 2312.09244.

  >>> bradley_terry(jnp.array([[1.0, 1.0], [3.0, 1.0]])).round(4)
  Array([0.6931, 0.1269], dtype=float32)
  """
  mask, r = responses(None, rewards=rewards)
  if r.shape[1] != 2:
    raise ValueError(f"bradley_terry: rewards have shape {r.shape}; pass pairs, or plackett_luce")
  first_wins = preferences(preference, mask.all(-1), r.dtype)
  label_smoothing = scalar("label_smoothing", label_smoothing, r.dtype)
  gap = r[:, 0] - r[:, 1] - scalar("margin", margin, r.dtype)
  likelihood = logistic(gap, first_wins, label_smoothing)
  return likelihood + scalar("centre", centre, r.dtype) * r.sum(-1) ** 2


def plackett_luce(
  rewards: Float[Array, "B N"],
  ranks: Num[Array, "B N"],
  *,
  mask: Bool[Array, "B N"] | None = None,
) -> Float[Array, " B"]:
  """Plackett-Luce negative log-likelihood of a ranking; Bradley-Terry at N = 2.

  The best response is chosen by a softmax over all, the second by a softmax over the others, ….

  Args:
    rewards: scores; any constant per prompt cancels.
    ranks: lower is better, 0 is best; only their order counts.
    mask: True where a response exists; a row with fewer than two has loss 0.

  Returns:
    Losses [B]: sums over the ranking's places, float32 (float64 if the input is).

  Raises:
    TypeError: an array is missing.
    ValueError: shapes differ, or two responses of a prompt share a rank (where ranks are traced,
      ties cannot be seen: refuse them in the data).

  Source: Plackett (1975).

  >>> likelihood = jnp.exp(-plackett_luce(jnp.zeros((1, 3)), jnp.array([[2, 0, 1]])))
  >>> round(1 / float(likelihood[0]), 4)  # the orders of three responses
  6.0
  """
  mask, r, order = responses(mask, rewards=rewards, ranks=ranks)
  refuse_ties(order, mask)
  best_first = jnp.argsort(jnp.where(mask, order, jnp.inf), axis=-1)
  scores = jnp.take_along_axis(r, best_first, axis=-1)
  exists = jnp.take_along_axis(mask, best_first, axis=-1)
  # Finite, so that gradients are: exp(score - lowest) is exactly 0 all the same.
  lowest = jnp.finfo(r.dtype).min / 4
  scores = jnp.where(exists, scores, lowest)
  left = jax.lax.cumlogsumexp(scores, axis=1, reverse=True)  # over a response and all worse ones
  return jnp.where(exists, left - scores, 0.0).sum(-1)


def rating(
  rewards: Float[Array, "B N"],
  ratings: Float[Array, "B N"],
  *,
  mask: Bool[Array, "B N"] | None = None,
) -> Float[Array, " B"]:
  """Squared error on rating differences within a prompt, the mean over all pairs, in O(N).

  Args:
    rewards: scores; any constant per prompt cancels, in them and in the ratings.
    ratings: what the differences of rewards have to match.
    mask: True where a response exists; a row with fewer than two has loss 0.

  Returns:
    Losses [B], float32 (float64 if the input is).

  Raises:
    TypeError: an array is missing.
    ValueError: shapes differ.

  >>> rating(jnp.array([[1.0, 0.0]]), jnp.array([[5.0, 2.0]]))
  Array([4.], dtype=float32)
  """
  mask, r, targets = responses(mask, rewards=rewards, ratings=ratings)
  return mean_square_over_pairs(r - jax.lax.stop_gradient(targets), mask)


def refuse_ties(ranks: ArrayLike, mask: ArrayLike) -> None:
  """Refuses two responses [B, N] of one rank, if the values are known (not traced)."""
  if not is_concrete(ranks, mask):
    return
  ranks, mask = jnp.asarray(ranks), jnp.asarray(mask)
  placed = jnp.sort(jnp.where(mask, ranks, jnp.inf), axis=-1)
  tied = (placed[:, 1:] == placed[:, :-1]) & jnp.isfinite(placed[:, 1:])
  if tied.any():
    row = int(tied.any(-1).argmax())
    raise ValueError(
      f"ranks of example {row} are tied: {ranks[row].tolist()}; a ranking has no ties, "
      "so give ratings instead, or leave the example out"
    )
