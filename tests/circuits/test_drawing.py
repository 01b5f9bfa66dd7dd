"""Drawings: every edge once, in its colour, around the nodes; and the simplification against its definition."""

from __future__ import annotations

import itertools
from collections import Counter

import networkx as nx
import numpy as np
import pytest
import xarray as xr

from interp.circuits.circuit import Circuit
from interp.circuits.drawing import HINDERS, SUPPORTS, draw, overlap_heatmap, simplified
from interp.circuits.graph import Graph
from interp.circuits.layout import n_crossings, place, route


def circuit_of(graph, edges):
    """A circuit with these edges and scores."""
    scores = np.where(graph.exists, 0.0, np.nan).astype(np.float32)
    mask = np.zeros(graph.exists.shape, dtype=bool)
    for (writer, reader), score in edges.items():
        scores[graph.edge(writer, reader)] = score
        mask[graph.edge(writer, reader)] = True
    return Circuit(graph, scores, mask, {"model": "m", "task": "t", "method": "by hand"})


def random_circuit(graph, n_edges, seed=0):
    generator = np.random.default_rng(seed)
    strengths = generator.lognormal(0, 1.5, len(graph.writers))[:, None]
    scores = generator.normal(size=graph.exists.shape) * strengths
    scores = np.where(graph.exists, scores, np.nan).astype(np.float32)
    circuit = Circuit(graph, scores, np.zeros(scores.shape, dtype=bool))
    return circuit.select(edges=n_edges, selection="greedy", prune=False)


BY_HAND = {
    ("embed", "L0H0.q"): 0.5,
    ("L0H0", "L1H1.k"): 1.0,
    ("L0H1", "L1H1.v"): -0.9,
    ("mlp0", "mlp1"): -0.01,
    ("L1H1", "logits"): 0.3,
}


def lines_of(figure):
    """(colour, width, dash, number of lines) of every trace that holds edges."""
    return [
        (trace.line.color, trace.line.width, trace.line.dash, sum(x is None for x in trace.x))
        for trace in figure.data
        if trace.mode == "lines" and not trace.showlegend and trace.line.color in {*SUPPORTS, *HINDERS}
        if trace.x[0] is not None
    ]


def hover_of(figure, name):
    return next(note.hovertext for note in figure.layout.annotations if note.text == name)


def test_sign_is_colour_and_reader_is_dash():
    figure = draw(circuit_of(Graph(2, 2, 2, False), BY_HAND))
    found = {(colour in SUPPORTS, dash): count for colour, _, dash, count in lines_of(figure)}
    assert found[True, "6px,3px"] == 1
    assert found[True, "2px,2px"] == 1
    assert found[True, "solid"] == 1
    assert sum(count for colour, *_, count in lines_of(figure) if colour in HINDERS) == 2


def test_width_grows_with_the_score():
    widths = {colour: width for colour, width, *_ in lines_of(draw(circuit_of(Graph(2, 2, 2, False), BY_HAND)))}
    assert widths[SUPPORTS[-1]] == widths[HINDERS[-1]] > widths[SUPPORTS[2]] > widths[HINDERS[0]]


def test_hover_says_score_and_strongest_edges():
    figure = draw(circuit_of(Graph(2, 2, 2, False), BY_HAND))
    edges = next(trace for trace in figure.data if trace.name == "edges")
    assert set(edges.customdata) >= {"L0H0 → L1H1.k<br>score 1", "L0H1 → L1H1.v<br>score -0.9"}
    hover = hover_of(figure, "L1H1").split("<br>")
    assert hover[1] == "in: 0.1 over 2 edges"
    assert [line.strip() for line in hover[2:4]] == ["L0H0 → L1H1.k 1", "L0H1 → L1H1.v -0.9"]
    assert hover[4] == "out: 0.3 over 1 edge"


def test_layers_go_up_and_mlps_stand_above_their_heads():
    figure = draw(random_circuit(Graph(4, 3, 3, False), 60))
    height = {note.text: note.y for note in figure.layout.annotations}
    assert height["logits"] == max(height.values())
    assert height.get("embed", -1) <= min(height.values())
    for name in height:
        if name.startswith("mlp"):
            heads = [y for other, y in height.items() if other.startswith(f"L{name[3:]}H")]
            assert all(height[name] > y for y in heads)
    ticks = dict(zip(figure.layout.yaxis.ticktext, figure.layout.yaxis.tickvals, strict=True))
    for name, y in height.items():
        if name.startswith("L"):
            assert ticks[name[1:].partition("H")[0]] == pytest.approx(y)


