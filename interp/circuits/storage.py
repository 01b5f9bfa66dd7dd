"""Circuits as files: JSON with a format version, and graphs for other programs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from interp.circuits.circuit import Circuit
from interp.circuits.graph import LOGITS, Graph

if TYPE_CHECKING:
    import networkx as nx

FORMAT = "interp.circuit"
FORMAT_VERSION = 1
_DIGITS = 9
"""Significant digits of a stored score: all that a float32 has."""


def save(circuit: Circuit, path: str | os.PathLike[str]) -> Path:
    """Write a circuit as JSON; the file appears when it is whole. Equal circuits give equal bytes.

    Returns:
        The path.
    """
    target = Path(path)
    scored = np.argwhere(~np.isnan(circuit.scores))
    content = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "graph": circuit.graph.as_dict(),
        "shape": list(circuit.scores.shape),
        "attrs": dict(circuit.attrs),
        # Flat indices and values, not one object an edge: large graphs have millions of them.
        "scored": np.ravel_multi_index(tuple(scored.T), circuit.scores.shape).tolist() if len(scored) else [],
        "scores": [float(f"{value:.{_DIGITS}g}") for value in circuit.scores[~np.isnan(circuit.scores)]],
        "kept": np.flatnonzero(circuit.mask).tolist(),
        "edges": [list(edge) for edge in circuit.edges],
    }
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        part.write_text(json.dumps(content, allow_nan=False), encoding="utf-8")
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    return target


def load(path: str | os.PathLike[str]) -> Circuit:
    """Read a circuit, checking everything before anything is made.

    Raises:
        ValueError: naming file and field, if the file is damaged, of another kind or of a later version.
    """
    try:
        content = json.loads(Path(path).read_text())
        return _circuit_of(content)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a circuit file: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    return f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)


def _circuit_of(content: Any) -> Circuit:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"format is not {FORMAT!r}")
    if content["version"] != FORMAT_VERSION:
        raise ValueError(f"version {content['version']!r}; this interp reads version {FORMAT_VERSION}")
    graph = Graph(**content["graph"])
    shape = tuple(content["shape"])
    if shape[-2:] != graph.exists.shape or len(shape) not in (2, 3):
        raise ValueError(f"shape {shape} does not fit the graph ({graph})")
    size = int(np.prod(shape))
    scores, mask = np.full(size, np.nan, dtype=np.float32), np.zeros(size, dtype=bool)
    scored, kept = (_indices(content[name], name, size) for name in ("scored", "kept"))
    values = np.asarray(content["scores"], dtype=np.float64)
    if values.shape != scored.shape or not np.isfinite(values).all():
        raise ValueError("scores: not one finite number for each entry of 'scored'")
    scores[scored], mask[kept] = values, True
    circuit = Circuit(graph, scores.reshape(shape), mask.reshape(shape), dict(content["attrs"]))
    if [list(edge) for edge in circuit.edges] != content["edges"]:
        raise ValueError("edges: the names do not say what 'kept' says")
    return circuit


def _indices(values: Any, name: str, size: int) -> np.ndarray:
    index = np.asarray(values if values else [], dtype=object)
    if not all(isinstance(one, int) and 0 <= one < size for one in index.tolist()):
        raise ValueError(f"{name}: entries are whole numbers below {size}")
    if len(set(index.tolist())) != len(index):
        raise ValueError(f"{name}: an entry stands twice")
    return index.astype(np.int64)


def to_networkx(circuit: Circuit) -> nx.MultiDiGraph:
    """The circuit as a networkx graph: nodes are heads, MLPs, "embed" and "logits"; an edge for each reader.

    Node attributes: `layer`, `kind`. Edge attributes: `score`, and `reader` ("q", "k", "v", "mlp" or "logits"). A key
    or value of a shared key/value head leads to every head of its group that is in the circuit, the input of an MLP to
    all its neurons that are. With positions the score is summed over them, and `positions` says where the edge is kept
    ("3 7").
    """
    import networkx as nx

    graph, drawn = circuit.graph, nx.MultiDiGraph(**{name: str(value) for name, value in circuit.attrs.items()})
    for name in (*circuit.nodes, LOGITS):
        kind = "head" if name.startswith("L") else "neuron" if "." in name else name.rstrip("0123456789")
        layer = graph.n_layers if name == LOGITS else int(graph.writer_layer[graph.writer_index[name]])
        drawn.add_node(name, layer=layer, kind=kind)
    nodes = set(circuit.nodes)
    for writer, reader in circuit.edges:
        kind = reader.rpartition(".")[2] if "." in reader else reader.rstrip("0123456789")
        for target in targets(graph, reader):
            if target == LOGITS or target in nodes:
                where = {"positions": " ".join(map(str, circuit.positions_of(writer, reader)))}
                said = where if circuit.has_positions else {}
                drawn.add_edge(writer, target, reader=kind, score=circuit.score_of(writer, reader), **said)
    return drawn


def targets(graph: Graph, reader: str) -> list[str]:
    """The nodes that a reader is an input of; "logits" for the logits."""
    if reader == LOGITS:
        return [LOGITS]
    return [graph.writers[index] for index in np.flatnonzero(graph.feeds[graph.reader_index[reader]])]


def to_graphml(circuit: Circuit, path: str | os.PathLike[str]) -> Path:
    """Write the circuit as GraphML (Gephi, yEd, Cytoscape)."""
    import networkx as nx

    nx.write_graphml(to_networkx(circuit), path)
    return Path(path)


def to_dot(circuit: Circuit) -> str:
    """The circuit in Graphviz's language: the embedding below, the logits on top, one rank a layer."""
    drawn = to_networkx(circuit)
    lines = ["digraph circuit {", "  rankdir=BT;", "  node [shape=box];"]
    layers: dict[tuple[int, bool], list[str]] = {}
    for name, node in drawn.nodes(data=True):
        layers.setdefault((node["layer"], node["kind"] == "mlp"), []).append(name)
    for _, names in sorted(layers.items()):
        lines.append("  { rank=same; " + " ".join(f'"{name}";' for name in names) + " }")
    largest = max((abs(edge["score"]) for *_, edge in drawn.edges(data=True)), default=0.0) or 1.0
    for writer, target, edge in drawn.edges(data=True):
        colour = "blue" if edge["score"] >= 0 else "red"
        width = 0.5 + 3 * abs(edge["score"]) / largest
        label = f', label="{edge["reader"]}"' if edge["reader"] in "qkv" else ""
        lines.append(f'  "{writer}" -> "{target}" [color={colour}, penwidth={width:.2f}{label}];')
    return "\n".join([*lines, "}"]) + "\n"
