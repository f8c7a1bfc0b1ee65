"""metrics.jsonl has every step once, whatever happened to the run, and TensorBoard agrees."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from rmd_jax.errors import RunError
from rmd_jax.training import files
from rmd_jax.training.metrics import MetricsWriter, read_metrics


def steps(directory: Path) -> list[int]:
  return [row["step"] for row in read_metrics(directory)]


def test_lines_are_read_back_with_their_numbers(tmp_path):
  writer = MetricsWriter(tmp_path, tensorboard=False)
  writer.write(1, {"loss/total": jnp.float32(0.1), "n": np.int64(3), "half": jnp.bfloat16(0.5)})
  writer.write(1, {"eval/loss": 2})
  (first, second) = read_metrics(tmp_path / "metrics.jsonl")
  assert first.pop("time") == pytest.approx(time.time(), abs=60)
  assert first == {"step": 1, "loss/total": float(np.float32(0.1)), "n": 3, "half": 0.5}
  assert isinstance(first["n"], int)
  assert second["eval/loss"] == 2


def test_non_finite_numbers_are_valid_json_and_come_back(tmp_path):
  writer = MetricsWriter(tmp_path, tensorboard=False)
  writer.write(1, {"a": np.nan, "b": np.inf, "c": jnp.float32(-np.inf)})

  def refuse(name):
    raise AssertionError(name)

  text = (tmp_path / "metrics.jsonl").read_text()
  assert json.loads(text, parse_constant=refuse)["a"] == "NaN"
  (row,) = read_metrics(tmp_path)
  assert np.isnan(row["a"])
  assert (row["b"], row["c"]) == (np.inf, -np.inf)


@pytest.mark.parametrize("value", [np.zeros(2), "1", None, 1j])
def test_what_is_no_scalar_is_refused(tmp_path, value):
  writer = MetricsWriter(tmp_path, tensorboard=False)
  with pytest.raises(ValueError, match="'x' must be one real number"):
    writer.write(1, {"x": value})
  assert not (tmp_path / "metrics.jsonl").exists()


def test_a_name_occurs_once_a_step_and_steps_never_fall(tmp_path):
  writer = MetricsWriter(tmp_path, tensorboard=False)
  writer.write(2, {"loss": 1.0})
  with pytest.raises(ValueError, match="twice at step 2: loss"):
    writer.write(2, {"loss": 1.0})
  with pytest.raises(ValueError, match="step 1 after those of step 2"):
    writer.write(1, {"eval/loss": 1.0})
  writer.write(3, {"loss": 1.0})
  assert steps(tmp_path) == [2, 3]


def test_an_earlier_runs_lines_must_be_cut_before_more_are_written(tmp_path):
  MetricsWriter(tmp_path, tensorboard=False).write(1, {"loss": 1.0})
  writer = MetricsWriter(tmp_path, tensorboard=False)
  with pytest.raises(ValueError, match="cut_to"):
    writer.write(2, {"loss": 1.0})
  writer.cut_to(None)
  writer.write(1, {"loss": 5.0})
  assert [row["loss"] for row in read_metrics(tmp_path)] == [5.0]


def test_cut_to_removes_later_steps_and_the_torn_line_and_keeps_the_rest_as_it_was(tmp_path):
  writer = MetricsWriter(tmp_path, tensorboard=False)
  for step in (1, 2, 3, 4):
    writer.write(step, {"loss": step / 3})
  writer.write(4, {"eval/loss": 9.0})
  path = tmp_path / "metrics.jsonl"
  before = path.read_bytes()
  path.write_bytes(before + b'{"step": 5, "lo')
  assert steps(tmp_path) == [1, 2, 3, 4, 4]
  writer = MetricsWriter(tmp_path, tensorboard=False)
  writer.cut_to(4)
  assert path.read_bytes() == before
  with pytest.raises(ValueError, match="twice"):  # it knows what step 4 has already
    writer.write(4, {"eval/loss": 1.0})
  writer.cut_to(2)
  assert path.read_bytes() == b"".join(before.splitlines(keepends=True)[:2])
  writer.write(3, {"loss": 0.0})
  assert steps(tmp_path) == [1, 2, 3]


def test_a_last_line_that_lost_only_its_newline_is_whole_and_not_glued_to_the_next(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 1, "x": 2}\n{"step": 2, "x": 7}')
  writer = MetricsWriter(tmp_path, tensorboard=False)
  writer.cut_to(2)
  writer.write(3, {"x": 1})
  assert [(row["step"], row["x"]) for row in read_metrics(tmp_path)] == [(1, 2), (2, 7), (3, 1)]


def test_a_damaged_line_in_the_middle_is_an_error_to_read_and_cut_with_a_word(tmp_path, capfd):
  path = tmp_path / "metrics.jsonl"
  path.write_bytes(b'{"step": 1, "x": 2}\n\xff\x00garbage\n[3]\n{"step": 2, "x": 3}\n')
  with pytest.raises(ValueError, match=r"metrics\.jsonl:2"):
    read_metrics(path)
  MetricsWriter(tmp_path, tensorboard=False).cut_to(2)
  assert "2 damaged line(s)" in capfd.readouterr().err
  assert steps(tmp_path) == [1, 2]


def test_a_full_disk_is_named_and_the_torn_line_is_cut_later(tmp_path, monkeypatch):
  writer = MetricsWriter(tmp_path, tensorboard=False)
  writer.write(1, {"loss": 1.0})

  def fill(descriptor, data):
    if len(data) < 10:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return os.write(descriptor, bytes(data)[:-5])

  with monkeypatch.context() as patch:
    patch.setattr(files, "_write", fill)
    with pytest.raises(RunError, match=r"metrics\.jsonl: No space left"):
      writer.write(2, {"loss": 1.0})
  writer = MetricsWriter(tmp_path, tensorboard=False)
  writer.cut_to(2)
  writer.write(2, {"loss": 2.0})
  assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path)] == [(1, 1.0), (2, 2.0)]


def test_flush_makes_the_lines_durable(tmp_path, monkeypatch):
  synced = []
  monkeypatch.setattr(files, "_fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
  writer = MetricsWriter(tmp_path, tensorboard=False)
  writer.flush()  # nothing was written: no file, no error
  writer.write(1, {"loss": 1.0})
  assert synced == []
  writer.flush()
  assert synced == [str(tmp_path / "metrics.jsonl")]


def scalars(directory: Path, tag: str) -> list[tuple[int, float]]:
  from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

  accumulator = EventAccumulator(str(directory))
  accumulator.Reload()
  return [(event.step, event.value) for event in accumulator.Scalars(tag)]


@pytest.fixture
def tensorboard_without_tensorflow(monkeypatch):
  """TensorBoard's reader loads TensorFlow (seconds) where it is installed, unless told not to."""
  import types

  monkeypatch.setitem(sys.modules, "tensorboard.compat.notf", types.ModuleType("notf"))


