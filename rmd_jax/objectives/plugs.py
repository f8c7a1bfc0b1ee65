"""Objectives as the align stage takes them: `plug(log_ratios, batch, hyper, carry)`.

A plug is a frozen dataclass around one of the array functions, and adds the penalty γ fKL:

- p-DPO is `DPO` with a gamma, dp-DPO is `Distill` with a gamma, e-DPO is `EnsembleDistill`.
- Fields listed in `traced` are numbers that sweeps vary. They reach the compiled step through
  `hyper`, and are left out of equality and hash, so that another β shares the program.
- `carry` is the plug's training state. The loop adds `training` to `hyper`: 1 in training and 0 in
  evaluation, which freezes the state.
- `check(data)` refuses, before training, what the plug cannot be fed; `resolve(data)` fills in what
  is measured on the data.

A plug reads of a batch: `mask` [B, N], `weight` [B], `preference` [B], `ranks` and `ratings`
[B, N], `rewards` [1 + K, B, N] (row 0: the model of all data), and what the divergence's estimator
asks for: `samples` reads `sample_log_ratios` [B, S], `tokenwise` reads `token_kl` [B].
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, Float

from rmd_jax.objectives.distillation import distill
from rmd_jax.objectives.divergence import ESTIMATORS, forward_kl, forward_kl_samples
from rmd_jax.objectives.ensemble import (
  SELECTIONS,
  STATISTICS,
  Selection,
  ensemble_disagreement,
  ensemble_distill,
  initial_state,
)
from rmd_jax.objectives.gamma import DualGamma, LinearGamma, dual_gamma, dual_step, slack
from rmd_jax.objectives.inputs import Scalar, expect_one_of, is_concrete, scalar, weighted_mean
from rmd_jax.objectives.pairs import FORMS
from rmd_jax.objectives.preference import dpo, ipo
from rmd_jax.objectives.reward_models import refuse_ties

__all__ = ["DPO", "IPO", "Distill", "DualGamma", "EnsembleDistill", "LinearGamma"]

Batch: TypeAlias = Any  # anything with the attributes listed above, a whole data set included
Carry: TypeAlias = dict[str, Any]
Hyper: TypeAlias = Mapping[str, Scalar]
Schedule: TypeAlias = Callable[[Any], Any]
Gamma: TypeAlias = float | Schedule | DualGamma
Losses: TypeAlias = Float[Array, " B"]


def _traced(default: Any = dataclasses.MISSING) -> Any:
  """A field that is traced: no part of what two plugs have to share to share a program."""
  return dataclasses.field(default=default, compare=False)


class _Plug:
  """What a plug without state and penalty answers."""

  traced: ClassVar[tuple[str, ...]] = ()

  @property
  def needs(self) -> tuple[str, ...]:
    """Columns that the data must have."""
    return ()

  @property
  def coupled(self) -> bool:
    """Whether the loss is no sum over examples."""
    return False

  def hyper(self) -> dict[str, float | Schedule]:
    """The traced numbers by name; a schedule is a callable of the step."""
    return {name: getattr(self, name) for name in self.traced}

  def init_carry(self) -> Carry:
    """The state before the first step."""
    return {}

  def resolve(self, data: Batch) -> "_Plug":
    """The plug with nothing left to be measured on the data."""
    return self

  def report(self, carry: Carry, hyper: Hyper) -> dict[str, Scalar]:
    """Scalars to log beside the diagnostics."""
    return {"gamma/value": hyper["gamma"]} if "gamma" in hyper else {}

  def _expect_columns(self, data: Batch) -> None:
    name = type(self).__name__
    for column in self.needs:
      value = getattr(data, column)
      if value is None:
        raise ValueError(f"{name} needs {column}, which this data has not: score it first")
      # Equality with itself, because NaN is what has none; NumPy and jax arrays alike.
      mask = data.mask if value.ndim == 2 else data.mask[None]
      if is_concrete(value, mask) and (mask & (value != value)).any():
        raise ValueError(f"{name}: {column} of a response is NaN: score it, or leave it out")

  def _expect_pairs(self, data: Batch, way_out: str) -> None:
    """Refuses records in which the first response is not known to be the preferred one."""
    name = type(self).__name__
    count = data.mask.shape[-1]
    if count != 2:
      raise ValueError(
        f"{name} takes pairs, and this data has {count} responses a prompt: {way_out}"
      )
    ratings = data.ratings
    if data.preference is not None or not is_concrete(ratings, data.mask):
      return
    if (data.mask.all(-1) & (ratings[:, 0] < ratings[:, 1])).any():
      raise ValueError(f"{name}: the ratings put the second response of a pair first: {way_out}")


def _penalty(estimator: str, log_ratios: Float[Array, "B N"], batch: Batch) -> Losses:
  """fKL by the estimator's name, from h or from what align put into the batch."""
  if estimator == "samples":
    return forward_kl_samples(batch.sample_log_ratios)
  if estimator == "tokenwise":
    if batch.token_kl is None:
      raise TypeError("batch.token_kl is None: estimator='tokenwise' reads it")
    return batch.token_kl
  return forward_kl(log_ratios, estimator=estimator, mask=batch.mask)


