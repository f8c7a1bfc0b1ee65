"""Small stages and data for the loop's tests: an embedding, a hidden layer, a score a response."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rmd_jax.data.batch import Dataset
from rmd_jax.training.loop import Fitted, Training, fit
from rmd_jax.training.optimisers import AdamW
from rmd_jax.training.partitioning import MeshConfig, layout
from rmd_jax.training.stage import Loss
from rmd_jax.training.state import Blueprint, frozen_carry, init_state
from rmd_jax.training.step import train_program

VOCAB, WIDTH, HIDDEN = 16, 8, 16
AXES = {
  "embedding": ("vocab", "embed"),
  "hidden": ("embed", "mlp"),
  "bias": ("mlp",),
  "out": ("mlp",),
}


def init(seed: int) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(seed)
  return {
    "embedding": rng.normal(size=(VOCAB, WIDTH)).astype(np.float32),
    "hidden": rng.normal(size=(WIDTH, HIDDEN)).astype(np.float32) / WIDTH**0.5,
    "bias": rng.normal(size=HIDDEN).astype(np.float32) * 0.1,
    "out": rng.normal(size=HIDDEN).astype(np.float32) / HIDDEN**0.5,
  }


def score(params, batch):
  """[B, N]: a function of each response's tokens within its mask, and of the prompt's first."""
  mask = batch.response_mask[..., None].astype(jnp.float32)
  tokens = params["embedding"][batch.responses] * mask  # [B, N, R, D]
  mean = tokens.sum(2) / jnp.maximum(mask.sum(2), 1.0)
  mean = mean + params["embedding"][batch.prompt[:, :1]]
  hidden = jnp.tanh(mean @ params["hidden"] + params["bias"][None, None])
  return hidden @ params["out"]


@dataclasses.dataclass(frozen=True)
class Pairs:
  """Bradley-Terry on pairs, with a carry that enters the loss; spread: also batch statistics."""

  members: int = 0
  coupled: bool = False
  spread: bool = False
  noise: float = 0.0

  def params(self, seed: int = 0):
    return {"frozen": {"shift": np.float32(0.25)}, "shared": init(seed), "members": {}}

  @property
  def axes(self):
    return {"frozen": {"shift": ()}, "shared": AXES, "members": {}}

  def outputs(self, params, batch, *, rng):
    scores = score(params["shared"], batch) + params["frozen"]["shift"]
    if self.noise:
      scores = scores + self.noise * jax.random.normal(rng, scores.shape)
    return {"score": scores, "rows": batch.index}  # an integer output, which has no gradient

  def denominator(self, batch):
    return batch.weight.sum()

  def objective(self, outputs, batch, *, step, hyper, carry):
    margin = hyper["beta"] * (outputs["score"][:, 0] - outputs["score"][:, 1])
    losses = jax.nn.softplus(-margin)
    weight = batch.weight
    total = (weight * losses).sum() * (1.0 + 0.1 * carry["average"])
    if self.spread:
      mean = (weight * margin).sum() / weight.sum()
      total = total + weight.sum() * (jnp.tanh(mean) + (weight * (margin - mean) ** 2).sum())
    accuracy = (weight * (margin > 0)).sum() / weight.sum()
    average = 0.9 * carry["average"] + 0.1 * (weight * margin).sum() / weight.sum()
    aux = {"margin/accuracy": accuracy, "margin/training": hyper["training"]}
    return Loss(total, weight.sum(), aux, {"average": average, "count": carry["count"] + 1})

  @property
  def carry(self):
    return {"average": 0.0, "count": 0}


COUPLED = Pairs(coupled=True, spread=True)


@dataclasses.dataclass(frozen=True)
class Ensemble:
  """K reward models in one program; `trunk`: their embedding is shared, and trained."""

  members: int = 3
  coupled: bool = False
  trunk: bool = False

  def params(self, seed: int = 0, only: int | None = None):
    which = range(self.members) if only is None else [only]
    each = [init(seed + 1 + k) for k in which]
    members = jax.tree.map(lambda *leaves: np.stack(leaves), *each)
    shared = {}
    if self.trunk:
      members.pop("embedding")
      shared = {"embedding": init(seed)["embedding"]}
    return {"frozen": {}, "shared": shared, "members": members}

  @property
  def axes(self):
    names = {name: ("member", *axes) for name, axes in AXES.items()}
    shared = {}
    if self.trunk:
      names.pop("embedding")
      shared = {"embedding": AXES["embedding"]}
    return {"frozen": {}, "shared": shared, "members": names}

  def outputs(self, params, batch, *, rng):
    return {
      "rewards": jax.vmap(lambda p: score({**params["shared"], **p}, batch))(params["members"])
    }

  def denominator(self, batch):
    return batch.member_weight.sum(1)

  def objective(self, outputs, batch, *, step, hyper, carry):
    margin = outputs["rewards"][..., 0] - outputs["rewards"][..., 1]  # [K, B]
    weight = batch.member_weight
    total = (weight * jax.nn.softplus(-hyper["beta"] * margin)).sum(1)
    return Loss(total, weight.sum(1), {"reward/margin": margin.mean(1)}, carry)

  carry = ()


def data(size: int = 48, *, seed: int = 0, members: int = 0, length: int = 5) -> Dataset:
  rng = np.random.default_rng(seed)
  lengths = rng.integers(1, length + 1, size=(size, 2)).astype(np.int32)
  mask = np.arange(length)[None, None] < lengths[..., None]
  weights = rng.integers(0, 3, size=(members, size)).astype(np.float32)
  return Dataset(
    ids=np.array([f"example-{i}" for i in range(size)]),
    prompt=rng.integers(0, VOCAB, size=(size, 3)).astype(np.int32),
    prompt_length=np.full(size, 3, np.int32),
    responses=rng.integers(0, VOCAB, size=(size, 2, length)).astype(np.int32),
    response_length=lengths,
    response_mask=mask,
    weight=np.ones(size, np.float32),
    member_weight=weights if members else None,
  )


DEFAULT = Training(
  steps=20,
  batch_size=8,
  learning_rate=0.05,
  optimizer=AdamW(weight_decay=0.1),
  clip_norm=0.5,
  log_every=1,
)


def run(directory: Path, stage: Any, train: Dataset, **changes: Any) -> Fitted:
  """`fit` with what the tests have in common; a field of Training may be given by its name."""
  fields = {field.name for field in dataclasses.fields(Training)}
  training = dataclasses.replace(DEFAULT, **{k: v for k, v in changes.items() if k in fields})
  arguments: dict[str, Any] = {
    "params": stage.params(),
    "axes": stage.axes,
    "carry": stage.carry,
    "validation": None,
    "hyper": {"beta": 1.0},
    "seed": 0,
    "mesh": MeshConfig(),
    "label": "toy",
  }
  arguments |= {k: v for k, v in changes.items() if k not in fields}
  return fit(stage, training, train=train, directory=directory, **arguments)


def assert_trees_equal(got: Any, wanted: Any, **tolerance: float) -> None:
  """The same structure and values; bit by bit without a tolerance."""
  got, wanted = jax.device_get((got, wanted))
  assert jax.tree.structure(got) == jax.tree.structure(wanted)
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(wanted), strict=True
  ):
    name = jax.tree_util.keystr(path)
    if tolerance:
      np.testing.assert_allclose(a, b, err_msg=name, **tolerance)
    else:
      np.testing.assert_array_equal(a, b, err_msg=name)


@dataclasses.dataclass(frozen=True)
class Sgd:
  """The gradient itself: what a test of gradients wants to see."""

  def transform(self, decay=None):
    return optax.identity()


class Stepper:
  """Steps of a stage on fixed batches, without files."""

  def __init__(
    self,
    stage,
    *,
    optimizer=AdamW(weight_decay=0.1),
    microbatches=1,
    mesh=MeshConfig(),
    params=None,
    rate=0.05,
    clip=0.5,
    beta=1.0,
    carry=None,
  ):
    self.stage, self.layout = stage, layout(mesh)
    params = stage.params() if params is None else params
    carry = stage.carry if carry is None else carry
    self.blueprint = Blueprint.of(params, stage.axes)
    names = ("beta", "learning_rate")
    self.values = jax.device_put(np.float32([beta, rate, clip]), self.layout.replicated)
    self.program = train_program(
      stage, optimizer, microbatches, self.layout, self.blueprint, names, frozen_carry(carry)
    )
    self.state = init_state(
      params,
      self.blueprint,
      optimizer,
      self.layout,
      members=stage.members,
      carry=carry,
      seed=0,
    )
    self.frozen = jax.device_put(params["frozen"], self.layout.replicated)
    self.metrics, self.flags = [], []

  def step(self, batch):
    columns = self.layout.put_batch(batch, self.stage.members)
    self.state, metrics, flags = self.program(self.state, self.frozen, columns, self.values)
    self.metrics.append({k: float(v) for k, v in jax.device_get(metrics).items()})
    self.flags.append(np.asarray(flags))
    return self

  def steps(self, dataset, count, size=16):
    for i in range(count):
      self.step(dataset.batch(np.arange(i * size, (i + 1) * size) % len(dataset)))
    return self
