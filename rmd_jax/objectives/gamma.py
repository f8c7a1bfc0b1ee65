"""The weight γ of the forward divergence: a number, a schedule, or a dual variable.

γ absorbs the Lagrangian's multiplier: γ = β / α. A schedule is anything that maps a step to a
number, so every optax schedule is one.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from rmd_jax.objectives.averages import MovingAverage
from rmd_jax.objectives.inputs import Scalar

ALPHA_LIMIT = 1e6


@dataclasses.dataclass(frozen=True)
class LinearGamma:
  """γ from `start` to `end` in `steps` steps, constant afterwards.

  The paper anneals from 1e-4 to 1e-2 over training; as its divergence is the sum over a pair and
  ours the mean, that is 2e-4 to 2e-2 here.

  >>> float(LinearGamma(start=0.0, end=1.0, steps=10)(5))
  0.5
  """

  start: float
  end: float
  steps: int

  def __post_init__(self) -> None:
    if self.steps < 1:
      raise ValueError(f"LinearGamma.steps={self.steps}: a schedule needs at least one step")
    if min(self.start, self.end) < 0:
      raise ValueError(f"LinearGamma goes from {self.start} to {self.end}: γ is at least 0")

  def __call__(self, step: ArrayLike) -> Float[Array, "..."]:
    """γ at a step, or at an array of steps, counted from 0."""
    done = jnp.clip(jnp.asarray(step) / self.steps, 0.0, 1.0)
    return self.start + (self.end - self.start) * done


class DualState(NamedTuple):
  """The dual controller's part of the training state.

  Attributes:
    log_alpha: of the multiplier α; γ = β / α.
    loss: moving average of the selected loss, L̂.
  """

  log_alpha: Float[Array, ""]
  loss: MovingAverage


@dataclasses.dataclass(frozen=True)
class DualGamma:
  """Dual ascent on α, so that the selected distillation loss stays within ε (ours).

  log α ← log α + rate (L̂ - ε) / ε, clipped to α in [1, 1e6]; γ = β / α. A violated constraint
  raises α and so **lowers** γ: the policy is held back less until it fits the rewards again.

  Attributes:
    start: γ before the first step; between β / 1e6 and β, since α is in [1, 1e6].
    epsilon: the bound on the loss. None: the ensemble's own disagreement E[Var_i Δr_i], measured on
      the data by the objective's `resolve`. 0 is refused (K = 1 has no disagreement).
    rate: η, the step in log α.
  """

  start: float
  epsilon: float | None = None
  rate: float = 0.01

  def __post_init__(self) -> None:
    if self.start <= 0:
      raise ValueError(f"DualGamma.start={self.start}: γ = β / α is above 0")
    if self.rate <= 0:
      raise ValueError(f"DualGamma.rate={self.rate}: a dual variable has to move")
    if self.epsilon is not None and not self.epsilon > 0:
      raise ValueError(
        f"DualGamma.epsilon={self.epsilon}: no policy meets it. One reward model has no "
        "disagreement to take ε from: set DualGamma.epsilon, or use a number or a schedule"
      )

  def init(self, beta: float) -> DualState:
    """The state before the first step: α = β / start.

    Raises:
      ValueError: start is out of reach of α in [1, 1e6].
    """
    if not beta / ALPHA_LIMIT <= self.start <= beta:
      raise ValueError(
        f"DualGamma.start={self.start} is out of reach with beta={beta}: γ = β / α, α in [1, 1e6]"
      )
    # A dtype of its own: a weakly typed carry would compile the step a second time.
    log_alpha = jnp.log(jnp.asarray(beta / self.start, jnp.result_type(float)))
    return DualState(log_alpha, MovingAverage.empty(()))


def dual_gamma(state: DualState, *, beta: Scalar) -> Float[Array, ""]:
  """γ = β / α."""
  return jnp.asarray(beta) * jnp.exp(-state.log_alpha)


def dual_step(
  state: DualState,
  loss: Float[Array, ""],
  *,
  epsilon: Scalar,
  rate: Scalar,
  update: Bool[Array, ""],
) -> DualState:
  """The state after a step whose selected loss was `loss`; unchanged where `update` is False."""
  loss = jax.lax.stop_gradient(loss)
  average = state.loss.updated((loss,), update)
  (mean,) = average.mean((loss,))
  violation = (mean - epsilon) / jnp.maximum(epsilon, jnp.finfo(mean.dtype).tiny)
  log_alpha = jnp.clip(state.log_alpha + rate * violation, 0.0, jnp.log(ALPHA_LIMIT))
  log_alpha = jnp.where(update, log_alpha, state.log_alpha).astype(state.log_alpha.dtype)
  return DualState(log_alpha, average)


def slack(state: DualState, *, epsilon: Scalar) -> Float[Array, ""]:
  """ε - L̂: below 0 where the constraint is violated; 0 before the first step."""
  (mean,) = state.loss.mean((jnp.asarray(epsilon, state.log_alpha.dtype),))
  return jnp.asarray(epsilon) - mean
