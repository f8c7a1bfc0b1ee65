"""Member weights and length-biased resampling: shares, independence from order, refusals."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rmd_jax.data import hashing, subsets
from rmd_jax.data.batch import Dataset
from rmd_jax.data.subsets import (
  AllData,
  BiasedSubsets,
  BootstrapSubsets,
  DisjointSubsets,
  LengthBiased,
)
from rmd_jax.errors import UserError

GOLDEN_BOOTSTRAP = [[0, 0, 0, 0, 1, 1, 0, 1, 0, 0, 0, 2], [0, 0, 1, 1, 0, 1, 0, 2, 2, 0, 0, 0]]
GOLDEN_DISJOINT = [0, 2, 1, 2, 2, 0, 0, 2, 0, 0, 2, 1]
KINDS = (AllData(), BootstrapSubsets(), DisjointSubsets(), BiasedSubsets())


def pairs(lengths, **columns):
  """A data set of pairs with the given response lengths [M, 2], and nothing in them."""
  lengths = np.asarray(lengths, np.int32).reshape(-1, 2)
  count, longest = len(lengths), int(lengths.max(initial=1))
  return Dataset(
    ids=np.array([f"pair {i}" for i in range(count)]),
    prompt=np.ones((count, 1), np.int32),
    prompt_length=np.ones(count, np.int32),
    responses=np.ones((count, 2, longest), np.int32),
    response_length=lengths,
    response_mask=np.arange(longest) < lengths[..., None],
    weight=np.ones(count, np.float32),
    **columns,
  )


def mixed(count, won=0.6, tied=0.1, seed=0):
  """The longer wins in a fraction `won` of the pairs; a fraction `tied` has no longer response."""
  rng = np.random.default_rng(seed)
  long_first = np.where(rng.random((count, 1)) < won, [20, 10], [10, 20])
  return pairs(np.where(rng.random((count, 1)) < tied, 15, long_first))


def share(dataset, weights):
  """The weighted fraction in which the longer wins, from the lengths, no code of ours."""
  first, second = dataset.response_length.T
  return weights[first > second].sum() / weights[first != second].sum()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: type(kind).__name__)
def test_weights_follow_the_id_and_not_the_order(kind):
  dataset = mixed(400)
  weights = kind.weights(dataset, 5, 7)
  assert (weights.shape, weights.dtype) == ((5, 400), np.float32)
  np.testing.assert_array_equal(weights, kind.weights(dataset, 5, 7))
  shuffled = np.random.default_rng(1).permutation(400)
  np.testing.assert_array_equal(kind.weights(dataset.take(shuffled), 5, 7), weights[:, shuffled])


@pytest.mark.parametrize("kind", KINDS[1:], ids=lambda kind: type(kind).__name__)
def test_another_seed_draws_anew(kind):
  dataset = mixed(400)
  assert (kind.weights(dataset, 5, 7) != kind.weights(dataset, 5, 8)).mean() > 0.1


def test_a_member_of_the_bootstrap_does_not_depend_on_how_many_there_are():
  dataset = mixed(100)
  few, many = (BootstrapSubsets().weights(dataset, k, 0) for k in (2, 6))
  np.testing.assert_array_equal(few, many[:2])


def test_weights_are_these_forever():
  """A resumed run and an added member need the very same draws: change them and runs break."""
  dataset = mixed(12)
  assert BootstrapSubsets().weights(dataset, 2, 3).astype(int).tolist() == GOLDEN_BOOTSTRAP
  assert DisjointSubsets().weights(dataset, 3, 3).argmax(0).tolist() == GOLDEN_DISJOINT


def test_bootstrap_is_poisson_and_members_are_independent():
  weights = BootstrapSubsets().weights(mixed(20_000), 3, 0)
  for k in range(3):
    for times, probability in enumerate((0.36788, 0.36788, 0.18394, 0.06131, 0.01533)):
      assert (weights[k] == times).mean() == pytest.approx(probability, abs=0.012)
  assert np.abs(np.corrcoef(weights) - np.eye(3)).max() < 0.03


def test_disjoint_subsets_cover_everything_once():
  weights = DisjointSubsets().weights(mixed(3000), 4, 0)
  np.testing.assert_array_equal(weights.sum(0), 1)
  assert weights.mean(1) == pytest.approx([0.25] * 4, abs=0.03)


@pytest.mark.parametrize("natural", [0.2, 0.61, 0.8])
def test_biased_subsets_reach_their_targets(natural):
  dataset = mixed(30_000, won=natural)
  targets = (0.2, 0.4, 0.5, 0.6, 0.8)
  weights = BiasedSubsets(targets).weights(dataset, 5, 0)
  assert set(np.unique(weights)) == {0.0, 1.0}
  undecided = dataset.response_length[:, 0] == dataset.response_length[:, 1]
  assert undecided.any()
  assert (weights[:, undecided] == 1).all()
  for target, own in zip(targets, weights, strict=True):
    assert share(dataset, own) == pytest.approx(target, abs=0.015)


def test_biased_subsets_keep_as_much_as_the_target_allows():
  dataset = mixed(30_000, won=0.6, tied=0)
  kept = BiasedSubsets((0.2, 0.6)).weights(dataset, 2, 0).mean(1)
  assert kept == pytest.approx([0.5, 1.0], abs=0.01)  # all of the 40 %, and a quarter as many


@settings(max_examples=12, deadline=None)
@given(won=st.floats(0.1, 0.9), rho=st.floats(0.05, 0.95), seed=st.integers(0, 9))
def test_resampling_reaches_any_share(won, rho, seed):
  dataset = mixed(2000, won=won)
  rows = subsets.resample_to(dataset, rho, seed)
  assert (np.diff(rows) > 0).all()
  kept = dataset.take(rows)
  decided = (kept.response_length[:, 0] != kept.response_length[:, 1]).sum()
  assert subsets.longer_wins(kept) == pytest.approx(rho, abs=5 * 0.5 / np.sqrt(decided))


def test_resampling_follows_the_ids():
  dataset = mixed(500)
  rows = LengthBiased(0.3).rows(dataset, 5)
  order = np.random.default_rng(2).permutation(500)
  again = dataset.take(order).take(LengthBiased(0.3).rows(dataset.take(order), 5))
  assert 0 < len(rows) < 500
  assert sorted(dataset.ids[rows]) == sorted(again.ids)


@pytest.mark.parametrize("rho", [0.0, 1.0])
def test_the_ends_of_the_range_leave_one_side(rho):
  dataset = mixed(500)
  assert subsets.longer_wins(dataset.take(subsets.resample_to(dataset, rho, 0))) == rho


@pytest.mark.parametrize(
  ("first", "second", "wins"),
  [(11, 10, 1), (10, 11, -1), (10, 10, 0), (109, 100, 0), (110, 100, 1), (22, 20, 1), (21, 20, 0)],
)
def test_longer_means_ten_per_cent_more(first, second, wins):
  assert subsets.length_wins(pairs([[first, second]])).tolist() == [wins]


@pytest.mark.parametrize(
  ("column", "values"),
  [
    ("preference", np.float32([1, 0.2, 0.5])),
    ("ranks", np.int32([[0, 1], [1, 0], [0, 0]])),
    ("ratings", np.float32([[5, 1], [1, 5], [3, 3]])),
  ],
)
def test_the_winner_is_who_the_labels_say(column, values):
  dataset = pairs([[20, 10]] * 3, **{column: values})
  assert subsets.length_wins(dataset).tolist() == [1, -1, 0]


def test_longer_wins_counts_decided_pairs_alone():
  assert subsets.longer_wins(pairs([[20, 10], [10, 20], [20, 10], [10, 10]])) == 2 / 3
  assert np.isnan(subsets.longer_wins(pairs([[10, 10]])))


def test_what_cannot_be_is_refused():
  dataset = mixed(100)
  with pytest.raises(UserError, match=r"5 members .* the family has 3"):
    BiasedSubsets().weights(dataset, 3, 0)
  with pytest.raises(UserError, match="outside 0 to 1"):
    subsets.resample_to(dataset, 1.2, 0)
  with pytest.raises(UserError, match="wins in 3 pairs and loses in 0"):
    subsets.resample_to(pairs([[20, 10]] * 3), 0.5, 0)
  with pytest.raises(UserError, match=r"member . of 9 gets none of 2 examples"):
    DisjointSubsets().weights(pairs([[20, 10]] * 2), 9, 0)
  triple = dataclasses.replace(dataset, response_length=np.full((100, 3), 2))
  with pytest.raises(UserError, match="3 responses"):
    subsets.longer_wins(triple)


def test_uniform_is_uniform_and_keyed():
  values = hashing.uniform(np.arange(20_000), "a", 1)
  assert ((values >= 0) & (values < 1)).all()
  counts, _ = np.histogram(values, 20, (0, 1))
  assert ((counts - 1000) ** 2 / 1000).sum() < 45  # chi-square, 19 degrees: p = 0.0007
  assert abs(np.corrcoef(values, hashing.uniform(np.arange(20_000), "a", 2))[0, 1]) < 0.03
  assert abs(np.corrcoef(values[1:], values[:-1])[0, 1]) < 0.03
  assert hashing.hash64("a", "b") != hashing.hash64("ab", "")