def _check_penalty(gamma: Gamma, estimator: str) -> None:
  expect_one_of("estimator", estimator, ESTIMATORS)
  if isinstance(gamma, (int, float)) and gamma < 0:
    raise ValueError(f"gamma={gamma}: a penalty's weight is at least 0")


def _check_chosen(estimator: str, data: Batch) -> None:
  if estimator == "chosen" and (data.mask.shape[-1] != 2 or data.ranks is not None):
    raise ValueError("estimator='chosen' reads the first of a pair: use 'pairs' for N responses")


def _check_beta(beta: float) -> None:
  if not beta > 0:
    raise ValueError(f"beta={beta}: the inverse temperature is above 0")


@dataclasses.dataclass(frozen=True)
class DPO(_Plug):
  """DPO, and with a gamma p-DPO; Plackett-Luce where the data has ranks.

  Attributes:
    beta: inverse temperature.
    label_smoothing: probability that a label is wrong; pairs only.
    gamma: weight of the forward divergence, a number or a schedule.
    estimator: of the forward divergence.
  """

  beta: float = _traced()
  label_smoothing: float = _traced(0.0)
  gamma: Gamma = _traced(0.0)
  estimator: str = "pairs"

  traced: ClassVar[tuple[str, ...]] = ("beta", "label_smoothing", "gamma")

  def __post_init__(self) -> None:
    _check_beta(self.beta)
    _check_penalty(self.gamma, self.estimator)
    if isinstance(self.gamma, DualGamma):
      raise ValueError("DPO has no distillation loss to bound: use a number or a schedule as gamma")
    if not 0 <= self.label_smoothing < 0.5:
      raise ValueError(
        f"label_smoothing={self.label_smoothing}: a label is right more often than not"
      )

  def check(self, data: Batch) -> None:
    """Refuses N > 2 responses without ranks, tied ranks, and ranks with soft labels."""
    _check_chosen(self.estimator, data)
    if data.ranks is None:
      self._expect_pairs(data, "give ranks, or use distill or ensemble")
      return
    if data.preference is not None or self.label_smoothing:
      raise ValueError("DPO on ranks takes neither preference nor label_smoothing: leave them out")
    refuse_ties(data.ranks, data.mask)

  def __call__(
    self, log_ratios: Float[Array, "B N"], batch: Batch, hyper: Hyper, carry: Carry
  ) -> tuple[Losses, None, Carry]:
    """-log σ(β Δh) + γ fKL, or the ranking's likelihood in place of the pair's."""
    if batch.ranks is not None:
      losses = dpo(log_ratios, beta=hyper["beta"], ranks=batch.ranks, mask=batch.mask)
    else:
      losses = dpo(
        log_ratios,
        beta=hyper["beta"],
        label_smoothing=hyper["label_smoothing"],
        preference=batch.preference,
        mask=batch.mask,
      )
    penalty = _penalty(self.estimator, log_ratios, batch)
    return losses + scalar("gamma", hyper["gamma"], losses.dtype) * penalty, None, carry


