"""Dialogues as text: the built-in message template, and where a prompt ends.

One template serves both forms that preference data come in. Anthropic's HH dialogues are written
in it already, and message lists are rendered into it, so that the same dialogue gives the same
text whichever way it was stored:

  "\\n\\nHuman: Hello\\n\\nAssistant: Hi there"

A prompt ends with the opened turn, "\\n\\nAssistant:", and a response starts with the space that
follows; prompt + response is the dialogue, character by character.
"""

from collections.abc import Mapping, Sequence
from typing import Any

ROLES = {"system": "System", "user": "Human", "assistant": "Assistant", "tool": "Tool"}
HUMAN_TURN = "\n\nHuman:"
ASSISTANT_TURN = "\n\nAssistant:"


class FieldError(ValueError):
  """A record's field cannot be used; `readers` and `validate` add the file and the line."""

  def __init__(self, field: str, what: str):
    super().__init__(f"{field}: {what}")
    self.field = field
    self.what = what


def excerpt(value: Any, limit: int = 40) -> str:
  """A value in one short, printable line, for a message."""
  text = ascii(value) if isinstance(value, bytes) else repr(value)
  text = text.encode("ascii", "backslashreplace").decode() if not text.isprintable() else text
  return text if len(text) <= limit else text[: limit - 3] + "..."


def check_text(field: str, value: Any) -> str:
  """`value` as a str that UTF-8 can hold.

  Raises:
    FieldError: null, another type, or lone surrogates.
  """
  if value is None:
    raise FieldError(field, "is null; give text")
  if not isinstance(value, str):
    raise FieldError(field, f"is {type(value).__name__} {excerpt(value)}; give text")
  try:
    value.encode("utf-8")
  except UnicodeEncodeError as error:
    raise FieldError(
      field,
      f"holds a lone surrogate at character {error.start}, which is no text; write the whole "
      "character, or remove it",
    ) from None
  return value


def check_messages(field: str, value: Any) -> list[tuple[str, str]]:
  """`[{role, content}, ...]` as (role, content) pairs.

  Raises:
    FieldError: an empty list, an unknown role, content that is no text.
  """
  if not value:
    raise FieldError(field, "is an empty list; give messages [{role, content}, ...]")
  messages = []
  for number, message in enumerate(value):
    where = f"{field}[{number}]"
    if not isinstance(message, Mapping):
      raise FieldError(where, f"is {excerpt(message)}; give a message {{role, content}}")
    for key in ("role", "content"):
      if key not in message:
        raise FieldError(where, f"has no {key}; give a message {{role, content}}")
    role = message["role"]
    if not isinstance(role, str) or role not in ROLES:
      raise FieldError(f"{where}.role", f"is {excerpt(role)}; give one of {', '.join(ROLES)}")
    messages.append((role, check_text(f"{where}.content", message["content"])))
  return messages


def unknown_message_fields(value: Any) -> set[str]:
  """Fields of the messages that the template leaves out, those that are null excepted."""
  known = ("role", "content")
  return {
    str(key)
    for message in value
    if isinstance(message, Mapping)
    for key, content in message.items()
    if key not in known and content is not None
  }


def render(messages: Sequence[tuple[str, str]]) -> str:
  """Messages in the template.

  >>> render([("user", "Hello"), ("assistant", "Hi")])
  '\\n\\nHuman: Hello\\n\\nAssistant: Hi'
  """
  return "".join(f"\n\n{ROLES[role]}: {content}" for role, content in messages)


def split_dialogues(chosen: str, rejected: str) -> tuple[str, str, str]:
  """Splits two dialogues at the last opened assistant's turn that both share.

  The longest common prefix would end inside the responses wherever these begin alike, so the split
  is at a turn: the last "\\n\\nAssistant:" up to which both are equal.

  Returns:
    prompt (it ends with "\\n\\nAssistant:"), chosen response, rejected response.

  Raises:
    FieldError: they share no such turn.
  """
  start = -1
  at = chosen.find(ASSISTANT_TURN)
  while at >= 0 and rejected.startswith(ASSISTANT_TURN, at):
    end = at + len(ASSISTANT_TURN)
    if chosen[max(start, 0) : end] != rejected[max(start, 0) : end]:
      break
    start = at
    at = chosen.find(ASSISTANT_TURN, end)
  if start < 0:
    raise FieldError(
      "chosen",
      r"shares no '\n\nAssistant:' turn with rejected, so the prompt is not known; "
      "add a prompt field, or begin both with the same dialogue",
    )
  if start == 0:
    raise FieldError("chosen", "begins with the assistant's turn; add a prompt field")
  end = start + len(ASSISTANT_TURN)
  return chosen[:end], chosen[end:], rejected[end:]


