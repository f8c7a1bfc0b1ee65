"""The decoder's network: a Linen transformer over one prompt and N responses an example.

Tokens travel as one array [B, P + N*R, D], prompt first, so that every projection is a single
matrix product; only attention tells the two apart. A response token attends to the prompt and to
the earlier tokens of its own response, in two blocks under one softmax; R x R' of different
responses is never computed. What may be seen is a function of segment and logical position, which
`places` derives from the lengths, and never of the array index.
"""

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rmd_jax.errors import UserError

ACTIVATIONS = {"silu": nn.silu, "gelu": nn.gelu}
REMAT_POLICIES = {
  "none": None,
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
DTYPES = ("float32", "bfloat16", "float16", "float64")
HIDDEN = -1e30  # finite: a query that sees nothing must stay free of NaN


def speed_only(default):
  """A field that changes how fast the numbers come, not which: left out of stage keys."""
  return dataclasses.field(default=default, metadata={"key": False})


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """Shape and numerics of a decoder-only transformer.

  Attributes:
    vocab_size: number of token ids.
    layers: number of blocks.
    width: size of the residual stream.
    heads: query heads.
    kv_heads: key and value heads; divides `heads`.
    head_dim: size of a head; even, for the rotation.
    mlp_width: size of the gated MLP's inner layer.
    activation: the gate's nonlinearity, "silu" or "gelu" (tanh approximation).
    tie_embeddings: whether the output projection is the embedding table.
    rope_theta: base of the rotary frequencies.
    norm_eps: added to the mean square in RMSNorm.
    dtype: of activations and matrix products; norms and softmaxes use at least float32.
    param_dtype: of the parameters.
    remat: what the backward pass recomputes: "none", "full" (each block) or "dots" (all but
      matrix products with parameters).
    scan_layers: compile one block and loop over it; False unrolls the loop (longer compilation).
      The parameters are stacked either way.
    logit_chunk: tokens, over the whole batch, whose logits exist at a time.
  """

  vocab_size: int
  layers: int
  width: int
  heads: int
  kv_heads: int
  head_dim: int
  mlp_width: int
  activation: str = "silu"
  tie_embeddings: bool = True
  rope_theta: float = 10_000.0
  norm_eps: float = 1e-6
  dtype: str = "float32"
  param_dtype: str = "float32"
  remat: str = speed_only("none")
  scan_layers: bool = speed_only(True)
  logit_chunk: int = speed_only(4096)

  def __post_init__(self):
    for name in "vocab_size layers width heads kv_heads head_dim mlp_width logit_chunk".split():
      if getattr(self, name) < 1:
        raise UserError(f"Decoder.{name} is {getattr(self, name)}; it must be at least 1.")
    if self.heads % self.kv_heads:
      raise UserError(
        f"Decoder.heads = {self.heads} is no multiple of kv_heads = {self.kv_heads}; "
        "each key head serves a whole number of query heads."
      )
    if self.head_dim % 2:
      raise UserError(f"Decoder.head_dim = {self.head_dim} is odd; RoPE rotates pairs.")
    for name, known in (
      ("activation", tuple(ACTIVATIONS)),
      ("remat", tuple(REMAT_POLICIES)),
      ("dtype", DTYPES),
      ("param_dtype", DTYPES),
    ):
      if getattr(self, name) not in known:
        raise UserError(f"Decoder.{name} = {getattr(self, name)!r}; use one of {known}.")

  @property
  def groups(self) -> int:
    """Query heads per key head."""
    return self.heads // self.kv_heads


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


class Cache(NamedTuple):
  """Keys and values of all layers while sampling S responses to each of B prompts."""

  prompt_key: Float[Array, "L B P G C"]
  prompt_value: Float[Array, "L B P G C"]
  key: Float[Array, "L B S R G C"]
  value: Float[Array, "L B S R G C"]


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


def rotate(x: Float[Array, "B T H C"], angle: Float[Array, "B T E"]) -> Float[Array, "B T H C"]:
  """Rotary embedding in the half-split convention (Su et al., arXiv 2104.09864; as Llama)."""
  cos = jnp.cos(angle)[:, :, None]
  sin = jnp.sin(angle)[:, :, None]
  first, second = jnp.split(x.astype(angle.dtype), 2, axis=-1)
  rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return rotated.astype(x.dtype)


def attend(
  query: Float[Array, "B N Q H C"], at: Places, own: Keys, shared: Keys | None = None
) -> Float[Array, "B N Q H C"]:
  """Grouped-query attention to own keys [B, N, T, ...] and to keys [B, S, ...] that N share.

  Scores, softmax and the sum over keys are in float32 or better.

  Args:
    query: queries; scaled here.
    at: where they stand, [B, N, Q].
    own: keys of the same row (example and response).
    shared: keys of the prompt, which all N rows see; None if there are none.
  """
  b, n, q, h, c = query.shape
  g = own.key.shape[-2]
  exact = jnp.promote_types(query.dtype, jnp.float32)
  query = query.reshape(b, n, q, g, h // g, c) * jnp.asarray(c**-0.5, query.dtype)
  scores = jnp.einsum("bnqghc,bntgc->bnghqt", query, own.key, preferred_element_type=exact)
  scores = jnp.where(visible(at, own.places)[:, :, None, None], scores, HIDDEN)
  if shared is None:
    weights = jax.nn.softmax(scores, axis=-1).astype(query.dtype)
    out = jnp.einsum("bnghqt,bntgc->bnqghc", weights, own.value)
    return out.reshape(b, n, q, h, c)
  rows = Places(at.segment.reshape(b, n * q), at.position.reshape(b, n * q))
  seen = visible(rows, shared.places).reshape(b, 1, 1, n, q, -1)
  before = jnp.einsum("bnqghc,btgc->bghnqt", query, shared.key, preferred_element_type=exact)
  before = jnp.where(seen, before, HIDDEN)
  scores = scores.transpose(0, 2, 3, 1, 4, 5)
  weights = jax.nn.softmax(jnp.concatenate([before, scores], axis=-1), axis=-1)
  weights = weights.astype(query.dtype)
  t = before.shape[-1]
  out = jnp.einsum("bghnqt,btgc->bnqghc", weights[..., :t], shared.value)
  out += jnp.einsum("bghnqt,bntgc->bnqghc", weights[..., t:], own.value)
  return out.reshape(b, n, q, h, c)


def kernel(scale: float, fan_in: int | tuple[int, ...], axes: tuple[str, ...]):
  """Truncated normal of variance `scale` / fan-in, with logical axis names."""
  fan_in = (fan_in,) if isinstance(fan_in, int) else fan_in
  out = tuple(i for i in range(len(axes)) if i not in fan_in)
  init = nn.initializers.variance_scaling(
    scale, "fan_in", "truncated_normal", in_axis=fan_in, out_axis=out
  )
  return nn.with_logical_partitioning(init, axes)


class RMSNorm(nn.Module):
  """Root mean square norm; computed in float32 or better, returned in the compute dtype."""

  config: TransformerConfig

  @nn.compact
  def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    scale = self.param(
      "scale",
      nn.with_logical_partitioning(nn.initializers.ones, ("embed",)),
      (x.shape[-1],),
      jnp.dtype(self.config.param_dtype),
    )
    exact = jnp.promote_types(x.dtype, jnp.float32)
    x = x.astype(exact)
    mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    normed = x * jax.lax.rsqrt(mean_square + self.config.norm_eps)
    return (normed * scale.astype(exact)[None, None]).astype(self.config.dtype)


class Layer(nn.Module):
  """Pre-norm block: attention, then a gated MLP.

  Called with tokens of prompts and responses [B, P + N*R], of prompts alone (prefill), or, where a
  cache is given, of one new token for each of S responses (decoding).
  """

  config: TransformerConfig

  def weight(self, name: str, shape: tuple[int, ...], init) -> Array:
    param = self.param(name, init, shape, jnp.dtype(self.config.param_dtype))
    return param.astype(self.config.dtype)

  @nn.compact
  def __call__(self, x, angle, prompt, response, cache, step):
    c = self.config
    depth = 1 / (2 * c.layers)  # keeps the residual stream's variance near 1 at any depth
    y = RMSNorm(c, name="attention_norm")(x)
    project = {
      name: self.weight(
        name, (c.width, heads, c.head_dim), kernel(1.0, 0, ("embed", axis, "head_dim"))
      )
      for name, heads, axis in (
        ("query", c.heads, "heads"),
        ("key", c.kv_heads, "kv_heads"),
        ("value", c.kv_heads, "kv_heads"),
      )
    }
    query, key, value = (jnp.einsum("btd,dhc->bthc", y, w) for w in project.values())
    query, key = rotate(query, angle), rotate(key, angle)
    if cache is None:
      mixed, kept = self.attention(query, key, value, prompt, response)
    else:
      mixed, kept = self.decode(query, key, value, prompt, response, cache, step)
    out = self.weight(
      "out", (c.heads, c.head_dim, c.width), kernel(depth, (0, 1), ("heads", "head_dim", "embed"))
    )
    x = x + jnp.einsum("bthc,hcd->btd", mixed, out)
    y = RMSNorm(c, name="mlp_norm")(x)
    gate = self.weight("gate", (c.width, c.mlp_width), kernel(1.0, 0, ("embed", "mlp")))
    up = self.weight("up", (c.width, c.mlp_width), kernel(1.0, 0, ("embed", "mlp")))
    down = self.weight("down", (c.mlp_width, c.width), kernel(depth, 0, ("mlp", "embed")))
    inner = ACTIVATIONS[c.activation](jnp.dot(y, gate)) * jnp.dot(y, up)
    return x + jnp.dot(inner, down), kept

  def attention(self, query, key, value, prompt, response):
    """Attention within the call; prefill also returns the prompt's keys and values."""
    b, p = prompt.position.shape
    of_prompt = Keys(key[:, :p], value[:, :p], prompt)
    alone = Keys(*(leaf[:, None] for leaf in of_prompt[:2]), Places(*(a[:, None] for a in prompt)))
    mixed = attend(query[:, None, :p], alone.places, alone)[:, 0]
    if response is None:
      return mixed, (key, value)
    n, r = response.position.shape[1:]
    query, key, value = (
      leaf[:, p:].reshape(b, n, r, *leaf.shape[2:]) for leaf in (query, key, value)
    )
    answered = attend(query, response, Keys(key, value, response), of_prompt)
    return jnp.concatenate([mixed, answered.reshape(b, n * r, *mixed.shape[2:])], axis=1), None

  def decode(self, query, key, value, prompt, response, cache, step):
    """Attention of token `step` of each response; returns that token's keys and values."""
    kept = (key[:, :, None], value[:, :, None])
    key, value = (
      jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), step, axis=2)
      for old, new in zip(cache[2:], kept, strict=True)
    )
    at = Places(*(jax.lax.dynamic_slice_in_dim(leaf, step, 1, axis=2) for leaf in response))
    mixed = attend(
      query[:, :, None], at, Keys(key, value, response), Keys(cache[0], cache[1], prompt)
    )
    return mixed[:, :, 0], kept


