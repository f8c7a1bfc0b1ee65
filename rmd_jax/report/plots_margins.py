"""Figures of what alignment did to probabilities and implicit margins."""

import math
from typing import Any

import numpy as np

from rmd_jax.evaluation.statistics import correlation
from rmd_jax.report.run_data import RunData, Series, label
from rmd_jax.report.style import (
  Axes,
  Drawing,
  Theme,
  curve,
  dash,
  legend,
  limits,
  panels,
  step_axis,
)
from rmd_jax.report.tables import finite, number

_SQUASH = 6.0  # implicit margins this many times the rewards': a linear axis would hide the latter


def drift(run: RunData, theme: Theme) -> Drawing | None:
  """Chosen and rejected log-probability against the reference, a panel per objective."""
  chosen = {name: series_of(run, name, "logp/chosen_minus_ref") for name in run.objectives}
  rejected = {name: series_of(run, name, "logp/rejected_minus_ref") for name in run.objectives}
  names = [n for n in run.objectives if chosen[n][0] or rejected[n][0]]
  if not names:
    return None
  figure, axes = panels(len(names), columns=3, height=2.5, sharex=True, sharey=True)
  told = []
  for index, (axis, name) in enumerate(zip(axes, names, strict=True)):
    colour = theme.colour(name, run.objectives)
    axis.axhline(0, color=theme.soft, lw=1)
    held_out = chosen[name][1]
    for series, style, what in (
      (chosen[name][0], "-", "preferred"),
      (rejected[name][0], dash(1), "dispreferred"),
    ):
      shade = colour if style == "-" else theme.soft
      curve(axis, series, shade, style=style, label=what, smooth=not held_out, points=held_out)
    axis.set_title(label(name), color=colour)
    if index % 3 == 0:
      axis.set_ylabel("log π − log π_ref (nats)")
    ends = [_last(chosen[name][0]), _last(rejected[name][0])]
    told.append(f"{label(name)} {number(ends[0], 'signed')} and {number(ends[1], 'signed')}")
  for axis in axes[max(0, len(names) - 3) :]:
    step_axis(axis)
  legend(axes[0], loc="lower left")
  return figure, (
    "Mean log-ratio of preferred and dispreferred responses over training. At the last step, "
    f"preferred and dispreferred: {'; '.join(told)}."
  )


def growth(run: RunData, theme: Theme) -> Drawing | None:
  """The implicit margin over training, beside the reward margins that it should end at."""
  quantities = (
    ("margin/implicit_p95", "95th percentile", 0.95),
    ("margin/implicit_mean", "Mean", None),
  )
  columns = []
  for key, title, quantile in quantities:
    series = {name: series_of(run, name, key) for name in run.objectives}
    if any(found for found, _ in series.values()):
      columns.append((series, title, quantile))
  if not columns:
    return None
  figure, axes = panels(len(columns), columns=2, height=3.4)
  told = ""
  for axis, (series, title, quantile) in zip(axes, columns, strict=True):
    ends = []
    for index, (name, (found, held_out)) in enumerate(series.items()):
      if found:
        curve(
          axis,
          found,
          theme.colour(name, run.objectives),
          style=dash(index),
          label=label(name),
          smooth=not held_out,
        )
        ends.append((name, _last(found)))
    target = _reward_margin(run, quantile)
    if target is not None:
      axis.axhline(target, color=theme.ink, lw=1.1, ls=dash(2), label="reward model")
    axis.set_title(f"{title} of the implicit margin β·Δh")
    step_axis(axis)
    told = told or "; ".join(f"{label(name)} {number(end)}" for name, end in ends)
  axes[0].set_ylabel("reward units")
  axes[0].legend(ncols=2)
  return figure, f"Implicit margins over training. At the last step: {told}."


def scatter(run: RunData, theme: Theme) -> Drawing | None:
  """Implicit against reward margins per objective, with the line on which both are equal."""
  pairs = margins_of(run)
  if not pairs:
    return None
  figure, axes = panels(len(pairs), columns=3, height=2.9, sharex=True, sharey=True)
  x_low, x_high = limits(np.concatenate([r for _, r in pairs.values()]))
  y_low, y_high = _shared_y(axes[0], [i for i, _ in pairs.values()], [r for _, r in pairs.values()])
  told = []
  for index, (axis, (name, (implicit, reward))) in enumerate(zip(axes, pairs.items(), strict=True)):
    colour = theme.colour(name, run.objectives)
    size = max(2.0, min(12.0, 4000 / len(reward)))
    axis.scatter(
      np.clip(reward, x_low, x_high),
      np.clip(implicit, y_low, y_high),
      s=size,
      color=colour,
      alpha=0.4,
      lw=0,
      rasterized=True,
    )
    line = np.linspace(x_low, x_high, 200)
    axis.plot(line, line, color=theme.ink, lw=1.1, ls=dash(1), label="equal")
    value = correlation(implicit, reward)
    axis.set_title(f"{label(name)}   r = {number(value)}", color=colour)
    axis.set_xlim(x_low, x_high)
    axis.set_ylim(y_low, y_high)
    if index % 3 == 0:
      axis.set_ylabel("implicit margin β·Δh")
    told.append(f"{label(name)} {number(value)}")
  for axis in axes[max(0, len(pairs) - 3) :]:
    axis.set_xlabel("reward margin Δr")
  legend(axes[0], loc="upper left")
  return figure, (
    f"Implicit against reward margins on held-out pairs. Correlations: {'; '.join(told)}."
  )


