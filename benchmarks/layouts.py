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
LAYOUTS: dict[str, Logp] = {"rows": concatenated_logp, "shared": Decoder.logp}


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
      row, rate = compare(size, plan)
      rows.append((f"{prompt}:{length}", f"{count}", *row))
      rates.append(rate)
  d = plan.layout.decoder
  return [
    Table(
      title="1. Rows of prompt + response / shared prompt: log-probabilities, forward and backward",
      columns=(
        "P:R",
        "N",
        "tokens ×",
        "FLOPs ×",
        "time ×",
        "memory ×",
        "rows ms",
        "shared ms",
        "rows compile s",
        "shared compile s",
      ),
      rows=tuple(rows),
      note=(
        f"Above 1, the shared prompt wins. P + R = {plan.row}, {plan.layout.batch} prompts; "
        f"{d.layers} layers of width {d.width}, {d.vocab_size} tokens. FLOPs are the compiled "
        "programs' (unrolled, logits in one piece); memory is their peak of temporaries. Both "
        "layouts make logits for response tokens only, and recompute layers in the backward pass."
      ),
    )
  ], rates


def compare(size: Size, plan: Plan) -> tuple[tuple[Cell, ...], Rate]:
  """One row of the table, and the rate of the shared layout."""
  batch = batch_columns(size.dataset(batches=1).batch(np.arange(size.batch)))
  columns = jax.device_put(batch)
  params = size.params
  whole = dataclasses.replace(size.decoder, scan_layers=False, logit_chunk=1 << 30)
  programs: dict[str, Compiled] = {}
  flops = {}
  for name, logp in LAYOUTS.items():
    programs[name] = compiled(gradient(logp, size.decoder), params, columns)
    flops[name] = compiled(gradient(logp, whole), params, columns).flops
  results = [jax.device_get(made.program(params, columns)) for made in programs.values()]
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max()), *results
  )
  matmul = Matmul(plan.matmul)
  times = interleave(
    {"matmul": matmul}
    | {name: partial(made.program, params, columns) for name, made in programs.items()},
    plan.effort,
  )
  rows, shared = programs["rows"], programs["shared"]
  p, n, r = size.prompt, size.responses, size.length
  name = f"{size.name}: gradient of logp, P:R = {p}:{r}, N = {n}"
  rate = Rate(name, size.flops(), times["shared"], matmul.flops / times["matmul"])
  row = (
    n * (p + r) / (p + n * r),
    flops["rows"] / flops["shared"],
    Spread.of(times["rows"] / times["shared"]),
    rows.temporary_bytes / shared.temporary_bytes,
    1e3 * float(np.median(times["rows"])),
    1e3 * float(np.median(times["shared"])),
    rows.seconds,
    shared.seconds,
  )
  return row, rate
