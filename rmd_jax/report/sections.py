"""The sections of the page, from the numbers to what made them."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from rmd_jax.evaluation.statistics import Interval
from rmd_jax.report import findings
from rmd_jax.report.markup import (
  cell,
  colours,
  details,
  escape,
  facts,
  figure,
  forest,
  objective_name,
  row_head,
  table,
)
from rmd_jax.report.plots import Plot
from rmd_jax.report.run_data import RunData, judge_of, label
from rmd_jax.report.samples import samples
from rmd_jax.report.tables import METRICS, Metric, baseline_of, compare, number

_HEADLINE = (
  "advantage",
  "win_rate",
  "win_rate_length_controlled",
  "chosen",
  "margin_p95",
  "kl_reverse",
  "length",
)
_FURTHER = (
  "rejected",
  "far_below",
  "reward_p95",
  "margin_correlation",
  "implicit_accuracy",
  "kl_forward",
  "length_reference",
  "finished",
)

Plots = Mapping[str, Plot]
Section = tuple[str, str, str]
"""Anchor, title and HTML."""


def sections(run: RunData, plots: Plots) -> list[Section]:
  """Every section in reading order."""
  return [
    ("results", "Results", results(run, plots)),
    ("probabilities", "Probabilities", probabilities(plots)),
    ("margins", "Margins", margins(plots)),
    ("ensemble", "Ensemble", ensemble(run, plots)),
    ("reward-models", "Reward models", reward_models(run, plots)),
    ("lengths", "Lengths", lengths(plots)),
    ("samples", "Samples", samples(run)),
    ("learning", "Learning curves", learning(plots)),
    ("data", "Data", data(run)),
    ("provenance", "Provenance", provenance(run)),
    *([("missing", "Missing", missing(run))] if run.missing else []),
  ]


def reading(run: RunData) -> str:
  """The opening paragraphs, generated from the numbers."""
  items = "".join(
    f"<dt>{escape(topic)}</dt><dd>{_unbroken(escape(text))}</dd>"
    for topic, text in findings.reading(run)
  )
  return (
    '<section class="reading" id="reading" aria-label="In words">'
    f"<h2>In words</h2><dl>{items}</dl></section>"
  )


def _unbroken(text: str) -> str:
  """Text whose lines do not break inside "e-DPO" or "95 %"."""
  return re.sub(r"(\d) %", "\\1\u00a0%", text).replace("-DPO", "\u2011DPO")


def results(run: RunData, plots: Plots) -> str:
  """The headline table, its figure, the paired comparison, further numbers and the single seeds."""
  parts = [
    _headline(run),
    figure(
      plots.get("outcome"),
      "Bars and lines: mean and 95 % interval"
      + ("; circles: single seeds." if len(run.seeds) > 1 else ".")
      + " Win rates are drawn from 50 %, where policy and reference are level.",
      absent="no objective has an evaluation.json with an advantage",
    ),
  ]
  parts.append(_paired(run))
  parts.append(
    figure(
      plots.get("frontier"),
      "Up is better; left is cheaper. Lines: 95 % intervals.",
      absent="no objective has both an advantage and a KL estimate",
    )
  )
  if run.objectives:
    further = _metric_table(run, _FURTHER, "Further numbers on held-out pairs and samples.")
    parts.append(details("Further numbers", further + _meanings((*_HEADLINE, *_FURTHER))))
  if len(run.seeds) > 1:
    parts.append(details("Single seeds", _single_seeds(run)))
  return "".join(parts)


def _headline(run: RunData) -> str:
  values = {n: METRICS["advantage"].over_seeds(run, n) for n in run.objectives}
  known = [v for v in values.values() if v is not None]
  if not known:
    return '<p class="absent">No objective has been evaluated in this run.</p>'
  ends = [x for v in known for x in v if math.isfinite(x)] + [0.0]
  low, high = min(ends), max(ends)
  best = max(known, key=lambda v: v.mean)
  rows = []
  for name in run.objectives:
    value = values[name]
    drawing = "" if value is None else forest(value, low, high, colours(name, run.objectives))
    row = [row_head(objective_name(name, run.objectives)), f"<td>{drawing}</td>"]
    for key in _HEADLINE:
      metric = METRICS[key]
      row.append(
        cell(
          metric.over_seeds(run, name),
          metric.style,
          best=key == "advantage" and value is best and len(known) > 1,
        )
      )
    rows.append(row)
  head = ["Objective", "<span aria-hidden='true'>against 0</span>"]
  head += [_title(METRICS[key]) for key in _HEADLINE]
  prompts = {
    n.get("n")
    for name in run.objectives
    for e in run.evaluations(name)
    if isinstance(n := e.values.get("advantage"), Mapping)
  }
  count = next((f" on {n} prompts" for n in prompts if len(prompts) == 1 and n), "")
  seeds = f", mean over {len(run.seeds)} seeds" if len(run.seeds) > 1 else ""
  caption = (
    f"Each policy against the SFT reference, scored by {escape(judge_of(run))}{count}{seeds}; "
    "ranges are 95 % bootstrap intervals."
  )
  return table("headline", head, rows, caption)


def _title(metric: Metric) -> str:
  return f'<span title="{escape(metric.meaning)}">{escape(metric.title)}</span>'


def _metric_table(run: RunData, names: Iterable[str], caption: str) -> str:
  metrics = [METRICS[name] for name in names]
  rows = [
    [
      row_head(objective_name(objective, run.objectives)),
      *(cell(m.over_seeds(run, objective), m.style) for m in metrics),
    ]
    for objective in run.objectives
  ]
  return table("further", ["Objective", *(_title(m) for m in metrics)], rows, caption)


def _meanings(names: Iterable[str]) -> str:
  return facts((METRICS[n].title, escape(METRICS[n].meaning)) for n in names)


def _single_seeds(run: RunData) -> str:
  metrics = [METRICS[name] for name in ("advantage", "win_rate", "chosen", "margin_p95")]
  rows = []
  for objective in run.objectives:
    for seed in run.seeds:
      if objective in seed.evaluations:
        found = [m.read(seed.evaluations[objective]) for m in metrics]
        rows.append(
          [
            row_head(objective_name(objective, run.objectives)),
            f"<td>{escape(seed.name)}</td>",
            *(cell(v, m.style) for v, m in zip(found, metrics, strict=True)),
          ]
        )
  heads = ["Objective", "Seed", *(_title(m) for m in metrics)]
  return table("seeds", heads, rows, "Intervals of a single seed resample its prompts only.")


def _paired(run: RunData) -> str:
  baseline = baseline_of(run)
  if baseline is None:
    return ""
  found = [compare(run, name, baseline) for name in run.objectives if name != baseline]
  comparisons = [c for c in found if c is not None]
  if not comparisons:
    return ""
  ends = [x for c in comparisons for x in c.difference if math.isfinite(x)] + [0.0]
  low, high = min(ends), max(ends)
  rows = [
    [
      row_head(objective_name(c.objective, run.objectives)),
      f"<td>{forest(c.difference, low, high, colours(c.objective, run.objectives))}</td>",
      cell(c.difference, "signed"),
      f'<td class="text">{_verdict(c.difference, label(baseline))}</td>',
      f"<td>{c.prompts}</td>",
    ]
    for c in comparisons
  ]
  caption = (
    f"Score of each objective's samples less that of {escape(label(baseline))}'s on the same "
    "prompts: what makes a prompt easy or hard cancels, so this is sharper than the table above."
  )
  heads = ["Objective", "<span aria-hidden='true'>against 0</span>", "Difference", "", "Prompts"]
  listing = table("paired", heads, rows, caption)
  return f"<h3>Prompt by prompt against {escape(label(baseline))}</h3>{listing}"


def _verdict(difference: Interval, baseline: str) -> str:
  if difference.low > 0:
    return f'<span class="good">better than {escape(baseline)}</span>'
  if difference.high < 0:
    return f'<span class="bad">worse than {escape(baseline)}</span>'
  return "no difference shown"


def probabilities(plots: Plots) -> str:
  """What alignment did to the log-probabilities of the data's responses."""
  return (
    "<p>A likelihood objective sees only the margin between two responses: it can widen it while "
    "<em>both</em> lose probability, to responses that no pair mentions. Distillation fixes the "
    "margin at what a reward model says.</p>"
    + figure(
      plots.get("drift"),
      "Mean log-ratio against the reference, summed over tokens; panels share their axes. Solid: "
      "preferred responses; dashed: dispreferred ones. On held-out pairs where they were evaluated "
      "during training, else on training batches.",
      absent="no alignment logged logp/chosen_minus_ref or logp/rejected_minus_ref",
    )
  )


