"""The layout that other libraries train on: a row of prompt and response for each response.

Our own network and our own log-probabilities, so that only the layout differs.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from rmd_jax.data.batch import Batch
from rmd_jax.models.attention import Places
from rmd_jax.models.decoder import Decoder
from rmd_jax.models.logprobs import token_logp
from rmd_jax.models.transformer import Transformer, output_table


def concatenated_logp(
  decoder: Decoder, params: Any, batch: Batch, *, all_logits: bool = False
) -> Float[Array, "B N"]:
  """What `Decoder.logp` gives, of a batch without padding.

  Args:
    decoder: the model.
    params: its parameters.
    batch: every prompt and response as long as the arrays are.
    all_logits: whether the prompt's tokens get logits too, which nothing reads. Libraries that take
      logits from the model and slice them do that.
  """
  b, n, r = batch.responses.shape
  p = batch.prompt.shape[1]
  prompts = jnp.repeat(batch.prompt, n, axis=0)
  rows = jnp.concatenate([prompts, batch.responses.reshape(b * n, r)], axis=1)
  position = jnp.broadcast_to(jnp.arange(p + r, dtype=jnp.int32)[None], rows.shape)
  at = Places(jnp.ones_like(rows), position)
  states, _ = Transformer(decoder).apply({"params": params}, rows, at, at)
  first = 1 if all_logits else p
  predicting, targets = states[:, first - 1 : -1], rows[:, first:]
  table = output_table(decoder, params)
  logp = token_logp(predicting, table, targets, chunk=decoder.logit_chunk)
  return logp[:, -r:].reshape(b, n, r).sum(-1)