def split_messages(
  fields: Sequence[str], lists: Sequence[Sequence[tuple[str, str]]]
) -> tuple[str, list[str]]:
  """Splits N message lists at the last assistant's turn that all share; renders the parts.

  Returns:
    prompt, responses.

  Raises:
    FieldError: a list does not end with the assistant's turn, or they share no prompt.
  """
  for field, messages in zip(fields, lists, strict=True):
    if messages[-1][0] != "assistant":
      raise FieldError(field, f"ends with the turn of {messages[-1][0]}; end with the assistant's")
  shortest = min(len(messages) for messages in lists)
  first = lists[0]
  shared = 0
  while shared < shortest and all(messages[shared] == first[shared] for messages in lists):
    shared += 1
  split = min(shared, shortest - 1)
  while split > 0 and any(messages[split][0] != "assistant" for messages in lists):
    split -= 1
  if split == 0:
    raise FieldError(
      fields[0],
      "shares no turn before the assistant's with the other responses, so the prompt is not "
      "known; add a prompt field, or begin all with the same messages",
    )
  prompt = render(first[:split]) + ASSISTANT_TURN
  return prompt, [render(messages[split:])[len(ASSISTANT_TURN) :] for messages in lists]


def join_prompt(
  prompt: Any, fields: Sequence[str], lists: Sequence[Sequence[tuple[str, str]]]
) -> list[list[tuple[str, str]]]:
  """Message lists with the prompt in front, where they do not have it yet.

  A string prompt is the user's turn. Lists that begin with turns of the prompt must begin with all
  of it.

  Raises:
    FieldError: the prompt is no prefix of a list that begins with other turns than the
      assistant's.
  """
  joined = []
  for field, messages in zip(fields, lists, strict=True):
    messages = list(messages)
    if isinstance(prompt, str):
      system = 0
      while system < len(messages) and messages[system][0] == "system":
        system += 1
      turn = ("user", prompt)
      if system == len(messages) or messages[system][0] == "assistant":
        messages.insert(system, turn)
      elif messages[system] != turn:
        raise FieldError(
          "prompt",
          f"{excerpt(prompt)} is not the first turn of {field}, {excerpt(messages[system][1])}; "
          "make them equal, or remove the prompt",
        )
    elif messages[0][0] == "assistant":
      messages = list(prompt) + messages
    elif messages[: len(prompt)] != list(prompt):
      raise FieldError(
        "prompt", f"is no prefix of {field}; make it one, or begin {field} after the prompt"
      )
    joined.append(messages)
  return joined


def join_text(prompt: str, fields: Sequence[str], texts: Sequence[str]) -> tuple[str, list[str]]:
  """A prompt and texts that continue it, or that are whole dialogues beginning with it.

  Text beside a prompt is its continuation as it stands, unless it begins with "\\n\\nHuman:": then
  it is a dialogue and must begin with the prompt.

  Raises:
    FieldError: a dialogue that does not begin with the prompt, or one beside a text that is none.
  """
  dialogues = [text.startswith(HUMAN_TURN) for text in texts]
  if not any(dialogues):
    return prompt, list(texts)
  for field, text, dialogue in zip(fields, texts, dialogues, strict=True):
    if not dialogue:
      raise FieldError(field, "is no dialogue, but the other response is; give both alike")
    if not text.startswith(prompt):
      raise FieldError(
        "prompt",
        f"is no prefix of the dialogue in {field}; make it one, or give the response alone",
      )
  rest = [text[len(prompt) :] for text in texts]
  if all(text.startswith(ASSISTANT_TURN) for text in rest):
    prompt += ASSISTANT_TURN
    rest = [text[len(ASSISTANT_TURN) :] for text in rest]
  return prompt, rest
