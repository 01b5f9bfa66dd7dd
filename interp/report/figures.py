"""Figures of heads, layers and positions, as the field draws them.

Signed values are red-white-blue around 0 (blue supports the behaviour), attention is a sequential scale from 0, layers
run down the y axis, heads are called L9H6, and tokens stand on position axes as they are. Cells without a value are
grey, never white. Every figure is a plotly figure whose title says what it means; nothing is fetched from anywhere.
"""

from __future__ import annotations

import html
import itertools
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from jaxtyping import Float
from numpy.typing import ArrayLike

SIGNED_SCALE = "RdBu"
SEQUENTIAL_SCALE = "Blues"
UNDEFINED = "#cfd3d9"
MASKED = "#f3f4f6"
INK = "#1b2430"
BLUE, RED, GREY = "#2166ac", "#b2182b", "#8a94a3"
LINE_COLOURS = (BLUE, RED, GREY, "#1b7837", "#762a83", "#e08214")
TOP_LABELS = 8
"""Points of a scatter that are named beside the point; all others say their name on hover."""


def head_label(layer: int, head: int) -> str:
    """How the field writes a head: L9H6."""
    return f"L{layer}H{head}"


def token_label(token: str) -> str:
    """A token as an axis label: white space made visible, and escaped, since plotly reads a few HTML tags."""
    visible = token.strip(" ").replace("\n", "⏎").replace("\t", "⇥") or "␣"
    return html.escape(visible)


def layer_head_heatmap(
    values: xr.DataArray,
    *,
    title: str,
    unit: str,
    signed: bool = True,
    low: xr.DataArray | None = None,
    high: xr.DataArray | None = None,
) -> go.Figure:
    """One cell a head.

    Args:
        values: [layer, head] (or [layer, kv_head]).
        title: what the figure shows, as a sentence.
        unit: what a value is measured in; stands beside the colours.
        signed: red-white-blue around 0, or a sequential scale from 0.
        low: lower end of each value's interval, shown on hover.
        high: upper end.

    Raises:
        ValueError: for an array with other axes.
    """
    if values.dims not in (("layer", "head"), ("layer", "kv_head")):
        raise ValueError(f"one cell a head wants axes (layer, head); got {values.dims}: ask for by=('layer', 'head')")
    head_dim = str(values.dims[1])
    prefix = "KV" if head_dim == "kv_head" else "H"
    text = [
        [_hover(f"L{layer}{prefix}{head}", values, low, high, layer, head) for head in range(values.shape[1])]
        for layer in range(values.shape[0])
    ]
    figure = go.Figure(_heatmap(values.values, signed, text=text))
    name = "key/value head" if head_dim == "kv_head" else "head"
    figure.update_xaxes(title_text=name, dtick=1 if values.shape[1] <= 16 else None)
    _layers_on_y(figure, values.shape[0])
    finish(figure, title, height=_layer_height(values.shape[0]))
    _unit_beside_colours(figure, unit)
    return figure


def layer_position_heatmap(
    values: xr.DataArray,
    *,
    title: str,
    unit: str,
    signed: bool = True,
    low: xr.DataArray | None = None,
    high: xr.DataArray | None = None,
) -> go.Figure:
    """One cell a layer and position, labelled by the `label` coordinate (what all prompts share) or else by `token`.

    Args:
        values: [layer, position].
        title: what the figure shows, as a sentence.
        unit: what a value is measured in.
        signed: red-white-blue around 0, or a sequential scale from 0.
        low: lower end of each value's interval, shown on hover.
        high: upper end.
    """
    labels = [token_label(str(label)) for label in values["label" if "label" in values.coords else "token"].values]
    text = [
        [_hover(f"layer {layer}, {label}", values, low, high, layer, column) for column, label in enumerate(labels)]
        for layer in range(values.shape[0])
    ]
    figure = go.Figure(_heatmap(values.values, signed, text=text))
    _tokens_on(figure.layout.xaxis, labels, "token")
    _layers_on_y(figure, values.shape[0])
    finish(figure, title, height=_layer_height(values.shape[0]) + 40)
    _unit_beside_colours(figure, unit)
    return figure


