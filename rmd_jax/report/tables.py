"""The numbers of the report: over seeds, with intervals, in HTML's and the terminal's tables."""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rmd_jax.evaluation.statistics import (
  Interval,
  bootstrap_interval,
  bootstrap_over_seeds,
  combine_seeds,
)
from rmd_jax.report.run_data import Evaluation, RunData, judge_of, label, read_run

REPORT = Path("report") / "report.html"
"""Where a run directory keeps its page."""

_SEED = 0  # of the resampling: the same run gives the same page


@dataclasses.dataclass(frozen=True)
class Metric:
  """A column of the tables.

  Attributes:
    title: the column's head.
    meaning: one sentence, shown with the table.
    read: the value under one seed, or None where the run lacks it.
    style: "signed", "plain" or "percent".
  """

  title: str
  meaning: str
  read: Callable[[Evaluation], Interval | None]
  style: str = "plain"

  def per_seed(self, run: RunData, objective: str) -> list[Interval]:
    """The values of the seeds that have one."""
    found = [self.read(evaluation) for evaluation in run.evaluations(objective)]
    return [value for value in found if value is not None]

  def over_seeds(self, run: RunData, objective: str) -> Interval | None:
    """The mean over seeds with its interval (seeds and prompts resampled)."""
    found = self.per_seed(run, objective)
    return combine_seeds(found, _SEED) if found else None

  def format(self, value: float) -> str:
    """One number, as the column shows it."""
    return number(value, self.style)


def number(value: float, style: str = "plain") -> str:
  """A number of about three significant digits, with a true minus sign; "–" for NaN."""
  if not math.isfinite(value):
    return "–" if math.isnan(value) else ("∞" if value > 0 else "−∞")
  if style == "percent":
    return f"{100 * value:.1f} %"
  size = abs(value)
  if size >= 1e5 or 0 < size < 0.005:
    digits, exponent = f"{size:.1e}".split("e")
    text = f"{digits}e{int(exponent)}".replace("-", "−")
  else:
    text = f"{size:.{2 if size < 10 else 1 if size < 100 else 0}f}"
  sign = "−" if value < 0 else ("+" if style == "signed" and value > 0 else "")
  return sign + text


def with_interval(value: Interval | None, style: str = "plain") -> str:
  """ "0.41 [0.32, 0.50]", or the number alone where there is no interval."""
  if value is None:
    return "–"
  if math.isnan(value.low) or math.isnan(value.high):
    return number(value.mean, style)
  return f"{number(value.mean, style)} [{number(value.low, style)}, {number(value.high, style)}]"


def _value(name: str) -> Callable[[Evaluation], Interval | None]:
  return lambda evaluation: evaluation.interval(name)


def _mean_of(column: str, diagnostic: str) -> Callable[[Evaluation], Interval | None]:
  def read(evaluation: Evaluation) -> Interval | None:
    values = finite(evaluation.margins.get(column))
    if values.size:
      return bootstrap_interval(values, _SEED)
    return _bare(evaluation.number(diagnostic))

  return read


def _implicit_p95(evaluation: Evaluation) -> Interval | None:
  values = finite(evaluation.margins.get("implicit"))
  if values.size:
    return _bare(float(np.quantile(values, 0.95)))
  return _bare(evaluation.number("margin/implicit_p95"))


def _reward_p95(evaluation: Evaluation) -> Interval | None:
  rewards = evaluation.margins.get("reward")
  values = finite(None if rewards is None else rewards[0])
  return _bare(float(np.quantile(values, 0.95))) if values.size else None


def _far_below(evaluation: Evaluation) -> Interval | None:
  values = finite(evaluation.margins.get("chosen_log_ratio"))
  return _bare(float((values < -math.log(10)).mean())) if values.size else None


def _bare(value: float | None) -> Interval | None:
  return None if value is None or not math.isfinite(value) else Interval(value, math.nan, math.nan)


def finite(values: np.ndarray | None) -> np.ndarray:
  """The finite entries; none where there is no array."""
  return np.zeros(0) if values is None else values[np.isfinite(values)]


METRICS = {
  "advantage": Metric(
    "Advantage",
    "mean score of the policy's samples less that of the reference's, on the same prompts",
    _value("advantage"),
    "signed",
  ),
  "win_rate": Metric(
    "Win rate",
    "share of prompts on which the policy's sample scores higher than the reference's; ties count "
    "one half",
    _value("win_rate"),
    "percent",
  ),
  "win_rate_length_controlled": Metric(
    "Length-controlled",
    "the win rate that a logistic regression on the length difference predicts at equal lengths",
    _value("win_rate_length_controlled"),
    "percent",
  ),
  "chosen": Metric(
    "Chosen log-ratio",
    "mean log π(y_w) − log π_ref(y_w) on held-out preferred responses, in nats; below 0 the policy "
    "has made them less likely than the reference did",
    _mean_of("chosen_log_ratio", "logp/chosen_minus_ref"),
    "signed",
  ),
  "rejected": Metric(
    "Rejected log-ratio",
    "the same on dispreferred responses",
    _mean_of("rejected_log_ratio", "logp/rejected_minus_ref"),
    "signed",
  ),
  "margin_p95": Metric(
    "Margin p95",
    "95th percentile of the implicit reward margin β·Δh on held-out pairs",
    _implicit_p95,
  ),
  "reward_p95": Metric(
    "Reward margin p95", "the same of the reward model trained on all the data", _reward_p95
  ),
  "margin_correlation": Metric(
    "Margin correlation",
    "Pearson's correlation of implicit with reward margins on held-out pairs",
    _value("margin_correlation"),
  ),
  "implicit_accuracy": Metric(
    "Implicit accuracy",
    "share of held-out pairs whose preferred response has the higher implicit reward",
    _value("implicit_accuracy"),
    "percent",
  ),
  "kl_reverse": Metric(
    "KL(π‖ref)", "nats per response, estimated on the policy's samples", _value("kl_reverse")
  ),
  "kl_forward": Metric(
    "KL(ref‖π)", "nats per response, estimated on the reference's samples", _value("kl_forward")
  ),
  "length": Metric("Length", "mean tokens of the policy's samples", _value("length_policy")),
  "length_reference": Metric(
    "Reference length", "mean tokens of the reference's samples", _value("length_reference")
  ),
  "finished": Metric(
    "Finished",
    "share of the policy's samples that ended before the greatest length",
    _value("finished_policy"),
    "percent",
  ),
  "far_below": Metric(
    "Chosen < 1/10",
    "share of preferred responses that became more than ten times less likely than under the "
    "reference",
    _far_below,
    "percent",
  ),
}
"""Every column, by the name that the page's code uses."""


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Scores of one objective less the baseline's, prompt by prompt."""

  objective: str
  baseline: str
  difference: Interval
  prompts: int
  seeds: int


