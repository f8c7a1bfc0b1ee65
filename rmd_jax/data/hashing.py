"""Stable hashes: the same number for the same words on every machine, version and day.

NumPy does not promise that a generator's stream survives an upgrade, and Python salts `hash`. A
run that is resumed, or members that are added later, need decisions that never move.
"""

import hashlib
from collections.abc import Sequence

import numpy as np


def hash64(*parts: object) -> int:
  """64 bits of BLAKE2b over the parts' text, kept apart by a separator."""
  text = "\x1f".join(str(part) for part in parts)
  # surrogatepass: an id may hold a lone surrogate, and it names an example as well as any other.
  digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
  return int.from_bytes(digest, "little")


def hash_ids(ids: Sequence[str] | np.ndarray) -> np.ndarray:
  """[M] uint64: one hash an id."""
  return np.fromiter((hash64(text) for text in ids), np.uint64, count=len(ids))


def mix(values: np.ndarray, *parts: object) -> np.ndarray:
  """Hashes `values` (uint64) afresh for each `parts`: SplitMix64's finaliser over a keyed state.

  Source: Steele, Lea and Flood, Fast splittable pseudorandom number generators (2014).
  """
  state = values.astype(np.uint64) + np.uint64(hash64(*parts))  # wraps modulo 2**64, as meant
  for _ in range(2):  # twice, because consecutive row numbers are close inputs
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    state = state ^ (state >> np.uint64(31))
  return state


def uniform(values: np.ndarray, *parts: object) -> np.ndarray:
  """Like `mix`, as float64 in [0, 1)."""
  return (mix(values, *parts) >> np.uint64(11)).astype(np.float64) * 2.0**-53
