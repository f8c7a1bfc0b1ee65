"""The dataclasses that align uses, on batches that are no more than their attributes."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rmd_jax import objectives
from rmd_jax.objectives import DPO, IPO, Distill, DualGamma, EnsembleDistill, LinearGamma

B, N, K = 4, 2, 3


def records(count=N, seed=0, **columns):
  """A batch or data set, duck-typed; NumPy arrays, as a data set's are."""
  rng = np.random.default_rng(seed)
  values = {
    "mask": np.ones((B, count), bool),
    "weight": np.array([1.0, 2.0, 1.0, 0.0], np.float32),
    "preference": None,
    "ranks": None,
    "ratings": None,
    "rewards": rng.normal(size=(1 + K, B, count)).astype(np.float32),
    "token_kl": None,
    "sample_log_ratios": None,
  }
  return types.SimpleNamespace(**values | columns)


def on_device(batch):
  """The batch with arrays as a compiled step sees them."""
  return types.SimpleNamespace(
    **{k: None if v is None else jnp.asarray(v) for k, v in vars(batch).items()}
  )


def call(plug, h, batch, carry=None, **hyper):
  """One step of a plug, compiled; `hyper` overrides the plug's own numbers."""
  columns = vars(on_device(batch))

  @jax.jit
  def step(h, columns, numbers, carry):
    return plug(h, types.SimpleNamespace(**columns), numbers, carry)

  hyper = {"training": 1.0} | plug.hyper() | hyper
  return step(h, columns, hyper, plug.init_carry() if carry is None else carry)


H = jnp.array([[1.0, -2.0], [0.5, 3.0], [-4.0, 0.0], [0.1, 0.2]])


def test_each_plug_is_its_function_plus_gamma_times_the_divergence():
  batch = records()
  rewards = jnp.array(batch.rewards)

  @jax.jit
  def functions(h, rewards):
    kl, chosen_kl = objectives.forward_kl(h), objectives.forward_kl(h, estimator="chosen")
    dpo = objectives.dpo(h, beta=0.3)
    distill = objectives.distill(h, rewards[0], beta=0.3)
    bernoulli = objectives.distill(h, rewards[2], beta=0.3, form="bernoulli")
    weights = jnp.array(batch.weight)
    ensemble, _ = objectives.ensemble_distill(h, rewards[1:], beta=0.3, weights=weights)
    lcb, _ = objectives.ensemble_distill(h, rewards[1:], beta=0.3, selection="lcb", kappa=0.5)
    ipo = objectives.ipo(h, tau=0.3)
    with_kl = (dpo + 0.1 * kl, distill + 0.1 * kl, ensemble + 0.1 * chosen_kl)
    return dpo, with_kl[0], ipo, with_kl[1], bernoulli, with_kl[2], lcb

  plugs = (
    DPO(0.3),
    DPO(0.3, gamma=0.1),
    IPO(0.3),
    Distill(0.3, gamma=0.1),
    Distill(0.3, member=2, form="bernoulli"),
    EnsembleDistill(0.3, gamma=0.1, estimator="chosen"),
    EnsembleDistill(0.3, selection="lcb", kappa=0.5),
  )
  expected = zip(plugs, functions(H, rewards), strict=True)
  for plug, losses in expected:
    got, _, _ = call(plug, H, batch)
    np.testing.assert_allclose(got, losses, rtol=1e-5, atol=1e-6, err_msg=repr(plug))


def test_estimators_read_what_align_puts_into_the_batch():
  batch = records(token_kl=np.arange(4.0), sample_log_ratios=np.full((B, 5), -2.0))
  losses, _, _ = call(DPO(0.3), H, batch)
  tokenwise, _, _ = call(DPO(0.3, gamma=1.0, estimator="tokenwise"), H, batch)
  samples, _, _ = call(DPO(0.3, gamma=1.0, estimator="samples"), H, batch)
  np.testing.assert_allclose(tokenwise - losses, np.arange(4.0), rtol=1e-5)
  np.testing.assert_allclose(samples - losses, 2.0, rtol=1e-5)
  for estimator in ("tokenwise", "samples"):
    with pytest.raises(TypeError, match="None"):
      call(DPO(0.3, gamma=1.0, estimator=estimator), H, records())


