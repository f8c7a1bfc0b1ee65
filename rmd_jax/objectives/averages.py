"""Bias-corrected exponential moving averages, as part of an objective's state."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

DECAY = 0.99


class MovingAverage(NamedTuple):
  """An exponential moving average of some arrays, started at nothing.

  Attributes:
    mass: total weight of what was averaged, 1 - DECAY^updates; 0 before the first update.
    sums: the weighted sums; the average is sums / mass.
  """

  mass: Float[Array, ""]
  sums: PyTree[Float[Array, "..."]]

  @classmethod
  def empty(cls, *shapes: tuple[int, ...]) -> "MovingAverage":
    """Of arrays of the given shapes, none seen yet."""
    return cls(jnp.zeros(()), tuple(jnp.zeros(shape) for shape in shapes))

  def updated(self, values: PyTree[Float[Array, "..."]], when: Bool[Array, ""]) -> "MovingAverage":
    """The average after these values; unchanged, and so frozen, where `when` is False."""
    new = MovingAverage(jnp.ones_like(self.mass), values)

    def mix(old: Array, value: Array) -> Array:
      # The state keeps its dtype whatever the batch's is: a carry must not change type.
      mixed = DECAY * old + (1.0 - DECAY) * value.astype(old.dtype)
      return jnp.where(when, mixed, old)

    return jax.tree.map(mix, self, new)

  def mean(self, otherwise: PyTree[Float[Array, "..."]]) -> PyTree[Float[Array, "..."]]:
    """The bias-corrected average; `otherwise` where nothing was averaged yet."""
    seen = self.mass > 0
    mass = jnp.where(seen, self.mass, 1.0)
    return jax.tree.map(
      lambda total, value: jnp.where(seen, total / mass, value.astype(total.dtype)),
      self.sums,
      otherwise,
    )
