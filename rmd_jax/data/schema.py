"""The record: what a line of preference data may hold, checked field by field.

Accepted shapes (one a source):

  pair         {prompt, chosen, rejected}, or {chosen, rejected} that share a prompt
  preference   {prompt, responses: [a, b], preference}
  ranks        {prompt, responses: [...], ranks: [...]}       lower is better, no ties
  ratings      {prompt, responses: [...], ratings: [...]}     higher is better; also named `scores`

A text may be a list of messages [{role, content}]. Optional: `preference` (the probability that the
first, or chosen, response wins), `id`, `weight`. A demonstration is {prompt, response}.
"""

import dataclasses
import hashlib
import math
import numbers
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from rmd_jax.data import text as dialogue
from rmd_jax.data.text import FieldError, check_messages, check_text, excerpt

LABELS = ("ranks", "ratings", "scores")
KNOWN_FIELDS = frozenset(
  ("prompt", "chosen", "rejected", "responses", "preference", "id", "weight", *LABELS)
)
DEMONSTRATION_FIELDS = frozenset(("prompt", "response", "id", "weight"))
SHAPES = "{prompt, chosen, rejected}, {chosen, rejected} or {prompt, responses, ranks | ratings}"


class Location(NamedTuple):
  """Where a record came from: a file and its line (a row, in Parquet), counted from 1."""

  file: str
  line: int


@dataclasses.dataclass(frozen=True)
class Problem:
  """One line about one record or, where `whole`, about a file.

  Attributes:
    file: the source's name for people.
    line: counted from 1.
    field: the record's field, or "file" or "record".
    what: what is wrong, and what to do.
    severity: an "error" makes the record unusable; a "warning" leaves it in.
    whole: the error spoils the file, so that no fraction of bad records tolerates it.
    code: a short name by which problems are counted.
  """

  file: str
  line: int
  field: str
  what: str
  severity: str = "error"
  whole: bool = False
  code: str = ""

  @classmethod
  def at(cls, location: Location, field: str, what: str, **rest: Any) -> "Problem":
    """A problem of the record at `location`."""
    return cls(location.file, location.line, field, what, **rest)

  def __str__(self) -> str:
    warning = "warning: " if self.severity == "warning" else ""
    line = f"{self.file}:{self.line}: {self.field}: {warning}{self.what}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
  """One prompt and its responses, the best first.

  Attributes:
    id: the record's own, or a hash of its texts.
    prompt: text that every response continues.
    responses: N texts; for pairs the preferred one first, for ranks and ratings in order, the best
      first (equal ratings keep the file's order).
    shape: pair, preference, ranks, ratings or demonstration.
    messages: True where the responses came as messages.
    preference: the probability that `responses[0]` wins, where the record states one.
    ranks: 0 is best.
    ratings: higher is better.
    weight: at least 0.
    file: the source's name for people.
    line: counted from 1.
  """

  id: str
  prompt: str
  responses: tuple[str, ...]
  shape: str
  messages: bool
  preference: float | None
  ranks: tuple[int, ...] | None
  ratings: tuple[float, ...] | None
  weight: float
  file: str
  line: int

  @property
  def content(self) -> bytes:
    """A 16-byte hash of the texts, the same for the same prompt and responses."""
    return content_hash(self.prompt, self.responses)


def content_hash(prompt: str, responses: tuple[str, ...]) -> bytes:
  """A 16-byte hash of prompt and responses in which no text can pass for two."""
  digest = hashlib.sha256()
  for part in (prompt, *responses):
    data = part.encode("utf-8")
    digest.update(b"%d:" % len(data))
    digest.update(data)
  return digest.digest()[:16]


def number(field: str, value: Any) -> float:
  """A finite number, never one written as a string.

  Raises:
    FieldError: null, a string, a truth value, NaN or an infinity.
  """
  if value is None:
    raise FieldError(field, "is null; give a number, or leave the field out")
  if isinstance(value, str):
    raise FieldError(field, f"is the string {excerpt(value)}; write the number without quotes")
  if isinstance(value, bool) or not isinstance(value, numbers.Real):
    raise FieldError(field, f"is {type(value).__name__} {excerpt(value)}; give a number")
  try:
    converted = float(value)
  except OverflowError:
    converted = math.inf
  if not math.isfinite(converted):
    raise FieldError(field, f"is {excerpt(value)}; give a finite number")
  return converted