def test_soft_labels_and_ranks_reach_dpo_and_ipo():
  p = np.array([1.0, 0.5, 0.0, 0.3], np.float32)
  losses, _, _ = call(DPO(0.3, label_smoothing=0.1), H, records(preference=p))
  expected = objectives.dpo(H, beta=0.3, preference=jnp.array(p), label_smoothing=0.1)
  np.testing.assert_allclose(losses, expected, rtol=1e-6)
  ipo, _, _ = call(IPO(0.3), H, records(preference=p))
  first, second = objectives.ipo(H, tau=0.3), objectives.ipo(H[:, ::-1], tau=0.3)
  np.testing.assert_allclose(ipo, p * first + (1 - p) * second, rtol=1e-5)
  ranks = np.array([[1, 0]] * B)
  ranked, _, _ = call(DPO(0.3), H, records(ranks=ranks))
  np.testing.assert_allclose(ranked, objectives.dpo(H[:, ::-1], beta=0.3), rtol=1e-5)


def test_ratings_are_distilled_as_a_reward_model_that_is_given():
  ratings = np.array([[1.0, 0.0], [3.0, 5.0], [0.0, 0.0], [2.0, 1.0]], np.float32)
  plug = Distill(0.3, source="ratings")
  batch = records(ratings=ratings, rewards=None)
  plug.check(batch)
  losses, _, _ = call(plug, H, batch)
  np.testing.assert_allclose(losses, objectives.distill(H, jnp.array(ratings), beta=0.3), rtol=1e-6)


def test_padding_may_hold_nan_under_every_plug():
  mask = np.array([[True, True], [True, False], [False, False], [True, True]])
  h = jnp.where(mask, H, jnp.nan)
  batch = records(mask=mask)
  batch.rewards = np.where(mask, batch.rewards, np.nan)
  for plug in (DPO(0.3, gamma=0.1), IPO(0.3), Distill(0.3), EnsembleDistill(0.3, gamma=0.1)):
    slope = jax.jit(jax.grad(lambda h, plug=plug: call(plug, h, batch)[0].sum()))(h)
    assert jnp.isfinite(slope).all(), plug
    assert (slope[~mask] == 0).all(), plug


def test_traced_numbers_are_no_part_of_equality_and_everything_else_is():
  assert DPO(0.1, gamma=0.0) == DPO(2.0, label_smoothing=0.1, gamma=LinearGamma(0.0, 1.0, 5))
  assert hash(EnsembleDistill(0.1, kappa=1.0)) == hash(EnsembleDistill(0.2, temperature=3.0))
  dual = EnsembleDistill(0.1, gamma=DualGamma(0.01, epsilon=1.0))
  assert dual == EnsembleDistill(0.2, gamma=DualGamma(0.02, epsilon=2.0, rate=0.5))
  different = [
    DPO(0.1),
    DPO(0.1, estimator="chosen"),
    Distill(0.1),
    Distill(0.1, member=1),
    Distill(0.1, form="bernoulli"),
    EnsembleDistill(0.1),
    EnsembleDistill(0.1, selection="hull"),
    dual,
  ]
  assert len(set(different)) == len(different)


def test_every_traced_field_is_excluded_from_equality_and_handed_out():
  for plug in (DPO(0.1), IPO(0.1), Distill(0.1), EnsembleDistill(0.1)):
    traced = {f.name for f in dataclasses.fields(plug) if not f.compare}
    assert set(plug.traced) == traced == set(plug.hyper())


def test_a_new_beta_shares_the_compiled_program():
  traces = []

  def step(plug, h, numbers):
    traces.append(plug)
    return plug(h, on_device(records()), numbers, {})[0]

  compiled = jax.jit(step, static_argnums=0)
  losses = [
    compiled(plug, H, plug.hyper()) for plug in (EnsembleDistill(0.1), EnsembleDistill(0.9))
  ]
  assert len(traces) == 1
  assert (losses[0] != losses[1]).any()


