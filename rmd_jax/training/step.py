"""The compiled programs of a stage: one training step, one evaluation step.

A program is found by what shapes it (stage, optimiser, microbatches, layout, blueprint);
numbers that sweeps vary reach it as an array, so equal stages with other numbers, rates and lengths
run the same program.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from rmd_jax.data.batch import MEMBER_COLUMNS, Batch
from rmd_jax.models.placement import activations
from rmd_jax.training.optimisers import Optimizer
from rmd_jax.training.partitioning import Layout
from rmd_jax.training.stage import Loss, Params, Stage
from rmd_jax.training.state import GROUPS, RNG, Blueprint, TrainState, abstract_state, in_float32

Columns = dict[str, Any]


# --- the loss -------------------------------------------------------------------------------------


def mean_loss(total: Float[Array, "*K"], weight: Float[Array, "*K"]) -> Float[Array, "*K"]:
  """sum / weight, and 0 where a member saw no weight at all."""
  empty = weight == 0
  return jnp.where(empty, 0.0, total / jnp.where(empty, 1.0, weight))


def _checked(loss: Loss, weight: Array, members: int, carry: Any) -> Loss:
  """The loss, with the carry in the dtypes that it came with.

  Raises:
    TypeError: a shape or the carry's structure is not what the stage promised.
  """
  wanted = (members,) if members else ()
  for name, value in (
    ("Loss.sum", loss.sum),
    ("Loss.weight", loss.weight),
    ("denominator", weight),
  ):
    if jnp.shape(value) != wanted:
      raise TypeError(
        f"{name} has shape {jnp.shape(value)}; a stage of {members} members: {wanted}"
      )
  returned: Any = jax.tree.structure(loss.carry)
  given: Any = jax.tree.structure(carry)
  if returned != given:
    raise TypeError(
      f"the objective returned a carry of another structure than it was given:\n{returned}\n{given}"
    )

  def as_given(new: Any, old: Any) -> Array:
    if jnp.shape(new) != old.shape:
      raise TypeError(
        f"the objective's carry changed its shape from {old.shape} to {jnp.shape(new)}"
      )
    return jnp.asarray(new, old.dtype)

  return loss._replace(carry=jax.tree.map(as_given, loss.carry, carry))


# --- gradients ------------------------------------------------------------------------------------


def _split(columns: Columns, parts: int) -> Columns:
  """[B, ...] to [parts, B / parts, ...]; part m has the examples m, m + parts, …

  Strided, so that a batch split over devices yields parts that are split over all of them.
  """
  return {n: _split_axis(v, parts, int(n in MEMBER_COLUMNS)) for n, v in columns.items()}


def _split_axis(value: Array, parts: int, axis: int) -> Array:
  shape = value.shape
  value = value.reshape(*shape[:axis], shape[axis] // parts, parts, *shape[axis + 1 :])
  return jnp.moveaxis(value, axis + 1, 0)


def _join_axis(value: Array, axis: int) -> Array:
  """The inverse of `_split_axis`."""
  value = jnp.moveaxis(value, 0, axis + 1)
  shape = value.shape
  return value.reshape(*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :])


def _is_float(leaf: Array) -> bool:
  return jnp.issubdtype(leaf.dtype, jnp.inexact)


def _gradients(
  stage: Stage,
  parts: int,
  objective: Callable[[Any, Batch], Loss],
  trained: Params,
  frozen: Params,
  columns: Columns,
  weight: Float[Array, "*K"],
  rng: Array,
) -> tuple[Loss, Params]:
  """The loss of the whole batch and its gradient, over `parts` microbatches.

  The gradient is that of sum_k sum_k / weight_k, whatever the number of parts.
  """
  axis = 1 if stage.members else 0

  def outputs(trained: Params, columns: Columns, key: Array) -> Any:
    return stage.outputs({"frozen": frozen, **trained}, Batch(**columns), rng=key)

  def total(loss: Loss) -> Array:
    return mean_loss(loss.sum, weight).sum()

  if parts == 1:

    def whole(trained: Params) -> tuple[Array, Loss]:
      loss = objective(outputs(trained, columns, rng), Batch(**columns))
      return total(loss), loss

    grads, loss = jax.grad(whole, has_aux=True)(trained)
    return loss, grads

  split = _split(columns, parts)
  keys = jax.vmap(functools.partial(jax.random.fold_in, rng))(jnp.arange(parts))
  zeros = jax.tree.map(
    lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)), trained
  )

  def add(grads: Params, more: Params) -> Params:
    return jax.tree.map(lambda g, m: g + m.astype(g.dtype), grads, more)

  def together(out: Any) -> Any:
    return jax.tree.map(lambda leaf: _join_axis(leaf, axis), out)

  if not stage.coupled:  # a sum over examples: each part's gradient adds up

    def one(grads: Params, part: tuple[Columns, Array]) -> tuple[Params, Any]:
      some, key = part

      def share(trained: Params) -> tuple[Array, Any]:
        out = outputs(trained, some, key)
        return total(objective(out, Batch(**some))), out

      more, out = jax.grad(share, has_aux=True)(trained)
      return add(grads, more), out

    grads, out = jax.lax.scan(one, zeros, (split, keys))
    return objective(together(out), Batch(**columns)), grads

  # Coupled: the outputs of all, the loss's gradient with respect to them, and then a second pass.
  _, out = jax.lax.scan(lambda _, part: (None, outputs(trained, *part)), None, (split, keys))
  leaves, structure = jax.tree.flatten(together(out))
  floats = [leaf for leaf in leaves if _is_float(leaf)]

  def of_outputs(floats: list[Array]) -> tuple[Array, Loss]:
    values = iter(floats)
    filled = [next(values) if _is_float(leaf) else leaf for leaf in leaves]
    loss = objective(jax.tree.unflatten(structure, filled), Batch(**columns))
    return total(loss), loss

  cotangents, loss = jax.grad(of_outputs, has_aux=True)(floats)
  cotangents = [_split_axis(c, parts, axis) for c in cotangents]

  def back(grads: Params, part: tuple[Columns, Array, list[Array]]) -> tuple[Params, None]:
    some, key, cotangents = part

    def product(trained: Params) -> Array:
      out = [leaf for leaf in jax.tree.leaves(outputs(trained, some, key)) if _is_float(leaf)]
      return sum((jnp.vdot(o, c) for o, c in zip(out, cotangents, strict=True)), jnp.zeros(()))

    return add(grads, jax.grad(product)(trained)), None

  grads, _ = jax.lax.scan(back, zeros, (split, keys, cotangents))
  return loss, grads


# --- the update -----------------------------------------------------------------------------------


def _update(
  transform: optax.GradientTransformation,
  rate: Array,
  clip: Array,
  params: Any,
  opt: Any,
  grads: Any,
  norm: Float[Array, ""],
  apply: Bool[Array, ""],
) -> tuple[Any, Any]:
  """One optimiser's update of what it owns (all shared parameters, or one member's); or none."""
  scale = jnp.minimum(1.0, clip / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny))
  grads = jax.tree.map(lambda g: g * scale, grads)
  direction, stepped = transform.update(grads, opt, in_float32(params))

  def moved(p: Array, d: Array) -> Array:
    return jnp.where(apply, p - rate * d, p).astype(p.dtype)

  kept = jax.tree.map(lambda new, old: jnp.where(apply, new, old), stepped, opt)
  return jax.tree.map(moved, params, direction), kept


def _finite(new: Any, old: Any) -> Bool[Array, ""]:
  """Whether a carry may be kept; an infinity that stood there already is meant (a least so far)."""
  flags = [
    jnp.all(jnp.isfinite(n) | (n == o))
    for n, o in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True)
    if _is_float(n)
  ]
  return jnp.all(jnp.stack(flags)) if flags else jnp.ones((), bool)


def _step(
  stage: Stage,
  optimizer: Optimizer,
  parts: int,
  names: tuple[str, ...],
  decay: Params,
  state: TrainState,
  frozen: Params,
  columns: Columns,
  values: Float[Array, " H"],
) -> tuple[TrainState, dict[str, Array], Array]:
  """One training step. `values` are `names`' numbers at this step, and the clipping norm last.

  Returns:
    The new state; scalars to log; flags [G] int32, the bad steps in a row where this one is bad
    and 0 where it is not.
  """
  hyper = dict(zip(names, values[:-1], strict=True)) | {"training": jnp.ones(())}
  rate, clip = hyper["learning_rate"], values[-1]
  members = stage.members
  batch = Batch(**columns)
  weight = stage.denominator(batch)

  def objective(outputs: Any, batch: Batch) -> Loss:
    loss = stage.objective(outputs, batch, step=state.step, hyper=hyper, carry=state.carry)
    return _checked(loss, weight, members, state.carry)

  rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng, impl=RNG), state.step)
  loss, grads = _gradients(stage, parts, objective, state.params, frozen, columns, weight, rng)
  grads = in_float32(grads)
  means = mean_loss(loss.sum, weight)

  # A finite norm is a finite gradient: a square that overflows float32 is as unusable as a NaN.
  norm = optax.tree.norm(grads["shared"]) if jax.tree.leaves(grads["shared"]) else jnp.zeros(())
  active = weight != 0  # NaN counts as active, and is then found bad
  carry_good = _finite(loss.carry, state.carry)
  shared_good = jnp.isfinite(norm) & jnp.isfinite(means.sum()) & carry_good
  if members:
    norms = jnp.zeros((members,))
    if jax.tree.leaves(grads["members"]):
      norms = jax.vmap(optax.tree.norm)(grads["members"])
    good = jnp.isfinite(norms) & jnp.isfinite(means) & carry_good
    bad = active & ~good
    if jax.tree.leaves(grads["shared"]):
      bad |= active & ~shared_good
  else:
    bad = (active & ~shared_good)[None]

  update = functools.partial(_update, optimizer.transform(decay["shared"]), rate, clip)
  params, opt = dict(state.params), dict(state.opt)
  params["shared"], opt["shared"] = update(
    params["shared"], opt["shared"], grads["shared"], norm, shared_good & active.any()
  )
  if members and jax.tree.leaves(params["members"]):
    update = functools.partial(_update, optimizer.transform(decay["members"]), rate, clip)
    params["members"], opt["members"] = jax.vmap(update)(
      params["members"], opt["members"], grads["members"], norms, good & active
    )
  keep = active.any() & ~bad.any()
  carry = jax.tree.map(lambda new, old: jnp.where(keep, new, old), loss.carry, state.carry)
  streak = jnp.where(jnp.atleast_1d(active), jnp.where(bad, state.streak + 1, 0), state.streak)

  metrics = {
    "loss/total": means.sum(),
    **({f"loss/member_{k}": means[k] for k in range(members)}),
    **flat(loss.aux),
    "optimizer/learning_rate": rate,
    "optimizer/grad_norm": norm,
    "guard/skipped": (state.skipped + bad).sum(),
  }
  if members:
    del metrics["optimizer/grad_norm"]
    metrics |= {f"optimizer/grad_norm_member_{k}": norms[k] for k in range(members)}
    metrics |= {f"guard/skipped_member_{k}": (state.skipped + bad)[k] for k in range(members)}
    if jax.tree.leaves(grads["shared"]):
      metrics["optimizer/grad_norm_shared"] = norm
  new = TrainState(
    step=state.step + 1,
    params=params,
    opt=opt,
    carry=carry,
    rng=state.rng,
    streak=streak,
    skipped=state.skipped + bad,
  )
  return new, metrics, jnp.where(bad, streak, 0)


def flat(aux: Mapping[str, Any]) -> dict[str, Array]:
  """Scalars by name; a vector [K] becomes name_member_0, name_member_1, …

  Raises:
    TypeError: an entry of more dimensions.
  """
  out: dict[str, Array] = {}
  for name, value in aux.items():
    value = jnp.asarray(value)
    if value.ndim > 1:
      raise TypeError(f"aux[{name!r}] has shape {value.shape}: scalars are logged, or [K]")
    if value.ndim == 0:
      out[name] = value
    else:
      out |= {f"{name}_member_{k}": value[k] for k in range(value.shape[0])}
  return out


# --- programs -------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def train_program(
  stage: Stage,
  optimizer: Optimizer,
  microbatches: int,
  layout: Layout,
  blueprint: Blueprint,
  names: tuple[str, ...],
  carry: Any,
) -> Any:
  """The jitted training step of `(state, frozen, columns, values)`; the state is donated.

  Args:
    stage: static.
    optimizer: static.
    microbatches: number of parts of a batch.
    layout: mesh and rules.
    blueprint: of the parameters.
    names: of the numbers in `values` [len(names) + 1], float32; the last one is the clipping norm.
    carry: (structure, ((shape, dtype), …)) of the objective's state, as `state.frozen_carry` gives.
  """
  blueprint.check_members(stage.members)
  structure, leaves = carry
  shapes = jax.tree.unflatten(structure, [jax.ShapeDtypeStruct(*leaf) for leaf in leaves])
  state = abstract_state(blueprint, optimizer, layout, members=stage.members, carry=shapes)
  placed = jax.tree.map(lambda leaf: leaf.sharding, state)

  def train_step(*arguments: Any) -> Any:
    with activations(layout.constrain(stage.members)):
      return _step(stage, optimizer, microbatches, names, blueprint.decay, *arguments)

  outs = (placed, layout.replicated, layout.replicated)
  return jax.jit(train_step, donate_argnums=0, out_shardings=outs)


@functools.lru_cache(maxsize=64)
def eval_program(stage: Stage, layout: Layout, names: tuple[str, ...]) -> Any:
  """The jitted evaluation of `(params, carry, step, rng, columns, values)`.

  It returns (Loss.sum, Loss.weight, flat aux) and drops the new carry.
  """

  def eval_step(
    params: Params, carry: Any, step: Array, rng: Array, columns: Columns, values: Array
  ) -> tuple[Array, Array, dict[str, Array]]:
    batch = Batch(**columns)
    key = jax.random.fold_in(jax.random.wrap_key_data(rng, impl=RNG), step)
    with activations(layout.constrain(stage.members)):
      outputs = stage.outputs(params, batch, rng=key)
    hyper = dict(zip(names, values, strict=True)) | {"training": jnp.zeros(())}
    loss = stage.objective(outputs, batch, step=step, hyper=hyper, carry=carry)
    return loss.sum, loss.weight, flat(loss.aux)

  return jax.jit(eval_step, out_shardings=layout.replicated)


__all__ = ["GROUPS", "eval_program", "flat", "mean_loss", "train_program"]
