"""Records that are no plain pairs, through the whole pipeline: the losses are those of METHOD.

Every number is computed again here from stored scores, in NumPy and float64.
"""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from tiny_runs import Recast, configure, history, pipeline, with_data

from rmd_jax import cli
from rmd_jax.errors import UserError
from rmd_jax.stages import inference
from rmd_jax.stages.run import Pipeline
from rmd_jax.training.loop import load_params
from rmd_jax.training.partitioning import MeshConfig


def shaped(shape, *bindings, objectives):
  """A configuration of a world whose records have another shape."""
  loaded = configure("WorldSource.pairs=80", *bindings, objectives=objectives)
  world = loaded.root.data.source
  if shape in ("ranks", "ratings"):
    world = dataclasses.replace(world, responses=4, rho=None)
  return with_data(loaded, source=Recast(world, shape))


@dataclasses.dataclass
class Finished:
  """A run, and what its losses are computed again from."""

  directory: object
  loaded: object

  def __post_init__(self):
    self.context = Pipeline(self.loaded, self.directory, 0, None).context
    score, reward = self.loaded.root.score, self.loaded.root.reward
    self.splits = score.attach(self.context, reward, ("train", "validation", "test"))

  @property
  def validation(self):
    return self.splits["validation"]

  def evaluated(self, stage):
    """What was logged at the step whose parameters are the stage's result."""
    folder = self.directory / "seed_0" / stage
    step = load_params(folder)[2]
    rows = [row for row in history(folder) if row["step"] == step and "eval/loss" in row]
    return rows[0]

  def log_ratios(self, objective):
    params = load_params(self.directory / "seed_0/align" / objective)[0]["shared"]
    logp = inference.log_probabilities(
      self.context.policy, params, self.validation, 8, MeshConfig()
    )
    return (logp - self.validation.reference_logp).astype(float)

  def evaluation(self, objective):
    path = self.directory / "seed_0/evaluate" / objective / "evaluation.json"
    return json.loads(path.read_text())


def finish(tmp_path_factory, shape, *bindings, objectives):
  directory = tmp_path_factory.mktemp(shape)
  loaded = shaped(shape, *bindings, objectives=objectives)
  pipeline(loaded, directory)
  return Finished(directory, loaded)


def log_sigmoid(x):
  return -np.logaddexp(0.0, -x)


def plackett_luce(scores, ranks):
  """-log of the probability of drawing the ranking, best first, one by one."""
  total = np.zeros(len(scores))
  for row, (values, order) in enumerate(zip(scores, ranks, strict=True)):
    left = list(np.argsort(order))
    while left:
      best = values[left[0]]
      total[row] -= best - np.log(np.exp(values[left]).sum())
      left.pop(0)
  return total


def squares_over_pairs(errors):
  """The mean over pairs of the squared difference of errors."""
  pairs = itertools.combinations(range(errors.shape[1]), 2)
  return np.mean([(errors[:, j] - errors[:, k]) ** 2 for j, k in pairs], axis=0)


# --- four responses with ranks --------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranked(tmp_path_factory):
  return finish(tmp_path_factory, "ranks", objectives=["dpo", "ensemble"])


@pytest.mark.slow
def test_ranks_are_read_as_they_are(ranked):
  validation = ranked.validation
  assert validation.responses.shape[1] == 4
  assert sorted(map(tuple, np.sort(validation.ranks, 1))) == [(0, 1, 2, 3)] * len(validation)
  assert ranked.validation.ratings is None


@pytest.mark.slow
def test_reward_models_of_ranks_are_plackett_luce(ranked):
  row = ranked.evaluated("reward")
  for k, rewards in enumerate(ranked.validation.rewards):
    wanted = plackett_luce(rewards.astype(float), ranked.validation.ranks).mean()
    assert row[f"eval/loss_member_{k}"] == pytest.approx(wanted, rel=1e-4)
    order = -ranked.validation.ranks
    right = [
      np.sign(rewards[:, i] - rewards[:, j]) == np.sign(order[:, i] - order[:, j])
      for i, j in itertools.combinations(range(4), 2)
    ]
    assert row[f"eval/accuracy/member_{k}"] == pytest.approx(np.mean(right), abs=1e-4)


@pytest.mark.slow
def test_dpo_on_ranks_is_plackett_luce_of_the_implicit_rewards(ranked):
  wanted = plackett_luce(0.5 * ranked.log_ratios("dpo"), ranked.validation.ranks).mean()
  assert ranked.evaluated("align/dpo")["eval/loss"] == pytest.approx(wanted, rel=1e-4)


@pytest.mark.slow
def test_the_ensemble_distils_all_pairs_of_the_responses(ranked):
  h, rewards = ranked.log_ratios("ensemble"), ranked.validation.rewards[1:].astype(float)
  losses = [squares_over_pairs(member - 0.5 * h).mean() for member in rewards]
  row = ranked.evaluated("align/ensemble")
  # One batch of 8, and what is left, pick their members by themselves; gamma is 0.01.
  size = len(h)
  parts = [slice(0, 8), slice(8, size)] if size > 8 else [slice(0, size)]
  picked = [min(squares_over_pairs(m[p] - 0.5 * h[p]).mean() for m in rewards) for p in parts]
  wanted = np.average(picked, weights=[len(h[p]) for p in parts]) - 0.01 * h.mean()
  assert row["eval/loss"] == pytest.approx(wanted, rel=1e-3)
  for k, loss in enumerate(losses, 1):
    assert row[f"eval/ensemble/distance_{k}"] == pytest.approx(loss, rel=1e-3)


