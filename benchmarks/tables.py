"""Tables as plain aligned text and as markdown."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from benchmarks.timing import Spread

BEGIN = "<!-- python -m benchmarks --markdown writes from here -->"
END = "<!-- to here -->"

Cell = str | int | float | Spread


@dataclasses.dataclass(frozen=True)
class Table:
  """Rows under named columns.

  Attributes:
    title: what was asked.
    columns: their names.
    rows: a cell for each column: text, or numbers that are measured.
    note: what a reader must know to read it.
  """

  title: str
  columns: tuple[str, ...]
  rows: tuple[tuple[Cell, ...], ...]
  note: str = ""

  def __post_init__(self) -> None:
    for row in self.rows:
      if len(row) != len(self.columns):
        raise ValueError(f"{self.title}: {len(row)} cells under {len(self.columns)} columns: {row}")


def number(value: float) -> str:
  """Three digits that count; whole numbers from 100 on."""
  return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def text(cell: Cell) -> str:
  """A cell as it is shown."""
  if isinstance(cell, Spread):
    return f"{cell.median:.2f} ({cell.low:.2f}–{cell.high:.2f})"
  return cell if isinstance(cell, str) else number(cell)


def _cells(table: Table) -> list[list[str]]:
  return [list(table.columns), *([text(cell) for cell in row] for row in table.rows)]


def plain(table: Table) -> str:
  """The table for a terminal: text to the left, numbers to the right."""
  cells = _cells(table)
  widths = [max(len(row[j]) for row in cells) for j in range(len(table.columns))]
  sides = _sides(table)
  lines = [
    "  ".join(
      value.ljust(width) if side == "left" else value.rjust(width)
      for value, width, side in zip(row, widths, sides, strict=True)
    ).rstrip()
    for row in cells
  ]
  lines.insert(1, "  ".join("-" * width for width in widths))
  return "\n".join([table.title, *lines, *([table.note] if table.note else [])])


def markdown(table: Table) -> str:
  """The table for a page."""
  head, *rows = _cells(table)
  rule = ["---" if side == "left" else "---:" for side in _sides(table)]
  lines = [f"| {' | '.join(row)} |" for row in (head, rule, *rows)]
  return "\n".join([f"### {table.title}", "", *lines, *(["", table.note] if table.note else [])])


def _sides(table: Table) -> list[str]:
  columns = zip(*table.rows, strict=True)
  return ["left" if all(isinstance(c, str) for c in column) else "right" for column in columns]


def check_page(path: Path) -> None:
  """Refuses a page that is there and has no marks between which tables could stand.

  Raises:
    ValueError: with the lines to put there.
  """
  if not path.exists():
    return
  old = path.read_text("utf-8")
  if old.count(BEGIN) != 1 or old.count(END) != 1 or old.index(BEGIN) > old.index(END):
    raise ValueError(f"{path} has no place for the tables: put these two lines\n{BEGIN}\n{END}")


def write_markdown(path: Path, heading: str, tables: Sequence[Table]) -> None:
  """Writes the tables to a page, between its two marks; a page that is not there is made.

  Raises:
    ValueError: see `check_page`; nothing of the page is touched.
  """
  check_page(path)
  body = "\n\n".join([BEGIN, heading, *map(markdown, tables), END])
  if not path.exists():
    path.write_text(f"{body}\n", "utf-8")
    return
  old = path.read_text("utf-8")
  path.write_text(old[: old.index(BEGIN)] + body + old[old.index(END) + len(END) :], "utf-8")
