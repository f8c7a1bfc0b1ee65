"""Which example counts for which member, and data sets drawn to a bias towards length.

Everything here follows from a hash of (seed, member, example id): the order of the file, the number
of hosts and the number of other members change nothing. "Longer" means at least 10 % more
tokens, EOS included, as in the paper.

Source: Fisch et al., arXiv 2405.19316, the TL;DR experiment.
"""

import dataclasses
import math
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int

from rmd_jax.data import hashing
from rmd_jax.data.batch import Dataset
from rmd_jax.errors import UserError


@runtime_checkable
class Subsets(Protocol):
  """How the members of a family share the data."""

  def weights(self, dataset: Dataset, members: int, seed: int) -> Float[np.ndarray, "K M"]:
    """Weight >= 0 of each example for each of the K members of the family, float32."""


@dataclasses.dataclass(frozen=True)
class AllData:
  """Every member sees everything; members differ by initialisation alone."""

  def weights(self, dataset: Dataset, members: int, seed: int) -> Float[np.ndarray, "K M"]:
    """All ones."""
    del seed
    return np.ones((members, len(dataset)), np.float32)


@dataclasses.dataclass(frozen=True)
class BootstrapSubsets:
  """Each member sees an example Poisson(1) times, which is the bootstrap of a stream."""

  def weights(self, dataset: Dataset, members: int, seed: int) -> Float[np.ndarray, "K M"]:
    """Whole numbers 0, 1, 2, …"""
    ids = hashing.hash_ids(dataset.ids)
    # 1 - 1e-19 and 1 are one float64: the table's end is never reached.
    table = np.cumsum([math.exp(-1) / math.factorial(n) for n in range(20)])
    chance = np.stack([hashing.uniform(ids, "bootstrap", seed, k) for k in range(members)])
    return _checked(np.searchsorted(table, chance, side="right"), "BootstrapSubsets")


@dataclasses.dataclass(frozen=True)
class DisjointSubsets:
  """Each example belongs to one member."""

  def weights(self, dataset: Dataset, members: int, seed: int) -> Float[np.ndarray, "K M"]:
    """One 1 a column."""
    ids = hashing.hash_ids(dataset.ids)
    owner = hashing.mix(ids, "disjoint", seed) % np.uint64(members)
    return _checked(owner == np.arange(members, dtype=np.uint64)[:, None], "DisjointSubsets")


@dataclasses.dataclass(frozen=True)
class BiasedSubsets:
  """Each member sees a subset in which the longer response wins in its own fraction of pairs.

  Pairs in which neither response is longer are in every subset and do not count in the fraction.

  Attributes:
    targets: a fraction for each member of the family.
  """

  targets: tuple[float, ...] = (0.2, 0.4, 0.5, 0.6, 0.8)

  def weights(self, dataset: Dataset, members: int, seed: int) -> Float[np.ndarray, "K M"]:
    """Ones and zeros.

    Raises:
      UserError: `members` differs from the number of targets, or a target cannot be reached.
    """
    if members != len(self.targets):
      raise UserError(
        f"BiasedSubsets.targets names {len(self.targets)} members {self.targets}, the family has "
        f"{members}: give as many targets as members"
      )
    ids, wins = hashing.hash_ids(dataset.ids), length_wins(dataset)
    return _checked(
      np.stack(
        [
          _kept(wins, target, hashing.uniform(ids, "biased", seed, k))
          for k, target in enumerate(self.targets)
        ]
      ),
      "BiasedSubsets",
    )


@dataclasses.dataclass(frozen=True)
class LengthBiased:
  """A data set's bias towards length, set to `rho` by leaving pairs out (the paper's D_rho)."""

  rho: float

  def rows(self, dataset: Dataset, seed: int) -> Int[np.ndarray, " R"]:
    """The rows that stay; see `resample_to`."""
    return resample_to(dataset, self.rho, seed)


