"""Which records can be used: every stage's one rule, and `rmd validate`, which reports by it."""

import dataclasses
import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from rmd_jax.data import schema
from rmd_jax.data.readers import FileSource, Item, located
from rmd_jax.data.schema import Location, Problem, Record
from rmd_jax.data.text import FieldError, excerpt, unknown_message_fields
from rmd_jax.data.tokenise import check_lengths, tokenise
from rmd_jax.data.vocabulary import ByteVocabulary, Vocabulary, encode_batch
from rmd_jax.errors import UserError

SHOWN_PROBLEMS = 10
LONGER = 1.1  # the paper's "longer": at least 10 % more tokens
CHUNK = 4096  # records tokenised at a time


def check(
  items: Iterable[Item], *, demonstrations: bool = False, name: str = "records"
) -> Iterator[Record | Problem]:
  """Raw records checked: each comes out as a `Record`, or as a `Problem` of severity "error".

  Warnings come before the record that they are about. Checks across records are made here: one
  shape a source, duplicate ids, unknown fields. `name` stands for records without a location.
  """
  known = schema.DEMONSTRATION_FIELDS if demonstrations else schema.KNOWN_FIELDS
  warned: set[str] = set()
  ids: dict[str, Location] = {}
  hashed: Counter[str] = Counter()
  first: tuple[str, Location] | None = None
  for count, item in enumerate(items, 1):
    if isinstance(item, Problem):
      yield item
      continue
    location, raw = located(item, name, count)
    try:
      record, warnings = schema.parse(raw, location, demonstration=demonstrations)
    except FieldError as error:
      yield Problem.at(location, error.field, error.what)
      continue
    shape = f"{record.shape}, {'messages' if record.messages else 'text'}"
    if first is None:
      first = shape, location
    elif shape != first[0]:
      what = (
        f"is of another shape ({shape}) than {first[1].file}:{first[1].line} ({first[0]}); give "
        "each shape a source of its own"
      )
      yield Problem.at(location, "record", what, whole=True, code="mixed")
      continue
    yield from warnings
    yield from _unknown_fields(raw, known, warned, location)
    if "id" in raw:
      if record.id in ids:
        before = ids[record.id]
        what = f"{excerpt(record.id)} is that of {before.file}:{before.line} too; give each its own"
        yield Problem.at(location, "id", what, severity="warning", code="duplicate id")
      else:
        ids[record.id] = location
    else:  # named by content: equal records are told apart by their number among their equals
      hashed[record.id] += 1
      if hashed[record.id] > 1:
        record = dataclasses.replace(record, id=f"{record.id}-{hashed[record.id]}")
    yield record


def _unknown_fields(
  raw: Mapping[str, Any], known: frozenset[str], warned: set[str], location: Location
) -> Iterator[Problem]:
  fields = set(raw) - known
  for name in ("prompt", "chosen", "rejected"):
    if isinstance(raw.get(name), (list, tuple)):
      fields |= {f"{name}[].{key}" for key in unknown_message_fields(raw[name])}
  for field in sorted(fields - warned, key=str):
    warned.add(field)
    what = "is not a field that is read here; it is left alone (said once)"
    yield Problem.at(location, excerpt(field), what, severity="warning", code="unknown field")


def refuse_unusable(problems: Sequence[Problem], usable: int, max_bad_fraction: float) -> None:
  """The rule of every stage: unusable records are tolerated up to a fraction, spoilt files never.

  Args:
    problems: warnings are passed over.
    usable: number of records that can be used.
    max_bad_fraction: of all records, the unusable ones included.

  Raises:
    UserError: with the first problems and their number.
  """
  if not 0 <= max_bad_fraction <= 1:
    raise UserError(f"max_bad_fraction is {max_bad_fraction}; give a fraction in [0, 1]")
  errors = [problem for problem in problems if problem.severity == "error"]
  spoilt = [problem for problem in errors if problem.whole]
  if not usable and not errors:
    raise UserError("data: the source holds no record; give one that does")
  total = usable + len(errors)
  if not spoilt and usable and len(errors) <= max_bad_fraction * total:
    return
  shown = (spoilt or errors)[:SHOWN_PROBLEMS]
  more = len(spoilt or errors) - len(shown)
  lines = [f"  {problem}" for problem in shown] + ([f"  ... and {more} more"] if more else [])
  if spoilt:
    head, way_out = "the source cannot be used as it is:", "Mend it; no fraction tolerates this."
  elif not usable:
    head, way_out = f"none of {total} records can be used:", "Mend them."
  else:
    fraction = math.ceil(len(errors) / total * 1e4) / 1e4
    head = f"{len(errors)} of {total} records are unusable, more than {max_bad_fraction:g} of all:"
    way_out = f"Mend or remove them, or leave them out with max_bad_fraction = {fraction:g}."
  raise UserError("\n".join([f"data: {head}", *lines, way_out]))


