"""Small pieces of HTML. What comes from a run goes through `escape`: it may be hostile."""

import base64
import html
import math
import re
from collections.abc import Iterable, Sequence

from rmd_jax.evaluation.statistics import Interval
from rmd_jax.report.plots import Plot
from rmd_jax.report.run_data import label
from rmd_jax.report.style import THEMES
from rmd_jax.report.tables import number

_CONTROLS = {code: 0x2400 + code for code in range(0x20) if code not in (0x09, 0x0A)}
_CONTROLS |= {0x7F: 0x2421, 0xFFFE: 0xFFFD, 0xFFFF: 0xFFFD}
_CONTROLS |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
_SURROGATES = re.compile("[\ud800-\udfff]")


def escape(value: object) -> str:
  """Text that is safe in content and in quoted attributes, and can be written as UTF-8.

  Control characters become their visible pictures, lone surrogates the replacement character.
  """
  text = _SURROGATES.sub("\ufffd", str(value)).translate(_CONTROLS)
  return html.escape(text, quote=True)


def colours(objective: str, objectives: Sequence[str]) -> str:
  """An inline style that carries the objective's colour on light and on dark ground."""
  return "; ".join(f"--{theme.name}: {theme.colour(objective, objectives)}" for theme in THEMES)


def objective_name(objective: str, objectives: Sequence[str]) -> str:
  """Colour key, printed name, and the gin file's name where it differs."""
  name = label(objective)
  extra = "" if name == objective else f'<span class="name">{escape(objective)}</span>'
  key = f'<span class="key" style="{colours(objective, objectives)}"></span>'
  return f"{key}{escape(name)}{extra}"


def cell(value: Interval | None, style: str, *, best: bool = False) -> str:
  """A table cell: the number, and its interval below it."""
  if value is None:
    return "<td>–</td>"
  span = ""
  if math.isfinite(value.low) and math.isfinite(value.high):
    low, high = number(value.low, style).removesuffix(" %"), number(value.high, style)
    span = f'<span class="range">{low} to {high}</span>'
  attribute = ' class="best"' if best else ""
  return f"<td{attribute}>{number(value.mean, style)}{span}</td>"


def forest(value: Interval, low: float, high: float, style: str) -> str:
  """A small drawing of an interval against zero, on the scale low to high."""
  width, middle = 150.0, 12.0

  def x(number_: float) -> str:
    share = (number_ - low) / (high - low) if high > low else 0.5
    return f"{5 + (width - 10) * min(max(share, 0.0), 1.0):.1f}"

  span = ""
  if math.isfinite(value.low) and math.isfinite(value.high):
    span = f'<line class="span" x1="{x(value.low)}" x2="{x(value.high)}" y1="12" y2="12"/>'
  return (
    f'<svg class="forest" viewBox="0 0 {width:.0f} 24" style="{style}" aria-hidden="true">'
    f'<line class="zero" x1="{x(0.0)}" x2="{x(0.0)}" y1="2" y2="22"/>{span}'
    f'<circle class="dot" cx="{x(value.mean)}" cy="{middle:.0f}" r="4.5"/></svg>'
  )


def table(
  name: str,
  head: Sequence[str],
  rows: Iterable[Sequence[str]],
  caption: str,
  *,
  narrow: bool = False,
) -> str:
  """A table; heads and caption are HTML already, and so are cells, which bring their own <td>.

  The caption stands before the table, which scrolls sideways where it is too wide; `name`
  is unique on the page and ties the two together for screen readers.
  """
  heads = "".join(f'<th scope="col">{title}</th>' for title in head)
  body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
  attribute = ' class="narrow"' if narrow else ""
  return (
    f'<p class="caption" id="caption-{name}">{caption}</p><div class="scroll" tabindex="0">'
    f'<table{attribute} aria-labelledby="caption-{name}">'
    f"<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
  )


def row_head(content: str) -> str:
  """The first cell of a row."""
  return f'<th scope="row">{content}</th>'


def figure(plot: Plot | None, caption: str, *, absent: str) -> str:
  """The figure in the reader's colours, or a line that says what it lacks."""
  if plot is None:
    return f'<p class="absent">No figure: {escape(absent)}.</p>'
  return (
    '<figure><div class="scroll" tabindex="0"><picture>'
    f'<source media="(prefers-color-scheme: dark)" srcset="{_data_uri(plot.dark.read_bytes())}">'
    f'<img src="{_data_uri(plot.light.read_bytes())}" alt="{escape(plot.alt)}" '
    f'width="{plot.width}" height="{plot.height}"></picture></div>'
    f"<figcaption>{escape(caption)}</figcaption></figure>"
  )


def facts(pairs: Iterable[tuple[str, str]]) -> str:
  """A list of names and values; values are HTML."""
  items = "".join(f"<dt>{escape(name)}</dt><dd>{value}</dd>" for name, value in pairs)
  return f'<dl class="facts">{items}</dl>'


def details(summary: str, content: str) -> str:
  """Content that opens on a click."""
  return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def _data_uri(png: bytes) -> str:
  return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"
