"""The reward in the convex hull of K models that lies nearest to the policy's implicit reward.

A quadratic programme on the simplex in K <= 16 variables, solved exactly (to rounding) inside jit.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rmd_jax.objectives.pairs import centred, pair_scale

RIDGE = 1e-6
_HIGHEST = jax.lax.Precision.HIGHEST  # accelerators would multiply in bf16 or TF32


def hull_statistics(
  implicit: Float[Array, "B N"],
  rewards: Float[Array, "K B N"],
  mask: Bool[Array, "B N"],
  weights: Float[Array, " B"],
) -> tuple[Float[Array, "K K"], Float[Array, " K"]]:
  """Gram matrix G and right side c, with E[(Σ λ_i Δr_i - m)^2] = λ'Gλ - 2 c'λ + const on Σ λ = 1.

  Both are taken relative to the members' mean reward. On the simplex that changes only the
  constant, and it keeps the digits by which the members differ when they share a large base.
  """
  exists = jnp.broadcast_to(mask, rewards.shape)
  rewards = centred(rewards, exists)
  base = rewards.mean(0)
  own = rewards - base[None]  # [K, B, N]
  rest = centred(implicit, mask) - base  # [B, N]
  total = weights.sum()
  share = weights / jnp.where(total > 0, total, 1.0)
  scale = (share * pair_scale(mask, own.dtype))[None, :, None]
  gram = jnp.einsum("kbn,lbn->kl", own * scale, own, precision=_HIGHEST)
  cross = jnp.einsum("kbn,bn->k", own * scale, rest, precision=_HIGHEST)
  return gram, cross


class _Search(NamedTuple):
  """Where the active-set search stands."""

  weights: Float[Array, " K"]
  face: Bool[Array, " K"]  # the members that may have weight
  step: Int[Array, ""]
  done: Bool[Array, ""]


def nearest_in_hull(gram: Float[Array, "K K"], cross: Float[Array, " K"]) -> Float[Array, " K"]:
  """argmin over the simplex of λ'Gλ - 2 c'λ + ridge |λ - 1/K|^2, with exact zeros.

  A primal active-set method (Lawson and Hanson's for non-negative least squares, with the sum
  constraint added). It starts at the best single member and every move lowers the objective, so
  that, but for the ridge, its value is never above that of `batch`. A move solves one K x K
  system; about K of them are needed.

  The ridge makes λ unique: 1e-6, or what the dtype resolves of G if that is more.

  >>> nearest_in_hull(jnp.eye(3), jnp.array([0.5, 0.5, -9.0])).round(4)
  Array([0.5, 0.5, 0. ], dtype=float32)
  """
  size = gram.shape[0]
  epsilon = jnp.finfo(gram.dtype).eps
  scale = jnp.trace(gram) / size
  ridge = jnp.maximum(RIDGE, 16 * epsilon * scale)
  quadratic = gram + ridge * jnp.eye(size, dtype=gram.dtype)
  # (Σ λ)^2 is 1 on the simplex; adding it makes the systems well conditioned along the constraint.
  solvable = quadratic + jnp.maximum(scale, ridge)
  tolerance = 2 * epsilon * (scale + jnp.abs(cross).max())

  def value(weights: Array) -> Array:
    return (weights * (_times(quadratic, weights) - 2 * cross)).sum()

  def face_minimum(face: Array) -> Array:
    """Minimiser under Σ λ = 1 alone, the members outside of the face held at 0."""
    inside = face[:, None] & face[None, :]
    system = jnp.where(inside, solvable, jnp.eye(size, dtype=gram.dtype))
    sides = jnp.stack([jnp.where(face, cross, 0.0), face.astype(gram.dtype)], axis=1)
    free, along = jnp.linalg.solve(system, sides).T
    return jnp.where(face, free + along * (1.0 - free.sum()) / along.sum(), 0.0)

  def enter(search: _Search, target: Array) -> _Search:
    """At a face's minimum: let in the member that lowers the objective fastest, or stop."""
    slope = _times(quadratic, target) - cross
    gain = jnp.where(search.face, jnp.inf, slope - (target * slope).sum())
    best = jnp.argmin(gain)
    done = gain[best] >= -tolerance
    face = search.face.at[best].set(search.face[best] | ~done)
    return _Search(target, face, search.step + 1, done)

  def leave(search: _Search, target: Array) -> _Search:
    """On the way to a minimum outside of the simplex: stop at the border, drop who is at 0."""
    falling = search.face & (target <= 0)
    drop = jnp.where(falling, search.weights - target, 1.0)
    share = jnp.where(falling, search.weights / jnp.where(drop > 0, drop, 1.0), jnp.inf)
    out = jnp.argmin(share)
    weights = search.weights + share[out] * (target - search.weights)
    weights = jnp.maximum(weights, 0.0).at[out].set(0.0)
    return _Search(
      weights / weights.sum(), search.face.at[out].set(False), search.step + 1, search.done
    )

  def move(search: _Search) -> _Search:
    target = face_minimum(search.face)
    inside = jnp.where(search.face, target > 0, True).all()
    entered, left = enter(search, target), leave(search, target)
    return jax.tree.map(lambda a, b: jnp.where(inside, a, b), entered, left)

  corner = jnp.argmin(jnp.diagonal(quadratic) - 2 * cross)
  best_member = jax.nn.one_hot(corner, size, dtype=gram.dtype)
  start = _Search(best_member, best_member > 0, jnp.int32(0), jnp.bool_(False))
  # Rounding can let one member in and out for ever: at such a point λ is as good as it gets.
  end = jax.lax.while_loop(lambda search: ~search.done & (search.step < 4 * size + 4), move, start)
  return jnp.where(value(end.weights) <= value(best_member), end.weights, best_member)


def _times(matrix: Float[Array, "K K"], vector: Float[Array, " K"]) -> Float[Array, " K"]:
  """The product, in the dtype's own precision on every device."""
  return jnp.dot(matrix, vector, precision=_HIGHEST)
