"""A picture of a feature circuit: nodes by site and position, and the edges between them.

Sites go upwards in the order of the model, the metric on top; positions from left to right. Blue supports the
behaviour, red hinders it; the larger the weight, the wider and darker the line.
"""

from __future__ import annotations

import html
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import xarray as xr
from jaxtyping import Float
from numpy import ndarray

from interp.circuits.drawing import HINDERS, INK, SUPPORTS, WIDTHS
from interp.model.sites import SITE_NAMES, Site
from interp.saes.feature_edges import METRIC
from interp.saes.feature_effects import ERROR

if TYPE_CHECKING:
    import plotly.graph_objects as go

THRESHOLD = 0.01
"""Of the magnitude of weights, in the unit of the metric (Marks et al.)."""
_SMALLEST, _LARGEST = 9, 26
"""Size of a node, in pixels."""
_NARROWEST, _GAP = 2.0, 1.0
"""Least width of a position, and the room between two, in nodes side by side."""
_ROW_PIXELS = 130
_TOP = 5
"""Edges that a node's hover names on either side."""


class _Node(NamedTuple):
    site: str
    feature: int
    position: int
    """0 where positions are summed."""


@dataclass(frozen=True)
class _Edge:
    upstream: _Node
    downstream: _Node
    weight: float


@dataclass(frozen=True)
class _Drawing:
    """What is drawn, and where."""

    edges: Sequence[_Edge]
    """Weakest first, so that strong ones cover them."""
    places: Mapping[_Node, tuple[float, float]]
    middles: Mapping[int, float]
    """Of the positions that have nodes."""
    tokens: Mapping[int, str]
    """What stands at each position; empty where positions are summed."""
    labels: Mapping[tuple[str, int], str]

    @property
    def largest(self) -> float:
        return max(abs(edge.weight) for edge in self.edges)

    def name(self, node: _Node) -> str:
        """Site, feature and token."""
        if node.site == METRIC:
            return METRIC
        said = "error" if node.feature == ERROR else f"feature {node.feature}"
        at = f" at {node.position}, {self.tokens[node.position]!r}" if self.tokens else ""
        meaning = self.labels.get((node.site, node.feature))
        return html.escape(f"{node.site} {said}{at}" + (f": {meaning}" if meaning else ""))


def draw_feature_circuit(
    edges: xr.DataArray,
    *,
    threshold: float = THRESHOLD,
    max_edges: int = 200,
    labels: Mapping[tuple[str, int], str] | None = None,
    title: str | None = None,
) -> go.Figure:
    """The edges of a feature circuit as a layered graph.

    Circles are features, with their number; diamonds are errors. The size of a node is what its edges out carry
    together, among those drawn. Hovering tells names and weights.

    Args:
        edges: of `feature_edges`, with positions or without.
        threshold: edges of larger magnitude are drawn, in the unit of the weights.
        max_edges: of more edges, those of largest magnitude are drawn, and the subtitle says how many there are.
        labels: what features mean, by (site, feature), for hovering.
        title: what the figure shows, as a sentence; by default model, task and method.

    Raises:
        ValueError: if no edge is above the threshold.
    """
    if max_edges < 1:
        raise ValueError(f"max_edges={max_edges}; at least one is drawn")
    above = edges[np.abs(edges.values) > threshold]
    if not above.size:
        largest = float(np.abs(edges.values).max(initial=0.0))
        raise ValueError(f"no edge is above the threshold {threshold}; the largest is {largest:.3g} in magnitude")
    chosen = _edges(above)[-max_edges:]
    tokens = _tokens(above) if "upstream_position" in edges.coords else {}
    nodes = sorted({node for edge in chosen for node in (edge.upstream, edge.downstream)}, key=_order)
    drawing = _Drawing(chosen, *_places(nodes), tokens, labels or {})
    figure = _figure(drawing, _title(edges, title), _subtitle(drawing, above.size, threshold))
    _draw_edges(figure, drawing)
    _draw_nodes(figure, drawing)
    return figure


def _edges(edges: xr.DataArray) -> list[_Edge]:
    """Weakest first."""
    sides = []
    for side in ("upstream", "downstream"):
        sites, features = (edges[f"{side}_{part}"].values.tolist() for part in ("site", "feature"))
        at = edges[f"{side}_position"].values.tolist() if f"{side}_position" in edges.coords else [0] * edges.size
        sides.append([_Node(*node) for node in zip(sites, features, at, strict=True)])
    found = [_Edge(*ends) for ends in zip(*sides, edges.values.tolist(), strict=True)]
    return sorted(found, key=lambda edge: abs(edge.weight))


