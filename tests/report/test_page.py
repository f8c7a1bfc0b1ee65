import base64
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from fake_run import write_run

from rmd_jax.report import plots, style
from rmd_jax.report.page import render, write_report
from rmd_jax.report.run_data import read_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
VOID = {"meta", "img", "source", "br", "line", "circle", "link", "hr"}
PIXEL = base64.b64decode(
  "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


@pytest.fixture(scope="module")
def fake_run(tmp_path_factory):
  return write_run(tmp_path_factory.mktemp("fake") / "run")


class Page(HTMLParser):
  """Tags with their attributes; fails on tags that are not closed in order."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.open, self.words = [], [], []
    self.feed(text)
    assert not self.open

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag not in VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.words.append(data)


def attributes(page, tag, name):
  return [attrs[name] for t, attrs in page.tags if t == tag and name in attrs]


@pytest.fixture(scope="module")
def page(fake_run, tmp_path_factory):
  """The page with a pixel for every figure: drawing them all is slow."""
  pixel = tmp_path_factory.mktemp("pixel") / "pixel.png"
  pixel.write_bytes(PIXEL)
  stand_in = plots.Plot(pixel, pixel, 'alt "words" <here>', 10, 10)
  return render(read_run(fake_run), dict.fromkeys(plots.FIGURES, stand_in))


def test_the_page_is_well_formed_and_loads_nothing_from_outside(page):
  found = Page(page)
  sources = attributes(found, "img", "src") + attributes(found, "source", "srcset")
  assert len(sources) == 2 * len(plots.FIGURES)
  assert all(source.startswith("data:image/png;base64,") for source in sources)
  assert not [tag for tag, _ in found.tags if tag in ("script", "link", "iframe", "object")]
  assert not re.search(r"@import|url\(", page)
  assert not [name for _, attrs in found.tags for name in attrs if name.startswith("on")]


def test_every_link_leads_somewhere_and_no_id_occurs_twice(page):
  found = Page(page)
  ids = [attrs["id"] for _, attrs in found.tags if "id" in attrs]
  assert len(ids) == len(set(ids))
  targets = attributes(found, "a", "href")
  assert len(targets) > 10
  assert {target.removeprefix("#") for target in targets} <= set(ids)
  assert set(attributes(found, "table", "aria-labelledby")) <= set(ids)


def test_images_have_words_and_tables_have_heads(page):
  found = Page(page)
  assert attributes(found, "img", "alt") == ['alt "words" <here>'] * len(plots.FIGURES)
  assert attributes(found, "html", "lang") == ["en"]
  assert {"col", "row"} == set(attributes(found, "th", "scope"))


def test_hostile_texts_are_shown_and_do_nothing(page):
  found = Page(page)
  words = "".join(found.words)
  assert "<script>alert('x')</script><img src=x onerror=alert(1)>" in words
  assert '</pre></details><style>*{display:none}</style> &amp; "quoted"' in words
  assert "日本語 🙂" in words
  assert "\x00" not in page
  assert "␀␇ \ufffd" in words
  page.encode("utf-8")


def test_long_texts_are_cut_and_say_so(page):
  assert "(7,000 more characters)" in page
  assert "long " * 601 not in page


def test_the_page_holds_the_numbers_the_config_and_what_made_it(page):
  words = "".join(Page(page).words)
  for text in (
    "e-DPO",
    "better than DPO",
    "rmd run --gin_file=gin/runs/bias.gin --gin.BETA=0.1",
    "jax 0.10.2",
    "# <not a tag>",
    "pairs.jsonl:87: chosen: empty response",
    "21.0 % of pairs",
    "seed_1",
  ):
    assert text in words
  assert "The page would show more with these" not in words


def test_missing_figures_and_files_are_named(fake_run, tmp_path):
  root = shutil.copytree(fake_run, tmp_path / "run")
  shutil.rmtree(root / "seed_0/evaluate/dpo")
  (root / "seed_1/sft/metrics.jsonl").unlink()
  words = "".join(Page(render(read_run(root), {})).words)
  assert words.count("No figure: ") == len(plots.FIGURES)
  assert "seed_0/evaluate/dpo/evaluation.json: not there" in words
  assert "seed_1/sft/metrics.jsonl" in words


def test_an_objective_of_the_users_with_a_name_like_markup(tmp_path, fake_run):
  root = shutil.copytree(fake_run, tmp_path / "run")
  name = 'a$b$<i>"&'
  for kind in ("align", "evaluate"):
    (root / "seed_0" / kind / "dpo").rename(root / "seed_0" / kind / name)
  (root / "run.json").unlink()
  run = read_run(root)
  assert name in run.objectives
  found = Page(render(run, {}))
  assert name in "".join(found.words)
  assert "i" not in {tag for tag, _ in found.tags}


def test_colours_are_known_distinct_and_legible():
  def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    parts = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

  def contrast(a, b):
    low, high = sorted([luminance(a), luminance(b)])
    return (high + 0.05) / (low + 0.05)

  names = ["mine", "dpo", "ensemble", "theirs", "distill"]
  for theme in style.THEMES:
    colours = [theme.colour(name, names) for name in names]
    assert len(set(colours)) == len(names)
    members = [theme.member(i) for i in range(6)]
    assert all(contrast(colour, theme.ground) >= 3 for colour in colours + members)
    assert contrast(theme.ink, theme.ground) >= 7
    assert contrast(theme.soft, theme.ground) >= 4.5


def test_seeds_are_averaged_where_they_overlap_and_gaps_do_not_count():
  first = (np.array([1.0, 2.0, 3.0]), np.array([1.0, np.nan, 3.0]))
  second = (np.array([2.0, 3.0, 4.0]), np.array([4.0, 5.0, 6.0]))
  steps, mean = style.mean_over_seeds([first, second])
  np.testing.assert_array_equal(steps, [1, 2, 3, 4])
  np.testing.assert_allclose(mean, [1.0, 3.0, 4.0, 6.0])
  np.testing.assert_allclose(style.rolling(np.array([1.0, np.nan, 5.0, 9.0]), 3), [1, 3, 7, 7])


def test_one_figure_is_drawn_in_both_themes(fake_run, tmp_path, monkeypatch):
  monkeypatch.setattr(plots, "FIGURES", {"frontier": plots.FIGURES["frontier"]})
  drawn = plots.draw(read_run(fake_run), tmp_path)["frontier"]
  for path in (drawn.light, drawn.dark):
    assert path.read_bytes().startswith(b"\x89PNG")
  assert drawn.light.read_bytes() != drawn.dark.read_bytes()
  assert "e-DPO" in drawn.alt
  before = drawn.light.read_bytes()
  plots.draw(read_run(fake_run), tmp_path)
  assert drawn.light.read_bytes() == before


def browse(path, tmp_path, *options):
  """Runs chromium on a page; its standard output and what its console said."""
  command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
  command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
  command += [f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", *options]
  done = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=120)
  console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
  return done.stdout, console


PROBE = """<script>addEventListener("load", () => {
  const images = [...document.images].map(i => i.naturalWidth);
  const wide = document.documentElement.scrollWidth > innerWidth;
  document.title = "PROBE " + JSON.stringify({images, wide, scripts: document.scripts.length});
})</script>"""


@pytest.mark.slow
def test_the_whole_report_opens_in_a_browser_without_error(fake_run, tmp_path):
  if CHROMIUM is None:
    pytest.skip("no chromium on this machine")
  root = shutil.copytree(fake_run, tmp_path / "run")
  page = write_report(root)
  assert page == root / "report" / "report.html"
  assert {f"{name}.png" for name in plots.FIGURES} <= {p.name for p in page.parent.iterdir()}
  _, console = browse(page, tmp_path, "--dump-dom")
  assert console == []

  text = page.read_text(encoding="utf-8")
  policy = re.search(r'<meta http-equiv="Content-Security-Policy"[^>]*>', text)
  probe = tmp_path / "probe.html"
  probe.write_text(text.replace(policy[0], PROBE), encoding="utf-8")
  for size in ("--window-size=1280,900", "--window-size=500,900"):
    dom, console = browse(probe, tmp_path, "--dump-dom", size)
    assert console == []
    found = json.loads(re.search(r"<title>PROBE (.*?)</title>", dom)[1])
    assert len(found["images"]) == len(plots.FIGURES)
    assert min(found["images"]) > 500
    assert not found["wide"]  # tables and figures scroll in their own frames
    assert found["scripts"] == 1  # the probe's own: no text of a sample became one


@pytest.mark.slow
def test_every_figure_is_drawn_from_a_run_at_its_extremes(fake_run, tmp_path):
  root = shutil.copytree(fake_run, tmp_path / "run")
  (root / "run.json").unlink()
  for name, factor in (("dpo", 1e6), ("ipo", 0.0)):
    for path in root.glob(f"seed_*/evaluate/{name}/margins.npz"):
      arrays = dict(np.load(path))
      arrays["implicit"] = arrays["implicit"] * factor
      arrays["implicit"][0] = np.nan
      np.savez(path, **arrays)
  for kind in ("align", "evaluate"):
    (root / "seed_0" / kind / "pessimistic_dpo").rename(root / "seed_0" / kind / "a$b$日本")
  metrics = root / "seed_0/align/distill/metrics.jsonl"
  metrics.write_text('{"step": 1, "loss/total": "NaN", "logp/chosen_minus_ref": "-Infinity"}\n')
  shutil.rmtree(root / "seed_1")
  page = write_report(root)
  words = "".join(Page(page.read_text(encoding="utf-8")).words)
  assert "No figure" not in words
  shutil.rmtree(root / "seed_0/evaluate")
  shutil.rmtree(root / "seed_0/align")
  words = "".join(Page(write_report(root).read_text(encoding="utf-8")).words)
  assert "No figure" in words
  assert not (root / "report/drift.png").exists()