def histogram(run: RunData, theme: Theme) -> Drawing | None:
  """Distributions of implicit and reward margins, a panel per objective."""
  pairs = margins_of(run)
  if not pairs:
    return None
  figure, axes = panels(len(pairs), columns=3, height=2.3, sharex=True, sharey=True)
  low, high = _histogram_range(pairs)
  least = min(len(reward) for _, reward in pairs.values())
  edges = np.linspace(low, high, int(np.clip(2 * math.sqrt(least), 12, 60)))
  told = []
  for index, (axis, (name, (implicit, reward))) in enumerate(zip(axes, pairs.items(), strict=True)):
    colour = theme.colour(name, run.objectives)
    filled: dict[str, Any] = {"fill": True, "color": colour, "alpha": 0.45}
    for values, options in (
      (implicit, filled | {"label": "implicit β·Δh"}),
      (reward, {"color": theme.ink, "lw": 1.4, "label": "reward Δr"}),
    ):
      counts, _ = np.histogram(np.clip(values, low, high), edges)
      axis.stairs(100 * counts / len(values), edges, **options)
    axis.axvline(0, color=theme.soft, lw=1)
    axis.set_title(label(name), color=colour)
    if index % 3 == 0:
      axis.set_ylabel("% of pairs")
    told.append(f"{label(name)} {number(implicit.mean())} ± {number(implicit.std())}")
  for axis in axes[max(0, len(pairs) - 3) :]:
    axis.set_xlabel("margin, reward units")
  legend(axes[0], loc="upper right")
  return figure, f"Histograms of margins on held-out pairs. Implicit mean ± sd: {'; '.join(told)}."


def _histogram_range(pairs: dict[str, tuple[np.ndarray, np.ndarray]]) -> tuple[float, float]:
  """Wide enough for every objective, unless that would shrink the rewards to a line."""
  spans = [limits(implicit) for implicit, _ in pairs.values()]
  low, high = limits(np.concatenate([reward for _, reward in pairs.values()]))
  room = _SQUASH * (high - low) / 2
  return (
    max(low - room, min([low, *(a for a, _ in spans)])),
    min(high + room, max([high, *(b for _, b in spans)])),
  )


def margins_of(run: RunData) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Implicit and reward margins of the model on all the data, all seeds' pairs in one."""
  result = {}
  for name in run.objectives:
    parts = [
      (e.margins["implicit"], e.margins["reward"][0])
      for e in run.evaluations(name)
      if "implicit" in e.margins and "reward" in e.margins
    ]
    if parts:
      implicit, reward = (np.concatenate(column) for column in zip(*parts, strict=True))
      good = np.isfinite(implicit) & np.isfinite(reward)
      if good.any():
        result[name] = implicit[good], reward[good]
  return result


def series_of(run: RunData, objective: str, metric: str) -> tuple[list[Series], bool]:
  """The metric of each seed, on held-out pairs where it was evaluated, and whether it is that."""
  for name, held_out in ((f"eval/{metric}", True), (metric, False)):
    found = [s.align[objective].get(name) for s in run.seeds if objective in s.align]
    series = [x for x in found if x is not None and np.isfinite(x[1]).any()]
    if series and (not held_out or max(len(x[0]) for x in series) > 1):
      return series, held_out
  return [], False


def _last(series: list[Series]) -> float:
  ends = [y[np.isfinite(y)][-1] for _, y in series]
  return float(np.mean(ends)) if ends else float("nan")


def _reward_margin(run: RunData, quantile: float | None) -> float | None:
  """The reward model's own margin on held-out pairs: the same pairs under every objective."""
  values = []
  for seed in run.seeds:
    arrays = [e.margins["reward"][0] for e in seed.evaluations.values() if "reward" in e.margins]
    if arrays and (reward := finite(arrays[0])).size:
      values.append(reward.mean() if quantile is None else np.quantile(reward, quantile))
  return float(np.mean(values)) if values else None


def _shared_y(
  axes: Axes, implicit: list[np.ndarray], reward: list[np.ndarray]
) -> tuple[float, float]:
  """Limits of the shared y axis; linear up to the rewards' size, then logarithmic if need be."""
  whole = np.concatenate(implicit)
  size = float(np.quantile(np.abs(np.concatenate(reward)), 0.99))
  greatest = max(float(np.quantile(np.abs(values), 0.99)) for values in implicit)
  if size > 0 and greatest > _SQUASH * size:
    axes.set_yscale("symlog", linthresh=size)
    powers = 10.0 ** np.arange(math.ceil(math.log10(size)), math.floor(math.log10(greatest)) + 1)
    ticks = [*-powers[::-1], 0.0, *powers]
    axes.set_yticks(ticks, [f"{tick:g}".replace("-", "−") for tick in ticks])
    axes.minorticks_off()
  return limits(whole)