def parse(
  raw: Mapping[str, Any], location: Location, *, demonstration: bool = False
) -> tuple[Record, list[Problem]]:
  """Checks one raw record.

  Args:
    raw: the record as read.
    location: for messages.
    demonstration: expect {prompt, response}.

  Returns:
    The record, and warnings about it.

  Raises:
    FieldError: it is unusable.
  """
  fields, values = _response_fields(raw, demonstration)
  shape = "demonstration" if demonstration else _shape(raw, fields)
  prompt, texts, messages = _texts(raw, fields, values)
  warnings = _check_responses(prompt, texts, fields, location)
  preference, ranks, ratings = _labels(raw, shape, len(texts))
  order = list(range(len(texts)))
  if shape == "preference" and preference is not None and preference < 0.5:
    preference, order = 1.0 - preference, [1, 0]
  elif ranks is not None:
    order.sort(key=ranks.__getitem__)
    ranks = tuple(range(len(order)))
  elif ratings is not None:
    given = ratings
    order.sort(key=lambda j: -given[j])
    ratings = tuple(ratings[j] for j in order)
    if len(set(ratings)) == 1:
      what = "are all equal, which prefers no response"
      warnings.append(_warning(location, "ratings", what, "equal ratings"))
  responses = tuple(texts[j] for j in order)
  weight = 1.0
  if "weight" in raw:
    weight = number("weight", raw["weight"])
    if weight < 0:
      raise FieldError("weight", f"is {weight:g}; give a number of at least 0")
  identity = _identity(raw) or content_hash(prompt, responses).hex()[:16]
  record = Record(
    identity, prompt, responses, shape, messages, preference, ranks, ratings, weight, *location
  )
  return record, warnings


def _warning(location: Location, field: str, what: str, code: str) -> Problem:
  return Problem.at(location, field, what, severity="warning", code=code)


def _response_fields(raw: Mapping[str, Any], demonstration: bool) -> tuple[list[str], list[Any]]:
  if demonstration:
    if "response" not in raw or "prompt" not in raw:
      missing = "response" if "response" not in raw else "prompt"
      raise FieldError(missing, "is missing; a demonstration is {prompt, response}")
    return ["response"], [raw["response"]]
  pair = [name for name in ("chosen", "rejected") if name in raw]
  if pair and "responses" in raw:
    raise FieldError("responses", f"stands beside {pair[0]}; give one of the shapes {SHAPES}")
  if pair:
    if len(pair) == 1:
      missing = "rejected" if pair == ["chosen"] else "chosen"
      raise FieldError(missing, f"is missing beside {pair[0]}; add it")
    return pair, [raw["chosen"], raw["rejected"]]
  if "responses" not in raw:
    names = ", ".join(excerpt(name) for name in list(raw)[:8]) or "none"
    raise FieldError("record", f"has no known shape (fields: {names}); give {SHAPES}")
  responses = raw["responses"]
  if not isinstance(responses, (list, tuple)):
    kind = "null" if responses is None else type(responses).__name__
    raise FieldError("responses", f"is {kind}; give a list of at least two")
  if len(responses) < 2:
    raise FieldError("responses", f"holds {len(responses)}; give at least two")
  if "prompt" not in raw:
    raise FieldError("prompt", "is missing beside responses; add it")
  return [f"responses[{j}]" for j in range(len(responses))], list(responses)


def _shape(raw: Mapping[str, Any], fields: list[str]) -> str:
  labels = [name for name in LABELS if name in raw]
  if "chosen" in raw:
    if labels:
      raise FieldError(labels[0], "stands beside chosen and rejected; give it with responses")
    return "pair"
  if "preference" in raw:
    labels.insert(0, "preference")
  if not labels:
    raise FieldError("ranks", "is missing; give ranks, ratings or scores, or preference for two")
  if len(labels) > 1:
    raise FieldError(labels[1], f"stands beside {labels[0]}; give one of them")
  if labels == ["preference"] and len(fields) != 2:
    raise FieldError(
      "preference", f"is for two responses, not {len(fields)}; give ranks or ratings"
    )
  return "ratings" if labels[0] == "scores" else labels[0]


