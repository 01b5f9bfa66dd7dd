"""Pictures of circuits: a layered graph, and how much circuits of several tasks have in common.

The graph grows upwards: the embedding at the bottom, the logits on top, in each layer the heads and a little above them
the MLP. Blue edges support the behaviour, red ones hinder it; the larger the score, the wider and darker the line.
"""

from __future__ import annotations

import html
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from interp.circuits.circuit import Circuit
from interp.circuits.graph import LOGITS, Graph
from interp.circuits.layout import Place, place, route
from interp.circuits.storage import targets

if TYPE_CHECKING:
    import plotly.graph_objects as go

INK, GREY = "#1b2430", "#8a94a3"
SUPPORTS = ("#92bfdd", "#5a9dcb", "#2b74b3", "#08306b")
"""Colours of positive scores, from small to large magnitude."""
HINDERS = ("#efa98c", "#dd7560", "#c23a3c", "#67001f")
"""Colours of negative scores."""
WIDTHS = (0.8, 1.4, 2.3, 3.6)
DASHES = {"q": "6px,3px", "k": "2px,2px"}
"""Lines into queries and keys; those into values, MLPs and logits are solid."""
_FILL = {"head": "#ffffff", "mlp": "#e6ebf2", "end": "#1b2430"}
_TOP = 4
"""Edges that a node's hover names on either side."""
_LAYER_PIXELS = 46
"""Height of a layer; more where there are few."""
_EDGE_PIXELS, _MOST_PIXELS = 5, 1000
"""What a drawing of few layers is stretched to: so much for each edge, up to a limit."""
_MLP_ABOVE, _SHARED_BELOW = 0.42, 0.32
"""Where the MLP and the shared key/value heads of a layer stand, in layers from its heads."""
_INPUT_BELOW = 0.18
"""Where the input of an MLP and its neurons stands, in layers from the MLP."""
_HALF_WIDTH = 0.22
"""Of a node's box, in units of the x axis, on a page of the usual width."""


@dataclass(frozen=True)
class _Edge:
    """A line of the drawing."""

    writer: str
    reader: str
    target: str
    """The node at its upper end: a head, an MLP, the logits, or a key/value head that several heads share."""
    score: float

    @property
    def kind(self) -> str:
        """q, k, v, mlp or logits."""
        return self.reader.rpartition(".")[2] if "." in self.reader else self.reader.rstrip("0123456789")

    @property
    def label(self) -> str:
        return f"{self.writer} → {self.reader}"

    @property
    def magnitude(self) -> float:
        return 0.0 if np.isnan(self.score) else abs(self.score)


def draw(circuit: Circuit, *, max_edges: int = 200, title: str | None = None) -> go.Figure:
    """The circuit as a layered graph.

    Lines into a query are dashed, into a key dotted, all others solid. Where heads share a key/value head, edges into
    its key or value end in a dot below them, from which thin grey lines lead to those of its heads that are in the
    circuit. So do edges into an MLP of which neurons are nodes by themselves. Hovering tells scores, and the strongest
    edges of a node. Scores are summed over positions, where there are any, and the subtitle says so.

    Args:
        circuit: what to draw.
        max_edges: of more edges, those of largest magnitude are drawn, and the subtitle says how many are left out.
        title: what the figure shows, as a sentence; by default model, task and method.

    Raises:
        ValueError: if there is no edge to draw.
    """
    if max_edges < 1:
        raise ValueError(f"max_edges={max_edges}; at least one is drawn")
    if not circuit.n_edges:
        raise ValueError("the circuit has no edges: there is nothing to draw")
    edges, forks = _edges(circuit, max_edges)
    nodes = sorted(
        {name for edge in edges for name in (edge.writer, edge.target)} | {node for _, node in forks},
        key=lambda name: _sort_key(circuit.graph, name),
    )
    heights = _heights(circuit.graph, nodes)
    width = _width(heights)
    links = [(edge.writer, edge.target, 0.2 + edge.magnitude / _largest(edges)) for edge in edges]
    tied = [(fork, node, 2.0) for fork, node in forks]
    places = place(heights, [*links, *tied], width, _columns(circuit.graph, nodes, width))
    half_widths = {name: 0.05 if _is_shared(name) else _HALF_WIDTH for name in nodes}
    lines = route(places, links, width, half_widths)
    figure = _figure(_title(circuit, title), _subtitle(circuit, edges), places, width, len(edges))
    _draw_forks(figure, forks, places)
    _draw_edges(figure, edges, lines)
    _draw_nodes(figure, edges, places)
    return figure