@pytest.mark.slow
def test_ranks_are_evaluated_by_best_and_worst(ranked):
  found = ranked.evaluation("dpo")
  test = ranked.splits["test"]
  with np.load(ranked.directory / "seed_0/evaluate/dpo/margins.npz") as margins:
    reward = margins["reward"]
  rows = np.arange(len(test))
  best, worst = test.ranks.argmin(1), test.ranks.argmax(1)
  np.testing.assert_allclose(reward, test.rewards[:, rows, best] - test.rewards[:, rows, worst])
  assert 0 <= found["implicit_accuracy"] <= 1


# --- four responses with ratings ------------------------------------------------------------------


@pytest.fixture(scope="module")
def rated(tmp_path_factory):
  return finish(tmp_path_factory, "ratings", "Distill.source='ratings'", objectives=["distill"])


@pytest.mark.slow
def test_reward_models_of_ratings_fit_their_differences(rated):
  ratings, row = rated.validation.ratings.astype(float), rated.evaluated("reward")
  for k, rewards in enumerate(rated.validation.rewards):
    wanted = squares_over_pairs(rewards.astype(float) - ratings).mean()
    assert row[f"eval/loss_member_{k}"] == pytest.approx(wanted, rel=1e-4)


@pytest.mark.slow
def test_ratings_are_distilled_as_a_reward_model_that_is_given(rated):
  errors = rated.validation.ratings.astype(float) - 0.5 * rated.log_ratios("distill")
  wanted = squares_over_pairs(errors).mean()
  assert rated.evaluated("align/distill")["eval/loss"] == pytest.approx(wanted, rel=1e-4)


@pytest.mark.slow
def test_an_objective_given_later_is_refused_before_it_is_aligned(rated):
  """The data folder is up to date by then, so that nobody looks at the data again."""
  bindings = "Distill.source='ratings'"
  loaded = shaped("ratings", bindings, objectives=["distill", "dpo"])
  with pytest.raises(UserError, match="the data cannot feed this objective: DPO takes pairs"):
    pipeline(loaded, rated.directory)
  assert not (rated.directory / "seed_0/align/dpo").exists()


# --- soft preferences -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def soft(tmp_path_factory):
  return finish(tmp_path_factory, "preference", objectives=["dpo", "ipo"])


@pytest.mark.slow
def test_soft_preferences_are_cross_entropy(soft):
  p, row = soft.validation.preference.astype(float), soft.evaluated("reward")
  assert 0.5 < p.min() < p.max() < 1

  def cross_entropy(margin):
    return -(p * log_sigmoid(margin) + (1 - p) * log_sigmoid(-margin)).mean()

  for k, rewards in enumerate(soft.validation.rewards.astype(float)):
    wanted = cross_entropy(rewards[:, 0] - rewards[:, 1])
    assert row[f"eval/loss_member_{k}"] == pytest.approx(wanted, rel=1e-4)
  h = soft.log_ratios("dpo")
  wanted = cross_entropy(0.5 * (h[:, 0] - h[:, 1]))
  assert soft.evaluated("align/dpo")["eval/loss"] == pytest.approx(wanted, rel=1e-4)


@pytest.mark.slow
def test_soft_preferences_in_ipo_are_an_expectation(soft):
  p, h = soft.validation.preference.astype(float), soft.log_ratios("ipo")
  margin = h[:, 0] - h[:, 1]
  wanted = (p * (margin - 5.0) ** 2 + (1 - p) * (-margin - 5.0) ** 2).mean()
  assert soft.evaluated("align/ipo")["eval/loss"] == pytest.approx(wanted, rel=1e-4)


# --- what cannot be fed ---------------------------------------------------------------------------


@pytest.fixture
def groups(tmp_path):
  """A file of groups of four responses with ratings."""
  path = tmp_path / "groups.jsonl"
  lines = []
  for i in range(80):
    responses = [f"answer {i} {j}" for j in range(4)]
    lines.append(
      json.dumps({"prompt": f"question {i}", "responses": responses, "ratings": [4, 3, 2, 1]})
    )
  path.write_text("\n".join(lines) + "\n")
  return path


@pytest.mark.parametrize("objective", ["dpo", "ipo", "pessimistic_dpo"])
def test_preferences_on_groups_without_ranks_are_refused_before_training(
  groups, tmp_path, capsys, objective
):
  flags = [
    f"--gin.DATA_FILES={str(groups)!r}",
    f"--gin.Run.objectives={['distill', objective]}",
    f"--run_dir={tmp_path / 'run'}",
  ]
  for command in ("run", "sft"):
    assert cli.main([command, "--gin_file=runs/jsonl.gin", *flags]) == 2
    said = capsys.readouterr().err
    assert f"rmd {command}: the data cannot feed this objective: " in said
    assert "takes pairs, and this data has 4 responses a prompt: " in said
    assert not (tmp_path / "run/seed_0/sft").exists()
    assert not json.loads((tmp_path / "run/seed_0/data/stage.json").read_text())["done"]


def test_the_number_of_members_is_checked_before_training(tmp_path):
  loaded = configure("SELECTION='running'", "EnsembleDistill.members=5", objectives=["ensemble"])
  with pytest.raises(UserError, match=r"EnsembleDistill.members=5, but rewards have 3"):
    pipeline(loaded, tmp_path)
  assert not (tmp_path / "seed_0/sft").exists()


def test_a_family_of_none_has_no_ensemble(tmp_path):
  loaded = configure("Reward.family=0", objectives=["ensemble"])
  with pytest.raises(UserError, match="EnsembleDistill needs a family"):
    pipeline(loaded, tmp_path)
  assert not (tmp_path / "seed_0/sft").exists()
