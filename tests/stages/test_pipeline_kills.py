"""A pipeline that was stopped in any phase, and begun again, ends as one that was not.

The processes are real, and so are the signals; they send them to themselves, because a moment that
a test can name is one that it finds again.
"""

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_runs import configure, digests, environment, history, made, pipeline

from rmd_jax.stages.artefacts import state_of
from rmd_jax.training.checkpoints import Checkpoints
from rmd_jax.training.preemption import STATUS

pytestmark = pytest.mark.slow

# An objective with moving averages: its state has to survive, too.
BINDINGS = (
  "SELECTION='running'",
  "EnsembleDistill.members=3",
  "Run.objectives=['ensemble']",
  "Score.samples=3",
)
VICTIM = Path(__file__).with_name("pipeline_victim.py")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """The run that nobody stops; it also leaves the compiled programs to the others."""
  directory = tmp_path_factory.mktemp("whole")
  pipeline(configure(*BINDINGS), directory)
  return directory


def start(directory, number=0, stage="", count=0, bindings=BINDINGS):
  """A process that stops itself; (exit status, stderr)."""
  command = [sys.executable, str(VICTIM), str(directory), str(int(number)), stage, str(count)]
  done = subprocess.run(
    [*command, *bindings], env=environment(), capture_output=True, text=True, check=False
  )
  return done.returncode, done.stderr


def done(directory, stage):
  state = state_of(directory / "seed_0" / stage)
  return state is not None and state["done"]


def assert_same_end(directory, whole):
  ours, theirs = directory / "seed_0", whole / "seed_0"
  assert digests(ours) == digests(theirs)
  for stage in ("sft", "reward", "align/ensemble"):
    rows = history(ours / stage)
    assert rows == history(theirs / stage), stage
    trained = [row["step"] for row in rows if "loss/total" in row]
    assert trained == list(range(1, len(trained) + 1)), stage
    state, wanted = (Checkpoints(run / stage / "checkpoints").restore() for run in (ours, theirs))
    assert state.meta == wanted.meta  # early stopping, the best
  evaluations = [run / "evaluate/ensemble" for run in (ours, theirs)]
  for name in ("evaluation.json", "samples.jsonl"):
    assert evaluations[0].joinpath(name).read_text() == evaluations[1].joinpath(name).read_text()
  margins, wanted = (np.load(place / "margins.npz") for place in evaluations)
  for column in wanted.files:
    np.testing.assert_array_equal(margins[column], wanted[column])
  assert all(pipeline(configure(*BINDINGS), directory).values())


def test_kills_in_every_phase_change_nothing(tmp_path, whole):
  kills = [
    ("data", 2),
    ("sft", 30),
    ("sft", 75),  # of what the second process does, from where the first one got to
    ("reward", 60),
    ("scores", 6),
    ("align/ensemble", 40),
    ("evaluate/ensemble", 5),
  ]
  for stage, count in kills:
    status, said = start(tmp_path, signal.SIGKILL, stage, count)
    assert status == -signal.SIGKILL, (stage, said)
    assert not done(tmp_path, stage)
  status, said = start(tmp_path)
  assert status == 0, said
  assert "sft: up to date" in said
  assert_same_end(tmp_path, whole)


def test_sigterm_in_every_phase_exits_with_143_and_goes_on(tmp_path, whole):
  stops = [
    ("sft", 30),
    ("reward", 60),
    ("scores", 3),
    ("align/ensemble", 40),
    ("evaluate/reference", 1),
    ("evaluate/ensemble", 1),
  ]
  for stage, count in stops:
    status, said = start(tmp_path, signal.SIGTERM, stage, count)
    assert status == STATUS == 143, (stage, said)
    assert "SIGTERM: saving at the next step, then stopping" in said
    assert "Traceback" not in said
    assert not done(tmp_path, stage)
    place = tmp_path / "seed_0" / stage
    if (place / "checkpoints").exists():  # the exact step: what is logged is what is saved
      saved = Checkpoints(place / "checkpoints", read_only=True).restore().step
      logged = [row["step"] for row in history(place) if "loss/total" in row]
      assert logged == list(range(1, saved + 1)), stage
      assert f"stopped at step {saved}, which is saved" in said
  status, said = start(tmp_path)
  assert status == 0, said
  assert_same_end(tmp_path, whole)


def test_a_kill_while_results_are_put_aside_loses_none(tmp_path, whole):
  """Another beta, killed in the middle of its alignment; then the first beta again."""
  pipeline(configure(*BINDINGS), tmp_path)
  before = digests(tmp_path / "seed_0")
  changed = (*BINDINGS, "BETA=0.9")
  command = [sys.executable, str(VICTIM), str(tmp_path), str(int(signal.SIGKILL))]
  killed = subprocess.run(
    [*command, "align/ensemble", "40", *changed],
    env=environment(),
    capture_output=True,
    check=False,
  )
  assert killed.returncode == -signal.SIGKILL
  assert all(pipeline(configure(*BINDINGS), tmp_path).values())
  assert digests(tmp_path / "seed_0")["align/ensemble"] == before["align/ensemble"]
  skipped = pipeline(configure(*changed), tmp_path)  # and the other one goes on
  assert made(skipped) == ["seed_0/align/ensemble", "seed_0/evaluate/ensemble"]
