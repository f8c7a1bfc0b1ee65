"""Figures of training: learning curves, the ensemble at work, and the reward models' quality."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from rmd_jax.report.plots_margins import series_of
from rmd_jax.report.run_data import RunData, Series, label
from rmd_jax.report.style import (
  Axes,
  Drawing,
  Theme,
  curve,
  dash,
  legend,
  marker,
  mean_over_seeds,
  panels,
  rolling,
  step_axis,
)
from rmd_jax.report.tables import number

_TITLES = {"sft": "SFT", "reward": "Reward models", "judge": "Judge"}
_NUMBERED = re.compile(r"(.*?)(\d+)$")


def learning(run: RunData, theme: Theme) -> Drawing | None:
  """Losses of the stages before alignment, and the reward models' accuracy."""
  stages = [s for s in _TITLES if any(s in seed.curves for seed in run.seeds)]
  plots = []
  for stage in stages:
    curves = [seed.curves[stage] for seed in run.seeds if stage in seed.curves]
    for kind in ("loss", "accuracy"):
      if lines := _lines(curves, kind):
        plots.append((stage, kind, lines))
  if not plots:
    return None
  figure, axes = panels(len(plots), columns=3, height=2.7)
  told = []
  for axis, (stage, kind, lines) in zip(axes, plots, strict=True):
    for name, held_out, colour, series in lines:
      shade = theme.ink if colour is None else theme.member(colour)
      style = "-" if held_out or colour is not None else dash(2)
      curve(axis, series, shade, style=style, label=name, smooth=not held_out, points=held_out)
    axis.set_title(f"{_TITLES[stage]}: {kind}")
    step_axis(axis)
    axis.set_ylabel("nats" if kind == "loss" else "share of pairs")
    legend(axis, ncols=2 if len(lines) > 3 else 1, fontsize=8)
    ends = [f"{name} {number(_end(series))}" for name, _, _, series in lines[:8]]
    told.append(f"{_TITLES[stage]} {kind}: {', '.join(ends)}")
  return figure, f"Learning curves; last values: {'. '.join(told)}."


def _lines(
  curves: list[Mapping[str, Series]], kind: str
) -> list[tuple[str, bool, int | None, list[Series]]]:
  """One line a member where the stage has members, else training and held-out."""
  members: dict[tuple[int, bool], list[Series]] = {}
  for found in curves:
    for name, series in found.items():
      match = re.fullmatch(rf"(eval/)?{kind}/member_?(\d+)", name)
      if match:
        members.setdefault((int(match[2]), match[1] is not None), []).append(series)
  if members:
    # A single evaluation is a dot, not a curve: the training curve then tells more.
    held_out = any(
      evaluated and max(len(x) for x, _ in s) > 1 for (_, evaluated), s in members.items()
    )
    return [
      ("all data" if index == 0 else f"member_{index}", held_out, index, series)
      for (index, evaluated), series in sorted(members.items())
      if evaluated == held_out
    ]
  if kind == "loss":
    names = (("training", "loss/total", False), ("held out", "eval/loss", True))
  else:
    names = (("training", "accuracy/mean", False), ("held out", "eval/accuracy/mean", True))
  lines: list[tuple[str, bool, int | None, list[Series]]] = []
  for title, name, evaluated in names:
    whole = [found[name] for found in curves if name in found]
    if whole:
      lines.append((title, evaluated, None, whole))
  return lines


def alignment(run: RunData, theme: Theme) -> Drawing | None:
  """Alignment's losses, whose scales differ by objective, and the implicit accuracy they share."""
  names = [
    n
    for n in run.objectives
    if any(
      "loss/total" in s.align.get(n, {}) or "eval/loss" in s.align.get(n, {}) for s in run.seeds
    )
  ]
  accuracy = {n: series_of(run, n, "margin/accuracy") for n in run.objectives}
  accuracy = {n: found for n, found in accuracy.items() if found[0]}
  if not names and not accuracy:
    return None
  figure, axes = panels(len(names) + bool(accuracy), columns=4, height=2.25)
  for axis, name in zip(axes, names, strict=False):
    colour = theme.colour(name, run.objectives)
    for key, style, what in (("loss/total", dash(2), "training"), ("eval/loss", "-", "held out")):
      series = [s.align[name][key] for s in run.seeds if key in s.align.get(name, {})]
      held_out = key.startswith("eval")
      curve(axis, series, colour, style=style, label=what, smooth=not held_out, points=held_out)
    axis.set_title(label(name), color=colour)
    step_axis(axis)
  if names:
    axes[0].set_ylabel("loss")
    legend(axes[0])
  told = []
  if accuracy:
    for index, (name, (series, held_out)) in enumerate(accuracy.items()):
      colour = theme.colour(name, run.objectives)
      curve(axes[-1], series, colour, style=dash(index), label=label(name), smooth=not held_out)
      told.append(f"{label(name)} {number(_end(series))}")
    axes[-1].set_title("Implicit accuracy")
    step_axis(axes[-1])
    axes[-1].set_ylabel("share of pairs")
    if not names:
      legend(axes[-1])
  text = f" Implicit accuracy at the last step: {'; '.join(told)}." if told else ""
  return figure, f"Alignment losses per objective.{text}"


