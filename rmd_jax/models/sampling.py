"""Sampling with a key-value cache, in one program: N responses to each prompt, prefilled once."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from rmd_jax.errors import UserError
from rmd_jax.models.attention import Places, places
from rmd_jax.models.logprobs import logits as project
from rmd_jax.models.transformer import (
  Cache,
  Transformer,
  TransformerConfig,
  output_table,
)


class Samples(NamedTuple):
  """S responses to each of B prompts.

  Attributes:
    tokens: ids, EOS included where there is one, 0 past the end.
    length: number of tokens, EOS included.
    logp: the model's own log-probability of the tokens, at temperature 1 and without truncation,
      however they were drawn: what `Decoder.logp` gives for them.
    finished: False where `max_tokens` came before EOS; such a response has no EOS.
  """

  tokens: Int[Array, "B S R"]
  length: Int[Array, "B S"]
  logp: Float[Array, "B S"]
  finished: Bool[Array, "B S"]


class State(NamedTuple):
  """The loop's state before token `step`: what predicts it, the keys and values so far, and all
  that was drawn."""

  step: Int[Array, ""]
  hidden: Float[Array, "B S D"]
  key: Float[Array, "L B S R G C"]
  value: Float[Array, "L B S R G C"]
  out: Samples


def choose(
  rng: PRNGKeyArray,
  log_probs: Float[Array, "*B V"],
  *,
  temperature: float | Float[Array, ""],
  top_k: int | None,
  top_p: float | Float[Array, ""] | None,
) -> Int[Array, "*B"]:
  """Draws token ids: temperature first, then the k likeliest, then the nucleus of mass p.

  Args:
    rng: key of this token.
    log_probs: log-probabilities, or logits.
    temperature: 0 takes the likeliest (the lowest id among equals).
    top_k: how many of the likeliest may be drawn; None for all.
    top_p: the smallest set of likeliest tokens whose mass reaches p may be drawn, at least one;
      None for all.
  """
  likeliest = jnp.argmax(log_probs, axis=-1).astype(jnp.int32)
  if isinstance(temperature, int | float) and temperature == 0:
    return likeliest  # and no random bits, which take longest to compile
  temperature = jnp.asarray(temperature, log_probs.dtype)
  scores = log_probs / jnp.where(temperature == 0, 1, temperature)
  size = scores.shape[-1]
  ids = None
  if top_k is not None or top_p is not None:
    scores, ids = jax.lax.top_k(scores, size if top_k is None else min(top_k, size))
  if top_p is not None:
    mass = jax.nn.softmax(scores, axis=-1)
    before = jnp.cumsum(mass, axis=-1) - mass
    before = before.at[..., 0].set(-1.0)  # p = 0 leaves one, too
    scores = jnp.where(before < top_p, scores, -jnp.inf)
  drawn = jax.random.categorical(rng, scores)
  if ids is not None:
    drawn = jnp.take_along_axis(ids, drawn[..., None], axis=-1)[..., 0]
  return jnp.where(temperature == 0, likeliest, drawn.astype(jnp.int32))


def sample(
  config: TransformerConfig,
  params: dict[str, Any],
  prompt: Int[Array, "B P"],
  prompt_length: Int[Array, " B"],
  rng: PRNGKeyArray,
  *,
  samples: int,
  max_tokens: int,
  eos_id: int,
  temperature: float | Float[Array, ""] = 1.0,
  top_k: int | None = None,
  top_p: float | Float[Array, ""] | None = None,
  rows: Int[Array, " B"] | None = None,
) -> Samples:
  """Samples responses until EOS or `max_tokens`; ends as soon as all rows have ended.

  Args:
    config: the decoder.
    params: its parameters.
    prompt: prompts, right-padded.
    prompt_length: their lengths, at least 1.
    rng: with row, sample and position it decides every draw, so that a row's samples do not
      depend on the rows beside it.
    samples: S, responses per prompt.
    max_tokens: R, the longest response, EOS included.
    eos_id: the id that ends a response.
    temperature: 0 is greedy. May be traced.
    top_k: draw among the k likeliest tokens; static.
    top_p: draw from the nucleus of that mass; may be traced.
    rows: row ids for the random numbers; by default 0 … B-1.

  Raises:
    UserError: a number is out of its range.
  """
  for name, value, low in (
    ("samples", samples, 1),
    ("max_tokens", max_tokens, 1),
    ("temperature", temperature, 0),
    ("top_k", top_k, 1),
    ("top_p", top_p, 0),
  ):
    if isinstance(value, int | float) and value < low:
      raise UserError(f"sampling: {name} is {value}; it must be at least {low}.")
  apply: Callable[..., Any] = functools.partial(Transformer(config).apply, {"params": params})
  b, p = prompt.shape
  rows = jnp.arange(b, dtype=jnp.int32) if rows is None else rows
  keys = jax.vmap(functools.partial(jax.random.fold_in, rng))(rows)
  at_prompt, _ = places(prompt_length, jnp.zeros((b, samples), jnp.int32), (p, max_tokens))
  hidden, (prompt_key, prompt_value) = apply(prompt, at_prompt, at_prompt)
  hidden = jnp.take_along_axis(hidden, (prompt_length - 1)[:, None, None], axis=1)
  empty = jnp.zeros(
    (config.layers, b, samples, max_tokens, *prompt_key.shape[3:]), prompt_key.dtype
  )
  table = output_table(config, params)

  def draw(key: Array, log_probs: Array, step: Array) -> Array:
    # One draw for a prompt's S samples: a second key for each would cost more to compile.
    key = jax.random.fold_in(key, step)
    return choose(key, log_probs, temperature=temperature, top_k=top_k, top_p=top_p)

  def unfinished(state: State) -> Array:
    return (state.step < max_tokens) & ~state.out.finished.all()

  def advance(state: State) -> State:
    step, done = state.step, state.out.finished
    log_probs = jax.nn.log_softmax(project(state.hidden, table), axis=-1)
    token = jax.vmap(draw, (0, 0, None))(keys, log_probs, step)
    picked = jnp.take_along_axis(log_probs, token[:, :, None], axis=-1)[:, :, 0]
    token = jnp.where(done, 0, token)
    out = Samples(
      jax.lax.dynamic_update_slice_in_dim(state.out.tokens, token[:, :, None], step, axis=2),
      state.out.length + ~done,
      state.out.logp + jnp.where(done, 0.0, picked),
      done | (token == eos_id),
    )
    _, at_response = places(
      prompt_length, jnp.full((b, samples), step + 1, jnp.int32), (p, max_tokens)
    )
    at = Places(*(jax.lax.dynamic_index_in_dim(x, step, 2, keepdims=False) for x in at_response))
    hidden, (key, value) = apply(
      token, at, at_prompt, at_response,
      Cache(prompt_key, prompt_value, state.key, state.value), step,
    )  # fmt: skip
    return State(
      step + 1,
      hidden,
      jax.lax.dynamic_update_slice_in_dim(state.key, key, step, axis=3),
      jax.lax.dynamic_update_slice_in_dim(state.value, value, step, axis=3),
      out,
    )

  exact = jnp.promote_types(hidden.dtype, jnp.float32)
  start = State(
    jnp.int32(0),
    jnp.broadcast_to(hidden, (b, samples, hidden.shape[-1])),
    empty,
    empty,
    Samples(
      jnp.zeros((b, samples, max_tokens), jnp.int32),
      jnp.zeros((b, samples), jnp.int32),
      jnp.zeros((b, samples), exact),
      jnp.zeros((b, samples), bool),
    ),
  )
  return jax.lax.while_loop(unfinished, advance, start).out
