"""The run files that come with the library: the command at the head of each works."""

import shlex
from pathlib import Path

import pytest

from rmd_jax import cli, config
from rmd_jax.stages.run import STAGES, Run, objectives_of

GIN = Path(__file__).parents[2] / "gin"
RUNS = sorted((GIN / "runs").glob("*.gin"))


def command_of(path):
  """The command in the comment at a file's head: its options, and its `--gin.` bindings."""
  head = path.read_text().split("\n\n")[0].splitlines()
  lines = [line.removeprefix("#").strip() for line in head]
  found = [line for line in lines if line.startswith("rmd ")]
  assert len(found) == 1, f"{path} shows no command, or several"
  words = shlex.split(found[0].split("  (")[0])
  bindings, rest = cli.split_bindings(words[1:])
  return cli.parser().parse_args(rest), bindings


def test_there_are_run_files():
  assert {path.stem for path in RUNS} >= {"quickstart", "jsonl", "bias"}


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_the_command_at_the_head_loads(path, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)  # from any folder: the library finds its own files
  options, bindings = command_of(path)
  assert options.command == "run"
  assert options.gin_file == [f"runs/{path.name}"]
  assert options.run_dir.parts[0] == "runs"
  root = config.load(options.gin_file, bindings).root
  assert isinstance(root, Run)
  assert root.objectives
  assert root.seeds


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_every_objective_of_it_is_built(path):
  _, bindings = command_of(path)
  loaded = config.load([path], bindings)
  built = objectives_of(loaded)
  assert [objective.name for objective in built] == list(loaded.root.objectives)
  for objective in built:
    objective.align.expect_objective()
    numbers = objective.align.numbers()
    assert all(value is not None for value in numbers.values())
    assert objective.config.root.reward == loaded.root.reward  # the objective changes align alone


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_its_operative_configuration_is_the_same_run(path, tmp_path):
  _, bindings = command_of(path)
  loaded = config.load([path], bindings)
  (tmp_path / "config.gin").write_text(loaded.operative)
  again = config.load([tmp_path / "config.gin"])
  assert again.root == loaded.root
  assert again.operative == loaded.operative


def test_the_quickstart_shows_all_six():
  root = config.load(["runs/quickstart.gin"]).root
  known = {path.stem for path in (GIN / "objectives").glob("*.gin")}
  assert set(root.objectives) == known
  assert len(known) == 6
  assert root.judge is None
  assert root.reward.family == 5


def test_the_command_line_names_the_stages_of_the_pipeline():
  assert tuple(cli.STAGES) == ("run", *STAGES)


def test_every_objective_file_says_what_to_set():
  for path in (GIN / "objectives").glob("*.gin"):
    text = path.read_text()
    head = text.split("\n\n")[0]
    assert all(line.startswith("#") for line in head.splitlines()), path
    if "gin.REQUIRED" in text:
      assert "Set: BETA" in head, path
