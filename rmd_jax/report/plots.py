"""Draws every figure of a run, light and dark, as PNGs beside the page."""

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path

from rmd_jax.report import plots_margins, plots_outcome, plots_training
from rmd_jax.report.run_data import RunData
from rmd_jax.report.style import THEMES, Drawing, Theme

Draw = Callable[[RunData, Theme], Drawing | None]

FIGURES: dict[str, Draw] = {
  "outcome": plots_outcome.outcome,
  "frontier": plots_outcome.frontier,
  "drift": plots_margins.drift,
  "margin_growth": plots_margins.growth,
  "margin_scatter": plots_margins.scatter,
  "margin_histogram": plots_margins.histogram,
  "ensemble": plots_training.ensemble,
  "reward_models": plots_training.reward_models,
  "lengths": plots_outcome.lengths,
  "learning_curves": plots_training.learning,
  "alignment_curves": plots_training.alignment,
}
"""Every figure by the name of its file."""


@dataclasses.dataclass(frozen=True)
class Plot:
  """A figure on disk.

  Attributes:
    light: the PNG for light pages.
    dark: the same for dark ones.
    alt: the words that stand for it.
    width: of the PNG, in pixels.
    height: of the PNG, in pixels.
  """

  light: Path
  dark: Path
  alt: str
  width: int
  height: int


def draw(run: RunData, directory: Path) -> dict[str, Plot]:
  """Draws what the run has data for; a figure of an earlier report without data now is removed."""
  import matplotlib

  plots = {}
  for name, function in FIGURES.items():
    files = {theme.name: directory / f"{name}{_suffix(theme)}.png" for theme in THEMES}
    for theme in THEMES:
      with matplotlib.rc_context(theme.rc()), warnings.catch_warnings():
        # An objective's name in a script that the font lacks is drawn as boxes; the page has it.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        drawing = function(run, theme)
        if drawing is None:
          files[theme.name].unlink(missing_ok=True)
          continue
        figure, alt = drawing
        # No software version in the file: the same run gives the same bytes.
        figure.savefig(files[theme.name], metadata={"Software": None})
        width, height = (round(x) for x in figure.bbox.size)
        plots[name] = Plot(files["light"], files["dark"], alt, width, height)
  return plots


def _suffix(theme: Theme) -> str:
  return "" if theme.name == "light" else f".{theme.name}"
