"""The training loop's own step, to be called again and again: program, batches, donated state."""

from collections.abc import Mapping
from typing import Any

import jax

from benchmarks.sizes import Size
from benchmarks.timing import Compiled, compiled
from rmd_jax.data.batch import Dataset
from rmd_jax.data.loader import Loader
from rmd_jax.training.partitioning import MeshConfig, layout
from rmd_jax.training.settings import Training, hyper_table
from rmd_jax.training.stage import Params, Stage
from rmd_jax.training.state import Blueprint, frozen_carry, init_state
from rmd_jax.training.step import train_program


class Step:
  """A stage in training. A call is one step: the loader's batch, then the program on it.

  The loop does the same, and reads a step's numbers while the next one runs; here a step is waited
  for before the next one begins. The state is donated and replaced, as in the loop.

  Attributes:
    compiled: the program.
    metrics: of the last step, on the device.
  """

  def __init__(
    self,
    stage: Stage,
    size: Size,
    dataset: Dataset,
    params: Params,
    axes: Params,
    *,
    hyper: Mapping[str, float] | None = None,
    carry: Any = (),
    microbatches: int = 1,
    like: "Step | None" = None,
  ) -> None:
    """Compiles the step, or takes the program of `like`, which is of an equal stage."""
    training = Training(
      steps=1, batch_size=size.batch, learning_rate=1e-4, microbatches=microbatches
    )
    names, table = hyper_table(training, hyper or {})
    self._place, self._members = layout(MeshConfig()), stage.members
    self._loader = Loader(dataset, size.batch, seed=0)
    self._values = table[0]
    blueprint = Blueprint.of(params, axes)
    self._state = init_state(
      params,
      blueprint,
      training.optimizer,
      self._place,
      members=stage.members,
      carry=carry,
      seed=0,
    )
    frozen = blueprint.shardings(self._place)["frozen"]
    self._frozen = self._place.put(params["frozen"], frozen)
    self._taken = 0
    self.metrics: dict[str, jax.Array] = {}
    if like is None:
      program = train_program(
        stage,
        training.optimizer,
        microbatches,
        self._place,
        blueprint,
        names,
        frozen_carry(carry),
      )
      self.compiled: Compiled = compiled(program, self._state, self._frozen, *self.inputs())
    else:
      self.compiled = like.compiled

  def inputs(self) -> tuple[dict[str, jax.Array], jax.Array]:
    """The next batch and the numbers of the step, on the device."""
    columns = self._place.put_batch(self._loader.batch(self._taken), self._members)
    return columns, jax.device_put(self._values, self._place.replicated)

  def __call__(self) -> Any:
    """One step; returns all that has to be waited for."""
    self._state, self.metrics, flags = self.compiled.program(
      self._state, self._frozen, *self.inputs()
    )
    self._taken += 1
    return self._state, self.metrics, flags

  def host(self) -> None:
    """A step's work on the host without the program: the batch there, the numbers back."""
    jax.block_until_ready(self.inputs())
    for value in jax.device_get(self.metrics).values():
      float(value)


def policy(params: Any) -> Params:
  """A policy's parameters, or their axes, in the loop's groups."""
  return {"frozen": {}, "shared": params, "members": {}}
