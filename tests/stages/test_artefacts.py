"""What a stage leaves behind: keys, skipping, going on, putting aside, and what errors say."""

import json
import subprocess
import sys
import time

import pytest

from rmd_jax.errors import UserError
from rmd_jax.stages import artefacts
from rmd_jax.stages.artefacts import Key, produce, require
from rmd_jax.stages.run import exclusive

A = Key.of(options="steps=3", data="x" * 40, seed="0")
B = Key.of(options="steps=4", data="x" * 40, seed="0")


class Make:
  """A stage that writes its name, and counts how often it was called."""

  def __init__(self, text, fail=None):
    self.text, self.fail, self.calls, self.found = text, fail, 0, []

  def __call__(self, directory):
    self.calls += 1
    self.found = sorted(path.name for path in directory.iterdir())
    (directory / f"{self.text}.txt").write_text(self.text)
    if self.fail:
      raise self.fail


def names(directory):
  return sorted(path.name for path in directory.iterdir())


# --- keys -----------------------------------------------------------------------------------------


def test_a_key_names_its_parts_and_hashes_what_is_long():
  assert A.parts == (
    ("options", "steps=3"),
    ("data", artefacts.digest("x" * 40)),
    ("seed", "0"),
  )
  assert len(A.digest) == 16
  assert int(A.digest, 16) >= 0


def test_equal_parts_are_equal_keys_and_any_other_part_is_another():
  same = Key.of(options="steps=3", data="x" * 40, seed="0")
  others = [
    B,
    Key.of(options="steps=3", data="x" * 41, seed="0"),
    Key.of(options="steps=3", data="x" * 40, seed="1"),
    Key.of(options="steps=3", data="x" * 40),
    Key.of(option="steps=3", data="x" * 40, seed="0"),
  ]
  assert (same, same.digest) == (A, A.digest)
  assert len({key.digest for key in [A, *others]}) == 6


def test_a_key_is_the_same_tomorrow():
  """Whoever changes this makes every run directory start over: say so in the changelog."""
  assert Key.of(a="b", c="d" * 20).digest == "351015285c77b3e3"


def test_differences_show_each_part_once():
  text = A.differences({"options": "steps=9", "seed": "0", "data": artefacts.digest("x" * 40)})
  assert text == (
    "  options     stored steps=9, this run steps=3   <- differs\n  data, seed: equal"
  )
  assert "  seed        stored nothing, this run 0   <- differs" in A.differences({})
  assert "equal" not in A.differences({})


# --- produce --------------------------------------------------------------------------------------


def test_a_result_is_made_once(tmp_path):
  place, make = tmp_path / "sft", Make("one")
  first = produce(place, A, make, stage="sft")
  again = produce(place, A, make, stage="sft")
  assert make.calls == 1
  assert (first.skipped, again.skipped) == (False, True)
  assert (first.directory, first.key) == (place, A)
  assert first.seconds == again.seconds > 0
  state = artefacts.state_of(place)
  assert state["stage"] == "sft"
  assert (state["done"], state["key"], state["parts"]) == (True, A.digest, dict(A.parts))


def test_it_says_that_it_was_skipped(tmp_path, capsys):
  for _ in range(2):
    produce(tmp_path / "sft", A, Make("one"), stage="sft (seed 3)")
  assert f"sft (seed 3): up to date (key {A.digest[:8]}), skipped" in capsys.readouterr().err


@pytest.mark.parametrize("fail", [ValueError("no"), KeyboardInterrupt(), SystemExit(143)])
def test_what_ended_early_goes_on_in_the_same_folder(tmp_path, fail):
  place = tmp_path / "sft"
  with pytest.raises(type(fail)):
    produce(place, A, Make("half", fail), stage="sft")
  state = artefacts.state_of(place)
  assert not state["done"]
  assert not artefacts.finished(place, A)
  rest = Make("whole")
  outcome = produce(place, A, rest, stage="sft")
  assert rest.found == ["half.txt", "stage.json"]
  assert outcome.seconds > state["seconds"] > 0  # both parts count
  assert artefacts.finished(place, A)
  assert not artefacts.finished(place, B)


def test_a_kill_leaves_it_unfinished(tmp_path):
  """Nothing of Python's runs at a kill: what stands in stage.json was there before."""
  seen = []
  produce(tmp_path / "sft", A, lambda place: seen.append(artefacts.state_of(place)), stage="sft")
  assert [state["done"] for state in seen] == [False]


