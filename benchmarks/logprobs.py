"""Log-probabilities from logits made a chunk at a time, against all logits at once."""

from functools import partial
from typing import Any

import jax
import numpy as np

from benchmarks.sizes import Plan
from benchmarks.tables import Cell, Table
from benchmarks.timing import Spread, compiled, interleave
from rmd_jax.models.logprobs import token_logp

ROWS = 8


def gradient(chunk: int) -> Any:
  """The jitted value and gradient of the summed log-probabilities."""

  def total(hidden: jax.Array, table: jax.Array, targets: jax.Array) -> jax.Array:
    return token_logp(hidden, table, targets, chunk=chunk).sum()

  return jax.jit(jax.value_and_grad(total, argnums=(0, 1)))


def run(plan: Plan) -> list[Table]:
  """The comparison at each size of vocabulary."""
  rows = tuple(compare(plan, vocabulary) for vocabulary in plan.vocabularies)
  return [
    Table(
      title="2. Logits at once / in chunks: log-probabilities, forward and backward",
      columns=(
        "vocabulary",
        "time ×",
        "memory ×",
        "at once ms",
        "chunks ms",
        "at once MiB",
        "chunks MiB",
        "at once compile s",
        "chunks compile s",
      ),
      rows=rows,
      note=(
        f"Above 1, chunks win. {plan.tokens} tokens of width {plan.width}, {plan.chunk} in a chunk;"
        " memory is the programs' peak of temporaries, beside arguments and gradients."
      ),
    )
  ]


def compare(plan: Plan, vocabulary: int) -> tuple[Cell, ...]:
  """One row of the table."""
  rng = np.random.default_rng(0)
  length = plan.tokens // ROWS
  hidden = rng.normal(size=(ROWS, length, plan.width)).astype(np.float32)
  table = rng.normal(size=(plan.width, vocabulary)).astype(np.float32) * plan.width**-0.5
  targets = rng.integers(0, vocabulary, (ROWS, length)).astype(np.int32)
  arguments = jax.device_put((hidden, table, targets))
  programs = {
    "at once": compiled(gradient(plan.tokens), *arguments),
    "chunks": compiled(gradient(plan.chunk), *arguments),
  }
  results = [jax.device_get(made.program(*arguments)) for made in programs.values()]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), *results)
  del results
  times = interleave(
    {name: partial(made.program, *arguments) for name, made in programs.items()},
    plan.effort,
  )
  once, chunks = programs["at once"], programs["chunks"]
  return (
    f"{vocabulary:,}",
    Spread.of(times["at once"] / times["chunks"]),
    once.temporary_bytes / chunks.temporary_bytes,
    1e3 * float(np.median(times["at once"])),
    1e3 * float(np.median(times["chunks"])),
    once.temporary_bytes / 2**20,
    chunks.temporary_bytes / 2**20,
    once.seconds,
    chunks.seconds,
  )
