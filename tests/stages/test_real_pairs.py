"""Real preference pairs through every stage, with gin/runs/jsonl.gin made tiny.

The file is Anthropic's HH (harmless) data, 1,500 pairs of it; it lies beside the project, not in
it. Four of its lines have an empty response.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from rmd_jax import cli

FILE = Path(__file__).parents[2].parent / "shared" / "data" / "hh_harmless_1500.jsonl.gz"
UNUSABLE = (87, 517, 926, 1104)
TINY = (
  "Decoder.layers=1",
  "Decoder.width=16",
  "Decoder.heads=2",
  "Decoder.kv_heads=1",
  "Decoder.head_dim=8",
  "Decoder.mlp_width=32",
  "PreferenceData.prompt_length=48",
  "PreferenceData.response_length=32",
  "Training.batch_size=8",
  "Training.learning_rate=1e-3",
  "sft/Training.steps=4",
  "reward/Training.steps=3",
  "judge/Training.steps=3",
  "align/Training.steps=3",
  "Evaluate.prompts=8",
  "Evaluate.resamples=50",
  "Run.objectives=['ensemble']",
)

pytestmark = pytest.mark.skipif(not FILE.exists(), reason=f"{FILE} is not there")


def command(directory, *bindings):
  flags = [f"--gin.{binding}" for binding in (f"DATA_FILES={str(FILE)!r}", *TINY, *bindings)]
  return cli.main(["run", "--gin_file=runs/jsonl.gin", f"--run_dir={directory}", *flags])


def read(path):
  return json.loads(path.read_text())


@pytest.mark.slow
def test_real_pairs_run_through_all_stages(tmp_path, capsys):
  assert command(tmp_path / "run") == 0
  said, seed = capsys.readouterr(), tmp_path / "run/seed_0"
  assert "left out 4 records:" in said.err
  for line in UNUSABLE:
    assert f"{FILE.name}:{line}: " in said.err
  assert (seed / "data/left_out.txt").read_text().count("\n") == 4
  summary = read(seed / "data/summary.json")
  counts = summary["counts"]
  assert sum(counts.values()) == 1496
  assert min(counts.values()) > 50
  assert summary["unusable"] == 4
  found = read(seed / "evaluate/ensemble/evaluation.json")
  assert found["judge"] == "held-out reward model"
  assert found["advantage"]["n"] == 8
  with np.load(seed / "evaluate/ensemble/margins.npz") as margins:
    assert margins["implicit"].shape == (counts["test"],)
    assert np.isfinite(margins["implicit"]).all()
  assert (seed / "judge/checkpoints").is_dir()
  assert "report: " in said.out
  assert (tmp_path / "run/report/report.html").exists()
  # The judge's part is seen by no other stage: scores are of the three others.
  size = (seed / "scores/reference.bin").stat().st_size
  scored = sum(counts[part] for part in ("train", "validation", "test"))
  assert scored * (32 + 2 * 4) <= size < (scored + 1) * (32 + 2 * 4) + 16 * (1 + scored // 8)
  assert command(tmp_path / "run") == 0
  assert "judge: up to date" in capsys.readouterr().err


def test_unusable_lines_are_refused_where_none_is_tolerated(tmp_path, capsys):
  assert command(tmp_path / "run", "MAX_BAD_FRACTION=0.0") == 2
  said = capsys.readouterr().err
  for line in UNUSABLE:
    assert f"{FILE.name}:{line}: " in said
  assert said.count(f"{FILE.name}:") == 4
  assert not (tmp_path / "run/seed_0/sft").exists()
