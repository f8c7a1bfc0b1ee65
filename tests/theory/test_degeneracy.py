"""Facts 1 and 6: DPO degenerates, distillation does not, and pessimism mends DPO.

Six responses; two disjoint pairs, (0, 1) and (2, 3); 4 and 5 are in no pair.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from tabular import minimise

from rmd_jax import objectives

pytestmark = pytest.mark.usefixtures("x64")

BETA = 0.5
CHOSEN, REJECTED, UNMENTIONED = [0, 2], [1, 3], [4, 5]
PAIRS = np.array([CHOSEN, REJECTED]).T
REFERENCE = np.full(6, 1 / 6)
REWARDS = jnp.array([[1.5, 0.2], [0.4, 0.1]])
STARTS = {
  "the reference": np.zeros(6),
  "a random policy": np.random.default_rng(0).normal(size=6),
  "a collapsed policy": np.array([-9.0, -19.0, -9.0, -19.0, 0.0, 0.0]),
}


def log_ratios(logits):
  return jax.nn.log_softmax(logits) - jnp.log(REFERENCE)


def dpo(logits):
  return objectives.dpo(log_ratios(logits)[PAIRS], beta=BETA).mean()


def distill(logits):
  return objectives.distill(log_ratios(logits)[PAIRS], REWARDS, beta=BETA).mean()


def penalty(logits, estimator):
  h = log_ratios(logits)
  if estimator == "samples":  # every response once is the reference's expectation, exactly
    return objectives.forward_kl_samples(h[None]).mean()
  if estimator == "tokenwise":  # a response is one token here
    kl = (REFERENCE * (jnp.log(REFERENCE) - jax.nn.log_softmax(logits))).sum()
    return objectives.forward_kl_tokenwise(jnp.full((1, 1), kl)).mean()
  return objectives.forward_kl(h[PAIRS], estimator=estimator).mean()


def pessimistic(gamma, estimator):
  return lambda logits: dpo(logits) + gamma * penalty(logits, estimator)


def probabilities(logits):
  return np.asarray(jax.nn.softmax(jnp.asarray(logits)))


def collapsing(depth):
  """The chosen responses at 10^-depth, the rejected at its cube, all other mass elsewhere."""
  policy = np.full(6, 0.0)
  policy[CHOSEN], policy[REJECTED] = 10.0**-depth, 10.0 ** (-3 * depth)
  policy[UNMENTIONED] = (1 - policy.sum()) / 2
  return jnp.log(policy)


def test_dpo_goes_to_its_infimum_while_the_chosen_responses_vanish():
  depths = (1, 2, 4, 8, 16)
  losses = [float(jax.jit(dpo)(collapsing(depth))) for depth in depths]
  assert losses == sorted(losses, reverse=True)
  assert losses[-1] < 1e-12
  assert probabilities(collapsing(depths[-1]))[CHOSEN].max() < 1e-15
  diagnostics = jax.jit(lambda h: objectives.diagnostics(h, beta=BETA))
  metrics = diagnostics(log_ratios(collapsing(4))[PAIRS])
  assert metrics["degeneracy/chosen_collapsed"] == 1.0


def test_distillation_is_ever_further_from_its_minimum_on_that_way():
  losses = [float(jax.jit(distill)(collapsing(depth))) for depth in (1, 2, 4, 8, 16)]
  assert losses == sorted(losses)
  assert losses[-1] > 1000


def test_distillation_pins_every_margin_at_the_rewards_margin():
  margins = (REWARDS[:, 0] - REWARDS[:, 1]) / BETA
  for logits in minimise(distill, *STARTS.values()):
    h = log_ratios(logits)[PAIRS]
    np.testing.assert_allclose(h[:, 0] - h[:, 1], margins, rtol=1e-5)


def test_under_dpo_the_margins_grow_as_long_as_one_trains():
  @jax.jit
  def train(logits):
    step = jax.grad(dpo)
    return jax.lax.fori_loop(0, 3000, lambda _, at: at - 1.0 * step(at), logits)

  logits, margins, rejected = jnp.zeros(6), [], []
  for _ in range(4):
    logits = train(logits)
    h = log_ratios(logits)[PAIRS]
    margins.append(float((h[:, 0] - h[:, 1]).min()))
    rejected.append(probabilities(logits)[REJECTED].max())
  assert (np.diff(margins) > 0.3).all()
  assert (np.diff(rejected) < 0).all()
  assert margins[-1] > 10


@pytest.mark.parametrize("estimator", ["pairs", "samples", "tokenwise"])
@pytest.mark.parametrize("gamma", [0.01, 0.3])
def test_pessimistic_dpo_has_a_finite_optimum_that_keeps_the_chosen(gamma, estimator):
  loss = jax.jit(pessimistic(gamma, estimator))
  optima = minimise(loss, *STARTS.values())
  for logits in optima:
    np.testing.assert_allclose(probabilities(logits), probabilities(optima[0]), atol=1e-4)
  policy = probabilities(optima[0])
  assert (policy[CHOSEN] > REFERENCE[CHOSEN]).all()
  assert (policy[REJECTED] > 1e-6).all()
  # Collapsing is no way down any more: it costs more than any margin gains.
  collapse = [float(loss(collapsing(depth))) for depth in (4, 8, 16, 32)]
  assert collapse == sorted(collapse)
  assert collapse[0] > loss(optima[0])


def test_with_chosen_alone_the_rejected_responses_still_vanish():
  def without(share):
    """The chosen responses share all mass but a rest, which the rejected ones keep."""
    policy = np.full(6, 1e-300)
    policy[CHOSEN], policy[REJECTED] = (1 - share) / 2, share / 2
    return jnp.log(policy)

  shares = (1e-1, 1e-2, 1e-4, 1e-8, 1e-16)
  chosen, pairs = (
    [float(loss(without(share))) for share in shares]
    for loss in (jax.jit(pessimistic(0.3, name)) for name in ("chosen", "pairs"))
  )
  assert chosen == sorted(chosen, reverse=True)
  assert np.argmin(pairs) < len(shares) - 1
  policy = probabilities(minimise(pessimistic(0.3, "chosen"), np.zeros(6))[0])
  assert policy[REJECTED].max() < 1e-4
  assert policy[CHOSEN].min() > 0.4


def test_pessimistic_dpo_is_the_nearest_of_the_policies_that_fit_as_well():
  # Its optimum has the least divergence under L_dpo <= min + delta, delta being what it reaches.
  (logits,) = minimise(pessimistic(0.1, "samples"), np.zeros(6))
  bound = float(dpo(jnp.asarray(logits)))
  assert bound > 0.01  # the family is larger than DPO's infimum, which is 0
  distance = jax.jit(jax.value_and_grad(lambda at: penalty(at, "samples")))
  fit = jax.jit(jax.value_and_grad(dpo))
  nearest = scipy.optimize.minimize(
    lambda at: np.float64(distance(jnp.asarray(at))[0]),
    STARTS["a random policy"],
    jac=lambda at: np.asarray(distance(jnp.asarray(at))[1]),
    method="SLSQP",
    constraints={
      "type": "ineq",
      "fun": lambda at: bound - np.float64(fit(jnp.asarray(at))[0]),
      "jac": lambda at: -np.asarray(fit(jnp.asarray(at))[1]),
    },
    options={"ftol": 1e-14, "maxiter": 500},
  )
  np.testing.assert_allclose(probabilities(nearest.x), probabilities(logits), atol=1e-5)


def test_a_larger_gamma_trades_fit_for_nearness():
  gammas = (0.01, 0.1, 1.0)
  optima = [minimise(pessimistic(gamma, "samples"), np.zeros(6))[0] for gamma in gammas]
  fits = [float(dpo(jnp.asarray(at))) for at in optima]
  distances = [float(penalty(jnp.asarray(at), "samples")) for at in optima]
  assert fits == sorted(fits)
  assert distances == sorted(distances, reverse=True)