def test_schedules_are_handed_out_as_callables_and_reported_as_numbers():
  for schedule in (LinearGamma(0.0, 1.0, 10), optax.linear_schedule(0.0, 1.0, 10)):
    plug = DPO(0.1, gamma=schedule)
    assert float(plug.hyper()["gamma"](5)) == 0.5
    losses, _, carry = call(plug, H, records(), gamma=0.5)
    expected = objectives.dpo(H, beta=0.1) + 0.5 * objectives.forward_kl(H)
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    assert plug.report(carry, {"gamma": 0.5}) == {"gamma/value": 0.5}


@pytest.mark.parametrize(
  "options", [{"selection": "running"}, {"selection": "hull", "statistics": "running"}]
)
def test_moving_averages_travel_in_the_carry_and_freeze_in_evaluation(options):
  plug = EnsembleDistill(0.3, members=K, **options)
  start = plug.init_carry()
  _, selection, after = call(plug, H, records())
  assert jax.tree.structure(after) == jax.tree.structure(start)
  same = [
    (old.shape, old.dtype, old.weak_type) == (new.shape, new.dtype, new.weak_type)
    for old, new in zip(jax.tree.leaves(start), jax.tree.leaves(after), strict=True)
  ]
  assert all(same)
  assert after["selection"].mass > 0
  _, frozen, still = call(plug, H, records(seed=1), carry=after, training=0.0)
  np.testing.assert_allclose(frozen.weights, selection.weights, atol=1e-6)
  for old, new in zip(jax.tree.leaves(after), jax.tree.leaves(still), strict=True):
    np.testing.assert_array_equal(old, new)


def test_dual_gamma_takes_epsilon_from_the_ensemble_and_reports_itself():
  data = records()
  plug = EnsembleDistill(0.5, selection="mean", gamma=DualGamma(0.05, rate=0.1))
  with pytest.raises(ValueError, match="resolve"):
    plug.hyper()
  plug = plug.resolve(data)
  margins = data.rewards[1:, :, 0] - data.rewards[1:, :, 1]
  epsilon = np.average(margins.var(0), weights=data.weight)
  np.testing.assert_allclose(plug.gamma.epsilon, epsilon, rtol=1e-5)
  assert plug.coupled

  losses, _, carry = call(plug, H, data)
  base, _ = objectives.ensemble_distill(H, jnp.array(data.rewards[1:]), beta=0.5, selection="mean")
  np.testing.assert_allclose(losses, base + 0.05 * objectives.forward_kl(H), rtol=1e-5)
  selected = np.average(base, weights=data.weight)
  report = plug.report(carry, plug.hyper())
  np.testing.assert_allclose(report["gamma/slack"], epsilon - selected, rtol=1e-4)
  np.testing.assert_allclose(
    report["gamma/value"], 0.05 * np.exp(-0.1 * (selected - epsilon) / epsilon), rtol=1e-4
  )
  _, _, still = call(plug, H, data, carry=carry, training=0.0)
  assert still["dual"].log_alpha == carry["dual"].log_alpha


def test_coupled_says_which_objectives_are_no_sums_over_examples():
  sums = {"example", "mean", "lcb"}
  for selection in ("batch", "example", "running", "worst", "soft", "mean", "hull", "lcb"):
    plug = EnsembleDistill(0.1, selection=selection, members=K)
    assert plug.coupled == (selection not in sums), selection
  assert not DPO(0.1, gamma=0.1).coupled
  assert not Distill(0.1, gamma=0.1).coupled
  assert Distill(0.1, gamma=DualGamma(0.01, epsilon=1.0)).coupled


THREE = np.array([[0, 1, 2]] * B)
TIED = np.array([[0, 1, 1]] * B)
NAN = np.full((1 + K, B, N), np.nan, np.float32)