def margins(plots: Plots) -> str:
  """Implicit margins against the reward model's."""
  return (
    figure(
      plots.get("margin_growth"),
      "The dotted horizontal line is the reward model's margin on held-out pairs, at which "
      "distillation aims.",
      absent="no alignment logged margin/implicit_p95 or margin/implicit_mean",
    )
    + figure(
      plots.get("margin_scatter"),
      "One dot a held-out pair; panels share their axes; dots outside are drawn at the edge. On "
      "the dashed line the implicit margin is that of the reward model trained on all the data. "
      "Where margins outgrow the rewards six times, the upright axis is logarithmic beyond them.",
      absent="no evaluation has a margins.npz with implicit and reward margins",
    )
    + figure(
      plots.get("margin_histogram"),
      "Filled: implicit margins of the policy; outline: the reward model's on the same pairs. "
      "Values outside are counted in the outermost bars.",
      absent="no evaluation has a margins.npz with implicit and reward margins",
    )
  )


def ensemble(run: RunData, plots: Plots) -> str:
  """The members that the objective used."""
  text = ""
  if len(run.seeds) > 1 and "ensemble" in plots:
    text = " Means over seeds; a member's subset differs from seed to seed."
  return figure(
    plots.get("ensemble"),
    "Left: the weight that each reward model had in the loss (smoothed over steps). Middle: how "
    "far the members' margins differ. Right: how far the implicit margins are from each member's."
    + text,
    absent="no objective logged select/member_i of more than one member",
  )


