"""The whole pipeline on a tiny world: what it leaves, what it skips, and what it refuses."""

import json
import shutil

import jax
import numpy as np
import pytest
from tiny_runs import (
  GIN,
  SIX,
  configure,
  contents,
  digests,
  history,
  made,
  pipeline,
)

from rmd_jax import cli, config
from rmd_jax.errors import UserError
from rmd_jax.stages import inference
from rmd_jax.stages.run import Pipeline
from rmd_jax.training.loop import compilations, load_params
from rmd_jax.training.partitioning import MeshConfig

pytestmark = pytest.mark.slow

KEYS = {
  "objective",
  "seed",
  "beta",
  "judge",
  "advantage",
  "win_rate",
  "win_rate_length_controlled",
  "reward_policy",
  "reward_reference",
  "length_policy",
  "length_reference",
  "finished_policy",
  "implicit_accuracy",
  "kl_forward",
  "kl_reverse",
  "margin_correlation",
  "margin_correlations",
  "chosen_log_ratio",
  "rejected_log_ratio",
  "diagnostics",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """A finished run of all six objectives, with its report. Tests copy it before they change it."""
  directory = tmp_path_factory.mktemp("runs") / "whole"
  skipped = pipeline(configure(), directory, report=True)
  assert not any(skipped.values())
  return directory


@pytest.fixture
def copy(whole, tmp_path):
  """The finished run, to be changed."""
  shutil.copytree(whole, tmp_path / "copy")
  return tmp_path / "copy"


def read(path):
  return json.loads(path.read_text())


def context_of(loaded, directory, seed=0):
  return Pipeline(loaded, directory, seed, None).context


# --- what it leaves -------------------------------------------------------------------------------


def test_every_stage_leaves_its_artefact(whole):
  seed = whole / "seed_0"
  for name in ["config.gin", "run.json", "log.txt", "report/report.html"]:
    assert (whole / name).stat().st_size > 0, name
  assert list((whole / "report").glob("*.png"))
  folders = ["data", "sft", "reward", "scores", "evaluate/reference"]
  folders += [f"{stage}/{name}" for stage in ("align", "evaluate") for name in SIX]
  for folder in folders:
    state = read(seed / folder / "stage.json")
    assert state["done"], folder
    assert state["seconds"] > 0, folder
  steps = {"sft": 7, "reward": 6} | {f"align/{name}": 5 for name in SIX}
  for folder, last in steps.items():
    assert list((seed / folder / "tensorboard").iterdir())
    trained = [row["step"] for row in history(seed / folder) if "loss/total" in row]
    assert trained == list(range(1, last + 1)), folder
    evaluated = [row["step"] for row in history(seed / folder) if "eval/loss" in row]
    assert evaluated == sorted({*range(3, last + 1, 3), last}), folder
    assert load_params(seed / folder, which="last")[2] == last
  run = read(whole / "run.json")
  assert [stage["name"] for stage in run["stages"]] == folders[1:4] + folders[5:11] + [
    folders[4],
    *folders[11:],
  ]
  assert run["compiled"]["programs"] > 0
  assert run["versions"]["jax"] == jax.__version__


def test_the_data_are_summarised(whole):
  summary = read(whole / "seed_0/data/summary.json")
  assert sum(summary["counts"].values()) == 100
  assert summary["counts"]["judge"] == 0
  assert min(summary["counts"][part] for part in ("train", "validation", "test")) > 0
  assert set(summary["lengths"]) == {"prompt", "chosen", "rejected"}
  assert summary["longer_wins"] == pytest.approx(0.3, abs=0.02)
  assert (whole / "seed_0/data/left_out.txt").read_text() == ""


def test_an_evaluation_says_all_that_the_report_reads(whole):
  counts = read(whole / "seed_0/data/summary.json")["counts"]
  for name in SIX:
    folder = whole / "seed_0/evaluate" / name
    found = read(folder / "evaluation.json")
    assert set(found) == KEYS
    assert (found["objective"], found["seed"], found["judge"]) == (name, 0, "oracle")
    assert found["beta"] == (1.0 if name == "ipo" else 0.5)
    assert found["advantage"]["n"] == 6
    for interval in ("advantage", "win_rate", "win_rate_length_controlled"):
      assert found[interval]["low"] <= found[interval]["mean"] <= found[interval]["high"]
    assert found["advantage"]["mean"] == pytest.approx(
      found["reward_policy"] - found["reward_reference"]
    )
    assert len(found["margin_correlations"]) == 4
    with np.load(folder / "margins.npz") as margins:
      implicit, reward = margins["implicit"], margins["reward"]
      assert implicit.shape == margins["length_difference"].shape == (counts["test"],)
      assert reward.shape == (4, counts["test"])
      np.testing.assert_allclose(
        implicit,
        found["beta"] * (margins["chosen_log_ratio"] - margins["rejected_log_ratio"]),
        rtol=1e-6,
      )
    assert found["implicit_accuracy"] == pytest.approx((implicit > 0).mean())
    assert found["margin_correlation"] == pytest.approx(
      np.corrcoef(implicit, reward[0])[0, 1], abs=1e-6
    )
    with np.load(folder / "scores.npz") as scores:
      assert scores["policy"].shape == scores["reference"].shape == (6, 2)
      assert scores["policy"].mean() == pytest.approx(found["reward_policy"])
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    assert {"prompt", "policy", "reference", "chosen"} < set(lines[0])
    assert lines[0]["prompt"].startswith("report :")


def test_reward_models_are_evaluated(whole):
  report = read(whole / "seed_0/evaluate/reward.json")
  assert len(report["members"]) == 4
  assert np.shape(report["agreement"]) == (4, 4)
  for member in report["members"]:
    assert 0 <= member["accuracy"] <= 1
    assert {"nll", "ece", "reliability", "by_length"} < set(member)


def test_scores_are_what_the_checkpoints_give(whole):
  """Of every split and member, computed here from the parameters."""
  loaded = configure()
  context, root = context_of(loaded, whole), loaded.root
  stored = root.score.attach(context, root.reward, ("train", "validation", "test"))
  policy = load_params(whole / "seed_0/sft")[0]["shared"]
  models = load_params(whole / "seed_0/reward")[0]
  ensemble = root.reward.stage(context).ensemble
  for name, split in stored.items():
    plain = context.data.splits[name]
    np.testing.assert_array_equal(split.ids, plain.ids)
    logp = inference.log_probabilities(context.policy, policy, plain, 16, MeshConfig())
    np.testing.assert_allclose(split.reference_logp, logp, rtol=1e-5, atol=1e-5)
    rewards = inference.rewards(ensemble, models, plain, 16, MeshConfig())
    np.testing.assert_allclose(split.rewards, rewards, rtol=1e-4, atol=1e-5)
    assert np.ptp(split.rewards, axis=0).min() > 0  # members differ


def test_alignment_begins_at_the_reference(whole):
  """Stored scores, read back, are those of the policy that training starts from."""
  for name in SIX:
    first = history(whole / "seed_0/align" / name)[0]
    assert first["step"] == 1  # the numbers of the first step are those before its update
    for key in ("logp/chosen_minus_ref", "logp/rejected_minus_ref", "margin/implicit_mean"):
      assert abs(first[key]) < 1e-3, (name, key)
    assert abs(first["logp/chosen_minus_ref_p5"]) < 1e-3
    last = history(whole / "seed_0/align" / name)[-1]
    assert abs(last["eval/margin/implicit_mean"]) > 1e-3, name  # and then it moves


def test_the_six_differ_and_each_logs_its_own(whole):
  found = digests(whole / "seed_0")
  assert len(set(found.values())) == 8
  rows = {name: history(whole / "seed_0/align" / name)[0] for name in SIX}
  assert rows["dpo"]["loss/total"] == pytest.approx(np.log(2), abs=1e-4)
  assert rows["ipo"]["loss/total"] == pytest.approx((1 / (2 * 0.1)) ** 2, rel=1e-3)
  assert rows["pessimistic_dpo"]["gamma/value"] == pytest.approx(0.01)
  assert rows["dpo"]["gamma/value"] == 0
  picked = [rows["ensemble"][f"select/member_{k}"] for k in (1, 2, 3)]
  assert sorted(picked) == [0, 0, 1]
  distances = [rows["ensemble"][f"ensemble/distance_{k}"] for k in (1, 2, 3)]
  assert picked[int(np.argmin(distances))] == 1
  assert rows["ensemble"]["loss/total"] == pytest.approx(min(distances), rel=1e-3)


# --- what it skips --------------------------------------------------------------------------------


def test_a_second_run_skips_everything(copy):
  before, programs = contents(copy), compilations().programs
  skipped = pipeline(configure(), copy)
  assert len(skipped) == 16
  assert all(skipped.values())
  assert compilations().programs == programs
  assert contents(copy) == before


def test_the_operative_configuration_finds_its_run(copy):
  before = contents(copy)
  again = config.load([copy / "config.gin"])
  assert again.root == configure().root
  assert all(pipeline(again, copy).values())
  assert contents(copy) == before


def test_each_objective_has_an_operative_configuration_of_its_own(whole):
  loaded = configure()
  for name in SIX:
    own = config.load([whole / "seed_0/align" / name / "config.gin"]).root
    assert own.objectives == ()
    assert config.canonical(own.align) == config.canonical(loaded.with_objective(name).root.align)


def test_a_new_beta_reruns_alignment_and_its_evaluation_only(copy, whole):
  """And compiles nothing: beta is an argument of the programs."""
  before, programs = contents(copy), compilations().programs
  chosen = ["dpo", "ipo", "ensemble"]
  skipped = pipeline(configure("BETA=0.9", objectives=chosen), copy)
  assert made(skipped) == [
    "seed_0/align/dpo",
    "seed_0/align/ensemble",  # ipo has no beta
    "seed_0/evaluate/dpo",
    "seed_0/evaluate/ensemble",
  ]
  assert compilations().programs == programs
  after = contents(copy)
  untouched = [name for name in before if name.split("/")[1] in ("data", "sft", "reward", "scores")]
  assert untouched
  assert all(after[name] == before[name] for name in untouched)
  assert read(copy / "seed_0/evaluate/dpo/evaluation.json")["beta"] == 0.9
  ours, theirs = digests(copy / "seed_0"), digests(whole / "seed_0")
  assert ours["align/dpo"] != theirs["align/dpo"]
  # The earlier results were put aside, and come back when they are wanted.
  assert all(pipeline(configure(objectives=chosen), copy).values())
  assert digests(copy / "seed_0")["align/dpo"] == theirs["align/dpo"]
  assert read(copy / "seed_0/evaluate/dpo/evaluation.json") == read(
    whole / "seed_0/evaluate/dpo/evaluation.json"
  )


def test_numbers_that_change_no_result_are_in_no_key(copy):
  loaded = configure(
    "Training.checkpoint_every=3",
    "Training.log_every=2",
    "Score.batch_size=16",
    "Evaluate.batch_size=4",
    "MeshConfig.data=2",
  )
  assert all(pipeline(loaded, copy).values())


def test_a_new_seed_is_a_run_beside_the_first(copy):
  before = contents(copy)
  skipped = pipeline(configure("Run.seeds=[0,1]", objectives=["dpo"]), copy)
  assert all(was for name, was in skipped.items() if name.startswith("seed_0/"))
  assert made(skipped) == [name for name in skipped if name.startswith("seed_1/")]
  after = contents(copy)
  assert all(after[name] == before[name] for name in before)
  first, second = digests(copy / "seed_0"), digests(copy / "seed_1")
  assert not set(first.values()) & set(second.values())
  shown = [
    {json.loads(line)["prompt"] for line in file.read_text().splitlines()}
    for file in sorted(copy.glob("seed_*/evaluate/dpo/samples.jsonl"))
  ]
  assert not shown[0] & shown[1]  # the world is drawn anew


def test_stage_by_stage_is_the_same_run(whole, tmp_path):
  chosen = ["dpo", "ensemble"]
  for stage in ("sft", "reward", "score", "align", "evaluate"):
    skipped = pipeline(configure(objectives=chosen), tmp_path, only=stage)
    assert {name.split("/")[1].removesuffix("s") for name in made(skipped)} == {stage}
  assert all(pipeline(configure(objectives=chosen), tmp_path, only="report").values())
  wanted = digests(whole / "seed_0")
  for name, digest in digests(tmp_path / "seed_0").items():
    assert digest == wanted[name], name
  for name in chosen:
    for file in ("evaluation.json", "samples.jsonl"):
      ours, theirs = (run / "seed_0/evaluate" / name / file for run in (tmp_path, whole))
      assert ours.read_text() == theirs.read_text()
  assert all(pipeline(configure(objectives=chosen), tmp_path).values())


def test_what_is_brought_back_is_all_of_it(copy, whole):
  """The reward models' evaluation too, which lies outside the folder that is put aside."""
  wanted = read(whole / "seed_0/evaluate/reward.json")
  changed = configure("reward/Training.learning_rate=3e-2", objectives=["dpo"])
  skipped = pipeline(changed, copy)
  assert made(skipped) == [
    "seed_0/reward",
    "seed_0/scores",
    "seed_0/align/dpo",
    "seed_0/evaluate/reference",
    "seed_0/evaluate/dpo",
  ]
  assert read(copy / "seed_0/evaluate/reward.json") != wanted
  assert all(pipeline(configure(objectives=["dpo"]), copy).values())
  assert read(copy / "seed_0/evaluate/reward.json") == wanted
  assert digests(copy / "seed_0")["reward"] == digests(whole / "seed_0")["reward"]


# --- what it refuses ------------------------------------------------------------------------------


def command(stage, directory, *bindings):
  flags = [f"--gin.{binding}" for binding in bindings]
  return cli.main([stage, f"--gin_file={GIN}", f"--run_dir={directory}", *flags])


@pytest.mark.parametrize(
  "stage, missing, first",
  [
    ("reward", "sft", "sft"),
    ("score", "reward", "reward"),
    ("align", "scores", "score"),
    ("evaluate", "align/dpo", "align"),
  ],
)
def test_a_stage_without_its_input_names_the_command_to_run(copy, capsys, stage, missing, first):
  shutil.rmtree(copy / "seed_0" / missing)
  before = contents(copy)
  assert command(stage, copy, "Run.objectives=['dpo']") == 2
  said = capsys.readouterr().err
  assert f"rmd {stage}: stage '{first}' has not run in {copy}/seed_0/{missing}." in said
  assert f"Run `rmd {first}` first." in said
  assert contents(copy) == before


def test_changed_data_are_said_to_differ(copy, capsys):
  before = contents(copy)
  assert command("align", copy, "WorldSource.pairs=101") == 2
  said = capsys.readouterr().err
  assert "the result of stage 'sft'" in said
  assert "belongs to another run" in said
  assert "\n  data        stored " in said
  assert "  options, policy, seed: equal\n" in said
  assert contents(copy) == before


def test_scores_of_another_checkpoint_are_refused(copy, tmp_path_factory):
  """Even where every stage.json says that nothing changed."""
  other = tmp_path_factory.mktemp("other")
  pipeline(configure("sft/Training.learning_rate=1e-2"), other, only="sft")
  shutil.rmtree(copy / "seed_0/sft/checkpoints")
  shutil.copytree(other / "seed_0/sft/checkpoints", copy / "seed_0/sft/checkpoints")
  shutil.rmtree(copy / "seed_0/align/dpo")
  with pytest.raises(UserError) as caught:
    pipeline(configure(objectives=["dpo"]), copy, only="align")
  said = str(caught.value)
  assert "belong to another run" in said
  assert "model of reference" in said
  assert "<- differs" in said
  assert "model of member_0" in said.split("<- differs")[1]  # among what is equal
  assert not read(copy / "seed_0/align/dpo/stage.json")["done"]


def test_a_damaged_score_file_is_refused_and_then_mended(copy, whole):
  """`rmd score` goes on where the file is whole, though its stage was finished once."""
  path = copy / "seed_0/scores/member_1.bin"
  good = path.read_bytes()
  path.write_bytes(good[:1000])
  shutil.rmtree(copy / "seed_0/align/dpo")
  chosen = configure(objectives=["dpo"])
  with pytest.raises(UserError) as caught:
    pipeline(chosen, copy, only="align")
  assert "are not complete.\n  member_1  scores " in str(caught.value)
  assert "Run `rmd score`: it goes on where it stopped." in str(caught.value)
  assert made(pipeline(chosen, copy, only="score")) == ["seed_0/scores"]
  assert path.read_bytes() == good
  assert made(pipeline(chosen, copy)) == ["seed_0/align/dpo"]
  assert digests(copy / "seed_0") == digests(whole / "seed_0")
