"""Reads a run directory for the report; what is absent or unreadable is noted, never fatal."""

import dataclasses
import json
import math
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from rmd_jax.errors import UserError
from rmd_jax.evaluation.statistics import Interval

LABELS = {
  "dpo": "DPO",
  "ipo": "IPO",
  "distill": "d-DPO",
  "pessimistic_dpo": "p-DPO",
  "pessimistic_distill": "dp-DPO",
  "ensemble": "e-DPO",
}
"""What METHOD's objectives are called in print; others go by their own name."""

Series = tuple[Float[np.ndarray, " _"], Float[np.ndarray, " _"]]
"""Steps and values of one metric."""

_PUT_ASIDE = re.compile(r"\.[0-9a-f]{16}$")  # results of other options, kept by the stages
_SCORE_COLUMNS = ("policy", "reference", "policy_length", "reference_length")
_WORDS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}  # in metrics.jsonl
_MARGIN_COLUMNS = ("implicit", "length_difference", "chosen_log_ratio", "rejected_log_ratio")


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """One objective's evaluation under one seed.

  Attributes:
    values: evaluation.json.
    margins: the arrays of margins.npz that could be read, on the same M pairs.
    scores: the arrays of scores.npz, each [prompts, samples]: "policy" and "reference" scores,
      "policy_length" and "reference_length". Empty where the run kept none.
    samples: the records of samples.jsonl.
  """

  values: Mapping[str, Any]
  margins: Mapping[str, np.ndarray]
  scores: Mapping[str, np.ndarray]
  samples: tuple[Mapping[str, Any], ...]

  def interval(self, name: str) -> Interval | None:
    """A value of evaluation.json as (mean, low, high), NaN-bounded if it is a bare number."""
    return interval_of(self.values.get(name))

  def number(self, name: str) -> float | None:
    """A value of evaluation.json, or of its diagnostics, as a number."""
    found = self.interval(name)
    if found is None:
      found = interval_of((self.values.get("diagnostics") or {}).get(name))
    return None if found is None else found.mean


@dataclasses.dataclass(frozen=True)
class SeedRun:
  """Everything of one seed_*/ folder.

  Attributes:
    name: the folder's name.
    curves: metrics of the stages "sft", "reward" and "judge".
    align: metrics of each objective's alignment.
    evaluations: by objective.
    reward: evaluate/reward.json.
    data: data/summary.json.
  """

  name: str
  curves: Mapping[str, Mapping[str, Series]]
  align: Mapping[str, Mapping[str, Series]]
  evaluations: Mapping[str, Evaluation]
  reward: Mapping[str, Any] | None
  data: Mapping[str, Any] | None


@dataclasses.dataclass(frozen=True)
class RunData:
  """A run as the report sees it.

  Attributes:
    directory: of the run.
    seeds: one entry per seed_*/ folder, in the order of their numbers.
    objectives: in the order of the run, else METHOD's.
    info: run.json.
    config: the operative configuration, or None.
    missing: what could not be found or read, a line each.
  """

  directory: Path
  seeds: tuple[SeedRun, ...]
  objectives: tuple[str, ...]
  info: Mapping[str, Any]
  config: str | None
  missing: tuple[str, ...]

  def evaluations(self, objective: str) -> list[Evaluation]:
    """The objective's evaluations, one for each seed that has it."""
    return [s.evaluations[objective] for s in self.seeds if objective in s.evaluations]


def label(objective: str) -> str:
  """The objective's name in print."""
  return LABELS.get(objective, objective)


def judge_of(run: RunData) -> str:
  """Who scored the samples, with an article; "nobody yet" before the first evaluation."""
  for objective in run.objectives:
    for evaluation in run.evaluations(objective):
      if isinstance(name := evaluation.values.get("judge"), str):
        return name if name.startswith(("a ", "an ", "the ")) else f"the {name}"
      return "an unnamed judge"
  return "nobody yet"


