"""Reward models as one array axis: K members in a single vmapped program."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from rmd_jax.data.batch import Batch
from rmd_jax.errors import UserError
from rmd_jax.models.decoder import Decoder

Tree = dict[str, Any]
KINDS = ("full", "heads")


def init_head(rng: PRNGKeyArray, width: int, dtype: str) -> Tree:
  """A scalar head without bias (a constant cancels in margins): reward of variance 1 at start."""
  return {"kernel": jax.random.normal(rng, (width,), dtype) * width**-0.5}


def apply_head(head: Tree, features: Float[Array, "B N D"]) -> Float[Array, "B N"]:
  """Rewards in float32 or better; 0 where the features are 0 (no such response)."""
  exact = jnp.promote_types(features.dtype, jnp.float32)
  return jnp.einsum("bnd,d->bn", features.astype(exact), head["kernel"].astype(exact))


@dataclasses.dataclass(frozen=True)
class RewardEnsemble:
  """K reward models with a scalar head on a decoder's state at the response's last token.

  Attributes:
    decoder: the trunk; its output projection is not used and not kept.
    members: K, all of them (the model on all the data counts).
    kind: "full", K trunks and heads; "heads", one trunk and K heads.
    train_trunk: ("heads" only) train the one trunk on all members' losses together. Members are
      then no longer independent of each other.
  """

  decoder: Decoder
  members: int
  kind: str
  train_trunk: bool = False

  def __post_init__(self) -> None:
    if self.kind not in KINDS:
      raise UserError(f"RewardEnsemble.kind = {self.kind!r}; use one of {KINDS}.")
    if self.members < 1:
      raise UserError(f"RewardEnsemble.members is {self.members}; it must be at least 1.")
    if self.train_trunk and self.kind == "full":
      raise UserError(
        "RewardEnsemble.train_trunk is for kind 'heads'; kind 'full' trains every trunk. "
        "Leave it out."
      )

  def init(self, rng: PRNGKeyArray, trunk: Tree | None = None) -> Tree:
    """Parameters {"frozen", "shared", "members"}; every leaf of "members" is [K, ...].

    Member k depends on `rng` and k only. Heads always start from their own initialisation.

    Args:
      rng: key.
      trunk: parameters of `decoder` to start from, the same for each member; None for a fresh
        initialisation, each member's own in kind "full".
    """
    keys = jax.vmap(lambda k: jax.random.fold_in(rng, k))(jnp.arange(self.members))
    d = self.decoder
    heads = jax.vmap(lambda key: init_head(jax.random.fold_in(key, 1), d.width, d.param_dtype))(
      keys
    )
    out: Tree = {"frozen": {}, "shared": {}, "members": {"head": heads}}
    if self.kind == "full":
      if trunk is None:
        trunks = jax.vmap(lambda key: self._trunk(d.init(key)))(keys)
      else:
        trunks = jax.tree.map(
          lambda leaf: jnp.broadcast_to(leaf[None], (self.members, *leaf.shape)), self._trunk(trunk)
        )
      out["members"]["trunk"] = trunks
    else:
      where = "shared" if self.train_trunk else "frozen"
      out[where]["trunk"] = self._trunk(
        d.init(jax.random.fold_in(rng, 0)) if trunk is None else trunk
      )
    return out

  def axes(self) -> Tree:
    """Logical axis names in the tree of `init`; "member" leads in "members"."""
    trunk = self._trunk(self.decoder.axes())
    out: Tree = {"frozen": {}, "shared": {}, "members": {"head": {"kernel": ("member", "embed")}}}
    if self.kind == "full":
      out["members"]["trunk"] = jax.tree.map(
        lambda names: ("member", *names), trunk, is_leaf=lambda leaf: isinstance(leaf, tuple)
      )
    else:
      out["shared" if self.train_trunk else "frozen"]["trunk"] = trunk
    return out

  def rewards(self, params: Tree, batch: Batch) -> Float[Array, "K B N"]:
    """Each member's reward of each response, float32 or better; 0 where there is no response."""
    members = params["members"]
    if self.kind == "full":
      return jax.vmap(
        lambda member: apply_head(member["head"], self.decoder.features(member["trunk"], batch))
      )(members)
    trunk = params["shared"]["trunk"] if self.train_trunk else params["frozen"]["trunk"]
    if not self.train_trunk:
      trunk = jax.lax.stop_gradient(trunk)
    features = self.decoder.features(trunk, batch)
    return jax.vmap(lambda head: apply_head(head, features))(members["head"])

  @staticmethod
  def _trunk(params: Tree) -> Tree:
    """A decoder's parameters (or axes) without the output projection."""
    return {name: leaf for name, leaf in params.items() if name != "unembedding"}
