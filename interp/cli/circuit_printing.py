"""What the commands on circuits print."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from interp.cli.printing import show_frame, show_rows

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

    from interp.circuits import Circuit

ROWS = 20


def said_of(circuit: Circuit) -> str:
    """A circuit in a sentence."""
    attrs = circuit.attrs
    found = (
        f"{attrs.get('model', 'unknown model')}, {attrs.get('task', 'unknown task')}, {attrs.get('method', 'known')}"
    )
    dropped = f" ({attrs['n_pruned']} dead ends dropped)" if attrs.get("n_pruned") else ""
    return f"{found}: {circuit.size}{dropped}, {len(circuit.heads)} heads and {len(circuit.nodes)} nodes in all"


def show_circuit(circuit: Circuit) -> None:
    """The strongest edges and heads as tables."""
    import pandas as pd

    from interp.report.circuit_files import strongest_heads
    from interp.report.circuit_section import strongest_edges

    edges, heads = strongest_edges(circuit, ROWS), strongest_heads(circuit, ROWS)
    show_rows(list(edges), [[*names, f"{score:.4g}"] for *names, score in zip(*edges.values(), strict=True)],
              title=f"strongest edges, up to {ROWS}")  # fmt: skip
    show_frame(pd.DataFrame(heads), f"heads by Σ |score| of their edges, up to {ROWS}")


def show_curve(curve: xr.Dataset) -> None:
    """Faithfulness at each size, of the circuit itself, and the two areas."""
    attrs = curve.attrs
    magnitude, signed = (curve.sel(ranking=name) for name in ("magnitude", "signed"))
    columns = {
        "size": [f"{size:.1%}" for size in curve["size"].values],
        "edges": [f"{count:,}" for count in magnitude["n_edges"].values],
        **{name: [f"{value:.3f}" for value in magnitude[name].values] for name in ("faithfulness", "kl", "accuracy")},
        "faithfulness by signed score": [f"{value:.3f}" for value in signed["faithfulness"].values],
    }
    title = (
        f"best edges by magnitude, on {attrs['task']} ({attrs['ablation']} ablation, {attrs['metric']}, "
        f"n = {attrs['n_prompts']} prompts)"
    )
    show_rows(list(columns), [list(row) for row in zip(*columns.values(), strict=True)], title=title)
    if "circuit_faithfulness" in curve:
        own = {name: float(curve[f"circuit_{name}"]) for name in ("faithfulness", "kl", "accuracy")}
        typer.echo(
            f"the circuit itself: faithfulness {own['faithfulness']:.3f}, KL {own['kl']:.3f} nats, "
            f"accuracy {own['accuracy']:.2f}"
        )
    typer.echo(f"CPR {attrs['cpr']:.3f}, CMD {attrs['cmd']:.3f}")


def show_overlap(found: xr.Dataset) -> None:
    """Each pair of circuits in a row."""
    names = [str(name) for name in found["first"].values]
    sizes = {
        name: f"{int(found['n_nodes'].sel(first=name))} nodes, {int(found['n_edges'].sel(first=name)):,} edges"
        for name in names
    }
    show_rows(["circuit", "size"], [[name, size] for name, size in sizes.items()])
    measures = {
        "nodes": "node_jaccard",
        "p ": "node_p",
        "edges": "edge_jaccard",
        "p": "edge_p",
        "edges by score": "weighted_edge_overlap",
        "Spearman of scores": "score_spearman",
    }
    rows = []
    for place, first in enumerate(names):
        for second in names[place + 1 :]:
            pair = found.sel(first=first, second=second)
            values = {title: float(pair[name]) for title, name in measures.items()}
            shown = [f"{one:.2g}" if title.strip() == "p" else f"{one:.3f}" for title, one in values.items()]
            rows.append([first, second, *shown])
    show_rows(["first", "second", *measures], rows, title="in common (Jaccard), and how likely by chance (p)")


def show_summary(rows: pd.DataFrame) -> None:
    """The cells of a job that were found, a row each."""
    finished = rows[rows["error"] == ""]
    if len(finished):
        columns = ["model", "task", "method", "n_edges", "n_nodes", "cpr", "cmd", "faithfulness", "kl", "accuracy"]
        show_frame(finished[columns], "circuits")