@pytest.mark.parametrize(
  ("plug", "data", "reason"),
  [
    (DPO(0.1), records(3), "give ranks"),
    (DPO(0.1), records(3, ranks=TIED), "tied"),
    (DPO(0.1, label_smoothing=0.1), records(3, ranks=THREE), "label_smoothing"),
    (DPO(0.1), records(ratings=np.array([[0.0, 1.0]] * B)), "ratings"),
    (DPO(0.1, estimator="chosen"), records(3, ranks=THREE), "first of a pair"),
    (IPO(0.1), records(3, ranks=THREE), "takes pairs"),
    (IPO(0.1), records(ranks=THREE[:, :2]), "not ranks"),
    (Distill(0.1), records(rewards=None), "score it first"),
    (Distill(0.1), records(rewards=NAN), "NaN"),
    (Distill(0.1, member=4), records(), "4 rows"),
    (Distill(0.1, source="ratings"), records(), "ratings"),
    (EnsembleDistill(0.1), records(rewards=None), "score it first"),
    (EnsembleDistill(0.1), records(rewards=NAN), "NaN"),
    (EnsembleDistill(0.1), records(rewards=np.zeros((1, B, N))), "needs a family"),
    (EnsembleDistill(0.1, members=5), records(), "have 3"),
    (EnsembleDistill(0.1, estimator="chosen"), records(3), "first of a pair"),
  ],
)
def test_what_a_plug_cannot_be_fed_is_refused_before_training(plug, data, reason):
  with pytest.raises(ValueError, match=reason):
    plug.check(data)


def test_what_a_plug_can_be_fed_passes_the_check():
  DPO(0.1).check(records(3, ranks=THREE))
  DPO(0.1).check(records(ratings=np.array([[1.0, 0.0]] * B)))
  IPO(0.1).check(records(preference=np.full(B, 0.5)))
  Distill(0.1, gamma=0.1).check(records(3))
  EnsembleDistill(0.1, members=K).check(records(3))
  padded = records(mask=np.array([[True, True]] * (B - 1) + [[True, False]]))
  padded.rewards[:, -1, 1] = np.nan
  EnsembleDistill(0.1).check(padded)


@pytest.mark.parametrize(
  ("build", "reason"),
  [
    (lambda: DPO(0.0), "beta"),
    (lambda: DPO(0.1, gamma=-1.0), "gamma"),
    (lambda: DPO(0.1, label_smoothing=0.5), "label_smoothing"),
    (lambda: DPO(0.1, estimator="best"), "estimator"),
    (lambda: DPO(0.1, gamma=DualGamma(0.01, epsilon=1.0)), "no distillation loss"),
    (lambda: IPO(0.0), "tau"),
    (lambda: Distill(0.1, form="cubic"), "form"),
    (lambda: Distill(0.1, member=-1), "member"),
    (lambda: Distill(0.1, source="scores"), "source"),
    (lambda: Distill(0.1, gamma=DualGamma(0.01)), "disagreement"),
    (lambda: EnsembleDistill(0.1, selection="best"), "selection"),
    (lambda: EnsembleDistill(0.1, selection="hull", form="bernoulli"), "quadratic"),
    (lambda: EnsembleDistill(0.1, statistics="running"), "selection='running'"),
    (lambda: EnsembleDistill(0.1, selection="running"), "members=K"),
    (lambda: EnsembleDistill(0.1, temperature=0.0), "temperature"),
    (lambda: EnsembleDistill(0.1, kappa=-1.0), "kappa"),
  ],
)
def test_settings_that_cannot_work_are_refused_when_the_plug_is_built(build, reason):
  with pytest.raises(ValueError, match=reason):
    build()


def test_an_ensemble_that_agrees_has_no_epsilon():
  data = records(rewards=np.repeat(records().rewards[:1], 1 + K, axis=0))
  with pytest.raises(ValueError, match="disagreement"):
    EnsembleDistill(0.1, gamma=DualGamma(0.01)).resolve(data)
