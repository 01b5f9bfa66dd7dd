"""Circuits of several tasks compared: what they share, and whether one does the other's work.

1. `overlap` and `top_share_overlap`: nodes and edges in common, against chance.
2. `transfer`: faithfulness of one task's circuit on another task.

`interp.circuits.staged` finds the heads of each task by the source's own protocol; `interp.circuits.steering` makes one
task's circuit behave like another's.

Source: Merullo, Eickhoff & Pavlick 2024, Circuit component reuse (arXiv 2310.08744).
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float
from numpy import ndarray
from scipy.stats import hypergeom, spearmanr

from interp.circuits.circuit import Circuit
from interp.circuits.evaluate import Ablation, measured
from interp.circuits.graph import Graph
from interp.metrics import Metric
from interp.model import Model
from interp.patching.labels import model_provenance
from interp.patching.progress import progress_bar
from interp.tasks import Task

SHARES = (0.01, 0.02, 0.05, 0.1)
"""Shares of all components at which the source compares tasks."""

SIZES = ("n_layers", "n_heads", "n_kv_heads", "parallel")
"""What a graph has of its model; which neurons write by themselves is chosen."""

Members = Bool[ndarray, " member"]


# What circuits share


def overlap(circuits: Mapping[str, Circuit]) -> xr.Dataset:
    """What each pair of circuits has in common.

    Nodes are all writers but the embedding, which is in every circuit as the logits are. With A the first and B the
    second:

    * `node_jaccard`, `edge_jaccard`: |A ∩ B| / |A ∪ B|;
    * `node_share`, `edge_share`: |A ∩ B| / |A|;
    * `node_p`, `edge_p`: the chance that sets of these sizes, drawn at random, have as much in common or more
      (hypergeometric);
    * `weighted_edge_overlap`: Σ_e min(a_e, b_e), where a_e is |score| of an edge of A as a share of the sum over A's
      edges, and 0 outside A; 1 where both weight the same edges alike, 0 where they have none in common;
    * `score_spearman`: rank correlation of the signed scores of all edges that both circuits score, kept or not.

    NaN where it is undefined: a circuit is empty, or scores do not vary. Positions are summed.

    Args:
        circuits: by task; all of one graph.

    Returns:
        Dataset over [first, second], with the number of nodes and edges of each circuit.

    Raises:
        ValueError: for fewer than two circuits, or circuits of different graphs.
    """
    graph = _common_graph(circuits)
    nodes = [np.isin(graph.writers[1:], circuit.nodes) for circuit in circuits.values()]
    edges = [circuit.flat_mask[graph.exists] for circuit in circuits.values()]
    scores = [_flat_scores(circuit)[graph.exists] for circuit in circuits.values()]
    weights = [_as_shares(score, mask) for score, mask in zip(scores, edges, strict=True)]
    found = {
        "node_jaccard": _pairs(nodes, _jaccard),
        "edge_jaccard": _pairs(edges, _jaccard),
        "node_share": _pairs(nodes, _share),
        "edge_share": _pairs(edges, _share),
        "node_p": _pairs(nodes, _chance),
        "edge_p": _pairs(edges, _chance),
        "weighted_edge_overlap": _pairs(weights, lambda one, other: float(np.minimum(one, other).sum())),
        "score_spearman": _pairs(scores, _spearman),
    }
    counts = {"n_nodes": [int(one.sum()) for one in nodes], "n_edges": [int(one.sum()) for one in edges]}
    pairs = _by_pair(found, list(circuits)).assign_coords({name: ("first", values) for name, values in counts.items()})
    return pairs.assign_attrs({"method": "overlap", "graph": str(graph)})


def top_share_overlap(
    scores: Mapping[str, xr.DataArray], *, shares: Sequence[float] = SHARES, signed: bool = False
) -> xr.Dataset:
    """What the best components of each pair of tasks have in common, at several shares of all components.

    Args:
        scores: by task: scores of the same components (nodes, [layer, head], or edges). Those that are NaN in any task
            are left out everywhere.
        shares: how large a share of all components is taken; at least one component.
        signed: rank by signed scores instead of magnitudes.

    Returns:
        Dataset over [share, first, second]: `jaccard`, `share_of_first` (|A ∩ B| / |A|), `p_value` (hypergeometric);
        coordinates `n_top` and `chance_jaccard`, the Jaccard of sets with the expected overlap of random ones.

    Raises:
        ValueError: for fewer than two tasks, components that differ between tasks, or no shares or ones outside 0..1.
    """
    if len(scores) < 2:
        raise ValueError("scores of one task: an overlap takes two or more")
    first, *others = scores.values()
    for name, one in list(scores.items())[1:]:
        if one.dims != first.dims or any(not one[dim].equals(first[dim]) for dim in first.dims):
            raise ValueError(f"the scores of {name!r} are of other components than those of {next(iter(scores))!r}")
    if not shares or any(not 0 < share <= 1 for share in shares):
        raise ValueError(f"shares={list(shares)}; give at least one, above 0 and at most 1")
    values = np.stack([one.values.ravel() for one in (first, *others)])
    values = values[:, ~np.isnan(values).any(0)]
    n_components = values.shape[1]
    if not n_components:
        raise ValueError("no component has a score in every task")
    order = np.argsort(-(values if signed else np.abs(values)), axis=1, kind="stable")
    counts = [max(1, round(share * n_components)) for share in shares]
    measures: dict[str, Callable[[Members, Members], float]] = {
        "jaccard": _jaccard,
        "share_of_first": _share,
        "p_value": _chance,
    }
    by_share = []
    for count in counts:
        tops = [np.isin(np.arange(n_components), row[:count]) for row in order]
        by_share.append(_by_pair({name: _pairs(tops, measure) for name, measure in measures.items()}, list(scores)))
    expected = np.array([count / n_components for count in counts])
    coords = {"n_top": ("share", counts), "chance_jaccard": ("share", expected / (2 - expected))}
    joined = xr.concat(by_share, xr.Variable("share", list(shares)))
    attrs = {"method": "top_share_overlap", "n_components": n_components, "signed": int(signed)}
    return joined.assign_coords(coords).assign_attrs(attrs)


def _common_graph(circuits: Mapping[str, Circuit]) -> Graph:
    if len(circuits) < 2:
        raise ValueError("one circuit: an overlap takes two or more")
    graphs = {name: circuit.graph for name, circuit in circuits.items()}
    first, graph = next(iter(graphs.items()))
    for name, other in graphs.items():
        if other != graph:
            raise ValueError(f"circuits {first!r} ({graph}) and {name!r} ({other}) are of different graphs")
    return graph


def _flat_scores(circuit: Circuit) -> Float[ndarray, "writer reader"]:
    """Scores summed over positions; NaN where no position has one."""
    if not circuit.has_positions:
        return circuit.scores
    return np.where(np.isnan(circuit.scores).all(0), np.nan, np.nansum(circuit.scores, axis=0))


def _as_shares(scores: Float[ndarray, " edge"], mask: Bool[ndarray, " edge"]) -> Float[ndarray, " edge"]:
    magnitude = np.where(mask, np.nan_to_num(np.abs(scores.astype(np.float64))), 0.0)
    total = magnitude.sum()
    return magnitude / total if total else np.full_like(magnitude, np.nan)


def _pairs(values: Sequence[ndarray], measure: Callable[[Any, Any], float]) -> Float[ndarray, "first second"]:
    return np.array([[measure(one, other) for other in values] for one in values], dtype=np.float64)


def _by_pair(found: Mapping[str, Float[ndarray, "first second"]], names: list[str]) -> xr.Dataset:
    data = {name: (("first", "second"), values) for name, values in found.items()}
    return xr.Dataset(data, coords={"first": names, "second": names})


def _jaccard(one: Members, other: Members) -> float:
    union = int((one | other).sum())
    return int((one & other).sum()) / union if union else np.nan


def _share(one: Members, other: Members) -> float:
    return int((one & other).sum()) / int(one.sum()) if one.any() else np.nan


def _chance(one: Members, other: Members) -> float:
    """The chance of an overlap as large or larger between random sets of these sizes."""
    if not one.any() or not other.any():
        return np.nan
    return float(hypergeom.sf((one & other).sum() - 1, len(one), one.sum(), other.sum()))


def _spearman(one: Float[ndarray, " edge"], other: Float[ndarray, " edge"]) -> float:
    both = np.isfinite(one) & np.isfinite(other)
    if both.sum() < 2 or np.ptp(one[both]) == 0 or np.ptp(other[both]) == 0:
        return np.nan
    return float(spearmanr(one[both], other[both]).statistic)


# One circuit on another task


def transfer(
    model: Model,
    tasks: Mapping[str, Task],
    circuits: Mapping[str, Circuit],
    *,
    ablation: Ablation = "resample",
    metric: str | Metric | None = None,
    progress: bool | None = None,
) -> xr.DataArray:
    """Faithfulness of each circuit on each task: what share of the task's behaviour the circuit alone carries.

    Everything outside the circuit is ablated, as in `evaluate`; each task is measured by its own metric
    unless one is given. Costs about two forward passes for each circuit and prompt; the whole model and the empty
    circuit are run besides.

    Args:
        model: the model.
        tasks: by name.
        circuits: by name; their masks are run.
        ablation: what edges outside a circuit carry.
        metric: as in `activation_patching`.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        DataArray over [circuit, task], with `n_edges` of each circuit and, for each task, `metric`, `metric_model` and
        `metric_empty` (of the whole model and of no edge at all).

    Raises:
        ValueError: without tasks or circuits, for circuits of another graph than the model's, or with positions, which
            mean something else on another task.
    """
    started = time.perf_counter()
    if not tasks or not circuits:
        raise ValueError("transfer takes at least one task and one circuit")
    _check_circuits(model, circuits)
    graph = next(iter(circuits.values())).graph
    masks = [circuit.mask for circuit in circuits.values()]
    columns, said = [], defaultdict(list)
    with progress_bar(len(tasks), "transfer", "task", progress=progress) as bar:
        for task in tasks.values():
            values, attrs = measured(model, task, graph, masks, ablation=ablation, metric=metric, progress=progress)
            columns.append(values["faithfulness"].mean(1).numpy())
            for name in ("metric", "metric_model", "metric_empty"):
                said[name].append(attrs[name])
            bar.update()
    return xr.DataArray(
        np.stack(columns, axis=1),
        dims=("circuit", "task"),
        coords={
            "circuit": list(circuits),
            "task": list(tasks),
            "n_edges": ("circuit", [circuit.n_edges for circuit in circuits.values()]),
            **{name: ("task", values) for name, values in said.items()},
        },
        name="faithfulness",
        attrs={
            **model_provenance(model),
            "method": "transfer",
            "ablation": ablation,
            "seconds": time.perf_counter() - started,
        },
    )


def _check_circuits(model: Model, circuits: Mapping[str, Circuit]) -> None:
    own, (first, *_) = Graph.of(model), (circuit.graph for circuit in circuits.values())
    for name, circuit in circuits.items():
        graph = circuit.graph
        if any(getattr(graph, size) != getattr(own, size) for size in SIZES):
            raise ValueError(f"circuit {name!r} ({graph}) is of another graph than the model ({own})")
        if graph != first:
            raise ValueError(f"circuit {name!r} ({graph}) is of another graph than the first ({first})")
        if circuit.has_positions:
            raise ValueError(f"circuit {name!r} has positions, which mean nothing on another task")
