"""Scores against a circuit that is known: ROC, precision and recall."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Bool, Float
from numpy import ndarray

from interp.circuits.circuit import Circuit
from interp.circuits.graph import Graph


def edge_roc(circuit: Circuit, known: Collection[tuple[str, str]], *, signed: bool = False) -> pd.Series:
    """How well a circuit's edge scores tell the known edges from all others.

    Args:
        circuit: its scores rank the edges, its mask is held against the known ones.
        known: (writer, reader) names; those of other heads than this graph has are an error.
        signed: rank by signed scores instead of magnitudes.

    Returns:
        `auroc` (1 = every known edge before every other, 0.5 = chance), `average_precision`, and of the mask
        `precision`, `recall` and `f1` (NaN for a mask without edges); edges without a score rank last.

    Raises:
        ValueError: if a known edge is none of the graph's, or all or none of them are known.
    """
    graph = circuit.graph
    labels = np.zeros(graph.exists.shape, dtype=bool)
    for writer, reader in known:
        labels[graph.edge(writer, reader)] = True
    # Summed over positions, where there are any: an edge is known as such.
    scores = np.nansum(circuit.scores, axis=0) if circuit.has_positions else circuit.scores
    return _measures(scores[graph.exists], labels[graph.exists], circuit.flat_mask[graph.exists], signed)


def node_roc(scores: xr.DataArray, known: Collection[str], *, nodes: Sequence[str] | None = None) -> pd.Series:
    """How well node scores tell the known nodes from all others.

    Args:
        scores: [node], ranked by magnitude; nodes without a score are left out.
        known: names of the known nodes; those that do not count play no part.
        nodes: the nodes that count (heads only, say); all but the embedding by default.

    Returns:
        As `edge_roc`, `precision` and `recall` being those of the best n nodes, n the number of known ones.

    Raises:
        ValueError: for a name without a place in the scores, or if all or none of the nodes that count are known.
    """
    names = [str(name) for name in scores["node"].values]
    counted = [name for name in (nodes if nodes is not None else names) if name != "embed"]
    unknown = {*known, *counted} - set(names)
    if unknown:
        raise ValueError(f"{min(unknown)!r} is not a node of these scores")
    values = np.abs(scores.sel(node=counted).values.astype(float))
    labels = np.array([name in known for name in counted])[~np.isnan(values)]
    values = values[~np.isnan(values)]
    best = np.zeros(len(values), dtype=bool)
    best[np.argsort(-values, kind="stable")[: labels.sum()]] = True
    return _measures(values, labels, best, signed=True)


def _measures(
    scores: Float[ndarray, " one"], labels: Bool[ndarray, " one"], kept: Bool[ndarray, " one"], signed: bool
) -> pd.Series:
    from sklearn.metrics import average_precision_score, roc_auc_score

    if labels.all() or not labels.any():
        raise ValueError("all or none of them are known: there is nothing to tell apart")
    ranked = scores if signed else np.abs(scores)
    ranked = np.where(np.isnan(ranked), np.nanmin(ranked, initial=0.0) - 1, ranked)
    n_right = int((kept & labels).sum())
    precision = n_right / int(kept.sum()) if kept.any() else np.nan
    recall = n_right / int(labels.sum()) if kept.any() else np.nan
    return pd.Series(
        {
            "auroc": float(roc_auc_score(labels, ranked)),
            "average_precision": float(average_precision_score(labels, ranked)),
            "precision": precision,
            "recall": recall,
            "f1": 2 * n_right / int(kept.sum() + labels.sum()) if kept.any() else np.nan,
        }
    )


def graph_of_nodes(graph: Graph, nodes: Collection[str]) -> frozenset[tuple[str, str]]:
    """All edges of a graph between some nodes, the embedding and the logits."""
    inside = {*nodes, "embed"}
    fed = np.array([any(graph.writers[index] in nodes for index in np.flatnonzero(row)) for row in graph.feeds])
    fed[-1] = True
    pairs = np.argwhere(graph.exists & fed[None, :] & np.array([name in inside for name in graph.writers])[:, None])
    return frozenset((graph.writers[writer], graph.readers[reader]) for writer, reader in pairs)
