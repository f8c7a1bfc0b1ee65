"""SIGTERM asks for an orderly stop with status 143; the second one does not ask."""

import os
import signal
import subprocess
import sys
import time

import pytest

from rmd_jax.training import preemption


def test_a_notice_sets_the_flag_and_leaves_the_process_alive(capfd):
  before = signal.getsignal(signal.SIGTERM)
  with preemption.handling():
    assert not preemption.requested()
    preemption.check()
    signal.raise_signal(signal.SIGTERM)
    assert preemption.requested()
    assert preemption.requested(5)
    with pytest.raises(preemption.Preempted) as caught:
      preemption.check()
    assert caught.value.code == 143
    assert isinstance(caught.value, SystemExit)
  assert signal.getsignal(signal.SIGTERM) == before
  assert not preemption.requested()
  assert "SIGTERM" in capfd.readouterr().err


def test_a_notice_does_not_outlive_its_run():
  with preemption.handling():
    signal.raise_signal(signal.SIGTERM)
  with preemption.handling():
    assert not preemption.requested()


def test_other_signals_and_nested_blocks():
  with preemption.handling(signal.SIGUSR1):
    with preemption.handling():  # a stage started by a run: the outer block keeps the handler
      signal.raise_signal(signal.SIGUSR1)
      assert preemption.requested()
    assert preemption.requested()
    assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL


def test_without_the_handler_nothing_is_requested():
  assert not preemption.requested()
  assert not preemption.requested(3)
  preemption.check()


def child(code: str) -> subprocess.Popen:
  process = subprocess.Popen(
    [
      sys.executable,
      "-c",
      "import time, os, sys\nfrom rmd_jax.training import preemption\n" + code,
    ],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == "up\n"
  return process


def rest(process: subprocess.Popen) -> str:
  """What else it prints, to its end (communicate() would lose what readline has buffered)."""
  out = process.stdout.read()
  process.wait(timeout=20)
  process.stdout.close()
  process.stderr.close()
  return out


def test_the_exit_status_is_143_after_saving():
  process = child(
    "with preemption.handling():\n"
    "  print('up', flush=True)\n"
    "  while not preemption.requested(): time.sleep(0.01)\n"
    "  print('saved', flush=True)\n"
    "  try: raise preemption.Preempted\n"
    "  except Exception: print('swallowed')\n"
  )
  process.terminate()
  assert (rest(process), process.returncode) == ("saved\n", 143)


def test_a_second_notice_stops_at_once():
  process = child(
    "with preemption.handling():\n"
    "  print('up', flush=True)\n"
    "  try: time.sleep(60); time.sleep(60)\n"
    "  finally: print('cleaned up')\n"
  )
  process.terminate()
  time.sleep(0.3)
  assert process.poll() is None
  process.terminate()
  assert (rest(process), process.returncode) == ("", 143)


def test_a_forked_child_dies_of_the_signal_as_if_there_were_no_handler():
  process = child(
    "with preemption.handling():\n"
    "  pid = os.fork()\n"
    "  if not pid: time.sleep(60); os._exit(1)\n"
    "  time.sleep(0.2); os.kill(pid, 15)\n"
    "  _, status = os.waitpid(pid, 0)\n"
    "  print('up', flush=True)\n"
    "  print(os.waitstatus_to_exitcode(status), preemption.requested())\n"
  )
  assert rest(process) == f"{-signal.SIGTERM} False\n"


def test_the_module_loads_no_jax():
  code = "import sys; import rmd_jax.training.preemption; sys.exit('jax' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", code], env={**os.environ}).returncode == 0
