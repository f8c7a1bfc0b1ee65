"""Preference data as a run sees it: read, checked, split, tokenised, and said what was left out.

A source (`readers`) gives raw records; the rule of `validate` decides which are used; prompts are
split by hash; texts become token columns. Nothing is written but a trained vocabulary.
"""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rmd_jax.data.batch import Dataset
from rmd_jax.data.readers import Source
from rmd_jax.data.schema import Problem, Record
from rmd_jax.data.splits import PARTS, Splits
from rmd_jax.data.tokenise import Tokenised, check_lengths, tokenise
from rmd_jax.data.validate import longer_wins, read, refuse_unusable
from rmd_jax.data.vocabulary import TrainedSentencePiece, Vocabulary
from rmd_jax.errors import UserError

FORMAT = "rmd data 1"  # changes when the same source would give other columns
BINS = 20
LABELS = ("preference", "ranks", "ratings", "member_weight", "reference_logp", "rewards")


@dataclasses.dataclass(frozen=True)
class Prepared:
  """Token columns of every part.

  Attributes:
    splits: train, validation, test, judge; of length 0 where the part was not asked for. The
      judge's part is for the held-out reward model alone.
    demonstrations: train and validation, N = 1, for SFT.
    vocabulary: wrote the ids.
    summary: JSON-able; data/summary.json of the run directory.
    left_out: a problem for every record that is not in the columns.
    warnings: problems of records that are.
  """

  splits: dict[str, Dataset]
  demonstrations: dict[str, Dataset]
  vocabulary: Vocabulary
  summary: dict[str, Any]
  left_out: list[Problem]
  warnings: list[Problem]

  def text(self) -> str:
    """A few lines for the log: parts, truncation, and every record that was left out."""
    summary = self.summary
    counts = ", ".join(f"{name} {count}" for name, count in summary["counts"].items())
    cut = summary["truncation"]
    lines = [
      f"data: {counts}; {summary['prompts']} prompts, shape {summary['shape']}",
      f"data: truncated {cut['prompts_truncated']} prompts (their head) and "
      f"{cut['responses_truncated']} responses (their end)",
    ]
    if summary["warnings"]:
      warned = ", ".join(f"{code} {count}" for code, count in summary["warnings"].items())
      lines.append(f"data: warnings: {warned} (`rmd validate` shows them)")
    if self.left_out:
      lines.append(f"data: left out {len(self.left_out)} records:")
      lines += [f"  {problem}" for problem in self.left_out]
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class PreferenceData:
  """Where preferences come from and how they become tokens.

  Attributes:
    source: FileSource, TfdsSource, SeqioSource, a world, or anything with records() and
      fingerprint().
    prompt_length: P, BOS included; longer prompts lose their head.
    response_length: R, EOS included.
    vocabulary: None for the source's own (a world has one).
    max_bad_fraction: of records that may be unusable, and are then left out and listed.
    truncation: of responses that are too long: "cut", or "leave_out" of their examples.
    splits: fractions and seed.
    demonstrations: a source of {prompt, response} for SFT; None for the source's own or, where it
      has none, the chosen responses.
  """

  source: Any
  prompt_length: int
  response_length: int
  vocabulary: Vocabulary | TrainedSentencePiece | None = None
  max_bad_fraction: float = 0.0
  truncation: Literal["cut", "leave_out"] = "cut"
  splits: Splits = Splits()
  demonstrations: Any = None

  def __post_init__(self) -> None:
    check_lengths(self.prompt_length, self.response_length, self.truncation)
    for name, value in (("source", self.source), ("demonstrations", self.demonstrations)):
      if not isinstance(value, Source) and (name == "source" or value is not None):
        raise UserError(
          f"PreferenceData.{name} is {type(value).__name__}; give a source with records() and "
          "fingerprint(), such as FileSource"
        )

  def key(self) -> str:
    """Hash of everything that decides what `prepare` returns: contents, never paths."""
    demonstrations = self.demonstrations.fingerprint() if self.demonstrations is not None else ""
    parts = [
      FORMAT,
      self.source.fingerprint(),
      demonstrations,
      self._vocabulary().fingerprint(),
      self.prompt_length,
      self.response_length,
      self.truncation,
      dataclasses.asdict(self.splits),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]

  def prepare(self, directory: Path) -> Prepared:
    """Reads and tokenises everything.

    Args:
      directory: of the run's data; a trained vocabulary is kept there.

    Raises:
      UserError: unusable data, by the rule of `rmd validate`.
    """
    records, problems = read(
      self.source.records(),
      max_bad_fraction=self.max_bad_fraction,
      name=type(self.source).__name__,
    )
    vocabulary = self._vocabulary()
    if isinstance(vocabulary, TrainedSentencePiece):
      vocabulary = vocabulary.train(self._training_texts(records), directory)
    tokenised = self._tokenise(records, problems, vocabulary)
    rows = self.splits.rows([records[row].prompt for row in tokenised.rows])
    splits = {name: tokenised.dataset.take(rows[name]) for name in PARTS}
    problems = problems + tokenised.left_out
    demonstrations, demonstrated = self._demonstrations(splits, vocabulary)
    problems += demonstrated
    left_out = [p for p in problems if p.severity == "error" or p.code == "too long"]
    warnings = [p for p in problems if p.severity == "warning" and p.code != "too long"]
    summary = self._summary(records, tokenised, splits, demonstrations, left_out, warnings)
    summary["vocabulary"] = {
      "kind": type(vocabulary).__name__,
      "size": vocabulary.size,
      "fingerprint": vocabulary.fingerprint(),
    }
    return Prepared(splits, demonstrations, vocabulary, summary, left_out, warnings)

  def _vocabulary(self) -> Vocabulary | TrainedSentencePiece:
    own: Vocabulary | None = getattr(self.source, "vocabulary", None)
    vocabulary = own if self.vocabulary is None else self.vocabulary
    if vocabulary is None:
      raise UserError(
        f"PreferenceData.vocabulary is not set, and {type(self.source).__name__} brings none; set "
        "ByteVocabulary, SentencePieceVocabulary or TrainedSentencePiece"
      )
    return vocabulary

  def _training_texts(self, records: Sequence[Record]) -> list[str]:
    part = self.splits.assign([record.prompt for record in records])
    train = [record for record, p in zip(records, part, strict=True) if PARTS[p] == "train"]
    return [text for record in train for text in (record.prompt, *record.responses)]

  def _tokenise(
    self, records: list[Record], problems: list[Problem], vocabulary: Vocabulary
  ) -> Tokenised:
    """Token columns; records that the vocabulary cannot write fall under the same rule."""
    tokenised = tokenise(
      records,
      vocabulary,
      prompt_length=self.prompt_length,
      response_length=self.response_length,
      truncation=self.truncation,
    )
    usable = len(tokenised.dataset) + tokenised.counts["examples_left_out"]
    refuse_unusable(problems + tokenised.left_out, usable, self.max_bad_fraction)
    return tokenised

  def _demonstrations(
    self, splits: dict[str, Dataset], vocabulary: Vocabulary
  ) -> tuple[dict[str, Dataset], list[Problem]]:
    if self.demonstrations is not None:
      items = self.demonstrations.records()
    else:
      own = getattr(self.source, "demonstrations", list)
      items = list(own())
      if not items:
        return {name: first_responses(splits[name]) for name in PARTS[:2]}, []
    records, problems = read(
      items,
      max_bad_fraction=self.max_bad_fraction,
      demonstrations=True,
      name=f"{type(self.demonstrations or self.source).__name__} demonstrations",
    )
    tokenised = self._tokenise(records, problems, vocabulary)
    # Prompts of the test and judge parts stay unseen here too, by the same hash.
    part = self.splits.assign([records[row].prompt for row in tokenised.rows])
    parts = {
      name: tokenised.dataset.take(np.flatnonzero(part == i)) for i, name in enumerate(PARTS)
    }
    if not len(parts["train"]):
      raise UserError("data: no demonstration falls into the train part; give more of them")
    return {name: parts[name] for name in PARTS[:2]}, problems + tokenised.left_out

  def _summary(
    self,
    records: list[Record],
    tokenised: Tokenised,
    splits: dict[str, Dataset],
    demonstrations: dict[str, Dataset],
    left_out: list[Problem],
    warnings: list[Problem],
  ) -> dict[str, Any]:
    lengths = tokenised.response_tokens
    others = lengths[:, 1:].max(1, initial=0)
    rejected = lengths[:, 1:]
    return {
      "key": self.key(),
      "shape": records[0].shape,
      "responses": int(tokenised.dataset.responses.shape[1]),
      "prompts": len({record.prompt for record in records}),
      "counts": {name: len(dataset) for name, dataset in splits.items()},
      "demonstrations": {name: len(dataset) for name, dataset in demonstrations.items()},
      "unusable": sum(problem.severity == "error" for problem in left_out),
      "left_out": [str(problem) for problem in left_out],
      "warnings": dict(Counter(problem.code for problem in warnings)),
      "prompt_length": self.prompt_length,
      "response_length": self.response_length,
      "truncation": {"policy": self.truncation, **tokenised.counts},
      "lengths": {
        "prompt": histogram(tokenised.prompt_tokens),
        "chosen": histogram(lengths[:, 0]),
        "rejected": histogram(rejected[rejected > 0]),
      },
      "longer_wins": longer_wins(lengths[:, 0], others),
    }


def first_responses(dataset: Dataset) -> Dataset:
  """The preferred responses alone, N = 1 and without labels: what SFT trains on."""
  return dataset.replace(
    responses=dataset.responses[:, :1],
    response_length=dataset.response_length[:, :1],
    response_mask=dataset.response_mask[:, :1],
    **dict.fromkeys(LABELS),
  )


def histogram(lengths: np.ndarray) -> dict[str, list[int]]:
  """At most 20 bins of whole tokens; the last one ends above the greatest length."""
  top = int(lengths.max(initial=0)) + 1
  width = max(1, -(-top // BINS))
  edges = np.arange(0, top + width, width)
  counts, _ = np.histogram(lengths, edges)
  return {"edges": edges.tolist(), "counts": counts.tolist()}
