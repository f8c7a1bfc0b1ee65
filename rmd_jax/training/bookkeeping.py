"""What the loop keeps count of: the best evaluation so far, and the time that steps take."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

from rmd_jax.training.settings import Training


@dataclasses.dataclass
class Selection:
  """What evaluation has found so far; all of it is in every checkpoint.

  Attributes:
    evaluated: the last step evaluated.
    metrics: the whole evaluation there.
    best: the best value of the metric; NaN is never best, and of equals the earliest is.
    best_step: where it was.
    best_metrics: the whole evaluation there.
    stale: evaluations since.
    stopped: whether patience ran out.
  """

  evaluated: int = 0
  metrics: dict[str, float] = dataclasses.field(default_factory=dict)
  best: float | None = None
  best_step: int = 0
  best_metrics: dict[str, float] = dataclasses.field(default_factory=dict)
  stale: int = 0
  stopped: bool = False

  def consider(self, step: int, metrics: dict[str, float], training: Training) -> None:
    """Takes account of an evaluation."""
    value = metrics[training.metric]
    self.evaluated, self.metrics = step, metrics
    gain = self.best is None or sign(training) * value < sign(training) * self.best
    if gain and not math.isnan(value):
      self.best, self.best_step, self.best_metrics, self.stale = value, step, metrics, 0
    else:
      self.stale += 1
    self.stopped = 0 < training.patience <= self.stale

  def rank(self, step: int, training: Training) -> float | None:
    """The number that ranks a checkpoint of this step, least first; None: it is not a best one."""
    if training.keep_best == 0 or self.best is None or step != self.best_step:
      return None
    return sign(training) * self.best

  def metrics_at(self, step: int) -> dict[str, float]:
    """The evaluation at the best or the last evaluated step; empty for another."""
    known = {self.best_step: self.best_metrics, self.evaluated: self.metrics}
    return dict(known.get(step, {}))

  def as_json(self) -> dict[str, Any]:
    """JSON has no NaN and no infinities: numbers become their text."""
    return dataclasses.asdict(self) | {
      "best": None if self.best is None else repr(self.best),
      "metrics": {name: repr(value) for name, value in self.metrics.items()},
      "best_metrics": {name: repr(value) for name, value in self.best_metrics.items()},
    }

  @classmethod
  def of_json(cls, value: Mapping[str, Any]) -> "Selection":
    """The inverse of `as_json`."""

    def numbers(texts: Mapping[str, str]) -> dict[str, float]:
      return {name: float(text) for name, text in texts.items()}

    read = {
      "best": None if value["best"] is None else float(value["best"]),
      "metrics": numbers(value["metrics"]),
      "best_metrics": numbers(value["best_metrics"]),
    }
    return cls(**{**value, **read})


def sign(training: Training) -> float:
  """What makes the metric one of which less is better."""
  return 1.0 if training.mode == "min" else -1.0


class Clock:
  """Seconds a step and tokens a second since the last lap, without what is not training."""

  def __init__(self, step: int) -> None:
    self.restart(step)

  def restart(self, step: int) -> None:
    """Begins a lap after `step` steps."""
    self._step, self._begin, self._idle = step, time.perf_counter(), 0.0
    self.tokens = 0

  @contextlib.contextmanager
  def stopped(self) -> Iterator[None]:
    """Leaves out the time of the block."""
    begin = time.perf_counter()
    yield
    self._idle += time.perf_counter() - begin

  def lap(self, step: int) -> dict[str, float]:
    """The lap's numbers, and a new lap; empty when no step lies in it (it compiled)."""
    steps, seconds = step - self._step, time.perf_counter() - self._begin - self._idle
    tokens = self.tokens
    self.restart(step)
    if steps < 1:
      return {}
    return {
      "perf/step_seconds": seconds / steps,
      "perf/tokens_per_second": tokens / max(seconds, 1e-9),
    }
