"""What training carries from step to step, and its shapes and placement before any array exists."""

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from rmd_jax.training.optimisers import Optimizer, decay_mask
from rmd_jax.training.partitioning import Layout, shardings, slot_shardings
from rmd_jax.training.stage import Params

GROUPS = ("shared", "members")
RNG = "threefry2x32"  # fixed, so that a checkpoint resumes under any default


@flax.struct.dataclass
class TrainState:
  """Everything a step reads and replaces; what is never updated (`frozen`) stands beside it.

  Attributes:
    step: number of steps done.
    params: `{"shared", "members"}`.
    opt: the optimisers' states, `{"shared", "members"}`; every members' leaf is [K, ...].
    carry: the objective's state.
    rng: the seed's key data; a step uses the key folded with its number.
    streak: bad steps in a row, [G]: one a member, or one in all where there are none.
    skipped: bad steps so far, [G].
  """

  step: Any
  params: Any
  opt: Any
  carry: Any
  rng: Any
  streak: Any
  skipped: Any


@dataclasses.dataclass(frozen=True)
class Blueprint:
  """Parameters without their values: structure, shapes, dtypes, logical axes. Hashable.

  With it, a stage's program is obtained (and compiled, and planned) without weights.
  """

  structure: Any
  shapes: tuple[tuple[tuple[int, ...], str], ...]
  axes: tuple[tuple[str | None, ...], ...]

  @classmethod
  def of(cls, params: Params, axes: Params) -> "Blueprint":
    """The blueprint of a stage's parameters (arrays, or `jax.ShapeDtypeStruct`s).

    Raises:
      ValueError: not the three groups, or axes of another structure.
    """
    for name, tree in (("params", params), ("axes", axes)):
      if set(tree) != {"frozen", *GROUPS}:
        raise ValueError(
          f"{name} must have the keys frozen, shared and members, not {sorted(tree)}"
        )
    structure: Any  # JAX gives tree definitions no comparison that a type checker sees
    leaves, structure = jax.tree.flatten(params)
    names, named = jax.tree.flatten(axes, is_leaf=lambda node: isinstance(node, tuple))
    if named != structure:
      raise ValueError(f"axes and parameters are different trees:\n{named}\n{structure}")
    for leaf, name in zip(leaves, names, strict=True):
      if len(name) != len(leaf.shape):
        raise ValueError(f"axes {name} do not name the dimensions of shape {leaf.shape}")
    return cls(
      structure,
      tuple((tuple(leaf.shape), str(jax.dtypes.canonicalize_dtype(leaf.dtype))) for leaf in leaves),
      tuple(tuple(name) for name in names),
    )

  def check_members(self, members: int) -> None:
    """Refuses parameters whose member axis is not the stage's number of members."""
    for leaf in jax.tree.leaves(self.params["members"]):
      if members == 0 or leaf.shape[:1] != (members,):
        raise ValueError(
          f"every leaf of params['members'] leads with the stage's {members} members; one has shape"
          f" {leaf.shape}"
        )

  @property
  def params(self) -> Params:
    """The parameters as `jax.ShapeDtypeStruct`s."""
    leaves = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in self.shapes]
    return jax.tree.unflatten(self.structure, leaves)

  @property
  def named(self) -> Params:
    """The logical axes as a tree."""
    return jax.tree.unflatten(self.structure, list(self.axes))

  @property
  def decay(self) -> Params:
    """True on the leaves that weight decay applies to."""
    return decay_mask(self.named)

  def shardings(self, layout: Layout) -> Params:
    """The parameters' placement."""
    return shardings(self.named, layout.mesh, self.params, layout.rules)


def in_float32(tree: Any) -> Any:
  """At least float32: what an optimiser computes in, whatever dtype parameters are kept in."""
  return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)


def init_opt(optimizer: Optimizer, decay: Params, params: Params) -> dict[str, Any]:
  """The optimisers' first state, of the members one each."""
  shared = optimizer.transform(decay["shared"]).init(in_float32(params["shared"]))
  if not jax.tree.leaves(params["members"]):
    return {"shared": shared, "members": {}}
  members = jax.vmap(optimizer.transform(decay["members"]).init)(in_float32(params["members"]))
  return {"shared": shared, "members": members}


