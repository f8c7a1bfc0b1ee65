"""Sources of raw records: JSONL, Parquet, TFDS, seqio tasks.

A source is anything with

  records() -> iterable of (location, raw dict), of raw dicts, or of Problems in their places
  fingerprint() -> str, a hash of the content, never of a path

and optionally `demonstrations()` (records of {prompt, response}), `vocabulary` and `seed`. A
location is (file, line); raw dicts without one are named after their source and counted.
"""

import dataclasses
import glob
import gzip
import hashlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from rmd_jax.data.schema import Location, Problem
from rmd_jax.data.text import excerpt
from rmd_jax.errors import UserError

Item = tuple[tuple[str, int], Mapping[str, Any]] | Mapping[str, Any] | Problem

BOM = b"\xef\xbb\xbf"
GZIP_MAGIC = b"\x1f\x8b"
PARQUET_MAGIC = b"PAR1"
OTHER_FORMATS = {
  b"\xff\xfe": "UTF-16; save it as UTF-8",
  b"\xfe\xff": "UTF-16; save it as UTF-8",
  b"BZh": "bzip2; decompress it, or use gzip",
  b"\xfd7zXZ": "xz; decompress it, or use gzip",
  b"\x28\xb5\x2f\xfd": "Zstandard; decompress it, or use gzip",
  b"PK\x03\x04": "a zip archive; unpack it",
}


@runtime_checkable
class Source(Protocol):
  """What `PreferenceData` reads from."""

  def records(self) -> Iterable[Item]:
    """Raw records, with their locations or without, and problems in their places."""

  def fingerprint(self) -> str:
    """Hexadecimal hash of the content."""


def fingerprint_records(items: Iterable[Item]) -> str:
  """A hash of raw records and problems, in their order, for sources without bytes to hash."""
  digest = hashlib.sha256()
  for item in items:
    content = item.what if isinstance(item, Problem) else located(item, "", 0)[1]
    line = json.dumps(content, sort_keys=True, default=_plain)
    digest.update(line.encode("utf-8", "surrogatepass") + b"\n")
  return digest.hexdigest()[:32]


def located(
  item: tuple[tuple[str, int], Mapping[str, Any]] | Mapping[str, Any], name: str, number: int
) -> tuple[Location, Mapping[str, Any]]:
  """(Location, raw record) of an item; `name` and `number` stand in for a location it lacks."""
  if isinstance(item, Mapping):
    return Location(name, number), item
  (file, line), raw = item
  return Location(file, line), raw


def _plain(value: Any) -> Any:
  """NumPy and bytes as JSON can hold them; anything else by its repr."""
  if isinstance(value, (np.generic, np.ndarray)):
    return value.tolist()
  return repr(value)


@dataclasses.dataclass(frozen=True)
class FileSource:
  """JSON Lines, gzipped or not, and Parquet files, read one after the other.

  The format is told from a file's first bytes. A name may hold the wildcards of a shell; then its
  matches are read in the order of their names.

  Attributes:
    files: a path or paths; the text in them is UTF-8.
  """

  files: str | Sequence[str]

  def __post_init__(self) -> None:
    files = (self.files,) if isinstance(self.files, (str, os.PathLike)) else tuple(self.files)
    object.__setattr__(self, "files", tuple(str(file) for file in files))

  def paths(self) -> list[Path]:
    """The files, wildcards expanded.

    Raises:
      UserError: none given, or one that does not exist.
    """
    if not self.files:
      raise UserError("data: no file given; name at least one JSONL or Parquet file")
    paths: list[Path] = []
    for name in self.files:
      matches = [name] if os.path.exists(name) else sorted(glob.glob(name))
      if not matches:
        raise UserError(f"data: no file {excerpt(name, 200)}; mend the path")
      paths.extend(Path(match) for match in matches)
    for path in paths:
      if path.is_dir():
        raise UserError(f"data: {path} is a directory; name the files in it, as {path}/*.jsonl")
    return paths

  def records(self) -> Iterator[Item]:
    """Raw records, and problems where a line or a file cannot be read."""
    for path in self.paths():
      yield from read_file(path)

  def fingerprint(self) -> str:
    """SHA-256 of the files' bytes, in their order; 32 hexadecimal digits."""
    digest = hashlib.sha256()
    for path in self.paths():
      with _open(path) as stream:
        digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:32]


def _open(path: Path) -> BufferedReader:
  try:
    return open(path, "rb")
  except OSError as error:
    raise UserError(f"data: cannot read {path}: {error.strerror}") from error


