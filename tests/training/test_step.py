"""One compiled step: what it computes, whom it couples, and what it refuses to let through."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training_toys import (
  COUPLED,
  Ensemble,
  Pairs,
  Sgd,
  Stepper,
  assert_trees_equal,
  data,
  init,
  score,
)

from rmd_jax.training.compilations import compilations
from rmd_jax.training.optimisers import Adafactor, AdamW
from rmd_jax.training.partitioning import MeshConfig, batch_columns, layout
from rmd_jax.training.stage import Loss
from rmd_jax.training.state import Blueprint, abstract_state, frozen_carry
from rmd_jax.training.step import train_program

ROUNDING = {"rtol": 2e-5, "atol": 2e-6}


def member(tree, k):
  return jax.tree.map(lambda leaf: leaf[k], tree)


# --- the definition -------------------------------------------------------------------------------


def test_a_step_is_the_gradient_of_the_mean_loss_clipped_and_given_to_adam():
  examples, rate, clip = data(), 0.05, 0.02
  mask = {"embedding": True, "hidden": True, "bias": False, "out": False}
  adam = optax.adamw(rate, weight_decay=0.1, mask=mask)

  @jax.jit
  def by_hand(params, state, average, batch):
    def loss(params):
      margin = score(params, batch) @ jnp.array([1.0, -1.0])
      return jnp.mean(jnp.log1p(jnp.exp(-margin))) * (1 + 0.1 * average), margin.mean()

    (value, mean), grads = jax.value_and_grad(loss, has_aux=True)(params)
    norm = jnp.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grads)))
    grads = jax.tree.map(lambda g: jnp.where(norm > clip, g * clip / norm, g), grads)
    updates, state = adam.update(grads, state, params)
    return optax.apply_updates(params, updates), state, 0.9 * average + 0.1 * mean, value, norm

  params = jax.tree.map(jnp.asarray, init(0))
  state, average, losses, norms = adam.init(params), 0.0, [], []
  for i in range(3):
    batch = jax.device_put(examples.batch(np.arange(i * 16, (i + 1) * 16)))
    params, state, average, value, norm = by_hand(params, state, average, batch)
    losses.append(float(value))
    norms.append(float(norm))

  got = Stepper(Pairs(), rate=rate, clip=clip).steps(examples, 3)
  assert min(norms) > clip  # it bites
  assert_trees_equal(got.state.params["shared"], params, **ROUNDING)
  assert [m["loss/total"] for m in got.metrics] == pytest.approx(losses, rel=1e-5)
  assert [m["optimizer/grad_norm"] for m in got.metrics] == pytest.approx(norms, rel=1e-5)
  assert int(got.state.step) == int(got.state.carry["count"]) == 3
  assert float(got.state.carry["average"]) == pytest.approx(float(average), rel=1e-5)


def test_without_clipping_the_gradient_passes_whole():
  examples = data()
  params = Pairs().params()["shared"]
  bounded, free = (Stepper(Pairs(), optimizer=Sgd(), clip=c, rate=1.0) for c in (1e-3, np.inf))
  for stepper, norm in ((bounded, 1e-3), (free, None)):
    stepper.steps(examples, 1)
    moved = jax.tree.map(lambda new, old: new - old, stepper.state.params["shared"], params)
    norm = stepper.metrics[0]["optimizer/grad_norm"] if norm is None else norm
    assert float(optax.tree.norm(moved)) == pytest.approx(norm, rel=1e-3)
  assert free.metrics[0]["optimizer/grad_norm"] > 1e-2


# --- accumulation ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "stage",
  [pytest.param(Pairs(), marks=pytest.mark.slow), COUPLED, Ensemble(trunk=True)],
  ids=["sum", "coupled", "members"],
)
def test_microbatches_give_the_gradient_of_the_large_batch(stage):
  examples = data(members=stage.members)
  examples.weight[:16] = np.random.default_rng(3).integers(0, 4, 16)
  start = stage.params()
  whole, parts = (
    Stepper(stage, optimizer=Sgd(), clip=np.inf, rate=1.0, microbatches=m).steps(examples, 1)
    for m in (1, 4)
  )

  def gradient(stepper):
    groups = {name: start[name] for name in ("shared", "members")}
    return jax.tree.map(lambda old, new: old - new, groups, stepper.state.params)

  assert_trees_equal(gradient(parts), gradient(whole), rtol=1e-5, atol=1e-6)
  assert parts.metrics[0] == pytest.approx(whole.metrics[0], rel=1e-5)  # aux of the whole batch
  assert_trees_equal(parts.state.carry, whole.state.carry, rtol=1e-6)


def test_an_objective_that_is_no_sum_needs_the_second_pass():
  """Else the test above would show nothing: taken for a sum, this one goes wrong."""

  examples = data()
  right, wrong = (
    Stepper(stage, optimizer=Sgd(), clip=np.inf, microbatches=4).steps(examples, 1)
    for stage in (COUPLED, Pairs(spread=True))
  )
  difference = jax.tree.map(lambda a, b: a - b, right.state.params, wrong.state.params)
  assert float(optax.tree.norm(difference)) > 1e-3


# --- members --------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 20])
@pytest.mark.parametrize(
  "optimizer",
  [
    AdamW(weight_decay=0.1),
    pytest.param(
      Adafactor(min_dim_size_to_factor=4, weight_decay=0.1), marks=pytest.mark.slow, id="adafactor"
    ),
  ],
)
def test_k_members_in_one_program_are_k_runs(optimizer, count):
  stage, alone = Ensemble(members=3), Ensemble(members=1)
  examples = data(members=3)
  examples.member_weight[1] = 0.0  # one is never trained
  scaled = stage.params()
  scaled["members"]["out"][2] *= 5.0  # gradients of unequal size: a common norm would couple them
  together = Stepper(stage, optimizer=optimizer, params=scaled, clip=0.1).steps(examples, count)
  for k in range(3):
    params = {
      **scaled,
      "members": jax.tree.map(lambda leaf, k=k: leaf[k : k + 1], scaled["members"]),
    }
    one = Stepper(alone, optimizer=optimizer, params=params, clip=0.1)
    one.steps(examples.replace(member_weight=examples.member_weight[k : k + 1]), count)
    got = member((together.state.params["members"], together.state.opt["members"]), k)
    wanted = member((one.state.params["members"], one.state.opt["members"]), 0)
    assert_trees_equal(got, wanted, rtol=1e-5 * 10 ** (count > 1), atol=1e-5 * 10 ** (count > 1))
    norms = [m[f"optimizer/grad_norm_member_{k}"] for m in together.metrics]
    assert np.median(norms) > 0.1 or k == 1  # the clipping bites


def test_a_member_without_weight_makes_no_update_at_all():
  stage = Ensemble(members=3)
  examples = data(members=3)
  stepper = Stepper(stage).steps(examples, 2)  # momentum has been built up
  before = jax.device_get((stepper.state.params["members"], stepper.state.opt["members"]))
  examples.member_weight[1] = 0.0
  stepper.steps(examples, 2)
  after = jax.device_get((stepper.state.params["members"], stepper.state.opt["members"]))
  assert_trees_equal(member(after, 1), member(before, 1))  # no decay, no momentum, no count
  counts = after[1][0].count
  assert counts.tolist() == [4, 2, 4]
  for k in (0, 2):
    assert np.any(after[0]["hidden"][k] != before[0]["hidden"][k])
  assert stepper.metrics[-1]["loss/member_1"] == 0.0
  assert stepper.metrics[-1]["guard/skipped"] == 0


@pytest.mark.slow
def test_a_batch_without_any_weight_changes_nothing_but_the_step():
  examples = data()
  stepper = Stepper(Ensemble(trunk=True))
  weighted = data(members=3)
  stepper.steps(weighted, 1)
  before = jax.device_get(stepper.state)
  stepper.steps(weighted.replace(member_weight=np.zeros((3, len(examples)), np.float32)), 1)
  assert_trees_equal(jax.device_get(stepper.state).replace(step=before.step), before)


# --- the guard ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Poisoned(Ensemble):
  """Member 1's loss goes wrong where the batch says so, in one of three ways."""

  how: str = "loss"

  def objective(self, outputs, batch, *, step, hyper, carry):
    rewards, on = outputs["rewards"], (batch.preference > 0.5).any()
    size = jnp.abs(rewards[1]).sum() + 1.0
    if self.how == "loss":
      spoilt = jnp.where(on, jnp.nan, 0.0) * size
    elif self.how == "gradient":  # the loss is finite: only its derivative is not
      spoilt = jnp.sqrt(jnp.where(on, 0.0, 1.0) * size) - jnp.where(on, 0.0, 1.0) * jnp.sqrt(size)
    else:
      spoilt = jnp.zeros(())
    loss = Ensemble.objective(self, outputs, batch, step=step, hyper=hyper, carry=carry)
    if self.how == "carry":
      carry = carry + jnp.where(on, jnp.inf, 1.0)
    return loss._replace(sum=loss.sum.at[1].add(spoilt), carry=carry)


