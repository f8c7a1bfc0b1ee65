"""Where the time of an align step goes, from XLA's own trace of its operations.

On one core, so that operations follow one another and their times add up to the step's: a process
of its own is bound to a core, before XLA starts its threads, and prints what it found as JSON.
An operation belongs to the part of the model that its metadata names (a fusion, to the part that
its last operation came from), and the feed-forward block and the logits are told by the sizes that
only they have.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.align import align_step
from benchmarks.sizes import FULL, QUICK, Plan, Size
from benchmarks.steps import Step
from benchmarks.tables import Cell, Table
from rmd_jax.models.decoder import Decoder

ROOT = Path(__file__).resolve().parents[1]
PARTS = (
  "feed-forward",
  "attention: projections",
  "attention: scores and mixing",
  "norms, rotations, residuals",
  "logits",
  "optimiser, clipping, guards",
  "embedding, objective, the rest",
  "host: batch, placing, metrics",
)
RECOMPUTED = "layers computed again, in the above"
STEPS = 3

_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*)$")
_SHAPE = re.compile(r"\b[a-z]+\d*\[([\d,]*)\]")
_OPERAND = re.compile(r"%([\w.\-]+)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_CONTROL = re.compile(r"\b(?:while|tuple|conditional|call)\(")


class Instruction(NamedTuple):
  """What an operation's line of the program says.

  Attributes:
    scope: where it was written, by JAX's names.
    sizes: of the dimensions of its result and its operands; empty of what only holds others.
  """

  scope: str
  sizes: frozenset[int]


def instructions(program: str) -> dict[str, Instruction]:
  """The operations of a compiled program's text, by name."""
  lines = [match for line in program.splitlines() if (match := _INSTRUCTION.match(line))]
  own = {match[1]: _sizes(match[2].split(", metadata=")[0].split("(%")[0]) for match in lines}
  found = {}
  for match in lines:
    name, line = match[1], match[2]
    scope = _OP_NAME.search(line)
    operands = _OPERAND.findall(line.split("), ")[0])
    sizes = own[name].union(*(own.get(operand, frozenset()) for operand in operands))
    held = frozenset() if _CONTROL.search(line) else sizes
    found[name] = Instruction(scope[1] if scope else "", held)
  return found


def _sizes(text: str) -> frozenset[int]:
  shapes = _SHAPE.findall(text)
  return frozenset(int(size) for shape in shapes for size in shape.split(",") if size)


def part(instruction: Instruction, decoder: Decoder) -> str:
  """The part of a step that an operation belongs to."""
  scope, sizes = instruction
  if "layers.attention" in scope:
    return "attention: scores and mixing"
  if "Transformer" in scope and "/while/" in scope:
    if decoder.mlp_width in sizes:
      return "feed-forward"
    if "dot_general" in scope:
      return "attention: projections"
    return "norms, rotations, residuals"
  if "Transformer" in scope:
    return "embedding, objective, the rest"
  if "jvp" in scope:
    return "logits" if decoder.vocab_size in sizes else "embedding, objective, the rest"
  return "optimiser, clipping, guards" if scope else "embedding, objective, the rest"


def shares(step: Step, decoder: Decoder) -> dict[str, float]:
  """Each part's share of the step's time, and `RECOMPUTED`'s, of a process on one core."""
  known = instructions(step.compiled.program.as_text())
  options = jax.profiler.ProfileOptions()
  options.python_tracer_level = 0
  jax.block_until_ready(step())
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder, profiler_options=options):
      for _ in range(STEPS):
        jax.block_until_ready(step())
    (path,) = Path(folder).rglob("*.xplane.pb")
    spent = own_times(jax.profiler.ProfileData.from_file(str(path)))
  seconds: defaultdict[str, float] = defaultdict(float)
  again = 0.0
  for name, time_spent in spent.items():
    if name not in known:
      continue  # the tracer's own, and waiting
    seconds[part(known[name], decoder)] += time_spent / STEPS
    if "rematted_computation" in known[name].scope:
      again += time_spent / STEPS
  begin = time.perf_counter()
  for _ in range(STEPS):
    step.host()
  seconds["host: batch, placing, metrics"] = (time.perf_counter() - begin) / STEPS
  total = sum(seconds.values())
  return {name: seconds[name] / total for name in PARTS} | {RECOMPUTED: again / total}


def own_times(profile: Any) -> dict[str, float]:
  """Seconds of each event's name, without the events inside it."""
  spent: defaultdict[str, float] = defaultdict(float)
  for plane in profile.planes:
    if plane.name != "/host:CPU":
      continue
    for line in plane.lines:
      around: list[Any] = []
      for event in sorted(line.events, key=lambda e: (e.start_ns, -e.duration_ns)):
        while around and around[-1].start_ns + around[-1].duration_ns <= event.start_ns:
          around.pop()
        spent[event.name] += event.duration_ns / 1e9
        if around:
          spent[around[-1].name] -= event.duration_ns / 1e9
        around.append(event)
  return spent


def measure(plan: Plan) -> dict[str, dict[str, float]]:
  """The shares at each size, in this process."""
  return {size.name: _of(size) for size in plan.profiled}


def _of(size: Size) -> dict[str, float]:
  return shares(align_step(size, "e-DPO, K = 5"), size.decoder)


def run(plan: Plan, *, quick: bool) -> list[Table]:
  """The table, from a process that has one core."""
  command = [sys.executable, "-m", "benchmarks.breakdown", *(["--quick"] if quick else [])]
  done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
  found = json.loads(done.stdout.splitlines()[-1])
  rows: list[tuple[Cell, ...]] = [
    (name, *(100 * found[size.name][name] for size in plan.profiled))
    for name in (*PARTS, RECOMPUTED)
  ]
  return [
    Table(
      title="6. Where the time of an align step goes (e-DPO, K = 5; one core)",
      columns=("part", *(f"{size.name} %" for size in plan.profiled)),
      rows=tuple(rows),
      note="Host work is waited for here; the loop does it while the device computes.",
    )
  ]


if __name__ == "__main__":
  if hasattr(os, "sched_setaffinity"):  # Linux; elsewhere times of threads overlap
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
  shown = measure(QUICK if "--quick" in sys.argv else FULL)
  assert all(np.isfinite(value) for size in shown.values() for value in size.values())
  print(json.dumps(shown))