def label_position_heatmap(
    values: Float[np.ndarray, "row position"], rows: Sequence[str], positions: Sequence[str], *, title: str, unit: str
) -> go.Figure:
    """One cell a named row and position, red-white-blue around 0.

    Args:
        values: [row, position].
        rows: names, from the top.
        positions: labels, as `token_label` makes them.
        title: what the figure shows, as a sentence.
        unit: what a value is measured in.
    """
    text = [
        [f"{name}, {label}<br>{_number(value)}" for label, value in zip(positions, line, strict=True)]
        for name, line in zip(rows, values.tolist(), strict=True)
    ]
    figure = go.Figure(_heatmap(values, True, text=text))
    _tokens_on(figure.layout.xaxis, positions, "token")
    figure.update_yaxes(tickvals=list(range(len(rows))), ticktext=list(rows), autorange="reversed", automargin=True)
    finish(figure, title, height=24 * len(rows) + 150)
    _unit_beside_colours(figure, unit)
    return figure


def attention_pattern(pattern: xr.DataArray, *, title: str) -> go.Figure:
    """Where each token (down) looks (across); hover names the pair.

    Args:
        pattern: [query, key], with coordinates `query_token` and `key_token`.
        title: what the figure shows, as a sentence.
    """
    queries, keys = (
        [token_label(str(token)) for token in pattern[f"{side}_token"].values] for side in ("query", "key")
    )
    values = pattern.values.astype(float)
    text = [
        [f"{query} → {key}<br>{values[row, column]:.3f}" for column, key in enumerate(keys)]
        for row, query in enumerate(queries)
    ]
    # Under a causal mask the upper triangle is 0 by construction: leaving it empty shows the mask.
    shown = np.where(np.triu(np.ones_like(values), 1).astype(bool) & (values == 0), np.nan, values)
    figure = go.Figure(_heatmap(shown, False, text=text, highest=1.0))
    figure.update_traces(showscale=False)
    _tokens_on(figure.layout.xaxis, keys, "key")
    _tokens_on(figure.layout.yaxis, queries, "query")
    figure.update_yaxes(autorange="reversed", tickangle=0)
    return finish(figure, title, height=360).update_layout(plot_bgcolor=MASKED)


def line_over_depth(
    values: xr.DataArray, *, title: str, unit: str, low: xr.DataArray | None = None, high: xr.DataArray | None = None
) -> go.Figure:
    """A value along the depth of the model in half steps (the logit lens), with its interval as a band.

    Args:
        values: [depth]; the `depth` coordinate counts blocks passed: 0, 0.5 (after attention), 1 ...
        title: what the figure shows, as a sentence.
        unit: what a value is measured in.
        low: lower end of the interval.
        high: upper end.
    """
    depth = values["depth"].values.tolist()
    figure = go.Figure()
    if low is not None and high is not None:
        outline = np.concatenate([high.values, low.values[::-1]])
        band = go.Scatter(
            x=depth + depth[::-1], y=outline, fill="toself", fillcolor="rgba(33,102,172,.18)",
            line_width=0, hoverinfo="skip", showlegend=False,
        )  # fmt: skip
        figure.add_trace(band)
    line = go.Scatter(x=depth, y=values.values, mode="lines+markers", marker_size=4, line_color=BLUE, showlegend=False)
    line.hovertemplate = "after %{x} blocks<br>%{y:.3f}<extra></extra>"
    figure.add_trace(line)
    figure.add_hline(y=0, line_color=GREY, line_width=1)
    figure.update_xaxes(title_text="blocks passed (half: after attention)")
    figure.update_yaxes(title_text=unit)
    return finish(figure, title, height=340)


def layer_lines(values: xr.DataArray, *, title: str, unit: str) -> go.Figure:
    """One line a part of the block, over layers.

    Args:
        values: [layer, part], the `part` coordinate naming the lines.
        title: what the figure shows, as a sentence.
        unit: what a value is measured in.
    """
    figure = go.Figure()
    for part, colour in zip(values["part"].values, itertools.cycle(LINE_COLOURS), strict=False):
        line = go.Scatter(
            x=values["layer"].values, y=values.sel(part=part).values, mode="lines+markers", name=str(part)
        )
        line.update(
            line_color=colour, marker_size=4, hovertemplate=f"layer %{{x}}, {part}<br>%{{y:.3f}}<extra></extra>"
        )
        figure.add_trace(line)
    figure.add_hline(y=0, line_color=GREY, line_width=1)
    figure.update_xaxes(title_text="layer", dtick=1 if values.sizes["layer"] <= 12 else 5)
    figure.update_yaxes(title_text=unit)
    figure.update_layout(legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0})
    return finish(figure, title, height=340)


