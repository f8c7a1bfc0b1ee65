import itertools
import json
import math

import jaxtyping
import numpy as np
import pytest

from rmd_jax.evaluation import calibration as c


@pytest.fixture
def without_hook():
  """Users call without the shape-checking hook of the tests: errors must not depend on it."""
  before = jaxtyping.config.jaxtyping_disable
  jaxtyping.config.update("jaxtyping_disable", True)
  yield
  jaxtyping.config.update("jaxtyping_disable", before)


def pairs(models, count, seed, scale=1.5):
  """Calibrated models: labels are drawn from each margin's own Bradley-Terry probability."""
  generator = np.random.default_rng(seed)
  margins = generator.normal(0, scale, (models, count))
  rewards = np.stack([margins / 2, -margins / 2], -1)
  first = generator.random(count) < 1 / (1 + np.exp(-margins[0]))
  return rewards, first * 1.0


def test_a_calibrated_model_has_no_calibration_error_and_a_sure_one_has():
  rewards, first = pairs(1, 40_000, seed=0)
  margin = rewards[0, :, 0] - rewards[0, :, 1]
  assert c.calibration_error(c.reliability(margin, preference=first)) < 0.015
  curve = c.reliability(5 * margin, preference=first)
  accuracy = np.mean((margin > 0) == (first > 0.5))
  confidence = np.mean(1 / (1 + np.exp(-np.abs(5 * margin))))
  assert c.calibration_error(curve) == pytest.approx(confidence - accuracy, abs=0.01)


def test_reliability_bins_hold_every_pair_once():
  margin = np.array([0.0, 1e-9, 800.0, -800.0, 20.0])
  curve = c.reliability(margin, bins=4)
  assert sum(b["count"] for b in curve) == 5
  assert sum(b["weight"] for b in curve) == pytest.approx(1.0)
  assert curve[0] == pytest.approx({"confidence": 0.5, "accuracy": 0.75, "count": 2, "weight": 0.4})
  assert curve[-1]["confidence"] <= 1.0
  assert curve[-1]["accuracy"] == pytest.approx(2 / 3)


def test_nll_is_cross_entropy_and_finite_for_extreme_margins():
  margin, first = np.array([0.3, -2.0]), np.array([0.7, 0.0])
  chance = 1 / (1 + np.exp(-margin))
  expected = -np.mean(first * np.log(chance) + (1 - first) * np.log(1 - chance))
  assert c.nll(margin, preference=first) == pytest.approx(expected)
  assert c.nll(np.array([-1e4])) == pytest.approx(1e4)


def test_agreement_is_of_signs_with_ties_half():
  margins = np.array([[1.0, 1.0, -1.0, 0.0], [2.0, -3.0, -0.1, 5.0], [0.0, 0.0, 0.0, 0.0]])
  table = c.agreement(margins)
  assert table[0, 1] == (1 + 0 + 1 + 0.5) / 4
  assert table[0, 0] == 0.875
  assert table[1, 1] == 1.0
  np.testing.assert_allclose(table[2], 0.5)
  np.testing.assert_allclose(table, table.T)
  weighted = c.agreement(margins, weights=np.array([1.0, 0.0, 1.0, 0.0]))
  assert weighted[0, 1] == 1.0


def test_disagreement_is_the_population_variance_of_margins():
  margins = np.array([[1.0, 0.0], [3.0, 0.0]])
  np.testing.assert_allclose(c.disagreement(margins), [1.0, 0.0])


def test_buckets_of_length_part_the_pairs_and_find_a_length_bias():
  generator = np.random.default_rng(1)
  lengths = generator.integers(5, 40, (500, 2)).astype(float)
  rewards = lengths[None] * 0.1  # a model that likes length and nothing else; response 0 preferred
  report = c.reward_report(rewards, lengths, buckets=5)
  buckets = report["members"][0]["by_length"]
  assert sum(b["count"] for b in buckets) == 500
  assert buckets[0]["accuracy"] == 0.0
  assert buckets[-1]["accuracy"] == 1.0
  for left, right in itertools.pairwise(buckets):
    assert left["low"] <= left["high"] < right["low"]


