"""The page's CSS: light and dark by the reader's setting, for phones, wide screens and paper."""

CSS = """
:root {
  color-scheme: light dark;
  --ground: #f4f6f9; --card: #ffffff; --ink: #1d2733; --soft: #566474; --rule: #dde3ea;
  --accent: #0b62a4; --tint: #eaf2f9; --good: #00734f; --bad: #b3420a; --code: #f0f3f7;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #0e131a; --card: #161c24; --ink: #e6ebf1; --soft: #9fadbd; --rule: #303a47;
    --accent: #7cbcf5; --tint: #1a2735; --good: #4fd0a2; --bad: #ff9a5c; --code: #1d2530;
  }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; scroll-padding-top: 3.5rem; }
body {
  margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
}
a { color: var(--accent); }
.skip { position: absolute; left: -999px; }
.skip:focus { left: 1rem; top: 1rem; background: var(--card); padding: .5rem; z-index: 9; }
.frame { max-width: 78rem; margin: 0 auto; padding: 0 1.25rem 4rem; }
header { padding: 2.25rem 0 1rem; }
header h1 { font-size: clamp(1.6rem, 3.4vw, 2.3rem); line-height: 1.15; margin: 0 0 .4rem;
  letter-spacing: -.02em; }
header p { margin: .15rem 0; color: var(--soft); }
nav { position: sticky; top: 0; z-index: 5; background: var(--ground);
  border-bottom: 1px solid var(--rule); }
nav ol { display: flex; gap: .2rem; list-style: none; margin: 0; padding: .4rem 0;
  overflow-x: auto; }
nav a { display: block; padding: .25rem .7rem; border-radius: 99px; white-space: nowrap;
  text-decoration: none; font-size: .9rem; color: var(--soft); }
nav a:hover, nav a:focus-visible { background: var(--tint); color: var(--accent); }
@media (min-width: 88rem) {
  .frame { max-width: 92rem; display: grid; grid-template-columns: 12rem minmax(0, 1fr);
    column-gap: 2.5rem; }
  header { grid-column: 1 / -1; }
  nav { align-self: start; top: 1rem; border: 0; }
  nav ol { flex-direction: column; overflow: visible; }
  html { scroll-padding-top: 1rem; }
}
section { background: var(--card); border: 1px solid var(--rule); border-radius: 14px;
  padding: 1.4rem 1.6rem; margin: 1.25rem 0; min-width: 0; }
section h2 { margin: 0 0 .6rem; font-size: 1.35rem; letter-spacing: -.01em; }
section h3 { margin: 1.6rem 0 .4rem; font-size: 1.02rem; }
section > p { max-width: 48rem; }
.reading { border-left: 4px solid var(--accent); }
.reading dl { display: grid; grid-template-columns: max-content minmax(0, 1fr);
  gap: .55rem 1.4rem; margin: 0; }
.reading dt { color: var(--soft); font-weight: 600; }
.reading dd { margin: 0; max-width: 52rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums;
  font-size: .93rem; }
.caption { color: var(--soft); font-size: .93rem; margin: .4rem 0 .5rem; max-width: 62rem; }
th, td { padding: .45rem .55rem; text-align: right; border-bottom: 1px solid var(--rule);
  white-space: nowrap; }
thead th { color: var(--soft); font-weight: 600; font-size: .82rem; vertical-align: bottom;
  white-space: normal; }
tbody th, thead th:first-child { position: sticky; left: 0; background: var(--card); }
tbody th, thead th:first-child, td.text { text-align: left; }
tbody tr:last-child > * { border-bottom: 0; }
tbody tr:hover > * { background: var(--tint); }
td.text { white-space: normal; overflow-wrap: anywhere; }
small, .range { color: var(--soft); font-size: .82em; display: block; }
td.best { font-weight: 700; }
.range { font-weight: 400; }
.key { display: inline-block; width: .75rem; height: .75rem; border-radius: 3px;
  margin-right: .5rem; vertical-align: -.05rem; background: var(--light); }
@media (prefers-color-scheme: dark) { .key { background: var(--dark); } }
.name { display: block; color: var(--soft); font-weight: 400; font-size: .82em;
  margin-left: 1.25rem; }
svg.forest { display: block; width: 8rem; height: 1.3rem; }
svg.forest .zero { stroke: var(--soft); stroke-width: 1; }
svg.forest .span { stroke: var(--light); stroke-width: 3; stroke-linecap: round; }
svg.forest .dot { fill: var(--light); }
@media (prefers-color-scheme: dark) {
  svg.forest .span { stroke: var(--dark); }
  svg.forest .dot { fill: var(--dark); }
}
.good { color: var(--good); } .bad { color: var(--bad); }
figure { margin: 1.1rem 0 0; }
figure .scroll { border-radius: 8px; }
figure img { display: block; width: 100%; min-width: 40rem; height: auto; }
figcaption, .absent { color: var(--soft); font-size: .9rem; margin-top: .5rem; max-width: 52rem; }
.absent { border: 1px dashed var(--rule); border-radius: 8px; padding: .7rem 1rem; }
dl.facts { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .3rem 1.2rem;
  margin: .6rem 0; }
dl.facts dt { color: var(--soft); } dl.facts dd { margin: 0; overflow-wrap: anywhere; }
details { margin-top: .9rem; }
summary { cursor: pointer; color: var(--accent); }
pre, code { font-family: ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace;
  font-size: .85rem; }
pre { background: var(--code); padding: 1rem; border-radius: 8px; overflow: auto;
  max-height: 32rem; margin: .6rem 0 0; }
code { overflow-wrap: anywhere; }
.sample { border-top: 1px solid var(--rule); margin-top: 1.2rem; }
.sample h3 { margin-top: .9rem; }
.texts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 13.5rem), 1fr));
  gap: .8rem; margin-top: .7rem; }
.text-card { border: 1px solid var(--rule); border-top: 3px solid var(--light);
  border-radius: 8px; padding: .6rem .8rem; min-width: 0; }
@media (prefers-color-scheme: dark) { .text-card { border-top-color: var(--dark); } }
.text-card h4 { margin: 0; font-size: .9rem; }
.text-card .score { color: var(--soft); font-size: .82rem; margin: .1rem 0 .4rem; }
.words { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; margin: 0;
  max-height: 15rem; overflow-y: auto; font-size: .93rem; }
.prompt { background: var(--code); border-radius: 8px; padding: .6rem .8rem; }
footer { color: var(--soft); font-size: .85rem; padding-top: .5rem; }
main { min-width: 0; }
@media (max-width: 40rem) {
  .frame { padding: 0 .75rem 3rem; }
  section { padding: 1rem; border-radius: 10px; }
  .reading dl, dl.facts { grid-template-columns: minmax(0, 1fr); gap: .1rem; }
  .reading dd, dl.facts dd { margin-bottom: .7rem; }
  table.narrow th, table.narrow td { padding: .35rem .45rem; }
}
@media print {
  nav, .skip { display: none; }
  section { break-inside: avoid; border: 0; padding: 0; }
  .words, pre { max-height: none; overflow: visible; }
}
"""
