"""From scores to a circuit: which edges are kept.

`top_edges` takes the largest scores wherever they are; `greedy_edges` grows from the logits, so that every edge kept
leads to the answer; `without_dead_ends` drops what has no way from the embedding to the logits. A circuit is chosen by
magnitude unless signed scores are asked for.
"""

from __future__ import annotations

import heapq

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float
from numpy import ndarray

from interp.circuits.graph import Graph


def above_threshold(
    graph: Graph, scores: Float[ndarray, "*pos writer reader"], threshold: float, *, signed: bool = False
) -> Bool[ndarray, "*pos writer reader"]:
    """Edges whose score (its magnitude unless signed) is at least a threshold."""
    ranked = _ranked_by(graph, scores, signed)
    return np.greater_equal(ranked, threshold) & np.isfinite(ranked)


def top_edges(
    graph: Graph, scores: Float[ndarray, "*pos writer reader"], n_edges: int, *, signed: bool = False
) -> Bool[ndarray, "*pos writer reader"]:
    """The edges of largest score; of equal ones those further up in the order of the graph.

    Raises:
        ValueError: if there are not so many edges with a score.
    """
    ranked = _ranked_by(graph, scores, signed).ravel()
    n_scored = int((ranked > -np.inf).sum())
    if not 0 <= n_edges <= n_scored:
        raise ValueError(f"edges={n_edges} is outside 0..{n_scored}, the edges that have a score")
    kept = np.zeros(ranked.shape, dtype=bool)
    kept[np.argsort(-ranked, kind="stable")[:n_edges]] = True
    return kept.reshape(scores.shape)


def greedy_edges(
    graph: Graph, scores: Float[ndarray, "writer reader"], n_edges: int, *, signed: bool = False
) -> Bool[ndarray, "writer reader"]:
    """Edges chosen one by one: always the largest score among those that lead to what is in the circuit already.

    Source: `apply_greedy` of EAP-IG (Hanna et al. 2024, arXiv 2403.17806).

    Raises:
        ValueError: if there are not so many edges with a score, or scores have a position axis.
    """
    if scores.ndim != 2:
        raise ValueError("greedy selection is for scores without a position axis: give selection='top'")
    ranked = _ranked_by(graph, scores, signed)
    kept = np.zeros(scores.shape, dtype=bool)
    frontier: list[tuple[float, int, int]] = []
    is_open = np.zeros(len(graph.readers), dtype=bool)

    def open_reader(reader: int) -> None:
        is_open[reader] = True
        for writer in range(graph.n_upstream[reader]):
            if ranked[writer, reader] > -np.inf:
                heapq.heappush(frontier, (-ranked[writer, reader], writer, reader))

    open_reader(len(graph.readers) - 1)
    for _ in range(n_edges):
        if not frontier:
            raise ValueError(f"edges={n_edges}: only {int(kept.sum())} edges with a score lead to the logits")
        _, writer, reader = heapq.heappop(frontier)
        kept[writer, reader] = True
        for feeding in np.flatnonzero(graph.feeds[:, writer] & ~is_open):
            open_reader(int(feeding))
    return kept


def top_neurons(scores: xr.DataArray, n: int) -> tuple[tuple[int, int], ...]:
    """The neurons of largest score in magnitude, as (layer, neuron): what a graph may take as nodes of their own.

    >>> scores = attribution_patching(model, task, site="mlp_post", by=("layer", "neuron"))
    >>> circuit = discover(model, task, "eap", neurons=top_neurons(scores, 20))

    Raises:
        ValueError: if scores are not [layer, neuron], or there are not so many.
    """
    if scores.dims != ("layer", "neuron"):
        raise ValueError(f"scores have the axes {', '.join(map(str, scores.dims))}; give them by=('layer', 'neuron')")
    n_scored = int(np.isfinite(scores.values).sum())
    if not 0 <= n <= n_scored:
        raise ValueError(f"n={n} is outside 0..{n_scored}, the neurons that have a score")
    order = np.argsort(-np.abs(scores.values), axis=None, kind="stable")[:n]
    layers, neurons = np.unravel_index(order, scores.shape)
    chosen = zip(scores["layer"].values[layers], scores["neuron"].values[neurons], strict=True)
    return tuple(sorted((int(layer), int(neuron)) for layer, neuron in chosen))


def without_dead_ends(graph: Graph, mask: Bool[ndarray, "*pos writer reader"]) -> Bool[ndarray, "*pos writer reader"]:
    """The edges that lie on a way from the embedding to the logits.

    A node without an edge into it, or without an edge out of it, is dropped with its edges, until none is left. With
    positions that goes for a node at each position by itself: what a key or value sees feeds its heads there and at all
    later positions, and the logits read at the last position only.
    """
    kept = mask.reshape(-1, *graph.exists.shape).copy()
    feeds, later = graph.feeds.astype(np.float32), graph.reads_for_later
    while True:
        # A reader counts if a node that it feeds writes to something; the last logits always do.
        is_used = kept.any(2).astype(np.float32) @ feeds.T > 0
        is_used[:, later] = np.maximum.accumulate(is_used[::-1, later])[::-1]
        is_used[-1, -1] = True
        reads = np.any(kept, axis=1)
        reads[:, later] = np.maximum.accumulate(reads[:, later])
        is_fed = reads.astype(np.float32) @ feeds > 0
        is_fed[:, 0] = True
        alive = kept & is_fed[:, :, None] & is_used[:, None, :]
        if alive.sum() == kept.sum():
            return alive.reshape(mask.shape)
        kept = alive


def edge_scores_of_nodes(graph: Graph, scores: Float[ndarray, " writer"]) -> Float[ndarray, "writer reader"]:
    """Edge scores that say what node scores say: an edge is as good as the worse of its two nodes.

    The best n edges are then those among the best nodes. The embedding and the logits are in every circuit. A reader
    that feeds several heads (a shared key/value head) counts as the best of them.

    Args:
        graph: the graph.
        scores: of each writer; that of the embedding is not looked at.

    Returns:
        Scores with the sign of the weaker node; NaN where a node has none, and where there is no edge.
    """
    node = np.where(np.isnan(scores), 0.0, scores)
    node[0] = np.inf
    weights = np.where(graph.feeds, np.abs(node)[None, :], -1.0)
    reader = node[weights.argmax(1)]
    reader[-1] = np.inf
    smaller = np.abs(node)[:, None] <= np.abs(reader)[None, :]
    edges = np.where(smaller, node[:, None], reader[None, :])
    largest = np.abs(edges[np.isfinite(edges)]).max(initial=0.0)
    edges = np.where(np.isinf(edges), 2 * largest, edges)  # embedding to logits: before all others
    return np.where(graph.exists, edges, np.nan)


def _ranked_by(graph: Graph, scores: Float[ndarray, "..."], signed: bool) -> Float[ndarray, "..."]:
    if scores.shape[-2:] != graph.exists.shape:
        raise ValueError(f"scores have the shape {scores.shape}; this graph's are [..., {graph.exists.shape}]")
    values = scores if signed else np.abs(scores)
    return np.where(graph.exists & ~np.isnan(scores), values, -np.inf)
