"""A run that was stopped at any moment ends with the bits of one that was not.

Kills are simulated at each write in turn (an exception that nothing catches, as the process's end
would be, leaves the files as they are at that moment), and done for real by SIGKILL in slow tests.
"""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from training_toys import Ensemble, Pairs, assert_trees_equal, data, run

from rmd_jax.training import evaluation, files, loop, preemption
from rmd_jax.training.checkpoints import Checkpoints
from rmd_jax.training.metrics import read_metrics

STAGE = Pairs(
  noise=0.3
)  # its losses depend on the random state, and through the carry on all steps
ARGUMENTS = {
  "validation": data(20, seed=1),
  "eval_every": 5,
  "checkpoint_every": 3,
  "patience": 3,
  "steps": 17,
}


class Killed(BaseException):
  """The end of the process."""


def start(directory, **changes):
  return run(directory, STAGE, data(), **{**ARGUMENTS, **changes})


def history(directory):
  """Everything that was logged, but for the clock."""
  return [
    {k: v for k, v in row.items() if k != "time" and not k.startswith("perf/")}
    for row in read_metrics(directory)
  ]


def last_state(directory):
  return Checkpoints(directory / "checkpoints", read_only=True).restore()


def assert_same_end(directory, fitted, whole_directory, whole):
  assert_trees_equal(fitted.params, whole.params)
  assert fitted[1:3] + fitted[4:] == whole[1:3] + whole[4:]
  assert history(directory) == history(whole_directory)
  got, wanted = last_state(directory), last_state(whole_directory)
  assert_trees_equal(got.state, wanted.state)  # optimiser, carry, random state, guards
  assert got.meta == wanted.meta  # early stopping, the best


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  directory = tmp_path_factory.mktemp("whole")
  return directory, start(directory)


class Fuse:
  """Lets so many writes pass, then ends the process, before or after the last one is done."""

  def __init__(self, monkeypatch, count=None, *, done=False):
    self.count, self.done, self.passed = count, done, 0
    for name in ("_write", "_fsync", "_rename"):
      monkeypatch.setattr(files, name, self.around(getattr(files, name)))

  def around(self, operation):
    def guarded(*arguments):
      self.passed += 1
      if self.passed == self.count:
        if self.done:
          operation(*arguments)
        raise Killed
      return operation(*arguments)

    return guarded


def moments(tmp_path_factory, **changes):
  with pytest.MonkeyPatch.context() as patch:
    fuse = Fuse(patch)
    start(tmp_path_factory.mktemp("count"), **changes)
  return fuse.passed


def killed_at(directory, count, **changes):
  with pytest.MonkeyPatch.context() as patch:
    Fuse(patch, count, done=count % 2 == 0)
    with pytest.raises(Killed):
      start(directory, **changes)
  return start(directory, **changes)


def test_a_kill_at_any_write_changes_nothing(tmp_path_factory, whole):
  total = moments(tmp_path_factory)
  assert total > 80
  chosen = random.Random(0).sample(range(1, total + 1), 5)
  for count in chosen:
    directory = tmp_path_factory.mktemp(f"killed-{count}")
    assert_same_end(directory, killed_at(directory, count), *whole)


def test_a_kill_as_soon_as_a_checkpoint_is_committed_loses_no_line(tmp_path, whole):
  with pytest.MonkeyPatch.context() as patch:
    save = Checkpoints.save

    def last_deed(self, step, *rest):
      save(self, step, *rest)
      if step == 9:  # a step that is logged, but at which nothing is evaluated
        raise Killed

    patch.setattr(Checkpoints, "save", last_deed)
    with pytest.raises(Killed):
      start(tmp_path)
  assert_same_end(tmp_path, start(tmp_path), *whole)


@pytest.mark.slow
def test_a_kill_at_every_write_changes_nothing(tmp_path_factory):
  changes = {"steps": 7, "eval_every": 4}
  directory = tmp_path_factory.mktemp("whole")
  whole = directory, start(directory, **changes)
  for count in range(1, moments(tmp_path_factory, **changes) + 1):
    directory = tmp_path_factory.mktemp("killed")
    assert_same_end(directory, killed_at(directory, count, **changes), *whole)


def test_kill_after_kill_still_ends_the_same(tmp_path, whole):
  """Each attempt is killed a few writes after it has begun to train, or restores and is killed."""
  rng = random.Random(1)
  for _ in range(12):
    with pytest.MonkeyPatch.context() as patch:
      Fuse(patch, rng.randrange(10, 60), done=rng.random() < 0.5)
      try:
        fitted = start(tmp_path)
      except Killed:
        continue
      break
  else:
    fitted = start(tmp_path)
  assert_same_end(tmp_path, fitted, *whole)


# --- SIGTERM --------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 7, 16])
def test_sigterm_saves_the_exact_step(tmp_path, whole, monkeypatch, at):
  with monkeypatch.context() as patch:
    original = loop.Loader.batch

    def batch(self, step):
      if step == at:
        os.kill(os.getpid(), signal.SIGTERM)
      return original(self, step)

    patch.setattr(loop.Loader, "batch", batch)
    with preemption.handling(), pytest.raises(SystemExit) as ended:
      start(tmp_path, checkpoint_every=None)
  assert ended.value.code == 143
  stopped = last_state(tmp_path)
  assert stopped.step == at + 1  # the step whose batch it came with is done, and not lost
  assert [row["step"] for row in history(tmp_path) if "loss/total" in row] == list(range(1, at + 2))
  fitted = start(tmp_path)
  assert_same_end(tmp_path, fitted, *whole)