def poison(examples, on):
  return examples.replace(preference=np.full(len(examples), float(on), np.float32))


@pytest.mark.parametrize("how", ["loss", pytest.param("gradient", marks=pytest.mark.slow)])
def test_a_member_that_is_not_finite_is_skipped_alone(how):
  examples = data(members=3)
  stage, clean = Poisoned(how=how), Poisoned(how="none")
  stepper, healthy = Stepper(stage, carry=0.0), Stepper(clean, carry=0.0)
  for s in (stepper, healthy):
    s.steps(poison(examples, False), 1)
  before = jax.device_get(stepper.state)
  for s in (stepper, healthy):
    s.steps(poison(examples, True), 2)
  after, wanted = jax.device_get((stepper.state, healthy.state))
  groups = [(s.params["members"], s.opt["members"]) for s in (before, after, wanted)]
  assert_trees_equal(member(groups[1], 1), member(groups[0], 1))
  for k in (0, 2):
    assert_trees_equal(member(groups[1], k), member(groups[2], k), rtol=1e-6, atol=1e-7)
  assert [f.tolist() for f in stepper.flags] == [[0, 0, 0], [0, 1, 0], [0, 2, 0]]
  assert stepper.metrics[-1]["guard/skipped_member_1"] == 2
  assert stepper.metrics[-1]["guard/skipped"] == 2
  stepper.steps(poison(examples, False), 1)
  assert stepper.flags[-1].tolist() == [0, 0, 0]
  assert np.asarray(stepper.state.streak).tolist() == [0, 0, 0]  # in a row means in a row
  assert np.all(np.isfinite(np.asarray(stepper.state.params["members"]["hidden"])))


