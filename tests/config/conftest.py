"""The configuration is tested on a toy pipeline, in a folder of its own."""

import pytest
import toy_pipeline

from rmd_jax.config import PUBLIC, names

PIPELINE = """\
Run.source = @World()
Run.align = @Align()
"""


@pytest.fixture
def toy(monkeypatch, tmp_path):
  """Puts the toy pipeline in place of the public names; the current folder is tmp_path/here."""
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
