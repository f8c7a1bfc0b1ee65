"""One self-contained HTML page for a run: no script, no outside resource, figures embedded."""

import os
from pathlib import Path

from rmd_jax.report import plots as figures
from rmd_jax.report.markup import escape
from rmd_jax.report.run_data import RunData, judge_of, label, read_run
from rmd_jax.report.sections import Plots, reading, sections
from rmd_jax.report.stylesheet import CSS
from rmd_jax.report.tables import REPORT, terminal_table

__all__ = ["render", "terminal_table", "write_report"]

# Even a sample text that got past the escaping could load and run nothing.
_POLICY = (
  "default-src 'none'; img-src data:; style-src 'unsafe-inline'; form-action 'none'; "
  "base-uri 'none'"
)


def write_report(run_directory: Path) -> Path:
  """Writes report/report.html and its figures into the run directory.

  Args:
    run_directory: what `rmd run` wrote: one or several seed_*/ folders, any subset of objectives.
      Files that are absent or unreadable are named on the page.

  Returns:
    The page.

  Raises:
    UserError: the directory holds no run.
  """
  run = read_run(Path(run_directory))
  page = run.directory / REPORT
  page.parent.mkdir(parents=True, exist_ok=True)
  text = render(run, figures.draw(run, page.parent))
  partial = page.with_suffix(".partial")  # a reader never meets half a page
  partial.write_text(text, encoding="utf-8")
  os.replace(partial, page)
  return page


def render(run: RunData, plots: Plots) -> str:
  """The page as text."""
  parts = sections(run, plots)
  links = [("reading", "In words"), *((anchor, title) for anchor, title, _ in parts)]
  contents = "".join(f'<li><a href="#{anchor}">{title}</a></li>' for anchor, title in links)
  body = "".join(
    f'<section id="{anchor}"><h2>{title}</h2>{content}</section>'
    for anchor, title, content in parts
  )
  name = escape(run.directory.resolve().name)
  return (
    '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
    f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    f"<title>{name}: reward model distillation</title><style>{CSS}</style></head>"
    f'<body><a class="skip" href="#reading">Skip to the results</a><div class="frame">'
    f"<header><h1>Reward model distillation: {name}</h1><p>{_subtitle(run)}</p></header>"
    f'<nav aria-label="Contents"><ol>{contents}</ol></nav><main>{reading(run)}{body}'
    "<footer>Made by <code>rmd report</code>. Method: Fisch et al., Robust Preference Optimization "
    "through Reward Model Distillation, arXiv 2405.19316.</footer></main></div></body></html>\n"
  )


def _subtitle(run: RunData) -> str:
  names = ", ".join(label(name) for name in run.objectives) or "no objective yet"
  seeds = f"{len(run.seeds)} seed{'s' if len(run.seeds) != 1 else ''}"
  return escape(f"{names} · {seeds} · scored by {judge_of(run)}")