def test_shared_keys_lead_to_the_heads_of_their_group_that_are_in_the_circuit():
    graph = Graph(2, 4, 2, False)
    shared = {("L0H0", "L1H0.k"): 1.0, ("L1H0", "logits"): 1.0, ("L1H1", "logits"): 1.0, ("L1H2", "logits"): 1.0}
    figure = draw(circuit_of(graph, shared))
    dots = next(trace for trace in figure.data if trace.name == "shared inputs")
    assert len(dots.x) == 1
    assert dots.customdata[0].startswith("<b>L1KV0</b>")
    forks = next(trace for trace in figure.data if trace.mode == "lines" and trace.line.width == 1)
    ends = {(x, y) for x, y in zip(forks.x[1::3], forks.y[1::3], strict=True)}
    heads = {(note.x, note.y) for note in figure.layout.annotations if note.text in ("L1H0", "L1H1")}
    assert ends == heads
    del shared["L1H1", "logits"]
    alone = draw(circuit_of(graph, shared))
    assert not next(trace for trace in alone.data if trace.name == "shared inputs").x


def test_of_many_edges_the_strongest_are_drawn_and_the_subtitle_says_so():
    circuit = random_circuit(Graph(30, 9, 3, False), 300)
    figure = draw(circuit)
    assert sum(count for *_, count in lines_of(figure)) == 200
    assert figure.layout.title.subtitle.text.startswith("the 200 strongest of 300 edges")
    strengths = sorted((abs(circuit.score_of(*edge)) for edge in circuit.edges), reverse=True)
    drawn = next(trace for trace in figure.data if trace.name == "edges").customdata
    assert min(abs(float(text.partition("score ")[2])) for text in drawn) == pytest.approx(strengths[199], rel=1e-2)
    assert len(figure.data) < 40
    assert len(figure.to_json()) < 1_000_000


def test_a_single_edge_is_one_edge():
    figure = draw(circuit_of(Graph(1, 1, 1, False), {("embed", "logits"): 1.0}))
    assert figure.layout.title.subtitle.text.startswith("1 edge, 2 nodes;")


def test_the_same_circuit_gives_the_same_picture():
    circuit = random_circuit(Graph(6, 4, 2, False), 40)
    assert draw(circuit).to_json() == draw(circuit).to_json()


def test_text_is_escaped_and_bad_input_refused():
    circuit = circuit_of(Graph(1, 1, 1, False), {("embed", "logits"): 1.0})
    assert "&lt;b&gt;" in draw(circuit, title="<b>").layout.title.text
    with pytest.raises(ValueError, match="max_edges=0"):
        draw(circuit, max_edges=0)
    with pytest.raises(ValueError, match="no edges"):
        draw(circuit_of(Graph(1, 1, 1, False), {}))


def test_edges_without_a_score_are_drawn_grey():
    graph = Graph(1, 1, 1, False)
    mask = np.zeros(graph.exists.shape, dtype=bool)
    mask[graph.edge("embed", "logits")] = True
    figure = draw(Circuit(graph, np.full(mask.shape, np.nan, dtype=np.float32), mask))
    assert not lines_of(figure)
    assert "embed" in {note.text for note in figure.layout.annotations}


# Layout


def test_a_matching_is_drawn_without_crossings():
    generator = np.random.default_rng(0)
    order = generator.permutation(9)
    rows = {f"a{i}": 0.0 for i in range(9)} | {f"b{i}": 1.0 for i in range(9)}
    links = [(f"a{i}", f"b{int(order[i])}", 1.0) for i in range(9)]
    columns = {name: float(name[1:]) for name in rows}
    before = n_crossings({name: (columns[name], rows[name]) for name in rows}, links)
    inversions = sum(order[i] > order[j] for i, j in itertools.combinations(range(9), 2))
    assert before == inversions > 0
    places = place(rows, links, 9.0, columns)
    assert n_crossings(places, links) == 0


