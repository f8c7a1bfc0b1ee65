"""The benchmarks run and give numbers; which numbers is for `make bench` to say."""

import dataclasses
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks import breakdown, tables, timing
from benchmarks.__main__ import SECTIONS, main, measure
from benchmarks.concatenated import concatenated_logp
from benchmarks.sizes import SMOKE
from benchmarks.tables import Table, markdown, plain, write_markdown
from benchmarks.timing import Effort, Spread, interleave

ROOT = Path(__file__).parents[2]
TABLE = Table(
  title="1. A question",
  columns=("what", "time ×", "ms"),
  rows=(("this", Spread(1.5, 1.25, 2.0), 1234.5), ("that one", Spread(0.5, 0.25, 1.0), 0.01234)),
  note="A note.",
)


@pytest.fixture(scope="module")
def measured():
  return measure(SECTIONS, quick=True)


def numbers(table):
  for row in table.rows:
    for cell in row:
      if not isinstance(cell, str):
        yield from cell if isinstance(cell, Spread) else (cell,)


@pytest.mark.slow
def test_every_question_has_its_table(measured):
  assert [table.title[:2] for table in measured] == ["1.", "2.", "3.", "4.", "5.", "6."]
  assert [len(table.rows) for table in measured] == [
    3 * 2,  # layouts, at P:R = 3:1 and 1:1
    1,  # a vocabulary
    4 + 2,  # SFT and three objectives; two of them over microbatches
    1,  # a size
    2 + 4 + 2,  # layouts, steps, reward models
    len(breakdown.PARTS) + 1,
  ]


@pytest.mark.slow
def test_all_numbers_are_finite_and_positive(measured):
  for table in measured[:-1]:
    assert all(math.isfinite(value) and value > 0 for value in numbers(table)), plain(table)
    for row in table.rows:
      for cell in row:
        if isinstance(cell, Spread):
          assert cell.low <= cell.median <= cell.high


@pytest.mark.slow
def test_the_parts_of_a_step_are_all_of_it(measured):
  *parts, again = numbers(measured[-1])
  assert sum(parts) == pytest.approx(100)
  assert all(share > 0 for share in parts)  # a part that nothing belongs to: the names changed
  assert 0 < again < 100


@pytest.mark.slow
@pytest.mark.parametrize("all_logits", [False, True])
def test_rows_of_prompt_and_response_give_the_same_log_probabilities(all_logits):
  batch = dataclasses.replace(SMOKE, responses=3).dataset(batches=1).batch(np.arange(SMOKE.batch))
  in_rows = jax.jit(concatenated_logp, static_argnums=0, static_argnames="all_logits")
  rows = in_rows(SMOKE.decoder, SMOKE.params, batch, all_logits=all_logits)
  shared = jax.jit(lambda params, batch: SMOKE.decoder.logp(params, batch))(SMOKE.params, batch)
  np.testing.assert_allclose(rows, shared, rtol=1e-5)


def test_contenders_take_turns_and_the_warm_up_does_not_count():
  calls = []
  contenders = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
  times = interleave(contenders, Effort(seconds=0.0, least=3, most=3))
  assert calls == ["a", "b"] * 5
  assert {name: len(seconds) for name, seconds in times.items()} == {"a": 3, "b": 3}


def test_rounds_end_with_the_time(monkeypatch):
  clock = iter(range(1000))
  monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))
  times = interleave({"a": lambda: None}, Effort(seconds=12.0, least=2, most=50))
  # A reading at the start, two a round, and one to see if there is time, from the third round on.
  assert times["a"].tolist() == [1.0] * 5


def test_a_plain_table_is_aligned():
  assert plain(TABLE).splitlines() == [
    "1. A question",
    "what                time ×      ms",
    "--------  ----------------  ------",
    "this      1.50 (1.25–2.00)   1,234",
    "that one  0.50 (0.25–1.00)  0.0123",
    "A note.",
  ]


def test_a_markdown_table_has_a_rule_under_its_head():
  assert markdown(TABLE).splitlines()[2:5] == [
    "| what | time × | ms |",
    "| --- | ---: | ---: |",
    "| this | 1.50 (1.25–2.00) | 1,234 |",
  ]


def test_a_row_with_a_cell_too_few_is_refused():
  with pytest.raises(ValueError, match="1 cells under 2 columns"):
    Table("t", ("a", "b"), (("x",),))