@pytest.mark.usefixtures("tensorboard_without_tensorflow")
def test_tensorboard_has_the_same_steps_after_a_cut(tmp_path):
  writer = MetricsWriter(tmp_path)
  for step in (1, 2, 3, 4):
    writer.write(step, {"loss/total": step + 0.5})
  writer.flush()
  # killed here; the step-2 checkpoint is restored
  writer = MetricsWriter(tmp_path)
  writer.cut_to(2)
  for step in (3, 4):
    writer.write(step, {"loss/total": -step})
  writer.close()
  assert len(list((tmp_path / "tensorboard").iterdir())) == 2
  wanted = [(1, 1.5), (2, 2.5), (3, -3.0), (4, -4.0)]
  assert scalars(tmp_path / "tensorboard", "loss/total") == wanted
  assert [(row["step"], row["loss/total"]) for row in read_metrics(tmp_path)] == wanted


def test_writing_events_does_not_load_tensorflow(tmp_path):
  code = (
    "import sys, pathlib; from rmd_jax.training.metrics import MetricsWriter\n"
    "assert 'tensorboard' not in sys.modules\n"
    "w = MetricsWriter(pathlib.Path(sys.argv[1])); w.write(1, {'a': 1.0}); w.close()\n"
    "assert 'tensorflow' not in sys.modules\n"
  )
  subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
  assert (next((tmp_path / "tensorboard").iterdir())).stat().st_size > 50


@pytest.mark.slow
def test_kill_at_any_moment_leaves_every_step_once(tmp_path):
  """A child appends steps, flushes and "commits" a checkpoint file; it is killed and restarted."""
  code = (
    "import sys, pathlib; from rmd_jax.training.metrics import MetricsWriter\n"
    "from rmd_jax.training import files\n"
    "d = pathlib.Path(sys.argv[1]); mark = d / 'mark'\n"
    "done = int(mark.read_text()) if mark.exists() else None\n"
    "w = MetricsWriter(d, tensorboard=False); w.cut_to(done)\n"
    "print('up', flush=True)\n"
    "for step in range((done or 0) + 1, 10**9):\n"
    "  w.write(step, {'loss': 1 / step})\n"
    "  if step % 5 == 0:\n"
    "    w.write(step, {'eval/loss': 1.0}); w.flush(); files.write_atomic(mark, str(step))\n"
  )
  rng = np.random.default_rng(0)
  for _ in range(12):
    child = subprocess.Popen(
      [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "up\n"
    time.sleep(rng.uniform(0, 0.15))
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
  done = int((tmp_path / "mark").read_text())
  assert done >= 50
  writer = MetricsWriter(tmp_path, tensorboard=False)
  writer.cut_to(done)
  rows = read_metrics(tmp_path)
  assert [r["step"] for r in rows if "loss" in r] == list(range(1, done + 1))
  assert [r["step"] for r in rows if "eval/loss" in r] == list(range(5, done + 1, 5))
