"""What the numbers say, in sentences that follow from them whichever way they go."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from rmd_jax.evaluation.statistics import Interval
from rmd_jax.report.run_data import RunData, judge_of, label
from rmd_jax.report.tables import (
  METRICS,
  Comparison,
  baseline_of,
  compare,
  number,
  with_interval,
)

_NOTABLE_CORRELATION = 0.9
_OUTRUN = 1.25  # an implicit p95 within a quarter of the rewards' is called in step with them
_NOTABLE_LENGTH = 0.1  # METHOD's "longer": at least 10 % more tokens


class Finding(NamedTuple):
  """A topic of one or two words, and what the numbers say about it in plain text."""

  topic: str
  text: str


def reading(run: RunData) -> list[Finding]:
  """What the page opens with; topics of which the run holds no numbers are left out."""
  findings = [
    Finding("Advantage", _advantage(run)),
    Finding("Prompt by prompt", _paired(run)),
    Finding("Probabilities", _probabilities(run)),
    Finding("Margins", f"{_margins(run)} {_correlations(run)}".strip()),
    Finding("Length", _lengths(run)),
    Finding("Caveats", _caveats(run)),
  ]
  return [finding for finding in findings if finding.text]


def _advantage(run: RunData) -> str:
  values = _column(run, "advantage")
  if not values:
    return "No objective has been evaluated yet, so there is no advantage to compare."
  ranked = sorted(values, key=lambda name: -values[name].mean)
  best = ranked[0]
  verb = "has the highest mean advantage" if len(ranked) > 1 else "has a mean advantage"
  text = (
    f"Scored by {judge_of(run)}, {label(best)} {verb} over the reference, "
    f"{with_interval(values[best], 'signed')}."
  )
  known = [n for n in ranked if not math.isnan(values[n].low)]
  if not known:
    return text
  ahead = [n for n in known if values[n].low > 0]
  behind = [n for n in known if values[n].high < 0]
  neither = [n for n in known if n not in ahead and n not in behind]
  parts = []
  if ahead:
    parts.append(f"{_names(ahead)} {_are(ahead)} better than the reference")
  if behind:
    parts.append(f"{_names(behind)} {_are(behind)} worse than the reference")
  if neither:
    parts.append(f"{_names(neither)} cannot be told from the reference")
  return f"{text} By the 95 % intervals, {'; '.join(parts)}."


def _paired(run: RunData) -> str:
  baseline = baseline_of(run)
  if baseline is None:
    return ""
  found = [compare(run, name, baseline) for name in run.objectives if name != baseline]
  known = [c for c in found if c is not None and not math.isnan(c.difference.low)]
  if not known:
    return ""
  better = [c for c in known if c.difference.low > 0]
  worse = [c for c in known if c.difference.high < 0]
  level = [c for c in known if c not in better and c not in worse]
  parts = []
  if better:
    parts.append(f"{_differences(better)} {_are(better, 'scores', 'score')} higher")
  if worse:
    parts.append(f"{_differences(worse)} {_are(worse, 'scores', 'score')} lower")
  if level:
    parts.append(f"no difference can be shown for {_differences(level)}")
  return f"Against {label(baseline)} on the same prompts, {'; '.join(parts)}."


def _differences(group: list[Comparison]) -> str:
  ordered = sorted(group, key=lambda c: -c.difference.mean)
  return _join([f"{label(c.objective)} ({number(c.difference.mean, 'signed')})" for c in ordered])


def _probabilities(run: RunData) -> str:
  chosen, rejected = _column(run, "chosen"), _column(run, "rejected")
  name = "dpo" if "dpo" in chosen else next(iter(chosen), None)
  if name is None:
    return ""
  value = chosen[name]
  way = _direction(value)
  text = f"{label(name)} {way} the log-probability of held-out preferred responses "
  text += f"({with_interval(value, 'signed')} nats against the reference)"
  if name in rejected:
    other = rejected[name]
    if value.mean < 0 and other.mean < 0:
      text += (
        f" and that of dispreferred ones ({number(other.mean, 'signed')}): what both lost went to "
        "other responses"
      )
    else:
      text += f"; dispreferred ones changed by {number(other.mean, 'signed')}"
  others = [n for n in chosen if n != name]
  if others:
    listed = [f"{label(n)} {number(chosen[n].mean, 'signed')}" for n in others]
    text += f". The others: {_join(listed)}"
  return text + "."


def _direction(value: Interval) -> str:
  if value.high < 0:
    return "lowered"
  if value.low > 0:
    return "raised"
  if math.isnan(value.low):
    return "lowered" if value.mean < 0 else "raised"
  return "did not measurably change"


def _margins(run: RunData) -> str:
  implicit, rewards = _column(run, "margin_p95"), _column(run, "reward_p95")
  ratios = {
    name: implicit[name].mean / rewards[name].mean
    for name in implicit
    if name in rewards and rewards[name].mean > 0
  }
  parts = []
  for name in ("dpo", "distill", "ensemble"):
    if name in ratios:
      parts.append(
        f"{label(name)}'s are {_outran(ratios[name])} ({number(implicit[name].mean)} against "
        f"{number(rewards[name].mean)}, {number(ratios[name])} times)"
      )
  if not parts and ratios:
    name = max(ratios, key=lambda n: ratios[n])
    parts.append(f"{label(name)}'s are {_outran(ratios[name])} ({number(ratios[name])} times)")
  return f"Implicit margins at the 95th percentile: {'; '.join(parts)}." if parts else ""


def _outran(ratio: float) -> str:
  if ratio > _OUTRUN:
    return "ahead of the reward model's"
  return "short of the reward model's" if ratio < 1 / _OUTRUN else "in step with the reward model's"


def _correlations(run: RunData) -> str:
  values = _column(run, "margin_correlation")
  if "distill" not in values:
    return ""
  value = values["distill"].mean
  if value >= _NOTABLE_CORRELATION:
    verdict = "track"
  else:
    verdict = "follow only in part" if value > 0.3 else "hardly follow"
  text = f"d-DPO's implicit margins {verdict} the reward margins (correlation {number(value)}"
  return text + (f"; DPO's: {number(values['dpo'].mean)})." if "dpo" in values else ").")


def _lengths(run: RunData) -> str:
  lengths, reference = _column(run, "length"), _column(run, "length_reference")
  changes = {
    n: lengths[n].mean / reference[n].mean - 1
    for n in lengths
    if n in reference and reference[n].mean > 0
  }
  if not changes:
    return ""
  far = {n: c for n, c in changes.items() if abs(c) >= _NOTABLE_LENGTH}
  if not far:
    return "All policies write responses within 10 % of the reference's length."
  listed = [f"{label(n)} {_percent(c)}" for n, c in far.items()]
  return f"Mean length differs from the reference's by 10 % or more for {_join(listed)}."


def _percent(change: float) -> str:
  return f"{'+' if change > 0 else '−'}{abs(100 * change):.0f} %"


def _caveats(run: RunData) -> str:
  seeds = len(run.seeds)
  text = (
    "One seed only: intervals resample prompts and say nothing of another training run."
    if seeds == 1
    else f"Numbers are means over {seeds} seeds; intervals resample seeds and prompts."
  )
  guessed = [
    name
    for name in run.objectives
    if any(
      (e.values.get("win_rate_length_controlled") or {}).get("extrapolates") is True
      for e in run.evaluations(name)
    )
  ]
  if guessed:
    text += (
      f" The length-controlled win rate of {_names(guessed)} is extrapolated: nearly all of its "
      "samples lie on one side of the reference's length."
      if len(guessed) == 1
      else f" The length-controlled win rates of {_names(guessed)} are extrapolated: nearly all "
      "of their samples lie on one side of the reference's length."
    )
  return text


def _column(run: RunData, metric: str) -> dict[str, Interval]:
  values = {name: METRICS[metric].over_seeds(run, name) for name in run.objectives}
  return {name: value for name, value in values.items() if value is not None}


def _names(objectives: list[str]) -> str:
  return _join([label(name) for name in objectives])


def _join(items: list[str]) -> str:
  return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def _are(items: Sequence[object], one: str = "is", many: str = "are") -> str:
  return one if len(items) == 1 else many
