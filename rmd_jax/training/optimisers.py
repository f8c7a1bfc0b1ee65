"""Optimisers as frozen dataclasses (gin sets their fields), and learning rates as an array.

An optimiser here gives a *direction*: the loop subtracts learning rate x direction. So the rate is
an argument of the compiled step, and runs that differ in it share one program.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float

from rmd_jax.errors import UserError

Schedule = str | Callable[[Any], Any]
SCHEDULES = ("constant", "linear", "cosine")
_STACKED = ("layers", "member")  # axes that stack tensors; they do not make a bias a matrix


@runtime_checkable
class Optimizer(Protocol):
  """A frozen, hashable dataclass: the jitted step takes it as a static argument."""

  def __hash__(self) -> int:
    """Equal optimisers share a program."""

  def transform(self, decay: Any = None) -> optax.GradientTransformation:
    """The transformation from gradients to a direction, without the learning rate.

    Args:
      decay: a tree like the parameters', True on the leaves that weight decay applies to.
    """


def _by_rank(params: Any) -> Any:
  return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)


def decay_mask(axes: Any) -> Any:
  """Which parameters decay: matrices do; norms' scales, biases and head vectors do not.

  The axes decide, not the rank: a scanned model stacks its norms' scales to [layers, width].

  Args:
    axes: a tree of tuples of logical axis names, as a model's `axes()`.

  Returns:
    The same tree with a bool a leaf.
  """

  def decays(names: tuple[str | None, ...]) -> bool:
    return sum(name not in _STACKED for name in names) >= 2

  return jax.tree.map(decays, axes, is_leaf=lambda node: isinstance(node, tuple))


@dataclasses.dataclass(frozen=True)
class AdamW:
  """Adam with decoupled weight decay, scaled by the learning rate (Loshchilov & Hutter, 2019).

  Attributes:
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the second moment.
    weight_decay: 0 is plain Adam. Norms' scales and biases never decay.
  """

  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-8
  weight_decay: float = 0.01

  def transform(self, decay: Any = None) -> optax.GradientTransformation:
    """See `Optimizer.transform`."""
    adam = optax.scale_by_adam(b1=self.b1, b2=self.b2, eps=self.eps)
    if self.weight_decay == 0.0:
      return adam
    mask = _by_rank if decay is None else decay
    return optax.chain(adam, optax.add_decayed_weights(self.weight_decay, mask))


@dataclasses.dataclass(frozen=True)
class Adafactor:
  """Adafactor (Shazeer & Stern, 2018): a factored second moment, so memory below Adam's.

  Unlike `optax.adafactor`, weight decay is scaled by the learning rate, as AdamW's is.

  Attributes:
    decay_rate: exponent of the second moment's decay, 1 - t^-decay_rate.
    clipping_threshold: bound of an update's root mean square; None: no bound.
    scale_by_parameter: multiply an update by its parameter's root mean square, so that the
      learning rate is relative (1e-3 .. 1e-2).
    momentum: decay of the first moment; None: there is none, and no memory for it.
    min_dim_size_to_factor: matrices whose second largest side is below it are not factored.
    eps: added to squared gradients.
    weight_decay: 0 is off. Norms' scales and biases never decay.
  """

  decay_rate: float = 0.8
  clipping_threshold: float | None = 1.0
  scale_by_parameter: bool = True
  momentum: float | None = None
  min_dim_size_to_factor: int = 128
  eps: float = 1e-30
  weight_decay: float = 0.0

  def transform(self, decay: Any = None) -> optax.GradientTransformation:
    """See `Optimizer.transform`."""
    steps = [
      optax.scale_by_factored_rms(
        decay_rate=self.decay_rate,
        min_dim_size_to_factor=self.min_dim_size_to_factor,
        epsilon=self.eps,
      )
    ]
    if self.clipping_threshold is not None:
      steps.append(optax.clip_by_block_rms(self.clipping_threshold))
    if self.scale_by_parameter:
      steps.append(optax.scale_by_param_block_rms())
    if self.momentum is not None:
      steps.append(optax.ema(self.momentum, debias=False))
    if self.weight_decay != 0.0:
      mask = _by_rank if decay is None else decay
      steps.append(optax.add_decayed_weights(self.weight_decay, mask))
    return optax.chain(*steps)


def learning_rates(
  schedule: Schedule,
  *,
  peak: float | None,
  steps: int,
  warmup_steps: int = 0,
) -> Float[np.ndarray, " steps"]:
  """The learning rate of every step, computed on the host before training.

  Step s of a warm-up takes peak * (s + 1) / warmup_steps, so that no step is spent at 0; a decay
  then goes from the peak towards 0, which it would reach at step `steps`.

  Args:
    schedule: "constant", "linear", "cosine", or a function from the step to the rate (any optax
      schedule), which then is the whole truth: `peak` has to be None and `warmup_steps` 0.
    peak: the rate after the warm-up.
    steps: number of steps in all.
    warmup_steps: steps of linear rise, at most `steps`.

  Returns:
    float32.

  Raises:
    UserError: an unknown name, arguments that contradict each other, a rate that is negative or
      not finite.

  >>> learning_rates("linear", peak=1.0, steps=4, warmup_steps=2)
  array([0.5, 1. , 1. , 0.5], dtype=float32)
  """
  if callable(schedule):
    if peak is not None or warmup_steps != 0:
      raise UserError(
        "a schedule that is a function returns the learning rate itself: set learning_rate = None"
        f" and warmup_steps = 0 (they are {peak} and {warmup_steps}), or choose {SCHEDULES}."
      )
    rates = _evaluate(schedule, steps)
  else:
    if schedule not in SCHEDULES:
      raise UserError(f"schedule {schedule!r} is none of {SCHEDULES}, nor a function of the step.")
    if peak is None:
      raise UserError(f"schedule {schedule!r} needs a learning_rate.")
    if not 0 <= warmup_steps <= steps:
      raise UserError(f"warmup_steps = {warmup_steps} is not within 0 .. steps = {steps}.")
    step = np.arange(steps)
    progress = np.clip((step - warmup_steps) / max(steps - warmup_steps, 1), 0.0, 1.0)
    decayed = {
      "constant": np.ones(steps),
      "linear": 1.0 - progress,
      "cosine": 0.5 * (1.0 + np.cos(np.pi * progress)),
    }[schedule]
    rates = peak * np.where(step < warmup_steps, (step + 1) / max(warmup_steps, 1), decayed)
  bad = np.flatnonzero(~np.isfinite(rates) | (rates < 0))
  if bad.size:
    raise UserError(f"the learning rate at step {bad[0]} is {rates[bad[0]]}: it must be >= 0.")
  return rates.astype(np.float32)


def _evaluate(schedule: Callable[[Any], Any], steps: int) -> np.ndarray:
  try:
    rates = jax.vmap(schedule)(jnp.arange(steps))
  except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError):
    rates = [schedule(step) for step in range(steps)]  # a plain Python function with branches
  return np.asarray(jax.device_get(rates), np.float64)