def test_markdown_goes_between_the_marks_and_nowhere_else(tmp_path):
  page = tmp_path / "page.md"
  write_markdown(page, "First.", [TABLE])
  page.write_text(f"above\n{page.read_text('utf-8')}below\n", "utf-8")
  write_markdown(page, "Second.", [TABLE])
  text = page.read_text("utf-8")
  assert "First." not in text
  assert text.count("### 1. A question") == 1
  assert text.startswith(f"above\n{tables.BEGIN}\n\nSecond.\n")
  assert text.endswith(f"A note.\n\n{tables.END}\nbelow\n")


def test_a_page_without_marks_is_left_alone(tmp_path):
  page = tmp_path / "page.md"
  page.write_text("mine", "utf-8")
  with pytest.raises(ValueError, match="no place for the tables"):
    write_markdown(page, "Head.", [TABLE])
  assert page.read_text("utf-8") == "mine"


def test_a_page_that_cannot_take_the_tables_is_refused_before_anything_is_measured(tmp_path):
  page = tmp_path / "page.md"
  page.write_text("mine", "utf-8")
  with pytest.raises(SystemExit) as stopped:
    main(["--quick", "--markdown", str(page)])
  assert stopped.value.code == 2


def test_the_performance_page_takes_the_tables():
  page = (ROOT / "docs" / "performance.md").read_text("utf-8")
  assert page.count(tables.BEGIN) == page.count(tables.END) == 1


LAYERS = "jit(f)/jvp(Transformer)/while/body/layers"
BACK = "jit(f)/transpose(jvp(Transformer))/while/body/rematted_computation/layers"
PROGRAM = f"""
%body (a: f32[80,64]) -> f32[80,192] {{
  %a.1 = f32[80,64]{{1,0}} parameter(0), metadata={{op_name="a"}}
  %b.2 = f32[64,192]{{1,0}} parameter(1)
  ROOT %dot.3 = f32[80,192]{{1,0}} dot(%a.1, %b.2), lhs_contracting_dims={{1}}, \
metadata={{op_name="{LAYERS}/dot_general" stack_frame_id=2}}
  %dot.4 = f32[80,64]{{1,0}} dot(%a.1, %w.5), metadata={{op_name="{LAYERS}/dot_general"}}
  %w.5 = f32[64,64]{{1,0}} parameter(2)
  %dot.6 = f32[80,64]{{1,0}} dot(%dot.3, %x.7), metadata={{op_name="{BACK}/dot_general"}}
  %exp.8 = f32[2,8]{{1,0}} exponential(%a.1), metadata={{op_name="{LAYERS}/layers.attention/exp"}}
  %dot.9 = f32[80,181]{{1,0}} dot(%a.1, %t.1), metadata={{op_name="jit(f)/jvp()/dot_general"}}
  %sub.11 = f32[181,64]{{1,0}} subtract(%p.1, %p.2), metadata={{op_name="jit(f)/sub"}}
  %while.12 = (f32[80,192]{{1,0}}, s32[]) while(%tuple.1), condition=%c, body=%body, \
metadata={{op_name="jit(f)/jvp(Transformer)/while"}}
}}
"""


@pytest.mark.parametrize(
  ("name", "expected"),
  [
    ("dot.3", "feed-forward"),
    ("dot.4", "attention: projections"),
    ("dot.6", "feed-forward"),  # told by its operand
    ("exp.8", "attention: scores and mixing"),
    ("dot.9", "logits"),
    ("sub.11", "optimiser, clipping, guards"),
    ("while.12", "embedding, objective, the rest"),
  ],
)
def test_an_operation_belongs_to_the_part_that_it_was_written_in(name, expected):
  decoder = dataclasses.replace(SMOKE.decoder, vocab_size=181, mlp_width=192)
  assert breakdown.part(breakdown.instructions(PROGRAM)[name], decoder) == expected


@dataclasses.dataclass
class Event:
  name: str
  start_ns: float
  duration_ns: float


def test_time_inside_another_event_counts_once():
  events = [Event("dot", 2e9, 3e9), Event("while", 1e9, 5e9), Event("dot", 7e9, 1e9)]
  line = type("Line", (), {"events": events})
  planes = [type("Plane", (), {"name": name, "lines": [line]}) for name in ("/host:CPU", "other")]
  spent = breakdown.own_times(type("Profile", (), {"planes": planes}))
  assert spent == {"dot": 4.0, "while": 2.0}
