"""Meshes, placement by logical names, and the same numbers on one device and on eight."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from training_toys import AXES, COUPLED, Ensemble, Pairs, Stepper, assert_trees_equal, data, init

from rmd_jax.errors import UserError
from rmd_jax.training import partitioning
from rmd_jax.training.optimisers import Adafactor, AdamW
from rmd_jax.training.partitioning import MeshConfig, Rules, layout, shardings
from rmd_jax.training.state import Blueprint, abstract_state


def specs(tree):
  return jax.tree.map(lambda leaf: leaf.sharding.spec, tree)


def test_minus_one_takes_the_rest_and_fewer_devices_are_the_first():
  assert MeshConfig(data=-1, tensor=2).mesh().shape["data"] == 4
  small = MeshConfig(data=2).mesh()
  assert list(small.devices.flat) == jax.devices()[:2]
  assert MeshConfig().mesh().devices.size == 1


@pytest.mark.parametrize(
  "config, message",
  [
    (MeshConfig(data=4, fsdp=4), r"data = 4, fsdp = 4, tensor = 1, member = 1\) needs 16 devices"),
    (MeshConfig(data=-1, fsdp=3), "8 devices do not divide by 3, so data = -1"),
    (MeshConfig(data=-1, fsdp=-1), "on one axis at most"),
    (MeshConfig(tensor=0), "at least 1"),
  ],
)
def test_sizes_that_do_not_fit_are_refused_by_name(config, message):
  with pytest.raises(UserError, match=message):
    config.mesh()


def test_parameters_lie_where_the_rules_say():
  mesh = MeshConfig(data=2, fsdp=2, tensor=2).mesh()
  placed = shardings(AXES, mesh, init(0))
  assert jax.tree.map(lambda s: s.spec, placed) == {
    "embedding": P(("tensor",), ("fsdp",)),
    "hidden": P(("fsdp",), ("tensor",)),
    "bias": P(("tensor",)),
    "out": P(("tensor",)),
  }
  rules = Rules(mlp=(), other=(("experts", ("tensor",)),))
  placed = shardings({"w": ("mlp", "experts")}, mesh, {"w": np.zeros((4, 4))}, rules)
  assert placed["w"].spec == P(None, ("tensor",))


def test_a_dimension_that_does_not_divide_stays_whole_and_is_logged_once(monkeypatch):
  said = []
  monkeypatch.setattr(partitioning, "log", said.append)
  partitioning._say_once.cache_clear()
  place = layout(MeshConfig(tensor=8))
  for _ in range(2):
    assert place.sharding(("embed", "kv_heads"), (8, 4), "['key']").spec == P(None, None)
  assert len(said) == 1
  assert "['key']" in said[0]
  assert "kv_heads dimension of 4 does not split 8 ways" in said[0]


def test_of_two_dimensions_with_one_mesh_axis_the_first_gets_it():
  place = layout(MeshConfig(tensor=2))
  assert place.sharding(("heads", "mlp"), (4, 4)).spec == P(("tensor",), None)


def test_axes_that_do_not_name_the_dimensions_are_refused():
  mesh = MeshConfig().mesh()
  with pytest.raises(ValueError, match="do not name the dimensions"):
    shardings({"w": ("embed",)}, mesh, {"w": np.zeros((2, 2))})
  with pytest.raises(ValueError, match="different trees"):
    shardings({"v": ("embed",)}, mesh, {"w": np.zeros(2)})
  with pytest.raises(UserError, match="'experts'"):
    shardings({"w": ("experts",)}, mesh, {"w": np.zeros(2)})


def test_adam_slots_lie_where_their_parameters_lie():
  stage = Ensemble(members=4, trunk=True)
  place = layout(MeshConfig(fsdp=2, tensor=2, member=2))
  blueprint = Blueprint.of(stage.params(), stage.axes)
  state = abstract_state(blueprint, AdamW(weight_decay=0.0), place, members=4, carry=())
  for group in ("shared", "members"):
    assert specs(state.opt[group].mu) == specs(state.params[group])
    assert specs(state.opt[group].nu) == specs(state.params[group])
  assert state.opt["shared"].count.sharding.spec == P()
  assert state.opt["members"].count.sharding.spec == P(("member",))
  assert specs(state.params["members"])["hidden"] == P(("member",), ("fsdp",), ("tensor",))


def test_adafactor_statistics_lie_where_the_dimensions_they_kept_lie():
  stage = Ensemble(members=2)
  place = layout(MeshConfig(fsdp=2, tensor=2, member=2))
  blueprint = Blueprint.of(stage.params(), stage.axes)
  optimizer = Adafactor(min_dim_size_to_factor=2)
  state = abstract_state(blueprint, optimizer, place, members=2, carry=())
  factored = state.opt["members"][0]
  assert state.params["members"]["hidden"].shape == (2, 8, 16)
  rows, columns = factored.v_row["hidden"], factored.v_col["hidden"]
  assert {rows.shape, columns.shape} == {(2, 8), (2, 16)}
  wanted = {(2, 8): P(("member",), ("fsdp",)), (2, 16): P(("member",), ("tensor",))}
  assert rows.sharding.spec == wanted[rows.shape]
  assert columns.sharding.spec == wanted[columns.shape]
  assert factored.v["bias"].sharding.spec == P(("member",), ("tensor",))  # not factored


def test_a_batch_is_split_over_examples_and_members():
  place = layout(MeshConfig(data=2, fsdp=2, member=2))
  columns = {"prompt": np.zeros((8, 3)), "member_weight": np.zeros((4, 8))}
  with_members = {k: v.spec for k, v in place.columns(columns, 4).items()}
  split = ("data", "fsdp")
  assert with_members == {"prompt": P(split), "member_weight": P(("member",), split)}
  without = {k: v.spec for k, v in place.columns(columns, 0).items()}
  split = ("data", "fsdp", "member")  # would idle otherwise
  assert without == {"prompt": P(split), "member_weight": P(None, split)}
  with pytest.raises(UserError, match=r"batch = 6 does not divide by 4, .*data = 2 x fsdp = 2"):
    place.check_batch(6, 4, "batch")


CUBE = MeshConfig(data=2, fsdp=2, tensor=2)
MEMBER = MeshConfig(data=4, member=2)
FSDP = MeshConfig(fsdp=8)
TRUNK = Ensemble(members=4, trunk=True)
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
  "stage, parts, mesh",
  [
    (COUPLED, 2, CUBE),
    (TRUNK, 1, MEMBER),
    pytest.param(COUPLED, 2, FSDP, marks=SLOW),
    pytest.param(Pairs(), 1, CUBE, marks=SLOW),
    pytest.param(Pairs(), 1, MEMBER, marks=SLOW),
    pytest.param(Pairs(), 2, FSDP, marks=SLOW),
    pytest.param(TRUNK, 2, CUBE, marks=SLOW),
    pytest.param(TRUNK, 1, FSDP, marks=SLOW),
    pytest.param(COUPLED, 1, MEMBER, marks=SLOW),
  ],
)
def test_eight_devices_give_the_numbers_of_one(stage, parts, mesh):
  examples = data(members=stage.members)
  one = Stepper(stage, microbatches=parts).steps(examples, 4)
  many = Stepper(stage, microbatches=parts, mesh=mesh).steps(examples, 4)
  assert_trees_equal(many.state, one.state, rtol=2e-4, atol=2e-5)
  for got, wanted in zip(many.metrics, one.metrics, strict=True):
    assert got == pytest.approx(wanted, rel=1e-4, abs=1e-5)
  abstract = abstract_state(
    many.blueprint, AdamW(weight_decay=0.1), many.layout, members=stage.members, carry=stage.carry
  )
  assert specs(many.state) == specs(abstract)  # it stays where it was put, step after step
  leaf = many.state.params["members" if stage.members else "shared"]["hidden"]
  whole = leaf.sharding.shard_shape(leaf.shape) == leaf.shape
  assert whole == (mesh == MEMBER and not stage.members)
