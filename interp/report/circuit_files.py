"""Circuits and their tests as files: for programs, for other tools, and as a page to read."""

from __future__ import annotations

from pathlib import Path

import xarray as xr

from interp.circuits.circuit import Circuit
from interp.circuits.drawing import draw
from interp.circuits.storage import save, to_dot, to_graphml
from interp.report.circuit_section import DRAWN_EDGES, strongest_edges
from interp.report.page import Section, definitions, page, paragraph, table
from interp.report.page import figures as side_by_side
from interp.report.writing import check_target, write_json, write_netcdf, write_text, written

CIRCUIT_ENDINGS = (".json", ".graphml", ".dot", ".html")
CURVE_ENDINGS = (".csv", ".json", ".nc")
LISTED = 200


def check_circuit_target(path: Path) -> None:
    """Refuse a place where no circuit can be written; a name without an ending is a folder.

    Raises:
        ValueError: for another ending.
        FileNotFoundError: if the folder around it does not exist.
    """
    if path.is_dir():
        return
    if path.suffix and path.suffix not in CIRCUIT_ENDINGS:
        raise ValueError(f"{str(path)!r} must end in {', '.join(CIRCUIT_ENDINGS)}, or be a folder")
    check_target(path)


def write_circuit(circuit: Circuit, path: Path) -> list[Path]:
    """Write a circuit in the format that a path ends in; in a folder in all of them, as `circuit.json` and so on.

    A circuit without edges is not drawn.

    Returns:
        The files.
    """
    check_circuit_target(path)
    if path.is_dir() or not path.suffix:
        path.mkdir(exist_ok=True)
        endings = CIRCUIT_ENDINGS if circuit.n_edges else CIRCUIT_ENDINGS[:-1]
        return [_write(circuit, path / f"circuit{ending}") for ending in endings]
    return [_write(circuit, path)]


def _write(circuit: Circuit, path: Path) -> Path:
    if path.suffix == ".json":
        return save(circuit, path)
    if path.suffix == ".graphml":
        with written(path) as part:
            to_graphml(circuit, part)
        return path
    return write_text(to_dot(circuit) if path.suffix == ".dot" else circuit_page(circuit), path)


def circuit_page(circuit: Circuit) -> str:
    """A page with the drawing, the strongest edges and heads, and how the circuit was found.

    Raises:
        ValueError: if it has no edges.
    """
    attrs = circuit.attrs
    title = ", ".join(str(attrs[name]) for name in ("model", "task", "method") if name in attrs) or "A circuit"
    said = f"{circuit.size} between {len(circuit.nodes)} nodes."
    drawing = draw(circuit, max_edges=DRAWN_EDGES)
    sections = [
        Section("The circuit", (side_by_side([(drawing, "Hover over nodes and edges for scores.")]),)),
        Section("Strongest edges", (table(strongest_edges(circuit, LISTED), sortable=True, tall=True),)),
        Section("Heads", (table(strongest_heads(circuit, LISTED), sortable=True, tall=True),)),
        Section("How it was found", (definitions({name: str(value) for name, value in attrs.items()}),)),
    ]
    return page(title, [paragraph(said)], sections)


def strongest_heads(circuit: Circuit, n: int) -> dict[str, list[str | int | float]]:
    """Columns of the heads of a circuit, by the summed |score| of edges into and out of each.

    An edge into a shared key or value counts for each head of its group that is in the circuit.
    """
    graph, heads = circuit.graph, circuit.heads
    into, out_of, total = dict.fromkeys(heads, 0), dict.fromkeys(heads, 0), dict.fromkeys(heads, 0.0)
    for writer, reader in circuit.edges:
        magnitude = abs(circuit.score_of(writer, reader))
        feeds = graph.feeds[graph.reader_index[reader]].nonzero()[0]
        for name in (graph.writers[index] for index in feeds):
            if name in into:
                into[name] += 1
                total[name] += magnitude
        if writer in out_of:
            out_of[writer] += 1
            total[writer] += magnitude
    best = sorted(heads, key=lambda head: -total[head])[:n]
    return {
        "head": list(best),
        "edges in": [into[head] for head in best],
        "edges out": [out_of[head] for head in best],
        "Σ |score|": [total[head] for head in best],
    }


def check_curve_target(path: Path) -> None:
    """Refuse a place where no labelled arrays can be written.

    Raises:
        ValueError: for another ending.
        FileNotFoundError: if the folder does not exist.
        IsADirectoryError: if it is a folder.
    """
    if check_target(path).suffix not in CURVE_ENDINGS:
        raise ValueError(f"{str(path)!r} must end in {', '.join(CURVE_ENDINGS)}")


def write_curve(curve: xr.Dataset, path: Path) -> Path:
    """Write a faithfulness curve, or what circuits have in common; the format is what the path ends in."""
    check_curve_target(path)
    if path.suffix == ".csv":
        return write_text(curve.to_dataframe().to_csv(), path)
    return write_json(curve, path) if path.suffix == ".json" else write_netcdf(curve, path)
