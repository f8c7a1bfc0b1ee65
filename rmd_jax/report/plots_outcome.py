"""Figures of what came out: advantage and win rates, cost in divergence, lengths."""

import math
from typing import Any

import numpy as np

from rmd_jax.evaluation.statistics import Interval
from rmd_jax.report.run_data import Evaluation, RunData, label
from rmd_jax.report.style import Axes, Drawing, Theme, dash, limits, marker, panels
from rmd_jax.report.tables import METRICS, finite, number, with_interval


def outcome(run: RunData, theme: Theme) -> Drawing | None:
  """Bars with intervals: advantage, win rate, length-controlled win rate."""
  names = [n for n in run.objectives if METRICS["advantage"].over_seeds(run, n)]
  if not names:
    return None
  columns = [
    ("advantage", "Advantage over the reference", "score (judge's units)", 0.0),
    ("win_rate", "Win rate", "share of prompts", 0.5),
    ("win_rate_length_controlled", "Length-controlled win rate", "share of prompts", 0.5),
  ]
  figure, axes = panels(3, columns=3, height=0.42 * len(names) + 1.1, sharey=True)
  for axis, (key, title, unit, base) in zip(axes, columns, strict=True):
    _bars(axis, run, theme, names, key, base)
    axis.set_title(title)
    axis.set_xlabel(unit)
    if base == 0.5:
      axis.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
  axes[0].set_yticks(range(len(names)), [label(n) for n in names], color=theme.ink, fontsize=10)
  axes[0].invert_yaxis()
  told = "; ".join(
    f"{label(n)} {with_interval(METRICS['advantage'].over_seeds(run, n), 'signed')}" for n in names
  )
  return figure, f"Bars with 95 % intervals. Advantage over the reference: {told}."


def _bars(axes: Axes, run: RunData, theme: Theme, names: list[str], key: str, base: float) -> None:
  axes.grid(axis="y", visible=False)
  axes.axvline(base, color=theme.soft, lw=1, zorder=1)
  edges = [base]
  for row, name in enumerate(names):
    value = METRICS[key].over_seeds(run, name)
    if value is None:
      axes.text(base, row, "  no value", va="center", color=theme.soft, fontsize=9)
      continue
    colour = theme.colour(name, run.objectives)
    axes.barh(row, value.mean - base, left=base, height=0.62, color=colour, alpha=0.35, lw=0)
    seeds = METRICS[key].per_seed(run, name)
    if len(seeds) > 1:
      spread = np.linspace(-0.16, 0.16, len(seeds))
      axes.scatter(
        [s.mean for s in seeds],
        row + spread,
        s=13,
        facecolors="none",
        edgecolors=theme.soft,
        lw=0.9,
      )
    _interval_line(axes, value, row, colour)
    edges += [x for x in (value.mean, value.low, value.high) if math.isfinite(x)]
  low, high = min(edges), max(edges)
  pad = 0.08 * (high - low) if high > low else 0.1
  axes.set_xlim(low - pad * (low < base), high + pad)


def _interval_line(axes: Axes, value: Interval, row: int, colour: str) -> None:
  if math.isfinite(value.low) and math.isfinite(value.high):
    axes.plot([value.low, value.high], [row, row], color=colour, lw=2.6)
  axes.plot(value.mean, row, "o", color=colour, ms=6.5)


def frontier(run: RunData, theme: Theme) -> Drawing | None:
  """Advantage against the divergence that it cost."""
  points = []
  for name in run.objectives:
    advantage = METRICS["advantage"].over_seeds(run, name)
    divergence = METRICS["kl_reverse"].over_seeds(run, name)
    if advantage is not None and divergence is not None:
      points.append((name, advantage, divergence))
  if not points:
    return None
  figure, (axes,) = panels(1, columns=1, height=4.0)
  axes.axhline(0, color=theme.soft, lw=1)
  for index, (name, advantage, divergence) in enumerate(points):
    colour = theme.colour(name, run.objectives)
    axes.errorbar(
      divergence.mean,
      advantage.mean,
      xerr=_bounds(divergence),
      yerr=_bounds(advantage),
      fmt=marker(index),
      color=colour,
      ms=8,
      lw=1.4,
      label=label(name),
    )
  axes.set_xlabel("KL(policy ‖ reference), nats per response")
  axes.set_ylabel("advantage over the reference")
  axes.set_title("What was gained, and how far the policy moved for it")
  axes.margins(x=0.06, y=0.12)
  axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=10, labelspacing=1.1)
  told = "; ".join(
    f"{label(n)} {number(a.mean, 'signed')} at {number(d.mean)} nats" for n, a, d in points
  )
  return figure, f"Advantage against KL divergence from the reference: {told}."