def test_other_options_put_the_result_aside_and_bring_it_back(tmp_path, capsys):
  place = tmp_path / "sft"
  produce(place, A, Make("a"), stage="sft")
  produce(place, B, Make("b"), stage="sft")
  assert names(tmp_path) == ["sft", f"sft.{A.digest}"]
  assert names(place) == ["b.txt", "stage.json"]
  said = capsys.readouterr().err
  assert f"the earlier result is kept as sft.{A.digest}" in said
  assert "options     stored steps=3, this run steps=4   <- differs" in said
  again = Make("never")
  assert produce(place, A, again, stage="sft").skipped
  assert not again.calls
  assert names(place) == ["a.txt", "stage.json"]
  assert names(tmp_path) == ["sft", f"sft.{B.digest}"]
  assert f"found a result of these very options in sft.{A.digest}" in capsys.readouterr().err


def test_what_is_put_aside_unfinished_is_brought_back_and_goes_on(tmp_path):
  place = tmp_path / "sft"
  with pytest.raises(KeyboardInterrupt):
    produce(place, A, Make("half", KeyboardInterrupt()), stage="sft")
  produce(place, B, Make("b"), stage="sft")
  rest = Make("whole")
  assert not produce(place, A, rest, stage="sft").skipped
  assert rest.found == ["half.txt", "stage.json"]


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path):
  place = tmp_path / "sft"
  produce(place, A, Make("a"), stage="sft")
  produce(place, B, Make("b"), stage="sft")
  place.rename(tmp_path / f"sft.{B.digest}")  # A is wanted: B has gone aside, A is not back yet
  make = Make("never")
  assert produce(place, A, make, stage="sft").skipped
  assert not make.calls
  assert produce(place, B, make, stage="sft").skipped
  assert not make.calls


# --- require --------------------------------------------------------------------------------------


def refusal(directory, key):
  with pytest.raises(UserError) as caught:
    require(directory, key, stage="score", command="rmd score")
  return str(caught.value)


def test_a_finished_input_is_taken(tmp_path):
  made = produce(tmp_path / "scores", A, Make("a"), stage="score")
  taken = require(tmp_path / "scores", A, stage="score", command="rmd score")
  assert taken.skipped
  assert (taken.key, taken.directory, taken.seconds) == (A, made.directory, made.seconds)


def test_a_missing_input_names_the_command_to_run(tmp_path):
  place = tmp_path / "scores"
  assert refusal(place, A) == f"stage 'score' has not run in {place}.\nRun `rmd score` first."
  assert not place.exists()


def test_an_unfinished_input_names_the_command_to_run(tmp_path):
  place = tmp_path / "scores"
  with pytest.raises(KeyboardInterrupt):
    produce(place, A, Make("half", KeyboardInterrupt()), stage="score")
  assert refusal(place, A) == f"stage 'score' is not finished in {place}.\nRun `rmd score` first."


def test_a_stale_input_says_what_differs(tmp_path):
  place = tmp_path / "scores"
  produce(place, A, Make("a"), stage="score")
  assert refusal(place, B) == (
    f"the result of stage 'score' in {place} belongs to another run.\n"
    "  options     stored steps=3, this run steps=4   <- differs\n"
    "  data, seed: equal\n"
    "Run `rmd score`, or choose another --run_dir."
  )
  assert json.loads((place / "stage.json").read_text())["key"] == A.digest  # and touches nothing


# --- the lock -------------------------------------------------------------------------------------


def test_a_run_directory_has_one_process(tmp_path):
  with exclusive(tmp_path), pytest.raises(UserError) as caught, exclusive(tmp_path):
    pass
  assert str(caught.value) == (
    f"another process is running in {tmp_path}: wait for it, or choose another --run_dir"
  )
  with exclusive(tmp_path):  # and it is free again
    pass


def test_a_killed_process_leaves_no_lock_behind(tmp_path):
  program = (
    "import sys, fcntl\n"
    "file = open(sys.argv[1], 'a'); fcntl.flock(file, fcntl.LOCK_EX)\n"
    "print('held', flush=True)\n"
    "import time; time.sleep(60)"
  )
  holder = subprocess.Popen(
    [sys.executable, "-c", program, str(tmp_path / ".lock")], stdout=subprocess.PIPE, text=True
  )
  assert holder.stdout.readline() == "held\n"
  with pytest.raises(UserError, match="another process is running"), exclusive(tmp_path):
    pass
  holder.kill()
  holder.wait()
  holder.stdout.close()
  deadline = time.monotonic() + 10
  while True:
    try:
      with exclusive(tmp_path):
        break
    except UserError:
      assert time.monotonic() < deadline
