"""How a report looks: its style sheet, and the script that draws figures and sorts tables. Both stand in the file."""

from __future__ import annotations

CSS = """
:root { --ink: #1b2430; --soft: #5a6675; --line: #e1e5eb; --accent: #2166ac; --wash: #f6f8fa; }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 1180px; padding: 24px clamp(14px, 3vw, 36px) 64px; background: #fff;
  color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  overflow-wrap: anywhere; }
h1 { font-size: clamp(1.5rem, 4vw, 2.1rem); line-height: 1.2; margin: .2em 0 .3em; text-wrap: balance; }
h2 { font-size: 1.3rem; margin: 2.4em 0 .4em; padding-top: .5em; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; line-height: 1.35; margin: 0 0 .1em; }
p { max-width: 78ch; margin: .5em 0 .9em; }
a { color: var(--accent); }
code { font: .88em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; background: var(--wash);
  padding: .1em .3em; border-radius: 3px; }
.soft, .caption { color: var(--soft); }
.caption { font-size: .86rem; margin: .2em 0 .3em; }
figcaption.caption { margin-bottom: 26px; }
.summary { background: var(--wash); border-left: 4px solid var(--accent); padding: .7em 1.1em; margin: 1.2em 0;
  border-radius: 0 6px 6px 0; max-width: 88ch; }
.summary p { margin: .4em 0; }
nav ol { columns: 2 320px; padding-left: 1.5em; margin: .4em 0; font-size: .94rem; }
nav li { break-inside: avoid; padding: .05em 0; }
.figures { display: grid; gap: 0 24px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, var(--least, 320px)), 1fr));
  margin: 1em 0; }
figure { margin: 0; min-width: 0; display: grid; grid-template-rows: subgrid; grid-row: span 3; gap: 2px; }
figure .plot { width: 100%; min-width: 0; }
.scroll { overflow-x: auto; margin: .8em 0 1.2em; border: 1px solid var(--line); border-radius: 6px; }
.scroll.tall { max-height: 560px; overflow-y: auto; }
table { border-collapse: collapse; width: 100%; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { padding: .36em .7em; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line);
  overflow-wrap: normal; }
th { position: sticky; top: 0; background: var(--wash); font-weight: 600; z-index: 1; vertical-align: bottom; }
td.number, th.number { text-align: right; }
.dense td, .dense th { padding: .3em .42em; }
td { white-space: nowrap; }
td.text { min-width: 24ch; white-space: normal; }
figure .scroll { margin: .3em 0; }
figure td, figure th { padding: .14em .5em; }
tr:last-child td { border-bottom: 0; }
th button { all: unset; cursor: pointer; }
th button:hover, th button:focus-visible { color: var(--accent); text-decoration: underline; }
th[aria-sort=ascending] button::after { content: " ↑"; }
th[aria-sort=descending] button::after { content: " ↓"; }
.token { font: .92em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; background: #eaf1f8; border-radius: 3px;
  padding: .06em .3em; white-space: pre-wrap;
  display: inline-block; max-width: 100%; }
td .token { white-space: pre; max-width: none; }
h3.part { font-size: 1.12rem; margin-top: 1.8em; }
.context { max-width: none; margin: .1em 0; padding-left: 4.4em; text-indent: -4.4em;
  font: .84rem/1.75 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.context span { border-radius: 3px; white-space: pre-wrap; padding: 0 .08em; print-color-adjust: exact; }
.context span, .token { unicode-bidi: isolate; }
.context + h3 { margin-top: .9em; }
.context .marked { outline: 1px solid var(--ink); }
.context .peak { display: inline-block; box-sizing: border-box; min-width: 4.4em; padding-right: .8em;
  text-align: right; text-indent: 0; color: var(--soft); }
.context.sources { margin-bottom: .9em; font-size: .78rem; }
dl { display: grid; grid-template-columns: minmax(8em, max-content) 1fr; gap: .3em 1.2em; font-size: .92rem; }
dt { color: var(--soft); }
dd { margin: 0; }
@media (max-width: 560px) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .5em; } }
@media print { .scroll.tall { max-height: none; } nav { display: none; } figure { break-inside: avoid; } }
"""

SCRIPT = """
const options = {responsive: true, displaylogo: false, modeBarButtons: [["toImage", "zoom2d", "resetScale2d"]],
  displayModeBar: matchMedia("(hover: hover)").matches ? "hover" : false};
for (const holder of document.querySelectorAll(".plot")) {
  const {data, layout} = JSON.parse(holder.nextElementSibling.textContent);
  Plotly.newPlot(holder, data, layout, options);
}
for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => {
  const header = button.parentElement, body = header.closest("table").tBodies[0];
  const falling = header.getAttribute("aria-sort") !== "descending";
  const value = row => row.cells[header.cellIndex].dataset.value ?? row.cells[header.cellIndex].textContent;
  const compare = (one, other) => {
    const [a, b] = [value(one), value(other)];
    if (a === "" || b === "") return (a === "") - (b === "");
    const order = header.classList.contains("number") ? a - b : a.localeCompare(b);
    return falling ? -order : order;
  };
  for (const other of header.parentElement.cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", falling ? "descending" : "ascending");
  body.append(...[...body.rows].sort(compare));
});
"""
