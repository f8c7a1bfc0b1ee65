"""All tests run on eight fake CPU devices, and refuse [B] against [B, 1]."""

import os
from pathlib import Path

# Before jax starts a backend; the environment reaches the processes that tests start, too.
os.environ["JAX_PLATFORMS"] = "cpu"
# The tests' time is the compiler's: so little optimisation, and programs kept between runs.
os.environ["XLA_FLAGS"] = " ".join(
  [
    os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
  ]
).strip()
os.environ.setdefault(
  "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "xla")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax
import pytest

from rmd_jax.config import PUBLIC, names

jax.config.update("jax_platforms", "cpu")  # where a pytest plugin has imported jax already
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module")
def x64():
  """Double precision for one test module, and for no other."""
  with jax.enable_x64(True):
    yield


PIPELINE = """\
Run.source = @World()
Run.align = @Align()
"""


@pytest.fixture
def toy(monkeypatch, tmp_path):
  """Puts the toy pipeline in place of the public names; the current folder is tmp_path/here."""
  import toy_pipeline  # beside the tests that ask for it

  saved = dict(PUBLIC)
  PUBLIC.clear()
  PUBLIC.update(toy_pipeline.PUBLIC)
  monkeypatch.setattr(names, "_registered", {})
  (tmp_path / "here").mkdir()
  monkeypatch.chdir(tmp_path / "here")
  yield toy_pipeline
  PUBLIC.clear()
  PUBLIC.update(saved)


@pytest.fixture
def write(toy, tmp_path):
  """Writes a gin file under the current folder, after the lines that make a pipeline."""

  def write(text: str, name: str = "run.gin", *, pipeline: bool = True):
    path = tmp_path / "here" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text((PIPELINE if pipeline else "") + text, "utf-8")
    return path

  return write
