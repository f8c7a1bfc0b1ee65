"""Log-probabilities from hidden states, a chunk of tokens at a time.

The logits of a batch, [B, T, V], are by far its largest array and are needed only to be reduced to
one number a token. So they are made chunk by chunk and made again in the backward pass: the peak
is one chunk's logits, whatever the vocabulary and the length.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def in_chunks(body: Callable[..., Array], *arrays: Array, chunk: int) -> Float[Array, "B T"]:
  """`body` over pieces of the time axis: [B, c, ...] arrays in, [B, c] out.

  The batch axis stays whole, so that a batch sharded over a mesh stays so in every piece.

  Args:
    body: a function of the pieces; recomputed in the backward pass if there are several.
    arrays: [B, T, ...] each.
    chunk: tokens a piece, B * c; at least one position of each row goes into a piece.
  """
  batch, length = arrays[0].shape[:2]
  pieces = -(-length // max(1, chunk // batch))
  if pieces == 1:
    return body(*arrays)
  size = -(-length // pieces)

  def split(x: Array) -> Array:
    x = jnp.pad(x, [(0, 0), (0, pieces * size - length)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(batch, pieces, size, *x.shape[2:]), 1, 0)

  @jax.checkpoint
  def step(carry: None, piece: tuple[Array, ...]) -> tuple[None, Array]:
    return carry, body(*piece)

  _, out = jax.lax.scan(step, None, tuple(split(x) for x in arrays))
  return jnp.moveaxis(out, 0, 1).reshape(batch, pieces * size)[:, :length]


def logits(hidden: Float[Array, "B T D"], table: Float[Array, "D V"]) -> Float[Array, "B T V"]:
  """Logits in float32 or better, from operands in the compute dtype."""
  exact = jnp.promote_types(hidden.dtype, jnp.float32)
  flat = hidden.reshape(-1, hidden.shape[-1])  # see Transformer on the weight's gradient
  return jnp.dot(flat, table, preferred_element_type=exact).reshape(*hidden.shape[:-1], -1)


def pick(log_probs: Float[Array, "B T V"], targets: Int[Array, "B T"]) -> Float[Array, "B T"]:
  """log_probs at the targets; a masked sum, since a gather's gradient is a scatter into [V]."""
  ids = jnp.arange(log_probs.shape[-1], dtype=targets.dtype)[None, None]
  return jnp.where(ids == targets[..., None], log_probs, 0.0).sum(-1)


def token_logp(
  hidden: Float[Array, "B T D"],
  table: Float[Array, "D V"],
  targets: Int[Array, "B T"],
  *,
  chunk: int,
) -> Float[Array, "B T"]:
  """log p(target) under softmax(hidden @ table), in float32 or better.

  Args:
    hidden: the state that predicts each target.
    table: output projection.
    targets: token ids within the vocabulary.
    chunk: tokens whose logits exist at a time.
  """

  def body(hidden: Array, targets: Array) -> Array:
    scores = logits(hidden, table)
    return pick(scores, targets) - jax.nn.logsumexp(scores, axis=-1)

  return in_chunks(body, hidden, targets, chunk=chunk)


def token_kl(
  reference_hidden: Float[Array, "B T D"],
  reference_table: Float[Array, "D V"],
  hidden: Float[Array, "B T E"],
  table: Float[Array, "E V"],
  *,
  chunk: int,
) -> Float[Array, "B T"]:
  """Exact KL(reference || policy) of the next-token distributions at each position.

  The widths of the two models may differ, the vocabulary may not. Float32 or better.
  """

  def body(reference_hidden: Array, hidden: Array) -> Array:
    reference = jax.nn.log_softmax(logits(reference_hidden, reference_table), axis=-1)
    policy = jax.nn.log_softmax(logits(hidden, table), axis=-1)
    return (jnp.exp(reference) * (reference - policy)).sum(-1)

  return in_chunks(body, reference_hidden, hidden, chunk=chunk)
