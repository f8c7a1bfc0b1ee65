"""What is measured: models and batches, from the quickstart's to a wide one."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from benchmarks.timing import Effort
from rmd_jax.data.batch import Dataset
from rmd_jax.models.decoder import Decoder


@dataclasses.dataclass(frozen=True)
class Size:
  """A policy and its batch, without padding: what is computed is what counts.

  Attributes:
    name: in the tables.
    decoder: the model.
    batch: examples a step.
    prompt: tokens of a prompt.
    responses: to each prompt.
    length: tokens of a response.
  """

  name: str
  decoder: Decoder
  batch: int
  prompt: int
  responses: int
  length: int

  def dataset(self, *, rewards: int = 0, members: int = 0, batches: int = 4) -> Dataset:
    """Random examples, the same at every call.

    Args:
      rewards: rows of stored rewards; 0: none, and no reference log-probabilities.
      members: rows of member weights; 0: none.
      batches: how many batches of examples.
    """
    rng = np.random.default_rng(0)
    m, n, r = self.batch * batches, self.responses, self.length
    vocab = self.decoder.vocab_size
    prompt = rng.integers(0, vocab, (m, self.prompt)).astype(np.int32)
    responses = rng.integers(0, vocab, (m, n, r)).astype(np.int32)
    scores = rng.normal(size=(max(rewards, 1), m, n)).astype(np.float32)
    reference = (rng.normal(size=(m, n)) - r * np.log(vocab)).astype(np.float32)
    return Dataset(
      ids=np.array([f"{i}" for i in range(m)]),
      prompt=prompt,
      prompt_length=np.full(m, self.prompt, np.int32),
      responses=responses,
      response_length=np.full((m, n), r, np.int32),
      response_mask=np.ones((m, n, r), bool),
      weight=np.ones(m, np.float32),
      reference_logp=reference if rewards else None,
      rewards=scores if rewards else None,
      member_weight=np.ones((members, m), np.float32) if members else None,
    )

  @property
  def params(self) -> Any:
    """The policy's first parameters."""
    return _params(self.decoder)

  def flops(self, *, logits: bool = True) -> float:
    """Of the model in a training step: three forward passes' worth.

    Args:
      logits: whether there are any; a reward model has none.
    """
    decoder = self.decoder if logits else dataclasses.replace(self.decoder, vocab_size=0)
    return 3 * decoder.flops(self.batch, self.prompt, self.responses, self.length)


@functools.cache  # compiled once
def _params(decoder: Decoder) -> Any:
  return jax.jit(decoder.init)(jax.random.key(0))


@dataclasses.dataclass(frozen=True)
class Plan:
  """A run of all benchmarks.

  Attributes:
    steps: sizes at which training steps are measured.
    profiled: sizes of which it is said where the time goes.
    layout: the layouts' model and batch; prompt, responses and length are then varied.
    row: tokens of prompt and response together, in the layouts' batches.
    counts: responses a prompt there.
    vocabularies: of the log-probabilities.
    tokens: whose log-probabilities are taken.
    chunk: tokens whose logits exist at a time.
    width: of the states that the logits are made from.
    microbatches: of the accumulating align steps.
    matmul: size of the square product.
    effort: of every comparison.
  """

  steps: tuple[Size, ...]
  profiled: tuple[Size, ...]
  layout: Size
  row: int
  counts: tuple[int, ...]
  vocabularies: tuple[int, ...]
  tokens: int
  chunk: int
  width: int
  microbatches: int
  matmul: int
  effort: Effort


# gin/runs/quickstart.gin: models/tiny.gin on the world's pairs.
TINY = Size(
  name="tiny",
  decoder=Decoder(
    vocab_size=181, layers=4, width=64, heads=4, kv_heads=2, head_dim=16, mlp_width=192
  ),
  batch=32,
  prompt=32,
  responses=2,
  length=24,
)
# gin/runs/jsonl.gin: models/small.gin on bytes; half its batch.
SMALL = Size(
  name="small",
  decoder=Decoder(
    vocab_size=259, layers=4, width=128, heads=4, kv_heads=2, head_dim=32, mlp_width=384
  ),
  batch=8,
  prompt=192,
  responses=2,
  length=128,
)
# As wide as two cores bear, with a vocabulary that counts.
WIDE = Size(
  name="wide",
  decoder=Decoder(
    vocab_size=8192, layers=4, width=256, heads=4, kv_heads=2, head_dim=64, mlp_width=768
  ),
  batch=2,
  prompt=192,
  responses=2,
  length=64,
)
# Smoke: every number is there, none means anything.
SMOKE = Size(
  name="smoke",
  decoder=Decoder(vocab_size=37, layers=1, width=8, heads=2, kv_heads=1, head_dim=4, mlp_width=20),
  batch=4,
  prompt=6,
  responses=2,
  length=3,
)

FULL = Plan(
  steps=(TINY, SMALL),
  profiled=(TINY, SMALL, WIDE),
  layout=WIDE,
  row=256,
  counts=(2, 4),
  vocabularies=(32_768, 131_072),
  tokens=1024,
  chunk=128,
  width=128,
  microbatches=4,
  matmul=2048,
  effort=Effort(seconds=12.0, least=5, most=60),
)
QUICK = Plan(
  steps=(SMOKE,),
  profiled=(SMOKE,),
  layout=SMOKE,
  row=8,
  counts=(2,),
  vocabularies=(64,),
  tokens=32,
  chunk=8,
  width=8,
  microbatches=2,
  matmul=64,
  effort=Effort(seconds=0.0, least=2, most=2),
)