def simplified(circuit: Circuit) -> Circuit:
    """The circuit without the edges that only repeat a stronger way.

    An edge writer → reader is left out if there is another way from the writer to that same reader, through other
    nodes, of which every edge is stronger (of larger magnitude; of equal ones, earlier in the order of the graph) and
    itself kept. What remains is a Hasse-like diagram: every node that could be reached still can, by a way no weaker at
    any edge than the edge left out. Scores stay as they are. It is for looking at: what is left out is part of the
    circuit, and running the simplified one gives another result.

    Returns:
        The smaller circuit; attr `n_simplified` says how many edges are gone.

    Raises:
        ValueError: for a circuit with positions.
    """
    if circuit.has_positions:
        raise ValueError("simplified is for circuits without positions: their edges are not one way each")
    graph = circuit.graph
    pairs = np.argwhere(circuit.mask)
    strength = np.nan_to_num(np.abs(circuit.scores[circuit.mask]))
    kept = np.zeros_like(circuit.mask)
    above = np.zeros((len(graph.writers), len(graph.writers)), dtype=bool)
    """Whether a kept way leads to the first node from the second."""
    for writer, reader in pairs[np.argsort(-strength, kind="stable")]:
        if above[kept[:, reader], writer].any():
            continue
        kept[writer, reader] = True
        sources = above[writer].copy()
        sources[writer] = True
        for node in np.flatnonzero(graph.feeds[reader]):
            later = above[:, node].copy()
            later[node] = True
            above[later] |= sources
    gone = int(circuit.mask.sum() - kept.sum())
    return replace(circuit, scores=circuit.scores.copy(), mask=kept, attrs={**circuit.attrs, "n_simplified": gone})


def overlap_heatmap(overlaps: xr.DataArray, *, title: str) -> go.Figure:
    """How much circuits have in common, the number written in each cell.

    Args:
        overlaps: a variable of `overlap` [first, second] or the result of `transfer` [circuit, task].
        title: what the figure shows, as a sentence.
    """
    import plotly.graph_objects as go

    down, across = ([html.escape(str(name)) for name in overlaps[dim].values] for dim in overlaps.dims)
    heatmap = go.Heatmap(
        z=overlaps.values, x=across, y=down, zmin=-1, zmax=1, colorscale="RdBu", showscale=False,
        texttemplate="%{z:.2f}", hoverongaps=False,
        hovertemplate=f"{overlaps.dims[0]} %{{y}}<br>{overlaps.dims[1]} %{{x}}<br>%{{z:.3f}}<extra></extra>",
    )  # fmt: skip
    figure = go.Figure(heatmap)
    figure.update_layout(
        title={"text": html.escape(title), "x": 0, "font_size": 15},
        height=120 + 44 * len(down),
        margin={"l": 50, "r": 12, "t": 48, "b": 44},
        plot_bgcolor="#cfd3d9",
        font=_FONT,
        template="none",
    )
    figure.update_xaxes(title_text=str(overlaps.dims[1]), automargin=True, showgrid=False, zeroline=False)
    figure.update_yaxes(
        title_text=str(overlaps.dims[0]),
        title_standoff=12,
        autorange="reversed",
        automargin=True,
        showgrid=False,
        zeroline=False,
    )
    return figure