def test_a_carry_that_is_not_finite_stops_every_update_of_that_step():
  stepper = Stepper(Poisoned(how="carry"), carry=0.0).steps(poison(data(members=3), False), 1)
  before = jax.device_get(stepper.state)
  stepper.steps(poison(data(members=3), True), 1)
  after = jax.device_get(stepper.state)
  assert float(after.carry) == 1.0
  assert_trees_equal((after.params, after.opt), (before.params, before.opt))
  assert stepper.flags[-1].tolist() == [1, 1, 1]


@pytest.mark.slow
def test_an_infinity_that_the_carry_began_with_is_meant():
  @dataclasses.dataclass(frozen=True)
  class Least(Pairs):
    def objective(self, outputs, batch, *, step, hyper, carry):
      inner = {"average": 0.0, "count": 0}
      loss = Pairs.objective(self, outputs, batch, step=step, hyper=hyper, carry=inner)
      return loss._replace(carry=jnp.where(step < 1, carry, jnp.minimum(carry, loss.sum)))

  stepper = Stepper(Least(), carry=np.inf).steps(data(), 1)
  assert stepper.flags[-1].tolist() == [0]
  assert np.isinf(float(stepper.state.carry))
  stepper.steps(data(), 1)
  assert np.isfinite(float(stepper.state.carry))


@dataclasses.dataclass(frozen=True)
class PoisonedPairs(Pairs):
  def objective(self, outputs, batch, **rest):
    loss = Pairs.objective(self, outputs, batch, **rest)
    return loss._replace(sum=loss.sum * jnp.where((batch.preference > 0.5).any(), jnp.nan, 1.0))


