import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from reference import TINY, make_batch

from rmd_jax.errors import UserError
from rmd_jax.models import RewardEnsemble


def is_names(leaf):
  return isinstance(leaf, tuple)


@functools.partial(jax.jit, static_argnums=0)
def step(ensemble, params, batch, weights):
  """Rewards, and the gradient of one loss a member; every member weighs responses differently."""

  def loss(params):
    rewards = ensemble.rewards(params, batch)
    return (weights * rewards + 0.1 * rewards**2).sum(), rewards

  return jax.grad(loss, has_aux=True)(params)


def member(params, k):
  """Member k alone, as an ensemble of one."""
  alone = jax.tree.map(lambda leaf: leaf[k : k + 1], params["members"])
  return {**params, "members": alone}


def random_parameters(ensemble):
  return reference.random_like(shapes(ensemble), seed=1)


def trunk_of(ensemble, params, k):
  if ensemble.kind == "heads":
    return params["frozen"]["trunk"]
  return jax.tree.map(lambda leaf: leaf[k], params["members"]["trunk"])


def naive_rewards(ensemble, params, k, batch):
  """Member k: the head on the state at the last token; 0 for a missing response. Float64."""
  out = np.zeros(batch.response_length.shape)
  trunk = trunk_of(ensemble, params, k)
  for where, row, _ in reference.each_response(batch):
    state = reference.hidden(TINY, trunk, row)[-1]
    out[where] = state @ params["members"]["head"]["kernel"][k]
  return out


@pytest.mark.parametrize("kind", ["full", pytest.param("heads", marks=pytest.mark.slow)])
def test_each_member_is_a_reward_model(kind):
  """Rewards by their definition, and the gradient of each member's loss, in float64."""
  ensemble = RewardEnsemble(TINY, members=3, kind=kind)
  params = reference.exact(random_parameters(ensemble))
  ensemble = RewardEnsemble(
    reference.variant(dtype="float64", param_dtype="float64"), members=3, kind=kind
  )
  batch = make_batch(1)
  weights = np.random.default_rng(0).normal(size=(3, 3, 3))
  with jax.enable_x64(True):
    grads, rewards = jax.tree.map(np.asarray, step(ensemble, params, batch, weights))

  def loss(params):
    naive = np.stack([naive_rewards(ensemble, params, k, batch) for k in range(3)])
    return (weights * naive + 0.1 * naive**2).sum()

  naive = np.stack([naive_rewards(ensemble, params, k, batch) for k in range(3)])
  np.testing.assert_allclose(rewards, naive, rtol=1e-10, atol=1e-10)
  assert (rewards[:, 0, 2] == 0).all()  # no such response
  for name, direction, slope in reference.slopes(loss, params):
    expected = 0.0 if "frozen" in name else slope
    np.testing.assert_allclose(reference.dot(grads, direction), expected, rtol=1e-6, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "heads"])
def test_members_together_equal_members_alone(kind):
  ensemble, single = (RewardEnsemble(TINY, members=k, kind=kind) for k in (3, 1))
  params = random_parameters(ensemble)
  batch = make_batch(1)
  weights = np.random.default_rng(0).normal(size=(3, 3, 3)).astype(np.float32)
  grads, rewards = step(ensemble, params, batch, weights)
  for k in range(3):
    alone_grads, alone = step(single, member(params, k), batch, weights[k : k + 1])
    np.testing.assert_allclose(rewards[k], alone[0], rtol=1e-5, atol=1e-5)
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
      member(grads, k)["members"],
      alone_grads["members"],
    )
  assert not np.allclose(rewards[0], rewards[1])


def shapes(ensemble, **trunk):
  return jax.eval_shape(lambda key: ensemble.init(key, **trunk), jax.random.key(0))


