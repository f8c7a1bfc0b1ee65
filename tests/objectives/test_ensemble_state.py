"""The hull's quadratic programme, and the selections that keep moving averages."""

import functools

import jax
import jax.numpy as jnp
import naive_objectives as naive
import numpy as np
import pytest

from rmd_jax import objectives

pytestmark = pytest.mark.usefixtures("x64")
nearest = jax.jit(objectives.nearest_in_hull)
K, B, N = 5, 16, 2
BETA = 0.5


def programme(rng, size, rank):
  factor = rng.normal(size=(size, rank))
  return factor @ factor.T / rank, rng.normal(size=size)


def objective(weights, gram, cross):
  return weights @ gram @ weights - 2 * cross @ weights


def draw(seed, rows=B):
  """Members that share a base reward, as reward models do, and a policy near it."""
  rng = np.random.default_rng(seed)
  base = rng.normal(size=(rows, N))
  r = base + 0.7 * rng.normal(size=(K, rows, N))
  return (base + rng.normal(size=(rows, N))) / BETA, r


@functools.partial(jax.jit, static_argnames=("selection", "statistics"))
def run(h, r, state, update, selection="hull", statistics="batch"):
  return objectives.ensemble_distill(
    h,
    r,
    beta=BETA,
    selection=selection,
    statistics=statistics,
    state=state,
    update=update,
  )


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_the_programme_is_solved_to_rounding(size):
  rng = np.random.default_rng(size)
  for _ in range(20):
    gram, cross = programme(rng, size, rank=size + 2)
    weights = np.array(nearest(gram, cross))
    np.testing.assert_allclose(weights, naive.simplex_minimum(gram, cross), atol=1e-8)
    assert (weights >= 0).all()
    np.testing.assert_allclose(weights.sum(), 1.0, rtol=1e-12)


def test_sixteen_members_of_low_rank_meet_the_conditions_of_optimality():
  rng = np.random.default_rng(0)
  for rank in (1, 3, 15):
    for scale in (1e-3, 1.0, 1e3):
      gram, cross = programme(rng, 16, rank)
      weights = np.array(nearest(scale * gram, scale * cross))
      slope = scale * (gram @ weights - cross) + 1e-6 * weights
      level = weights @ slope
      # No member would lower the objective, and those that count stand at the same level.
      assert (slope >= level - 1e-8 * scale - 1e-12).all()
      np.testing.assert_allclose(slope[weights > 0], level, atol=1e-8 * scale)


def test_single_precision_reaches_the_same_value():
  rng = np.random.default_rng(1)
  for rank in (2, 10):
    gram, cross = programme(rng, 8, rank)
    single = np.array(nearest(jnp.float32(gram), jnp.float32(cross)))
    assert single.dtype == np.float32
    best = objective(naive.simplex_minimum(gram, cross), gram, cross)
    assert objective(single.astype(float), gram, cross) <= best + 1e-4


def test_equal_members_share_their_weight_evenly():
  rng = np.random.default_rng(2)
  gram, cross = programme(rng, 2, 4)
  twice = np.repeat(np.repeat(gram, 2, 0), 2, 1)
  weights = np.array(nearest(twice, np.repeat(cross, 2)))
  np.testing.assert_allclose(weights[::2], weights[1::2], atol=1e-6)
  np.testing.assert_allclose(nearest(np.zeros((4, 4)), np.zeros(4)), np.full(4, 0.25))


def test_no_solution_is_worse_than_the_best_member_however_large_the_numbers():
  rng = np.random.default_rng(3)
  for scale in (1.0, 1e4, 1e8):
    gram, cross = programme(rng, 8, 3)
    weights = np.array(nearest(jnp.float32(gram), jnp.float32(scale * cross)), float)
    members = np.diagonal(gram) - 2 * scale * cross
    assert np.isfinite(weights).all()
    assert objective(weights, gram, scale * cross) <= members.min() + 1e-5 * scale


