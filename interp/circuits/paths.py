"""The strongest paths of a flow: whole ways from the embedding to the logits, and how much runs along each."""

from __future__ import annotations

import heapq

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy import ndarray

from interp.circuits.circuit import Circuit
from interp.circuits.graph import LOGITS, Graph

_Partial = tuple[float, tuple[str, ...]]


def strongest_paths(circuit: Circuit, n_paths: int = 10) -> pd.DataFrame:
    """The paths along which most of a flow runs.

    What flows out of a node is taken to have come in along its edges in proportion to their scores, so that a path
    carries its last edge's flow times the share of each earlier edge in what flows into its node; all paths together
    carry the whole flow into the logits. That is exact bookkeeping for scores that are conserved (`secant_edge_scores`
    over all edges) and a heuristic for any other. Flows of either sign can meet in a node, and shares exceed 1 there:
    such paths cancel each other. The inflow of a key or value that several heads share counts for each of them equally.

    Args:
        circuit: its scores, summed over positions; all edges with a score count, kept or not.
        n_paths: how many to list.

    Returns:
        Columns `path` ("embed → mlp0 → L17H4.q → logits": which input of a head is read) and `flow`, signed, the
        largest magnitude first.

    Raises:
        ValueError: for fewer than one path.
    """
    if n_paths < 1:
        raise ValueError(f"n_paths={n_paths}; it is at least 1")
    graph = circuit.graph
    scores = np.nan_to_num(circuit.scores).astype(np.float64)
    flow = scores.sum(0) if circuit.has_positions else scores
    best: list[list[_Partial]] = [[(1.0, (graph.writers[0],))]]
    for node in range(1, len(graph.writers)):
        best.append(_into(best, _shares(graph, flow, node), graph.writers[node], graph, n_paths))
    last = len(graph.readers) - 1
    ends = _into(best, {last: flow[:, last]}, LOGITS, graph, n_paths)
    return pd.DataFrame([(" → ".join(path), weight) for weight, path in ends], columns=["path", "flow"])


def _shares(graph: Graph, flow: Float[ndarray, "writer reader"], node: int) -> dict[int, Float[ndarray, " writer"]]:
    """By reader of a node, the share of each edge into it in all that flows into the node."""
    readers = np.flatnonzero(graph.feeds[:, node])
    parts = {int(reader): flow[:, reader] / graph.feeds[reader].sum() for reader in readers}
    total = sum(part.sum() for part in parts.values())
    return {reader: part / total for reader, part in parts.items()} if total else {}


def _into(
    best: list[list[_Partial]], weights: dict[int, Float[ndarray, " writer"]], node: str, graph: Graph, n_paths: int
) -> list[_Partial]:
    """The best paths that arrive somewhere: magnitudes of products grow with those of their parts."""
    arriving = [
        (sofar * weight[writer], (*path, _named(node, graph.readers[reader])))
        for reader, weight in weights.items()
        for writer in np.flatnonzero(weight)
        for sofar, path in best[writer]
    ]
    return heapq.nlargest(n_paths, arriving, key=lambda one: abs(one[0]))


def _named(node: str, reader: str) -> str:
    """A node by the input that is read: "L17H4.q", also where a key is shared."""
    return f"{node}.{reader.rpartition('.')[2]}" if "." in reader else node