def reward_models(run: RunData, plots: Plots) -> str:
  """Quality of the reward models on held-out pairs."""
  report = next((s.reward for s in run.seeds if s.reward and s.reward.get("members")), None)
  shown = figure(
    plots.get("reward_models"),
    "Left: the models' confidence against how often they are right. Middle: accuracy by how many "
    "tokens the preferred response is longer: a slope is a length bias. Right: share of held-out "
    "pairs on which two models agree."
    + (" The first seed's models." if len(run.seeds) > 1 else ""),
    absent="no seed has an evaluate/reward.json",
  )
  if report is None:
    return shown
  rows = [
    [
      row_head(escape(member.get("name", f"model {i}"))),
      *(
        f"<td>{number(_float(member.get(key)), style)}</td>"
        for key, style in (("accuracy", "percent"), ("nll", "plain"), ("ece", "plain"))
      ),
    ]
    for i, member in enumerate(report["members"])
  ]
  spread = _float(report.get("disagreement_mean"))
  caption = "On held-out pairs. ECE: mean gap between confidence and accuracy."
  if math.isfinite(spread):
    caption += f" Mean variance of Δr over the family: {number(spread)}."
  heads = ["Model", "Accuracy", "NLL (nats)", "ECE"]
  return shown + table("models", heads, rows, caption, narrow=True)


def lengths(plots: Plots) -> str:
  """Lengths of the data's responses and of the samples."""
  return figure(
    plots.get("lengths"),
    "Filled: the policy's samples; outline: the reference's on the same prompts; upright lines: "
    "means (the reference's dashed).",
    absent="neither scores.npz, samples.jsonl nor data/summary.json holds lengths",
  )