def test_hull_is_the_programme_on_the_batch():
  h, r = draw(0)
  mask, weights = np.ones((B, N), bool), np.ones(B)
  losses, chosen = run(h, r, None, 1.0)
  margins = r[:, :, 0] - r[:, :, 1]
  implicit = BETA * (h[:, 0] - h[:, 1])
  expected = naive.simplex_minimum(margins @ margins.T / B, margins @ implicit / B)
  np.testing.assert_allclose(chosen.weights, expected, atol=1e-6)
  np.testing.assert_allclose(
    losses.mean(), naive.hull_value(expected, h, r, BETA, mask, weights), rtol=1e-6
  )


def test_hull_is_below_batch_and_batch_is_below_every_member():
  for seed in range(10):
    h, r = draw(seed)
    hull = run(h, r, None, 1.0)[0].mean()
    batch = run(h, r, None, 1.0, selection="batch")[0].mean()
    members = [naive.distill(h, m, BETA, np.ones((B, N), bool)).mean() for m in r]
    assert hull <= batch + 1e-6
    np.testing.assert_allclose(batch, min(members), rtol=1e-9)


def test_running_picks_by_bias_corrected_averages_after_the_update():
  state, total, mass = None, 0.0, 0.0
  for step in range(6):
    h, r = draw(step)
    _, chosen = run(h, r, state, 1.0, selection="running")
    means = np.array([naive.distill(h, m, BETA, np.ones((B, N), bool)).mean() for m in r])
    total, mass = 0.99 * total + 0.01 * means, 0.99 * mass + 0.01
    np.testing.assert_array_equal(chosen.weights, np.eye(K)[np.argmin(total / mass)])
    np.testing.assert_allclose(chosen.state.sums[0], total, rtol=1e-6)
    state = chosen.state


@pytest.mark.parametrize(("selection", "statistics"), [("running", "batch"), ("hull", "running")])
def test_evaluation_reads_the_averages_and_leaves_them(selection, statistics):
  _, trained = run(*draw(0), None, 1.0, selection, statistics)
  _, after = run(*draw(1), trained.state, 0.0, selection, statistics)
  np.testing.assert_allclose(after.weights, trained.weights, atol=1e-9)
  for old, new in zip(jax.tree.leaves(trained.state), jax.tree.leaves(after.state), strict=True):
    np.testing.assert_array_equal(old, new)


@pytest.mark.slow
def test_running_statistics_keep_the_hull_from_fitting_small_batches():
  h, r = draw(99, rows=4000)
  margins, implicit = r[:, :, 0] - r[:, :, 1], BETA * (h[:, 0] - h[:, 1])

  def population(weights):
    return ((weights @ margins - implicit) ** 2).mean()

  best = population(naive.simplex_minimum(margins @ margins.T / 4000, margins @ implicit / 4000))
  state, excess = None, []
  for rows in np.arange(4000).reshape(-1, B)[:100]:
    alone = np.array(run(h[rows], r[:, rows], None, 1.0)[1].weights)
    _, chosen = run(h[rows], r[:, rows], state, 1.0, statistics="running")
    state = chosen.state
    excess.append((population(alone) - best, population(np.array(chosen.weights)) - best))
  alone, averaged = np.mean(excess[50:], axis=0)
  assert alone > 10 * averaged > 0


def test_a_state_of_another_selection_is_refused():
  h, r = (jnp.array(x) for x in draw(0))
  state = objectives.initial_state(K, selection="running")
  with pytest.raises(ValueError, match="another selection or number of members"):
    objectives.ensemble_distill(h, r, beta=1.0, selection="hull", statistics="running", state=state)
  assert objectives.initial_state(K, selection="batch") is None


def test_combinations_that_mean_nothing_are_refused():
  h, r = (jnp.array(x) for x in draw(0))
  with pytest.raises(ValueError, match="quadratic programme"):
    objectives.ensemble_distill(h, r, beta=1.0, selection="hull", form="bernoulli")
  with pytest.raises(ValueError, match="belongs to 'hull'"):
    objectives.ensemble_distill(h, r, beta=1.0, selection="batch", statistics="running")