def test_equal_lengths_share_one_bucket():
  report = c.reward_report(np.ones((1, 4, 2)), np.full((4, 2), 9))
  member = report["members"][0]
  assert member["by_length"] == [{"low": 0.0, "high": 0.0, "accuracy": 0.5, "count": 4}]
  assert member["by_response_length"] == [{"low": 9.0, "high": 9.0, "accuracy": 0.5, "count": 4}]


def test_swapping_responses_and_preference_changes_nothing():
  rewards, first = pairs(3, 200, seed=2)
  lengths = np.ones((200, 2))
  report = c.reward_report(rewards, lengths, preference=first)
  swapped = c.reward_report(rewards[:, :, ::-1], lengths, preference=1 - first)
  for a, b in zip(report["members"], swapped["members"], strict=True):
    assert a["accuracy"] == pytest.approx(b["accuracy"])
    assert a["nll"] == pytest.approx(b["nll"])
    assert a["ece"] == pytest.approx(b["ece"])
  np.testing.assert_allclose(report["agreement"], swapped["agreement"])


def test_a_constant_per_pair_changes_nothing():
  rewards, first = pairs(2, 100, seed=3)
  shift = np.random.default_rng(4).normal(size=(2, 100, 1)) * 3
  lengths = np.arange(200.0).reshape(100, 2)
  a = c.reward_report(rewards, lengths, preference=first)
  b = c.reward_report(rewards + shift, lengths, preference=first)
  assert a["disagreement_mean"] == pytest.approx(b["disagreement_mean"])
  assert a["members"][1]["nll"] == pytest.approx(b["members"][1]["nll"])


def test_pairs_without_weight_do_not_count():
  rewards, first = pairs(2, 50, seed=5)
  lengths = np.random.default_rng(6).integers(1, 9, (50, 2))
  weights = np.r_[np.ones(25), np.zeros(25)]
  whole = c.reward_report(rewards, lengths, preference=first, weights=weights)
  part = c.reward_report(rewards[:, :25], lengths[:25], preference=first[:25])
  for name in ("accuracy", "nll", "ece"):
    assert whole["members"][0][name] == pytest.approx(part["members"][0][name])
  assert whole["disagreement_mean"] == pytest.approx(part["disagreement_mean"])


def test_the_report_is_json_and_names_the_family():
  rewards, first = pairs(4, 30, seed=7)
  report = c.reward_report(rewards, np.ones((30, 2)), preference=first)
  assert json.loads(json.dumps(report, allow_nan=False)) == report
  assert [m["name"] for m in report["members"]] == ["all data", "member_1", "member_2", "member_3"]
  family = rewards[1:, :, 0] - rewards[1:, :, 1]
  assert report["disagreement_mean"] == pytest.approx(family.var(0).mean())
  alone = c.reward_report(rewards[:1], np.ones((30, 2)))
  assert alone["members"][0]["name"] == "all data"
  assert alone["disagreement_mean"] == 0.0


@pytest.mark.usefixtures("without_hook")
@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"rewards": np.ones((2, 3))}, r"\[models, pairs, 2\]"),
    ({"rewards": np.full((2, 3, 2), math.nan)}, "model 0 on pair 0"),
    ({"lengths": np.ones((2, 2))}, "lengths"),
    ({"weights": np.zeros(3)}, "sum to 0"),
    ({"preference": np.full(3, 1.5)}, "probabilities"),
    ({"names": ["a"]}, "1 names for 2"),
  ],
)
def test_inputs_that_do_not_fit_are_refused(change, words):
  given = {"rewards": np.ones((2, 3, 2)), "lengths": np.ones((3, 2))} | change
  with pytest.raises(ValueError, match=words):
    c.reward_report(given.pop("rewards"), given.pop("lengths"), **given)
