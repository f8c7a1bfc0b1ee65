"""Distillation from one model and from K: the definitions, and what has to leave it alone."""

import functools
from typing import NamedTuple

import hypothesis
import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import jax
import naive_objectives as naive
import numpy as np
import pytest

from rmd_jax import objectives
from rmd_jax.objectives.averages import MovingAverage

pytestmark = pytest.mark.usefixtures("x64")
CLOSE = {"rtol": 1e-9, "atol": 1e-11}
STATELESS = ("batch", "example", "worst", "soft", "mean", "lcb")
EVERY = (*STATELESS, "running", "hull")
K, B, N = 3, 5, 4
BETA = 0.3
quick = hypothesis.settings(max_examples=20, deadline=None, derandomize=True)
numbers = st.floats(-20, 20).map(lambda x: round(x, 3))


def case(seed=0, members=K, rows=B, count=N):
  rng = np.random.default_rng(seed)
  h = 3 * rng.normal(size=(rows, count))
  r = rng.normal(size=(members, rows, count))
  mask = np.arange(count)[None] < rng.integers(2, count + 1, rows)[:, None]
  weights = rng.uniform(0.1, 2, rows)
  return h, r, mask, weights


class Outcome(NamedTuple):
  """Losses, member weights, and the gradients of the losses' sum, from one program."""

  losses: jax.Array
  members: jax.Array
  by_h: jax.Array
  by_r: jax.Array
  state: MovingAverage | None


def run(h, r, mask, weights, form="square", kappa=1.0, temperature=1.0):
  """The outcome of every selection."""
  return run_all(h, r, mask, weights, kappa, temperature, form)


@functools.partial(jax.jit, static_argnames="form")  # all in one: compiling is what takes time
def run_all(h, r, mask, weights, kappa, temperature, form):

  def outcome(selection):
    def total(h, r):
      losses, chosen = objectives.ensemble_distill(
        h,
        r,
        beta=BETA,
        selection=selection,
        mask=mask,
        weights=weights,
        form=form,
        kappa=kappa,
        temperature=temperature,
      )
      return losses.sum(), (losses, chosen)

    gradients, (losses, chosen) = jax.grad(total, argnums=(0, 1), has_aux=True)(h, r)
    return Outcome(losses, chosen.weights, *gradients, chosen.state)

  selections = EVERY if form == "square" else STATELESS
  return {selection: outcome(selection) for selection in selections}


@functools.partial(jax.jit, static_argnames="form")
def distill(h, r, mask, beta=BETA, form="square"):
  """(losses, gradient of their sum by h)."""

  def total(h):
    losses = objectives.distill(h, r, beta=beta, mask=mask, form=form)
    return losses.sum(), losses

  gradient, losses = jax.grad(total, has_aux=True)(h)
  return losses, gradient


@pytest.mark.parametrize("form", ["square", "bernoulli"])
@pytest.mark.parametrize("count", [2, 3, 8])
def test_distill_is_the_mean_over_pairs(count, form):
  h, r, mask, _ = case(count, count=count)
  losses, _ = distill(h, r[0], mask, form=form)
  np.testing.assert_allclose(losses, naive.distill(h, r[0], BETA, mask, form), **CLOSE)


def test_distill_of_a_pair_is_the_squared_difference_of_margins():
  h, r = np.random.default_rng(0).normal(size=(2, B, 2))
  expected = [((a - b) - BETA * (c - d)) ** 2 for (a, b), (c, d) in zip(r, h, strict=True)]
  np.testing.assert_allclose(distill(h, r, np.ones((B, 2), bool))[0], expected, **CLOSE)


def test_bernoulli_form_has_a_bounded_gradient_and_the_square_has_not():
  h, r = np.full((B, 2), [1e4, -1e4]), np.full((B, 2), [-50.0, 50.0])
  mask = np.ones((B, 2), bool)
  assert np.abs(distill(h, r, mask, 1.0, form="bernoulli")[1]).max() <= 1.0
  assert np.abs(distill(h, r, mask, 1.0)[1]).max() > 1e4


@pytest.mark.parametrize("form", ["square", "bernoulli"])
def test_every_selection_is_its_definition(form):
  for seed in range(4):
    h, r, mask, weights = case(seed)
    outcomes = run(h, r, mask, weights, form, kappa=0.4, temperature=0.7)
    for selection in STATELESS:
      expected, members = naive.ensemble(h, r, BETA, mask, weights, selection, 0.4, 0.7, form)
      outcome = outcomes[selection]
      np.testing.assert_allclose(outcome.losses, expected, **CLOSE, err_msg=selection)
      np.testing.assert_allclose(outcome.members, members, **CLOSE, err_msg=selection)


def test_one_member_is_distill():
  h, r, mask, weights = case(2, members=1)
  losses, gradient = distill(h, r[0], mask)
  for selection, outcome in run(h, r, mask, weights).items():
    np.testing.assert_allclose(outcome.losses, losses, **CLOSE, err_msg=selection)
    np.testing.assert_allclose(outcome.by_h, gradient, **CLOSE, err_msg=selection)
    np.testing.assert_array_equal(np.unique(outcome.members), [1.0], err_msg=selection)


def test_ties_take_the_lowest_index():
  h, r, mask, weights = case(3, members=1)
  outcomes = run(h, np.concatenate([r] * K), mask, weights)
  for selection in ("batch", "example", "running", "worst"):
    members = np.array(outcomes[selection].members)
    assert (members[0] == 1.0).all(), selection
    assert (members[1:] == 0.0).all(), selection


