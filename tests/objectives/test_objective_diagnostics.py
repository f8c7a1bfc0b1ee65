"""Diagnostics against their definitions, and rows that must not count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmd_jax import objectives

pytestmark = pytest.mark.usefixtures("x64")
B, K, BETA = 21, 3, 0.4
diagnostics = jax.jit(objectives.diagnostics, static_argnames="first_member")
ensemble_distill = jax.jit(objectives.ensemble_distill, static_argnames="selection")


def draw(seed=0):
  rng = np.random.default_rng(seed)
  h, r = 2 * rng.normal(size=(B, 2)), rng.normal(size=(K, B, 2))
  return h, r, rng.integers(1, 30, (B, 2))


def test_metrics_are_their_definitions():
  h, r, lengths = draw()
  _, selection = ensemble_distill(jnp.array(h), jnp.array(r), beta=BETA, selection="example")
  metrics = diagnostics(
    jnp.array(h), jnp.array(r), jnp.array(lengths), beta=BETA, selection=selection
  )
  implicit = BETA * (h[:, 0] - h[:, 1])
  margins = r[:, :, 0] - r[:, :, 1]
  distances = [((m - implicit) ** 2).mean() for m in margins]
  picked = np.argmin((margins - implicit) ** 2, axis=0)
  expected = {
    "margin/implicit_mean": implicit.mean(),
    "margin/implicit_p95": np.percentile(implicit, 95),
    "margin/accuracy": (implicit > 0).mean(),
    "margin/length_correlation": np.corrcoef(implicit, lengths[:, 0] - lengths[:, 1])[0, 1],
    "margin/reward_mean": margins.mean(),
    "margin/reward_correlation": np.corrcoef(implicit, margins.mean(0))[0, 1],
    "logp/chosen_minus_ref": h[:, 0].mean(),
    "logp/chosen_minus_ref_p5": np.percentile(h[:, 0], 5),
    "logp/rejected_minus_ref": h[:, 1].mean(),
    "logp/rejected_minus_ref_p5": np.percentile(h[:, 1], 5),
    "degeneracy/chosen_collapsed": (h[:, 0] < -np.log(10)).mean(),
    "kl/forward_pairs": -h.mean(),
    "ensemble/disagreement": margins.var(0).mean(),
    **{f"ensemble/distance_{i}": d for i, d in enumerate(distances)},
    **{f"select/member_{i}": (picked == i).mean() for i in range(K)},
  }
  assert metrics.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-9, err_msg=name)
    assert metrics[name].shape == ()


def test_rows_of_weight_zero_and_lonely_responses_count_nowhere():
  h, r, lengths = draw()
  known = diagnostics(jnp.array(h), jnp.array(r), jnp.array(lengths), beta=BETA)
  filler = np.full((2, 2), [[1e3, -1e3]])
  more_h, more_r = np.concatenate([h, filler]), np.concatenate([r, [filler] * K], axis=1)
  more_r[:, -1, 1] = more_h[-1, 1] = np.nan
  mask = np.ones((B + 2, 2), bool)
  mask[-1, 1] = False
  padded = diagnostics(
    jnp.array(more_h),
    jnp.array(more_r),
    jnp.array(np.concatenate([lengths, [[1, 99], [5, 0]]])),
    beta=BETA,
    mask=jnp.array(mask),
    weights=jnp.array([1.0] * B + [0.0, 1.0]),
  )
  for name, value in known.items():
    np.testing.assert_allclose(padded[name], value, rtol=1e-9, err_msg=name)


def test_ties_count_one_half_and_no_row_at_all_gives_zeros():
  h = jnp.array([[1.0, 1.0], [2.0, 1.0], [1.0, 2.0], [3.0, 3.0]])
  assert diagnostics(h, beta=1.0)["margin/accuracy"] == 0.5
  nothing = diagnostics(h, jnp.stack([h, h]), jnp.ones_like(h), beta=1.0, weights=jnp.zeros(4))
  assert all(value == 0.0 for value in nothing.values())


def test_more_than_two_responses_are_ordered_by_ranks_or_by_rewards():
  h = jnp.array([[1.0, 5.0, 9.0]])
  rewards = jnp.array([[[0.0, 2.0, 1.0]]])
  by_reward = diagnostics(h, rewards, beta=1.0, first_member=1)
  assert by_reward["logp/chosen_minus_ref"] == 5.0
  assert by_reward["logp/rejected_minus_ref"] == 1.0
  assert "ensemble/distance_1" in by_reward
  by_rank = diagnostics(h, rewards, beta=1.0, ranks=jnp.array([[1, 2, 0]]))
  assert by_rank["logp/chosen_minus_ref"] == 9.0
  assert by_rank["logp/rejected_minus_ref"] == 5.0


def test_selection_weights_of_the_whole_batch_are_reported_as_they_are():
  h, r, _ = draw()
  _, selection = ensemble_distill(jnp.array(h), jnp.array(r), beta=BETA, selection="hull")
  metrics = diagnostics(jnp.array(h), jnp.array(r), beta=BETA, selection=selection)
  reported = [metrics[f"select/member_{i}"] for i in range(K)]
  np.testing.assert_array_equal(reported, selection.weights)