def interval_of(value: Any) -> Interval | None:
  """{"mean", "low", "high"} or a bare number; None for anything without a finite mean."""
  if isinstance(value, Mapping):
    mean, low, high = (_number(value.get(name)) for name in ("mean", "low", "high"))
  else:
    mean, low, high = _number(value), math.nan, math.nan
  return Interval(mean, low, high) if math.isfinite(mean) else None


def read_run(directory: Path) -> RunData:
  """Reads what a run left in `directory`.

  Raises:
    UserError: it is no folder, or holds no seed_*/ folder.
  """
  if not directory.is_dir():
    raise UserError(f"rmd report: no run directory at {directory}. Give the one of an earlier run.")
  missing: list[str] = []
  info = _read_json(directory / "run.json", directory, missing) or {}
  seeds_named, objectives_named = _named_by(info)
  folders = [
    path
    for path in directory.glob("seed_*")
    if path.is_dir()
    and not _PUT_ASIDE.search(path.name)
    and (not seeds_named or path.name in seeds_named)
  ]
  folders.sort(key=lambda path: (_seed_number(path), path.name))
  if not folders:
    raise UserError(
      f"rmd report: {directory} holds no seed_*/ folder, so nothing has run in it yet. "
      "Start with `rmd run --gin_file=…` and the same run directory."
    )
  objectives = objectives_named or _found_objectives(folders)
  seeds = [_read_seed(folder, objectives, directory, missing) for folder in folders]
  if not objectives:
    missing.append(f"{folders[0].name}/align/: no objective has been aligned")
  try:
    config = (directory / "config.gin").read_text(encoding="utf-8", errors="replace")
  except OSError:
    config = None
    missing.append("config.gin: the operative configuration")
  return RunData(directory, tuple(seeds), tuple(objectives), info, config, tuple(missing))


def read_metrics(path: Path) -> dict[str, Series]:
  """The series of a metrics.jsonl, sorted by step; the last value of a repeated step counts.

  A line that is cut short (the run was killed, or is still writing) is passed over.

  Raises:
    OSError: the file cannot be read.
  """
  columns: dict[str, dict[int, float]] = {}
  with path.open(encoding="utf-8", errors="replace") as lines:
    for line in lines:
      try:
        record = json.loads(line)
      except ValueError:
        continue
      if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        continue
      for name, value in record.items():
        if name not in ("step", "time") and isinstance(value, int | float | None):
          columns.setdefault(name, {})[record["step"]] = _number(value)
        elif isinstance(value, str) and value in _WORDS:
          columns.setdefault(name, {})[record["step"]] = _WORDS[value]
  series = {}
  for name, points in columns.items():
    steps = np.array(sorted(points), float)
    series[name] = (steps, np.array([points[int(step)] for step in steps], float))
  return series


def _named_by(info: Mapping[str, Any]) -> tuple[set[str], list[str]]:
  """Seed folders and objectives of the run itself: the directory may hold those of earlier ones."""
  seeds, objectives = set(), []
  stages = info.get("stages")
  for stage in stages if isinstance(stages, list) else []:
    name = str(stage.get("name", "")) if isinstance(stage, Mapping) else ""
    if name.startswith("align/"):
      seeds.add(f"seed_{stage.get('seed')}")
      if (objective := name.removeprefix("align/")) not in objectives:
        objectives.append(objective)
  return seeds, objectives


def _found_objectives(folders: list[Path]) -> list[str]:
  found = {
    place.name
    for folder in folders
    for place in [*(folder / "align").glob("*"), *(folder / "evaluate").glob("*")]
    if place.is_dir()
    and not _PUT_ASIDE.search(place.name)
    and ((place / "evaluation.json").exists() or (place / "metrics.jsonl").exists())
  }
  order = list(LABELS)
  return sorted(found, key=lambda name: (order.index(name) if name in order else 99, name))