def test_nodes_of_a_row_keep_their_distance_and_stay_inside():
    generator = np.random.default_rng(1)
    rows = {f"n{i}": float(i // 7) for i in range(21)}
    links = [(f"n{generator.integers(7)}", f"n{7 + generator.integers(14)}", 1.0) for _ in range(40)]
    places = place(rows, links, 10.0, dict.fromkeys(rows, 5.0))
    for level in range(3):
        x = np.sort([place[0] for place in places.values() if place[1] == level])
        assert np.diff(x).min() >= 1 - 1e-9
        assert x[0] >= -1e-9
        assert x[-1] <= 10 + 1e-9


def test_lines_end_at_their_nodes_and_go_around_others():
    places = {"a": (5.0, 0.0), "x": (5.0, 1.0), "y": (5.0, 2.0), "b": (5.0, 3.0)}
    line = route(places, [("a", "b", 1.0)], 10.0, dict.fromkeys(places, 0.3))[0]
    assert line[0].tolist() == [5.0, 0.0]
    assert line[-1].tolist() == [5.0, 3.0]
    assert (np.diff(line[:, 1]) > 0).all()
    for y in (1.0, 2.0):
        assert abs(np.interp(y, line[:, 1], line[:, 0]) - 5.0) >= 0.3


def test_lines_between_the_same_nodes_do_not_cover_each_other():
    places = {"a": (5.0, 0.0), "b": (5.0, 1.0)}
    lines = route(places, [("a", "b", 1.0)] * 3, 10.0, dict.fromkeys(places, 0.2))
    middles = sorted(line[len(line) // 2, 0] for line in lines)
    assert np.diff(middles).min() > 0.05


# Simplification


def brute_force(circuit):
    """The edges without a way of stronger edges around them, each tried by itself."""
    graph = circuit.graph
    strength = {edge: abs(circuit.score_of(*edge)) for edge in circuit.edges}
    kept = []
    for writer, reader in circuit.edges:
        ways = nx.DiGraph()
        ways.add_nodes_from([writer, f"in {reader}"])
        for (source, end), value in strength.items():
            if value > strength[writer, reader]:
                ways.add_edge(source, f"in {end}")
                for node in np.flatnonzero(graph.feeds[graph.reader_index[end]]):
                    ways.add_edge(f"in {end}", graph.writers[node])
        if not nx.has_path(ways, writer, f"in {reader}"):
            kept.append((writer, reader))
    return tuple(kept)


@pytest.mark.parametrize("sizes", [(3, 3, 3, False), (3, 4, 2, False), (4, 2, 1, True)])
def test_simplified_is_its_definition(sizes):
    circuit = random_circuit(Graph(*sizes), 60, seed=sum(sizes))
    small = simplified(circuit)
    assert small.edges == brute_force(circuit)
    assert 0 < small.attrs["n_simplified"] == circuit.n_edges - small.n_edges
    np.testing.assert_array_equal(small.scores, circuit.scores)


def test_a_direct_edge_goes_if_and_only_if_the_way_around_is_stronger():
    graph = Graph(2, 1, 1, False)
    around = {("embed", "L0H0.v"): 2.0, ("L0H0", "L1H0.v"): -2.0, ("L1H0", "logits"): 2.0}
    weak = circuit_of(graph, {**around, ("embed", "L1H0.v"): 1.0})
    assert set(simplified(weak).edges) == set(around)
    strong = circuit_of(graph, {**around, ("embed", "L1H0.v"): -3.0})
    assert simplified(strong).edges == strong.edges
    other_reader = circuit_of(graph, {**around, ("embed", "L1H0.k"): 1.0})
    assert simplified(other_reader).edges == other_reader.edges


def test_simplified_refuses_positions():
    graph = Graph(1, 1, 1, False)
    scores = np.zeros((2, *graph.exists.shape), dtype=np.float32)
    with pytest.raises(ValueError, match="positions"):
        simplified(Circuit(graph, scores, np.zeros(scores.shape, dtype=bool)))


def test_overlap_heatmap_writes_every_cell():
    names = ["ioi", "<i>"]
    overlaps = xr.DataArray(
        [[1.0, 0.25], [0.5, 1.0]], dims=("first", "second"), coords={"first": names, "second": names}
    )
    heatmap = overlap_heatmap(overlaps, title="t").data[0]
    assert heatmap.texttemplate == "%{z:.2f}"
    assert heatmap.zmin == -heatmap.zmax
    assert Counter(heatmap.x) == Counter(["ioi", "&lt;i&gt;"])
    np.testing.assert_array_equal(heatmap.z, overlaps.values)
