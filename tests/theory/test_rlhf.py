"""Facts 2 and 3: distillation over all responses is RLHF, and its divergence is RLHF's value."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tabular import minimise

from rmd_jax import objectives

pytestmark = pytest.mark.usefixtures("x64")

COUNT, BETA = 6, 0.7
RNG = np.random.default_rng(0)
REFERENCE = RNG.dirichlet(np.ones(COUNT))
REWARD = RNG.normal(size=COUNT)


def optimum(reward, reference, beta):
  """pi* ~ pi_ref exp(r / beta), written down."""
  unnormalised = reference * np.exp(reward / beta)
  return unnormalised / unnormalised.sum()


def log_ratios(logits, reference):
  return jax.nn.log_softmax(logits) - jnp.log(reference)


def as_one_group(logits):
  h = log_ratios(logits, REFERENCE)
  return objectives.distill(h[None], jnp.array(REWARD)[None], beta=BETA).mean()


def as_pairs(logits):
  pairs = np.array(list(itertools.combinations(range(COUNT), 2)))
  h, r = log_ratios(logits, REFERENCE)[pairs], jnp.array(REWARD)[pairs]
  return objectives.distill(h, r, beta=BETA).mean()


@pytest.mark.parametrize("loss", [as_one_group, as_pairs])
def test_the_minimiser_of_distillation_is_the_policy_of_rlhf_and_no_other(loss):
  starts = [np.zeros(COUNT), *5 * np.random.default_rng(1).normal(size=(3, COUNT))]
  for logits in minimise(loss, *starts):
    policy = jax.nn.softmax(jnp.asarray(logits))
    np.testing.assert_allclose(policy, optimum(REWARD, REFERENCE, BETA), rtol=1e-5)


def test_all_pairs_and_one_group_are_the_same_loss():
  both = jax.jit(lambda logits: (as_one_group(logits), as_pairs(logits)))
  for logits in np.random.default_rng(2).normal(size=(5, COUNT)):
    np.testing.assert_allclose(*both(logits), rtol=1e-10)


@pytest.mark.parametrize("seed", range(3))
def test_the_forward_divergence_is_the_value(seed):
  rng = np.random.default_rng(seed)
  reward, beta = rng.normal(size=COUNT), rng.uniform(0.2, 3)
  reference = np.full(COUNT, 1 / COUNT)  # then the mean over all responses is its expectation

  def cost(logits):
    policy, h = jax.nn.softmax(logits), log_ratios(logits, reference)
    return -(((policy - reference) * reward).sum() - beta * (policy * h).sum())

  (logits,) = minimise(cost, np.zeros(COUNT))
  np.testing.assert_allclose(
    jax.nn.softmax(jnp.asarray(logits)), optimum(reward, reference, beta), rtol=1e-5
  )
  h = jnp.log(optimum(reward, reference, beta) / reference)
  np.testing.assert_allclose(
    -cost(jnp.asarray(logits)), beta * objectives.forward_kl(h[None])[0], rtol=1e-8
  )
