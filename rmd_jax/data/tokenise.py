"""Records to token columns: prompt and responses each on their own, BOS, EOS, truncation.

No token straddles the boundary between prompt and response, as they are tokenised apart. A prompt
is BOS and its text; where it is too long it loses its head and keeps BOS. A response is its text
and one EOS; where it is too long it either is cut and keeps EOS, or its example is left out.
Everything cut or left out is counted.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from rmd_jax.data.batch import Dataset
from rmd_jax.data.schema import Problem, Record
from rmd_jax.data.vocabulary import Vocabulary, encode_batch
from rmd_jax.errors import UserError

TRUNCATIONS = ("cut", "leave_out")


@dataclasses.dataclass(frozen=True)
class Tokenised:
  """Examples in columns, and what became of the records.

  Attributes:
    dataset: M examples.
    rows: [M] the record of each example.
    prompt_tokens: [M] tokens of each prompt, BOS included, before truncation.
    response_tokens: [M, N] tokens of each response, EOS included, before truncation; 0 where there
      is none.
    left_out: records without an example: errors (the vocabulary cannot write them) and, where the
      truncation is "leave_out", warnings.
    counts: prompts_truncated, responses_truncated, examples_truncated, examples_left_out,
      identical_after_truncation.
  """

  dataset: Dataset
  rows: np.ndarray
  prompt_tokens: np.ndarray
  response_tokens: np.ndarray
  left_out: list[Problem]
  counts: dict[str, int]


def tokenise_prompts(
  texts: Sequence[str], vocabulary: Vocabulary, prompt_length: int
) -> tuple[Int[np.ndarray, "M P"], Int[np.ndarray, " M"]]:
  """Prompts alone, as for sampling: BOS and the last `prompt_length` - 1 tokens.

  Returns:
    ids, right-padded, and lengths.
  """
  ids, lengths = _concatenate(encode_batch(vocabulary, texts))
  return _prompt_columns(ids, lengths, vocabulary, prompt_length)


def tokenise(
  records: Sequence[Record],
  vocabulary: Vocabulary,
  *,
  prompt_length: int,
  response_length: int,
  truncation: str = "cut",
  responses: int | None = None,
) -> Tokenised:
  """Tokenises records.

  Args:
    records: of one shape.
    vocabulary: gives the ids.
    prompt_length: P, BOS included.
    response_length: R, EOS included.
    truncation: of a response that is too long: "cut" or "leave_out".
    responses: N; None for the largest number that a record has.

  Returns:
    The columns. Responses a record lacks have length 0.
  """
  check_lengths(prompt_length, response_length, truncation)
  if responses is None:
    responses = max((len(record.responses) for record in records), default=1)
  encoded, left_out = _encode(records, vocabulary)
  too_long = [row for row in encoded if max(map(len, row.responses)) + 1 > response_length]
  if truncation == "leave_out":
    left_out += [_too_long(records[row.row], row, response_length) for row in too_long]
    gone = {row.row for row in too_long}
    encoded = [row for row in encoded if row.row not in gone]
  kept = [records[row.row] for row in encoded]

  prompts, prompt_tokens = _concatenate([row.prompt for row in encoded])
  flat, flat_tokens = _concatenate([ids for row in encoded for ids in row.responses])
  counts = np.array([len(row.responses) for row in encoded], np.int64)
  exists = np.arange(responses) < counts[:, None]
  response_tokens = np.zeros((len(encoded), responses), np.int64)
  response_tokens[exists] = flat_tokens + 1  # EOS

  prompt, prompt_lengths = _prompt_columns(prompts, prompt_tokens, vocabulary, prompt_length)
  ids = np.full((len(encoded), responses, response_length), vocabulary.pad_id, np.int32)
  ids[exists] = _response_rows(flat, flat_tokens, vocabulary, response_length)
  lengths = np.minimum(response_tokens, response_length).astype(np.int32)
  dataset = Dataset(
    ids=np.array([record.id for record in kept], np.str_),
    prompt=prompt,
    prompt_length=prompt_lengths,
    responses=ids,
    response_length=lengths,
    response_mask=np.arange(response_length) < lengths[:, :, None],
    weight=np.array([record.weight for record in kept], np.float32),
    **_labels(kept, responses),
  )
  cut: np.ndarray = response_tokens > response_length
  affected = np.asarray(cut.any(1))
  return Tokenised(
    dataset,
    np.array([row.row for row in encoded], np.int64),
    prompt_tokens + 1,
    response_tokens,
    left_out,
    {
      "prompts_truncated": int((prompt_tokens + 1 > prompt_length).sum()),
      "responses_truncated": int(cut.sum()),
      "examples_truncated": int(affected.sum()),
      "examples_left_out": len(too_long) if truncation == "leave_out" else 0,
      "identical_after_truncation": _became_identical(kept, dataset, affected),
    },
  )


def check_lengths(prompt_length: int, response_length: int, truncation: str = "cut") -> None:
  """Refuses lengths that cannot hold BOS or EOS and a token, and unknown policies."""
  if prompt_length < 1:
    raise UserError(f"prompt_length is {prompt_length}; BOS alone needs 1")
  if response_length < 2:
    raise UserError(f"response_length is {response_length}; a token and EOS need 2")
  if truncation not in TRUNCATIONS:
    raise UserError(f"truncation is {truncation!r}; give one of {', '.join(TRUNCATIONS)}")


class _Encoded(NamedTuple):
  row: int
  prompt: np.ndarray
  responses: Sequence[np.ndarray]


def _encode(
  records: Sequence[Record], vocabulary: Vocabulary
) -> tuple[list[_Encoded], list[Problem]]:
  """Ids of the records' texts; problems for those that the vocabulary cannot write."""
  try:
    prompts = encode_batch(vocabulary, [record.prompt for record in records])
    flat = iter(encode_batch(vocabulary, [t for record in records for t in record.responses]))
  except UserError:  # one at a time, to tell which
    return _encode_each(records, vocabulary)
  encoded = [
    _Encoded(row, prompts[row], list(itertools.islice(flat, len(record.responses))))
    for row, record in enumerate(records)
  ]
  return encoded, []


