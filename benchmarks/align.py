"""An align step on K = 5 stored rewards, on one, and on none (DPO): the loop's step, as it is.

The reward models are not in it, so K should cost nothing.
"""

from typing import Any

import numpy as np

from benchmarks.sizes import Plan, Size
from benchmarks.steps import Step, policy
from benchmarks.tables import Cell, Table
from benchmarks.timing import Matmul, Rate, Spread, interleave
from rmd_jax.objectives.plugs import DPO, Distill, EnsembleDistill
from rmd_jax.stages.align import Alignment
from rmd_jax.stages.sft import NextToken

FAMILY = 5
# The rows of stored rewards: the model on all data, which every run has, and the family after it.
OBJECTIVES: dict[str, tuple[Any, int]] = {
  "DPO": (DPO(beta=0.1), 1),
  "d-DPO, K = 1": (Distill(beta=0.1), 1),
  "e-DPO, K = 5": (EnsembleDistill(beta=0.1), 1 + FAMILY),
}


def run(plan: Plan) -> tuple[list[Table], list[Rate]]:
  """The comparison at each size, and with accumulation at one."""
  rows: list[tuple[Cell, ...]] = []
  rates: list[Rate] = []
  for size in plan.steps:
    more, seen = compare(size, plan)
    rows, rates = rows + more, rates + seen
  # The second size, where there is one: the first one's step is too short to be split.
  rows += accumulating(plan.steps[min(1, len(plan.steps) - 1)], plan)
  return [
    Table(
      title="3. An align step, by objective",
      columns=("size", "step", "time × DPO's", "time × d-DPO's", "ms", "MiB", "compile s"),
      rows=tuple(rows),
      note=(
        "Stored rewards: 1 row for DPO (diagnostics only) and d-DPO, 1 + 5 for e-DPO, which selects"
        " a member by the whole batch. Accumulating, such a selection takes a second forward pass."
        " MiB: the program's peak of temporaries."
      ),
    )
  ], rates


def align_step(size: Size, name: str, microbatches: int = 1) -> Step:
  """The compiled step of one objective."""
  plug, rows = OBJECTIVES[name]
  return Step(
    Alignment(size.decoder, plug),
    size,
    size.dataset(rewards=rows),
    policy(size.params),
    policy(size.decoder.axes()),
    hyper=plug.hyper(),
    carry=plug.init_carry(),
    microbatches=microbatches,
  )


def sft_step(size: Size) -> Step:
  """The compiled step of SFT, on as many responses."""
  return Step(
    NextToken(size.decoder), size, size.dataset(), policy(size.params), policy(size.decoder.axes())
  )


def compare(size: Size, plan: Plan) -> tuple[list[tuple[Cell, ...]], list[Rate]]:
  """The rows of one size; its rates are SFT's and the objectives'."""
  steps = {"SFT": sft_step(size)} | {name: align_step(size, name) for name in OBJECTIVES}
  matmul = Matmul(plan.matmul)
  times = interleave({"matmul": matmul, **steps}, plan.effort)
  dpo, distill = times["DPO"], times["d-DPO, K = 1"]
  rows: list[tuple[Cell, ...]] = [
    (
      size.name,
      name,
      Spread.of(times[name] / dpo),
      Spread.of(times[name] / distill),
      1e3 * float(np.median(times[name])),
      step.compiled.temporary_bytes / 2**20,
      step.compiled.seconds,
    )
    for name, step in steps.items()
  ]
  peak = matmul.flops / times["matmul"]
  rates = [Rate(f"{size.name}: {name}", size.flops(), times[name], peak) for name in steps]
  return rows, rates


def accumulating(size: Size, plan: Plan) -> list[tuple[Cell, ...]]:
  """The rows of steps over several microbatches."""
  names = ("d-DPO, K = 1", "e-DPO, K = 5")
  parts = plan.microbatches
  steps = {name: align_step(size, name, parts) for name in names}
  times = interleave(steps, plan.effort)
  return [
    (
      f"{size.name}, {parts} parts",
      name,
      "",
      Spread.of(times[name] / times[names[0]]),
      1e3 * float(np.median(times[name])),
      steps[name].compiled.temporary_bytes / 2**20,
      steps[name].compiled.seconds,
    )
    for name in names
  ]