def read(
  items: Iterable[Item],
  *,
  max_bad_fraction: float,
  demonstrations: bool = False,
  name: str = "records",
) -> tuple[list[Record], list[Problem]]:
  """All records of a source, by the rule.

  Returns:
    usable records, and problems: errors (each a record left out) and warnings.

  Raises:
    UserError: too many are unusable, or the source is spoilt.
  """
  records: list[Record] = []
  problems: list[Problem] = []
  for item in check(items, demonstrations=demonstrations, name=name):
    if isinstance(item, Problem):
      problems.append(item)
    else:
      records.append(item)
  refuse_unusable(problems, len(records), max_bad_fraction)
  return records, problems


def main(
  files: Sequence[str],
  *,
  max_bad_fraction: float = 0.0,
  show: int = 0,
  prompt_length: int | None = None,
  response_length: int | None = None,
  vocabulary: Vocabulary | None = None,
) -> int:
  """`rmd validate`: prints every problem as it is found, then counts and lengths.

  Args:
    files: one source, as a run would read it.
    max_bad_fraction: of records that may be unusable.
    show: print that many records as the model will see them.
    prompt_length: in tokens, to count truncations; None: none.
    response_length: in tokens, to count truncations; None: none.
    vocabulary: for lengths; bytes unless given.

  Returns:
    Exit status: 0, or 2 where a run would refuse the data.
  """
  seen_by: Vocabulary = ByteVocabulary() if vocabulary is None else vocabulary
  survey = _Survey(seen_by)
  shown: list[Record] = []
  try:
    check_lengths(
      1 if prompt_length is None else prompt_length,
      2 if response_length is None else response_length,
    )
    for item in check(FileSource(tuple(files)).records()):
      if isinstance(item, Problem):
        _print(str(item))
      elif len(shown) < show:
        shown.append(item)
      survey.add(item)
    survey.flush()
  except UserError as error:  # a missing file, and nothing to do with what is in one
    _print(str(error))
    return 2
  for record in shown:
    _show(record, seen_by, prompt_length, response_length)
  for line in survey.lines(prompt_length, response_length):
    _print(line)
  try:
    refuse_unusable(survey.errors, survey.usable, max_bad_fraction)
  except UserError as error:
    first, *_, last = str(error).splitlines()
    _print(f"refused: {first.removeprefix('data: ').rstrip(':')}. {last if last != first else ''}")
    return 2
  bad = len(survey.errors)
  _print("usable" if not bad else f"usable without {bad} records (max_bad_fraction tolerates them)")
  return 0


def _print(line: str) -> None:
  """Prints what any terminal can hold."""
  encoding = sys.stdout.encoding or "utf-8"
  print(line.encode(encoding, "backslashreplace").decode(encoding))