def _tokens(edges: xr.DataArray) -> dict[int, str]:
    return {
        int(at): str(label)
        for side in ("upstream", "downstream")
        for at, label in zip(edges[f"{side}_position"].values, edges[f"{side}_label"].values, strict=True)
    }


def _site_order(name: str) -> tuple[float, int]:
    if name == METRIC:
        return np.inf, 0
    site = Site.parse(name)
    kinds = list(SITE_NAMES)
    last = np.inf if site.kind == kinds[-1] else -1.0
    return (last if site.layer is None else float(site.layer)), kinds.index(site.kind) - len(kinds)


def _order(node: _Node) -> tuple[tuple[float, int], int, int]:
    return _site_order(node.site), node.position, node.feature


def _places(nodes: Sequence[_Node]) -> tuple[dict[_Node, tuple[float, float]], dict[int, float]]:
    """(places of nodes, middles of positions): sites are rows, and a position is as wide as its fullest cell."""
    rows = {site: row for row, site in enumerate(dict.fromkeys(node.site for node in nodes))}
    cells: dict[tuple[str, int], list[_Node]] = defaultdict(list)
    for node in nodes:
        cells[node.site, node.position].append(node)
    middles: dict[int, float] = {}
    end = 0.0
    for position in sorted({node.position for node in nodes}):
        width = max(_NARROWEST, *(len(several) for (_, at), several in cells.items() if at == position)) + _GAP
        middles[position] = end + width / 2
        end += width
    places = {
        node: (middles[position] + number - (len(several) - 1) / 2, float(rows[site]))
        for (site, position), several in cells.items()
        for number, node in enumerate(several)
    }
    return places, middles


def _title(edges: xr.DataArray, title: str | None) -> str:
    said = [str(edges.attrs[name]) for name in ("model", "task", "method") if name in edges.attrs]
    return title or "Feature circuit" + (": " + ", ".join(said) if said else "")


def _subtitle(drawing: _Drawing, n_above: int, threshold: float) -> str:
    drawn = f"{n_above:,} edges" if len(drawing.edges) == n_above else f"{len(drawing.edges)} of {n_above:,} edges"
    summed = "" if drawing.tokens else ", summed over positions"
    return (
        f"{drawn} above {threshold:g} in magnitude, {len(drawing.places)} nodes; width and colour: weight, the largest "
        f"{drawing.largest:.3g}{summed}"
    )