@dataclasses.dataclass(frozen=True)
class IPO(_Plug):
  """IPO; with a soft label, its expectation over who wins.

  Attributes:
    tau: the margin's target is 1 / (2 τ).
  """

  tau: float = _traced()

  traced: ClassVar[tuple[str, ...]] = ("tau",)

  def __post_init__(self) -> None:
    if not self.tau > 0:
      raise ValueError(f"tau={self.tau}: the regularisation is above 0")

  def check(self, data: Batch) -> None:
    """Refuses all but pairs whose first response is the preferred one."""
    self._expect_pairs(data, "use dpo with ranks, distill or ensemble")
    if data.ranks is not None:
      raise ValueError("IPO reads the first of a pair as preferred, not ranks: use dpo")

  def __call__(
    self, log_ratios: Float[Array, "B 2"], batch: Batch, hyper: Hyper, carry: Carry
  ) -> tuple[Losses, None, Carry]:
    """(Δh - 1 / (2 τ))^2."""
    log_ratios = jnp.where(batch.mask, log_ratios, 0.0)
    losses = ipo(log_ratios, tau=hyper["tau"])
    if batch.preference is not None:
      swapped = ipo(log_ratios[:, ::-1], tau=hyper["tau"])
      losses = batch.preference * losses + (1.0 - batch.preference) * swapped
    return jnp.where(batch.mask.all(-1), losses, 0.0), None, carry


class _Distillation(_Plug):
  """What distillation from one model and from many share: γ, fixed or dual."""

  beta: float
  gamma: Gamma
  estimator: str
  dual: bool

  def _set_dual(self) -> None:
    """Notes whether γ is dual. γ's numbers are traced, but a dual one makes another program."""
    _check_beta(self.beta)
    _check_penalty(self.gamma, self.estimator)
    object.__setattr__(self, "dual", isinstance(self.gamma, DualGamma))

  def hyper(self) -> dict[str, float | Schedule]:
    """The traced numbers; with a dual γ its ε and rate in γ's place.

    Raises:
      ValueError: ε is still to be measured on the data.
    """
    numbers = super().hyper()
    if isinstance(self.gamma, DualGamma):
      del numbers["gamma"]
      if self.gamma.epsilon is None:
        raise ValueError("DualGamma.epsilon is measured on the data: call resolve(data) first")
      numbers |= {"epsilon": self.gamma.epsilon, "dual_rate": self.gamma.rate}
    return numbers

  def init_carry(self) -> Carry:
    """The dual controller's state, if γ is dual."""
    return {"dual": self.gamma.init(self.beta)} if isinstance(self.gamma, DualGamma) else {}

  def report(self, carry: Carry, hyper: Hyper) -> dict[str, Scalar]:
    """γ, and if it is dual ε and the slack ε - L̂, as `carry` has them."""
    if not self.dual:
      return super().report(carry, hyper)
    epsilon = hyper["epsilon"]
    return {
      "gamma/value": dual_gamma(carry["dual"], beta=hyper["beta"]),
      "gamma/epsilon": epsilon,
      "gamma/slack": slack(carry["dual"], epsilon=epsilon),
    }

  def _penalised(
    self, losses: Losses, log_ratios: Float[Array, "B N"], batch: Batch, hyper: Hyper, carry: Carry
  ) -> tuple[Losses, Carry]:
    """losses + γ fKL, with γ as it stood before this step, and the state after it."""
    if self.dual:
      gamma = dual_gamma(carry["dual"], beta=hyper["beta"])
      update = (jnp.asarray(hyper["training"]) > 0) & (batch.weight.sum() > 0)
      after = dual_step(
        carry["dual"],
        weighted_mean(losses, batch.weight),
        epsilon=hyper["epsilon"],
        rate=hyper["dual_rate"],
        update=update,
      )
      carry = {**carry, "dual": after}
    else:
      gamma = scalar("gamma", hyper["gamma"], losses.dtype)
    return losses + gamma.astype(losses.dtype) * _penalty(self.estimator, log_ratios, batch), carry