def effect_scatter(
    x: ArrayLike,
    y: ArrayLike,
    labels: Sequence[str],
    *,
    title: str,
    x_title: str,
    y_title: str,
    diagonal: bool = True,
) -> go.Figure:
    """Two measures of the same heads against each other, with the line y = x; the extreme heads are named.

    Args:
        x: one value a head.
        y: one value a head.
        labels: names of the heads.
        title: what the figure shows, as a sentence.
        x_title: the measure and its unit.
        y_title: the measure and its unit.
        diagonal: draw y = x: for measures in the same unit.
    """
    across, up = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    points = go.Scatter(x=across, y=up, mode="markers", marker={"size": 7, "color": BLUE, "opacity": 0.65})
    points.update(customdata=list(labels), hovertemplate="%{customdata}<br>%{x:.3f}, %{y:.3f}<extra></extra>")
    figure = go.Figure(points)
    if diagonal and np.isfinite(across).any() and np.isfinite(up).any():
        ends = [float(np.nanmin([across, up])), float(np.nanmax([across, up]))]
        line = go.Scatter(x=ends, y=ends, mode="lines", hoverinfo="skip", line={"color": GREY, "dash": "dot"})
        figure.add_trace(line)
    for index, (shift_x, shift_y) in _labelled_points(across, up).items():
        figure.add_annotation(
            x=across[index], y=up[index], text=labels[index], showarrow=True, arrowwidth=1, arrowcolor=GREY,
            arrowhead=0, ax=shift_x, ay=shift_y, font_size=11,
        )  # fmt: skip
    figure.update_layout(showlegend=False)
    figure.update_xaxes(title_text=x_title, zeroline=True, zerolinecolor=GREY)
    figure.update_yaxes(title_text=y_title, zeroline=True, zerolinecolor=GREY)
    return finish(figure, title, height=400)


def ranked_bars(
    values: Sequence[float],
    labels: Sequence[str],
    *,
    title: str,
    unit: str,
    low: Sequence[float],
    high: Sequence[float],
) -> go.Figure:
    """Horizontal bars, first on top, each with its interval.

    Args:
        values: lengths of the bars, signed.
        labels: what each bar stands for.
        title: what the figure shows, as a sentence.
        unit: what a value is measured in.
        low: lower end of each interval.
        high: upper end of each interval.
    """
    lengths, lower, upper = (np.asarray(one, dtype=float) for one in (values, low, high))
    bars = go.Bar(
        x=lengths, y=list(labels), orientation="h", marker_color=[BLUE if one >= 0 else RED for one in lengths]
    )
    # The mean lies within its bootstrap interval but for rounding; plotly refuses the negative length.
    arms = {"array": np.maximum(upper - lengths, 0), "arrayminus": np.maximum(lengths - lower, 0)}
    bars.error_x = {"type": "data", "symmetric": False, "color": INK, "thickness": 1.2, "width": 3, **arms}
    bars.update(customdata=np.stack([lower, upper], -1))
    bars.hovertemplate = "%{y}: %{x:.3f}, 95% interval %{customdata[0]:.3f} to %{customdata[1]:.3f}<extra></extra>"
    figure = go.Figure(bars)
    figure.update_xaxes(title_text=unit, zeroline=True, zerolinecolor=GREY)
    figure.update_yaxes(autorange="reversed", automargin=True)
    return finish(figure, title, height=26 * len(labels) + 80)


def agreement_heatmap(matrix: xr.DataArray, *, title: str) -> go.Figure:
    """How well each of some measures agrees with each of some others, the number written in each cell.

    Args:
        matrix: [measure, other], from −1 to 1, with the names as coordinates.
        title: what the figure shows, as a sentence.
    """
    down, across = ([str(name) for name in matrix[dim].values] for dim in matrix.dims)
    text = [[f"{down[row]} and {across[column]}<br>{_number(value)}" for column, value in enumerate(values)]
            for row, values in enumerate(matrix.values)]  # fmt: skip
    heatmap = _heatmap(matrix.values, True, text=text, highest=1.0)
    heatmap.update(x=across, y=down, texttemplate="%{z:.2f}", showscale=False)
    figure = go.Figure(heatmap)
    figure.update_yaxes(autorange="reversed", automargin=True)
    figure.update_xaxes(tickangle=-45, automargin=True)
    return finish(figure, title, height=420)


