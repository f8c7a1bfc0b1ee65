"""Reward: train 1 + K reward models in one program, and the judge in another.

Member 0 sees all the data (d-DPO and dp-DPO distil it); members 1..K are the family of e-DPO, each
on its own subset, by weights that one pass over the data carries along.

Reads   preference data; the SFT checkpoint where members start from it.
Writes  reward/checkpoints, reward/metrics.jsonl; judge/… likewise.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from rmd_jax import objectives
from rmd_jax.data.batch import Batch, Dataset
from rmd_jax.data.subsets import AllData
from rmd_jax.errors import UserError
from rmd_jax.models.decoder import Decoder
from rmd_jax.models.ensemble import RewardEnsemble
from rmd_jax.stages.context import Context
from rmd_jax.training.loop import Training, fit, load_params
from rmd_jax.training.stage import Loss, Params


@dataclasses.dataclass(frozen=True)
class RewardModels:
  """Likelihood of the preferences under every member.

  Pairs give the Bradley-Terry loss, ranks Plackett-Luce, ratings squared differences.

  Attributes:
    ensemble: the members.
    label_smoothing: probability that a label is wrong (pairs).
    margin: reward margin that a preferred response must exceed (pairs).
    centre: weight of (r_w + r_l)^2, which keeps rewards around zero (pairs).
  """

  ensemble: RewardEnsemble
  label_smoothing: float = 0.0
  margin: float = 0.0
  centre: float = 0.0
  coupled: ClassVar[bool] = False

  @property
  def members(self) -> int:
    """All members, the one on all data included."""
    return self.ensemble.members

  def outputs(self, params: Params, batch: Batch, *, rng: PRNGKeyArray) -> dict[str, Array]:
    """`rewards` [K, B, N]."""
    return {"rewards": self.ensemble.rewards(params, batch)}

  def example_weights(self, batch: Batch) -> Float[Array, "K B"]:
    """Example weights times member weights, where the batch has them."""
    if batch.member_weight is None:
      return jnp.broadcast_to(batch.weight[None, :], (self.members, batch.weight.shape[0]))
    return batch.member_weight * batch.weight[None, :]

  def denominator(self, batch: Batch) -> Float[Array, " K"]:
    """The summed weights of each member."""
    return self.example_weights(batch).sum(-1)

  def losses(self, rewards: Float[Array, "B N"], batch: Batch) -> Float[Array, " B"]:
    """One member's losses, by what the records hold."""
    if batch.ranks is not None:
      return objectives.plackett_luce(rewards, batch.ranks, mask=batch.mask)
    if batch.ratings is not None:
      return objectives.rating(rewards, batch.ratings, mask=batch.mask)
    return objectives.bradley_terry(
      rewards,
      label_smoothing=self.label_smoothing,
      margin=self.margin,
      centre=self.centre,
      preference=batch.preference,
    )

  def objective(
    self,
    outputs: dict[str, Array],
    batch: Batch,
    *,
    step: Array,
    hyper: Mapping[str, Array],
    carry: Any,
  ) -> Loss:
    """Summed losses [K]; logs each member's loss and accuracy."""
    rewards, weights = outputs["rewards"], self.example_weights(batch)
    losses = jax.vmap(lambda member: self.losses(member, batch))(rewards)
    sums, total = (weights * losses).sum(-1), weights.sum(-1)
    correct = jax.vmap(lambda member: agreement(member, batch))(rewards)
    share = jnp.maximum(total, 1e-12)
    accuracy = (weights * correct).sum(-1) / share
    aux = {f"loss/member_{k}": sums[k] / share[k] for k in range(self.members)}
    aux |= {f"accuracy/member_{k}": accuracy[k] for k in range(self.members)}
    return Loss(sums, total, aux | {"accuracy/mean": accuracy.mean()}, carry)


def agreement(rewards: Float[Array, "B N"], batch: Batch) -> Float[Array, " B"]:
  """The share of an example's comparisons that rewards order as the data does; ties count half."""
  if batch.ranks is not None:
    better = -batch.ranks.astype(rewards.dtype)
  elif batch.ratings is not None:
    better = batch.ratings
  elif batch.preference is not None:
    better = jnp.stack([batch.preference, 1 - batch.preference], -1)
  else:
    better = jnp.broadcast_to(jnp.array([[1.0, 0.0]], rewards.dtype), rewards.shape)
  order = jnp.sign(better[:, :, None] - better[:, None, :])
  predicted = jnp.sign(rewards[:, :, None] - rewards[:, None, :])
  compared = batch.mask[:, :, None] & batch.mask[:, None, :] & (order != 0)
  hits = jnp.where(compared, 0.5 * (1 + order * predicted), 0.0).sum((1, 2))
  count = compared.sum((1, 2))
  return jnp.where(count > 0, hits / jnp.maximum(count, 1), 0.5)