@dataclasses.dataclass(frozen=True)
class Distill(_Distillation):
  """d-DPO, and with a gamma dp-DPO: distillation of one reward model.

  Attributes:
    beta: inverse temperature.
    member: the row of `rewards`; 0 is the model of all data.
    source: `rewards`, or `ratings` on a scale of rewards, distilled as a model that is given.
    form: square or bernoulli.
    gamma: weight of the forward divergence: a number, a schedule, or `DualGamma` with an ε.
    estimator: of the forward divergence.
  """

  beta: float = _traced()
  member: int = 0
  source: str = "rewards"
  form: str = "square"
  gamma: Gamma = _traced(0.0)
  estimator: str = "pairs"
  dual: bool = dataclasses.field(init=False, repr=False)

  traced: ClassVar[tuple[str, ...]] = ("beta", "gamma")

  def __post_init__(self) -> None:
    self._set_dual()
    expect_one_of("form", self.form, FORMS)
    expect_one_of("source", self.source, ("rewards", "ratings"))
    if self.member < 0:
      raise ValueError(f"member={self.member}: rows of rewards count from 0")
    if isinstance(self.gamma, DualGamma) and self.gamma.epsilon is None:
      raise ValueError(
        "one reward model has no disagreement to take ε from: set DualGamma.epsilon, or use a "
        "number or a schedule as gamma"
      )

  @property
  def coupled(self) -> bool:
    """A dual γ hangs on the batch's mean loss."""
    return self.dual

  @property
  def needs(self) -> tuple[str, ...]:
    """The column that is distilled."""
    return (self.source,)

  def check(self, data: Batch) -> None:
    """Refuses data without the rewards, or ratings, of every response."""
    _check_chosen(self.estimator, data)
    self._expect_columns(data)
    if self.source == "rewards" and not self.member < len(data.rewards):
      raise ValueError(f"Distill.member={self.member}: rewards have {len(data.rewards)} rows")

  def __call__(
    self, log_ratios: Float[Array, "B N"], batch: Batch, hyper: Hyper, carry: Carry
  ) -> tuple[Losses, None, Carry]:
    """(Δr - β Δh)^2 + γ fKL."""
    rewards = batch.ratings if self.source == "ratings" else _family(batch, self.member)
    losses = distill(log_ratios, rewards, beta=hyper["beta"], mask=batch.mask, form=self.form)
    losses, carry = self._penalised(losses, log_ratios, batch, hyper, carry)
    return losses, None, carry


