"""Figures of massive activations: their life over layers, and what overwriting them does to perplexity."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from interp.report.figures import BLUE, GREY, LINE_COLOURS, RED, finish

DRAWN = 4
"""Dimensions that get a line; those of the highest peaks."""


def massive_lives(
    peak: xr.DataArray,
    median: xr.DataArray,
    spans: Sequence[tuple[int, int, float]],
    *,
    title: str,
) -> go.Figure:
    """How large the massive dimensions are after every block, beside the median value; some of their lives shaded.

    Args:
        peak: [layer, massive_dimension], |x|.
        median: [layer], |x|.
        spans: (dimension, first layer with it, first layer without it or NaN) of every life to mark.
        title: what the figure shows, as a sentence.
    """
    layers = np.arange(len(median))
    order = np.argsort(-peak.max("layer").values, kind="stable")[:DRAWN]
    figure = go.Figure()
    for dimension, colour in zip(peak["massive_dimension"].values[order].tolist(), LINE_COLOURS, strict=False):
        values = peak.sel(massive_dimension=dimension).values
        line = go.Scatter(x=layers, y=values, mode="lines+markers", name=f"dimension {dimension}", line_color=colour)
        line.update(marker_size=5)
        line.hovertemplate = f"dimension {dimension}<br>after block %{{x}}: %{{y:,.3g}}<extra></extra>"
        figure.add_trace(line)
        for born, erased in ((one[1], one[2]) for one in spans if one[0] == dimension):
            end = len(median) if np.isnan(erased) else int(erased)
            figure.add_vrect(x0=born - 0.5, x1=end - 0.5, fillcolor=colour, opacity=0.08, line_width=0)
            _mark(figure, born, values[born], f"born {born}", colour)
            if end < len(median):
                _mark(figure, end, values[end], f"gone {end}", colour)
    typical = np.where(median.values > 0, median.values, np.nan)
    figure.add_scatter(
        x=layers, y=typical, mode="lines", name="median of all values", line={"color": GREY, "dash": "dot"},
        hovertemplate="median<br>after block %{x}: %{y:,.3g}<extra></extra>",
    )  # fmt: skip
    sizes = np.concatenate([peak.values.ravel(), typical])
    powers = np.log10(sizes[sizes > 0])  # NaN is not
    figure.update_xaxes(title_text="after block", dtick=1 if len(median) <= 12 else 5, range=[-0.6, len(median) - 0.4])
    figure.update_yaxes(
        title_text="|x|, largest of any token", type="log", dtick=1, range=[powers.min() - 0.4, powers.max() + 0.6]
    )
    figure.update_layout(showlegend=True, legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0})
    return finish(figure, title, height=380)


def _mark(figure: go.Figure, layer: int, size: float, text: str, colour: str) -> None:
    """A word above a point of a logarithmic axis, on which plotly counts annotations in powers of ten."""
    figure.add_annotation(
        x=layer, y=np.log10(size), text=text, font={"size": 11, "color": colour}, showarrow=True, arrowhead=0,
        arrowwidth=1, arrowcolor=colour, ax=0, ay=-24,
    )  # fmt: skip


def perplexity_bars(
    perplexity: xr.DataArray, low: xr.DataArray, high: xr.DataArray, *, names: Sequence[str], title: str
) -> go.Figure:
    """Perplexity under each intervention as a bar on a logarithmic axis, the number written beside it.

    Args:
        perplexity: [intervention], the untouched model first.
        low: lower end of each value's interval.
        high: upper end.
        names: what to call the interventions.
        title: what the figure shows, as a sentence.
    """
    values = perplexity.values.astype(float)
    bars = go.Bar(
        x=values, y=list(names), orientation="h", marker_color=[GREY, RED, BLUE, BLUE],
        text=[f" {one:,.0f}" if one >= 1000 else f" {one:.1f}" for one in values], textposition="outside",
        cliponaxis=False, customdata=np.stack([low.values, high.values], -1),
    )  # fmt: skip
    bars.hovertemplate = "%{y}: %{x:,.1f}, 95% interval %{customdata[0]:,.1f} to %{customdata[1]:,.1f}<extra></extra>"
    figure = go.Figure(bars)
    ends = np.log10([float(values.min()) / 2, float(values.max())])
    # Room for the number of the longest bar.
    figure.update_xaxes(title_text="perplexity", type="log", range=[ends[0], ends[1] + 0.25 * (ends[1] - ends[0])])
    figure.update_yaxes(autorange="reversed", automargin=True, ticksuffix="  ")
    return finish(figure, title, height=240)
