# SPDX-License-Identifier: Apache-2.0
"""Style sheet of the page: light and dark by the reader's setting, readable on paper and on narrow screens."""

# Colors of series: Okabe and Ito's, distinct for color-blind readers, lighter on a dark page.
STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #1c2127; --muted: #66707c; --line: #dfe3e8; --soft: #eef1f4;
  --accent: #0072b2; --good: #0072b2; --bad: #d55e00;
  --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #b65c94; --c4: #c98a00; --c5: #3c93c9; --c6: #6f6f6f; --c7: #7a5ca8;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171b; --card: #1c2025; --ink: #e6e9ed; --muted: #9aa5b1; --line: #333a42; --soft: #262c33;
    --accent: #56b4e9; --good: #56b4e9; --bad: #f08c4a;
    --c0: #56b4e9; --c1: #f08c4a; --c2: #2cc295; --c3: #dc8fbb; --c4: #e8b33f; --c5: #8fd0f5; --c6: #a9b1ba; --c7: #b79be0;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", sans-serif;
}
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 0 0 14px; }
h3 { font-size: 15px; margin: 22px 0 8px; overflow-wrap: anywhere; }
p { margin: 0 0 10px; max-width: 75ch; }
.muted, figcaption, .unit { color: var(--muted); }
nav { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 12px 0 20px; }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
section {
  background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 20px 22px; margin: 0 0 18px;
}
.notes { border-left: 4px solid var(--bad); }
.notes ul { margin: 0; padding-left: 18px; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 12px; margin: 0; }
.cards div { background: var(--soft); border-radius: 8px; padding: 10px 14px; }
.cards dt { color: var(--muted); font-size: 13px; }
.cards dd { margin: 0; font-size: 19px; font-weight: 600; overflow-wrap: anywhere; line-height: 1.3; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(310px, 1fr)); gap: 16px 22px; }
figure { margin: 0; min-width: 0; }
figcaption { font-size: 13px; overflow-wrap: anywhere; }
.charts figcaption { font-weight: 600; color: var(--ink); text-align: center; }
figcaption .big { font-weight: 600; color: var(--ink); }
svg { display: block; width: 100%; height: auto; margin: 0 auto; overflow: visible; }
svg text { fill: var(--muted); font-size: 11px; font-family: inherit; }
svg .strong { fill: var(--ink); }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg .axis { stroke: var(--muted); stroke-width: 1; }
svg .curve { fill: none; stroke: currentColor; stroke-width: 1.8; stroke-linejoin: round; }
svg .dot { fill: currentColor; }
svg .bar { fill: currentColor; }
svg .mark { stroke: currentColor; stroke-width: 3; }
svg .ideal { stroke: var(--muted); stroke-dasharray: 4 4; }
svg .on-color { fill: var(--ink); }
.dash-1 { stroke-dasharray: 6 4; }
.dash-2 { stroke-dasharray: 2 3; }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); } .c3 { color: var(--c3); }
.c4 { color: var(--c4); } .c5 { color: var(--c5); } .c6 { color: var(--c6); } .c7 { color: var(--c7); }
.good { color: var(--good); } .bad { color: var(--bad); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 20px; list-style: none; margin: 0 0 12px; padding: 0; }
.legend li { display: flex; align-items: center; gap: 8px; overflow-wrap: anywhere; }
.legend svg { width: 28px; height: 10px; margin: 0; flex: none; }
.scroll { overflow-x: auto; margin: 0 0 12px; }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 4px 16px 4px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
thead th { color: var(--muted); font-weight: 600; white-space: nowrap; }
tbody th { font-weight: 500; }
td, th { overflow-wrap: anywhere; }
.keys th, code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace; font-size: 12.5px; }
details { margin: 10px 0; }
summary { cursor: pointer; color: var(--accent); }
details > *:not(summary) { margin-top: 12px; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 20px 30px; align-items: start; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(104px, 1fr)); gap: 14px; }
.tiles img { width: 104px; height: 104px; object-fit: contain; background: var(--soft); border-radius: 6px; }
.tiles .small { image-rendering: pixelated; }
.pictures { display: flex; flex-wrap: wrap; gap: 18px 24px; align-items: flex-start; }
.pictures img, .wide img { max-width: 100%; height: auto; border-radius: 6px; background: #fff; }
.matrix { max-width: 640px; }
.narrow { max-width: 430px; }
@media print {
  body { background: #fff; } section { break-inside: avoid; border: 0; padding: 0 0 12px; } nav { display: none; }
}
"""
