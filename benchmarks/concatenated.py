"""The layout that other libraries train on: a row of prompt and response for each response.

Our own network and our own log-probabilities, so that only the layout differs; like ours, it makes
logits for response tokens alone. (Libraries that slice full logits pay for those of prompts, too.)
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from rmd_jax.data.batch import Batch
from rmd_jax.models.attention import Places
from rmd_jax.models.decoder import Decoder
from rmd_jax.models.logprobs import token_logp
from rmd_jax.models.transformer import Transformer, output_table


def concatenated_logp(decoder: Decoder, params: Any, batch: Batch) -> Float[Array, "B N"]:
  """What `Decoder.logp` gives, of a batch without padding."""
  b, n, r = batch.responses.shape
  p = batch.prompt.shape[1]
  prompts = jnp.repeat(batch.prompt, n, axis=0)
  targets = batch.responses.reshape(b * n, r)
  rows = jnp.concatenate([prompts, targets], axis=1)
  position = jnp.broadcast_to(jnp.arange(p + r, dtype=jnp.int32)[None], rows.shape)
  at = Places(jnp.ones_like(rows), position)
  states, _ = Transformer(decoder).apply({"params": params}, rows, at, at)
  predicting = states[:, p - 1 : -1]
  table = output_table(decoder, params)
  logp = token_logp(predicting, table, targets, chunk=decoder.logit_chunk)
  return logp.reshape(b, n, r).sum(-1)
