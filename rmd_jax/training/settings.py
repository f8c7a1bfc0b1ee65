"""How a stage is trained: the numbers that gin sets, and their value at every step."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from rmd_jax.errors import UserError
from rmd_jax.training.optimisers import AdamW, Optimizer, Schedule, learning_rates

Hyper = Mapping[str, float | np.ndarray]


@dataclasses.dataclass(frozen=True)
class Training:
  """How a stage is trained.

  Attributes:
    steps: number of steps.
    batch_size: examples a step, over all hosts.
    learning_rate: after the warm-up; None with a schedule that is a function.
    schedule: "constant", "linear", "cosine", or a function from the step to the rate.
    warmup_steps: steps of linear rise before it.
    optimizer: `AdamW()` or `Adafactor()`.
    clip_norm: bound of the gradient's global norm, of the shared parameters and of each member
      for itself; None: no bound.
    microbatches: parts that a batch is worked through in, one after the other, to save memory.
    eval_every: steps between evaluations on the validation data; None: only at the end.
    metric: what selects the best checkpoint, a name that evaluation writes.
    mode: whether the least ("min") or the greatest ("max") is best.
    patience: stop after this many evaluations in a row without a new best; 0 never stops.
    checkpoint_every: steps between checkpoints; None: at a new best and at the end.
    keep_last: checkpoints kept besides the best.
    keep_best: best checkpoints kept; 0 keeps none, and the last one is the result.
    log_every: steps between lines of metrics.
    max_bad_steps: stop when so many steps in a row are not finite.
  """

  steps: int
  batch_size: int
  learning_rate: float | None
  schedule: Schedule = "constant"
  warmup_steps: int = 0
  optimizer: Optimizer = AdamW()
  clip_norm: float | None = 1.0
  microbatches: int = 1
  eval_every: int | None = None
  metric: str = "eval/loss"
  mode: str = "min"
  patience: int = 0
  checkpoint_every: int | None = dataclasses.field(default=None, metadata={"key": False})
  keep_last: int = dataclasses.field(default=1, metadata={"key": False})
  keep_best: int = 1
  log_every: int = dataclasses.field(default=10, metadata={"key": False})
  max_bad_steps: int = 10

  def __post_init__(self) -> None:
    for name in ("steps", "batch_size", "microbatches", "keep_last", "log_every", "max_bad_steps"):
      if getattr(self, name) < 1:
        raise UserError(f"Training.{name} = {getattr(self, name)}: it must be at least 1.")
    for name in ("eval_every", "checkpoint_every"):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise UserError(f"Training.{name} = {value}: it must be at least 1, or None.")
    for name in ("patience", "keep_best", "warmup_steps"):
      if getattr(self, name) < 0:
        raise UserError(f"Training.{name} = {getattr(self, name)}: it must be at least 0.")
    if self.clip_norm is not None and not self.clip_norm > 0:
      raise UserError(f"Training.clip_norm = {self.clip_norm}: it must be positive, or None.")
    if self.mode not in ("min", "max"):
      raise UserError(f"Training.mode = {self.mode!r}: it must be 'min' or 'max'.")
    if self.batch_size % self.microbatches:
      raise UserError(
        f"Training.batch_size = {self.batch_size} does not divide into"
        f" microbatches = {self.microbatches}."
      )

  def rates(self) -> Float[np.ndarray, " steps"]:
    """The learning rate of every step."""
    return learning_rates(
      self.schedule, peak=self.learning_rate, steps=self.steps, warmup_steps=self.warmup_steps
    )


def hyper_table(
  training: Training, hyper: Hyper
) -> tuple[tuple[str, ...], Float[np.ndarray, "S H"]]:
  """The names of hyper, sorted, and their value at each step; the clipping norm comes last."""
  columns: dict[str, Any] = dict(hyper)
  reserved = {"learning_rate", "training"} & columns.keys()
  if reserved:
    raise ValueError(f"hyper may not hold {sorted(reserved)}: the loop sets them")
  columns["learning_rate"] = training.rates()
  names = tuple(sorted(columns))
  clip = np.inf if training.clip_norm is None else training.clip_norm
  table = np.empty((training.steps, len(names) + 1), np.float32)
  for j, name in enumerate(names):
    value = np.asarray(columns[name], np.float64)
    if value.shape not in ((), (training.steps,)):
      raise ValueError(f"hyper[{name!r}] has shape {value.shape}: a number, or one a step")
    if not np.all(np.isfinite(value)):
      raise UserError(f"{name} is not finite at every step of the training.")
    table[:, j] = value
  table[:, -1] = clip
  return names, table
