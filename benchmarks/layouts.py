"""One prompt for all its responses, against a row for each response.

Both give log-probabilities and their gradient; that they give the same ones is checked first.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from benchmarks.concatenated import concatenated_logp
from benchmarks.sizes import Plan, Size
from benchmarks.tables import Cell, Table
from benchmarks.timing import Compiled, Matmul, Rate, Spread, compiled, interleave
from rmd_jax.data.batch import Batch
from rmd_jax.models.decoder import Decoder
from rmd_jax.training.partitioning import batch_columns

Logp = Callable[[Decoder, Any, Batch], jax.Array]
LAYOUTS: dict[str, Logp] = {
  "rows, all logits": partial(concatenated_logp, all_logits=True),
  "rows": concatenated_logp,
  "shared prompt": Decoder.logp,
}
OURS = "shared prompt"


def gradient(logp: Logp, decoder: Decoder) -> Any:
  """The jitted (log-probabilities [B, N], gradient) of a loss that differs between responses."""

  def loss(params: Any, columns: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    out = logp(decoder, params, Batch(**columns))
    sign = jax.numpy.where(jax.numpy.arange(out.shape[1]) == 0, 1.0, -1.0)[None]
    return (out * sign).mean(), out

  return jax.jit(jax.grad(loss, has_aux=True))


def run(plan: Plan) -> tuple[list[Table], list[Rate]]:
  """The comparison at each ratio of prompt to response, and number of responses."""
  rows: list[tuple[Cell, ...]] = []
  rates: list[Rate] = []
  for prompt, length in ((3, 1), (1, 1)):
    unit = plan.row // (prompt + length)
    for count in plan.counts:
      size = dataclasses.replace(
        plan.layout, prompt=prompt * unit, length=length * unit, responses=count
      )
      more, rate = compare(size, plan, f"{prompt}:{length}")
      rows += more
      rates.append(rate)
  d = plan.layout.decoder
  return [
    Table(
      title="1. A row for each response / shared prompt: log-probabilities, forward and backward",
      columns=("P:R", "N", "layout", "tokens ×", "FLOPs ×", "time ×", "MiB ×", "ms", "compile s"),
      rows=tuple(rows),
      note=(
        f"× is the shared prompt's; above 1, it wins. P + R = {plan.row}, {plan.layout.batch}"
        f" prompts; {d.layers} layers of width {d.width}, {d.vocab_size} tokens, layers computed"
        " again in the backward pass. FLOPs are the compiled programs', with loops unrolled; MiB,"
        " their peak of temporaries. All logits: the prompts' too, sliced off afterwards."
      ),
    )
  ], rates


def compare(size: Size, plan: Plan, ratio: str) -> tuple[list[tuple[Cell, ...]], Rate]:
  """The rows of one shape of batch, and the rate of the shared layout."""
  host = size.dataset(batches=1).batch(np.arange(size.batch))
  columns = jax.device_put(batch_columns(host))
  unrolled = dataclasses.replace(size.decoder, scan_layers=False, logit_chunk=1 << 30)
  programs: dict[str, Compiled] = {}
  flops: dict[str, float] = {}
  for name, logp in LAYOUTS.items():
    programs[name] = compiled(gradient(logp, size.decoder), size.params, columns)
    flops[name] = compiled(gradient(logp, unrolled), size.params, columns).flops
  expected = jax.device_get(programs[OURS].program(size.params, columns))
  for made in programs.values():
    jax.tree.map(_expect_close, jax.device_get(made.program(size.params, columns)), expected)

  matmul = Matmul(plan.matmul)
  calls = {name: partial(made.program, size.params, columns) for name, made in programs.items()}
  times = interleave({"matmul": matmul, **calls}, plan.effort)
  p, n, r = size.prompt, size.responses, size.length
  per_row, per_prompt = n * (p + r), p + n * r
  rows: list[tuple[Cell, ...]] = [
    (
      ratio,
      f"{n}",
      name,
      1.0 if name == OURS else per_row / per_prompt,
      flops[name] / flops[OURS],
      Spread.of(times[name] / times[OURS]),
      made.temporary_bytes / programs[OURS].temporary_bytes,
      1e3 * float(np.median(times[name])),
      made.seconds,
    )
    for name, made in programs.items()
  ]
  step = f"{size.name}: gradient of logp, P:R = {p}:{r}, N = {n}"
  return rows, Rate(step, size.flops(), times[OURS], matmul.flops / times["matmul"])


def _expect_close(got: np.ndarray, expected: np.ndarray) -> None:
  np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
