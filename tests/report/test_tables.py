import json
import math
import shutil

import numpy as np
import pytest
from fake_run import write_run

from rmd_jax.errors import UserError
from rmd_jax.evaluation.statistics import Interval
from rmd_jax.report.findings import reading
from rmd_jax.report.run_data import read_metrics, read_run
from rmd_jax.report.tables import METRICS, compare, number, terminal_table, with_interval


@pytest.fixture(scope="module")
def fake_run(tmp_path_factory):
  return write_run(tmp_path_factory.mktemp("fake") / "run")


@pytest.fixture
def own_run(fake_run, tmp_path):
  """A copy that a test may spoil."""
  return shutil.copytree(fake_run, tmp_path / "run")


def change(path, **values):
  path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
  ("value", "style", "text"),
  [
    (0.123456, "plain", "0.12"),
    (-13.98, "plain", "−14.0"),
    (123.4, "signed", "+123"),
    (0.0, "signed", "0.00"),
    (-0.00042, "plain", "−4.2e−4"),
    (3.2e7, "plain", "3.2e7"),
    (0.5123, "percent", "51.2 %"),
    (math.nan, "plain", "–"),
    (-math.inf, "plain", "−∞"),
  ],
)
def test_numbers_have_three_digits_and_a_true_minus(value, style, text):
  assert number(value, style) == text


def test_an_interval_is_shown_only_where_there_is_one():
  assert with_interval(Interval(0.41, 0.32, 0.5), "signed") == "+0.41 [+0.32, +0.50]"
  assert with_interval(Interval(0.41, math.nan, math.nan)) == "0.41"
  assert with_interval(None) == "–"


def test_the_terminal_table_is_aligned_ascii_but_for_names_and_ends_with_the_report(fake_run):
  lines = terminal_table(fake_run).splitlines()
  head, rule, *rows = lines[:8]
  assert [row.split()[0] for row in rows] == ["DPO", "IPO", "d-DPO", "p-DPO", "dp-DPO", "e-DPO"]
  assert set(rule) == {"-"}
  for column in ("win rate", "length-contr.", "chosen logp", "margin p95", "length"):
    end = head.rindex(column) + len(column)
    assert all(row[end - 1] != " " and row[end : end + 1] in ("", " ") for row in rows), column
  assert "over 2 seeds" in lines[-2]
  assert lines[-1].endswith("report/report.html)")
  assert "not written yet" in lines[-1]


def test_over_seeds_is_the_mean_and_its_interval_covers_the_seeds(fake_run):
  run = read_run(fake_run)
  seeds = [v.mean for v in METRICS["advantage"].per_seed(run, "ensemble")]
  value = METRICS["advantage"].over_seeds(run, "ensemble")
  assert len(seeds) == 2
  assert value.mean == pytest.approx(np.mean(seeds))
  assert value.low < min(seeds)
  assert value.high > max(seeds)


def test_pairs_are_compared_on_all_samples_where_the_run_kept_their_scores(own_run):
  run = read_run(own_run)
  found = compare(run, "ensemble", "dpo")
  assert (found.prompts, found.seeds) == (120, 2)
  expected = []
  for seed in (0, 1):
    place = own_run / f"seed_{seed}" / "evaluate"
    a, b = (np.load(place / name / "scores.npz")["policy"] for name in ("ensemble", "dpo"))
    expected.append((a - b).mean())
  assert found.difference.mean == pytest.approx(np.mean(expected))
  assert found.difference.low > 0


def test_without_stored_scores_pairs_are_compared_on_the_sample_texts(own_run):
  for path in own_run.glob("seed_*/evaluate/*/scores.npz"):
    path.unlink()
  assert compare(read_run(own_run), "ensemble", "dpo").prompts == 24


def test_scores_against_another_reference_are_not_paired_row_by_row(own_run):
  path = own_run / "seed_0/evaluate/dpo/scores.npz"
  arrays = dict(np.load(path))
  np.savez(path, **{name: array[::-1] for name, array in arrays.items()})  # prompts reordered
  assert compare(read_run(own_run), "ensemble", "dpo").prompts == 12 + 60


def test_objectives_and_seeds_of_earlier_runs_are_left_out(own_run):
  info = json.loads((own_run / "run.json").read_text())
  info["stages"] = [s for s in info["stages"] if s["name"] in ("align/ipo", "align/dpo")]
  info["stages"] = [s for s in reversed(info["stages"]) if s["seed"] == 1]
  (own_run / "run.json").write_text(json.dumps(info))
  run = read_run(own_run)
  assert run.objectives == ("ipo", "dpo")
  assert [s.name for s in run.seeds] == ["seed_1"]


def test_without_run_json_everything_is_found_but_results_put_aside(own_run):
  (own_run / "run.json").unlink()
  shutil.copytree(own_run / "seed_0/align/dpo", own_run / "seed_0/align/dpo.0123456789abcdef")
  shutil.copytree(own_run / "seed_0", own_run / "seed_10")
  (own_run / "seed_0/evaluate/reference").mkdir()
  run = read_run(own_run)
  assert run.objectives[:3] == ("dpo", "ipo", "distill")
  assert len(run.objectives) == 6
  assert [s.name for s in run.seeds] == ["seed_0", "seed_1", "seed_10"]