class Transformer(nn.Module):
  """Embedding, scanned layers, final norm. The output projection is `unembed`'s business."""

  config: TransformerConfig

  @nn.compact
  def __call__(
    self,
    tokens: Int[Array, "B T"],
    position: Int[Array, "B T"],
    prompt: Places,
    response: Places | None = None,
    cache: Cache | None = None,
    step: Int[Array, ""] | None = None,
  ):
    """Hidden states after the final norm, and the keys and values of the tokens given.

    Args:
      tokens: ids, all within the vocabulary: prompt then responses, or one token a response.
      position: logical positions of those tokens.
      prompt: where the prompt's tokens stand, [B, P].
      response: where the responses' tokens stand, [B, N, R]; None to prefill.
      cache: what was computed before, while decoding.
      step: index of the token being decoded.

    Returns:
      [B, T, D] in the compute dtype, and keys and values [L, ...], or None for a full forward.
    """
    c = self.config
    table = self.param(
      "embedding",
      nn.with_logical_partitioning(nn.initializers.normal(c.width**-0.5), ("vocab", "embed")),
      (c.vocab_size, c.width),
      jnp.dtype(c.param_dtype),
    )
    if not c.tie_embeddings:
      self.param(
        "unembedding", kernel(1.0, 0, ("embed", "vocab")), (c.width, c.vocab_size),
        jnp.dtype(c.param_dtype),
      )  # fmt: skip
    x = jnp.take(table, tokens, axis=0, mode="clip").astype(c.dtype)
    exact = jnp.promote_types(x.dtype, jnp.float32)
    exponent = jnp.arange(c.head_dim // 2, dtype=exact) / (c.head_dim // 2)
    frequency = c.rope_theta**-exponent
    angle = position[:, :, None].astype(exact) * frequency[None, None]
    block = Layer
    if c.remat != "none":
      block = nn.remat(Layer, policy=REMAT_POLICIES[c.remat], prevent_cse=not c.scan_layers)
    layers = nn.scan(
      block,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=(nn.broadcast, nn.broadcast, nn.broadcast, 0, nn.broadcast),
      length=c.layers,
      unroll=1 if c.scan_layers else c.layers,
      metadata_params={nn.PARTITION_NAME: "layers"},
      check_constancy_invariants=False,
    )(c, name="layers")
    x, kept = layers(x, angle, prompt, response, cache, step)
    return RMSNorm(c, name="final_norm")(x), kept


def output_table(config: TransformerConfig, params) -> Float[Array, "D V"]:
  """The output projection, in the compute dtype."""
  table = params["embedding"].T if config.tie_embeddings else params["unembedding"]
  return table.astype(config.dtype)
