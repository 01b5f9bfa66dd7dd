"""One HTML file out of sections of text, tables and figures: everything it needs stands in it, nothing is fetched.

Whatever comes from data (token text above all) is escaped here, so that sections can be written as plain strings;
`Markup` marks what is HTML already.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import plotly.graph_objects as go
import plotly.io
import plotly.offline

from interp.report.look import CSS, SCRIPT

SIGNS = str.maketrans({"\n": "⏎", "\r": "␍", "\t": "⇥", "\0": "␀"})


class Markup(str):
    """Text that is HTML already."""


Cell: TypeAlias = str | float | int | Markup


@dataclass(frozen=True)
class Section:
    """A heading of the report and what stands under it, in order."""

    title: str
    parts: tuple[Markup, ...]

    @property
    def anchor(self) -> str:
        """The fragment that links to the section."""
        return "".join(one if one.isalnum() else "-" for one in self.title.lower()).strip("-")


def page(title: str, lead: Sequence[Markup], sections: Sequence[Section]) -> str:
    """The whole file.

    Args:
        title: of the window, and the first heading.
        lead: what stands above the table of contents.
        sections: in order; the table of contents lists them.
    """
    contents = "".join(f'<li><a href="#{one.anchor}">{html.escape(one.title)}</a></li>' for one in sections)
    body = "".join(
        f'<section id="{one.anchor}"><h2>{number}. {html.escape(one.title)}</h2>{"".join(one.parts)}</section>\n'
        for number, one in enumerate(sections, start=1)
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # An empty icon, or browsers ask the server for one.
        '<link rel="icon" href="data:,">\n'
        f"<title>{html.escape(title)}</title>\n<style>{CSS}</style>\n"
        f"<script>{plotly.offline.get_plotlyjs()}</script>\n</head>\n<body>\n"
        f"<header><h1>{html.escape(title)}</h1>{''.join(lead)}</header>\n"
        f'<nav aria-label="contents"><ol>{contents}</ol></nav>\n<main>\n{body}</main>\n'
        f"<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def paragraph(text: str, *, kind: str = "") -> Markup:
    """A paragraph of plain text or markup."""
    opening = f'<p class="{kind}">' if kind else "<p>"
    return Markup(f"{opening}{escaped(text)}</p>")


def summary(sentences: Sequence[str]) -> Markup:
    """The box at the top that says what was found."""
    return Markup(f'<div class="summary">{"".join(paragraph(one) for one in sentences)}</div>')


def token(text: str) -> Markup:
    """A token as it is, set off from the text around it; its spaces count."""
    return Markup(f'<span class="token">{html.escape(visible(text))}</span>')


def visible(text: str) -> str:
    """A token's text with line breaks, tabs and NUL as signs."""
    return text.translate(SIGNS)


def joined(parts: Sequence[str], separator: str = " ") -> Markup:
    """Text and markup in a row."""
    return Markup(separator.join(escaped(one) for one in parts))


def escaped(text: str) -> str:
    """Text with HTML's characters escaped; markup as it is."""
    return text if isinstance(text, Markup) else html.escape(text)


def figures(shown: Sequence[tuple[go.Figure, str] | Markup], *, least: int = 320) -> Markup:
    """Figures side by side, wrapping where there is no room, each under its title and over its caption.

    Titles become HTML headings, since those wrap on a narrow screen and titles inside a plot are cut.

    Args:
        shown: pairs of figure and caption (plain text or markup); or panels.
        least: width in pixels below which a figure takes a line of its own.
    """
    parts = (one if isinstance(one, Markup) else _figure(*one) for one in shown)
    return Markup(f'<div class="figures" style="--least: {least}px">{"".join(parts)}</div>')


def panel(title: str, content: Markup, caption: str) -> Markup:
    """What is no figure, such as a table, to stand among figures under a title and over a caption."""
    return Markup(
        f"<figure><h3>{escaped(title)}</h3>{content}"
        f'<figcaption class="caption">{escaped(caption)}</figcaption></figure>'
    )


def _figure(figure: go.Figure, caption: str) -> str:
    title = figure.layout.title.text or ""
    untitled = go.Figure(figure).update_layout(title_text=None, margin_t=26 if figure.layout.showlegend is None else 10)
    # to_json writes "<", ">" and "/" as \\u escapes, so that no text in the data can close the script element.
    content = plotly.io.to_json(untitled, validate=False, engine="json")
    return (
        f'<figure><h3>{title}</h3><div class="plot" role="img" aria-label="{html.escape(html.unescape(title))}" '
        f'style="height: {int(figure.layout.height)}px"></div>'
        f'<script type="application/json">{content}</script>'
        f'<figcaption class="caption">{escaped(caption)}</figcaption></figure>'
    )


def table(columns: Mapping[str, Sequence[Cell]], *, sortable: bool = False, tall: bool = False) -> Markup:
    """Columns by title. Columns of numbers are set to the right; NaN shows as a dash.

    Args:
        columns: title -> values, all of one length.
        sortable: headers sort the rows when clicked.
        tall: keep the table within a scrolling box.
    """
    numeric = {
        title: bool(cells) and not any(isinstance(one, str) for one in cells) for title, cells in columns.items()
    }
    heads = "".join(_header(title, numeric[title], sortable) for title in columns)
    rows = "".join(
        f"<tr>{''.join(_cell(one, numeric[title]) for title, one in zip(columns, row, strict=True))}</tr>"
        for row in zip(*columns.values(), strict=True)
    )
    kind = "scroll tall" if tall else "scroll"
    return Markup(
        f'<div class="{kind}" tabindex="0"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _header(title: str, numeric: bool, sortable: bool) -> str:
    text = f"<button>{html.escape(title)}</button>" if sortable else html.escape(title)
    return f'<th scope="col" class="number">{text}</th>' if numeric else f'<th scope="col">{text}</th>'


def _cell(value: Cell, numeric: bool) -> str:
    if isinstance(value, str):
        long = len(value) > 40 and not isinstance(value, Markup)
        return f'<td class="text">{escaped(value)}</td>' if long else f"<td>{escaped(value)}</td>"
    if math.isnan(value):
        return f'<td class="{"number" if numeric else ""}" data-value="">–</td>'
    shown = str(value) if isinstance(value, int) else f"{value:.3f}".replace("-", "−")
    return f'<td class="number" data-value="{json.dumps(value)}">{shown}</td>'


def definitions(entries: Mapping[str, str]) -> Markup:
    """Names and what they are, as a list."""
    return Markup(
        f"<dl>{''.join(f'<dt>{escaped(name)}</dt><dd>{escaped(value)}</dd>' for name, value in entries.items())}</dl>"
    )