def abstract_carry(carry: Any) -> Any:
  """The carry's shapes, with Python numbers as strong 32-bit arrays."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      np.shape(x), jax.dtypes.canonicalize_dtype(np.result_type(getattr(x, "dtype", x)))
    ),
    carry,
  )


def frozen_carry(carry: Any) -> tuple[Any, tuple[tuple[tuple[int, ...], str], ...]]:
  """The carry's structure, shapes and dtypes, hashable."""
  leaves, structure = jax.tree.flatten(abstract_carry(carry))
  return structure, tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves)


def abstract_state(
  blueprint: Blueprint, optimizer: Optimizer, layout: Layout, *, members: int, carry: Any
) -> TrainState:
  """The state as `jax.ShapeDtypeStruct`s with their placement.

  Args:
    blueprint: of the parameters.
    optimizer: of both groups.
    layout: where arrays lie.
    members: of the stage.
    carry: the objective's first state, or its shapes.
  """
  params = {group: blueprint.params[group] for group in GROUPS}
  placed = {group: blueprint.shardings(layout)[group] for group in GROUPS}
  opt = jax.eval_shape(functools.partial(init_opt, optimizer, blueprint.decay), params)
  slots = {
    group: slot_shardings(
      opt[group],
      params[group],
      placed[group],
      mesh=layout.mesh,
      member_axes=layout.rules.member if group == "members" else None,
    )
    for group in GROUPS
  }
  flags = jax.ShapeDtypeStruct((max(members, 1),), jnp.int32, sharding=layout.replicated)

  def whole(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout.replicated)

  def at(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  return TrainState(
    step=jax.ShapeDtypeStruct((), jnp.int32, sharding=layout.replicated),
    params=jax.tree.map(at, params, placed),
    opt=jax.tree.map(at, opt, slots),
    carry=jax.tree.map(whole, abstract_carry(carry)),
    rng=jax.ShapeDtypeStruct((2,), jnp.uint32, sharding=layout.replicated),
    streak=flags,
    skipped=flags,
  )


@functools.lru_cache(maxsize=64)
def _opt_program(optimizer: Optimizer, blueprint: Blueprint, layout: Layout, members: int) -> Any:
  """One program for the optimisers' first state, so that equal runs compile it once."""
  state = abstract_state(blueprint, optimizer, layout, members=members, carry=())
  placed = jax.tree.map(lambda leaf: leaf.sharding, state.opt)
  return jax.jit(functools.partial(init_opt, optimizer, blueprint.decay), out_shardings=placed)


def init_state(
  params: Params,
  blueprint: Blueprint,
  optimizer: Optimizer,
  layout: Layout,
  *,
  members: int,
  carry: Any,
  seed: int,
) -> TrainState:
  """The state before the first step. Parameters are copied: steps donate the state's buffers."""
  abstract = abstract_state(blueprint, optimizer, layout, members=members, carry=carry)

  def put(value: Any, like: Any) -> Any:
    where = jax.tree.map(lambda leaf: leaf.sharding, like)
    return jax.device_put(value, where, may_alias=False)

  trained = put({group: params[group] for group in GROUPS}, abstract.params)
  host = jax.tree.map(
    lambda x, like: np.array(x, like.dtype), jax.device_get(carry), abstract.carry
  )
  flags = np.zeros(abstract.streak.shape, np.int32)
  return TrainState(
    step=put(np.zeros((), np.int32), abstract.step),
    params=trained,
    opt=_opt_program(optimizer, blueprint, layout, members)(trained),
    carry=put(host, abstract.carry),
    rng=put(np.array(jax.random.key_data(jax.random.key(seed, impl=RNG))), abstract.rng),
    streak=put(flags, abstract.streak),
    skipped=put(flags.copy(), abstract.skipped),
  )
