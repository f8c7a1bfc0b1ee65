"""The decoder's network: a Linen transformer over one prompt and N responses an example.

Tokens travel as one array [B, P + N*R, D], prompt first, so that every projection is a single
matrix product; only attention tells the two apart.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rmd_jax.errors import UserError
from rmd_jax.models.attention import Keys, Places, Rotation, attend, rotate
from rmd_jax.models.placement import place

ACTIVATIONS = {"silu": nn.silu, "gelu": nn.gelu}
REMAT_POLICIES = {
  "none": None,
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
DTYPES = ("float32", "bfloat16", "float16", "float64")
SIZES = (
  "layers",
  "width",
  "heads",
  "kv_heads",
  "head_dim",
  "mlp_width",
  "logit_chunk",
)


def speed_only(default: Any) -> Any:
  """A field that changes how fast the numbers come, not which: left out of stage keys."""
  return dataclasses.field(default=default, metadata={"key": False})


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
  """Shape and numerics of a decoder-only transformer.

  Attributes:
    layers: number of blocks.
    width: size of the residual stream.
    heads: query heads.
    kv_heads: key and value heads; divides `heads`.
    head_dim: size of a head; even, for the rotation.
    mlp_width: size of the gated MLP's inner layer.
    vocab_size: number of token ids; 0: the data's vocabulary, which a run fills in.
    activation: the gate's nonlinearity, "silu" or "gelu" (tanh approximation).
    tie_embeddings: whether the output projection is the embedding table.
    rope_theta: base of the rotary frequencies.
    norm_eps: added to the mean square in RMSNorm.
    dtype: of activations and matrix products; norms and softmaxes use at least float32.
    param_dtype: of the parameters.
    remat: what the backward pass recomputes: "none", "full" (each block) or "dots" (all but
      matrix products with parameters). "full" is the fastest on CPU, too, where memory traffic
      costs more than the operations saved.
    scan_layers: compile one block and loop over it; False unrolls the loop (longer compilation).
      The parameters are stacked either way.
    logit_chunk: tokens, over the whole batch, whose logits exist at a time.
  """

  layers: int
  width: int
  heads: int
  kv_heads: int
  head_dim: int
  mlp_width: int
  vocab_size: int = 0
  activation: str = "silu"
  tie_embeddings: bool = True
  rope_theta: float = 10_000.0
  norm_eps: float = 1e-6
  dtype: str = "float32"
  param_dtype: str = "float32"
  remat: str = speed_only("full")
  scan_layers: bool = speed_only(True)
  logit_chunk: int = speed_only(4096)

  def __post_init__(self) -> None:
    for name in SIZES:
      if getattr(self, name) < 1:
        raise UserError(f"Decoder.{name} is {getattr(self, name)}; it must be at least 1.")
    if self.vocab_size < 0:
      raise UserError(f"Decoder.vocab_size is {self.vocab_size}; it must be at least 0.")
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


class Cache(NamedTuple):
  """Keys and values while sampling S responses to each of B prompts; a layer sees its own slice."""

  prompt_key: Float[Array, "*L B P G C"]
  prompt_value: Float[Array, "*L B P G C"]
  key: Float[Array, "*L B S R G C"]
  value: Float[Array, "*L B S R G C"]


def named(init: Callable[..., Any], axes: tuple[str, ...]) -> Callable[..., Any]:
  """An initialiser whose parameter carries logical axis names."""
  return nn.with_logical_partitioning(init, axes)


def kernel(axes: tuple[str, ...], *, inputs: int = 1, scale: float = 1.0) -> Callable[..., Any]:
  """Initialiser with logical axis names: truncated normal of variance `scale` / fan-in.

  Args:
    axes: names; the first `inputs` of them are summed over in the product.
  """
  init = nn.initializers.variance_scaling(
    scale,
    "fan_in",
    "truncated_normal",
    in_axis=tuple(range(inputs)),
    out_axis=tuple(range(inputs, len(axes))),
  )
  return named(init, axes)


class RMSNorm(nn.Module):
  """Root mean square norm; computed in float32 or better, returned in the compute dtype."""

  config: TransformerConfig

  @nn.compact
  def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
    scale = self.param(
      "scale",
      named(nn.initializers.ones, ("embed",)),
      (x.shape[-1],),
      jnp.dtype(self.config.param_dtype),
    )
    exact = jnp.promote_types(x.dtype, jnp.float32)
    x = x.astype(exact)
    mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    normed = x * jax.lax.rsqrt(mean_square + self.config.norm_eps)
    return (normed * scale.astype(exact)[None]).astype(self.config.dtype)


class Layer(nn.Module):
  """Pre-norm block: attention, then a gated MLP.

  Called with tokens of prompts and responses [B, P + N*R], of prompts alone (prefill), or, where a
  cache is given, of one new token for each of S responses (decoding).
  """

  config: TransformerConfig

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "T D"],
    turn: Rotation,
    at: Places,
    prompt: Places,
    response: Places | None,
    cache: Cache | None,
    step: Int[Array, ""] | None,
  ) -> tuple[Float[Array, "T D"], tuple[Array, Array] | None]:
    c = self.config
    depth = 1 / (2 * c.layers)  # keeps the residual stream's variance near 1 at any depth

    def weight(name: str, *shape: int, init: Callable[..., Any]) -> Array:
      param = self.param(name, init, shape, jnp.dtype(c.param_dtype))
      return param.astype(c.dtype)

    def project(name: str, heads: int, axis: str) -> Array:
      w = weight(name, c.width, heads, c.head_dim, init=kernel(("embed", axis, "head_dim")))
      return jnp.dot(y, w.reshape(c.width, -1)).reshape(*turn.cos.shape[:2], heads, c.head_dim)

    y = RMSNorm(c, name="attention_norm")(x)
    query = rotate(project("query", c.heads, "heads"), turn)
    key = rotate(project("key", c.kv_heads, "kv_heads"), turn)
    value = project("value", c.kv_heads, "kv_heads")
    if cache is None:
      mixed, kept = self.attention(query, key, value, at, prompt, response)
    else:
      assert response is not None
      assert step is not None
      mixed, kept = self.decode(query, key, value, at, prompt, response, cache, step)
    init = kernel(("heads", "head_dim", "embed"), inputs=2, scale=depth)
    out = weight("out", c.heads, c.head_dim, c.width, init=init)
    x = x + jnp.dot(mixed.reshape(x.shape[0], -1), out.reshape(-1, c.width))

    y = RMSNorm(c, name="mlp_norm")(x)
    gate = weight("gate", c.width, c.mlp_width, init=kernel(("embed", "mlp")))
    up = weight("up", c.width, c.mlp_width, init=kernel(("embed", "mlp")))
    down = weight("down", c.mlp_width, c.width, init=kernel(("mlp", "embed"), scale=depth))
    inner = ACTIVATIONS[c.activation](jnp.dot(y, gate)) * jnp.dot(y, up)
    return place(x + jnp.dot(inner, down), "batch", None), kept

  def attention(
    self,
    query: Float[Array, "B T H C"],
    key: Float[Array, "B T G C"],
    value: Float[Array, "B T G C"],
    at: Places,
    prompt: Places,
    response: Places | None,
  ) -> tuple[Float[Array, "B T H C"], tuple[Array, Array] | None]:
    """Attention within the call; prefill also returns the prompt's keys and values."""
    p = prompt.position.shape[1]
    of_prompt = Keys(key[:, :p], value[:, :p], prompt)
    if response is None:
      return attend(query, at, of_prompt, skip=p), (key, value)
    size = response.position.shape
    own_key, own_value = (x[:, p:].reshape(*size, *x.shape[2:]) for x in (key, value))
    own = Keys(own_key, own_value, response)
    return attend(query, at, of_prompt, own, skip=p), None

  def decode(
    self,
    query: Float[Array, "B S H C"],
    key: Float[Array, "B S G C"],
    value: Float[Array, "B S G C"],
    at: Places,
    prompt: Places,
    response: Places,
    cache: Cache,
    step: Int[Array, ""],
  ) -> tuple[Float[Array, "B S H C"], tuple[Array, Array]]:
    """Attention of token `step` of each response; returns that token's keys and values."""
    kept = (key[:, :, None], value[:, :, None])
    key = jax.lax.dynamic_update_slice_in_dim(cache.key, kept[0], step, axis=2)
    value = jax.lax.dynamic_update_slice_in_dim(cache.value, kept[1], step, axis=2)
    shared = Keys(cache.prompt_key, cache.prompt_value, prompt)
    return attend(query, at, shared, Keys(key, value, response)), kept