_FONT = {"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 12, "color": INK}


# What is drawn


def _edges(circuit: Circuit, max_edges: int) -> tuple[list[_Edge], list[tuple[str, str]]]:
    """The lines, weakest first, and (input, node) for inputs that several nodes share."""
    scored = [(*edge, circuit.score_of(*edge)) for edge in circuit.edges]
    scored.sort(key=lambda edge: -np.nan_to_num(abs(edge[2])))
    nodes, shown, forks = set(circuit.nodes), [], set()
    for writer, reader, score in scored[:max_edges]:
        ends = targets(circuit.graph, reader)
        target = ends[0]
        if len(ends) > 1:
            used = [end for end in ends if end in nodes]
            if len(used) == 1:
                target = used[0]
            else:
                target = reader.rpartition(".")[0].replace("H", "KV") or f"{reader}.in"
                forks |= {(target, end) for end in used}
        shown.append(_Edge(writer, reader, target, score))
    return shown[::-1], sorted(forks)


def _is_shared(name: str) -> bool:
    """Whether it is a dot: a key/value head of several heads, or the input of an MLP and its neurons."""
    return "KV" in name or name.endswith(".in")


def _sort_key(graph: Graph, name: str) -> tuple[float, int]:
    return _level(graph, name), int(name.rpartition("V")[2]) if "KV" in name else graph.writer_index.get(name, 0)


def _level(graph: Graph, name: str) -> float:
    """Layer of a node, and where within it: key/value heads below the heads, the MLP above, its input below it."""
    if name == LOGITS:
        return float(graph.n_layers)
    if "KV" in name:
        return int(name[1:].partition("K")[0]) - _SHARED_BELOW
    if _is_shared(name):
        return _level(graph, name.removesuffix(".in")) - _INPUT_BELOW
    layer = float(graph.writer_layer[graph.writer_index[name]])
    return layer + _MLP_ABOVE if name.startswith("mlp") else layer


def _heights(graph: Graph, nodes: Sequence[str]) -> dict[str, float]:
    """The height of each node; a layer with nothing in it takes a third of the room."""
    layers = np.arange(-1, graph.n_layers + 1)
    used = {round(_level(graph, name)) for name in nodes}
    tall = np.array([1.0 if layer in used else 0.3 for layer in layers])
    bottom = dict(zip(layers.tolist(), (np.cumsum(tall) - tall).tolist(), strict=True))
    levels = {name: _level(graph, name) for name in nodes}
    return {name: bottom[round(level)] + (level - round(level)) for name, level in levels.items()}


def _width(heights: Mapping[str, float]) -> float:
    """Units of width: as many as the fullest row needs, and enough for lines to pass between sparse ones."""
    fullest = max(np.unique(list(heights.values()), return_counts=True)[1])
    return float(max(10, fullest))


def _columns(graph: Graph, nodes: Sequence[str], width: float) -> dict[str, float]:
    """Where nodes would stand by the number of their head."""
    columns = {}
    for name in nodes:
        is_head, is_shared = "H" in name, "KV" in name
        number = int(name.rpartition("V" if is_shared else "H")[2]) if is_head or is_shared else 0
        of = graph.n_kv_heads if is_shared else graph.n_heads
        columns[name] = (number + 0.5) / of * width if is_head or is_shared else width / 2
    return columns


def _largest(edges: Sequence[_Edge]) -> float:
    return max((edge.magnitude for edge in edges), default=0.0) or 1.0


def _title(circuit: Circuit, title: str | None) -> str:
    said = [str(circuit.attrs[name]) for name in ("model", "task", "method") if name in circuit.attrs]
    return title or "Circuit" + (": " + ", ".join(said) if said else "")


def _subtitle(circuit: Circuit, edges: Sequence[_Edge]) -> str:
    n_edges = len(circuit.edges)
    some = f"{n_edges:,} edge{'s' if n_edges > 1 else ''}"
    drawn = f"the {len(edges)} strongest of {some}" if len(edges) < n_edges else some
    nodes = {name for edge in edges for name in (edge.writer, edge.target) if not _is_shared(name)}
    summed = f", summed over {len(circuit.mask)} positions" if circuit.has_positions else ""
    return (
        f"{drawn}, {len(nodes)} nodes; width and colour: score, the largest {_largest(edges):.3g} in magnitude{summed}"
    )


# Plotly


def _figure(title: str, subtitle: str, places: Mapping[str, Place], width: float, n_edges: int) -> go.Figure:
    import plotly.graph_objects as go

    figure = go.Figure()
    for name, line in _LEGEND:
        figure.add_trace(go.Scatter(x=[None], y=[None], mode="lines", name=name, line=line, hoverinfo="skip"))
    top = max(y for _, y in places.values())
    figure.update_layout(
        title={"text": html.escape(title), "subtitle": {"text": html.escape(subtitle)}, "x": 0, "font_size": 15},
        height=int(max(_LAYER_PIXELS * (top + 1), min(_EDGE_PIXELS * n_edges, _MOST_PIXELS))) + 110,
        margin={"l": 50, "r": 12, "t": 96, "b": 10},
        font=_FONT,
        template="none",
        hovermode="closest",
        legend={"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom", "itemclick": False, "itemdoubleclick": False},
    )
    layers = {int(name[1:].partition("H")[0]): y for name, (_, y) in places.items() if "H" in name}
    layers |= {
        int(name[3:].partition(".")[0]): y - _MLP_ABOVE
        for name, (_, y) in places.items()
        if name.startswith("mlp") and not _is_shared(name)
    }
    figure.update_xaxes(visible=False, range=[-0.7, width + 0.7])
    figure.update_yaxes(
        title_text="layer", tickmode="array", tickvals=list(layers.values()), ticktext=list(map(str, layers)),
        range=[-0.5, top + 0.5], showgrid=True, gridcolor="#f0f2f5", gridwidth=1, zeroline=False, ticks="",
    )  # fmt: skip
    return figure


_LEGEND = (
    ("supports", {"color": SUPPORTS[2], "width": 3}),
    ("hinders", {"color": HINDERS[2], "width": 3}),
    ("into a query", {"color": GREY, "width": 2, "dash": DASHES["q"]}),
    ("into a key", {"color": GREY, "width": 2, "dash": DASHES["k"]}),
    ("into a value, MLP or logits", {"color": GREY, "width": 2}),
)


def _draw_forks(figure: go.Figure, forks: Sequence[tuple[str, str]], places: Mapping[str, Place]) -> None:
    import plotly.graph_objects as go

    x = [value for fork, head in forks for value in (places[fork][0], places[head][0], None)]
    y = [value for fork, head in forks for value in (places[fork][1], places[head][1], None)]
    line = go.Scatter(x=x, y=y, mode="lines", line={"color": GREY, "width": 1}, hoverinfo="skip", showlegend=False)
    figure.add_trace(line)


def _draw_edges(figure: go.Figure, edges: Sequence[_Edge], lines: Sequence[np.ndarray]) -> None:
    """Lines of one colour, width and dash are one trace; strong ones cover weak ones."""
    import plotly.graph_objects as go

    largest = _largest(edges)
    groups: dict[tuple[int, str, str], list[int]] = defaultdict(list)
    for at, edge in enumerate(edges):
        # Magnitudes fall off steeply, so that bins are even in their square root.
        step = min(int(np.sqrt(edge.magnitude / largest) * len(WIDTHS)), len(WIDTHS) - 1)
        colour = GREY if np.isnan(edge.score) else (HINDERS if edge.score < 0 else SUPPORTS)[step]
        groups[step, colour, DASHES.get(edge.kind, "solid")].append(at)
    for (step, colour, dash), members in sorted(groups.items()):
        gap = [[None, None]]
        points = [point for at in members for point in (*lines[at].round(3).tolist(), *gap)]
        x, y = zip(*points, strict=True)
        style = {"color": colour, "width": WIDTHS[step], "dash": dash}
        figure.add_trace(go.Scatter(x=x, y=y, mode="lines", line=style, hoverinfo="skip", showlegend=False))
    told = [
        (line[len(line) * share // 4], edge) for edge, line in zip(edges, lines, strict=True) for share in (1, 2, 3)
    ]
    hover = go.Scatter(
        x=[point[0] for point, _ in told], y=[point[1] for point, _ in told], mode="markers",
        marker={"size": 8, "opacity": 0}, showlegend=False, name="edges",
        customdata=[f"{edge.label}<br>score {edge.score:.3g}" for _, edge in told],
        hovertemplate="%{customdata}<extra></extra>",
    )  # fmt: skip
    figure.add_trace(hover)


def _draw_nodes(figure: go.Figure, edges: Sequence[_Edge], places: Mapping[str, Place]) -> None:
    """Boxes with names, which keep their size when the figure is narrowed, and dots for shared key/value heads."""
    import plotly.graph_objects as go

    shared = [name for name in places if _is_shared(name)]
    dots = go.Scatter(
        x=[places[name][0] for name in shared], y=[places[name][1] for name in shared], mode="markers",
        marker={"size": 6, "color": GREY}, customdata=[_node_hover(name, edges) for name in shared],
        hovertemplate="%{customdata}<extra></extra>", showlegend=False, name="shared inputs",
    )  # fmt: skip
    figure.add_trace(dots)
    for name, (x, y) in places.items():
        if name in shared:
            continue
        kind = "head" if name.startswith("L") else "mlp" if name.startswith("mlp") else "end"
        figure.add_annotation(
            x=x, y=y, text=name, hovertext=_node_hover(name, edges), showarrow=False, bgcolor=_FILL[kind],
            bordercolor=INK if kind != "mlp" else GREY, borderwidth=1, borderpad=1,
            font={"size": 10, "color": "#ffffff" if kind == "end" else INK}, hoverlabel={"bgcolor": "#ffffff"},
        )  # fmt: skip


def _node_hover(name: str, edges: Sequence[_Edge]) -> str:
    lines = [f"<b>{name}</b>"]
    for side, own in (
        ("in", [edge for edge in edges if edge.target == name]),
        ("out", [edge for edge in edges if edge.writer == name]),
    ):
        if not own:
            continue
        total = float(np.nansum([edge.score for edge in own]))
        lines.append(f"{side}: {total:.3g} over {len(own)} edge{'s' if len(own) > 1 else ''}")
        lines += [f"   {edge.label} {edge.score:.3g}" for edge in sorted(own, key=lambda one: -one.magnitude)[:_TOP]]
    return "<br>".join(lines)