def resample_to(dataset: Dataset, rho: float, seed: int) -> Int[np.ndarray, " R"]:
  """The rows, ascending, of a subset in which the longer response wins in a fraction `rho`.

  The fraction is of the pairs that have a longer response; the others all stay. As many pairs as
  possible are kept; the share is met up to the noise of the draw.

  Raises:
    UserError: `rho` is outside [0, 1], the data set has no pairs, or `rho` cannot be reached.
  """
  chance = hashing.uniform(hashing.hash_ids(dataset.ids), "resample", seed)
  return np.flatnonzero(_kept(length_wins(dataset), rho, chance))


def longer_wins(dataset: Dataset) -> float:
  """The fraction, of the pairs that have a longer response, in which it wins; else NaN."""
  wins = length_wins(dataset)
  decided = np.count_nonzero(wins)
  return np.count_nonzero(wins > 0) / decided if decided else math.nan


def length_wins(dataset: Dataset) -> Int[np.ndarray, " M"]:
  """1 where the longer response wins, -1 where it loses, 0 where neither is longer or neither wins.

  Raises:
    UserError: the records are not pairs.
  """
  if dataset.response_length.shape[1] != 2 or not dataset.mask.all():
    raise UserError(
      "bias towards length is defined for pairs, but some records have "
      f"{int(dataset.mask.sum(1).max())} responses: use AllData, BootstrapSubsets or "
      "DisjointSubsets"
    )
  first, second = dataset.response_length.T.astype(np.int64)
  longer = is_longer(first, second).astype(np.int64) - is_longer(second, first)
  return longer * _first_wins(dataset)


def is_longer(
  length: Int[np.ndarray, " M"], other: Int[np.ndarray, " M"]
) -> Bool[np.ndarray, " M"]:
  """At least 10 % more tokens; in whole numbers, because 1.1 is no float."""
  return 10 * length >= 11 * other


def _first_wins(dataset: Dataset) -> np.ndarray:
  """1, 0 or -1: response 0 of the pair wins, neither, it loses."""
  if dataset.preference is not None:
    return np.sign(dataset.preference - 0.5).astype(np.int64)
  if dataset.ranks is not None:
    return np.sign(dataset.ranks[:, 1] - dataset.ranks[:, 0]).astype(np.int64)
  if dataset.ratings is not None:
    return np.sign(dataset.ratings[:, 0] - dataset.ratings[:, 1]).astype(np.int64)
  return np.ones(len(dataset), np.int64)


def _kept(wins: np.ndarray, target: float, chance: np.ndarray) -> np.ndarray:
  """Keeps as much as a share of `target` allows: one side whole, the other with a probability."""
  if not 0 <= target <= 1:
    raise UserError(f"share of pairs that the longer response wins: {target} is outside 0 to 1")
  won, lost = np.count_nonzero(wins > 0), np.count_nonzero(wins < 0)
  if (target > 0 and not won) or (target < 1 and not lost):
    raise UserError(
      f"the longer response wins in {won} pairs and loses in {lost}: no subset of them has a share "
      f"of {target}. Use BootstrapSubsets, or more data."
    )
  # Kept counts won * p and lost * q with won * p * (1 - target) = lost * q * target, max(p, q) = 1.
  win_side, lose_side = won * (1 - target), lost * target
  keep_won = min(1.0, lose_side / win_side) if win_side else 1.0
  keep_lost = min(1.0, win_side / lose_side) if lose_side else 1.0
  keep = np.select([wins > 0, wins < 0], [keep_won, keep_lost], 1.0)
  return chance < keep


def _checked(weights: np.ndarray, kind: str) -> np.ndarray:
  empty = np.flatnonzero(~(weights > 0).any(1))
  if len(empty):
    raise UserError(
      f"{kind}: member {empty[0]} of {len(weights)} gets none of "
      f"{weights.shape[1]} examples. Use fewer members or more data."
    )
  return weights.astype(np.float32)
