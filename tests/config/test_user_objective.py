"""A user adds an objective in one file of her own, outside the project."""

import json
import subprocess
import sys

import pytest

from rmd_jax.config import load, names
from rmd_jax.errors import UserError

MODULE = '''\
"""An objective of my own."""

import jax.numpy as jnp

from rmd_jax.config import public


@public
def hinge(log_ratios, batch, hyper, carry):
  """max(0, 1 - beta * margin)."""
  margin = hyper["beta"] * (log_ratios[:, 0] - log_ratios[:, 1])
  return jnp.maximum(0.0, 1.0 - margin), None, carry
'''

FLAGS = [
  "Run.objectives=[]",
  "Align.objective=@hinge",
  "Align.hyper={'beta': 0.5}",
  "Run.seeds=[0]",
]
TINY = [
  "Decoder.layers=1",
  "Evaluate.prompts=4",
  "Evaluate.resamples=50",
  "Evaluate.samples=1",
  "Reward.family=1",
  "Reward.subsets=@BootstrapSubsets()",
  "WorldSource.demonstration_count=40",
  "WorldSource.pairs=120",
  "align/Training.steps=2",
  "reward/Training.steps=1",
  "sft/Training.steps=1",
]


@pytest.fixture
def folder(tmp_path):
  (tmp_path / "my_objective.py").write_text(MODULE)
  return tmp_path


def test_it_is_loaded_by_its_module(folder, monkeypatch):
  monkeypatch.chdir(folder)
  monkeypatch.setattr(sys, "path", list(sys.path))
  monkeypatch.setattr(names, "_registered", {})
  monkeypatch.delitem(sys.modules, "my_objective", raising=False)
  with pytest.raises(UserError, match="there is no @hinge"):
    load(["runs/quickstart.gin"], FLAGS)
  root = load(["runs/quickstart.gin"], FLAGS, modules=["my_objective"]).root
  assert root.align.objective is sys.modules["my_objective"].hinge
  assert root.align.hyper == {"beta": 0.5}
  del sys.modules["my_objective"]


def test_a_gin_file_cannot_load_it(folder, monkeypatch):
  monkeypatch.chdir(folder)
  (folder / "my.gin").write_text("import my_objective\nAlign.objective = @hinge\n")
  with pytest.raises(UserError, match=r"^my\.gin:1: `import my_objective`: a configuration imp"):
    load(["my.gin"])
  assert "my_objective" not in sys.modules


@pytest.mark.slow
def test_the_pipeline_runs_with_it(folder):
  flags = [f"--gin.{binding}" for binding in FLAGS + TINY]
  command = [sys.executable, "-m", "rmd_jax", "run", "--gin_file=runs/quickstart.gin"]
  done = subprocess.run(
    [*command, "--module=my_objective", "--run_dir=run", *flags],
    cwd=folder,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  evaluation = folder / "run" / "seed_0" / "evaluate" / "hinge" / "evaluation.json"
  assert json.loads(evaluation.read_text())["objective"] == "hinge"
  assert (folder / "run" / "report" / "report.html").is_file()
  assert "Align.objective = @hinge" in (folder / "run" / "config.gin").read_text()
