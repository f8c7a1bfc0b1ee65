"""The command `rmd`: what it passes on, what it prints, and its exit statuses."""

import subprocess
import sys
import types
from pathlib import Path

import pytest

from rmd_jax import cli
from rmd_jax.errors import RunError, UserError


@pytest.fixture
def stages(monkeypatch):
  """Puts a recorder in place of the stages and of the loader; `result` is returned or raised."""
  calls = types.SimpleNamespace(load=[], run=[], validate=[], result=0)

  def load(files, bindings, search_paths, modules):
    calls.load.append((files, bindings, search_paths, modules))
    return "the config"

  def run(config, directory, *, only):
    calls.run.append((config, directory, only))
    if isinstance(calls.result, BaseException):
      raise calls.result
    return calls.result

  def validate(files, **options):
    calls.validate.append((files, options))
    return 2

  from rmd_jax import config, data, stages

  fake_run, fake_validate = types.ModuleType("run"), types.ModuleType("validate")
  fake_run.run, fake_validate.main = run, validate
  monkeypatch.setattr(config, "load", load)
  monkeypatch.setitem(sys.modules, "rmd_jax.stages.run", fake_run)
  monkeypatch.setattr(stages, "run", fake_run, raising=False)
  monkeypatch.setitem(sys.modules, "rmd_jax.data.validate", fake_validate)
  monkeypatch.setattr(data, "validate", fake_validate, raising=False)
  return calls


def test_flags_are_passed_on(stages):
  arguments = [
    "align",
    "--gin_file=runs/a.gin",
    "--gin.BETA=0.1",
    "--gin_file",
    "b.gin",
    "--gin_search_paths=x,y",
    "--gin_search_paths=z",
    "--module=my.objective",
    "--gin.DATA_FILES='a=b'",
  ]
  assert cli.main(arguments) == 0
  bindings = ["BETA=0.1", "DATA_FILES='a=b'"]
  assert stages.load == [(["runs/a.gin", "b.gin"], bindings, ["x", "y", "z"], ["my.objective"])]
  assert stages.run == [("the config", Path("runs/b"), "align")]
  assert cli.main(["run", "--gin_file=runs/a.gin", "--run_dir=/there"]) == 0
  assert stages.run[1] == ("the config", Path("/there"), None)


@pytest.mark.parametrize(
  "result, status, message",
  [
    (0, 0, ""),
    (7, 7, ""),
    (UserError("run.gin:3: no"), 2, "rmd run: run.gin:3: no\n"),
    (RunError("no good checkpoint"), 1, "rmd run: no good checkpoint\n"),
    (KeyboardInterrupt(), 130, "rmd run: stopped by Ctrl-C; the same command goes on from here\n"),
  ],
)
def test_exit_status(stages, capsys, result, status, message):
  stages.result = result
  assert cli.main(["run", "--gin_file=a.gin"]) == status
  assert capsys.readouterr().err == message


def test_stopped_after_saving_passes_through(stages):
  stages.result = SystemExit(143)
  with pytest.raises(SystemExit) as caught:
    cli.main(["run", "--gin_file=a.gin"])
  assert caught.value.code == 143


def test_an_error_of_ours_keeps_its_traceback(stages):
  stages.result = ZeroDivisionError()
  with pytest.raises(ZeroDivisionError):
    cli.main(["run", "--gin_file=a.gin"])


def test_validate(stages):
  arguments = ["validate", "a.jsonl", "b.jsonl", "--max_bad_fraction=0.1", "--show", "3"]
  assert cli.main([*arguments, "--prompt_length=8"]) == 2
  options = {
    "max_bad_fraction": 0.1,
    "show": 3,
    "prompt_length": 8,
    "response_length": None,
    "vocabulary": None,
  }
  assert stages.validate == [(["a.jsonl", "b.jsonl"], options)]


@pytest.mark.parametrize(
  "arguments, message",
  [
    ([], "the following arguments are required: command"),
    (["walk"], "invalid choice: 'walk'"),
    (["run", "--gin_fil=a.gin"], "unrecognized arguments: --gin_fil=a.gin"),
    (["run", "--gin_file=a.gin", "--gin.BETA", "3"], "unrecognized arguments: 3"),
    (["validate"], "the following arguments are required: FILE"),
    (["validate", "a", "--max_bad_fraction=2"], "2 is not between 0 and 1"),
    (["validate", "a", "--show=-1"], "-1 is negative"),
    (["validate", "a", "--gin.BETA=3"], "validate takes no --gin.BETA"),
  ],
)
def test_bad_usage_is_2(stages, capsys, arguments, message):
  with pytest.raises(SystemExit) as caught:
    cli.main(arguments)
  assert caught.value.code == 2
  assert message in capsys.readouterr().err


def test_bad_configuration_is_2_without_traceback(tmp_path):
  (tmp_path / "run.gin").write_text("include 'none.gin'\n")
  command = [sys.executable, "-m", "rmd_jax", "run", "--gin_file=run.gin"]
  done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
  assert done.returncode == 2
  assert done.stderr.startswith("rmd run: run.gin:1: no file none.gin to include; looked in ")
  assert "Traceback" not in done.stderr
  assert list(tmp_path.iterdir()) == [tmp_path / "run.gin"]  # nothing was made


HEAVY = ("jax", "tensorflow", "seqio", "matplotlib", "pyarrow", "orbax", "numpy", "gin")


@pytest.mark.parametrize("module", ["rmd_jax", "rmd_jax.cli"])
def test_import_loads_nothing_heavy(module):
  code = f"import sys, {module}; print(*[m for m in {HEAVY} if m in sys.modules])"
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert done.stdout.split() == []