def _bounds(value: Interval) -> np.ndarray | None:
  if not (math.isfinite(value.low) and math.isfinite(value.high)):
    return None
  return np.maximum([[value.mean - value.low], [value.high - value.mean]], 0)


def lengths(run: RunData, theme: Theme) -> Drawing | None:
  """Histograms of lengths: the data's responses, then each policy's against the reference's."""
  drawn = []
  for name in run.objectives:
    policy, reference = (
      np.concatenate([_sampled(e, side) for e in run.evaluations(name)] or [np.zeros(0)])
      for side in ("policy", "reference")
    )
    if policy.size and reference.size:
      drawn.append((name, policy, reference))
  data = _data_lengths(run)
  if not drawn and not data:
    return None
  figure, axes = panels(len(drawn) + bool(data), columns=4, height=2.25)
  if data:
    axis = axes[0]
    for index, (name, colour) in enumerate((("chosen", theme.ink), ("rejected", theme.soft))):
      if name in data:
        edges, counts = data[name]
        share = 100 * counts / max(counts.sum(), 1)
        axis.stairs(share, edges, color=colour, lw=1.8, ls=dash(index), label=name)
    axis.set_title("Data")
    axis.set_xlabel("tokens per response")
    axis.set_ylabel("% of responses")
    axis.legend()
  told = []
  if drawn:
    everything = np.concatenate([np.concatenate([p, r]) for _, p, r in drawn])
    low, high = limits(everything)
    width = max(1, round((high - low) / 20))  # whole tokens a bar, or some bars would stay empty
    start = max(0, math.floor(low))
    edges = np.arange(start, max(high, start + 1) + width, width) - 0.5
  for axis, (name, policy, reference) in zip(axes[bool(data) :], drawn, strict=True):
    colour = theme.colour(name, run.objectives)
    filled: dict[str, Any] = {"fill": True, "color": colour, "alpha": 0.45}
    for values, options in (
      (policy, filled | {"label": "policy"}),
      (reference, {"color": theme.ink, "lw": 1.4, "label": "reference"}),
    ):
      counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
      axis.stairs(100 * counts / values.size, edges, **options)
    axis.axvline(policy.mean(), color=colour, lw=2)
    axis.axvline(reference.mean(), color=theme.ink, lw=1.2, ls=dash(1))
    axis.set_title(label(name), color=colour)
    axis.set_xlabel("tokens per sample")
    told.append(f"{label(name)} {number(policy.mean())} ({number(reference.mean())})")
  for axis in axes[bool(data) : bool(data) + 1]:
    axis.set_ylabel("% of samples")
    axis.legend()
  text = f" Mean tokens of policy (reference): {'; '.join(told)}." if told else ""
  return figure, f"Histograms of response lengths.{text}"


def _sampled(evaluation: Evaluation, side: str) -> np.ndarray:
  """Lengths of all samples of "policy" or "reference", else of those kept as texts."""
  stored = evaluation.scores.get(f"{side}_length")
  if stored is not None:
    return finite(stored.ravel())
  values = [record.get(f"length_{side}") for record in evaluation.samples]
  return np.array([v for v in values if isinstance(v, int | float)], float)


def _data_lengths(run: RunData) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """The first seed's histograms that are whole: edges one more than counts."""
  for seed in run.seeds:
    found = {}
    histograms = (seed.data or {}).get("lengths") or (seed.data or {}).get("length_histograms")
    histograms = histograms if isinstance(histograms, dict) else seed.data or {}
    for name in ("chosen", "rejected"):
      entry = histograms.get(name)
      if isinstance(entry, dict) and {"edges", "counts"} <= entry.keys():
        edges, counts = np.array(entry["edges"], float), np.array(entry["counts"], float)
        if edges.ndim == 1 and edges.size == counts.size + 1:
          found[name] = edges, counts
    if found:
      return found
  return {}
