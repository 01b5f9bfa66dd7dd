"""What is drawn of a feature: a line on its activity, figures, tokens that it writes, contexts coloured by activation.

Everything takes what `feature_reading.described` returns, and only draws.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from interp.report import figures
from interp.report.feature_reading import fires_on
from interp.report.measures import signed_number
from interp.report.page import Cell, Markup, joined, panel, paragraph, table, token, visible
from interp.report.page import figures as side_by_side

BLUE, RED = "33,102,172", "178,24,43"
STRONGEST = 0.6
"""Opacity of the strongest colour: text on it keeps a contrast of 4.5."""
HEIGHT = 280
HOW_TO_READ = (
    "A feature's strongest token in a context is framed; in lines marked “reads”, blue source tokens raise its "
    "pre-activation there and red ones lower it. Hover for numbers."
)


def feature_parts(found: xr.Dataset, feature: int, *, prompts: Sequence[Markup] = ()) -> tuple[Markup, ...]:
    """The dashboard of one feature.

    Args:
        found: features as `described` returns them.
        feature: one of them.
        prompts: what else to show, above the contexts.
    """
    mine = found.sel(feature=feature)
    drawn: list[tuple[go.Figure, str] | Markup] = []
    if float(mine["n_active"]):
        drawn.append((_histogram(mine), "Tokens by activation, where it is above 0; counts on a logarithmic axis."))
    if "head_share" in mine:
        caption = "Norm of each head's block of the decoder row, as a share of the sum of all."
        drawn.append((_head_bars(mine["head_share"]), caption))
    if "logit_weight" in mine:
        drawn.append(_written_tokens(mine))
    contexts = _context_lines(mine) if float(mine["n_active"]) else Markup("")
    return (paragraph(_activity(found, feature)), side_by_side(drawn, least=300), *prompts, contexts)


def overview(found: xr.Dataset) -> Markup:
    """One row a feature, which links to its dashboard."""
    features = found["feature"].values.tolist()
    columns: dict[str, Sequence[Cell]] = {
        "feature": [feature_link(one) for one in features],
        "on at % of tokens": [100 * float(one) for one in found["density"].values],
        "maximum": found["max"].values.tolist(),
        "fires on": [fired_token(found, one) for one in features],
    }
    if "head_share" in found:
        columns["largest head"] = [largest_head(found["head_share"].sel(feature=one)) for one in features]
    if "logit_token" in found:
        columns["raises"] = [raised_tokens(found, one) for one in features]
    return table(columns, sortable=True, tall=True)


def feature_link(feature: int) -> Markup:
    """A feature's number, as a link to its dashboard."""
    return Markup(f'<a href="#feature-{feature}">{feature}</a>')


def fired_token(found: xr.Dataset, feature: int) -> Markup:
    """The token that a feature's strongest contexts have in common, and in how many of them it stands at the peak."""
    one = fires_on(found, feature)
    return Markup("–") if one is None else joined([token(one[0]), f"{one[1]}/{one[2]}"])


def raised_tokens(found: xr.Dataset, feature: int, n: int = 3) -> Markup:
    """The tokens that a feature raises most."""
    return joined([token(str(text)) for text in found["logit_token"].sel(feature=feature, side="top").values[:n]])


def largest_head(share: xr.DataArray) -> str:
    """The head with the largest part of a decoder row, and how large it is."""
    if np.isnan(share.values).any():
        return "–"
    largest = int(share.values.argmax())
    return f"{figures.head_label(int(share.attrs['layer']), largest)} ({float(share.values[largest]):.0%})"


def coloured(text: str, value: float, share: float, label: str, *, marked: bool = False) -> str:
    """One token on a ground of a colour, blue for positive values and red for negative; hovering tells the number.

    Args:
        text: the token.
        value: 0 leaves it without a ground.
        share: of the strongest colour.
        label: what hovering says after the token.
        marked: draw a frame around it.
    """
    ground = f"rgba({BLUE if value > 0 else RED},{STRONGEST * min(share, 1):.3f})"
    style = f' style="background: {ground}"' if value else ""
    ink = ' class="marked"' if marked else ""
    return f'<span{ink}{style} title="{html.escape(repr(text))}: {label}">{html.escape(visible(text)) or "∅"}</span>'


def context_line(tokens: Sequence[str], activations: Sequence[float], *, lead: str, hover: str, limit: float) -> Markup:
    """Tokens coloured by activation, the strongest one framed.

    Args:
        tokens: their texts.
        activations: one a token.
        lead: what stands before them.
        hover: what hovering over that says.
        limit: the activation of the strongest colour.
    """
    peak = int(np.argmax(activations)) if max(activations) > 0 else -1
    cells = [
        coloured(text, value, value / limit, f"{value:.3f}", marked=at == peak)
        for at, (text, value) in enumerate(zip(tokens, activations, strict=True))
    ]
    start = f'<span class="peak" title="{html.escape(hover)}">{html.escape(lead)}</span>'
    return Markup(f'<p class="context">{start}{"".join(cells)}</p>')


def _activity(found: xr.Dataset, feature: int) -> str:
    mine = found.sel(feature=feature)
    n_active = int(mine["n_active"])
    if not n_active:
        return "Never on in this text."
    share = f"{100 * float(mine['density']):.3g}%"
    said = f"On at {n_active} tokens ({share}), at most {float(mine['max']):.3f}."
    one = fires_on(found, feature)
    if one is None:
        return said
    return joined([f"{said} Strongest at", token(one[0]), f"in {one[1]} of its {one[2]} strongest contexts."])


