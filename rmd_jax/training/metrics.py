"""A run's numbers over time: metrics.jsonl, and the same as TensorBoard events.

A line is one object, `{"step": 7, "time": 1.7e9, "loss/total": 0.69, …}`. Training and evaluation
of the same step are lines of their own (evaluation's names begin with "eval/"), but no name occurs
twice at a step. JSON has no NaN and no infinities: they are written as the strings "NaN",
"Infinity" and "-Infinity", which `read_metrics` turns back into numbers.

Why a restart neither repeats nor misses a step: what is written up to a step is flushed before that
step's checkpoint commits, and `cut_to` removes what is later than the checkpoint restored. All
of a step's lines have to be written before its checkpoint is.
"""

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rmd_jax.training import files
from rmd_jax.training.progress import log

_NAMES = {math.inf: "Infinity", -math.inf: "-Infinity"}
_VALUES = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _number(name: str, value: Any) -> int | float:
  array = np.asarray(value)
  if array.shape != () or (array.dtype.kind not in "biu" and not _is_float(array.dtype)):
    raise ValueError(f"metric {name!r} must be one real number, not {array.dtype}{array.shape}")
  return int(array) if array.dtype.kind in "biu" else float(array)


def _is_float(dtype: np.dtype) -> bool:
  return dtype.kind == "f" or dtype.name in ("bfloat16", "float8_e4m3fn", "float8_e5m2")


def _encoded(value: int | float) -> int | float | str:
  if isinstance(value, int) or math.isfinite(value):
    return value
  return "NaN" if math.isnan(value) else _NAMES[value]


def _parsed(line: bytes) -> dict[str, Any] | None:
  """A line's object with its numbers restored, or None for what is no line of metrics."""
  try:
    row = json.loads(line)
  except ValueError:  # a torn line; UnicodeDecodeError is a ValueError too
    return None
  if not isinstance(row, dict) or not isinstance(row.get("step"), int):
    return None
  return {k: _VALUES.get(v, v) if isinstance(v, str) else v for k, v in row.items()}


def read_metrics(path: Path) -> list[dict[str, Any]]:
  """The lines of a metrics.jsonl, in order; a torn last line (a kill, a full disk) is left out.

  Args:
    path: the file, or the directory that holds metrics.jsonl.

  Raises:
    ValueError: a line before the last is no line of metrics.
  """
  path = path / "metrics.jsonl" if path.is_dir() else path
  lines = path.read_bytes().split(b"\n")
  rows = []
  for number, line in enumerate(lines, 1):
    row = _parsed(line)
    if row is not None:
      rows.append(row)
    elif line and number < len(lines):
      raise ValueError(f"{path}:{number}: this is no line of metrics: {line[:80]!r}")
  return rows


class _Events:
  """TensorBoard's event file, written without TensorFlow (tensorboard's own writer loads it)."""

  def __init__(self, directory: Path, purge_step: int | None) -> None:
    from tensorboard.compat.proto import event_pb2, summary_pb2
    from tensorboard.summary.writer.record_writer import RecordWriter

    self._event, self._summary = event_pb2.Event, summary_pb2.Summary
    files.make_directory(directory)
    now = time.time_ns()  # TensorBoard reads files in the order of their names
    self.path = (
      directory / f"events.out.tfevents.{now // 10**9:010d}.{now % 10**9:09d}.{os.getpid()}"
    )
    self._buffer = bytearray()
    self._records = RecordWriter(self)
    self._add(file_version="brain.Event:2")
    if purge_step is not None:  # TensorBoard then drops this step and later ones of older files
      start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
      self._add(session_log=start, step=purge_step)
    self.flush()

  def write(self, data: bytes) -> None:
    """Called by RecordWriter with a framed record."""
    self._buffer += data

  def _add(self, **fields: Any) -> None:
    self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())

  def scalars(self, step: int, values: Mapping[str, int | float]) -> None:
    summary = self._summary(
      value=[self._summary.Value(tag=k, simple_value=v) for k, v in values.items()]
    )
    self._add(step=step, summary=summary)
    if len(self._buffer) > 1 << 16:
      self.flush()

  def flush(self) -> None:
    if self._buffer:
      files.append(self.path, bytes(self._buffer))
      self._buffer.clear()


class MetricsWriter:
  """Appends lines to `directory`/metrics.jsonl and events to `directory`/tensorboard.

  A line is in the file (though not yet on the disk) when `write` returns, so a kill of the process
  loses none; `flush` before a checkpoint commits makes them durable.

  Args:
    directory: created when it is not there.
    tensorboard: whether to write events too.
  """

  def __init__(self, directory: Path, *, tensorboard: bool = True) -> None:
    files.make_directory(directory)
    self.path = directory / "metrics.jsonl"
    self._directory = directory / "tensorboard" if tensorboard else None
    self._events: _Events | None = None
    self._purge: int | None = None
    self._positioned = not self.path.exists() or self.path.stat().st_size == 0
    self._step = -1
    self._seen: set[str] = set()  # names written at self._step

  def cut_to(self, step: int | None) -> None:
    """Removes what is later than `step`, and a torn last line; None removes everything.

    Call it once at the start: with the step of the checkpoint restored, or with None without one.
    """
    content = self.path.read_bytes() if self.path.exists() else b""
    kept, last, unreadable = [], -1, 0
    seen: set[str] = set()
    lines = content.split(b"\n")
    for number, line in enumerate(lines, 1):
      row = _parsed(line)
      if row is None:
        unreadable += bool(line) and number < len(lines)
        continue
      if step is None or row["step"] > step:
        continue
      kept.append(line + b"\n")
      seen = seen | row.keys() if row["step"] == last else set(row)
      last = row["step"]
    if unreadable:
      log(f"{self.path}: {unreadable} damaged line(s) before the end were removed.")
    wanted = b"".join(kept)
    if wanted != content:
      if content.startswith(wanted):
        files.truncate(self.path, len(wanted))
      else:
        files.write_atomic(self.path, wanted)
    if self._events is not None:
      self._events.flush()
      self._events = None
    self._purge = 0 if step is None else step + 1
    self._positioned, self._step, self._seen = True, last, seen

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    """Appends one line.

    Args:
      step: at least the last line's step.
      values: real scalars by slash name (Python, NumPy or JAX; a JAX array is waited for).

    Raises:
      ValueError: a step before the last, a name twice at a step, or a value that is no scalar.
    """
    if not self._positioned:
      raise ValueError(f"{self.path} holds an earlier run's lines: call cut_to first")
    if step < self._step:
      raise ValueError(f"metrics of step {step} after those of step {self._step}")
    seen = self._seen if step == self._step else {"step", "time"}
    twice = sorted(seen & values.keys())
    if twice:
      raise ValueError(f"metrics written twice at step {step}: {', '.join(twice)}")
    numbers = {name: _number(name, value) for name, value in values.items()}
    row: dict[str, Any] = {"step": int(step), "time": round(time.time(), 3)}
    row.update({name: _encoded(value) for name, value in numbers.items()})
    files.append(self.path, json.dumps(row, allow_nan=False) + "\n")
    self._step, self._seen = step, seen | numbers.keys() | {"step", "time"}
    if self._directory is not None:
      if self._events is None:
        self._events = _Events(self._directory, self._purge)
      self._events.scalars(step, numbers)

  def flush(self) -> None:
    """Makes all lines durable. Call it before the checkpoint of the same step commits."""
    if self.path.exists():
      files.sync_file(self.path)
    if self._events is not None:
      self._events.flush()

  def close(self) -> None:
    """Flushes."""
    self.flush()
