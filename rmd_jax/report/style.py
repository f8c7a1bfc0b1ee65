"""One look for every figure, in a light and a dark version; matplotlib is imported when drawing."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rmd_jax.report.run_data import Series

if TYPE_CHECKING:
  from matplotlib.axes import Axes as Axes
  from matplotlib.figure import Figure as Figure
else:  # importing matplotlib takes a second that only a report should cost
  Axes = Figure = Any

Drawing = tuple[Figure, str]
"""A figure and the words that stand for it."""

WIDTH = 10.0  # inches, of every figure, so that text has one size down the page
DPI = 144
_MOST_POINTS = 800  # of a line: more cannot be seen, and cost time and bytes

# Okabe and Ito's colours, which the colour-blind can tell apart: warm for likelihood objectives,
# cool for distillation. Lighter on dark, so that each keeps a contrast of 3 : 1 with its ground.
_LIGHT = {
  "dpo": "#d55e00",
  "ipo": "#b07d00",
  "pessimistic_dpo": "#b65a92",
  "distill": "#0072b2",
  "pessimistic_distill": "#3a9bd9",
  "ensemble": "#00875f",
}
_DARK = {
  "dpo": "#ff8a3d",
  "ipo": "#f0c04a",
  "pessimistic_dpo": "#e79bc7",
  "distill": "#4ea3e0",
  "pessimistic_distill": "#9bd6ff",
  "ensemble": "#3fcf9f",
}
_OTHERS = {
  "light": ("#6a51c7", "#7a7a00", "#a0522d", "#5f6b7a", "#c2185b", "#00838f"),
  "dark": ("#a99bff", "#c9c94a", "#e0986b", "#a9b4c2", "#ff7fae", "#5fd3de"),
}
_DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1)), (0, (7, 2)), (0, (3, 1, 1, 1, 1, 1)))
_MARKERS = "osD^vPX*<>"


@dataclasses.dataclass(frozen=True)
class Theme:
  """Colours of one version of the figures.

  Attributes:
    name: "light" or "dark".
    ground: behind everything; that of the page's figure frame.
    ink: text and lines that must be read.
    soft: secondary text and neutral marks.
    grid: rules.
  """

  name: str
  ground: str
  ink: str
  soft: str
  grid: str

  def colour(self, objective: str, objectives: Sequence[str]) -> str:
    """The objective's colour: its own, or the next of those left for a user's objectives."""
    known = _LIGHT if self.name == "light" else _DARK
    if objective in known:
      return known[objective]
    unknown = [name for name in objectives if name not in known]
    others = _OTHERS[self.name]
    return others[unknown.index(objective) % len(others)]

  def member(self, index: int) -> str:
    """The colour of a reward model."""
    known = list((_LIGHT if self.name == "light" else _DARK).values())
    order = (3, 0, 5, 2, 1, 4)  # neighbours far apart in hue
    colours = [known[i] for i in order] + list(_OTHERS[self.name])
    return colours[index % len(colours)]

  def rc(self) -> Any:
    """matplotlib settings."""
    return {
      "figure.facecolor": self.ground,
      "savefig.facecolor": self.ground,
      "axes.facecolor": self.ground,
      "axes.edgecolor": self.grid,
      "axes.labelcolor": self.ink,
      "axes.titlecolor": self.ink,
      "axes.titlesize": 11,
      "axes.titleweight": "bold",
      "axes.titlelocation": "left",
      "axes.titlepad": 8,
      "axes.labelsize": 10,
      "axes.spines.top": False,
      "axes.spines.right": False,
      "axes.grid": True,
      "axes.axisbelow": True,
      "axes.formatter.useoffset": False,
      "grid.color": self.grid,
      "grid.linewidth": 0.7,
      "text.color": self.ink,
      "text.parse_math": False,  # an objective may be called "a$b$c"
      "xtick.color": self.soft,
      "ytick.color": self.soft,
      "xtick.labelsize": 9,
      "ytick.labelsize": 9,
      "xtick.major.size": 0,
      "ytick.major.size": 0,
      "legend.frameon": False,
      "legend.fontsize": 9,
      "legend.labelcolor": self.ink,
      "lines.linewidth": 1.8,
      "lines.solid_capstyle": "round",
      "font.family": ["DejaVu Sans"],
      "font.size": 10,
      "figure.dpi": DPI,
      "savefig.dpi": DPI,
    }


THEMES = (
  Theme("light", ground="#ffffff", ink="#1d2733", soft="#566474", grid="#dde3ea"),
  Theme("dark", ground="#161c24", ink="#e6ebf1", soft="#9fadbd", grid="#303a47"),
)


def dash(index: int) -> Any:
  """A line style, so that lines differ by more than colour."""
  return _DASHES[index % len(_DASHES)]


def marker(index: int) -> str:
  """A marker, so that points differ by more than colour."""
  return _MARKERS[index % len(_MARKERS)]


def panels(
  count: int, *, columns: int, height: float, sharex: bool = False, sharey: bool = False
) -> tuple[Figure, list[Axes]]:
  """A figure of `count` panels in rows of `columns`, each row `height` inches high.

  A short last row is left-aligned and its free places are empty; shared axes keep their labels on
  the outer panels.
  """
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure
  from matplotlib.layout_engine import ConstrainedLayoutEngine

  columns = max(1, min(columns, count))
  rows = -(-count // columns)
  layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08, wspace=0.02, hspace=0.04)
  figure = Figure(figsize=(WIDTH, height * rows), layout=layout)
  FigureCanvasAgg(figure)
  grid = figure.subplots(rows, columns, sharex=sharex, sharey=sharey, squeeze=False)
  axes = list(grid.ravel())
  for unused in axes[count:]:
    unused.set_visible(False)
  for index in range(max(0, count - columns), count):
    axes[index].tick_params(labelbottom=True)  # the panel below a last row's gap is invisible
  return figure, axes[:count]


def curve(
  axes: Axes,
  series: Sequence[Series],
  colour: str,
  *,
  label: str = "",
  style: Any = "-",
  smooth: bool = False,
  points: bool = False,
) -> None:
  """One metric over steps: the mean over seeds; faintly, each seed or the unsmoothed values."""
  series = [(x, y) for x, y in series if np.isfinite(y).any()]
  if not series:
    return
  for x, y in series:
    if len(series) > 1 or smooth:
      axes.plot(
        *thinned(x, rolling(y, len(y) // 100) if smooth else y), color=colour, alpha=0.22, lw=0.9
      )
  steps, mean = mean_over_seeds(series)
  if smooth:
    mean = rolling(mean, max(1, len(mean) // 25))
  shown: dict[str, Any] = {"marker": "o", "ms": 3.2} if points and len(steps) <= 60 else {}
  axes.plot(*thinned(steps, mean), color=colour, ls=style, label=label or None, **shown)


def mean_over_seeds(series: Sequence[Series]) -> Series:
  """The mean at every step that any seed has, over the seeds whose range covers it."""
  if len(series) == 1:
    return series[0]
  steps = np.unique(np.concatenate([x for x, _ in series]))
  values = np.full((len(series), len(steps)), np.nan)
  for row, (x, y) in zip(values, series, strict=True):
    good = np.isfinite(y)
    row[:] = np.interp(steps, x[good], y[good], left=np.nan, right=np.nan)
  count = np.isfinite(values).sum(0)
  mean = np.nansum(values, 0) / np.maximum(count, 1)
  return steps, np.where(count > 0, mean, np.nan)


def rolling(values: np.ndarray, width: int) -> np.ndarray:
  """Centred moving average over about `width` entries; NaN entries do not count."""
  half = max(0, width // 2)
  if half == 0 or len(values) < 3:
    return values
  good = np.isfinite(values)
  sums = np.concatenate([[0.0], np.cumsum(np.where(good, values, 0.0))])
  counts = np.concatenate([[0], np.cumsum(good)])
  index = np.arange(len(values))
  low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
  count = counts[high] - counts[low]
  return np.where(count > 0, (sums[high] - sums[low]) / np.maximum(count, 1), np.nan)


def thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """At most some hundred points of a line, the last always among them."""
  if len(x) <= _MOST_POINTS:
    return x, y
  keep = np.unique(np.linspace(0, len(x) - 1, _MOST_POINTS).astype(int))
  return x[keep], y[keep]


def step_axis(axes: Axes) -> None:
  """Names the x axis of a training curve; there are no half steps."""
  from matplotlib.ticker import MaxNLocator

  axes.set_xlabel("step")
  axes.xaxis.set_major_locator(MaxNLocator(nbins="auto", steps=[1, 2, 2.5, 5, 10], integer=True))


def legend(axes: Axes, **options: Any) -> None:
  """A legend where there is anything to name."""
  if axes.get_legend_handles_labels()[0]:
    axes.legend(**options)


def limits(values: np.ndarray, low: float = 0.5, high: float = 99.5) -> tuple[float, float]:
  """Percentiles of the values, widened a little, never empty."""
  a, b = np.percentile(values, [low, high])
  pad = 0.06 * (b - a) if b > a else max(1.0, abs(b)) * 0.1
  return float(a - pad), float(b + pad)