class Transformer(nn.Module):
  """Embedding, scanned layers, final norm. Hidden states out: see `output_table` for logits."""

  config: TransformerConfig

  @nn.compact
  def __call__(
    self,
    tokens: Int[Array, "B T"],
    at: Places,
    prompt: Places,
    response: Places | None = None,
    cache: Cache | None = None,
    step: Int[Array, ""] | None = None,
  ) -> tuple[Float[Array, "B T D"], tuple[Array, Array] | None]:
    """Hidden states after the final norm, and the keys and values of the tokens given.

    Args:
      tokens: ids: prompt then responses, or one token a response.
      at: where those tokens stand, [B, T].
      prompt: where the prompt's tokens stand, [B, P].
      response: where the responses' tokens stand, [B, N, R]; None to prefill.
      cache: what was computed before, while decoding.
      step: index of the token being decoded.

    Returns:
      [B, T, D] in the compute dtype, and keys and values [L, ...], or None for a full forward.
    """
    c = self.config
    if not c.vocab_size:
      raise UserError(
        "Decoder.vocab_size is 0: fill in the vocabulary's size, dataclasses.replace(decoder, "
        "vocab_size=vocabulary.size)."
      )
    table = self.param(
      "embedding",
      named(nn.initializers.normal(c.width**-0.5), ("vocab", "embed")),
      (c.vocab_size, c.width),
      jnp.dtype(c.param_dtype),
    )
    if self.is_initializing() and not c.tie_embeddings:  # otherwise `output_table` reads it
      shape = (c.width, c.vocab_size)
      self.param("unembedding", kernel(("embed", "vocab")), shape, jnp.dtype(c.param_dtype))
    table = place(table, "vocab", None)  # gathered as other weights are, not looked up in slices
    # Ids in padding may be anything; clipped, they cannot give the NaN of a lookup outside.
    x = jnp.take(table, tokens, axis=0, mode="clip").astype(c.dtype)
    exact = jnp.promote_types(x.dtype, jnp.float32)
    exponent = jnp.arange(c.head_dim // 2, dtype=exact) / (c.head_dim // 2)
    frequency = c.rope_theta**-exponent
    angle = at.position[:, :, None, None].astype(exact) * frequency[None, None, None]
    turn = Rotation(jnp.cos(angle), jnp.sin(angle))
    block = Layer
    if c.remat != "none":
      block = nn.remat(Layer, policy=REMAT_POLICIES[c.remat], prevent_cse=not c.scan_layers)
    layers = nn.scan(
      block,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=(*[nn.broadcast] * 4, 0, nn.broadcast),
      length=c.layers,
      unroll=1 if c.scan_layers else c.layers,
      metadata_params={nn.PARTITION_NAME: "layers"},
      check_constancy_invariants=False,
    )(c, name="layers")
    # Tokens lie on one axis inside: weight gradients of [B, T, D] operands cost twice as much on
    # CPU, where XLA transposes the wider one.
    x = place(x, "batch", None, None).reshape(-1, c.width)
    x, kept = layers(x, turn, at, prompt, response, cache, step)
    return RMSNorm(c, name="final_norm")(x).reshape(*tokens.shape, c.width), kept


def output_table(config: TransformerConfig, params: dict[str, Any]) -> Float[Array, "D V"]:
  """The output projection, in the compute dtype."""
  table = params["embedding"].T if config.tie_embeddings else params["unembedding"]
  return place(table.astype(config.dtype), None, "vocab")
