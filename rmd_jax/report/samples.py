"""Sample texts side by side: the same prompts under every objective."""

from collections.abc import Mapping
from typing import Any

from rmd_jax.report.markup import colours, escape
from rmd_jax.report.run_data import RunData, SeedRun, label
from rmd_jax.report.tables import number

_PROMPTS = 6  # shown
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
  intro = (
    f"<p>The first {min(_PROMPTS, len(shared))} prompts of the file, not picked, from "
    f"{escape(seed.name)}; scores by {escape(run.judge)}.</p>"
  )
  return intro + "".join(
    _prompt(index + 1, prompt, {n: found[prompt] for n, found in answers.items()}, run, seed)
    for index, prompt in enumerate(shared[:_PROMPTS])
  )


def _by_prompt(records: tuple[Record, ...]) -> dict[str, Record]:
  found: dict[str, Record] = {}
  for record in records:
    found.setdefault(str(record.get("prompt", "")), record)  # several samples: the first
  return found


def _prompt(
  index: int, prompt: str, answers: Mapping[str, Record], run: RunData, seed: SeedRun
) -> str:
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
  if isinstance(reward, int | float):
    facts.append(f"score {number(float(reward))}")
    if isinstance(over, int | float):
      facts.append(f"{number(float(reward) - float(over), 'signed')} over the reference")
  if isinstance(length, int | float):
    facts.append(f"{length:g} tokens")
  score = f'<p class="score">{escape(" · ".join(facts))}</p>' if facts else ""
  return (
    f'<article class="text-card" style="{style}"><h4>{escape(title)}</h4>{score}'
    f'<p class="words" dir="auto" tabindex="0">{_text(text)}</p></article>'
  )


def _text(value: Any) -> str:
  if not isinstance(value, str):
    return "<em>no text</em>"
  if not value.strip():
    return "<em>an empty text</em>"
  if len(value) <= _SHOWN:
    return escape(value)
  return f"{escape(value[:_SHOWN])}… <em>({len(value) - _SHOWN:,} more characters)</em>"
