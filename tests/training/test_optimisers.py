"""Learning rates as arrays, and optimisers as directions, against optax used as it is meant."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training_toys import AXES, Ensemble, Pairs, assert_trees_equal, init

from rmd_jax.errors import UserError
from rmd_jax.training.optimisers import Adafactor, AdamW, decay_mask, learning_rates


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_schedules_are_those_of_optax_after_the_warm_up(name):
  steps, warmup, peak = 40, 8, 3e-4
  left = steps - warmup
  after = {
    "constant": optax.constant_schedule(peak),
    "linear": optax.linear_schedule(peak, 0.0, left),
    "cosine": optax.cosine_decay_schedule(peak, left),
  }[name]
  rates = learning_rates(name, peak=peak, steps=steps, warmup_steps=warmup)
  wanted = [peak * (s + 1) / warmup for s in range(warmup)] + [float(after(s)) for s in range(left)]
  np.testing.assert_allclose(rates, wanted, rtol=1e-5, atol=1e-9)
  assert rates.dtype == np.float32


def test_a_schedule_may_be_a_function():
  schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-3, 5, 20)
  rates = learning_rates(schedule, peak=None, steps=20)
  np.testing.assert_allclose(rates, [float(schedule(s)) for s in range(20)], rtol=1e-5)

  def branches(step):
    return 1.0 if step < 3 else 0.5

  rates = learning_rates(branches, peak=None, steps=5)
  np.testing.assert_array_equal(rates, np.float32([1, 1, 1, 0.5, 0.5]))


@pytest.mark.parametrize(
  "arguments, message",
  [
    ({"schedule": "cosin", "peak": 1.0}, "none of"),
    ({"schedule": "linear", "peak": None}, "needs a learning_rate"),
    ({"schedule": "linear", "peak": 1.0, "warmup_steps": 9}, "warmup_steps = 9"),
    ({"schedule": lambda step: 1.0, "peak": 1.0}, "learning_rate = None"),
    ({"schedule": lambda step: 1.0 / (step - 2.0), "peak": None}, "at step 0 is -0.5"),
    ({"schedule": "constant", "peak": float("nan")}, "at step 0 is nan"),
  ],
)
def test_schedules_that_make_no_sense_are_refused(arguments, message):
  with pytest.raises(UserError, match=message):
    learning_rates(steps=5, **arguments)


def _trained(transform, params, *, rate):
  """Five steps on a fixed quadratic; `rate` None: the transformation has it in itself."""

  def step(carry, _):
    params, state = carry
    grads = jax.tree.map(lambda p: 0.3 * p + 0.1, params)
    updates, state = transform.update(grads, state, params)
    if rate is not None:
      updates = jax.tree.map(lambda u: -rate * u, updates)
    return (optax.apply_updates(params, updates), state), None

  @jax.jit
  def train(params):
    return jax.lax.scan(step, (params, transform.init(params)), length=5)[0][0]

  return train(params)


def test_adamw_is_optax_adamw_with_the_rate_taken_out():
  params = jax.tree.map(jnp.asarray, init(0))
  mask = decay_mask(AXES)
  ours = AdamW(b1=0.8, b2=0.9, eps=1e-6, weight_decay=0.3).transform(mask)
  theirs = optax.adamw(0.02, 0.8, 0.9, 1e-6, weight_decay=0.3, mask=mask)
  got = _trained(ours, params, rate=0.02)
  assert_trees_equal(got, _trained(theirs, params, rate=None), rtol=1e-6)


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_adafactor_is_optax_adafactor_with_the_rate_taken_out(momentum):
  params = {"wide": jnp.ones((130, 140)) * jnp.linspace(0.1, 1, 140)[None], "bias": jnp.ones(7)}
  ours = Adafactor(momentum=momentum).transform()
  theirs = optax.adafactor(0.02, momentum=momentum)
  got = _trained(ours, params, rate=0.02)
  assert_trees_equal(got, _trained(theirs, params, rate=None), rtol=1e-6)


def test_matrices_decay_and_stacked_norms_do_not():
  axes = {
    "norm": ("layers", "embed"),
    "kernel": ("layers", "embed", "mlp"),
    "member_bias": ("member", "layers", "mlp"),
    "member_kernel": ("member", "embed", "mlp"),
    "scalar": (),
  }
  assert decay_mask(axes) == {
    "norm": False,
    "kernel": True,
    "member_bias": False,
    "member_kernel": True,
    "scalar": False,
  }


@pytest.mark.parametrize("optimizer", [AdamW(weight_decay=0.5), Adafactor(weight_decay=0.5)])
@pytest.mark.parametrize("stage", [Pairs(), Ensemble()])
def test_decay_spares_what_has_one_axis_inside_the_member_axis_too(optimizer, stage):
  group = "members" if stage.members else "shared"
  params = stage.params()[group]
  mask = decay_mask(stage.axes)[group]
  transform = optimizer.transform(mask)
  over = jax.vmap if stage.members else lambda function: function
  zeros = jax.tree.map(jnp.zeros_like, params)

  @jax.jit
  def one(params):
    return over(transform.update)(zeros, over(transform.init)(params), params)[0]

  direction = one(params)
  for name, decays in mask.items():
    moved = bool(np.any(np.asarray(direction[name]) != 0))
    assert moved == decays, name
