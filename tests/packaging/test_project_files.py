"""setup.py, the lock and gin/ agree with each other."""

import re
import runpy
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LINES = (ROOT / "requirements.lock").read_text("utf-8").splitlines()


@pytest.fixture
def arguments(monkeypatch):
  """What setup.py passes to setuptools."""
  passed = {}
  monkeypatch.setattr(setuptools, "setup", passed.update)
  monkeypatch.chdir(ROOT)
  runpy.run_path(str(ROOT / "setup.py"))
  return passed


def test_lock_is_plain_and_without_torch():
  for line in LINES:
    assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9._+!-]+", line), line
  names = {canonicalize_name(line.split("==")[0]) for line in LINES}
  assert not names & {"torch", "rmd-jax", "pip"}
  assert {"setuptools", "wheel"} <= names  # an install without build isolation needs them


def test_lock_is_within_the_ranges_of_setup_py(arguments):
  pins = {canonicalize_name(n): v for n, v in (line.split("==") for line in LINES)}
  for text in [*arguments["install_requires"], *arguments["extras_require"]["dev"]]:
    requirement = Requirement(text)
    assert requirement.specifier, f"{text} has no range"
    assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), text


def test_extras(arguments):
  assert set(arguments["extras_require"]) == {"tpu", "cuda", "launch", "hf", "t5x", "dev"}
  assert arguments["python_requires"] == ">=3.11"


def test_gin_holds_no_python():
  assert not list((ROOT / "gin").rglob("*.py"))  # an __init__.py there would hide gin-config


@pytest.mark.parametrize("path", sorted((ROOT / "gin").rglob("*.gin")), ids=lambda p: p.name)
def test_every_gin_file_says_what_it_is(path):
  assert path.read_text("utf-8").startswith("# ")


def test_continuous_integration_runs_check_and_test():
  script = ROOT / ".ci" / "run"
  assert script.stat().st_mode & 0o111
  lines = script.read_text("utf-8").splitlines()
  assert [line for line in lines if line.startswith("make ")] == ["make check", "make test"]