def read_file(path: Path) -> Iterator[Item]:
  """The raw records of one file, whatever its format, or problems in their places."""
  empty = True
  for item in _read_file(str(path), path):
    empty = False
    yield item
  if empty:
    yield Problem(str(path), 1, "file", "holds no record; give a file with records", whole=True)


def _read_file(name: str, path: Path) -> Iterator[Item]:
  with _open(path) as stream:
    head = stream.read(8)
    stream.seek(0)
    other = next((what for magic, what in OTHER_FORMATS.items() if head.startswith(magic)), None)
    if other is not None:
      yield Problem(name, 1, "file", f"is {other}", whole=True)
    elif head.startswith(PARQUET_MAGIC):
      yield from _read_parquet(name, path)
    elif head.startswith(GZIP_MAGIC):
      with gzip.open(stream, "rb") as unpacked:
        yield from _read_lines(name, unpacked)
    else:
      yield from _read_lines(name, stream)


def _read_lines(name: str, stream: Any) -> Iterator[Item]:
  number = 0
  lines = iter(stream)
  while True:
    try:
      line = next(lines)
    except StopIteration:
      return
    except (EOFError, zlib.error, OSError) as error:
      what = f"cannot be read beyond this line ({error}); fetch or write the file again"
      yield Problem(name, number + 1, "file", what, whole=True)
      return
    number += 1
    if number == 1 and line.startswith(BOM):
      line = line[len(BOM) :]
    if number == 1 and (line.strip() in (b"[", b"{") or line.lstrip().startswith((b"[{", b"[["))):
      what = (
        "is not one JSON object a line (an array, or indented); write one object a line, "
        "as `jq -c '.[]'` does"
      )
      yield Problem(name, number, "file", what, whole=True)
      return
    if line.strip():
      yield parse_line(Location(name, number), line)


def parse_line(location: Location, line: bytes) -> Item:
  """One line of JSON as a raw record, or the problem with it."""

  def problem(what: str) -> Problem:
    return Problem.at(location, "record", what)

  try:
    text = line.decode("utf-8")
  except UnicodeDecodeError as error:
    return problem(f"byte {error.start + 1} of the line is not UTF-8; save the file as UTF-8")
  try:
    value = json.loads(text, object_pairs_hook=_unique)
  except json.JSONDecodeError as error:
    return problem(f"is not JSON ({error.msg} at character {error.colno}); mend the line")
  except RecursionError:
    return problem("is nested too deeply; write a flat object")
  except ValueError as error:  # a repeated key, or an integer of thousands of digits
    return problem(f"{error}; mend the line")
  if not isinstance(value, dict):
    return problem(f"is {excerpt(value)}, not an object; write {{...}} on each line")
  return location, value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  result = dict(pairs)
  if len(result) < len(pairs):
    counts = Counter(key for key, _ in pairs)
    repeated = next(key for key, count in counts.items() if count > 1)
    raise ValueError(f"holds the key {excerpt(repeated)} twice")
  return result


def _read_parquet(name: str, path: Path) -> Iterator[Item]:
  """Rows of a Parquet file; a row is a line."""
  import pyarrow
  import pyarrow.parquet

  row = 0
  try:
    with pyarrow.parquet.ParquetFile(path) as file:
      for batch in file.iter_batches():
        for index in range(batch.num_rows):
          row += 1
          yield _parquet_row(Location(name, row), batch, index)
  except (pyarrow.ArrowException, OSError) as error:
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    what = f"cannot be read as Parquet ({first}); fetch or write the file again"
    yield Problem(name, row + 1, "file", what, whole=True)


def _parquet_row(location: Location, batch: Any, index: int) -> Item:
  raw = {}
  for field, column in zip(batch.schema.names, batch.columns, strict=True):
    try:
      raw[field] = column[index].as_py()
    except (ValueError, OverflowError) as error:  # bytes that are no UTF-8, a date out of range
      reason = (
        "is not UTF-8" if isinstance(error, UnicodeDecodeError) else f"is unreadable ({error})"
      )
      return Problem.at(location, field, f"{reason}; write the column as UTF-8 text or numbers")
  return location, raw