def architecture(model: Decoder | None, context: Context) -> Decoder:
  """The reward models' decoder: the policy's where the run names none."""
  return (
    context.policy
    if model is None
    else dataclasses.replace(model, vocab_size=context.policy.vocab_size)
  )


def start(ensemble: RewardEnsemble, initial: str, context: Context, rng: PRNGKeyArray) -> Params:
  """Initial parameters: trunks from SFT or from scratch, heads always from scratch."""
  if initial == "scratch":
    return jax.jit(ensemble.init)(rng)
  if ensemble.decoder != context.policy:
    raise UserError(
      "Reward.initial = 'sft' needs reward models of the policy's architecture: "
      "leave Reward.model unset, or set Reward.initial = 'scratch'"
    )
  policy, _, _ = load_params(context.directory / "sft")
  return jax.jit(ensemble.init)(rng, policy["shared"])


@dataclasses.dataclass(frozen=True)
class Reward:
  """The stage as a run configures it.

  Attributes:
    training: steps, batch, optimiser.
    family: K, the number of members beside the one on all data.
    kind: 'full' (a trunk each) or 'heads' (one trunk, K heads).
    subsets: which examples each member of the family sees.
    initial: 'sft' (trunks start from the SFT policy) or 'scratch'.
    train_trunk: with 'heads', whether the shared trunk is trained too.
    model: the reward models' architecture; None is the policy's.
    label_smoothing: see RewardModels.
    margin: see RewardModels.
    centre: see RewardModels.
  """

  training: Training
  family: int
  kind: Literal["full", "heads"] = "full"
  subsets: Any = AllData()
  initial: Literal["sft", "scratch"] = "sft"
  train_trunk: bool = False
  model: Decoder | None = None
  label_smoothing: float = 0.0
  margin: float = 0.0
  centre: float = 0.0

  def __post_init__(self) -> None:
    if self.family < 0:
      raise UserError(f"Reward.family must be 0 or more, not {self.family}")

  def stage(self, context: Context) -> RewardModels:
    """The ensemble as the loop trains it."""
    ensemble = RewardEnsemble(
      decoder=architecture(self.model, context),
      members=1 + self.family,
      kind=self.kind,
      train_trunk=self.train_trunk,
    )
    return RewardModels(ensemble, self.label_smoothing, self.margin, self.centre)

  def weighted(self, dataset: Dataset, context: Context) -> Dataset:
    """The training set with its member weights [1 + K, M]; member 0 has them all."""
    weights = np.ones((1 + self.family, len(dataset)), np.float32)
    if self.family:
      weights[1:] = self.subsets.weights(dataset, self.family, context.seed)
    return dataset.replace(member_weight=weights)

  def run(self, context: Context, directory: Path) -> None:
    """Trains all members."""
    stage = self.stage(context)
    rng = jax.random.fold_in(jax.random.key(context.seed), 1)
    fit(
      stage,
      self.training,
      params=start(stage.ensemble, self.initial, context, rng),
      axes=stage.ensemble.axes(),
      carry=(),
      train=self.weighted(context.data.splits["train"], context),
      validation=context.data.splits["validation"],
      hyper={},
      directory=directory,
      seed=context.seed,
      mesh=context.mesh,
      label=f"reward{context.suffix}",
    )


@dataclasses.dataclass(frozen=True)
class Judge:
  """A held-out reward model, trained on a part of the data that no other stage sees.

  It scores samples where the data has no oracle.

  Attributes:
    training: steps, batch, optimiser.
    initial: as in Reward.
    model: as in Reward.
  """

  training: Training
  initial: Literal["sft", "scratch"] = "sft"
  model: Decoder | None = None

  def stage(self, context: Context) -> RewardModels:
    """One reward model."""
    return RewardModels(RewardEnsemble(architecture(self.model, context), members=1, kind="full"))

  def run(self, context: Context, directory: Path) -> None:
    """Trains the judge."""
    if not len(context.data.splits["judge"]):
      raise UserError("the judge has no data: set Splits.judge to a share of it, e.g. 0.2")
    stage = self.stage(context)
    fit(
      stage,
      self.training,
      params=start(
        stage.ensemble, self.initial, context, jax.random.fold_in(jax.random.key(context.seed), 2)
      ),
      axes=stage.ensemble.axes(),
      carry=(),
      train=context.data.splits["judge"],
      validation=context.data.splits["validation"],
      hyper={},
      directory=directory,
      seed=context.seed,
      mesh=context.mesh,
      label=f"judge{context.suffix}",
    )
