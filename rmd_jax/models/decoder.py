"""A decoder-only language model behind the interface that stages use.

`Decoder` is configuration and handle in one: frozen and hashable, so that it can be a static
argument of a jitted function. Parameters are plain nested dicts of arrays, owned by the caller.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from rmd_jax.data.batch import Batch
from rmd_jax.models import logprobs, sampling
from rmd_jax.models.attention import Places, places
from rmd_jax.models.transformer import Transformer, TransformerConfig, output_table

Tree = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Decoder(TransformerConfig):
  """A decoder-only transformer; the fields are `TransformerConfig`'s.

  All log-probabilities are natural logarithms in float32 (float64 if the parameters are), and
  padding, of whatever ids, changes nothing.
  """

  def init(self, rng: PRNGKeyArray) -> Tree:
    """Fresh parameters: `embedding`, `layers` (stacked), `final_norm`, `unembedding` if untied."""
    return nn.meta.unbox(self._boxed(rng))

  def axes(self) -> Tree:
    """Logical axis names, a tuple for each parameter, in the tree of `init`."""
    boxed = jax.eval_shape(self._boxed, jax.random.key(0))
    return jax.tree.map(
      lambda leaf: tuple(leaf.names),
      boxed,
      is_leaf=lambda leaf: isinstance(leaf, nn.meta.Partitioned),
    )

  def logp(self, params: Tree, batch: Batch) -> Float[Array, "B N"]:
    """log p(response | prompt), summed over the tokens of `response_mask`; 0 for no response."""
    return self.token_logp(params, batch).sum(-1)

  def token_logp(self, params: Tree, batch: Batch) -> Float[Array, "B N R"]:
    """Log-probability of each response token; 0 where `response_mask` is False or past the end."""
    hidden = self._predicting(params, batch)
    b, n, r = batch.responses.shape
    counted = _counted(batch)
    out = logprobs.token_logp(
      hidden.reshape(b, n * r, -1),
      output_table(self, params),
      jnp.where(counted, batch.responses, 0).reshape(b, n * r),
      chunk=self.logit_chunk,
    )
    return jnp.where(counted, out.reshape(b, n, r), 0.0)

  def token_kl(self, params: Tree, reference_params: Tree, batch: Batch) -> Float[Array, "B N"]:
    """KL(reference || policy) of the next token, exact over the vocabulary, on the same prefixes.

    Summed over `response_mask`, as `logp` is. No gradient reaches the reference.
    """
    reference_params = jax.lax.stop_gradient(reference_params)
    b, n, r = batch.responses.shape
    out = logprobs.token_kl(
      self._predicting(reference_params, batch).reshape(b, n * r, -1),
      output_table(self, reference_params),
      self._predicting(params, batch).reshape(b, n * r, -1),
      output_table(self, params),
      chunk=self.logit_chunk,
    )
    return jnp.where(_counted(batch), out.reshape(b, n, r), 0.0).sum(-1)

  def features(self, params: Tree, batch: Batch) -> Float[Array, "B N D"]:
    """Final-norm state at each response's last token (EOS); 0 where there is no response."""
    _, hidden = self._hidden(params, batch)
    last = jnp.maximum(batch.response_length - 1, 0)[:, :, None, None]
    state = jnp.take_along_axis(hidden, last, axis=2)[:, :, 0]
    return jnp.where(batch.mask[:, :, None], state, 0.0)

  def sample(
    self,
    params: Tree,
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
  ) -> sampling.Samples:
    """`samples` responses to each prompt; see `rmd_jax.models.sampling.sample`."""
    return sampling.sample(
      self, params, prompt, prompt_length, rng, samples=samples, max_tokens=max_tokens,
      eos_id=eos_id, temperature=temperature, top_k=top_k, top_p=top_p, rows=rows,
    )  # fmt: skip

  def flops(self, batch: int, prompt: int, responses: int, length: int) -> float:
    """Floating-point operations of one forward pass over [B, P] prompts and [B, N, R] responses.

    A multiply-add counts 2. Attention counts whole blocks (P x P, N*R x P, N x R x R), logits
    response positions only. A training step is 3 times that; recomputation is not counted.
    """
    tokens = prompt + responses * length
    attention = self.width * self.head_dim * 2 * (self.heads + self.kv_heads)
    dense = self.layers * tokens * (attention + 3 * self.width * self.mlp_width)
    pairs = prompt**2 + responses * length * (prompt + length)
    scores = self.layers * 2 * pairs * self.heads * self.head_dim
    return 2.0 * batch * (dense + scores + responses * length * self.width * self.vocab_size)

  def _boxed(self, rng: PRNGKeyArray) -> Tree:
    prompt, response = places(jnp.ones(1, jnp.int32), jnp.ones((1, 1), jnp.int32), (1, 1))
    ids = jnp.zeros((1, 2), jnp.int32)
    return Transformer(self).init(rng, ids, Places(ids, ids), prompt, response)["params"]

  def _hidden(
    self, params: Tree, batch: Batch
  ) -> tuple[Float[Array, "B P D"], Float[Array, "B N R D"]]:
    """Final-norm states of the prompts' and of the responses' tokens."""
    b, p = batch.prompt.shape
    n, r = batch.responses.shape[1:]
    lengths = jnp.asarray(batch.prompt_length), jnp.asarray(batch.response_length)
    prompt, response = places(*lengths, (p, r))

    def joined(of_prompt: Array, of_response: Array) -> Array:
      return jnp.concatenate([of_prompt, of_response.reshape(b, n * r)], axis=1)

    at = Places(*map(joined, prompt, response))
    tokens = joined(jnp.asarray(batch.prompt), jnp.asarray(batch.responses))
    hidden, _ = Transformer(self).apply({"params": params}, tokens, at, prompt, response)
    return hidden[:, :p], hidden[:, p:].reshape(b, n, r, -1)

  def _predicting(self, params: Tree, batch: Batch) -> Float[Array, "B N R D"]:
    """The state that predicts each response token: of the token before it."""
    prompt, response = self._hidden(params, batch)
    last = (batch.prompt_length - 1)[:, None, None]
    first = jnp.take_along_axis(prompt, last, axis=1)[:, None]
    first = jnp.broadcast_to(first, (*response.shape[:2], 1, response.shape[-1]))
    return jnp.concatenate([first, response[:, :, :-1]], axis=2)


def _counted(batch: Batch) -> Bool[Array, "B N R"]:
  """[B, N, R], True on the tokens that count: inside the response and in its mask."""
  index = jnp.arange(batch.responses.shape[-1], dtype=jnp.int32)[None, None]
  return batch.response_mask & (index < batch.response_length[:, :, None])
