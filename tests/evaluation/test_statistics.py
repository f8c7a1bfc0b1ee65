import math

import jaxtyping
import numpy as np
import pytest
from scipy import optimize, stats

from rmd_jax.evaluation import statistics as s


@pytest.fixture
def without_hook():
  """Users call without the shape-checking hook of the tests: errors must not depend on it."""
  before = jaxtyping.config.jaxtyping_disable
  jaxtyping.config.update("jaxtyping_disable", True)
  yield
  jaxtyping.config.update("jaxtyping_disable", before)


def test_bootstrap_interval_covers_the_mean_as_often_as_it_says():
  generator = np.random.default_rng(0)
  covered = 0
  for trial in range(300):
    values = generator.exponential(size=60)
    _, low, high = s.bootstrap_interval(values, trial, samples=400)
    covered += low <= 1.0 <= high
  assert 0.90 <= covered / 300 <= 0.97  # percentile intervals of skewed data undercover a little


def test_bootstrap_interval_is_that_of_the_normal_on_large_samples():
  values = np.random.default_rng(1).normal(3.0, 2.0, 4000)
  mean, low, high = s.bootstrap_interval(values, 0)
  assert mean == pytest.approx(values.mean())
  half = 1.96 * values.std() / math.sqrt(4000)
  assert (high - low) / 2 == pytest.approx(half, rel=0.08)
  assert s.bootstrap_interval(values, 0, level=0.5).high < high


def test_bootstrap_is_deterministic_in_its_seed():
  values = np.random.default_rng(2).normal(size=50)
  assert s.bootstrap_interval(values, 7) == s.bootstrap_interval(values, 7)
  assert s.bootstrap_interval(values, 7) != s.bootstrap_interval(values, 8)


def test_a_large_bootstrap_in_chunks_is_the_small_one(monkeypatch):
  values = np.random.default_rng(3).normal(size=100)
  whole = s.bootstrap_interval(values, 0, samples=500)
  monkeypatch.setattr(s, "_CHUNK", 1000)
  assert s.bootstrap_interval(values, 0, samples=500) == pytest.approx(whole)


def test_clustering_by_prompt_averages_prompts_and_widens_the_interval():
  generator = np.random.default_rng(4)
  level = generator.normal(size=40)
  values = np.repeat(level, 25)  # 25 samples that say the same thing
  prompts = np.repeat([f"p{i}" for i in range(40)], 25)
  naive = s.bootstrap_interval(values, 0)
  clustered = s.bootstrap_interval(values, 0, prompts=prompts)
  assert clustered.mean == pytest.approx(level.mean())
  assert (clustered.high - clustered.low) > 4 * (naive.high - naive.low)
  unequal = s.bootstrap_interval(
    np.array([0.0, 0.0, 0.0, 1.0]), 0, prompts=np.array(["a", "a", "a", "b"])
  )
  assert unequal.mean == 0.5


def test_one_prompt_has_no_interval_and_says_so_in_json():
  interval = s.bootstrap_interval(np.array([1.0, 3.0]), 0, prompts=np.array([5, 5]))
  assert interval.mean == 2.0
  assert math.isnan(interval.low)
  assert math.isnan(interval.high)
  assert interval.json(n=1) == {"mean": 2.0, "low": None, "high": None, "n": 1}


@pytest.mark.usefixtures("without_hook")
@pytest.mark.parametrize(
  ("values", "words"),
  [([], "non-empty"), ([1.0, math.nan], "first at 1"), ([[1.0]], "vector")],
)
def test_values_that_cannot_be_averaged_are_refused(values, words):
  with pytest.raises(ValueError, match=words):
    s.bootstrap_interval(np.array(values, float), 0)


@pytest.mark.usefixtures("without_hook")
def test_prompts_of_another_length_are_refused():
  with pytest.raises(ValueError, match="expected 3 ids"):
    s.bootstrap_interval(np.ones(3), 0, prompts=np.array([1, 2]))


def test_over_seeds_one_seed_is_the_plain_interval_and_more_add_their_spread():
  generator = np.random.default_rng(5)
  seeds = [shift + generator.normal(size=300) for shift in (-1.0, 0.0, 1.0)]
  single = s.bootstrap_over_seeds(seeds[:1], 0)
  plain = s.bootstrap_interval(seeds[0], 0)
  assert single.mean == plain.mean
  assert single.low == pytest.approx(plain.low, abs=0.02)
  pooled = s.bootstrap_interval(np.concatenate(seeds), 0)
  several = s.bootstrap_over_seeds(seeds, 0)
  assert several.mean == pytest.approx(np.mean([x.mean() for x in seeds]))
  assert several.high - several.low > 3 * (pooled.high - pooled.low)


