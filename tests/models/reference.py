"""The decoder written again, naively, in float64 NumPy: a row for each prompt and response, a full
causal mask, full logits. Shares no code with the package, and nothing has to be compiled.

`concatenated_logp` is the exception: the package's own network on the same rows, for benchmarks,
where both layouts have to be equally fast at what they do.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rmd_jax.data.batch import Batch
from rmd_jax.models import Decoder
from rmd_jax.models.attention import Places
from rmd_jax.models.logprobs import token_logp as chunked_token_logp
from rmd_jax.models.transformer import Transformer, output_table

TINY = Decoder(vocab_size=37, layers=2, width=12, heads=4, kv_heads=2, head_dim=6, mlp_width=20)


def variant(**changes):
  return dataclasses.replace(TINY, **changes)


def random_like(shapes, seed=0):
  """Arrays of these shapes, float32 NumPy: `init` without its compilation, norm scales not 1."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: (0.4 * rng.normal(size=x.shape)).astype(np.float32), shapes)


@functools.cache
def parameters(decoder):
  """Random parameters of a decoder."""
  return random_like(jax.eval_shape(decoder.init, jax.random.key(0)))


def make_batch(seed=0, *, b=3, p=7, n=3, r=5, vocab=37, prompt_length=None, response_length=None):
  """Random ids and, unless given, random lengths; every third response is missing if n > 2."""
  rng = np.random.default_rng(seed)
  prompt_length = rng.integers(1, p + 1, b) if prompt_length is None else prompt_length
  if response_length is None:
    response_length = rng.integers(1, r + 1, (b, n))
    if n > 2:
      response_length[0, -1] = 0
  response_length = np.asarray(response_length)
  return Batch(
    prompt=rng.integers(0, vocab, (b, p)).astype(np.int32),
    prompt_length=np.asarray(prompt_length, np.int32),
    responses=rng.integers(0, vocab, (b, n, r)).astype(np.int32),
    response_length=response_length.astype(np.int32),
    response_mask=np.arange(r)[None, None] < response_length[:, :, None],
    weight=np.ones(b, np.float32),
    index=np.arange(b, dtype=np.int32),
  )


def norm(x, scale, eps):
  return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * scale


def softmax(x):
  x = np.exp(x - x.max(-1, keepdims=True))
  return x / x.sum(-1, keepdims=True)


