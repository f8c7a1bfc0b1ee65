"""`python -m benchmarks`: prints the tables, and writes them to a page when asked."""

import argparse
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # what the numbers in docs/performance.md are of

import jax

from benchmarks import align, breakdown, layouts, logprobs, rewards
from benchmarks.sizes import FULL, QUICK
from benchmarks.tables import Table, check_page, plain, write_markdown
from benchmarks.timing import Rate, Spread

SECTIONS = ("layouts", "logprobs", "align", "rewards", "breakdown")


def measure(sections: Sequence[str], *, quick: bool) -> list[Table]:
  """The tables of the sections named, in order; each is printed when it is there."""
  plan = QUICK if quick else FULL
  tables: list[Table] = []
  rates: list[Rate] = []

  def show(more: list[Table]) -> None:
    for table in more:
      print(f"\n{plain(table)}", flush=True)
    tables.extend(more)

  if "layouts" in sections:
    more, seen = layouts.run(plan)
    show(more)
    rates += seen
  if "logprobs" in sections:
    show(logprobs.run(plan))
  if "align" in sections:
    more, seen = align.run(plan)
    show(more)
    rates += seen
  if "rewards" in sections:
    more, seen = rewards.run(plan)
    show(more)
    rates += seen
  if rates:
    show([shares(rates, plan.matmul)])
  if "breakdown" in sections:
    if jax.default_backend() == "cpu":
      show(breakdown.run(plan, quick=quick))
    else:
      print(f"\nbreakdown: left out, it reads the CPU's trace and this is {jax.default_backend()}.")
  return tables


def shares(rates: Sequence[Rate], matmul: int) -> Table:
  """Each step's model FLOP/s beside the machine's."""
  peak = Spread.of(rates[0].peak / 1e9)
  rows = tuple(
    (
      rate.name,
      rate.flops / 1e9,
      Spread.of(1e3 * rate.seconds),
      Spread.of(rate.flops / rate.seconds / 1e9),
      Spread.of(100 * rate.flops / rate.seconds / rate.peak),
    )
    for rate in rates
  )
  return Table(
    title="5. Model FLOP/s as a share of this machine's float32 matmul",
    columns=("step", "model GFLOP", "ms", "GFLOP/s", "share %"),
    rows=rows,
    note=(
      f"The product of two {matmul} × {matmul} matrices, in the same rounds:"
      f" {peak.median:.0f} GFLOP/s ({peak.low:.0f}–{peak.high:.0f}) beside the first step. Model"
      " FLOPs are Decoder.flops × 3: what layers compute again does not count."
    ),
  )


def heading() -> str:
  """What the numbers were taken on."""
  load = "unknown load"
  if hasattr(os, "getloadavg"):
    load = "load {:.1f} over the last minute, {:.1f} over five, before the start".format(
      *os.getloadavg()
    )
  return (
    f"{os.cpu_count()} cores ({platform.machine()}), {jax.default_backend()}, jax"
    f" {jax.__version__}, float32; {load}. Ratios are taken round by round, A B A B: median"
    " (least–greatest)."
  )


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the benchmarks; the exit status."""
  parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
  parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
  parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, metavar="SECTION")
  parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there, too")
  options = parser.parse_args(arguments)
  if options.markdown is not None:
    try:
      check_page(options.markdown)
    except ValueError as error:
      parser.error(str(error))
  begin = time.perf_counter()
  where = heading()
  print(where, flush=True)
  tables = measure(options.only, quick=options.quick)
  print(f"\n{time.perf_counter() - begin:.0f} s in all.")
  if options.markdown is not None:
    write_markdown(options.markdown, where, tables)
  return 0


if __name__ == "__main__":
  sys.exit(main())