@pytest.mark.parametrize(
  "kind, train_trunk, filled",
  [
    ("full", False, {"members": {"head", "trunk"}}),
    ("heads", False, {"members": {"head"}, "frozen": {"trunk"}}),
    ("heads", True, {"members": {"head"}, "shared": {"trunk"}}),
  ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_and_axes(kind, train_trunk, filled, tied):
  decoder = reference.variant(tie_embeddings=tied)
  ensemble = RewardEnsemble(decoder, members=4, kind=kind, train_trunk=train_trunk)
  params, axes = shapes(ensemble), ensemble.axes()
  assert {name: set(params[name]) for name in ("frozen", "shared", "members")} == {
    "frozen": set(), "shared": set(), **filled
  }  # fmt: skip
  assert jax.tree.structure(axes, is_leaf=is_names) == jax.tree.structure(params)
  for part in params:
    for names, leaf in zip(
      jax.tree.leaves(axes[part], is_leaf=is_names), jax.tree.leaves(params[part]), strict=True
    ):
      assert len(names) == leaf.ndim
      assert (names[0] == "member" and leaf.shape[0] == 4) is (part == "members")
  assert "unembedding" not in str(jax.tree.structure(params))  # K copies of it would be waste


@pytest.mark.slow
def test_frozen_trunk_gets_no_gradient_and_a_trained_one_does():
  batch = make_batch(2)
  weights = np.ones((2, 3, 3), np.float32)
  frozen = RewardEnsemble(TINY, members=2, kind="heads")
  trained = RewardEnsemble(TINY, members=2, kind="heads", train_trunk=True)
  params = random_parameters(frozen)
  moved = {"frozen": {}, "shared": params["frozen"], "members": params["members"]}
  grads, rewards = step(frozen, params, batch, weights)
  assert all((leaf == 0).all() for leaf in jax.tree.leaves(grads["frozen"]))
  assert (np.asarray(grads["members"]["head"]["kernel"]) != 0).any()
  other_grads, same = step(trained, moved, batch, weights)
  np.testing.assert_allclose(same, rewards, rtol=1e-6)
  assert all((leaf != 0).any() for leaf in jax.tree.leaves(other_grads["shared"]))


def unlike(leaf):
  """Whether the members' values have nothing to do with each other."""
  rows = np.asarray(leaf).reshape(len(leaf), -1)
  return np.abs(np.corrcoef(rows)[~np.eye(len(leaf), dtype=bool)]).max() < 0.9


def test_a_given_trunk_is_every_members_and_heads_are_their_own():
  trunk = {**reference.parameters(TINY), "unembedding": np.zeros((12, 37), np.float32)}
  rng = jax.random.key(3)
  full, heads, fewer = (
    RewardEnsemble(TINY, members=k, kind=kind).init(rng, trunk=trunk)
    for k, kind in ((3, "full"), (3, "heads"), (2, "full"))
  )
  assert "unembedding" not in full["members"]["trunk"]
  for k in range(3):
    got = jax.tree.map(lambda leaf: leaf[k], full["members"]["trunk"])  # noqa: B023
    jax.tree.map(np.testing.assert_array_equal, got, reference.parameters(TINY))
  kernel = full["members"]["head"]["kernel"]
  assert unlike(kernel)
  np.testing.assert_array_equal(heads["members"]["head"]["kernel"], kernel)
  np.testing.assert_array_equal(fewer["members"]["head"]["kernel"], kernel[:2])


@pytest.mark.slow
def test_fresh_members_start_from_their_own():
  fresh = jax.jit(RewardEnsemble(TINY, members=3, kind="full").init)(jax.random.key(3))["members"]
  for path, leaf in jax.tree_util.tree_leaves_with_path(fresh):
    assert "scale" in str(path) or unlike(leaf), path


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"kind": "lora"}, "kind = 'lora'"),
    ({"members": 0}, "members is 0"),
    ({"train_trunk": True}, "for kind 'heads'"),
  ],
)
def test_impossible_ensembles_are_refused(changes, words):
  with pytest.raises(UserError, match=words):
    RewardEnsemble(**{"decoder": TINY, "members": 2, "kind": "full", **changes})


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "heads"])
def test_members_sharded_over_devices(kind):
  ensemble = RewardEnsemble(TINY, members=4, kind=kind)
  params = random_parameters(ensemble)
  batch = make_batch(4, b=2)
  weights = np.random.default_rng(0).normal(size=(4, 2, 3)).astype(np.float32)
  expected = step(ensemble, params, batch, weights)
  mesh = jax.sharding.Mesh(np.reshape(jax.devices(), (2, 4)), ("data", "member"))

  def place(names, leaf):
    spec = ["member" if name == "member" else None for name in names]
    return jax.device_put(leaf, jax.NamedSharding(mesh, jax.P(*spec)))

  sharded = jax.tree.map(place, ensemble.axes(), params, is_leaf=is_names)
  rows = jax.NamedSharding(mesh, jax.P("data"))
  got = step(ensemble, sharded, jax.tree.map(lambda x: jax.device_put(x, rows), batch), weights)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), got, expected)
  assert len(got[1].sharding.device_set) == 8


def test_half_precision_trunks_give_float32_rewards():
  decoder = reference.variant(dtype="bfloat16", param_dtype="bfloat16")
  ensemble = RewardEnsemble(decoder, members=2, kind="full")
  batch = jax.tree.map(jnp.asarray, make_batch(5))
  assert jax.eval_shape(ensemble.rewards, shapes(ensemble), batch).dtype == jnp.float32