def baseline_of(run: RunData) -> str | None:
  """DPO where the run has it, else the first objective that was evaluated."""
  evaluated = [name for name in run.objectives if run.evaluations(name)]
  return "dpo" if "dpo" in evaluated else (evaluated[0] if evaluated else None)


def compare(run: RunData, objective: str, baseline: str) -> Comparison | None:
  """The paired difference of two objectives over the prompts that both have samples for."""
  differences, groups = [], []
  for seed in run.seeds:
    if objective in seed.evaluations and baseline in seed.evaluations:
      found = _differences(seed.evaluations[objective], seed.evaluations[baseline])
      if found is not None:
        differences.append(found[0])
        groups.append(found[1])
  if not differences:
    return None
  return Comparison(
    objective,
    baseline,
    bootstrap_over_seeds(differences, _SEED, prompts=groups),
    prompts=sum(len(np.unique(group)) for group in groups),
    seeds=len(differences),
  )


def _differences(first: Evaluation, second: Evaluation) -> tuple[np.ndarray, np.ndarray] | None:
  """Score differences and the prompts they belong to, from scores.npz or else samples.jsonl."""
  a, b = first.scores, second.scores
  same = {"policy", "reference"} <= a.keys() & b.keys() and a["policy"].shape == b["policy"].shape
  # Rows are the same prompts only where the reference, sampled once, has the same scores.
  if same and np.array_equal(a["reference"], b["reference"]):
    values = a["policy"] - b["policy"]
    prompts = np.broadcast_to(np.arange(len(values))[:, None], values.shape)
    good = np.isfinite(values)
    return (values[good], prompts[good]) if good.any() else None
  mine, theirs = _scores_by_prompt(first.samples), _scores_by_prompt(second.samples)
  shared = [key for key in mine if key in theirs]
  if not shared:
    return None
  ids: dict[str, int] = {}
  prompts = np.array([ids.setdefault(prompt, len(ids)) for prompt, _ in shared])
  return np.array([mine[key] - theirs[key] for key in shared]), prompts


def _scores_by_prompt(samples: Sequence[Any]) -> dict[tuple[str, int], float]:
  """Scores of the policy's samples by (prompt, how many samples of it came before)."""
  seen: Counter[str] = Counter()
  scores = {}
  for record in samples:
    prompt, score = str(record.get("prompt")), record.get("reward_policy")
    key = (prompt, seen[prompt])
    seen[prompt] += 1
    if isinstance(score, int | float) and math.isfinite(score):
      scores[key] = float(score)
  return scores


def terminal_table(run_directory: Path) -> str:
  """The table that `rmd run` ends with: aligned plain text, and where the report is.

  Raises:
    UserError: the directory holds no run.
  """
  run = read_run(Path(run_directory))
  columns = [
    ("advantage", "advantage [95 %]"),
    ("win_rate", "win rate"),
    ("win_rate_length_controlled", "length-contr."),
    ("chosen", "chosen logp"),
    ("margin_p95", "margin p95"),
    ("length", "length"),
    ("implicit_accuracy", "implicit acc."),
  ]
  rows = [["objective", *(head for _, head in columns)]]
  for objective in run.objectives:
    cells = [
      label(objective) if label(objective) == objective else f"{label(objective)} ({objective})"
    ]
    for name, _ in columns:
      metric = METRICS[name]
      value = metric.over_seeds(run, objective)
      if name == "advantage":
        cells.append(with_interval(value, metric.style))
      else:
        cells.append("–" if value is None else metric.format(value.mean))
    rows.append(cells)
  rows = [[cell.replace("−", "-").replace("–", "-") for cell in row] for row in rows]
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  lines = [
    "  ".join(
      cell.ljust(width) if i == 0 else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ).rstrip()
    for row in rows
  ]
  rule = "-" * max(len(line) for line in lines)
  count = len(run.seeds)
  note = (
    f"over {count} seeds: intervals resample seeds and prompts"
    if count > 1
    else "one seed: intervals speak of prompts, not of other seeds"
  )
  page = run.directory / REPORT
  where = f"report: {page}" if page.exists() else f"report: not written yet ({page})"
  table = "\n".join([lines[0], rule, *lines[1:], rule])
  return (
    f"{table}\nscored by {judge_of(run)}; {note}; chosen logp is against the reference\n{where}"
  )
