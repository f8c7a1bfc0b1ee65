"""Attention of one prompt and N responses, and where their tokens stand.

A response token attends to the prompt and to the earlier tokens of its own response, in two blocks
under one softmax; R x R' of different responses is never computed. What may be seen is a function
of segment and logical position, which `places` derives from the lengths, and never of the array
index.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

HIDDEN = -1e30  # finite: a query that sees nothing must stay free of NaN


class Places(NamedTuple):
  """Where tokens stand: a query sees the keys of its own segment at no later position.

  Segment 0 is padding, which nothing sees.
  """

  segment: Int[Array, "..."]
  position: Int[Array, "..."]


class Keys(NamedTuple):
  """Keys and values, [..., T, G, C] each, and where they stand, [..., T]."""

  key: Float[Array, "... T G C"]
  value: Float[Array, "... T G C"]
  places: Places


class Rotation(NamedTuple):
  """Rotary angles of each token, one for each pair of a head's channels."""

  cos: Float[Array, "B T 1 E"]
  sin: Float[Array, "B T 1 E"]


def places(
  prompt_length: Int[Array, " B"], response_length: Int[Array, "B N"], size: tuple[int, int]
) -> tuple[Places, Places]:
  """Segments and positions of [B, P] prompt and [B, N, R] response tokens, `size` = (P, R).

  A response's positions continue from its prompt's true length.
  """
  batch, responses = response_length.shape
  p = jnp.arange(size[0], dtype=jnp.int32)
  r = jnp.arange(size[1], dtype=jnp.int32)
  prompt = Places(
    (p[None] < prompt_length[:, None]).astype(jnp.int32),
    jnp.broadcast_to(p[None], (batch, size[0])),
  )
  response = Places(
    (r[None, None] < response_length[:, :, None]).astype(jnp.int32),
    jnp.broadcast_to(prompt_length[:, None, None] + r[None, None], (batch, responses, size[1])),
  )
  return prompt, response


def visible(query: Places, key: Places) -> Bool[Array, "... Q T"]:
  """Which keys [..., T] each query [..., Q] may attend to."""
  same = query.segment[..., :, None] == key.segment[..., None, :]
  return (
    same
    & (key.segment[..., None, :] > 0)
    & (key.position[..., None, :] <= query.position[..., :, None])
  )


def rotate(x: Float[Array, "B T H C"], turn: Rotation) -> Float[Array, "B T H C"]:
  """Rotary embedding in the half-split convention (Su et al., arXiv 2104.09864; as Llama)."""
  first, second = jnp.split(x.astype(turn.cos.dtype), 2, axis=-1)
  rotated = [first * turn.cos - second * turn.sin, second * turn.cos + first * turn.sin]
  return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


class Attended(NamedTuple):
  """Attention to one block of keys, before normalisation: the sum is `mix` / `total`."""

  top: Float[Array, "*B Q E 1"]
  total: Float[Array, "*B Q E 1"]
  mix: Float[Array, "*B Q E C"]


def attend_block(
  query: Float[Array, "*B Q E C"],
  key: Float[Array, "*B T C"],
  value: Float[Array, "*B T C"],
  seen: Bool[Array, "*A Q T"],
) -> Attended:
  """Attention of E query heads that share keys to one block; float32 or better inside."""
  *lead, q, e, c = query.shape
  exact = jnp.promote_types(query.dtype, jnp.float32)
  rows = query.reshape(*lead, q * e, c)
  scores = jnp.einsum("...qc,...tc->...qt", rows, key, preferred_element_type=exact)
  # Added, not selected: the backward pass then has nothing to do here.
  hide = jnp.where(seen, 0.0, HIDDEN).astype(exact)[..., None, :]
  scores = scores.reshape(*lead, q, e, -1) + hide
  top = jax.lax.stop_gradient(scores).max(-1, keepdims=True)
  mass = jnp.exp(scores - top)
  total = mass.sum(-1, keepdims=True)
  mass = mass.reshape(*lead, q * e, -1).astype(value.dtype)
  mix = jnp.einsum("...qt,...tc->...qc", mass, value, preferred_element_type=exact)
  return Attended(top, total, mix.reshape(query.shape))


def merge(one: Attended, two: Attended) -> Array:
  """The attention to two blocks of keys together."""
  top = jnp.maximum(one.top, two.top)
  a, b = jnp.exp(one.top - top), jnp.exp(two.top - top)
  return (one.mix * a + two.mix * b) / (one.total * a + two.total * b)


def attend(
  query: Float[Array, "B T H C"],
  at: Places,
  prompt: Keys,
  own: Keys | None = None,
  *,
  skip: int = 0,
) -> Float[Array, "B T H C"]:
  """Grouped-query attention: all tokens to the prompt, a response's also to its own.

  Two blocks under one softmax, computed for each block alone and then weighed. A query that sees
  nothing gets some finite value.

  Args:
    query: queries of `skip` prompt tokens, then N * Q of the responses; scaled here.
    at: where they stand, [B, T].
    prompt: keys of the prompt, [B, P, ...].
    own: keys of the responses, [B, N, R, ...]; None if there are none.
    skip: how many of the queries are the prompt's.
  """
  b, t, h, c = query.shape
  g = prompt.key.shape[-2]
  query = (query * jnp.asarray(c**-0.5, query.dtype)).reshape(b, t, g, h // g, c)
  query = query.transpose(0, 2, 1, 3, 4)  # [B, G, T, E, C]: no score is ever transposed
  key, value = (leaf.transpose(0, 2, 1, 3) for leaf in (prompt.key, prompt.value))
  first = attend_block(query, key, value, visible(at, prompt.places)[:, None])
  out = first.mix / first.total
  if own is not None:
    n = own.key.shape[1]

    def by_response(leaf: Array) -> Array:
      return leaf[:, :, skip:].reshape(b, g, n, -1, *leaf.shape[3:])

    key, value = (leaf.transpose(0, 3, 1, 2, 4) for leaf in (own.key, own.value))
    rows = Places(*(leaf[:, skip:].reshape(b, n, -1) for leaf in at))
    seen = visible(rows, own.places)[:, None]
    second = attend_block(by_response(query), key, value, seen)
    both = merge(Attended(*(by_response(leaf) for leaf in first)), second)
    out = jnp.concatenate([out[:, :, :skip], both.reshape(b, g, -1, h // g, c)], axis=2)
  return out.astype(query.dtype).transpose(0, 2, 1, 3, 4).reshape(b, t, h, c)
