"""How many programs JAX has compiled in this process, and how long that took."""

import threading
from typing import NamedTuple

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"


class Compilations(NamedTuple):
  """Programs compiled since the process imported this module, and the seconds spent on them."""

  programs: int
  seconds: float

  def since(self, before: "Compilations") -> "Compilations":
    """What came after `before`."""
    return Compilations(self.programs - before.programs, self.seconds - before.seconds)


_lock = threading.Lock()
_so_far = Compilations(0, 0.0)


def _listen(event: str, duration_secs: float, **_: str | int) -> None:
  global _so_far
  if event == _EVENT:
    with _lock:  # another thread may compile at the same time
      _so_far = Compilations(_so_far.programs + 1, _so_far.seconds + duration_secs)


jax.monitoring.register_event_duration_secs_listener(_listen)


def compilations() -> Compilations:
  """The counter's value now."""
  return _so_far