def _context_lines(mine: xr.Dataset) -> Markup:
    groups = [str(one) for one in mine["group"].values]
    # From the strongest part of the range down.
    ordered = ["top", *reversed(mine["interval"].values.tolist())]
    lines = []
    for group in (one for one in ordered if one in groups):
        rows = [row for row, one in enumerate(groups) if one == group and int(mine["sequence"].values[row]) >= 0]
        if rows:
            lines.append(f"<h3>{html.escape(_group_title(mine, group))}</h3>")
        for row in rows:
            lines.append(_context(mine.isel(context=row), float(mine["max"])))
            if row < mine.sizes.get("attributed", 0):
                lines.append(_source_line(mine.isel(attributed=row)))
    return Markup("".join(lines))


def _context(context: xr.Dataset, strongest: float) -> str:
    there = ~np.isnan(context["activation"].values)
    where = f"sequence {int(context['sequence'])}, position {int(context['position'])}"
    texts, values = (context[name].values[there].tolist() for name in ("token", "activation"))
    return context_line(texts, values, lead=f"{float(context['peak']):.2f}", hover=where, limit=strongest)


def _group_title(mine: xr.Dataset, group: str) -> str:
    if group == "top":
        return "Strongest contexts, tokens coloured by activation"
    edges = [0.0, *mine["interval_edge"].values.tolist()]
    number = mine["interval"].values.tolist().index(group)
    return f"Drawn from activations {edges[number]:.3f} to {edges[number + 1]:.3f}"


def _source_line(one: xr.Dataset) -> str:
    """Source tokens coloured by what they add: blue raises the pre-activation, red lowers it."""
    there = ~np.isnan(one["source_attribution"].values)
    texts, values = (one[name].values[there].tolist() for name in ("source_token", "source_attribution"))
    largest = max(map(abs, values)) or 1.0
    cells = [
        coloured(text, value, abs(value) / largest, f"adds {value:+.3f}")
        for text, value in zip(texts, values, strict=True)
    ]
    earlier, bias, pre = (float(one[f"source_{name}"]) for name in ("earlier", "bias", "pre_activation"))
    before = f"earlier tokens {signed_number(earlier)}, " if earlier else ""
    return (
        f'<p class="context sources"><span class="peak">reads</span>{"".join(cells)}'
        f'<span class="soft"> {before}bias {signed_number(bias)} → pre-activation {pre:.2f}</span></p>'
    )


def _histogram(mine: xr.Dataset) -> go.Figure:
    counts, edges = mine["histogram"].values, mine["bin_edge"].values
    used = int(np.flatnonzero(counts).max(initial=0)) + 1
    width = float(edges[0])
    figure = go.Figure(
        go.Bar(
            x=edges[:used] - width / 2,
            y=np.where(counts > 0, counts.astype(float), np.nan)[:used],
            width=width,
            marker_color=figures.BLUE,
            customdata=edges[:used] - width,
            hovertemplate="%{y} tokens from %{customdata:.3f}<extra></extra>",
        )
    )
    figure.update_xaxes(title_text="activation", rangemode="tozero")
    # From a half, or a bin of one token would have no height.
    most = int(counts.max())
    ends = [math.log10(0.5), math.log10(1.5 * most)]
    steps = (1,) if most >= 100 else (1, 2, 5)
    ticks = [step * 10**power for power in range(len(str(most))) for step in steps if step * 10**power <= 1.5 * most]
    figure.update_yaxes(
        title_text="tokens", type="log", range=ends, tickvals=ticks, ticktext=[f"{one:,}" for one in ticks]
    )
    return figures.finish(figure, "How strongly it is on", height=HEIGHT)


def _head_bars(share: xr.DataArray) -> go.Figure:
    layer = int(share.attrs["layer"])
    names = [figures.head_label(layer, int(head)) for head in share["head"].values]
    figure = go.Figure(
        go.Bar(
            x=[f"H{head}" for head in share["head"].values],
            y=share.values,
            marker_color=figures.BLUE,
            customdata=names,
            hovertemplate="%{customdata}: %{y:.1%}<extra></extra>",
        )
    )
    figure.add_hline(y=1 / len(names), line={"color": figures.GREY, "dash": "dot", "width": 1})
    figure.update_xaxes(title_text=f"head of layer {layer} (dotted: an equal share)", tickangle=0, tickfont_size=10)
    figure.update_yaxes(title_text="share of the decoder row", tickformat=".0%", rangemode="tozero")
    return figures.finish(figure, "Which heads it lies in", height=HEIGHT)


def _written_tokens(mine: xr.Dataset) -> Markup:
    columns: dict[str, Sequence[Cell]] = {}
    for side, verb, sign in (("top", "raises", "+"), ("bottom", "lowers", "−")):
        columns[verb] = [token(str(text)) for text in mine["logit_token"].sel(side=side).values]
        columns[sign] = mine["logit_weight"].sel(side=side).values.tolist()
    caption = "Logits of its decoder row through the unembedding, later layers passed over."
    return panel("Tokens that it writes", table(columns), caption)
