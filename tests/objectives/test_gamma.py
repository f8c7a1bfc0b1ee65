"""Schedules of γ, and the dual controller."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rmd_jax.objectives import DualGamma, LinearGamma, dual_gamma, dual_step, ensemble_disagreement


def test_linear_gamma_is_optax_linear_schedule():
  ours = LinearGamma(start=1e-4, end=1e-2, steps=50)
  theirs = optax.linear_schedule(1e-4, 1e-2, 50)
  steps = jnp.array([0, 1, 25, 50, 90])
  np.testing.assert_allclose(ours(steps), theirs(steps), rtol=1e-5)


def test_a_violated_constraint_lowers_gamma_and_a_slack_one_raises_it():
  state = DualGamma(start=0.01, epsilon=1.0).init(beta=0.1)
  np.testing.assert_allclose(dual_gamma(state, beta=0.1), 0.01, rtol=1e-6)
  options = {"epsilon": 1.0, "rate": 0.01, "update": jnp.bool_(True)}
  violated = dual_step(state, jnp.float32(3.0), **options)
  kept = dual_step(state, jnp.float32(0.5), **options)
  # log alpha <- log alpha + rate (L - epsilon) / epsilon; the average's first value is L itself.
  np.testing.assert_allclose(violated.log_alpha - state.log_alpha, 0.02, rtol=1e-4)
  np.testing.assert_allclose(kept.log_alpha - state.log_alpha, -0.005, rtol=1e-4)
  assert dual_gamma(violated, beta=0.1) < 0.01 < dual_gamma(kept, beta=0.1)


def test_the_loss_is_averaged_and_alpha_stays_within_its_limits():
  state = DualGamma(start=0.1, epsilon=1.0).init(beta=0.1)
  total, mass = 0.0, 0.0
  for loss in (4.0, 0.0, 2.0):
    state = dual_step(state, jnp.float32(loss), epsilon=1.0, rate=1e-6, update=jnp.bool_(True))
    total, mass = 0.99 * total + 0.01 * loss, 0.99 * mass + 0.01
    (average,) = state.loss.mean((jnp.float32(0.0),))
    np.testing.assert_allclose(average, total / mass, rtol=1e-4)
  for loss, alpha in ((1e9, 1e6), (0.0, 1.0)):
    fresh = DualGamma(start=0.1, epsilon=1e-3).init(beta=0.1)
    pushed = dual_step(fresh, jnp.float32(loss), epsilon=1e-3, rate=1.0, update=jnp.bool_(True))
    np.testing.assert_allclose(jnp.exp(pushed.log_alpha), alpha, rtol=1e-5)


def test_evaluation_leaves_the_controller_alone():
  state = DualGamma(start=0.01, epsilon=1.0).init(beta=0.1)
  after = dual_step(state, jnp.float32(9.0), epsilon=1.0, rate=0.1, update=jnp.bool_(False))
  assert after.log_alpha == state.log_alpha
  assert after.loss.mass == 0.0


def test_the_controller_finds_the_gamma_at_which_the_constraint_is_tight():
  # A loss that grows with gamma as that of a pessimistic policy does: L(gamma) = 10 gamma.
  state = DualGamma(start=0.001, epsilon=0.2, rate=0.05).init(beta=0.1)

  def step(_, state):
    loss = 10.0 * dual_gamma(state, beta=0.1)
    return dual_step(state, loss, epsilon=0.2, rate=0.05, update=jnp.bool_(True))

  state = jax.lax.fori_loop(0, 2000, step, state)
  np.testing.assert_allclose(dual_gamma(state, beta=0.1), 0.02, rtol=0.05)


def test_disagreement_is_the_population_variance_of_margins():
  r = np.random.default_rng(0).normal(size=(5, 40, 2)).astype(np.float32)
  expected = np.var(r[:, :, 0] - r[:, :, 1], axis=0).mean()
  np.testing.assert_allclose(ensemble_disagreement(jnp.array(r)), expected, rtol=1e-5)
  assert ensemble_disagreement(jnp.array(r[:1])) == 0.0


@pytest.mark.parametrize(
  "settings", [{"start": 0.0}, {"start": 0.1, "epsilon": 0.0}, {"start": 0.1, "rate": 0.0}]
)
def test_settings_that_cannot_work_are_refused(settings):
  with pytest.raises(ValueError, match="DualGamma"):
    DualGamma(**settings)


def test_a_start_out_of_reach_is_refused():
  with pytest.raises(ValueError, match="out of reach"):
    DualGamma(start=0.5, epsilon=1.0).init(beta=0.1)
  with pytest.raises(ValueError, match="at least one step"):
    LinearGamma(0.0, 1.0, 0)
