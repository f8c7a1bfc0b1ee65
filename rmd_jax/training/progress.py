"""What a run says while it works: one log, and one line of progress with throughput and ETA."""

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from rmd_jax.errors import RunError, UserError
from rmd_jax.training import files


class _Console:
  """Where lines go. One a process, because stderr is one: a log line must clear the bar first."""

  def __init__(self) -> None:
    self.path: Path | None = None
    self.bar = ""  # the text that stands on a terminal's last line, unfinished

  def clear(self) -> None:
    if self.bar:
      sys.stderr.write("\r\x1b[K")
      self.bar = ""

  def draw(self, text: str) -> None:
    sys.stderr.write("\r\x1b[K" + text)
    sys.stderr.flush()
    self.bar = text

  def line(self, text: str) -> None:
    bar = self.bar
    self.clear()
    sys.stderr.write(text + "\n")
    if bar:
      self.draw(bar)
    sys.stderr.flush()

  def keep(self, text: str) -> None:
    if self.path is None:
      return
    stamp = time.strftime("%Y-%m-%d %H:%M:%S")
    lines = "".join(f"{stamp}  {line}\n" for line in text.splitlines())
    try:
      files.append(self.path, lines)
    except (RunError, UserError) as error:
      # A full disk stops the run where it loses data; the log alone is no reason to stop it.
      self.path = None
      self.line(f"the log ends here: {error}")


_console = _Console()


def log(message: str) -> None:
  """Says a line (or several) on stderr, and keeps it in the run's log.txt with the time."""
  _console.line(message)
  _console.keep(message)


@contextlib.contextmanager
def log_to(path: Path) -> Iterator[None]:
  """Keeps what is logged in the block in a file too, which is appended to."""
  before = _console.path
  _console.path = path
  try:
    yield
  finally:
    _console.path = before


def duration(seconds: float | int) -> str:
  """4 -> "4s", 75 -> "1m15s", 4000 -> "1h06m"."""
  seconds = int(seconds + 0.5)
  if seconds < 60:
    return f"{seconds}s"
  if seconds < 3600:
    return f"{seconds // 60}m{seconds % 60:02d}s"
  return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"


def quantity(value: float | int) -> str:
  """950 -> "950", 1234 -> "1.2k", 5.6e6 -> "5.6M"."""
  for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
    if abs(value) >= limit:
      return f"{value / limit:.1f}{suffix}"
  return f"{value:.0f}"


class Progress:
  """The progress of one loop: a bar in place on a terminal, a line every few seconds elsewhere.

  Off a terminal no carriage return is ever written: launchers that stream logs by lines would
  hold everything back. Lines of progress are kept in log.txt, redrawn bars are not.

  Args:
    label: what is running ("align dpo").
    total: number of steps.
    start: steps that are done already (a resumed run); they do not count in the throughput.
    every: seconds between lines off a terminal, or between redraws (at most 10 a second) on one.
  """

  def __init__(self, label: str, total: int, *, start: int = 0, every: float | int = 5.0) -> None:
    self._label, self._total, self._start = label, total, start
    self._every = every
    self._tty = sys.stderr.isatty()
    self._began = self._shown = time.monotonic()
    self._tokens = 0
    self._step = start
    self._said = False

  def update(
    self, step: int, *, tokens: int = 0, values: Mapping[str, float | int] | None = None
  ) -> None:
    """Tells that `step` steps are done; shows it when it is time to.

    Args:
      step: number of steps done in all.
      tokens: tokens processed since the last call.
      values: numbers worth showing, such as the loss.
    """
    self._step = step
    self._tokens += tokens
    now = time.monotonic()
    if now - self._shown < (0.1 if self._tty else self._every):
      return
    self._shown = now
    self._show(self.text(now, values or {}))

  def _show(self, text: str) -> None:
    if self._tty:
      _console.draw(text)
    else:
      self._said = True
      log(text)

  def text(self, now: float, values: Mapping[str, float | int]) -> str:
    """The line at the given time (`time.monotonic()`)."""
    elapsed = max(now - self._began, 1e-9)
    parts = [
      f"{self._label}  {self._step}/{self._total} ({100 * self._step // max(self._total, 1)}%)"
    ]
    parts += [f"{name} {value:.4g}" for name, value in values.items()]
    done = self._step - self._start
    if done > 0:
      if self._tokens:
        parts.append(f"{quantity(self._tokens / elapsed)} tokens/s")
      else:
        parts.append(f"{done / elapsed:.3g} steps/s")
      parts.append(f"ETA {duration((self._total - self._step) * elapsed / done)}")
    return "  ".join(parts)

  def close(self, values: Mapping[str, float | int] | None = None) -> None:
    """Ends the bar and leaves one line that says how far it got and how long it took."""
    now = time.monotonic()
    elapsed = max(now - self._began, 1e-9)
    parts = [f"{self._label}  {self._step}/{self._total}"]
    parts += [f"{name} {value:.4g}" for name, value in (values or {}).items()]
    if self._tokens:
      parts.append(f"{quantity(self._tokens / elapsed)} tokens/s")
    parts.append(f"in {duration(elapsed)}")
    _console.clear()
    log("  ".join(parts))