def slopes_with_the_choice_written_down(selection, members, h, r, mask):
  """The gradient by h of the losses' sum, if what was selected were numbers from elsewhere."""
  if selection in ("mean", "hull"):
    return distill(h, np.einsum("k,kbn->bn", members, r), mask)[1]
  if selection == "lcb":  # no mixture of members: differentiate the definition numerically
    slopes = np.zeros_like(h)
    for at in np.ndindex(*h.shape):
      step = np.zeros_like(h)
      step[at] = 1e-6
      up, down = (naive.lcb(h + s, r, BETA, mask, 1.0).sum() for s in (step, -step))
      slopes[at] = (up - down) / 2e-6
    return slopes
  slopes = np.stack([distill(h, member, mask)[1] for member in r])
  by_row = members if members.ndim == 2 else np.broadcast_to(members[:, None], (K, B))
  return np.einsum("kb,kbn->bn", by_row, slopes)


def test_weights_and_targets_are_constants_in_the_gradient():
  h, r, mask, weights = case(4)
  for selection, outcome in run(h, r, mask, weights).items():
    assert (np.array(outcome.by_r) == 0).all(), selection
    members = np.array(outcome.members)
    fixed = slopes_with_the_choice_written_down(selection, members, h, r, mask)
    np.testing.assert_allclose(outcome.by_h, fixed, rtol=1e-7, atol=1e-8, err_msg=selection)


def test_example_weights_select_and_are_not_multiplied_in():
  h, mask = np.zeros((B, N)), np.ones((B, N), bool)
  r = np.zeros((K, B, N))
  r[0, :, 0], r[1, :, 0], r[2, :, 0] = [1, 9, 9, 9, 9], [2, 0, 0, 0, 0], 99
  only_the_first = np.eye(B)[0] * 7.0
  outcome = run(h, r, mask, only_the_first)["batch"]
  np.testing.assert_array_equal(outcome.members, [1.0, 0.0, 0.0])
  np.testing.assert_allclose(outcome.losses, naive.distill(h, r[0], BETA, mask))


@quick
@hypothesis.given(
  h=arrays.arrays(float, (B, N), elements=numbers),
  r=arrays.arrays(float, (K, B, N), elements=numbers),
  shift=arrays.arrays(float, (K, B, 1), elements=numbers),
  order=st.permutations(range(N)),
)
def test_neither_a_constant_per_prompt_nor_the_order_of_responses_matters(h, r, shift, order):
  r = r + np.random.default_rng(0).normal(size=r.shape)  # no ties, which rounding would break
  mask, weights, order = np.ones((B, N), bool), np.ones(B), np.array(order)
  before = run(h, r, mask, weights)
  after = run(h[:, order], (r + shift)[:, :, order], mask, weights)
  for name in EVERY:
    old, new = before[name], after[name]
    np.testing.assert_allclose(new.losses, old.losses, rtol=1e-6, atol=1e-7, err_msg=name)
    np.testing.assert_allclose(new.by_h, old.by_h[:, order], rtol=1e-6, atol=1e-7, err_msg=name)
    np.testing.assert_allclose(new.members, old.members, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("form", ["square", "bernoulli"])
@quick
@hypothesis.given(
  h=arrays.arrays(float, (B, N), elements=numbers),
  r=arrays.arrays(float, (B, N), elements=numbers),
  shift=arrays.arrays(float, (B, 1), elements=numbers),
  order=st.permutations(range(N)),
)
def test_distill_has_both_invariances_in_value_and_gradient(form, h, r, shift, order):
  mask, order = np.ones((B, N), bool), np.array(order)
  losses, gradient = distill(h, r, mask, form=form)
  others, moved = distill(h[:, order], (r + shift)[:, order], mask, form=form)
  np.testing.assert_allclose(others, losses, rtol=1e-7, atol=1e-9)
  np.testing.assert_allclose(moved, gradient[:, order], rtol=1e-7, atol=1e-9)


def test_what_padding_holds_never_matters():
  h, r, mask, weights = case(5)
  assert not mask.all()
  clean = run(np.where(mask, h, 0.0), np.where(mask, r, 0.0), mask, weights)
  nan = run(np.where(mask, h, np.nan), np.where(mask, r, np.nan), mask, weights)
  for one, other in zip(jax.tree.leaves(clean), jax.tree.leaves(nan), strict=True):
    np.testing.assert_array_equal(one, other)
  for outcome in nan.values():
    assert (np.array(outcome.by_h)[~mask] == 0).all()


@pytest.mark.parametrize("form", ["square", "bernoulli"])
def test_a_longer_array_of_responses_changes_nothing(form):
  h, r, mask, _ = case(5)
  wide = [np.pad(x, ((0, 0), (0, 2)), constant_values=np.nan) for x in (h, r[0])]
  losses, gradient = distill(h, r[0], mask, form=form)
  wide_losses, wide_gradient = distill(*wide, np.pad(mask, ((0, 0), (0, 2))), form=form)
  np.testing.assert_allclose(wide_losses, losses, **CLOSE)
  np.testing.assert_allclose(wide_gradient[:, :N], gradient, **CLOSE)
  assert (np.array(wide_gradient)[:, N:] == 0).all()


@pytest.mark.parametrize("form", ["square", "bernoulli"])
def test_fewer_than_two_responses_give_no_loss_and_no_gradient(form):
  h, r, _, _ = case(6)
  losses, gradient = distill(
    h, r[0], np.arange(N)[None] < np.array([0, 1, 1, 0, 1])[:, None], form=form
  )
  assert (np.array(losses) == 0).all()
  assert (np.array(gradient) == 0).all()


def test_a_batch_without_weight_selects_without_nan_and_updates_nothing():
  h, r, mask, _ = case(6)
  for selection, outcome in run(h, r, mask, np.zeros(B)).items():
    assert np.isfinite(outcome.losses).all(), selection
    assert np.isfinite(outcome.members).all(), selection
    assert outcome.state is None or outcome.state.mass == 0.0, selection
