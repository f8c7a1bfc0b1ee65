"""K = 5 reward models in one vmapped program, against five runs in turn.

The five are the same models on the same batches, each with the program of one member; that both
ways log the same losses is checked first.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks.sizes import Plan, Size
from benchmarks.steps import Step
from benchmarks.tables import Cell, Table
from benchmarks.timing import Matmul, Rate, Spread, interleave
from rmd_jax.models.ensemble import RewardEnsemble
from rmd_jax.stages.reward import RewardModels

MEMBERS = 5


def run(plan: Plan) -> tuple[list[Table], list[Rate]]:
  """The comparison at each size."""
  rows: list[tuple[Cell, ...]] = []
  rates: list[Rate] = []
  for size in plan.steps:
    row, seen = compare(size, plan)
    rows.append(row)
    rates += seen
  return [
    Table(
      title="4. Five reward models in turn / in one program: a training step of all",
      columns=(
        "size",
        "time ×",
        "compile ×",
        "in turn ms",
        "together ms",
        "in turn compile s",
        "together compile s",
        "in turn MiB",
        "together MiB",
      ),
      rows=tuple(rows),
      note=(
        "Above 1, one program wins. Compiling in turn is once for all five, as one process does it;"
        " five processes would each do it. MiB: the program's peak of temporaries."
      ),
    )
  ], rates


def compare(size: Size, plan: Plan) -> tuple[tuple[Cell, ...], list[Rate]]:
  """One row of the table, and the rates of both ways."""
  ensemble = RewardEnsemble(decoder=size.decoder, members=MEMBERS, kind="full")
  alone = RewardEnsemble(decoder=size.decoder, members=1, kind="full")
  params = jax.jit(ensemble.init)(jax.random.key(0))

  def step(models: RewardEnsemble, params: Any, like: Step | None = None) -> Step:
    data = size.dataset(members=models.members)
    return Step(RewardModels(models), size, data, params, models.axes(), like=like)

  together = step(ensemble, params)
  runs: list[Step] = []
  for k in range(MEMBERS):
    member = jax.tree.map(lambda leaf, k=k: leaf[k : k + 1], params)
    runs.append(step(alone, member, runs[0] if runs else None))

  def in_turn() -> list[Any]:
    return [jax.block_until_ready(run()) for run in runs]

  together(), in_turn()
  losses = [float(run.metrics["loss/total"]) for run in runs]
  joint = [float(together.metrics[f"loss/member_{k}"]) for k in range(MEMBERS)]
  np.testing.assert_allclose(joint, losses, rtol=1e-4)

  matmul = Matmul(plan.matmul)
  contenders: dict[str, Callable[[], Any]] = {
    "matmul": matmul,
    "in turn": in_turn,
    "together": together,
  }
  times = interleave(contenders, plan.effort)
  row = (
    size.name,
    Spread.of(times["in turn"] / times["together"]),
    runs[0].compiled.seconds / together.compiled.seconds,
    1e3 * float(np.median(times["in turn"])),
    1e3 * float(np.median(times["together"])),
    runs[0].compiled.seconds,
    together.compiled.seconds,
    runs[0].compiled.temporary_bytes / 2**20,
    together.compiled.temporary_bytes / 2**20,
  )
  peak = matmul.flops / times["matmul"]
  flops = MEMBERS * size.flops(logits=False)
  rates = [
    Rate(f"{size.name}: 5 reward models {name}", flops, times[name], peak)
    for name in ("in turn", "together")
  ]
  return row, rates