class _Survey:
  """Counts and lengths, gathered without keeping the texts."""

  def __init__(self, vocabulary: Vocabulary):
    self.vocabulary = vocabulary
    self.errors: list[Problem] = []
    self.warnings: Counter[str] = Counter()
    self.shape = ""
    self.usable = 0
    self.duplicates = 0
    self.prompts: set[bytes] = set()
    self.contents: set[bytes] = set()
    self.pending: list[Record] = []
    self.prompt_tokens: list[np.ndarray] = []
    self.first_tokens: list[np.ndarray] = []  # of each record's first response, the preferred one
    self.longest_other: list[np.ndarray] = []  # tokens of its longest other response
    self.response_tokens: list[np.ndarray] = []

  def add(self, item: Record | Problem) -> None:
    if isinstance(item, Problem):
      if item.severity == "error":
        self.errors.append(item)
      else:
        self.warnings[item.code] += 1
      return
    self.usable += 1
    self.shape = item.shape
    self.prompts.add(schema.content_hash(item.prompt, ()))
    content = item.content
    self.duplicates += content in self.contents
    self.contents.add(content)
    self.pending.append(item)
    if len(self.pending) == CHUNK:
      self.flush()

  def flush(self) -> None:
    """Measures the records that wait, in one call of the vocabulary."""
    records, self.pending = self.pending, []
    if not records:
      return
    counts = np.array([len(record.responses) for record in records])
    prompts = encode_batch(self.vocabulary, [record.prompt for record in records])
    texts = encode_batch(self.vocabulary, [t for record in records for t in record.responses])
    self.prompt_tokens.append(np.array([len(ids) + 1 for ids in prompts]))
    tokens = np.array([len(ids) + 1 for ids in texts])  # with EOS, as the prompts with BOS
    self.response_tokens.append(tokens)
    starts = np.cumsum(counts) - counts
    self.first_tokens.append(tokens[starts])
    others = tokens.copy()
    others[starts] = 0
    self.longest_other.append(np.maximum.reduceat(others, starts))

  def lines(self, prompt_length: int | None, response_length: int | None) -> Iterator[str]:
    yield (
      f"records: {self.usable + len(self.errors)}; usable {self.usable}, unusable "
      f"{len(self.errors)}"
      + (f"; shape {self.shape}; {len(self.prompts)} prompts" if self.usable else "")
    )
    if self.warnings:
      counted = ", ".join(f"{code} {count}" for code, count in sorted(self.warnings.items()))
      yield f"warnings: {counted}"
    if not self.usable:
      return
    yield f"duplicates: {self.duplicates} records repeat the texts of an earlier one"
    prompts, responses = map(np.concatenate, (self.prompt_tokens, self.response_tokens))
    kind = type(self.vocabulary).__name__
    yield f"tokens ({kind}; BOS and EOS counted)      min   median      95 %      max     mean"
    chosen, other = map(np.concatenate, (self.first_tokens, self.longest_other))
    rows = [("prompt", prompts), ("response", responses), ("preferred response", chosen)]
    for name, values in rows:
      quantiles = np.percentile(values, [0, 50, 95, 100])
      numbers = "".join(f"{value:9.0f}" for value in (*quantiles, values.mean()))
      yield f"  {name:<28}{numbers}"
    yield from _longer_lines(chosen, other)
    for name, values, limit in (
      ("prompts", prompts, prompt_length),
      ("responses", responses, response_length),
    ):
      if limit is not None:
        cut = int((values > limit).sum())
        yield f"truncated: {cut} of {len(values)} {name} are longer than {limit} tokens"


def longer_wins(preferred: np.ndarray, longest_other: np.ndarray) -> float | None:
  """The fraction of examples in which the preferred response is the longest; ties count half."""
  if not len(preferred):
    return None
  wins = (preferred > longest_other) + 0.5 * (preferred == longest_other)
  return float(wins.mean())


def _longer_lines(preferred: np.ndarray, longest_other: np.ndarray) -> Iterator[str]:
  ties = int((preferred == longest_other).sum())
  fraction = longer_wins(preferred, longest_other)
  yield f"the longer response wins in {fraction:.1%} (ties in length count half: {ties})"
  apart = np.maximum(preferred, longest_other) >= LONGER * np.minimum(preferred, longest_other)
  if apart.any():
    fraction = longer_wins(preferred[apart], longest_other[apart])
    yield f"  of the {apart.sum()} with a difference of at least 10 %: {fraction:.1%}"


def _show(
  record: Record,
  vocabulary: Vocabulary,
  prompt_length: int | None,
  response_length: int | None,
) -> None:
  """One record as the model will see it: text, tokens, mask."""
  longest = max(len(vocabulary.encode(text)) for text in record.responses) + 1
  tokenised = tokenise(
    [record],
    vocabulary,
    prompt_length=prompt_length or len(vocabulary.encode(record.prompt)) + 1,
    response_length=response_length or max(longest, 2),
  )
  data = tokenised.dataset
  _print(f"--- {record.file}:{record.line}  id {record.id}  weight {record.weight:g}")
  length = data.prompt_length[0]
  _print(f"prompt      {record.prompt!r}")
  _print(f"  seen      {vocabulary.decode(data.prompt[0, :length])!r}")
  _print(f"  tokens    {length} of {tokenised.prompt_tokens[0]}: {_ids(data.prompt[0, :length])}")
  for j, text in enumerate(record.responses):
    length = data.response_length[0, j]
    label = "" if record.ranks is None else f"  rank {record.ranks[j]}"
    label += "" if record.ratings is None else f"  rating {record.ratings[j]:g}"
    if j == 0 and record.preference is not None:
      label += f"  preference {record.preference:g}"
    ids = data.responses[0, j, :length]
    _print(f"response {j}  {text!r}{label}")
    _print(f"  seen      {vocabulary.decode(ids)!r}")
    _print(f"  tokens    {length} of {tokenised.response_tokens[0, j]}: {_ids(ids)}")
    mask = data.response_mask[0, j]
    _print(f"  mask      {''.join('01'[int(bit)] for bit in mask)}")


def _ids(ids: np.ndarray) -> str:
  return " ".join(str(i) for i in ids)
