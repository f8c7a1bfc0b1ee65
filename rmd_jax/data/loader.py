"""Which examples a step trains on, as a function of the step.

Position i of step s is example order(seed, epoch)[(s * B + i) mod M] of epoch (s * B + i) div M.
There is no iterator state: a run resumed at any step, on any number of hosts, sees what it would
have seen. Our own and not Grain: the columns lie in memory already, so that a batch is one fancy
index, and Grain's iterator state does not survive a change of the number of hosts.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import itertools
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int

from rmd_jax.data import hashing
from rmd_jax.data.batch import Batch, Dataset
from rmd_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Loader:
  """Batches of a data set, for one host.

  Attributes:
    dataset: all examples, the same on every host.
    batch_size: B, over all hosts; may be larger than the data set.
    seed: of the order.
    host: this host's number; it gets rows host * B / hosts to (host + 1) * B / hosts.
    hosts: how many there are.
  """

  dataset: Dataset
  batch_size: int
  seed: int
  host: int = 0
  hosts: int = 1

  def __post_init__(self) -> None:
    _check(self.batch_size, self.host, self.hosts)
    if not len(self.dataset):
      raise UserError(
        "loader: the data set has no examples; see the data stage's counts and splits"
      )

  def rows(self, step: int) -> Int[np.ndarray, " B"]:
    """The rows of the whole batch of `step`, all hosts together."""
    if step < 0:
      raise ValueError(f"loader: step {step} is negative")
    size = len(self.dataset)
    position = step * self.batch_size + np.arange(self.batch_size)
    epoch, offset = np.divmod(position, size)
    rows = np.empty(self.batch_size, np.int64)
    for number in range(int(epoch[0]), int(epoch[-1]) + 1):
      here = epoch == number
      rows[here] = permutation(self.seed, number, size)[offset[here]]
    return rows

  def batch(self, step: int) -> Batch:
    """This host's share of the batch of `step`, NumPy-backed."""
    return self.dataset.batch(_share(self.rows(step), self.batch_size, self.host, self.hosts))

  def prefetch(self, start: int, stop: int | None = None, ahead: int = 2) -> Iterator[Batch]:
    """The batches of steps `start`, `start` + 1, …, made on a thread while the last one is used.

    An exception on the thread is raised here, at the step that it belongs to.

    Args:
      start: the first step.
      stop: the step before which to end; None never ends.
      ahead: batches that wait, at most.
    """
    steps = itertools.count(start) if stop is None else iter(range(start, stop))
    with concurrent.futures.ThreadPoolExecutor(1, "loader") as thread:
      waiting = collections.deque(
        thread.submit(self.batch, step) for step in itertools.islice(steps, ahead)
      )
      while waiting:
        batch = waiting.popleft().result()
        waiting.extend(thread.submit(self.batch, step) for step in itertools.islice(steps, 1))
        yield batch


def eval_batches(
  dataset: Dataset, batch_size: int, host: int = 0, hosts: int = 1
) -> Iterator[Batch]:
  """Every example once, in the data set's order; rows of weight 0 fill the last batch.

  Every host gets the same number of batches of the same shape, the last one perhaps all filling.
  """
  _check(batch_size, host, hosts)
  rows = np.arange(len(dataset))
  for first in range(0, len(dataset), batch_size):
    share = _share(rows[first : first + batch_size], batch_size, host, hosts)
    yield dataset.batch(share, size=batch_size // hosts)


@functools.lru_cache(maxsize=4)  # an epoch's end and the next one's beginning, twice over
def permutation(seed: int, epoch: int, size: int) -> Int[np.ndarray, " M"]:
  """The order of an epoch, by hash, so that an upgrade of NumPy does not shuffle a resumed run."""
  order = np.argsort(hashing.mix(np.arange(size), "order", seed, epoch), kind="stable")
  order.setflags(write=False)  # it is shared
  return order


def _share(rows: np.ndarray, batch_size: int, host: int, hosts: int) -> np.ndarray:
  size = batch_size // hosts
  return rows[host * size : (host + 1) * size]


def _check(batch_size: int, host: int, hosts: int) -> None:
  if not 0 <= host < hosts:
    raise ValueError(f"loader: host {host} of {hosts}")
  if batch_size < 1 or batch_size % hosts:
    raise UserError(
      f"batch_size = {batch_size} does not divide among {hosts} hosts: choose a multiple of {hosts}"
    )
