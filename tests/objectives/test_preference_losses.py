"""DPO, IPO and the reward models' losses against their definitions."""

import jax
import jax.numpy as jnp
import naive_objectives as naive
import numpy as np
import pytest

from rmd_jax import objectives

pytestmark = pytest.mark.usefixtures("x64")
CLOSE = {"rtol": 1e-10, "atol": 1e-12}
dpo, bradley_terry, plackett_luce, rating = (
  jax.jit(f)
  for f in (objectives.dpo, objectives.bradley_terry, objectives.plackett_luce, objectives.rating)
)


def draw(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape)


def ranking(rows, count, seed=0):
  rng = np.random.default_rng(seed)
  return np.stack([rng.permutation(count) for _ in range(rows)])


def test_dpo_is_the_logistic_loss_of_the_implicit_margin():
  h = draw(16, 2)
  loss = dpo(h, beta=0.7)
  np.testing.assert_allclose(loss, naive.dpo(h, 0.7), **CLOSE)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpo_with_soft_labels_is_a_cross_entropy(smoothing):
  h, p = draw(16, 2), np.random.default_rng(1).uniform(size=16)
  loss = objectives.dpo(jnp.array(h), beta=0.7, preference=jnp.array(p), label_smoothing=smoothing)
  np.testing.assert_allclose(loss, naive.dpo(h, 0.7, p, smoothing), **CLOSE)


@pytest.mark.parametrize("count", [2, 3, 6])
def test_dpo_with_ranks_is_plackett_luce_on_the_implicit_rewards(count):
  h, ranks = draw(8, count), ranking(8, count)
  mask = np.ones((8, count), bool)
  loss = dpo(h, beta=0.7, ranks=ranks)
  np.testing.assert_allclose(loss, naive.plackett_luce(0.7 * h, ranks, mask), **CLOSE)


def test_ipo_aims_at_half_of_one_over_tau():
  h = draw(16, 2)
  expected = [(w - l - 1 / (2 * 0.3)) ** 2 for w, l in h]
  np.testing.assert_allclose(objectives.ipo(jnp.array(h), tau=0.3), expected, **CLOSE)


def test_mean_over_length_divides_and_skips_what_does_not_exist():
  h, lengths = jnp.array([[6.0, jnp.nan]]), jnp.array([[4, 0]])
  np.testing.assert_array_equal(objectives.mean_over_length(h, lengths), [[1.5, 0.0]])


def test_bradley_terry_with_all_its_options():
  r, p = draw(16, 2), np.random.default_rng(1).uniform(size=16)
  loss = bradley_terry(r, label_smoothing=0.1, margin=0.5, centre=0.01, preference=p)
  flipped = [0.9 * q + 0.1 * (1 - q) for q in p]
  expected = [
    naive.cross_entropy(q, w - l - 0.5) + 0.01 * (w + l) ** 2
    for q, (w, l) in zip(flipped, r, strict=True)
  ]
  np.testing.assert_allclose(loss, expected, **CLOSE)


def test_plackett_luce_skips_padding_and_reads_only_the_order_of_ranks():
  r, ranks = draw(8, 5), ranking(8, 5)
  mask = np.arange(5)[None] < np.arange(1, 9).clip(max=5)[:, None]
  poisoned = jnp.where(mask, r, jnp.nan)
  spread = jnp.where(mask, ranks * 10 - 3, 0)
  loss = plackett_luce(poisoned, spread, mask=mask)
  np.testing.assert_allclose(loss, naive.plackett_luce(r, ranks, mask), **CLOSE)
  assert loss[0] == 0.0  # one response leaves nothing to choose


def test_plackett_luce_of_pairs_is_bradley_terry():
  r = draw(8, 2)
  ranks = jnp.broadcast_to(jnp.array([0, 1]), r.shape)
  np.testing.assert_allclose(plackett_luce(r, ranks), bradley_terry(r), **CLOSE)


def test_tied_ranks_are_refused_but_those_of_padding_are_not():
  r, tied = jnp.zeros((2, 3)), jnp.array([[0, 1, 2], [0, 1, 1]])
  with pytest.raises(ValueError, match="example 1"):
    objectives.plackett_luce(r, tied)
  mask = jnp.array([[True, True, True], [True, True, False]])
  assert jnp.isfinite(objectives.plackett_luce(r, tied, mask=mask)).all()


@pytest.mark.parametrize("count", [2, 3, 6])
def test_rating_is_the_mean_square_over_pairs_of_differences(count):
  r, ratings = draw(2, 8, count)
  mask = np.ones((8, count), bool)
  loss = rating(r, ratings)
  np.testing.assert_allclose(loss, naive.distill(r, ratings, 1.0, mask), **CLOSE)


def test_rating_moves_rewards_and_never_the_ratings():
  r, ratings = (jnp.array(x) for x in draw(2, 4, 3))
  total = jax.jit(jax.grad(lambda a, b: objectives.rating(a, b).sum(), argnums=(0, 1)))
  by_rewards, by_ratings = total(r, ratings)
  assert jnp.abs(by_rewards).max() > 0.1
  assert (by_ratings == 0).all()


def test_forward_kl_is_the_mean_over_the_responses_and_never_over_tokens():
  h = jnp.array([[-1.0, -3.0, jnp.nan], [-4.0, jnp.nan, jnp.nan]])
  mask = ~jnp.isnan(h)
  np.testing.assert_array_equal(objectives.forward_kl(h, mask=mask), [2.0, 4.0])
  np.testing.assert_array_equal(
    objectives.forward_kl(jnp.array([[-1.0, -3.0]]), estimator="chosen"), [1.0]
  )
  np.testing.assert_array_equal(objectives.forward_kl_samples(h, mask=mask), [2.0, 4.0])
  np.testing.assert_array_equal(objectives.forward_kl_tokenwise(-h, mask=mask), [2.0, 4.0])


def test_bad_combinations_say_what_to_do():
  three = jnp.zeros((4, 3))
  ranks = jnp.broadcast_to(jnp.arange(3), (4, 3))
  with pytest.raises(ValueError, match="pass ranks"):
    objectives.dpo(three, beta=0.1)
  with pytest.raises(ValueError, match="label_smoothing"):
    objectives.dpo(three, beta=0.1, ranks=ranks, label_smoothing=0.1)
  with pytest.raises(ValueError, match="preference"):
    objectives.dpo(three, beta=0.1, ranks=ranks, preference=jnp.ones(4))
  with pytest.raises(ValueError, match="first of a pair"):
    objectives.forward_kl(three, estimator="chosen")
  with pytest.raises(ValueError, match="forward_kl_tokenwise"):
    objectives.forward_kl(three, estimator="tokenwise")