def _encode_each(
  records: Sequence[Record], vocabulary: Vocabulary
) -> tuple[list[_Encoded], list[Problem]]:
  encoded, left_out = [], []
  for row, record in enumerate(records):
    try:
      prompt, *responses = encode_batch(vocabulary, (record.prompt, *record.responses))
    except UserError as error:
      left_out.append(Problem(record.file, record.line, "record", str(error), code="vocabulary"))
    else:
      encoded.append(_Encoded(row, prompt, responses))
  return encoded, left_out


def _concatenate(parts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
  lengths = np.fromiter((len(part) for part in parts), np.int64, len(parts))
  flat = np.concatenate(parts) if len(parts) else np.zeros(0, np.int32)
  return flat.astype(np.int32), lengths


def _within(lengths: np.ndarray) -> np.ndarray:
  """Position of each token of the concatenation in its own text."""
  starts = np.cumsum(lengths) - lengths
  return np.arange(lengths.sum()) - np.repeat(starts, lengths)


def _prompt_columns(
  flat: np.ndarray, tokens: np.ndarray, vocabulary: Vocabulary, prompt_length: int
) -> tuple[np.ndarray, np.ndarray]:
  kept = np.minimum(tokens, prompt_length - 1)
  ids = np.full((len(tokens), prompt_length), vocabulary.pad_id, np.int32)
  ids[:, 0] = vocabulary.bos_id
  place = np.arange(prompt_length)
  tail = _within(tokens) >= np.repeat(tokens - kept, tokens)
  ids[(place >= 1) & (place <= kept[:, None])] = flat[tail]
  return ids, (kept + 1).astype(np.int32)


def _response_rows(
  flat: np.ndarray, tokens: np.ndarray, vocabulary: Vocabulary, response_length: int
) -> np.ndarray:
  kept = np.minimum(tokens, response_length - 1)
  ids = np.full((len(tokens), response_length), vocabulary.pad_id, np.int32)
  head = _within(tokens) < np.repeat(kept, tokens)
  ids[np.arange(response_length) < kept[:, None]] = flat[head]
  ids[np.arange(len(tokens)), kept] = vocabulary.eos_id
  return ids


def _became_identical(records: Sequence[Record], dataset: Dataset, cut: np.ndarray) -> int:
  """How many records have different responses that truncation made the same."""
  identical = 0
  for row in np.flatnonzero(cut).tolist():
    lengths = dataset.response_length[row]
    shown = {dataset.responses[row, j, : lengths[j]].tobytes() for j in np.flatnonzero(lengths)}
    identical += len(shown) < len(set(records[row].responses))
  return identical


def _labels(records: Sequence[Record], responses: int) -> dict[str, np.ndarray]:
  """The label columns that the records have; a pair that states no preference is certain."""
  columns: dict[str, np.ndarray] = {}
  if any(record.preference is not None for record in records):
    stated = [1.0 if r.preference is None else r.preference for r in records]
    columns["preference"] = np.array(stated, np.float32)
  for name, kind in (("ranks", np.int32), ("ratings", np.float32)):
    if records and getattr(records[0], name) is not None:
      column = np.zeros((len(records), responses), kind)
      for row, record in enumerate(records):
        column[row, : len(record.responses)] = getattr(record, name)
      columns[name] = column
  return columns


def _too_long(record: Record, encoded: _Encoded, response_length: int) -> Problem:
  longest = max(map(len, encoded.responses)) + 1
  what = (
    f"has a response of {longest} tokens, more than {response_length}, and is left out; raise "
    "response_length, or set truncation to 'cut'"
  )
  return Problem(record.file, record.line, "record", what, "warning", code="too long")
