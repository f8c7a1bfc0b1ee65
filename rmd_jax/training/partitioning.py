"""Where arrays lie: a mesh of devices, and rules from logical axis names to mesh axes.

One device is the mesh of ones, so no code has a branch for it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rmd_jax.data.batch import MEMBER_COLUMNS, Batch
from rmd_jax.errors import UserError
from rmd_jax.training.progress import log

MESH_AXES = ("data", "fsdp", "tensor", "member")
Names = tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class Rules:
  """Which mesh axes a logical axis is split over; an empty tuple: none, every device has it whole.

  Attributes:
    batch: examples. A stage without members splits them over the mesh axes of `member` too, which
      would idle otherwise.
    member: ensemble members.
    layers: stacked layers.
    vocab: tokens' rows of the embedding and columns of the logits.
    embed: the residual stream's width.
    heads: query heads.
    kv_heads: key and value heads.
    head_dim: width of a head.
    mlp: hidden width of the feed-forward block.
    length: positions.
    other: rules for the names of models that are not ours, as (name, mesh axes) pairs.
  """

  batch: tuple[str, ...] = ("data", "fsdp")
  member: tuple[str, ...] = ("member",)
  layers: tuple[str, ...] = ()
  vocab: tuple[str, ...] = ("tensor",)
  embed: tuple[str, ...] = ("fsdp",)
  heads: tuple[str, ...] = ("tensor",)
  kv_heads: tuple[str, ...] = ("tensor",)
  head_dim: tuple[str, ...] = ()
  mlp: tuple[str, ...] = ("tensor",)
  length: tuple[str, ...] = ()
  other: tuple[tuple[str, tuple[str, ...]], ...] = ()

  def mesh_axes(self, name: str | None) -> tuple[str, ...]:
    """The mesh axes of a logical axis.

    Raises:
      UserError: there is no rule for that name.
    """
    if name is None:
      return ()
    table = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    table |= dict(table.pop("other"))
    if name not in table:
      raise UserError(
        f"no rule says how the logical axis {name!r} is split: the rules know {sorted(table)};"
        " add it to Rules.other."
      )
    return table[name]


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Sizes of the mesh axes; -1 on one of them takes the devices that the others leave.

  Fewer devices than there are may be used: then the first ones are.

  Attributes:
    data: copies of the model, each on its share of the batch.
    fsdp: as data, and the parameters are split over it too.
    tensor: one matrix product split over devices.
    member: ensemble members.
    rules: which logical axis is split over which of these.
  """

  data: int = 1
  fsdp: int = 1
  tensor: int = 1
  member: int = 1
  rules: Rules = Rules()

  def mesh(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over the given devices, by default all of the run's.

    Raises:
      UserError: the sizes do not fit the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {axis: getattr(self, axis) for axis in MESH_AXES}
    text = ", ".join(f"{axis} = {size}" for axis, size in sizes.items())
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if len(open_axes) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
      raise UserError(
        f"mesh ({text}): sizes are at least 1, and -1 (the rest) on one axis at most."
      )
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if open_axes:
      if len(devices) % fixed:
        raise UserError(
          f"mesh ({text}): {len(devices)} devices do not divide by {fixed}, so {open_axes[0]} = -1"
          " has no size; change the others or give it one."
        )
      sizes[open_axes[0]] = len(devices) // fixed
    used = math.prod(sizes.values())
    if used > len(devices):
      raise UserError(
        f"mesh ({text}) needs {used} devices and there are {len(devices)}: lower the sizes, or put"
        " -1 on one axis."
      )
    shape = tuple(sizes.values())
    if used == len(devices):  # knows a TPU's wires
      return Mesh(mesh_utils.create_device_mesh(shape, devices), MESH_AXES)
    return Mesh(np.asarray(devices[:used]).reshape(shape), MESH_AXES)


@functools.cache
def _say_once(message: str) -> None:
  log(message)


@dataclasses.dataclass(frozen=True)
class Layout:
  """A mesh with its rules: what it takes to place any array by its logical axis names."""

  mesh: Mesh
  rules: Rules = Rules()

  def size(self, mesh_axes: Sequence[str]) -> int:
    """Number of parts that these mesh axes split a dimension into."""
    return math.prod(self.mesh.shape.get(axis, 1) for axis in mesh_axes)

  @property
  def replicated(self) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(self.mesh, PartitionSpec())

  def sharding(self, names: Names, shape: tuple[int, ...], what: str = "an array") -> NamedSharding:
    """The placement of one array.

    A dimension that its mesh axes do not divide stays whole on every device, and the log says so
    once: with 8 ways of tensor parallelism and 4 key-value heads, that is what one wants. Of two
    dimensions with the same mesh axis, the first gets it.

    Args:
      names: logical names, one a dimension.
      shape: the array's shape.
      what: its name in messages.

    Raises:
      UserError: no rule for a name. ValueError: not one name a dimension.
    """
    if len(names) != len(shape):
      raise ValueError(f"{what}: axes {names} do not name the dimensions of shape {shape}")
    taken: set[str] = set()
    parts: list[tuple[str, ...] | None] = []
    for name, size in zip(names, shape, strict=True):
      wanted = tuple(
        axis
        for axis in self.rules.mesh_axes(name)
        if self.mesh.shape.get(axis, 1) > 1 and axis not in taken
      )
      ways = self.size(wanted)
      if ways > 1 and size % ways:
        _say_once(
          f"{what}: its {name} dimension of {size} does not split {ways} ways over {wanted}; every"
          " device holds it whole."
        )
        wanted = ()
      taken.update(wanted)
      parts.append(wanted or None)
    return NamedSharding(self.mesh, PartitionSpec(*parts))

  def batch_axes(self, members: int) -> tuple[str, ...]:
    """The mesh axes that split examples, in a stage with that many members."""
    axes = self.rules.batch
    return axes if members else axes + tuple(a for a in self.rules.member if a not in axes)

  def constrain(self, members: int) -> Callable[[jax.Array, Names], jax.Array]:
    """What `rmd_jax.models.placement.activations` takes, in a stage with that many members."""
    place = Layout(self.mesh, dataclasses.replace(self.rules, batch=self.batch_axes(members)))

    def constrained(x: jax.Array, names: Names) -> jax.Array:
      if self.mesh.size == 1:  # nothing to say, and nothing to compile
        return x
      return jax.lax.with_sharding_constraint(x, place.sharding(names, x.shape, "an activation"))

    return constrained

  def check_batch(self, size: int, members: int, what: str) -> None:
    """Refuses a number of examples that does not divide over the mesh.

    Raises:
      UserError: naming the sizes.
    """
    axes = self.batch_axes(members)
    ways = self.size(axes)
    if size % ways:
      sizes = " x ".join(f"{axis} = {self.mesh.shape[axis]}" for axis in axes)
      raise UserError(f"{what} = {size} does not divide by {ways}, the mesh's {sizes}.")

  def columns(self, columns: Mapping[str, Any], members: int) -> dict[str, NamedSharding]:
    """The placement of a batch's columns: examples over the batch axes, members over theirs.

    Args:
      columns: arrays (or their shapes) by name, as in `Batch`.
      members: of the stage; without members, a [K, B, ...] column is whole in K.
    """
    split = tuple(a for a in self.batch_axes(members) if self.mesh.shape.get(a, 1) > 1)
    member_axes = self.rules.member if members else ()
    placed = {}
    for name, value in columns.items():
      parts: tuple[Any, ...] = (split or None,)
      if name in MEMBER_COLUMNS:
        divides = value.shape[0] % self.size(member_axes) == 0
        parts = ((member_axes or None) if divides else None, *parts)
      placed[name] = NamedSharding(self.mesh, PartitionSpec(*parts))
    return placed

  def put_batch(self, batch: Batch, members: int) -> dict[str, jax.Array]:
    """A host batch's columns on the devices; the compiled programs take them by name."""
    columns = batch_columns(batch)
    return self.put(columns, self.columns(columns, members))

  def put(self, tree: Any, shardings: Any) -> Any:
    """Moves host arrays to the devices; with several processes, each gives its part of a batch."""
    if jax.process_count() == 1:
      return jax.device_put(tree, shardings)
    return jax.tree.map(jax.make_array_from_process_local_data, shardings, tree)


def batch_columns(batch: Batch) -> dict[str, Any]:
  """The columns that a batch has, by name."""
  values = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
  return {name: value for name, value in values.items() if value is not None}


def layout(mesh: Mesh | MeshConfig) -> Layout:
  """The layout of a mesh, with the default rules, or of a configuration, with its own."""
  if isinstance(mesh, MeshConfig):
    return Layout(mesh.mesh(), mesh.rules)
  return Layout(mesh)


def shardings(axes: Any, mesh: Mesh, shapes: Any, rules: Rules = Rules()) -> Any:
  """The placement of a tree of parameters.

  Args:
    axes: a tree of tuples of logical names.
    mesh: the devices.
    shapes: the same tree of arrays, or of anything with a shape.
    rules: from logical names to mesh axes.

  Returns:
    The same tree of `NamedSharding`s.

  Raises:
    ValueError: the trees differ, or a leaf has not one name a dimension.
  """
  place = Layout(mesh, rules)
  structure: Any  # JAX gives tree definitions no comparison that a type checker sees
  leaves, structure = jax.tree_util.tree_flatten_with_path(shapes)
  names, named = jax.tree.flatten(axes, is_leaf=lambda node: isinstance(node, tuple))
  if named != structure:
    raise ValueError(f"axes and parameters are different trees:\n{named}\n{structure}")
  placed = [
    place.sharding(name, leaf.shape, jax.tree_util.keystr(path))
    for name, (path, leaf) in zip(names, leaves, strict=True)
  ]
  return jax.tree.unflatten(structure, placed)


def slot_shardings(
  slots: Any, params: Any, placed: Any, *, mesh: Mesh, member_axes: tuple[str, ...] | None = None
) -> Any:
  """The placement of an optimiser's state: a slot lies where its parameter lies.

  A slot belongs to the parameter whose path ends its own. One of the parameter's shape is placed
  alike; one that lacks a dimension (Adafactor's row and column statistics) is placed as the
  dimensions that it kept; anything else (counters) is whole on every device.

  Args:
    slots: shapes of the optimiser's state.
    params: shapes of the parameters.
    placed: the parameters' placements.
    mesh: the devices.
    member_axes: mesh axes of the leading member axis of every slot; None: there is no such axis.
  """
  flat = jax.tree_util.tree_flatten_with_path(params)[0]
  known = {
    path: (leaf.shape, place.spec)
    for (path, leaf), place in zip(flat, jax.tree.leaves(placed), strict=True)
  }
  first = 0 if member_axes is None else 1
  members = flat[0][1].shape[0] if flat and first else 1
  stacked: tuple[Any, ...] = ()
  if member_axes and members % math.prod(mesh.shape.get(a, 1) for a in member_axes) == 0:
    stacked = (member_axes,)

  def spec(path: Any, shape: tuple[int, ...]) -> PartitionSpec:
    for begin in range(len(path) + 1):
      if path[begin:] not in known:
        continue
      full, parts = known[path[begin:]]
      parts = tuple(parts) + (None,) * (len(full) - len(parts))
      if shape == full:
        return PartitionSpec(*parts)
      for gone in range(first, len(full)):
        if shape == full[:gone] + full[gone + 1 :]:
          return PartitionSpec(*parts[:gone], *parts[gone + 1 :])
    return PartitionSpec(*stacked)

  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: NamedSharding(mesh, spec(tuple(path), leaf.shape)), slots
  )
