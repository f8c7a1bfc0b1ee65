"""Alignment from stored scores: estimators, schedules of gamma, states, accumulation, functions."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import assert_trees_equal, configure, history, pipeline

from rmd_jax import config, objectives
from rmd_jax.config import names
from rmd_jax.errors import UserError
from rmd_jax.stages import inference
from rmd_jax.stages.align import Alignment
from rmd_jax.stages.run import Pipeline
from rmd_jax.training import loop
from rmd_jax.training.checkpoints import Checkpoints
from rmd_jax.training.loop import load_params
from rmd_jax.training.partitioning import MeshConfig

BASE = ("Score.samples=3",)


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
  """A run up to its scores, with samples of the reference."""
  directory = tmp_path_factory.mktemp("scored")
  loaded = configure(*BASE, objectives=["dpo"])
  for stage in ("sft", "reward", "score"):
    pipeline(loaded, directory, only=stage)
  return directory


@pytest.fixture
def align(scored, tmp_path):
  """Aligns a copy of the run with one objective; its folder and configuration."""

  def align(name, *bindings, place="run", only="align"):
    directory = tmp_path / place
    if not directory.exists():
      shutil.copytree(scored, directory)
    loaded = configure(*BASE, *bindings, objectives=[name])
    pipeline(loaded, directory, only=only)
    return directory / "seed_0/align" / name, loaded

  return align


def splits_of(loaded, directory, names=("train", "validation")):
  context = Pipeline(loaded, directory, 0, None).context
  return context, loaded.root.score.attach(context, loaded.root.reward, names)


def trained(folder):
  return [row for row in history(folder) if "loss/total" in row]


# --- the divergence -------------------------------------------------------------------------------


@pytest.mark.slow
def test_tokenwise_divergence_is_nothing_at_the_reference(align):
  folder, loaded = align("pessimistic_dpo", "ESTIMATOR='tokenwise'", "GAMMA=0.5")
  rows = trained(folder)
  assert abs(rows[0]["kl/forward_tokenwise"]) < 1e-6  # rounding: only the policy's half has a vjp
  assert all(row["kl/forward_tokenwise"] > 1e-4 for row in rows[1:])
  params = load_params(folder, which="last")[0]
  reference = load_params(folder.parents[1] / "sft")[0]["shared"]
  assert_trees_equal(params["frozen"], reference)
  # The loss of a step is DPO's plus gamma times what is logged.
  context, splits = splits_of(loaded, folder.parents[2])
  validation, decoder = splits["validation"], context.policy
  logp = inference.log_probabilities(decoder, params["shared"], validation, 8, MeshConfig())
  batch = validation.batch(np.arange(len(validation)))
  arrays = jax.tree.map(jnp.asarray, (params["shared"], reference, batch))
  kl = decoder.token_kl(*arrays).mean(-1)
  evaluated = history(folder)[-1]
  assert evaluated["eval/kl/forward_tokenwise"] == pytest.approx(float(kl.mean()), rel=1e-4)
  losses = objectives.dpo(jnp.asarray(logp - validation.reference_logp), beta=0.5) + 0.5 * kl
  assert evaluated["eval/loss"] == pytest.approx(float(losses.mean()), rel=1e-4)


@pytest.mark.slow
def test_samples_of_the_reference_estimate_the_divergence(align):
  folder, loaded = align("pessimistic_distill", "ESTIMATOR='samples'", "GAMMA=0.5")
  rows = trained(folder)
  assert abs(rows[0]["kl/forward_samples"]) < 1e-3
  context, splits = splits_of(loaded, folder.parents[2])
  assert splits["train"].samples.shape[1] == 3
  validation = splits["validation"]
  sampled = validation.replace(
    responses=validation.samples,
    response_length=validation.sample_length,
    response_mask=np.arange(validation.samples.shape[-1]) < validation.sample_length[..., None],
    reference_logp=None,
    rewards=None,
  )
  params = load_params(folder, which="last")[0]["shared"]
  reference = load_params(folder.parents[1] / "sft")[0]["shared"]
  assert load_params(folder, which="last")[0]["frozen"] == {}  # one model in memory

  def logp(params, dataset):
    return inference.log_probabilities(context.policy, params, dataset, 8, MeshConfig())

  np.testing.assert_allclose(validation.sample_logp, logp(reference, sampled), atol=1e-4)
  h = logp(params, sampled) - validation.sample_logp
  evaluated = history(folder)[-1]
  assert evaluated["eval/kl/forward_samples"] == pytest.approx(-h.mean(), rel=1e-3, abs=1e-5)
  pairs = jnp.asarray(logp(params, validation) - validation.reference_logp)
  losses = objectives.distill(pairs, jnp.asarray(validation.rewards[0]), beta=0.5)
  wanted = float(losses.mean()) - 0.5 * h.mean()
  assert evaluated["eval/loss"] == pytest.approx(wanted, rel=1e-3)


def test_samples_that_nobody_draws_are_refused_before_anything_runs():
  with pytest.raises(UserError, match=r"set Score\.samples = 2 or more"):
    configure("ESTIMATOR='samples'")
  configure("ESTIMATOR='samples'", "Score.samples=2")


# --- gamma ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_schedule_of_gamma_is_followed(align):
  gamma = ("GAMMA=@LinearGamma()", "LinearGamma.start=0.1", "LinearGamma.end=0.5")
  folder, _ = align("pessimistic_dpo", *gamma, "LinearGamma.steps=4")
  values = [row["gamma/value"] for row in trained(folder)]
  np.testing.assert_allclose(values, [0.1, 0.2, 0.3, 0.4, 0.5], rtol=1e-6)


@pytest.mark.slow
def test_a_dual_gamma_takes_its_bound_from_the_scores(align):
  """And is evaluated: beta is known where epsilon is still to be measured."""
  gamma = ("GAMMA=@DualGamma()", "DualGamma.start=0.01", "DualGamma.rate=0.1")
  folder, loaded = align("ensemble", *gamma)
  _, splits = splits_of(loaded, folder.parents[2])
  margins = splits["train"].rewards[1:, :, 0] - splits["train"].rewards[1:, :, 1]
  epsilon = margins.var(0).mean()
  rows = trained(folder)
  assert rows[0]["gamma/epsilon"] == pytest.approx(epsilon, rel=1e-4)
  # `gamma/value` is that after the step, as the state is.
  log_alpha = np.log(0.5) - np.log([0.01] + [row["gamma/value"] for row in rows])
  for before, after, row in zip(log_alpha, log_alpha[1:], rows, strict=False):
    step = 0.1 * -row["gamma/slack"] / row["gamma/epsilon"]
    assert after - before == pytest.approx(step, rel=1e-2, abs=1e-5)
    assert (row["gamma/slack"] < 0) == (after > before)  # a violation lowers gamma
  align("ensemble", *gamma, only="evaluate")
  assert (folder.parents[1] / "evaluate/ensemble/evaluation.json").exists()


@pytest.mark.slow
def test_a_bound_that_no_policy_meets_is_a_users_mistake(tmp_path, scored):
  """Members that agree: two names of one model."""
  shutil.copytree(scored, tmp_path / "run")
  loaded = configure(*BASE, "GAMMA=@DualGamma()", "DualGamma.start=0.01", objectives=["ensemble"])
  context, splits = splits_of(loaded, tmp_path / "run")
  same = {
    name: split.replace(rewards=np.repeat(split.rewards[:1], 4, 0))
    for name, split in splits.items()
  }
  align = loaded.with_objective("ensemble").root.align
  with pytest.raises(UserError, match="the scores cannot feed this objective"):
    align.run(context, tmp_path / "there", same)
  assert not (tmp_path / "there").exists()


# --- state ----------------------------------------------------------------------------------------


class Killed(BaseException):
  """The end of the process."""


@pytest.mark.slow
@pytest.mark.parametrize(
  "bindings",
  [
    ("SELECTION='running'", "EnsembleDistill.members=3"),
    ("SELECTION='hull'", "EnsembleDistill.statistics='running'", "EnsembleDistill.members=3"),
    ("GAMMA=@DualGamma()", "DualGamma.start=0.01", "DualGamma.rate=0.5"),
  ],
  ids=["running", "hull", "dual"],
)
def test_an_objectives_state_survives_a_kill(align, monkeypatch, bindings):
  """Its moving averages decide later steps: lost, they would give other parameters."""
  whole, _ = align("ensemble", *bindings, place="whole")
  original = loop.Loader.batch

  def batch(self, step):
    if step == 3:
      raise Killed
    return original(self, step)

  with monkeypatch.context() as patch:
    patch.setattr(loop.Loader, "batch", batch)
    with pytest.raises(Killed):
      align("ensemble", *bindings, place="cut")
  cut, _ = align("ensemble", *bindings, place="cut")
  got, wanted = (
    Checkpoints(folder / "checkpoints", read_only=True).restore() for folder in (cut, whole)
  )
  assert wanted.state["carry"]
  assert_trees_equal(got.state, wanted.state)
  assert history(cut) == history(whole)


@pytest.mark.slow
def test_microbatches_of_a_coupled_objective_are_the_large_batch(align):
  """The member is picked on the whole batch; a part's own argmin would be another member's."""
  whole, _ = align("ensemble", place="whole")
  parts, _ = align("ensemble", "align/Training.microbatches=4", place="parts")
  for got, wanted in zip(history(parts), history(whole), strict=True):
    assert got.keys() == wanted.keys()
    # Signs and correlations of margins near 0 are those of rounding.
    for name in [n for n in wanted if not n.endswith(("accuracy", "correlation"))]:
      assert got[name] == pytest.approx(wanted[name], rel=2e-4, abs=2e-5), (got["step"], name)
  got, wanted = (load_params(folder, which="last")[0] for folder in (parts, whole))
  assert_trees_equal(got, wanted, rtol=2e-4, atol=2e-6)


# --- a function as an objective -------------------------------------------------------------------


def by_hand(log_ratios, batch, hyper, carry):
  """DPO, as a user would write it."""
  margin = hyper["beta"] * (log_ratios[:, 0] - log_ratios[:, 1])
  return jnp.logaddexp(0.0, -margin), None, carry


@pytest.mark.slow
def test_a_function_with_numbers_of_its_own_is_an_objective(align, monkeypatch, scored, tmp_path):
  wanted, _ = align("dpo", place="whole")
  monkeypatch.setattr(names, "_registered", {})
  config.public(by_hand)
  bindings = ("Align.objective=@by_hand", "Align.hyper={'beta': 0.5}")
  loaded = configure(*BASE, *bindings, objectives=[])
  shutil.copytree(scored, tmp_path / "own")
  for stage in ("align", "evaluate"):
    pipeline(loaded, tmp_path / "own", only=stage)
  got = tmp_path / "own/seed_0/align/by_hand"
  for mine, theirs in zip(history(got), history(wanted), strict=True):
    assert "margin/implicit_mean" in mine or "eval/margin/implicit_mean" in mine
    for name in mine:
      assert mine[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name
  assert_trees_equal(
    load_params(got, which="last")[0], load_params(wanted, which="last")[0], rtol=1e-3, atol=2e-5
  )
  evaluation = tmp_path / "own/seed_0/evaluate/by_hand/evaluation.json"
  assert '"beta": 0.5' in evaluation.read_text()


@pytest.mark.parametrize("only", [None, "align", "evaluate"])
def test_a_run_without_an_objective_says_how_to_choose_one_and_trains_nothing(tmp_path, only):
  loaded = configure(objectives=[])
  with pytest.raises(UserError, match="no objective is chosen: include one of gin/objectives/"):
    pipeline(loaded, tmp_path, only=only)
  assert not list(tmp_path.glob("seed_*"))


def test_numbers_are_arrays_where_they_are_schedules():
  loaded = configure(
    "GAMMA=@LinearGamma()",
    "LinearGamma.start=0.0",
    "LinearGamma.end=1.0",
    "LinearGamma.steps=4",
    objectives=["pessimistic_dpo"],
  )
  align = loaded.with_objective("pessimistic_dpo").root.align
  numbers = align.numbers()
  np.testing.assert_allclose(numbers["gamma"], [0, 0.25, 0.5, 0.75, 1.0])
  assert (numbers["beta"], align.beta) == (0.5, 0.5)
  other = dataclasses.replace(align.objective, beta=0.9)
  stage, again = (Alignment(loaded.root.policy, plug) for plug in (align.objective, other))
  assert (stage, hash(stage)) == (again, hash(again))  # one program for both
