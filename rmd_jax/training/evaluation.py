"""Running a stage, or any function of (params, batch), over a data set without training."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from rmd_jax.data.batch import Batch, Dataset
from rmd_jax.data.loader import eval_batches
from rmd_jax.training.partitioning import Layout, Mesh, MeshConfig, shardings
from rmd_jax.training.partitioning import layout as layout_of
from rmd_jax.training.stage import Params, Stage
from rmd_jax.training.state import RNG
from rmd_jax.training.step import eval_program

Hyper = Mapping[str, float]


class Totals:
  """Sums and weights of an evaluation's batches, added up on the host in float64."""

  def __init__(self) -> None:
    self._sum: Any = 0.0
    self._weight: Any = 0.0
    self._aux: dict[str, float] = {}

  def add(self, total: np.ndarray, weight: np.ndarray, aux: Mapping[str, np.ndarray]) -> None:
    """Adds a batch's; aux are averages over it, weighted by its weight."""
    size = float(np.sum(weight, dtype=np.float64))
    if size == 0.0:
      return
    self._sum = self._sum + np.asarray(total, np.float64)
    self._weight = self._weight + np.asarray(weight, np.float64)
    for name, value in aux.items():
      self._aux[name] = self._aux.get(name, 0.0) + float(value) * size

  def means(self) -> dict[str, float]:
    """`loss`, with members also `loss_member_k`, and each aux; NaN without any weight."""
    weight = np.asarray(self._weight)
    size = float(weight.sum())
    if size == 0.0:
      return {"loss": math.nan}
    losses = np.where(weight == 0, 0.0, self._sum / np.where(weight == 0, 1.0, weight))
    out = {"loss": float(losses.sum())}
    if losses.ndim:
      out |= {f"loss_member_{k}": float(loss) for k, loss in enumerate(losses)}
    return out | {name: value / size for name, value in self._aux.items()}


def run_evaluation(
  stage: Stage,
  place: Layout,
  *,
  params: Params,
  carry: Any,
  step: Any,
  rng: Any,
  dataset: Dataset,
  batch_size: int,
  hyper: Hyper,
  stop: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
  """The means over a data set; parameters, carry, step and rng are on the devices already.

  Returns:
    As `Totals.means`; None when `stop` said so between two batches.
  """
  place.check_batch(batch_size, stage.members, "the evaluation's batch size")
  names = tuple(sorted(hyper))
  program = eval_program(stage, place, names)
  values = jax.device_put(np.array([hyper[n] for n in names], np.float32), place.replicated)
  totals, late = Totals(), None
  for batch in eval_batches(dataset, batch_size, jax.process_index(), jax.process_count()):
    if stop():
      return None
    result = program(params, carry, step, rng, place.put_batch(batch, stage.members), values)
    if late is not None:  # read while the device works on the next one
      totals.add(*jax.device_get(late))
    late = result
  if late is not None:
    totals.add(*jax.device_get(late))
  return totals.means()


def _placed(params: Any, axes: Any, place: Layout) -> Any:
  if axes is not None:
    return jax.device_put(params, shardings(axes, place.mesh, params, place.rules))

  def put(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array) and leaf.sharding.device_set == set(place.mesh.devices.flat):
      return leaf
    return jax.device_put(leaf, place.replicated)

  return jax.tree.map(put, params)


def evaluate(
  stage: Stage,
  params: Params,
  dataset: Dataset,
  *,
  batch_size: int,
  hyper: Hyper,
  mesh: Mesh | MeshConfig,
  axes: Params | None = None,
  carry: Any = (),
  step: int = 0,
  seed: int = 0,
) -> dict[str, float]:
  """A stage's loss and aux over a data set: the same outputs and objective as in training.

  hyper["training"] is 0 here (1 in training), and the carry stays as it is given.

  Args:
    stage: what is evaluated.
    params: frozen, shared, members.
    dataset: every example counts once.
    batch_size: examples a step; a coupled objective's value depends on it.
    hyper: numbers by name, as for `fit`.
    mesh: the devices.
    axes: the parameters' logical axes; None leaves them where they are on these devices (or puts
      a whole copy on each).
    carry: the objective's state.
    step: the step that the objective is told.
    seed: of the random key that the model is given.

  Returns:
    `loss` (with members: the sum over them, and `loss_member_k`), and each aux averaged by weight.
  """
  place = layout_of(mesh)
  key = np.array(jax.random.key_data(jax.random.key(seed, impl=RNG)))
  means = run_evaluation(
    stage,
    place,
    params=_placed(params, axes, place),
    carry=jax.device_put(carry, place.replicated),
    step=jax.device_put(np.int32(step), place.replicated),
    rng=jax.device_put(key, place.replicated),
    dataset=dataset,
    batch_size=batch_size,
    hyper={"learning_rate": 0.0, **hyper},
  )
  assert means is not None  # nothing asked it to stop
  return means


@functools.lru_cache(maxsize=64)
def _map_program(function: Callable[..., Any], owner: Any) -> Any:
  """One program for equal functions; a method of an equal frozen dataclass is an equal function."""

  def mapped(params: Any, columns: dict[str, Any]) -> Any:
    arguments = () if owner is None else (owner,)
    return function(*arguments, params, Batch(**columns))

  return jax.jit(mapped)


def map_batches(
  fn: Callable[[Any, Batch], Any],
  params: Any,
  dataset: Dataset,
  batch_size: int,
  mesh: Mesh | MeshConfig,
  *,
  axes: Any = None,
  rows: np.ndarray | None = None,
  members: int = 0,
) -> Iterator[tuple[np.ndarray, Any]]:
  """Applies a function to a data set in batches, and yields what it gives on the host.

  Args:
    fn: of (params, batch), with examples on axis 0 of every output, or 1 where `members` > 0. A
      plain function, or a method of a frozen dataclass (equal ones share one compiled program).
    params: passed on.
    dataset: the examples.
    batch_size: examples a step.
    mesh: the devices.
    axes: the parameters' logical axes, as for `evaluate`.
    rows: which examples, by default all.
    members: of the outputs.

  Yields:
    (rows, outputs) of each batch, NumPy, without the rows that fill the last one.
  """
  place = layout_of(mesh)
  place.check_batch(batch_size, members, "batch_size")
  program = _map_program(getattr(fn, "__func__", fn), getattr(fn, "__self__", None))
  params = _placed(params, axes, place)

  def fetched(index: np.ndarray, out: Any) -> tuple[np.ndarray, Any]:
    real = len(index)
    host = jax.device_get(out)
    return index, jax.tree.map(lambda v: v[:, :real] if members else v[:real], host)

  late: tuple[np.ndarray, Any] | None = None
  wanted = np.arange(len(dataset)) if rows is None else rows
  for start in range(0, len(wanted), batch_size):
    batch = dataset.batch(wanted[start : start + batch_size], batch_size)
    index = np.asarray(batch.index)
    result = program(params, place.put_batch(batch, members))
    if late is not None:
      yield fetched(*late)
    late = (index[index >= 0], result)
  if late is not None:
    yield fetched(*late)