def test_a_directory_without_a_run_is_the_users_mistake(tmp_path):
  with pytest.raises(UserError, match="no run directory"):
    read_run(tmp_path / "nowhere")
  with pytest.raises(UserError, match="rmd run"):
    terminal_table(tmp_path)


def test_metrics_survive_torn_lines_nan_and_repeated_steps(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_bytes(
    b'{"step": 2, "time": 1.0, "loss/total": 3.0}\n{"step": 1, "loss/total": "NaN", "x": null}\n'
    b'{"step": 2, "loss/total": 4}\n[1]\n\xff\xfe\n{"step": 3, "loss/tot'
  )
  series = read_metrics(path)
  assert set(series) == {"loss/total", "x"}
  steps, values = series["loss/total"]
  np.testing.assert_array_equal(steps, [1, 2])
  np.testing.assert_array_equal(values, [np.nan, 4.0])


def test_spoilt_files_are_named_and_the_rest_is_read(own_run):
  place = own_run / "seed_0/evaluate"
  (place / "dpo/evaluation.json").write_text('{"advantage": {"mean"')
  (place / "ipo/margins.npz").write_bytes(b"PK\x03\x04 cut short")
  np.savez(place / "distill/margins.npz", implicit=np.zeros(5), reward=np.zeros((2, 4)))
  (place / "ensemble/samples.jsonl").unlink()
  (own_run / "seed_1/data/summary.json").write_text("[]")
  (own_run / "config.gin").unlink()
  run = read_run(own_run)
  told = "\n".join(run.missing)
  for words in (
    "seed_0/evaluate/dpo/evaluation.json: not readable",
    "seed_0/evaluate/ipo/margins.npz: not readable",
    "seed_0/evaluate/distill/margins.npz: 'reward' is absent or of another length",
    "seed_0/evaluate/ensemble/samples.jsonl",
    "seed_1/data/summary.json: holds no JSON object",
    "config.gin",
  ):
    assert words in told
  assert "dpo" not in run.seeds[0].evaluations
  assert METRICS["advantage"].over_seeds(run, "dpo").mean > 0  # of the other seed
  assert terminal_table(own_run)


def texts(run_directory):
  return dict(reading(read_run(run_directory)))


def test_the_reading_says_that_dpo_degenerates_where_it_does(fake_run):
  words = texts(fake_run)
  assert "e-DPO has the highest mean advantage" in words["Advantage"]
  assert (
    "DPO lowered the log-probability of held-out preferred responses (−13.9"
    in (words["Probabilities"])
  )
  assert "what both lost went to other responses" in words["Probabilities"]
  assert "DPO's are ahead of the reward model's" in words["Margins"]
  assert "d-DPO's implicit margins track the reward margins" in words["Margins"]
  assert "means over 2 seeds" in words["Caveats"]
  assert "win rate of DPO is extrapolated" in words["Caveats"]


def test_the_reading_says_the_contrary_where_the_numbers_do(own_run):
  for path in own_run.glob("seed_*/evaluate/*/evaluation.json"):
    name = path.parent.name
    mean = {"dpo": 0.9, "ensemble": -0.5}.get(name, 0.0)
    change(
      path,
      advantage={"mean": mean, "low": mean - 0.1, "high": mean + 0.1, "n": 60},
      margin_correlation=0.2 if name == "distill" else 0.95,
      length_policy=18.2,
    )
    arrays = dict(np.load(path.parent / "margins.npz"))
    arrays["chosen_log_ratio"] += 17.0
    arrays["implicit"] *= 0.1
    np.savez(path.parent / "margins.npz", **arrays)
    scores = dict(np.load(path.parent / "scores.npz"))
    scores["policy"] = scores["reference"] + mean
    np.savez(path.parent / "scores.npz", **scores)
  words = texts(own_run)
  assert "DPO has the highest mean advantage over the reference, +0.90" in words["Advantage"]
  assert "e-DPO is worse than the reference" in words["Advantage"]
  assert "IPO, d-DPO, p-DPO and dp-DPO cannot be told from the reference" in words["Advantage"]
  assert "score lower" in words["Prompt by prompt"]
  assert "higher" not in words["Prompt by prompt"]
  assert "DPO raised the log-probability" in words["Probabilities"]
  assert "both lost" not in words["Probabilities"]
  assert "ahead of" not in words["Margins"].split(";")[0]
  assert "hardly follow" in words["Margins"]
  assert "within 10 %" in words["Length"]


def test_the_reading_of_a_run_without_evaluations_does_not_invent_any(own_run):
  shutil.rmtree(own_run / "seed_1")
  shutil.rmtree(own_run / "seed_0/evaluate")
  (own_run / "run.json").unlink()
  words = texts(own_run)
  assert words["Advantage"].startswith("No objective has been evaluated")
  assert set(words) == {"Advantage", "Caveats"}
  assert "One seed only" in words["Caveats"]
