"""What a stage leaves behind, and whether it can be used again.

A stage's folder holds `stage.json`: the parts of its key (the options that it can reach, its data,
the keys of its inputs) and whether it was finished. Equal parts and finished: the stage is skipped.
Equal and unfinished: it goes on where it stopped. Other parts: the folder is put aside under the
name `<folder>.<key>`, so that nothing is lost, and is brought back if its key is wanted again.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rmd_jax.errors import UserError
from rmd_jax.training.files import write_json
from rmd_jax.training.progress import log

STAGE_FILE = "stage.json"


@dataclasses.dataclass(frozen=True)
class Key:
  """What decides a stage's result, in named parts (texts, or digests of longer texts)."""

  parts: tuple[tuple[str, str], ...]

  @classmethod
  def of(cls, **parts: str) -> "Key":
    """The key of the given parts; texts longer than a digest are hashed."""
    return cls(
      tuple((name, text if len(text) <= 16 else digest(text)) for name, text in parts.items())
    )

  @property
  def digest(self) -> str:
    """16 hexadecimal digits that name the key."""
    return digest(json.dumps(self.parts))

  def differences(self, stored: Mapping[str, str]) -> str:
    """A line for each part, as errors show them, and one for the parts that are equal."""
    lines, equal = [], []
    for name, text in self.parts:
      other = stored.get(name, "nothing")
      if other == text:
        equal.append(name)
      else:
        lines.append(f"  {name:<12}stored {other}, this run {text}   <- differs")
    if equal:
      lines.append(f"  {', '.join(equal)}: equal")
    return "\n".join(lines)


def digest(text: str) -> str:
  """The first 16 hexadecimal digits of the text's SHA-256."""
  return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How a stage came to its result."""

  directory: Path
  key: Key
  seconds: float
  skipped: bool


def state_of(directory: Path) -> dict[str, Any] | None:
  """The content of the folder's stage.json, or None."""
  try:
    return json.loads((directory / STAGE_FILE).read_text())
  except FileNotFoundError:
    return None


def finished(directory: Path, key: Key) -> bool:
  """Whether the folder holds the finished result of this key."""
  state = state_of(directory)
  return state is not None and state["done"] and state["key"] == key.digest


def reopen(directory: Path) -> None:
  """Marks a result that was found damaged as unfinished, so that its stage mends it."""
  state = state_of(directory)
  if state is not None:
    write_json(directory / STAGE_FILE, state | {"done": False})


def require(directory: Path, key: Key, *, stage: str, command: str) -> Outcome:
  """The finished artefact of an earlier stage.

  Raises:
    UserError: it is missing, unfinished, or made from other options or data; names what differs.
  """
  state = state_of(directory)
  if state is None or not state["done"]:
    what = "is not finished" if state else "has not run"
    raise UserError(f"stage '{stage}' {what} in {directory}.\nRun `{command}` first.")
  if state["key"] != key.digest:
    raise UserError(
      f"the result of stage '{stage}' in {directory} belongs to another run.\n"
      f"{key.differences(state['parts'])}\nRun `{command}`, or choose another --run_dir."
    )
  return Outcome(directory, key, state["seconds"], skipped=True)


def produce(directory: Path, key: Key, make: Callable[[Path], None], *, stage: str) -> Outcome:
  """Runs `make(directory)` unless the folder already holds the finished result of this key."""
  state = state_of(directory)
  if state is not None and state["key"] != key.digest:
    aside = directory.with_name(f"{directory.name}.{state['key']}")
    log(
      f"{stage}: options or inputs changed; the earlier result is kept as {aside.name}\n"
      f"{key.differences(state['parts'])}"
    )
    directory.rename(aside)
    state = None
  earlier = directory.with_name(f"{directory.name}.{key.digest}")
  if state is None and earlier.exists():  # also where a kill came between the two renames
    log(f"{stage}: found a result of these very options in {earlier.name}")
    earlier.rename(directory)
    state = state_of(directory)
  if state is not None and state["done"]:
    log(f"{stage}: up to date (key {key.digest[:8]}), skipped")
    return Outcome(directory, key, state["seconds"], skipped=True)
  directory.mkdir(parents=True, exist_ok=True)
  before = 0.0 if state is None else state["seconds"]
  record: dict[str, Any] = {
    "stage": stage,
    "key": key.digest,
    "parts": dict(key.parts),
    "done": False,
    "seconds": before,
  }
  write_json(directory / STAGE_FILE, record)
  started = time.monotonic()
  try:
    make(directory)
    record["done"] = True
  finally:
    record["seconds"] = before + time.monotonic() - started
    write_json(directory / STAGE_FILE, record)
  return Outcome(directory, key, record["seconds"], skipped=False)