@dataclasses.dataclass(frozen=True)
class TfdsSource:
  """A TensorFlow Datasets split.

  Attributes:
    name: as `tfds.load` takes it, a version included for runs that repeat.
    split: as TFDS writes it, "train[:10%]" too.
    fields: record field -> feature of the data set ("a/b" for a nested one), as a dict or as
      pairs; features it does not name are left out. Empty: features are named as record fields.
    data_dir: where TFDS keeps its data; None is TFDS's own place.
  """

  name: str
  split: str
  fields: Mapping[str, str] | Sequence[tuple[str, str]] = ()
  data_dir: str | None = None

  def __post_init__(self) -> None:
    fields = self.fields
    pairs = fields.items() if isinstance(fields, Mapping) else fields
    object.__setattr__(self, "fields", tuple((pair[0], pair[1]) for pair in pairs))

  def records(self) -> Iterator[Item]:
    """Raw records; the line is the example's place in the split."""
    import tensorflow_datasets as tfds

    try:
      builder = tfds.builder(self.name, data_dir=self.data_dir)
      dataset = builder.as_dataset(split=self.split, shuffle_files=False)
    except (tfds.core.DatasetNotFoundError, AssertionError, ValueError, OSError) as error:
      raise UserError(
        f"data: cannot open the TFDS data set {self.name!r}, split {self.split!r}: {error}\n"
        "Mend the name, or prepare it once with tfds.builder(name).download_and_prepare()."
      ) from error
    label = f"tfds:{self.name}/{self.split}"
    for line, example in enumerate(dataset.as_numpy_iterator(), 1):
      yield _plain_record(Location(label, line), self._select(example))

  def _select(self, example: Mapping[str, Any]) -> dict[str, Any]:
    if not self.fields:
      return dict(example)
    selected = {}
    for field, feature in dict(self.fields).items():
      value: Any = example
      for part in feature.split("/"):
        if not isinstance(value, Mapping) or part not in value:
          raise UserError(
            f"data: {self.name} has no feature {feature!r}; it has {', '.join(sorted(example))}"
          )
        value = value[part]
      selected[field] = value
    return selected

  def fingerprint(self) -> str:
    """A hash of the records."""
    return fingerprint_records(self.records())


@dataclasses.dataclass(frozen=True)
class SeqioSource:
  """A registered seqio task or mixture.

  A record field is read from the example's text: from `FIELD_pretokenized` where the task kept it
  (seqio's tokeniser does), from `FIELD` where that is text, and else by decoding its tokens.

  Attributes:
    name: task or mixture; importing the module that registers it is the caller's part (--module).
    split: seqio's name of the split.
  """

  name: str
  split: str

  def records(self) -> Iterator[Item]:
    """Raw records; the line is the example's place in the split."""
    from rmd_jax.data import seqio_tasks

    label = f"seqio:{self.name}/{self.split}"
    for line, raw in enumerate(seqio_tasks.raw_examples(self.name, self.split), 1):
      yield _plain_record(Location(label, line), raw)

  def fingerprint(self) -> str:
    """A hash of the records."""
    return fingerprint_records(self.records())


@dataclasses.dataclass(frozen=True)
class RecordsSource:
  """Records that are in memory already, for notebooks and tests.

  Attributes:
    rows: raw records.
    name: what messages call it.
  """

  rows: tuple[Mapping[str, Any], ...] = dataclasses.field(hash=False)
  name: str = "records"

  def records(self) -> Iterator[Item]:
    """The records; the line is the place in `rows`."""
    for line, raw in enumerate(self.rows, 1):
      yield Location(self.name, line), dict(raw)

  def fingerprint(self) -> str:
    """A hash of the records."""
    return fingerprint_records(self.records())


def _plain_record(location: Location, raw: Mapping[str, Any]) -> Item:
  """NumPy values of TFDS as Python's; a problem where bytes are no UTF-8."""
  record = {}
  for field, value in raw.items():
    try:
      record[field] = plain_value(value)
    except UnicodeDecodeError:
      return Problem.at(location, field, "is not UTF-8; write it as UTF-8 text")
  return location, record


def plain_value(value: Any) -> Any:
  """Bytes as text, arrays as lists, and a dict of role and content arrays as messages."""
  if isinstance(value, bytes):
    return value.decode("utf-8")
  if isinstance(value, np.ndarray):
    return plain_value(value.tolist())
  if isinstance(value, np.generic):
    return plain_value(value.item())
  if isinstance(value, (list, tuple)):
    return [plain_value(item) for item in value]
  if isinstance(value, Mapping):
    columns = {key: plain_value(item) for key, item in value.items()}
    if {"role", "content"} <= columns.keys() and isinstance(columns["role"], list):
      # TFDS turns a sequence of structures into a structure of sequences.
      return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return columns
  if hasattr(value, "to_list"):  # tf.ragged
    return plain_value(value.to_list())
  return value
