"""SIGTERM means: save the exact step, then exit with status 143.

Schedulers send SIGTERM before they take a machine away, and restart on status 143 but never on 0.
The handler only sets a flag; whoever is at a point where the state is whole asks `requested()`,
saves, and raises `Preempted`. A phase that has nothing to save calls `check()`.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType

STATUS = 128 + signal.SIGTERM  # 143


class Preempted(SystemExit):
  """Ends the run with status 143; being a SystemExit, no `except Exception` swallows it."""

  def __init__(self) -> None:
    super().__init__(STATUS)


_pid = 0  # the process that installed the handler; a forked child is not the run
_notices = 0


def _on_signal(number: int, frame: FrameType | None) -> None:
  """Counts the notice; a second one ends the process at once, without saving."""
  del frame
  global _notices
  if os.getpid() != _pid:  # a forked worker (a data loader's) dies as if there were no handler
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    return
  _notices += 1
  if _notices > 1:
    os._exit(STATUS)
  # os.write: print() is not reentrant, and the signal may have come in the middle of one
  os.write(2, b"\nSIGTERM: saving at the next step, then stopping. A second one stops at once.\n")


@contextlib.contextmanager
def handling(*signals: signal.Signals) -> Iterator[None]:
  """Handles SIGTERM (and other signals, such as SIGUSR1) in the block; put back afterwards.

  For the main thread of the process. Inside another such block it changes nothing.
  """
  global _pid, _notices
  if _pid == os.getpid():
    yield
    return
  _pid, _notices = os.getpid(), 0
  # jax.distributed listens to SIGTERM itself and tells the other processes: leave it that signal
  caught = signals if _distributed() else (signal.SIGTERM, *signals)
  before = {number: signal.signal(number, _on_signal) for number in caught}
  try:
    yield
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
    _pid = 0


def _distributed() -> bool:
  jax = sys.modules.get("jax")  # whoever has not imported it has not initialised it
  return jax is not None and jax.distributed.is_initialized()


def requested(step: int | None = None) -> bool:
  """Whether this process was told to stop.

  Args:
    step: the step just done. With several processes, a notice to any of them must stop all at the
      same step, so each has to ask with the step, at every step.
  """
  if step is not None and _distributed():
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(step)
  return _notices > 0 and _pid == os.getpid()


def check() -> None:
  """Raises `Preempted` when the process was told to stop: for phases with nothing to save."""
  if requested():
    raise Preempted
