"""SFT: fit the policy to demonstrations; the result is the reference of every later stage.

Reads   demonstrations (chosen responses where the data has none of its own).
Writes  sft/checkpoints, sft/metrics.jsonl.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from rmd_jax.data.batch import Batch
from rmd_jax.models.decoder import Decoder
from rmd_jax.stages.context import Context
from rmd_jax.training.loop import Training, fit
from rmd_jax.training.stage import Loss, Params


@dataclasses.dataclass(frozen=True)
class NextToken:
  """Maximum likelihood of response tokens: the mean negative log-likelihood of a token."""

  decoder: Decoder
  members: ClassVar[int] = 0
  coupled: ClassVar[bool] = False

  def outputs(self, params: Params, batch: Batch, *, rng: PRNGKeyArray) -> dict[str, Array]:
    """`logp` [B, N]."""
    return {"logp": self.decoder.logp(params["shared"], batch)}

  def denominator(self, batch: Batch) -> Float[Array, ""]:
    """The weighted number of response tokens."""
    tokens = batch.response_mask.sum((-2, -1))
    return (batch.weight * tokens).sum()

  def objective(
    self,
    outputs: dict[str, Array],
    batch: Batch,
    *,
    step: Array,
    hyper: Mapping[str, Array],
    carry: Any,
  ) -> Loss:
    """The summed negative log-likelihood of the responses."""
    losses = -outputs["logp"].sum(-1)
    total, tokens = (batch.weight * losses).sum(), self.denominator(batch)
    perplexity = jnp.exp(jnp.minimum(total / jnp.maximum(tokens, 1), 80.0))
    return Loss(total, tokens, {"perplexity": perplexity}, carry)


@dataclasses.dataclass(frozen=True)
class Sft:
  """The stage as a run configures it."""

  training: Training

  def run(self, context: Context, directory: Path) -> None:
    """Trains from a fresh initialisation."""
    decoder = context.policy
    data = context.data.demonstrations
    rng = jax.random.key(context.seed)
    fit(
      NextToken(decoder),
      self.training,
      params={"frozen": {}, "shared": jax.jit(decoder.init)(rng), "members": {}},
      axes={"frozen": {}, "shared": decoder.axes(), "members": {}},
      carry=(),
      train=data["train"],
      validation=data["validation"],
      hyper={},
      directory=directory,
      seed=context.seed,
      mesh=context.mesh,
      label=f"sft{context.suffix}",
    )