@pytest.mark.parametrize("parts", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_shared_parameters_optimiser_and_carry_stay_as_they_were(parts):
  stepper = Stepper(PoisonedPairs(), microbatches=parts).steps(poison(data(), False), 1)
  before = jax.device_get(stepper.state)
  stepper.steps(poison(data(), True), 1)
  after = jax.device_get(stepper.state)
  assert_trees_equal(
    (after.params, after.opt, after.carry), (before.params, before.opt, before.carry)
  )
  assert int(after.step) == 2  # the batch is passed over, not tried for ever
  assert np.isnan(stepper.metrics[-1]["loss/total"])
  assert stepper.flags[-1].tolist() == [1]


@pytest.mark.slow
def test_a_bad_member_does_not_reach_a_shared_trunk():
  stepper = Stepper(Poisoned(how="loss", trunk=True), carry=0.0)
  before = jax.device_get(stepper.state.params["shared"])
  stepper.steps(poison(data(members=3), True), 1)
  assert_trees_equal(stepper.state.params["shared"], before)


# --- programs and state ---------------------------------------------------------------------------


def test_numbers_reach_the_program_as_arguments_so_it_is_compiled_once():
  examples = data()
  Stepper(Pairs()).steps(examples, 1)
  before = compilations()
  other = Stepper(Pairs(), rate=0.01, clip=np.inf, beta=3.0).steps(examples, 2)
  still = Stepper(Pairs(), rate=0.0).steps(examples, 2)
  assert compilations().since(before).programs == 0
  assert_trees_equal(still.state.params["shared"], Pairs().params()["shared"])
  same = Stepper(Pairs()).steps(examples, 1)
  assert same.metrics[0]["loss/total"] != other.metrics[0]["loss/total"]  # and they count
  jax.jit(lambda x: 2 * x)(jnp.ones(7)).block_until_ready()
  assert compilations().since(before).programs > 0  # the counter counts
  assert compilations().since(before).seconds > 0


def test_the_step_that_trains_is_obtained_from_shapes_alone():
  stage, place = Ensemble(members=2), layout(MeshConfig(member=2))
  shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, stage.params()))
  blueprint = Blueprint.of(shapes, stage.axes)
  names = ("beta", "learning_rate")
  program = train_program(stage, AdamW(), 1, place, blueprint, names, frozen_carry(()))
  assert program is Stepper(stage, mesh=MeshConfig(member=2), optimizer=AdamW()).program
  columns = batch_columns(data(16, members=2).batch(np.arange(16)))
  placed = place.columns(columns, 2)
  lowered = program.lower(
    abstract_state(blueprint, AdamW(), place, members=2, carry=()),
    {},
    {
      name: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=placed[name])
      for name, value in columns.items()
    },
    jax.ShapeDtypeStruct((3,), jnp.float32),
  )
  assert "sharding" in lowered.as_text()


def test_a_step_consumes_its_state_but_not_what_the_caller_gave():
  stage = Pairs()
  params = jax.device_put(stage.params())
  stepper = Stepper(stage, params=params)
  first = stepper.state
  stepper.steps(data(), 1)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves((first.params, first.opt)))
  assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))
  assert_trees_equal(params, stage.params())


def test_every_step_has_a_random_key_of_its_own():
  @dataclasses.dataclass(frozen=True)
  class Noisy(Pairs):
    def objective(self, outputs, batch, *, carry, **rest):  # nothing else that could differ
      return Pairs.objective(self, outputs, batch, carry=carry, **rest)._replace(carry=carry)

  stage, examples = Noisy(noise=1.0), data(16)
  losses = [
    [m["loss/total"] for m in Stepper(stage, rate=0.0).steps(examples, 2).metrics] for _ in range(2)
  ]
  assert losses[0][0] != losses[0][1]
  assert losses[0] == losses[1]


@pytest.mark.slow
def test_parameters_keep_their_dtype_and_the_optimiser_works_in_float32():
  stage = Pairs()
  params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), stage.params())
  stepper = Stepper(stage, params=params).steps(data(), 2)
  assert {leaf.dtype for leaf in jax.tree.leaves(stepper.state.params)} == {jnp.dtype("bfloat16")}
  adam = stepper.state.opt["shared"][0]
  assert {leaf.dtype for leaf in jax.tree.leaves((adam.mu, adam.nu))} == {jnp.dtype("float32")}


@dataclasses.dataclass(frozen=True)
class Wrong(Pairs):
  change: Any = None

  def objective(self, outputs, batch, **rest):
    return self.change(Pairs.objective(self, outputs, batch, **rest))


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda loss: loss._replace(sum=loss.sum[None]), r"Loss.sum has shape \(1,\)"),
    (lambda loss: loss._replace(carry=()), "carry of another structure"),
    (
      lambda loss: loss._replace(carry=dict(loss.carry, count=jnp.zeros(2))),
      r"shape from \(\) to \(2,\)",
    ),
    (lambda loss: Loss(loss.sum, loss.weight, {"h": jnp.zeros((2, 2))}, loss.carry), "aux"),
  ],
)
def test_a_stage_that_breaks_its_promise_is_told_how(change, message):
  with pytest.raises(TypeError, match=message):
    Stepper(Wrong(change=change)).steps(data(), 1)
