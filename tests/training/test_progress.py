"""Progress is a bar on a terminal and plain lines elsewhere; the log has everything once."""

import os
import pty
import subprocess
import sys

import pytest

from rmd_jax.errors import RunError
from rmd_jax.training import files, progress
from rmd_jax.training.progress import Progress, log, log_to


def test_the_log_goes_to_stderr_and_to_the_runs_file(tmp_path, capsys):
  path = tmp_path / "log.txt"
  with log_to(path):
    log("first")
    log("second\nthird")
  log("outside")
  captured = capsys.readouterr()
  assert captured.out == ""
  assert captured.err == "first\nsecond\nthird\noutside\n"
  assert [line[21:] for line in path.read_text().splitlines()] == ["first", "second", "third"]


def test_a_log_that_cannot_be_written_does_not_stop_the_run(tmp_path, capsys, monkeypatch):
  def fail(*_, **__):
    raise RunError("cannot append to log.txt: No space left on device.")

  monkeypatch.setattr(files, "append", fail)
  with log_to(tmp_path / "log.txt"):
    log("one")
    log("two")
  err = capsys.readouterr().err
  assert err.count("the log ends here") == 1
  assert "one\n" in err
  assert "two\n" in err


def test_off_a_terminal_there_are_plain_lines_now_and_then(capsys):
  slow = Progress("sft", 100, every=3600)
  bar = Progress("align dpo", 200, start=100, every=0.0)
  slow.update(1, tokens=10)
  bar.update(150, tokens=5000, values={"loss": 0.69314})
  err = capsys.readouterr().err
  assert "\r" not in err
  assert "\x1b" not in err
  assert err.startswith("align dpo  150/200 (75%)  loss 0.6931  ")
  assert "tokens/s  ETA " in err
  assert err.count("\n") == 1
  bar.close({"loss": 0.5})
  assert capsys.readouterr().err.startswith("align dpo  150/200  loss 0.5  ")


def test_throughput_and_eta_count_only_this_process(monkeypatch):
  now = [100.0]
  monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
  bar = Progress("reward", 1000, start=900, every=1e9)
  now[0] = 110.0
  bar.update(920, tokens=15_000)
  assert bar.text(now[0], {}) == "reward  920/1000 (92%)  1.5k tokens/s  ETA 40s"
  without = Progress("score", 10, every=1e9)
  assert without.text(now[0], {}) == "score  0/10 (0%)"
  now[0] = 112.0
  without.update(4)
  assert without.text(now[0], {}) == "score  4/10 (40%)  2 steps/s  ETA 3s"


@pytest.mark.parametrize(
  "seconds, text", [(0, "0s"), (59.7, "1m00s"), (75, "1m15s"), (3599, "59m59s"), (4000, "1h06m")]
)
def test_duration(seconds, text):
  assert progress.duration(seconds) == text


@pytest.mark.parametrize("value, text", [(7, "7"), (950, "950"), (1234, "1.2k"), (5.6e6, "5.6M")])
def test_quantity(value, text):
  assert progress.quantity(value) == text


def test_on_a_terminal_the_bar_stays_in_place_and_log_lines_go_above_it(tmp_path):
  code = (
    "import sys, pathlib, time\n"
    "from rmd_jax.training.progress import Progress, log, log_to\n"
    "with log_to(pathlib.Path(sys.argv[1])):\n"
    "  bar = Progress('sft', 3)\n"
    "  for step in (1, 2, 3):\n"
    "    time.sleep(0.12); bar.update(step)\n"
    "    if step == 2: log('a word')\n"
    "  bar.close()\n"
  )
  ours, theirs = pty.openpty()
  path = tmp_path / "log.txt"
  subprocess.run([sys.executable, "-c", code, str(path)], stderr=theirs, check=True, timeout=30)
  os.close(theirs)
  shown = os.read(ours, 100_000).decode().replace("\r\n", "\n")
  os.close(ours)
  assert shown.count("\n") == 2  # the word and the last line; every bar was drawn over
  assert "\r\x1b[Ksft  2/3 (66%)" in shown
  assert "\r\x1b[Ka word\n\r\x1b[Ksft  2/3" in shown
  assert "sft  3/3  in " in shown.splitlines()[-1]
  assert [line[21:29] for line in path.read_text().splitlines()] == ["a word", "sft  3/3"]