def test_over_seeds_takes_another_number_of_prompts_in_each_seed():
  values = [np.arange(4.0), np.arange(6.0)]
  prompts = [np.array([0, 0, 1, 1]), np.arange(6)]
  assert s.bootstrap_over_seeds(values, 0, prompts=prompts).mean == 2.0
  with pytest.raises(ValueError, match="2 arrays of values but 1"):
    s.bootstrap_over_seeds(values, 0, prompts=prompts[:1])


def test_summaries_of_seeds_give_what_their_values_give():
  generator = np.random.default_rng(6)
  seeds = [shift + generator.normal(size=400) for shift in (0.0, 0.1, 0.3, 0.5)]
  exact = s.bootstrap_over_seeds(seeds, 0, samples=8000)
  combined = s.combine_seeds([s.bootstrap_interval(x, 0) for x in seeds], 0, samples=8000)
  np.testing.assert_allclose(combined, exact, atol=0.02)


def test_seeds_that_agree_are_still_as_unsure_as_their_prompts():
  same = [s.Interval(1.0, 1.0 - 0.98, 1.0 + 0.98)] * 4  # standard error 0.5, of the mean 0.25
  mean, low, high = s.combine_seeds(same, 0, samples=20_000)
  assert mean == 1.0
  assert (low, high) == pytest.approx((1 - 0.49, 1 + 0.49), abs=0.02)


def test_combining_one_summary_changes_nothing_and_numbers_without_bounds_combine():
  one = s.Interval(1.0, 0.5, 2.0)
  assert s.combine_seeds([one], 0) == one
  bare = [s.Interval(x, math.nan, math.nan) for x in (1.0, 2.0, 3.0)]
  mean, low, high = s.combine_seeds(bare, 0)
  assert mean == 2.0
  assert 1.0 <= low < 2.0 < high <= 3.0


def test_ties_win_one_half():
  won = s.wins(np.array([1.0, 2.0, 3.0]), np.array([2.0, 2.0, 2.0]))
  np.testing.assert_array_equal(won, [0.0, 0.5, 1.0])
  assert s.win_rate(np.array([2.0, 2.0]), np.array([2.0, 1.0]), 0).mean == 0.75


@pytest.mark.usefixtures("without_hook")
def test_scores_of_unequal_number_are_refused():
  with pytest.raises(ValueError, match="policy has 2 values but reference has 1"):
    s.wins(np.ones(2), np.ones(1))


def test_a_paired_difference_is_tighter_than_what_each_side_knows():
  generator = np.random.default_rng(7)
  difficulty = generator.normal(size=200) * 5
  first, second = difficulty + 1 + generator.normal(size=200), difficulty
  pair = s.paired_difference(first, second, 0)
  alone = s.bootstrap_interval(first, 0)
  assert pair.mean == pytest.approx((first - second).mean())
  assert pair.low > 0.5
  assert (pair.high - pair.low) < 0.5 * (alone.high - alone.low)


def comparisons(count, theta, phi, seed, shift=0.0):
  generator = np.random.default_rng(seed)
  difference = np.round(generator.normal(shift, 10, count))
  chance = 1 / (1 + np.exp(-(theta + phi * np.tanh(difference / difference.std()))))
  won = generator.random(count) < chance
  return won * 1.0, 100 + difference, np.full(count, 100.0), difference


def test_length_control_is_the_penalised_maximum_likelihood():
  won, policy, reference, d = comparisons(300, 0.2, 1.0, seed=8, shift=6.0)
  result = s.length_controlled_win_rate(won, np.full(300, 0.5), policy, reference, 0, samples=20)
  x = np.tanh(d / d.std())

  def negative(p):
    logit = p[0] + p[1] * x
    return np.sum(np.log1p(np.exp(logit)) - won * logit) + p[1] ** 2 / (2 * 2.5**2)

  best = optimize.minimize(negative, [0.0, 0.0], tol=1e-10).x
  assert result.mean == pytest.approx(1 / (1 + np.exp(-best[0])), abs=1e-5)
  assert result.length_effect == pytest.approx(best[1], abs=1e-4)


def test_length_control_takes_away_a_win_rate_that_length_bought():
  won, policy, reference, _ = comparisons(4000, 0.0, 2.0, seed=9, shift=8.0)
  losing = np.full(4000, 0.5)
  raw = s.win_rate(won, losing, 0, samples=50)
  controlled = s.length_controlled_win_rate(won, losing, policy, reference, 0, samples=100)
  assert raw.mean > 0.65
  assert controlled.low < 0.5 < controlled.high
  assert not controlled.extrapolates


