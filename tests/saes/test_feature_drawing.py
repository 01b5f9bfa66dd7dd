import numpy as np
import pytest
import xarray as xr

from interp.saes.feature_drawing import draw_feature_circuit
from interp.saes.feature_edges import METRIC
from interp.saes.feature_effects import ERROR

Z0, MLP0, Z1 = "blocks.0.attn.hook_z", "blocks.0.hook_mlp_out", "blocks.1.attn.hook_z"


def edges_of(rows: list[tuple], *, by_position: bool = True) -> xr.DataArray:
    """Edges from (site, feature, position) to (site, feature, position), with a weight."""
    coords: dict = {}
    for at, side in enumerate(("upstream", "downstream")):
        for part, name in enumerate(("site", "feature", "position")[: 3 if by_position else 2]):
            coords[f"{side}_{name}"] = ("edge", np.array([row[at][part] for row in rows]))
        if by_position:
            coords[f"{side}_label"] = ("edge", np.array([f"<t{row[at][2]}>" for row in rows]))
    attrs = {"model": "tiny", "task": "tokens", "method": "relp"}
    return xr.DataArray([row[2] for row in rows], dims=("edge",), coords=coords, name="weight", attrs=attrs)


ROWS = [
    ((Z1, 4, 3), (METRIC, 0, 3), 2.0),
    ((Z0, 7, 1), (Z1, 4, 3), -0.5),
    ((Z0, ERROR, 3), (MLP0, 2, 3), 0.25),
    ((MLP0, 2, 3), (Z1, 4, 3), 0.125),
    ((Z0, 8, 1), (Z1, 4, 3), 0.005),
]


def nodes_trace(figure):
    return next(trace for trace in figure.data if trace.mode == "markers+text")


def test_nodes_stand_by_site_and_position() -> None:
    figure = draw_feature_circuit(edges_of(ROWS), labels={(Z0, 7): "a <b> word"})
    assert list(figure.layout.yaxis.ticktext) == [Z0, MLP0, Z1, METRIC]
    assert list(figure.layout.xaxis.ticktext) == ["1: &lt;t1&gt;", "3: &lt;t3&gt;"]
    nodes = nodes_trace(figure)
    by_hover = {hover.partition("</b>")[0][3:]: at for at, hover in enumerate(nodes.customdata)}
    seven = by_hover[f"{Z0} feature 7 at 1, &#x27;&lt;t1&gt;&#x27;: a &lt;b&gt; word"]
    error = by_hover[f"{Z0} error at 3, &#x27;&lt;t3&gt;&#x27;"]
    first, third = figure.layout.xaxis.tickvals
    assert (nodes.x[seven], nodes.y[seven], nodes.marker.symbol[seven]) == (first, 0, "circle")
    assert (nodes.x[error], nodes.y[error], nodes.marker.symbol[error]) == (third, 0, "diamond")
    assert first < third
    assert nodes.marker.color[seven] == -0.5
    assert nodes.marker.size[seven] > nodes.marker.size[error]
    assert figure.layout.title.text == "Feature circuit: tiny, tokens, relp"
    assert "4 edges above 0.01 in magnitude, 5 nodes" in figure.layout.title.subtitle.text


def test_nodes_of_one_cell_stand_side_by_side() -> None:
    nodes = nodes_trace(draw_feature_circuit(edges_of(ROWS), threshold=0.001))
    places = list(zip(nodes.x, nodes.y, strict=True))
    assert len(set(places)) == len(places) == 6


def test_lines_join_the_nodes_in_the_colour_of_their_sign() -> None:
    figure = draw_feature_circuit(edges_of(ROWS[:2]))
    nodes = nodes_trace(figure)
    lines = [trace for trace in figure.data if trace.mode == "lines" and trace.x[0] is not None]
    ends = {((line.x[0], line.y[0]), (line.x[-2], line.y[-2])): line.line.width for line in lines}
    z0, z1, metric = zip(nodes.x, nodes.y, strict=True)
    assert set(ends) == {(z0, z1), (z1, metric)}
    assert ends[z1, metric] > ends[z0, z1]
    assert len({line.line.color for line in lines}) == 2


def test_without_positions_there_is_no_position_axis() -> None:
    figure = draw_feature_circuit(edges_of(ROWS, by_position=False), max_edges=2)
    assert not figure.layout.xaxis.visible
    assert "2 of 4 edges" in figure.layout.title.subtitle.text
    assert "summed over positions" in figure.layout.title.subtitle.text
    assert len(nodes_trace(figure).x) == 3


def test_nothing_to_draw_is_said() -> None:
    with pytest.raises(ValueError, match=r"no edge is above the threshold 3\.0; the largest is 2 in magnitude"):
        draw_feature_circuit(edges_of(ROWS), threshold=3.0)
    with pytest.raises(ValueError, match="max_edges=0"):
        draw_feature_circuit(edges_of(ROWS), max_edges=0)
