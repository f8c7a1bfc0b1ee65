"""Tiny pipelines, and what the stages' tests ask of a run directory."""

import dataclasses
import json
import os
from collections.abc import Iterable
from pathlib import Path

import jax
import numpy as np
import pytest

from rmd_jax import config
from rmd_jax.data.world import WorldSource
from rmd_jax.stages import run as stages_run
from rmd_jax.training.loop import load_params
from rmd_jax.training.metrics import read_metrics

GIN = str(Path(__file__).with_name("tiny.gin"))
SIX = ("dpo", "ipo", "distill", "pessimistic_dpo", "pessimistic_distill", "ensemble")


def environment() -> dict[str, str]:
  """Of a process that is killed: it reads compiled programs, but leaves none half-written."""
  return os.environ | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1000000"}


def configure(*bindings: str, objectives: Iterable[str] | None = None) -> config.Config:
  """tiny.gin with bindings of the test's own."""
  listed = () if objectives is None else (f"Run.objectives={list(objectives)}",)
  return config.load([GIN], [*bindings, *listed])


def with_data(loaded: config.Config, **changes) -> config.Config:
  """The configuration with other preference data, which need not be public to gin."""

  def changed(one: config.Config) -> config.Config:
    data = dataclasses.replace(one.root.data, **changes)
    return dataclasses.replace(one, root=dataclasses.replace(one.root, data=data))

  objectives = {name: changed(one) for name, one in loaded._objectives.items()}
  return dataclasses.replace(changed(loaded), _objectives=objectives)


def pipeline(
  loaded: config.Config, directory: Path, *, only: str | None = None, report: bool = False
) -> dict[str, bool]:
  """Runs it, by default without the report; which stages were skipped, by seed and folder."""
  with pytest.MonkeyPatch.context() as patch:
    if not report:
      patch.setattr(stages_run, "write_report", lambda directory: None)
      patch.setattr(stages_run, "terminal_table", lambda directory: "")
    assert stages_run.run(loaded, directory, only=only) == 0
  done = json.loads((directory / "run.json").read_text())["stages"]
  return {f"seed_{stage['seed']}/{stage['name']}": stage["skipped"] for stage in done}


def made(skipped: dict[str, bool]) -> list[str]:
  """The stages that were run."""
  return [name for name, was in skipped.items() if not was]


def digests(seed: Path) -> dict[str, str]:
  """Content hashes of the parameters that each training stage ended with."""
  folders = [seed / "sft", seed / "reward", *sorted((seed / "align").iterdir())]
  return {
    str(folder.relative_to(seed)): load_params(folder, which="last")[1]
    for folder in folders
    if (folder / "checkpoints").is_dir()
  }


def history(folder: Path) -> list[dict[str, float]]:
  """Everything that a training stage logged, but for the clock."""
  return [
    {k: v for k, v in row.items() if k != "time" and not k.startswith("perf/")}
    for row in read_metrics(folder)
  ]


def contents(directory: Path) -> dict[str, tuple[int, int]]:
  """Size and time of change of every file of the seeds, but reward.json, a copy made anew."""
  return {
    str(path.relative_to(directory)): (path.stat().st_size, path.stat().st_mtime_ns)
    for path in sorted(directory.glob("seed_*/**/*"))
    if path.is_file() and path.parent.name + path.name != "evaluatereward.json"
  }


def assert_trees_equal(got, wanted, **tolerance) -> None:
  """The same structure and values; bit by bit where no tolerance is given."""
  assert jax.tree.structure(got) == jax.tree.structure(wanted)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
    if tolerance:
      np.testing.assert_allclose(np.asarray(a), np.asarray(b), **tolerance)
    else:
      np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@dataclasses.dataclass(frozen=True)
class Recast:
  """The world's records in another shape: ranks, ratings or preference.

  Attributes:
    world: the world.
    shape: what labels the records.
  """

  world: WorldSource
  shape: str

  @property
  def oracle(self):
    """The world's."""
    return self.world.oracle

  @property
  def vocabulary(self):
    """The world's."""
    return self.world.vocabulary

  def fingerprint(self) -> str:
    """The world's, and the shape."""
    return f"{self.world.fingerprint()}-{self.shape}"

  def demonstrations(self):
    """The world's."""
    return self.world.demonstrations()

  def records(self):
    """The world's, with other labels."""
    return [self.recast(record) for record in self.world.records()]

  def recast(self, record):
    """One record."""
    prompt = record["prompt"]
    if self.shape == "preference":
      gap = self.oracle.score(prompt, record["chosen"]) - self.oracle.score(
        prompt, record["rejected"]
      )
      return record | {"preference": float(1 / (1 + np.exp(-gap)))}
    if self.shape == "ratings":
      scores = [self.oracle.score(prompt, text) for text in record["responses"]]
      return {k: v for k, v in record.items() if k != "ranks"} | {"ratings": scores}
    assert self.shape == "ranks"
    return record
