"""Times taken in turn, and what is made of them."""

import dataclasses
import gc
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

Seconds = Float[np.ndarray, " rounds"]


class Spread(NamedTuple):
  """The median of some measurements, the least and the greatest of them."""

  median: float
  low: float
  high: float

  @classmethod
  def of(cls, values: np.ndarray) -> "Spread":
    """The spread of the values [rounds]."""
    return cls(float(np.median(values)), float(values.min()), float(values.max()))


@dataclasses.dataclass(frozen=True)
class Effort:
  """How long to measure.

  Attributes:
    seconds: rounds go on for so long, whatever the machine does beside.
    least: rounds at least.
    most: rounds at most.
  """

  seconds: float
  least: int
  most: int


def interleave(contenders: Mapping[str, Callable[[], Any]], effort: Effort) -> dict[str, Seconds]:
  """The time of every contender in every round.

  A round calls each once, in order, and waits for what it returns. Two rounds to warm up are not
  counted. Python's collector of cycles rests meanwhile.

  Args:
    contenders: by name; a call does one piece of work and returns its arrays.
    effort: how many rounds.
  """
  times: dict[str, list[float]] = {name: [] for name in contenders}
  for _ in range(2):
    for call in contenders.values():
      jax.block_until_ready(call())
  gc.collect()
  gc.disable()
  try:
    begin, rounds = time.perf_counter(), 0
    while rounds < effort.least or (
      rounds < effort.most and time.perf_counter() - begin < effort.seconds
    ):
      for name, call in contenders.items():
        start = time.perf_counter()
        jax.block_until_ready(call())
        times[name].append(time.perf_counter() - start)
      rounds += 1
  finally:
    gc.enable()
  return {name: np.array(values) for name, values in times.items()}


class Compiled(NamedTuple):
  """A compiled program, and the seconds that tracing, lowering and compiling it took."""

  program: Any
  seconds: float

  @property
  def temporary_bytes(self) -> int:
    """Peak of the memory that the program takes beside its arguments and results."""
    return int(self.program.memory_analysis().temp_size_in_bytes)

  @property
  def flops(self) -> float:
    """Floating-point operations by XLA's count, which takes the body of a loop once."""
    return float(self.program.cost_analysis()["flops"])


def compiled(jitted: Any, *arguments: Any) -> Compiled:
  """Compiles for these arguments."""
  begin = time.perf_counter()
  program = jitted.lower(*arguments).compile()
  return Compiled(program, time.perf_counter() - begin)


class Matmul:
  """A large float32 product: what this machine can do, to compare steps with."""

  def __init__(self, size: int) -> None:
    self.flops = 2.0 * size**3
    operand = jax.random.normal(jax.random.key(0), (size, size))
    self._operand = operand
    self._program = jax.jit(lambda a, b: a @ b).lower(operand, operand).compile()

  def __call__(self) -> jax.Array:
    """One product."""
    return self._program(self._operand, self._operand)


@dataclasses.dataclass(frozen=True)
class Rate:
  """A step's model FLOP/s beside the product's of the same rounds.

  Attributes:
    name: of the step.
    flops: of the model a step, forward and backward, recomputation not counted.
    seconds: a step took.
    peak: FLOP/s of the product in the same rounds.
  """

  name: str
  flops: float
  seconds: Seconds
  peak: Seconds

  @property
  def share(self) -> Spread:
    """Of the product's rate."""
    return Spread.of(self.flops / self.seconds / self.peak)
