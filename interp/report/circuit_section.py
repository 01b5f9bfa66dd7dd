"""The circuit in the report: found and tested here, kept in the study as arrays, drawn from them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from interp.circuits.circuit import Circuit
from interp.circuits.discover import discover, method_named
from interp.circuits.drawing import draw
from interp.circuits.evaluate import evaluate
from interp.circuits.graph import Graph
from interp.circuits.storage import load
from interp.model import Model
from interp.report.page import Section, paragraph, table
from interp.report.page import figures as side_by_side
from interp.tasks import Task

EDGES_LISTED = 20
DRAWN_EDGES = 120


def find_circuit(model: Model, task: Task, asked: str, *, seed: int, progress: bool | None) -> Circuit:
    """The circuit that a report was asked to show.

    Args:
        model: the model.
        task: what to find it on.
        asked: a method of discovery, or the path of a circuit file.
        seed: of methods that draw numbers.
        progress: show progress bars.

    Raises:
        ValueError: for an unknown method, or a circuit of another model's graph.
    """
    if not asked.endswith(".json"):
        return discover(model, task, asked, seed=seed, progress=progress)
    circuit = load(asked)
    graph = Graph.of(model, neurons=circuit.graph.neurons)
    if circuit.graph != graph:
        raise ValueError(f"{asked}: a circuit of {circuit.graph}; {model.name} has {graph}")
    return circuit


def check_circuit(asked: str) -> str:
    """The method or file asked for.

    Raises:
        ValueError: for an unknown method, or a file that is no circuit.
    """
    if asked.endswith(".json"):
        load(asked)
        return asked
    return method_named(asked)


def circuit_variables(
    model: Model, task: Task, asked: str, *, seed: int, progress: bool | None
) -> dict[str, tuple[tuple[str, ...], Any] | xr.DataArray]:
    """A circuit and its tests as variables of a study."""
    circuit = find_circuit(model, task, asked, seed=seed, progress=progress)
    curve = evaluate(model, task, circuit, progress=progress)
    circuit_attrs = {name: value for name, value in circuit.attrs.items() if name != "seconds"}
    about = {
        "graph": json.dumps(circuit.graph.as_dict()),
        "circuit": json.dumps(circuit_attrs),
        "cpr": curve.attrs["cpr"],
        "cmd": curve.attrs["cmd"],
        "n_prompts": len(task),
        **{name: float(curve[f"circuit_{name}"]) for name in ("faithfulness", "accuracy", "kl")},
    }
    coords = {"writer": list(circuit.graph.writers), "reader": list(circuit.graph.readers)}
    dims = ("circuit_position", "writer", "reader")[-circuit.mask.ndim :]
    return {
        "circuit_score": xr.DataArray(circuit.scores, dims=dims, coords=coords, attrs=about),
        "circuit_kept": xr.DataArray(circuit.mask.astype(np.int8), dims=dims, coords=coords),
        **{f"curve_{name}": curve[name] for name in ("faithfulness", "n_edges")},
    }


def circuit_section(study: xr.Dataset) -> Section:
    """The drawing, the strongest edges, and how much of the behaviour the circuit carries."""
    about = study["circuit_score"].attrs
    circuit = Circuit(
        Graph(**json.loads(about["graph"])),
        study["circuit_score"].values.astype(np.float32),
        study["circuit_kept"].values.astype(bool),
        json.loads(about["circuit"]),
    )
    method = circuit.attrs["method"]
    said = (
        f"{circuit.size} between {len(circuit.nodes)} nodes, by {method}. With "
        f"every other edge carrying the corrupted run, the circuit keeps {about['faithfulness']:.0%} of the metric's "
        f"gap and is right on {about['accuracy']:.0%} of {about['n_prompts']} prompts (the ones it was found on)."
    )
    caption = (
        "Faithfulness of the best edges by magnitude and by signed score; the others take the corrupted run's values. "
        f"Area under the signed curve (CPR) {about['cpr']:.2f}, area between the other and 1 (CMD) {about['cmd']:.3f}."
    )
    return Section(
        "The circuit",
        (
            paragraph(said),
            side_by_side([(draw(circuit, max_edges=DRAWN_EDGES), "Hover over nodes and edges for scores.")]),
            side_by_side([(faithfulness_figure(study), caption)], least=400),
            table(strongest_edges(circuit), tall=True),
        ),
    )


def strongest_edges(circuit: Circuit, n: int = EDGES_LISTED) -> dict[str, list[str | float]]:
    """Columns of the edges of largest score; with positions, of their sum, and where each is kept."""
    scored = {edge: circuit.score_of(*edge) for edge in circuit.edges}
    best = sorted(scored, key=lambda edge: -abs(scored[edge]))[:n]
    columns: dict[str, list[str | float]] = {
        "from": [writer for writer, _ in best],
        "to": [reader for _, reader in best],
    }
    if circuit.has_positions:
        columns["positions"] = [_positions(circuit, *edge) for edge in best]
    return columns | {"score": [scored[edge] for edge in best]}


def _positions(circuit: Circuit, writer: str, reader: str) -> str:
    """Where an edge is kept: "3 (S2), 7"."""
    labels = circuit.attrs.get("position_labels") or [""] * len(circuit.mask)
    found = circuit.positions_of(writer, reader)
    return ", ".join(f"{at} ({labels[at].strip()})" if labels[at].strip("… ") else str(at) for at in found)


def faithfulness_figure(curve: Mapping[Any, xr.DataArray]) -> go.Figure:
    """Faithfulness over the share of edges, on a logarithmic axis."""
    faithfulness = curve["curve_faithfulness"]
    figure = go.Figure()
    for ranking, colour in (("magnitude", "#2b74b3"), ("signed", "#c23a3c")):
        values = faithfulness.sel(ranking=ranking)
        counts = curve["curve_n_edges"].sel(ranking=ranking).values
        figure.add_scatter(
            x=values["size"].values,
            y=values.values,
            mode="lines+markers",
            name=f"by {ranking}" if ranking == "magnitude" else "by signed score",
            line={"color": colour},
            customdata=counts,
            hovertemplate="%{customdata:,} edges: %{y:.2f}<extra></extra>",
        )
    figure.add_hline(y=1, line={"color": "#8a94a3", "dash": "dot"})
    figure.update_xaxes(title="share of all edges", type="log", tickformat=".1%")
    figure.update_yaxes(title="faithfulness (share of the gap)")
    figure.update_layout(
        title="How many edges carry the behaviour?",
        template="simple_white",
        height=380,
        legend={"orientation": "h", "y": 1.08},
    )
    return figure
