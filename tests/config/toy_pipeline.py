"""A small pipeline of plain dataclasses for the tests of the configuration."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol


class Objective(Protocol):
  """As rmd_jax's: what Align.objective takes."""

  def __call__(self, log_ratios: Any) -> Any:
    """The loss."""


@dataclasses.dataclass(frozen=True)
class DPO:
  """An objective with a traced number, which is in its key all the same."""

  beta: float = dataclasses.field(compare=False)
  gamma: float | Callable[[int], float] = 0.0
  label_smoothing: float = 0.0

  def __call__(self, log_ratios: Any) -> Any:
    """The loss."""
    return log_ratios


@dataclasses.dataclass(frozen=True)
class IPO:
  """Another."""

  tau: float

  def __post_init__(self) -> None:
    if self.tau <= 0:
      raise ValueError(f"tau must be positive, not {self.tau}")

  def __call__(self, log_ratios: Any) -> Any:
    """The loss."""
    return log_ratios


@dataclasses.dataclass(frozen=True)
class Files:
  """A source of data."""

  files: str | tuple[str, ...]
  rho: float | None = None


@dataclasses.dataclass(frozen=True)
class World:
  """Another source."""

  size: int = 10


@dataclasses.dataclass(frozen=True)
class Training:
  """Numbers of a loop."""

  steps: int = 10
  learning_rate: float = 1e-3
  schedule: Literal["constant", "cosine"] | Callable[[int], float] = "constant"
  donate: bool = True


@dataclasses.dataclass(frozen=True)
class Align:
  """A stage."""

  training: Training = Training()
  objective: Objective | None = None
  hyper: Mapping[str, float] | None = None


@dataclasses.dataclass(frozen=True)
class Run:
  """The root."""

  source: Files | World
  align: Align
  objectives: tuple[str, ...] = ()
  seeds: tuple[int, ...] = (0,)
  sizes: tuple[int, float] = (1, 1.0)
  label: str = dataclasses.field(default="", metadata={"key": False})
  extra: Any = None


@dataclasses.dataclass(frozen=True)
class Loop:
  """Refers to itself, if a configuration says so."""

  inner: Any = None


def ramp(step: int, slope: float = 1.0) -> float:
  """A schedule as a function."""
  return step * slope


def make_ramp(slope: float) -> Callable[[int], float]:
  """A schedule as optax makes them: a local function."""

  def schedule(step: int) -> float:
    return step * slope

  return schedule


PUBLIC = {
  name: f"toy_pipeline:{name}"
  for name in [
    "Run",
    "Align",
    "Training",
    "Files",
    "World",
    "DPO",
    "IPO",
    "Loop",
    "ramp",
    "make_ramp",
  ]
} | {"Missing": "toy_pipeline_missing:Missing", "Gone": "toy_pipeline:Gone"}
