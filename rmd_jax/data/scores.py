"""The score store: reference log-probabilities and rewards of every example, computed once.

  header.json      what the scores depend on besides an example's content: dtype, lengths,
                   tokeniser, data, and for each column the hash of the model's parameters
  reference.bin    log pi_ref(y|x) of every response
  member_<k>.bin   rewards by member k

A column is a file of blocks, appended as batches are scored, so that scoring goes on where a kill
stopped it, and a new member touches no other file. A row is found by the example's content key, not
by its position: order, splits and duplicates do not matter. No beta and no path is in a key.
"""

import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from rmd_jax.data.batch import Dataset
from rmd_jax.errors import RunError, UserError
from rmd_jax.training import files
from rmd_jax.training.progress import log

_FORMAT = 1
_BLOCK = struct.Struct(
  "<4sIII"
)  # magic, rows, responses a row, CRC-32 of these counts and what follows
_MAGIC = b"RMDS"
_KEY = 32  # bytes of a row key

Field = str | int


def _crc(rows: int, responses: int, body: bytes) -> int:
  return zlib.crc32(body, zlib.crc32(struct.pack("<II", rows, responses)))


class _Column:
  """One column: its rows in memory, and its file."""

  def __init__(self, path: Path) -> None:
    self.path = path
    self._keys: list[np.ndarray] = []  # [rows] a block
    self._values: list[np.ndarray] = []  # [rows, N] a block
    self._known: set[bytes] = set()
    self.good = 0  # bytes of whole blocks; what is behind them is torn or damaged
    content = path.read_bytes() if path.exists() else b""
    self.size = len(content)
    while self.good + _BLOCK.size <= self.size:
      magic, rows, responses, crc = _BLOCK.unpack_from(content, self.good)
      start = self.good + _BLOCK.size
      body = content[start : start + rows * (_KEY + 4 * responses)]
      if magic != _MAGIC or _crc(rows, responses, body) != crc:
        break
      values = np.frombuffer(body, "<f4", offset=rows * _KEY).reshape(rows, responses)
      self._take(np.frombuffer(body, f"S{_KEY}", rows), values)
      self.good = start + len(body)

  def _take(self, keys: np.ndarray, values: np.ndarray) -> None:
    self._keys.append(keys)
    self._values.append(values)
    self._known.update(keys.tolist())

  def __contains__(self, key: bytes) -> bool:
    return key in self._known

  def cut(self) -> None:
    """Removes a torn block, which a kill or a full disk left, or a damaged one and what follows."""
    if self.size > self.good:
      log(f"{self.path}: the last {self.size - self.good} bytes are no whole block and were cut.")
      files.truncate(self.path, self.good)
      self.size = self.good

  def append(self, keys: np.ndarray, values: np.ndarray) -> None:
    body = keys.tobytes() + np.ascontiguousarray(values, "<f4").tobytes()
    rows, responses = values.shape
    block = _BLOCK.pack(_MAGIC, rows, responses, _crc(rows, responses, body)) + body
    files.append(self.path, block)
    self._take(keys, values)
    self.good = self.size = self.size + len(block)

  def rows(self, keys: np.ndarray, responses: int) -> np.ndarray:
    """[rows, N] values of keys that are all there; equal keys have equal N, so none is cut."""
    values = np.zeros((len(keys), responses), np.float32)
    if len(keys):
      known = np.concatenate(self._keys)
      width = max(block.shape[1] for block in self._values)
      padded = [np.pad(block, ((0, 0), (0, width - block.shape[1]))) for block in self._values]
      order = np.argsort(known, kind="stable")
      found = order[np.searchsorted(known, keys, sorter=order)]
      values[:] = np.concatenate(padded)[found, :responses]
    return values