def turn(x, theta):
  """RoPE of [T, H, C], as a rotation of complex numbers."""
  t, _, c = x.shape
  pairs = x[..., : c // 2] + 1j * x[..., c // 2 :]
  angle = np.arange(t)[:, None] * theta ** (-2 * np.arange(c // 2) / c)
  pairs = pairs * np.exp(1j * angle)[:, None]
  return np.concatenate([pairs.real, pairs.imag], axis=-1)


ACTIVATIONS = {
  "silu": lambda x: x / (1 + np.exp(-x)),
  "gelu": lambda x: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
}


def exact(params):
  """Parameters in float64 NumPy."""
  return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)


def hidden(decoder: Decoder, params, tokens):
  """Final-norm states of one sequence [T]."""
  x = params["embedding"][tokens]
  causal = np.tril(np.ones((len(tokens), len(tokens)), bool))
  repeats = decoder.heads // decoder.kv_heads
  for i in range(decoder.layers):
    layer = jax.tree.map(lambda leaf: leaf[i], params["layers"])  # noqa: B023
    y = norm(x, layer["attention_norm"]["scale"], decoder.norm_eps)
    q = turn(np.einsum("td,dhc->thc", y, layer["query"]), decoder.rope_theta)
    k = turn(np.einsum("td,dhc->thc", y, layer["key"]), decoder.rope_theta)
    v = np.einsum("td,dhc->thc", y, layer["value"])
    k, v = np.repeat(k, repeats, axis=1), np.repeat(v, repeats, axis=1)
    scores = np.einsum("qhc,thc->hqt", q, k) / np.sqrt(decoder.head_dim)
    weights = softmax(np.where(causal, scores, -np.inf))
    x = x + np.einsum("hqt,thc,hcd->qd", weights, v, layer["out"], optimize=True)
    y = norm(x, layer["mlp_norm"]["scale"], decoder.norm_eps)
    gated = ACTIVATIONS[decoder.activation](y @ layer["gate"]) * (y @ layer["up"])
    x = x + gated @ layer["down"]
  return norm(x, params["final_norm"]["scale"], decoder.norm_eps)


def log_probs(decoder: Decoder, params, tokens):
  """[T, V], the next token's log-probabilities after each token of a sequence."""
  table = params["embedding"].T if decoder.tie_embeddings else params["unembedding"]
  return np.log(softmax(hidden(decoder, params, tokens) @ table))


def each_response(batch: Batch):
  """Indices and ids: (i, j), prompt and response run together, the prompt's length."""
  for i, j in np.ndindex(*batch.response_length.shape):
    if batch.response_length[i, j]:
      head = batch.prompt[i, : batch.prompt_length[i]]
      tail = batch.responses[i, j, : batch.response_length[i, j]]
      yield (i, j), np.concatenate([head, tail]), len(head)


def token_logp(decoder: Decoder, params, batch: Batch):
  """[B, N, R], what `Decoder.token_logp` should give."""
  out = np.zeros(batch.responses.shape)
  for (i, j), row, start in each_response(batch):
    scores = log_probs(decoder, params, row)
    for k, token in enumerate(row[start:]):
      if batch.response_mask[i, j, k]:
        out[i, j, k] = scores[start + k - 1, token]
  return out


def logp(decoder: Decoder, params, batch: Batch):
  """[B, N], what `Decoder.logp` should give."""
  return token_logp(decoder, params, batch).sum(-1)


def slope(function, params, direction, size=1e-5):
  """The derivative of `function` along `direction`, by central differences in float64."""
  ahead = jax.tree.map(lambda x, d: x + size * d, params, direction)
  behind = jax.tree.map(lambda x, d: x - size * d, params, direction)
  return (function(ahead) - function(behind)) / (2 * size)


def slopes(function, params, seed=0):
  """For each leaf: its name, a random direction [like params] in that leaf, and the slope there."""
  rng = np.random.default_rng(seed)
  zero = jax.tree.map(np.zeros_like, params)
  leaves, tree = jax.tree_util.tree_flatten_with_path(zero)
  for i, (path, leaf) in enumerate(leaves):
    moved = [x for _, x in leaves]
    moved[i] = rng.normal(size=leaf.shape)
    direction = tree.unflatten(moved)
    yield jax.tree_util.keystr(path), direction, slope(function, params, direction)


def dot(x, y):
  """The inner product of two trees."""
  return sum(jax.tree.leaves(jax.tree.map(lambda a, b: np.sum(np.asarray(a) * b), x, y)))


class Rows(NamedTuple):
  """B*N rows of prompt + response without a gap, right-padded to P + R."""

  tokens: np.ndarray
  length: np.ndarray
  source: np.ndarray  # [B*N, R], the index in the row of the state that predicts each token


def concatenate(batch: Batch) -> Rows:
  """The layout that other libraries train on."""
  b, n, r = batch.responses.shape
  tokens = np.zeros((b * n, batch.prompt.shape[1] + r), np.int32)
  length = np.zeros(b * n, np.int32)
  source = np.zeros((b * n, r), np.int32)
  for (i, j), row, start in each_response(batch):
    tokens[i * n + j, : len(row)] = row
    length[i * n + j] = len(row)
    source[i * n + j] = start - 1 + np.arange(r)
  return Rows(tokens, length, source)


def concatenated_logp(decoder: Decoder, params, rows: Rows, batch: Batch):
  """[B, N] as `logp`, by the package's own network and chunked log-probabilities."""
  b, n, r = batch.responses.shape
  t = rows.tokens.shape[1]
  index = jnp.arange(t, dtype=jnp.int32)[None]
  at = Places(
    (index < rows.length[:, None]).astype(jnp.int32), jnp.broadcast_to(index, rows.tokens.shape)
  )
  states, _ = Transformer(decoder).apply({"params": params}, rows.tokens, at, at)
  states = jnp.take_along_axis(states, rows.source[:, :, None], axis=1)
  targets = batch.responses.reshape(b * n, r)
  table = output_table(decoder, params)
  out = chunked_token_logp(states, table, targets, chunk=decoder.logit_chunk)
  return jnp.where(batch.response_mask, out.reshape(b, n, r), 0.0).sum(-1)
