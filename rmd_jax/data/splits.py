"""Train, validation, test and judge parts, by a hash of the prompt.

A prompt's part depends on the prompt and the seed alone: not on the file's order, its other
records, or the host. All records of a prompt fall into one part. The judge's part (a held-out
reward model is trained on it) is seen by no other stage.
"""

import dataclasses
import hashlib
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from rmd_jax.errors import UserError

PARTS = ("train", "validation", "test", "judge")


def hash_uniform(seed: int, texts: Sequence[str]) -> Float[np.ndarray, " M"]:
  """A number in [0, 1) for each text, uniform over texts; float64, 53 bits of SHA-256."""
  start = hashlib.sha256(f"{seed}|".encode())
  bits = np.empty(len(texts), np.uint64)
  for row, text in enumerate(texts):
    digest = start.copy()
    digest.update(text.encode("utf-8"))
    bits[row] = int.from_bytes(digest.digest()[:8], "big") >> 11
  return bits.astype(np.float64) / 2.0**53


@dataclasses.dataclass(frozen=True)
class Splits:
  """Fractions of the prompts; what is left trains.

  Attributes:
    validation: evaluated during training, and chooses checkpoints.
    test: evaluated at the end.
    judge: trains the held-out reward model, nothing else; 0 where an oracle judges.
    seed: another seed, other parts.
  """

  validation: float = 0.05
  test: float = 0.05
  judge: float = 0.0
  seed: int = 0

  def __post_init__(self) -> None:
    for name in PARTS[1:]:
      fraction = getattr(self, name)
      if not 0 <= fraction < 1:
        raise UserError(f"Splits.{name} is {fraction}; give a fraction in [0, 1)")
    total = math.fsum((self.validation, self.test, self.judge))
    if total >= 1:
      raise UserError(f"Splits: the fractions add up to {total:g} and leave nothing to train on")

  def assign(self, prompts: Sequence[str]) -> np.ndarray:
    """[M] indices into `PARTS`."""
    # The judge's part comes first, so that other fractions can change without leaking into it.
    order = ("judge", "test", "validation")
    edges = np.cumsum([getattr(self, name) for name in order])
    place = np.searchsorted(edges, hash_uniform(self.seed, prompts), side="right")
    return np.array([PARTS.index(name) for name in (*order, "train")])[place]

  def rows(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
    """The rows of each part, in their order.

    Raises:
      UserError: a part that was asked for is empty.
    """
    part = self.assign(prompts)
    rows = {name: np.flatnonzero(part == i) for i, name in enumerate(PARTS)}
    for name in PARTS:
      wanted = name == "train" or getattr(self, name) > 0
      if wanted and not len(rows[name]):
        raise UserError(
          f"data: no example falls into the {name} part ({len(part)} examples, "
          f"{len(set(prompts))} prompts); give more data, or "
          + ("smaller other parts" if name == "train" else f"set Splits.{name} to more, or to 0")
        )
    return rows