def ensemble(run: RunData, theme: Theme) -> Drawing | None:
  """Which members the objective leant on, their disagreement, their distance to the policy."""
  rows = [
    (n, found) for n in run.objectives if len(found := _numbered(run, n, "select/member_")) > 1
  ]
  if not rows:
    return None
  figure, axes = panels(3 * len(rows), columns=3, height=3.0)
  told = []
  for row, (name, selected) in enumerate(rows):
    left, middle, right = axes[3 * row : 3 * row + 3]
    told.append(f"{label(name)}: {_draw_selected(left, selected, theme)}")
    left.set_title(f"{label(name)}: selected member")
    left.set_ylabel("share of weight")
    colour = theme.colour(name, run.objectives)
    series, held_out = series_of(run, name, "ensemble/disagreement")
    curve(middle, series, colour, smooth=not held_out, points=held_out)
    middle.set_title("Disagreement of the members")
    middle.set_ylabel("variance of Δr over members")
    middle.set_ylim(bottom=0)
    distances = _numbered(run, name, "ensemble/distance_")
    for index, (member, lines) in enumerate(distances.items()):
      colour = theme.member(member)
      curve(right, lines, colour, style=dash(index), label=f"member_{member}", smooth=True)
    right.set_title("Distance to the members")
    right.set_ylabel("implicit − member's margin")
    legend(right)
    for axis in (left, middle, right):
      step_axis(axis)
  return figure, f"Selected members over training. Mean share, {'; '.join(told)}."


def _draw_selected(axes: Axes, selected: dict[int, list[Series]], theme: Theme) -> str:
  means = {member: mean_over_seeds(series) for member, series in selected.items()}
  steps = means[next(iter(means))][0]
  shares = np.stack(
    [
      rolling(np.interp(steps, x, np.nan_to_num(y)), max(3, len(steps) // 12))
      for x, y in means.values()
    ]
  )
  axes.stackplot(
    steps,
    shares,
    colors=[theme.member(member) for member in means],
    labels=[f"member_{member}" for member in means],
    lw=0,
    alpha=0.85,
  )
  axes.margins(0)
  axes.set_ylim(0, max(1e-9, float(shares.sum(0).max())))
  legend(
    axes,
    loc="lower left",
    facecolor=theme.ground,
    frameon=True,
    framealpha=0.8,
    edgecolor=theme.grid,
    fontsize=8,
  )
  return ", ".join(
    f"member_{m} {100 * share:.0f} %" for m, share in zip(means, shares.mean(1), strict=True)
  )


def _numbered(run: RunData, objective: str, prefix: str) -> dict[int, list[Series]]:
  """Series whose name is `prefix` and a number, over seeds."""
  found: dict[int, list[Series]] = {}
  for seed in run.seeds:
    for name, series in seed.align.get(objective, {}).items():
      match = _NUMBERED.fullmatch(name)
      if match and match[1] == prefix:
        found.setdefault(int(match[2]), []).append(series)
  return dict(sorted(found.items()))


def reward_models(run: RunData, theme: Theme) -> Drawing | None:
  """Reliability, accuracy by length difference and agreement, of the first seed with them."""
  report = next((s.reward for s in run.seeds if s.reward and s.reward.get("members")), None)
  if report is None:
    return None
  members = report["members"]
  figure, (left, middle, right) = panels(3, columns=3, height=3.5)
  left.plot([0.5, 1], [0.5, 1], color=theme.soft, lw=1, ls=dash(1), label="calibrated")
  middle.axhline(0.5, color=theme.soft, lw=1, ls=dash(1))
  for index, member in enumerate(members):
    options: dict[str, Any] = {
      "color": theme.member(index),
      "marker": marker(index),
      "ms": 4,
      "lw": 1.4,
    }
    bins = member.get("reliability") or []
    left.plot(
      _column(bins, "confidence"), _column(bins, "accuracy"), label=_name(member, index), **options
    )
    buckets = member.get("by_length") or []
    centres = (_column(buckets, "low") + _column(buckets, "high")) / 2
    middle.plot(centres, _column(buckets, "accuracy"), **options)
  left.set_title("Reliability")
  left.set_xlabel("confidence σ(|Δr|)")
  left.set_ylabel("share right")
  left.legend(fontsize=8)
  middle.set_title("Accuracy by length")
  middle.set_xlabel("tokens, preferred − other")
  middle.set_ylabel("share right")
  _draw_agreement(
    right, report.get("agreement"), [_name(m, i) for i, m in enumerate(members)], theme
  )
  told = "; ".join(
    f"{_name(m, i)} accuracy {number(_float(m.get('accuracy')))}, "
    f"ECE {number(_float(m.get('ece')))}"
    for i, m in enumerate(members)
  )
  return figure, f"Calibration of the reward models: {told}."


def _draw_agreement(axes: Axes, table: Any, names: list[str], theme: Theme) -> None:
  axes.set_title("Agreement of signs")
  axes.grid(visible=False)
  values = np.array(table, float) if table else np.zeros(0)
  if values.shape != (len(names), len(names)):
    axes.text(0.5, 0.5, "not in this run", ha="center", color=theme.soft, transform=axes.transAxes)
    axes.set_xticks([])
    axes.set_yticks([])
    return
  axes.imshow(values, vmin=0.5, vmax=1.0, cmap="cividis", aspect="equal")
  short = [name.replace("member_", "m") for name in names]
  axes.set_xticks(range(len(names)), short, rotation=45, ha="right")
  axes.set_yticks(range(len(names)), short)
  if len(names) <= 10:
    for (i, j), value in np.ndenumerate(values):
      ink = "#101010" if value > 0.78 else "#ffffff"
      axes.text(j, i, f"{value:.2f}", ha="center", va="center", color=ink, fontsize=8)


def _column(entries: Any, name: str) -> np.ndarray:
  return np.array([_float(e.get(name)) for e in entries], float)


def _float(value: Any) -> float:
  return float(value) if isinstance(value, int | float) else float("nan")


def _name(member: Mapping[str, Any], index: int) -> str:
  return str(member.get("name", f"model {index}"))


def _end(series: list[Series]) -> float:
  ends = [y[np.isfinite(y)][-1] for _, y in series if np.isfinite(y).any()]
  return float(np.mean(ends)) if ends else float("nan")