class ScoreStore:
  """The scores of one reference policy and K reward models.

  Args:
    directory: where they lie; nothing is written before the first `write`.
    fields: what a score depends on besides the models and the example, by name: dtype,
      prompt_length, response_length, tokeniser (fingerprint), data (fingerprint). Compared with
      what the store says.
    reference: content hash of the reference policy's parameters; None when it is not needed.
    members: content hash of each reward model's parameters, member 0 first.
    command: the command that makes the scores, for messages.

  Raises:
    UserError: there are scores already, which belong to another run; names what differs.
    RunError: header.json cannot be read.
  """

  def __init__(
    self,
    directory: Path,
    fields: Mapping[str, Field],
    *,
    reference: str | None,
    members: Sequence[str],
    command: str = "rmd score",
  ) -> None:
    self.directory = directory
    self._fields = dict(fields)
    self._models = {} if reference is None else {"reference": reference}
    self._models |= {f"member_{k}": digest for k, digest in enumerate(members)}
    self._members = len(members)
    self._command = command
    self._header = self._read_header()
    self._columns: dict[str, _Column] = {}
    self._keys: tuple[Dataset, np.ndarray] | None = None
    self._check()

  @property
  def columns(self) -> tuple[str, ...]:
    """The names of this run's columns: "reference" (if any), "member_0", "member_1", …"""
    return tuple(self._models)

  def _read_header(self) -> dict | None:
    path = self.directory / "header.json"
    try:
      header = json.loads(path.read_bytes())
      if header["format"] != _FORMAT:
        raise RunError(
          f"{path}: format {header['format']}; this version reads {_FORMAT}. "
          f"Choose another folder for the scores, and run `{self._command}` again."
        )
      return {"fields": dict(header["fields"]), "models": dict(header["models"])}
    except FileNotFoundError:
      return None
    except (ValueError, KeyError, TypeError) as error:
      raise RunError(
        f"{path} is damaged ({error}). Remove {self.directory} and run `{self._command}` again."
      ) from error

  def _check(self) -> None:
    """Compares the store with the run; columns that only one of them has are no difference."""
    if self._header is None:
      return
    models = {name: self._models[name] for name in self._header["models"].keys() & self._models}
    here = self._fields | {
      f"model of {name}": models[name] for name in self._models if name in models
    }
    there = self._header["fields"] | {
      f"model of {name}": self._header["models"][name] for name in models
    }
    names = [*here, *(name for name in there if name not in here)]
    differ = [name for name in names if here.get(name) != there.get(name)]
    if not differ:
      return
    width = max(map(len, differ))
    lines = [
      f"  {name:<{width}}  scores {_short(there.get(name))}, run {_short(here.get(name))}"
      "   <- differs"
      for name in differ
    ]
    equal = ", ".join(name for name in names if name not in differ)
    raise UserError(
      f"the scores in {self.directory} belong to another run.\n"
      + "\n".join(lines)
      + (f"\n  {equal}: equal" if equal else "")
      + f"\nRun `{self._command}` with another folder for the scores, or remove that one first."
    )

  def _column(self, name: str) -> _Column:
    if name not in self._columns:
      self._columns[name] = _Column(self.directory / f"{name}.bin")
    return self._columns[name]

  def _keys_of(self, dataset: Dataset) -> np.ndarray:
    if self._keys is None or self._keys[0] is not dataset:  # hashing all rows is not free
      self._keys = (dataset, dataset.keys)
    return self._keys[1]

  def missing(self, dataset: Dataset, columns: Sequence[str] | None = None) -> np.ndarray:
    """The rows still to be scored, ascending; of rows with the same content only the first.

    Args:
      dataset: the examples.
      columns: names of columns (all of this run's by default); a row lacks any of them.
    """
    keys = self._keys_of(dataset)
    _, first = np.unique(keys, return_index=True)
    loaded = [self._column(name) for name in (self.columns if columns is None else columns)]
    lacking = [row for row in sorted(first) if any(keys[row] not in column for column in loaded)]
    return np.array(lacking, np.int64)

  def write(self, dataset: Dataset, rows: np.ndarray, scores: Mapping[str, np.ndarray]) -> None:
    """Adds the scores of some rows; those that a column has already are left as they are.

    Args:
      dataset: the examples.
      rows: [B] rows of it.
      scores: [B, N] by column name. Where a response does not exist the value does not matter.

    Raises:
      RunError: a score of a response is NaN or infinite (nothing of this call is written); the
        disk is full.
      ValueError: a shape or a column name is wrong.
    """
    rows = np.asarray(rows)
    mask = dataset.mask[rows]
    clean = {}
    for name, values in scores.items():
      if name not in self._models:
        raise ValueError(f"this store has no column {name!r}; it has {', '.join(self.columns)}")
      values = np.asarray(values, np.float32)
      if values.shape != mask.shape:
        raise ValueError(f"scores of {name} have shape {values.shape}, the examples {mask.shape}")
      values = np.where(mask, values, np.float32(0))
      bad = ~np.isfinite(values).all(-1)
      if bad.any():
        ids = ", ".join(str(dataset.ids[row]) for row in rows[bad][:5])
        raise RunError(
          f"{bad.sum()} of {len(rows)} scores of {name} are not finite (examples {ids}); none was "
          f"stored.\nThat model is broken: look at its metrics, train it again, then run "
          f"`{self._command}`."
        )
      clean[name] = values
    self._write_header()
    keys = self._keys_of(dataset)[rows]
    _, first = np.unique(keys, return_index=True)
    for name, values in clean.items():
      column = self._column(name)
      column.cut()
      new = np.array([i for i in sorted(first) if keys[i] not in column], np.int64)
      if len(new):
        column.append(keys[new], values[new])

  def _write_header(self) -> None:
    models = dict(self._header["models"]) if self._header else {}
    if self._header is not None and models | self._models == models:
      return
    files.make_directory(self.directory)
    header = {"fields": self._fields, "models": models | self._models}
    files.write_json(self.directory / "header.json", {"format": _FORMAT, **header})
    self._header = header

  def flush(self) -> None:
    """Makes what was written durable (a kill of the process loses nothing even without)."""
    for column in self._columns.values():
      if column.path.exists():
        files.sync_file(column.path)

  def attach(self, dataset: Dataset) -> Dataset:
    """The data set with `reference_logp` [M, N] (if there is a reference) and `rewards` [K, M, N].

    Raises:
      UserError: there are no scores, or some are missing; says which and how many.
      RunError: a file of scores is damaged.
    """
    if self._header is None:
      raise UserError(f"there are no scores in {self.directory}. Run `{self._command}` first.")
    keys = self._keys_of(dataset)
    lines, complete = [], []
    for name in self.columns:
      column = self._column(name)
      absent = [row for row, key in enumerate(keys) if key not in column]
      if absent:
        torn = ", and its last block is torn or damaged" if column.size > column.good else ""
        lines.append(
          f"  {name}  scores {len(keys) - len(absent)}, run {len(keys)} examples   <- differs "
          f"(first without: {dataset.ids[absent[0]]}{torn})"
        )
      else:
        complete.append(name)
    if lines:
      raise UserError(
        f"the scores in {self.directory} are not complete.\n"
        + "\n".join(lines)
        + (f"\n  {', '.join(complete)}: complete" if complete else "")
        + f"\nRun `{self._command}`: it goes on where it stopped."
      )
    responses = dataset.mask.shape[1]
    found = {name: self._column(name).rows(keys, responses) for name in self.columns}
    columns = {}
    if "reference" in found:
      columns["reference_logp"] = found["reference"]
    if self._members:
      columns["rewards"] = np.stack([found[f"member_{k}"] for k in range(self._members)])
    return dataset.replace(**columns)


def _short(value: Field | None) -> str:
  if value is None:
    return "nothing"
  return value[:12] if isinstance(value, str) else str(value)