@dataclasses.dataclass(frozen=True)
class EnsembleDistill(_Distillation):
  """e-DPO: pessimistic distillation of the family, rows 1.. of `rewards`.

  Attributes:
    beta: inverse temperature.
    selection: how the members are used; see `ensemble_distill`.
    form: square or bernoulli.
    gamma: weight of the forward divergence: a number, a schedule, or `DualGamma`.
    estimator: of the forward divergence.
    kappa: of `lcb`.
    temperature: of `soft`.
    statistics: of `hull`, batch or running.
    members: K; needed where moving averages of the members are kept, else taken from the data.
  """

  beta: float = _traced()
  selection: str = "batch"
  form: str = "square"
  gamma: Gamma = _traced(0.0)
  estimator: str = "pairs"
  kappa: float = _traced(1.0)
  temperature: float = _traced(1.0)
  statistics: str = "batch"
  members: int | None = None
  dual: bool = dataclasses.field(init=False, repr=False)

  traced: ClassVar[tuple[str, ...]] = ("beta", "gamma", "kappa", "temperature")

  def __post_init__(self) -> None:
    self._set_dual()
    expect_one_of("selection", self.selection, SELECTIONS)
    expect_one_of("form", self.form, FORMS)
    expect_one_of("statistics", self.statistics, STATISTICS)
    if self.selection == "hull" and self.form != "square":
      raise ValueError("selection='hull' is a quadratic programme: use form='square', or 'batch'")
    if self.selection != "hull" and self.statistics != "batch":
      raise ValueError("statistics='running' belongs to selection='hull'; use selection='running'")
    if not self.temperature > 0:
      raise ValueError(f"temperature={self.temperature}: of a softmax it is above 0")
    if self.kappa < 0:
      raise ValueError(f"kappa={self.kappa}: a lower bound takes off at least 0 deviations")
    if self._averages and not self.members:
      raise ValueError("moving averages of the members need their number: set members=K")

  @property
  def _averages(self) -> bool:
    return self.selection == "running" or self.statistics == "running"

  @property
  def needs(self) -> tuple[str, ...]:
    """The family's scores."""
    return ("rewards",)

  @property
  def coupled(self) -> bool:
    """Only these selections are sums over examples."""
    return self.dual or self.selection not in ("example", "mean", "lcb")

  def init_carry(self) -> Carry:
    """The dual controller's state and the selection's moving averages, where there are any."""
    carry = super().init_carry()
    if self._averages and self.members:  # __post_init__ has refused the one without the other
      carry["selection"] = initial_state(
        self.members, selection=self.selection, statistics=self.statistics
      )
    return carry

  def resolve(self, data: Batch) -> "EnsembleDistill":
    """With a dual γ without ε, ε is the family's disagreement on the data.

    Raises:
      ValueError: the members agree, as one does with itself: no policy meets ε = 0.
    """
    if not isinstance(self.gamma, DualGamma) or self.gamma.epsilon is not None:
      return self
    rewards, mask, weight = (jnp.asarray(x) for x in (data.rewards[1:], data.mask, data.weight))
    epsilon = float(ensemble_disagreement(rewards, mask=mask, weights=weight))
    return dataclasses.replace(self, gamma=dataclasses.replace(self.gamma, epsilon=epsilon))

  def check(self, data: Batch) -> None:
    """Refuses data without the family's rewards of every response."""
    _check_chosen(self.estimator, data)
    self._expect_columns(data)
    family = len(data.rewards) - 1
    if family < 1:
      raise ValueError("EnsembleDistill needs a family: rewards have row 0 alone; use Distill")
    if self.members is not None and self.members != family:
      raise ValueError(f"EnsembleDistill.members={self.members}, but rewards have {family}")

  def __call__(
    self, log_ratios: Float[Array, "B N"], batch: Batch, hyper: Hyper, carry: Carry
  ) -> tuple[Losses, Selection, Carry]:
    """The selected members' distillation loss + γ fKL."""
    losses, selection = ensemble_distill(
      log_ratios,
      _family(batch, slice(1, None)),
      beta=hyper["beta"],
      selection=self.selection,
      mask=batch.mask,
      weights=batch.weight,
      kappa=hyper["kappa"],
      temperature=hyper["temperature"],
      state=carry.get("selection"),
      form=self.form,
      statistics=self.statistics,
      update=hyper["training"] if "selection" in carry else True,
    )
    if "selection" in carry:
      carry = {**carry, "selection": selection.state}
    losses, carry = self._penalised(losses, log_ratios, batch, hyper, carry)
    return losses, selection, carry


def _family(batch: Batch, rows: int | slice) -> Array:
  """Rows of the rewards; that they are missing is said before they are indexed."""
  if batch.rewards is None:
    raise TypeError("batch.rewards is None: distillation needs scores; run the score stage")
  return batch.rewards[rows]