def _heatmap(values: np.ndarray, signed: bool, *, text: list[list[str]], highest: float | None = None) -> go.Heatmap:
    finite = np.abs(values[np.isfinite(values)])
    limit = highest or (float(finite.max()) if finite.size and finite.max() > 0 else 1.0)
    return go.Heatmap(
        z=values,
        zmin=-limit if signed else 0,
        zmax=limit,
        colorscale=SIGNED_SCALE if signed else SEQUENTIAL_SCALE,
        customdata=text,
        hovertemplate="%{customdata}<extra></extra>",
        hoverongaps=False,
        colorbar={"title": None, "tickfont": {"size": 10}, "thickness": 10, "outlinewidth": 0, "x": 1.0},
    )


def _hover(
    label: str, values: xr.DataArray, low: xr.DataArray | None, high: xr.DataArray | None, row: int, column: int
) -> str:
    line = f"{label}<br>{_number(values.values[row, column])}"
    if low is None or high is None:
        return line
    return f"{line}<br>95% interval {_number(low.values[row, column])} to {_number(high.values[row, column])}"


def _unit_beside_colours(figure: go.Figure, unit: str) -> None:
    """The unit, to the right of the colour bar: plotly's own title there runs into the numbers."""
    figure.update_layout(margin_r=86)
    figure.add_annotation(
        text=html.escape(unit), textangle=-90, font_size=11, showarrow=False,
        x=1, xref="paper", xanchor="left", xshift=58, y=0.5, yref="paper", yanchor="middle",
    )  # fmt: skip


def _number(value: float) -> str:
    return f"{value:.3f}" if np.isfinite(value) else "not defined"


def _labelled_points(x: np.ndarray, y: np.ndarray) -> dict[int, tuple[float, float]]:
    """The points farthest from the origin, and the shift of each label in pixels: outwards, around the circle in turn.

    Neighbouring points would cover each other's labels; a point whose label would start near one already placed keeps
    its name for the hover only.
    """
    spread_x, spread_y = (float(np.nanmax(np.abs(one))) or 1.0 for one in (x, y))
    across, up = x / spread_x, y / spread_y
    far = np.argsort(-np.nan_to_num(np.hypot(across, up)), kind="stable")
    placed: dict[int, tuple[float, float]] = {}
    for index in (int(one) for one in far):
        if len(placed) == TOP_LABELS:
            break
        if all(abs(across[index] - across[one]) > 0.4 or abs(up[index] - up[one]) > 0.2 for one in placed):
            # Towards the middle of the figure, where points are many but the frame does not cut the text.
            placed[index] = (-26 if across[index] > 0.5 else 26, 14 if up[index] > 0.5 else -14)
    return placed


def _tokens_on(axis: go.layout.XAxis | go.layout.YAxis, labels: Sequence[str], title: str) -> None:
    axis.update(tickmode="array", tickvals=list(range(len(labels))), ticktext=list(labels), title_text=title)
    axis.update(automargin=True, tickfont_size=10 if len(labels) > 16 else 11)
    if axis.plotly_name == "xaxis":
        axis.tickangle = -90


def _layers_on_y(figure: go.Figure, n_layers: int) -> None:
    figure.update_yaxes(title_text="layer", autorange="reversed", dtick=1 if n_layers <= 12 else 5)


def _layer_height(n_layers: int) -> int:
    return min(620, max(260, 13 * n_layers + 90))


def finish(figure: go.Figure, title: str, *, height: int) -> go.Figure:
    """The look that all figures share: title, margins, fonts and grid."""
    figure.update_layout(
        title={"text": html.escape(title), "x": 0, "font_size": 15},
        height=height,
        margin={"l": 50, "r": 12, "t": 48, "b": 44},
        plot_bgcolor=UNDEFINED if isinstance(figure.data[0], go.Heatmap) else "white",
        paper_bgcolor="white",
        font={"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 12, "color": INK},
        template="none",
    )
    grid = not isinstance(figure.data[0], go.Heatmap | go.Image)
    figure.update_xaxes(showgrid=grid, gridcolor="#e8ebf0", title_standoff=8, title_font_size=12)
    figure.update_yaxes(showgrid=grid, gridcolor="#e8ebf0", title_standoff=8, title_font_size=12)
    if not grid:
        figure.update_xaxes(zeroline=False)
        figure.update_yaxes(zeroline=False)
    return figure