@pytest.mark.parametrize("then", ["resume", "kill"])
def test_sigterm_during_evaluation_evaluates_again(tmp_path, whole, monkeypatch, then):
  with monkeypatch.context() as patch:
    original = evaluation.eval_batches

    def eval_batches(*arguments):
      for i, batch in enumerate(original(*arguments)):
        if i == 1:
          os.kill(os.getpid(), signal.SIGTERM)
        yield batch

    patch.setattr(evaluation, "eval_batches", eval_batches)
    with preemption.handling(), pytest.raises(SystemExit) as ended:
      start(tmp_path)
  assert ended.value.code == 143
  stopped = last_state(tmp_path)
  assert (stopped.step, stopped.meta["selection"]["evaluated"]) == (5, 0)
  if then == "kill":  # after the evaluation is logged, before its checkpoint commits
    with monkeypatch.context() as patch:
      patch.setattr(Checkpoints, "save", lambda *rest: (_ for _ in ()).throw(Killed))
      with pytest.raises(Killed):
        start(tmp_path)
    assert [row["step"] for row in history(tmp_path) if "eval/loss" in row] == [5]
  fitted = start(tmp_path)
  assert_same_end(tmp_path, fitted, *whole)


def test_a_stop_before_the_first_step_is_saved_too(tmp_path, whole):
  with preemption.handling():
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(SystemExit):
      start(tmp_path)
  assert last_state(tmp_path).step == 0
  assert_same_end(tmp_path, start(tmp_path), *whole)


# --- what else a restart meets --------------------------------------------------------------------


def test_a_damaged_checkpoint_costs_steps_but_not_bits(tmp_path, whole):
  with pytest.MonkeyPatch.context() as patch:
    original = loop.Loader.batch

    def batch(self, step):
      if step == 14:
        raise Killed
      return original(self, step)

    patch.setattr(loop.Loader, "batch", batch)
    with pytest.raises(Killed):
      start(tmp_path, keep_last=3)
  newest = max((tmp_path / "checkpoints").iterdir(), key=lambda p: int(p.name))
  assert newest.name == "12"
  victim = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
  victim.write_bytes(victim.read_bytes()[:-1] + b"\0")
  fitted = start(tmp_path, keep_last=3)
  assert_trees_equal(fitted.params, whole[1].params)
  assert history(tmp_path) == history(whole[0])


def test_bad_batches_are_listed_once_after_a_restart(tmp_path):
  @dataclasses.dataclass(frozen=True)
  class Fragile(Pairs):
    def objective(self, outputs, batch, **rest):
      loss = Pairs.objective(self, outputs, batch, **rest)
      return loss._replace(sum=loss.sum + 0.0 * batch.ratings.sum())

  ratings = np.zeros((48, 2), np.float32)
  ratings[5] = np.nan
  arguments = {"train": data().replace(ratings=ratings), "steps": 18, "checkpoint_every": 2}
  train = arguments.pop("train")
  run(tmp_path / "whole", Fragile(), train, **arguments)
  wanted = (tmp_path / "whole/bad_batches.jsonl").read_text()
  assert wanted.count("\n") == 3
  second = json.loads(wanted.splitlines()[1])["step"]
  with pytest.MonkeyPatch.context() as patch:
    original = loop.Loader.batch

    def batch(self, step):
      if step == second + 1:
        raise Killed
      return original(self, step)

    patch.setattr(loop.Loader, "batch", batch)
    with pytest.raises(Killed):
      run(tmp_path / "cut", Fragile(), train, **{**arguments, "checkpoint_every": 7})
  run(tmp_path / "cut", Fragile(), train, **arguments)
  assert (tmp_path / "cut/bad_batches.jsonl").read_text() == wanted
  assert last_state(tmp_path / "cut").state["skipped"].tolist() == [3]


@pytest.mark.slow
def test_a_run_resumes_on_another_mesh(tmp_path):
  stage, train = Ensemble(members=4), data(members=4)
  mesh = loop.MeshConfig
  whole = run(tmp_path / "whole", stage, train, steps=8)
  run(tmp_path / "moved", stage, train, steps=4, mesh=mesh(data=2, tensor=2, member=2))
  moved = run(tmp_path / "moved", stage, train, steps=8)
  assert_trees_equal(moved.params, whole.params, rtol=1e-4, atol=1e-5)


# --- real processes -------------------------------------------------------------------------------

PROGRAM = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import jax
from rmd_jax.training import preemption
from test_resume import start
with preemption.handling():
  start(Path({directory!r}), steps=400, eval_every=20, checkpoint_every=7, patience=0)
"""


def process(directory):
  program = PROGRAM.format(tests=str(Path(__file__).parent), directory=str(directory))
  return subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM], ids=["kill", "term"])
def test_a_process_stopped_at_random_moments_ends_the_same(tmp_path, kind):
  changes = {"steps": 400, "eval_every": 20, "checkpoint_every": 7, "patience": 0}
  whole = start(tmp_path / "whole", **changes)
  rng, cut = random.Random(7), tmp_path / "cut"
  stops = 0
  while True:
    child = process(cut)
    begin = time.time()
    while child.poll() is None and not (cut / "metrics.jsonl").exists():
      assert time.time() - begin < 300
      time.sleep(0.01)
    steps = len(read_metrics(cut)) if (cut / "metrics.jsonl").exists() else 0
    while child.poll() is None and len(read_metrics(cut)) <= steps:  # it trains
      time.sleep(0.01)
    time.sleep(rng.uniform(0.0, 0.6))
    if child.poll() is None and stops < 6:
      child.send_signal(kind)
      stops += 1
    _, err = child.communicate()
    if child.returncode == 0:
      break
    assert child.returncode == (-9 if kind == signal.SIGKILL else 143), err
  assert stops >= 3
  fitted = start(cut, **changes)
  assert_same_end(cut, fitted, tmp_path / "whole", whole)
  assert jax.tree.leaves(fitted.params)