def learning(plots: Plots) -> str:
  """Learning curves of every stage."""
  return figure(
    plots.get("learning_curves"),
    "Stages before alignment. Dots: held-out evaluations; faint: single seeds or unsmoothed steps.",
    absent="no stage left a metrics.jsonl with losses",
  ) + figure(
    plots.get("alignment_curves"),
    "Alignment. Losses of different objectives are on different scales and cannot be compared; "
    "implicit accuracy can.",
    absent="no alignment left a metrics.jsonl with losses",
  )


def data(run: RunData) -> str:
  """What data/summary.json says, and what was left out."""
  summary = next((s.data for s in run.seeds if s.data), None)
  if summary is None:
    return '<p class="absent">No seed has a data/summary.json.</p>'
  pairs = []
  for name, value in summary.items():
    if name == "left_out":
      continue
    if name == "longer_wins" and isinstance(value, int | float):
      pairs.append(("longer response wins", f"{100 * value:.1f} % of pairs"))
    elif value not in ({}, [], None) and not _is_histogram(value):
      pairs.append((name.replace("_", " "), _plain(value)))
  left_out = summary.get("left_out")
  text = facts(pairs)
  if isinstance(left_out, list):
    count = f"{len(left_out)} records were" if left_out else "Nothing was"
    text += f"<p>{count} left out.</p>"
    if left_out:
      lines = "\n".join(str(line) for line in left_out[:200])
      text += details("What was left out", f"<pre>{escape(lines)}</pre>")
  return text


def _is_histogram(value: Any) -> bool:
  """A histogram, or a group of them: drawn, not printed."""
  if not isinstance(value, Mapping):
    return False
  return {"edges", "counts"} <= value.keys() or any(_is_histogram(v) for v in value.values())


def _plain(value: Any) -> str:
  if isinstance(value, Mapping):
    return ", ".join(f"{escape(k).replace('_', ' ')} {_plain(v)}" for k, v in value.items())
  if isinstance(value, bool) or not isinstance(value, int | float):
    return escape(value if isinstance(value, str) else json.dumps(value, default=str))
  return f"{value:,}" if isinstance(value, int) else number(value)


def provenance(run: RunData) -> str:
  """Command, versions, stages with keys and times, and the operative configuration."""
  info = run.info
  pairs = []
  if command := info.get("command"):
    pairs.append(("command", f"<code>{escape(command)}</code>"))
  if isinstance(versions := info.get("versions"), Mapping):
    pairs.append(("versions", ", ".join(f"{escape(k)} {escape(v)}" for k, v in versions.items())))
  if isinstance(compiled := info.get("compiled"), Mapping):
    pairs.append(("compiled", _plain(compiled)))
  text = facts(pairs)
  stages = [s for s in info.get("stages") or [] if isinstance(s, Mapping)]
  if stages:
    times = [_float(s.get("seconds")) for s in stages]
    total = sum(t for t in times if math.isfinite(t))
    rows = [
      [
        row_head(escape(s.get("name", "–"))),
        f"<td>{escape(s.get('seed', '–'))}</td>",
        f"<td>{number(_float(s.get('seconds')))}</td>",
        f'<td class="text">{"found finished" if s.get("skipped") else "ran"}</td>',
        f'<td class="text"><code>{escape(s.get("key", "–"))}</code></td>',
      ]
      for s in stages
    ]
    heads = ["Stage", "Seed", "Seconds", "This time", "Key"]
    caption = f"{len(stages)} stages, {number(total)} seconds of work in all."
    listing = table("stages", heads, rows, caption, narrow=True)
    text += details(f"Stages, times and keys ({len(stages)})", listing)
  if run.config is not None:
    text += details("Operative configuration", f"<pre>{escape(run.config)}</pre>")
  return text or '<p class="absent">No run.json and no config.gin.</p>'


def missing(run: RunData) -> str:
  """Files that the page would have shown."""
  items = "".join(f"<li>{escape(line)}</li>" for line in run.missing)
  return f"<p>The page would show more with these:</p><ul>{items}</ul>"


def _float(value: Any) -> float:
  return float(value) if isinstance(value, int | float) else math.nan