@pytest.mark.parametrize("lengths", [0.0, 7.0])
def test_length_control_with_constant_lengths_is_the_win_rate(lengths):
  generator = np.random.default_rng(10)
  policy, reference = generator.normal(size=(2, 80))
  base = np.full(80, 20.0)
  plain = s.win_rate(policy, reference, 0)
  result = s.length_controlled_win_rate(policy, reference, base + lengths, base, 0)
  assert result.mean == pytest.approx(plain.mean, abs=1e-7)
  assert result.low == pytest.approx(plain.low, abs=0.03)
  assert result.length_effect == 0.0
  assert not result.extrapolates


@pytest.mark.parametrize(("score", "rate"), [(1.0, 1.0), (0.0, 0.5), (-1.0, 0.0)])
def test_length_control_of_constant_outcomes_is_that_outcome(score, rate):
  policy_lengths = np.arange(1.0, 31.0)
  result = s.length_controlled_win_rate(
    np.full(30, score), np.zeros(30), policy_lengths, np.full(30, 15.0), 0, samples=50
  )
  np.testing.assert_allclose(result[:3], rate, atol=1e-9)


def test_length_control_is_finite_where_length_separates_wins_from_losses():
  difference = np.r_[np.arange(-40.0, 0.0), np.arange(1.0, 41.0)]
  won = (difference > 0) * 1.0
  result = s.length_controlled_win_rate(
    won, np.full(80, 0.5), 50 + difference, np.full(80, 50.0), 0, samples=200
  )
  assert np.isfinite(result[:4]).all()
  assert result.mean == pytest.approx(0.5, abs=1e-6)
  assert result.low < 0.5 < result.high


def test_length_control_says_when_no_comparison_has_equal_lengths():
  won, policy, reference, _ = comparisons(200, 0.0, 1.0, seed=11, shift=60.0)
  result = s.length_controlled_win_rate(won, np.full(200, 0.5), policy, reference, 0, samples=20)
  assert result.extrapolates
  assert result.json()["extrapolates"] is True


def test_length_control_weighs_every_prompt_the_same():
  won, policy, reference, _ = comparisons(60, 0.3, 1.0, seed=12)
  once = s.length_controlled_win_rate(won, np.full(60, 0.5), policy, reference, 0, samples=20)
  copies = np.r_[np.arange(60), np.zeros(200, int)]  # prompt 0 has 201 identical samples
  many = s.length_controlled_win_rate(
    won[copies], np.full(260, 0.5), policy[copies], reference[copies], 0, prompts=copies, samples=20
  )
  assert many.mean == pytest.approx(once.mean, abs=1e-7)


def test_implicit_accuracy_counts_ties_half_and_reads_soft_labels():
  margins = np.array([1.0, 0.0, -1.0])
  assert s.implicit_accuracy(margins) == 0.5
  assert s.implicit_accuracy(margins, preference=np.array([0.8, 1.0, 0.0])) == pytest.approx(
    (0.8 + 0.5 + 1.0) / 3
  )
  assert s.implicit_accuracy(margins, weights=np.array([1.0, 1.0, 0.0])) == 0.75


def test_correlation_is_pearsons_and_survives_constants_without_a_warning():
  generator = np.random.default_rng(13)
  a = generator.normal(size=100)
  b = 0.5 * a + generator.normal(size=100)
  assert s.correlation(a, b) == pytest.approx(stats.pearsonr(a, b).statistic)
  assert s.correlation(a, -3 * a + 1e6) == pytest.approx(-1.0)
  assert math.isnan(s.correlation(np.full(100, 0.1), b))
  assert math.isnan(s.correlation(np.ones(1), np.ones(1)))


def test_divergences_of_two_known_normals():
  generator = np.random.default_rng(14)
  reference, policy = generator.normal(0, 1, 40_000), generator.normal(0.5, 2.0, 40_000)

  def log_ratio(x):
    return stats.norm.logpdf(x, 0.5, 2.0) - stats.norm.logpdf(x, 0, 1)

  forward = math.log(2.0) + (1 + 0.25) / (2 * 4) - 0.5
  reverse = math.log(0.5) + (4 + 0.25) / 2 - 0.5
  estimate = s.kl_forward(log_ratio(reference), 0, samples=200)
  assert estimate.low < forward < estimate.high
  estimate = s.kl_reverse(log_ratio(policy), 0, samples=200)
  assert estimate.low < reverse < estimate.high