def _read_seed(folder: Path, objectives: list[str], root: Path, missing: list[str]) -> SeedRun:
  curves = {}
  for stage in ("sft", "reward", "judge"):
    if stage != "judge" or (folder / stage).exists():  # with an oracle there is no judge to train
      curves[stage] = _read_curves(folder / stage, root, missing)
  align = {name: _read_curves(folder / "align" / name, root, missing) for name in objectives}
  evaluations = {}
  for name in objectives:
    place = folder / "evaluate" / name
    values = _read_json(place / "evaluation.json", root, missing)
    if values is not None:
      evaluations[name] = Evaluation(
        values,
        _read_margins(place, root, missing),
        _read_scores(place, root, missing),
        _read_samples(place, root, missing),
      )
  return SeedRun(
    name=folder.name,
    curves={stage: found for stage, found in curves.items() if found},
    align={name: found for name, found in align.items() if found},
    evaluations=evaluations,
    reward=_read_json(folder / "evaluate" / "reward.json", root, missing),
    data=_read_json(folder / "data" / "summary.json", root, missing),
  )


def _read_curves(folder: Path, root: Path, missing: list[str]) -> dict[str, Series]:
  path = folder / "metrics.jsonl"
  try:
    return read_metrics(path)
  except OSError:
    missing.append(f"{path.relative_to(root)}: its learning curves")
    return {}


def _read_json(path: Path, root: Path, missing: list[str]) -> dict[str, Any] | None:
  try:
    value = json.loads(path.read_bytes())
  except OSError:
    missing.append(f"{path.relative_to(root)}: not there")
  except ValueError as error:
    missing.append(f"{path.relative_to(root)}: not readable as JSON ({error})")
  else:
    if isinstance(value, dict):
      return value
    missing.append(f"{path.relative_to(root)}: holds no JSON object")
  return None


def _read_margins(folder: Path, root: Path, missing: list[str]) -> dict[str, np.ndarray]:
  path = folder / "margins.npz"
  arrays = _read_arrays(path, root, missing, "margins on held-out pairs")
  if arrays is None:
    return {}
  count = arrays["implicit"].shape[-1] if "implicit" in arrays else -1
  good = {name: arrays[name] for name in _MARGIN_COLUMNS if name in arrays}
  good = {name: array for name, array in good.items() if array.shape == (count,) and count}
  if "reward" in arrays and arrays["reward"].ndim == 2 and arrays["reward"].shape[1] == count:
    good["reward"] = arrays["reward"]
  for name in (*_MARGIN_COLUMNS, "reward"):
    if name not in good:
      missing.append(f"{path.relative_to(root)}: '{name}' is absent or of another length")
  return good


def _read_scores(folder: Path, root: Path, missing: list[str]) -> dict[str, np.ndarray]:
  path = folder / "scores.npz"
  if not path.exists():  # samples.jsonl serves instead, with fewer samples
    return {}
  arrays = _read_arrays(path, root, missing, "scores of every sample") or {}
  good = {n: arrays[n] for n in _SCORE_COLUMNS if n in arrays and arrays[n].ndim == 2}
  if len({array.shape for array in good.values()}) > 1:
    missing.append(f"{path.relative_to(root)}: its arrays are of different shapes")
    return {}
  return good


def _read_arrays(
  path: Path, root: Path, missing: list[str], what: str
) -> dict[str, np.ndarray] | None:
  try:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
      return {name: np.asarray(archive[name], float) for name in archive.files}
  except OSError:
    missing.append(f"{path.relative_to(root)}: {what}")
  except (AttributeError, EOFError, ValueError, zipfile.BadZipFile) as error:
    missing.append(f"{path.relative_to(root)}: not readable as an archive of numbers ({error})")
  return None


def _read_samples(folder: Path, root: Path, missing: list[str]) -> tuple[Mapping[str, Any], ...]:
  path = folder / "samples.jsonl"
  records = []
  try:
    with path.open(encoding="utf-8", errors="replace") as lines:
      for line in lines:
        try:
          record = json.loads(line)
        except ValueError:
          continue
        if isinstance(record, dict):
          records.append(record)
  except OSError:
    missing.append(f"{path.relative_to(root)}: sample texts")
  return tuple(records)


def _seed_number(path: Path) -> float:
  digits = path.name.removeprefix("seed_")
  return float(digits) if digits.isascii() and digits.isdigit() else math.inf


def _number(value: Any) -> float:
  return float(value) if isinstance(value, int | float) else math.nan
