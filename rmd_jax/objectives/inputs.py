"""What every objective does with its arguments before any mathematics.

The checks read shapes, dtypes and names only, so they hold while jit traces, too, and need no
type-checking hook. Padding may hold NaN: it is cleared here, before any arithmetic, because a mask
that comes after leaves 0 * NaN in the gradients.
"""

from collections.abc import Collection
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Shaped

Scalar: TypeAlias = ArrayLike
"""A Python number, or a (traced) array of shape []."""


def floats(**arrays: Array | None) -> tuple[Array, ...]:
  """The arrays in one float dtype: bf16, fp16 and integers become float32, float64 stays.

  Raises:
    TypeError: for None, and for what is no array of real numbers.
  """
  for name, value in arrays.items():
    if value is None:
      raise TypeError(f"{name} is None: this objective needs it, and no default could stand in")
    if not hasattr(value, "dtype") or not hasattr(value, "shape"):
      raise TypeError(f"{name} is a {type(value).__name__}: pass an array")
    if not (jnp.issubdtype(value.dtype, jnp.floating) or jnp.issubdtype(value.dtype, jnp.integer)):
      raise TypeError(f"{name} is {value.dtype}: pass an array of real numbers")
  values = [value for value in arrays.values() if value is not None]
  wide = any(value.dtype == jnp.float64 for value in values)
  dtype = jnp.result_type(float) if wide else jnp.float32  # without x64, float is float32
  return tuple(jnp.asarray(value, dtype) for value in values)


def expect_shape(name: str, value: Shaped[Array, "..."], shape: tuple[int, ...]) -> None:
  """Refuses any other shape: nothing is broadcast."""
  if value.shape != shape:
    raise ValueError(f"{name} has shape {value.shape}, not {shape}: nothing is broadcast")


def expect_one_of(name: str, value: str, names: Collection[str]) -> None:
  """Refuses a name that is not listed, and lists them."""
  if value not in names:
    raise ValueError(f"{name}={value!r} is unknown: choose one of {', '.join(names)}")


def scalar(name: str, value: Scalar | None, dtype: jnp.dtype) -> Float[Array, ""]:
  """A hyperparameter in the objective's dtype.

  Raises:
    TypeError: for None.
    ValueError: for an array that is no scalar.
  """
  if value is None:
    raise TypeError(f"{name} is None: pass a number")
  value = jnp.asarray(value, dtype)
  expect_shape(name, value, ())
  return value


def responses(mask: Bool[Array, "B N"] | None, **arrays: Array | None) -> tuple[Array, ...]:
  """The mask, then the arrays: all [B, N], one float dtype, 0 where no response exists.

  Raises:
    TypeError: for a missing array or a mask that is not boolean.
    ValueError: for shapes that are not [B, N] or differ.
  """
  values = floats(**arrays)
  first = next(iter(arrays))
  shape = values[0].shape
  if len(shape) != 2:
    raise ValueError(f"{first} has shape {shape}: pass [B, N], one row a prompt")
  for name, value in zip(arrays, values, strict=True):
    expect_shape(name, value, shape)
  if mask is None:
    mask = jnp.ones(shape, bool)
  if not hasattr(mask, "dtype") or mask.dtype != jnp.bool_:
    raise TypeError("mask must be a boolean array, True where a response exists")
  expect_shape("mask", mask, shape)
  return mask, *(jnp.where(mask, value, 0.0) for value in values)


def members(
  rewards: Array | None, log_ratios: Array | None, mask: Bool[Array, "B N"] | None
) -> tuple[Bool[Array, "B N"], Float[Array, "B N"], Float[Array, "K B N"]]:
  """The mask, log-ratios [B, N] and rewards [K, B, N], as `responses` gives them."""
  log_ratios, rewards = floats(log_ratios=log_ratios, rewards=rewards)
  if rewards.ndim != 3 or rewards.shape[0] == 0:
    raise ValueError(f"rewards have shape {rewards.shape}: pass [K, B, N], one row a reward model")
  mask, log_ratios = responses(mask, log_ratios=log_ratios)
  expect_shape("rewards", rewards, (rewards.shape[0], *log_ratios.shape))
  return mask, log_ratios, jnp.where(mask[None], rewards, 0.0)


def preferences(
  preference: Array | None, pairs: Bool[Array, " B"], dtype: jnp.dtype
) -> Float[Array, " B"]:
  """P(the first response wins), 1 where none is given and where the row is no pair."""
  if preference is None:
    return jnp.ones(pairs.shape, dtype)
  (preference,) = floats(preference=preference)
  expect_shape("preference", preference, pairs.shape)
  return jnp.where(pairs, preference.astype(dtype), 1.0)


def example_weights(weights: Array | None, log_ratios: Float[Array, "B N"]) -> Float[Array, " B"]:
  """The example weights, 1 where none are given."""
  if weights is None:
    return jnp.ones(log_ratios.shape[:1], log_ratios.dtype)
  (weights,) = floats(weights=weights)
  expect_shape("weights", weights, log_ratios.shape[:1])
  return weights.astype(log_ratios.dtype)


def weighted_mean(values: Float[Array, "*K B"], weights: Float[Array, " B"]) -> Float[Array, "*K"]:
  """Mean over examples; rows of weight 0 may hold anything, and all of them zero give 0."""
  weights = jnp.broadcast_to(weights, values.shape)
  total = weights.sum(-1)
  sums = jnp.where(weights > 0, weights * values, 0.0).sum(-1)
  return jnp.where(total > 0, sums / jnp.where(total > 0, total, 1.0), 0.0)


def is_concrete(*arrays: ArrayLike | None) -> bool:
  """Whether the values, and not only shapes and dtypes, are known: all there, and no tracer."""
  return not any(value is None or isinstance(value, jax.core.Tracer) for value in arrays)