def _figure(drawing: _Drawing, title: str, subtitle: str) -> go.Figure:
    import plotly.graph_objects as go

    figure = go.Figure()
    for name, colour in (("supports", SUPPORTS[2]), ("hinders", HINDERS[2])):
        line = {"color": colour, "width": 3}
        figure.add_trace(go.Scatter(x=[None], y=[None], mode="lines", name=name, line=line, hoverinfo="skip"))
    rows = {node.site: int(y) for node, (_, y) in drawing.places.items()}
    figure.update_layout(
        title={"text": html.escape(title), "subtitle": {"text": html.escape(subtitle)}, "x": 0, "font_size": 15},
        height=_ROW_PIXELS * len(rows) + 120,
        margin={"l": 10, "r": 12, "t": 100, "b": 40},
        font={"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 12, "color": INK},
        template="none",
        hovermode="closest",
        legend={"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom", "itemclick": False, "itemdoubleclick": False},
    )
    tokens = [html.escape(drawing.tokens.get(at, "").strip() or "␣") for at in drawing.middles]
    all_x = [x for x, _ in drawing.places.values()]
    figure.update_xaxes(
        title_text="position" if drawing.tokens else "",
        visible=bool(drawing.tokens),
        tickmode="array",
        tickvals=list(drawing.middles.values()),
        ticktext=[f"{at}: {token}" for at, token in zip(drawing.middles, tokens, strict=True)],
        range=[min(all_x) - 1, max(all_x) + 1],
        showgrid=False,
        zeroline=False,
    )
    figure.update_yaxes(
        title_text="site",
        automargin=True,
        tickmode="array",
        tickvals=list(rows.values()),
        ticktext=[html.escape(site) for site in rows],
        range=[-0.5, len(rows) - 0.6],
        gridcolor="#f0f2f5",
        zeroline=False,
    )
    return figure


def _line(drawing: _Drawing, edge: _Edge) -> Float[ndarray, "point 2"]:
    """From node to node; bent where it passes other rows, so that it does not hide behind their nodes."""
    start, end = (np.array(drawing.places[node]) for node in (edge.upstream, edge.downstream))
    along = np.linspace(0, 1, 13)[:, None]
    bend = 0.3 * (end[1] - start[1] - 1) * (1 if end[0] >= start[0] else -1)
    return start + along * (end - start) + 4 * along * (1 - along) * np.array([bend, 0.0])


def _draw_edges(figure: go.Figure, drawing: _Drawing) -> None:
    """Lines of one colour and width are one trace."""
    import plotly.graph_objects as go

    groups: dict[tuple[int, str], list[_Edge]] = defaultdict(list)
    for edge in drawing.edges:
        # Magnitudes fall off steeply, so that bins are even in their square root.
        step = min(int(np.sqrt(abs(edge.weight) / drawing.largest) * len(WIDTHS)), len(WIDTHS) - 1)
        groups[step, (HINDERS if edge.weight < 0 else SUPPORTS)[step]].append(edge)
    for (step, colour), members in sorted(groups.items()):
        points = [point for edge in members for point in (*_line(drawing, edge).round(3).tolist(), [None, None])]
        x, y = zip(*points, strict=True)
        line = {"color": colour, "width": WIDTHS[step]}
        figure.add_trace(go.Scatter(x=x, y=y, mode="lines", line=line, hoverinfo="skip", showlegend=False))
    told = [(point, edge) for edge in drawing.edges for point in _line(drawing, edge)[[3, 6, 9]]]
    figure.add_trace(
        go.Scatter(
            x=[point[0] for point, _ in told],
            y=[point[1] for point, _ in told],
            mode="markers",
            marker={"size": 8, "opacity": 0},
            showlegend=False,
            customdata=[_edge_hover(drawing, edge) for _, edge in told],
            hovertemplate="%{customdata}<extra></extra>",
        )
    )


def _draw_nodes(figure: go.Figure, drawing: _Drawing) -> None:
    import plotly.graph_objects as go

    carried = {node: sum(edge.weight for edge in drawing.edges if edge.upstream == node) for node in drawing.places}
    most = max(map(abs, carried.values())) or 1.0
    nodes = list(drawing.places)
    figure.add_trace(
        go.Scatter(
            x=[drawing.places[node][0] for node in nodes],
            y=[drawing.places[node][1] for node in nodes],
            mode="markers+text",
            text=[
                METRIC if node.site == METRIC else "" if node.feature == ERROR else str(node.feature) for node in nodes
            ],
            # Numbers of neighbours would touch on one line.
            textposition=[
                "top center" if node.site == METRIC or int(drawing.places[node][0]) % 2 else "bottom center"
                for node in nodes
            ],
            textfont={"size": 9},
            marker={
                "size": [_SMALLEST + (_LARGEST - _SMALLEST) * np.sqrt(abs(carried[node]) / most) for node in nodes],
                "symbol": [_symbol(node) for node in nodes],
                "color": [carried[node] for node in nodes],
                "colorscale": "RdBu",
                "cmin": -most,
                "cmax": most,
                "line": {"color": INK, "width": 1},
                "opacity": 1,
            },
            showlegend=False,
            customdata=[_node_hover(drawing, node) for node in nodes],
            hovertemplate="%{customdata}<extra></extra>",
        )
    )


def _symbol(node: _Node) -> str:
    return "square" if node.site == METRIC else "diamond" if node.feature == ERROR else "circle"


def _edge_hover(drawing: _Drawing, edge: _Edge) -> str:
    return f"{drawing.name(edge.upstream)}<br>→ {drawing.name(edge.downstream)}<br>weight {edge.weight:.3g}"


def _node_hover(drawing: _Drawing, node: _Node) -> str:
    lines = [f"<b>{drawing.name(node)}</b>"]
    into = [(edge, edge.upstream) for edge in drawing.edges if edge.downstream == node]
    out = [(edge, edge.downstream) for edge in drawing.edges if edge.upstream == node]
    for side, own in (("in", into), ("out", out)):
        if own:
            total = sum(edge.weight for edge, _ in own)
            lines.append(f"{side}: {total:.3g} over {len(own)} edge{'s' if len(own) > 1 else ''}")
            lines += [f"   {drawing.name(other)} {edge.weight:.3g}" for edge, other in own[::-1][:_TOP]]
    return "<br>".join(lines)
