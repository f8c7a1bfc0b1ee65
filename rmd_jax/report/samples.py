"""Sample texts side by side: the same prompts under every objective."""

from collections.abc import Mapping
from typing import Any

from rmd_jax.report.markup import colours, details, escape
from rmd_jax.report.run_data import RunData, judge_of, label
from rmd_jax.report.tables import number

_OPEN, _MORE = 3, 5  # prompts that are shown, and that open on a click
_SHOWN = 3000  # characters of a text; a page must open whatever a policy has written

Record = Mapping[str, Any]


def samples(run: RunData) -> str:
  """The first prompts that every objective answered, with all answers and their scores."""
  seed = next((s for s in run.seeds if any(e.samples for e in s.evaluations.values())), None)
  if seed is None:
    return '<p class="absent">No evaluation has a samples.jsonl.</p>'
  answers = {n: _by_prompt(e.samples) for n, e in seed.evaluations.items() if e.samples}
  shared = [
    p for p in next(iter(answers.values())) if all(p in found for found in answers.values())
  ]
  if not shared:
    return '<p class="absent">The objectives have no prompt in common in samples.jsonl.</p>'
  shown = shared[: _OPEN + _MORE]
  blocks = [
    _prompt(index + 1, prompt, {n: found[prompt] for n, found in answers.items()}, run)
    for index, prompt in enumerate(shown)
  ]
  intro = (
    f"<p>The first {len(shown)} prompts of the file, not picked, from {escape(seed.name)}. Scores "
    f"by {escape(judge_of(run))}; in brackets, the score less the reference's.</p>"
  )
  more = details(f"{len(blocks) - _OPEN} more prompts", "".join(blocks[_OPEN:]))
  return intro + "".join(blocks[:_OPEN]) + (more if len(blocks) > _OPEN else "")


def _by_prompt(records: tuple[Record, ...]) -> dict[str, Record]:
  found: dict[str, Record] = {}
  for record in records:
    found.setdefault(str(record.get("prompt", "")), record)  # several samples: the first
  return found


def _prompt(index: int, prompt: str, answers: Mapping[str, Record], run: RunData) -> str:
  first = next(iter(answers.values()))
  cards = [
    _card(
      "Reference (SFT)",
      "--light: #8a97a6; --dark: #6b7a8c",
      first.get("reference"),
      first.get("reward_reference"),
      first.get("length_reference"),
    )
  ]
  for name in run.objectives:
    if name in answers:
      record = answers[name]
      cards.append(
        _card(
          label(name),
          colours(name, run.objectives),
          record.get("policy"),
          record.get("reward_policy"),
          record.get("length_policy"),
          over=record.get("reward_reference"),
        )
      )
  if isinstance(first.get("chosen"), str):
    cards.append(
      _card(
        "Preferred in the data", "--light: #8a97a6; --dark: #6b7a8c", first["chosen"], None, None
      )
    )
  return (
    f'<div class="sample"><h3>Prompt {index}</h3>'
    f'<p class="words prompt" dir="auto" tabindex="0">{_text(prompt)}</p>'
    f'<div class="texts">{"".join(cards)}</div></div>'
  )


def _card(title: str, style: str, text: Any, reward: Any, length: Any, *, over: Any = None) -> str:
  facts = []
  if _is_number(reward):
    gain = f" ({number(float(reward) - float(over), 'signed')})" if _is_number(over) else ""
    facts.append(f"score {number(float(reward))}{gain}")
  if _is_number(length):
    facts.append(f"{length:g} tokens")
  score = f'<p class="score">{escape(" · ".join(facts))}</p>' if facts else ""
  return (
    f'<article class="text-card" style="{style}"><h4>{escape(title)}</h4>{score}'
    f'<p class="words" dir="auto" tabindex="0">{_text(text)}</p></article>'
  )


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float)


def _text(value: Any) -> str:
  if not isinstance(value, str):
    return "<em>no text</em>"
  if not value.strip():
    return "<em>an empty text</em>"
  if len(value) <= _SHOWN:
    return escape(value)
  return f"{escape(value[:_SHOWN])}… <em>({len(value) - _SHOWN:,} more characters)</em>"