def _texts(
  raw: Mapping[str, Any], fields: list[str], values: list[Any]
) -> tuple[str, list[str], bool]:
  """Prompt, responses, and whether these came as messages."""
  as_messages = [isinstance(value, (list, tuple)) for value in values]
  if len(set(as_messages)) > 1:
    odd = next(j for j, kind in enumerate(as_messages) if kind != as_messages[0])
    kinds = ["null" if v is None else type(v).__name__ for v in (values[odd], values[0])]
    raise FieldError(
      fields[odd], f"is {kinds[0]}, but {fields[0]} is {kinds[1]}; give both as the same type"
    )
  given = "prompt" in raw
  prompt: Any = raw.get("prompt")
  prompt_messages = None
  if given and isinstance(prompt, (list, tuple)):
    prompt_messages = check_messages("prompt", prompt)
    if prompt_messages[-1][0] == "assistant":
      raise FieldError("prompt", "ends with the assistant's turn; end it with another's")
  elif given:
    prompt = check_text("prompt", prompt)
  if as_messages[0]:
    lists = [check_messages(field, value) for field, value in zip(fields, values, strict=True)]
    if given:
      lead = prompt if prompt_messages is None else prompt_messages
      lists = dialogue.join_prompt(lead, fields, lists)
    return (*dialogue.split_messages(fields, lists), True)
  texts = [check_text(field, value) for field, value in zip(fields, values, strict=True)]
  for field, value in zip(fields, texts, strict=True):
    if not value:
      raise FieldError(field, "is empty; give a response, or remove the record")
  if prompt_messages is not None:
    lead = dialogue.render(prompt_messages) + dialogue.ASSISTANT_TURN
    return lead, [" " + value for value in texts], False
  if given:
    return (*dialogue.join_text(prompt, fields, texts), False)
  start, chosen, rejected = dialogue.split_dialogues(texts[0], texts[1])
  return start, [chosen, rejected], False


def _check_responses(
  prompt: str, responses: list[str], fields: list[str], location: Location
) -> list[Problem]:
  """Warnings; an empty response raises.

  The one space after "Assistant:" belongs to the template, so a response of that alone is empty.
  Any other response of white space only is blank: a reader may want it (a model that should say
  nothing), so it stays, with a warning.
  """
  warnings = []
  after_turn = prompt.endswith(dialogue.ASSISTANT_TURN)
  for field, response in zip(fields, responses, strict=True):
    said = response[1:] if after_turn and response.startswith(" ") else response
    if not said:
      raise FieldError(field, "is empty; give a response, or remove the record")
    if not response.strip():
      what = "is blank (white space only); is it meant?"
      warnings.append(_warning(location, field, what, "blank response"))
    elif prompt.strip() and response.startswith(prompt):
      what = (
        "begins with the whole prompt, which then counts as part of the response; remove it there"
      )
      warnings.append(_warning(location, field, what, "prompt repeated"))
    if after_turn and dialogue.HUMAN_TURN in response:
      what = "goes on to a further turn of the human, whose tokens then count as the response's"
      warnings.append(_warning(location, field, what, "further turn"))
  if not prompt.strip():
    what = "is blank, so the responses stand alone; is it meant?"
    warnings.append(_warning(location, "prompt", what, "blank prompt"))
  first: dict[str, int] = {}
  for j, response in enumerate(responses):
    if response in first:
      what = f"is identical to {fields[first[response]]}, so nothing can be learnt from the two"
      warnings.append(_warning(location, fields[j], what, "identical responses"))
      break
    first[response] = j
  return warnings


def _labels(
  raw: Mapping[str, Any], shape: str, count: int
) -> tuple[float | None, tuple[int, ...] | None, tuple[float, ...] | None]:
  preference = None
  if "preference" in raw and shape in ("pair", "preference"):
    preference = number("preference", raw["preference"])
    if not 0 <= preference <= 1:
      raise FieldError(
        "preference", f"is {preference:g}; give the probability that the first wins, in [0, 1]"
      )
  if shape not in ("ranks", "ratings"):
    return preference, None, None
  name = next(label for label in LABELS if label in raw)
  values = raw[name]
  if not isinstance(values, (list, tuple)):
    raise FieldError(name, f"is {excerpt(values)}; give a list of {count} numbers")
  if len(values) != count:
    raise FieldError(name, f"holds {len(values)} numbers for {count} responses; give one for each")
  numbers_ = [number(f"{name}[{j}]", value) for j, value in enumerate(values)]
  if shape == "ratings":
    return None, None, tuple(numbers_)
  for j, value in enumerate(numbers_):
    if value != int(value):
      raise FieldError(f"ranks[{j}]", f"is {value:g}; give whole numbers, the lowest for the best")
  if len(set(numbers_)) < count:
    raise FieldError("ranks", f"{excerpt(values)} has ties; give distinct ranks, or ratings")
  return None, tuple(int(value) for value in numbers_), None


def _identity(raw: Mapping[str, Any]) -> str | None:
  if "id" not in raw:
    return None
  value = raw["id"]
  if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
    return str(int(value))
  if isinstance(value, str) and value:
    return check_text("id", value)
  raise FieldError("id", f"is {excerpt(value)}; give text or a whole number, or leave it out")
