"""`discover`: a circuit from a model, a task and the name of a method."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import xarray as xr

from interp.circuits.acdc import KL, acdc
from interp.circuits.circuit import Circuit, Selection
from interp.circuits.codes import code_scores
from interp.circuits.contextual_nodes import contextual_node_scores
from interp.circuits.edge_scores import attribution_edge_scores, check_one_length, labelled_edges, secant_edge_scores
from interp.circuits.exact_edges import exact_edge_scores
from interp.circuits.graph import Graph, Neurons
from interp.circuits.learned_masks import edge_pruning_scores, subnetwork_probing_scores
from interp.circuits.node_scores import (
    attribution_node_scores,
    exact_node_scores,
    hisp_scores,
    random_node_scores,
)
from interp.circuits.selection import edge_scores_of_nodes
from interp.metrics import Metric
from interp.model import Model
from interp.patching.activation import Direction
from interp.patching.labels import provenance
from interp.tasks import Task

DEFAULT_EDGES = 200
"""Edges of a circuit if nothing else is asked for; a tenth of a small graph's."""


@dataclass(frozen=True)
class _Call:
    """What a method is told."""

    model: Model
    task: Task
    direction: Direction
    metric: str | Metric | None
    positions: bool
    neurons: Neurons
    seed: int
    batch_size: int | None
    progress: bool | None

    def run(self, method: Callable[..., xr.DataArray], *names: str) -> xr.DataArray:
        """A method with the choices that it knows."""
        return method(self.model, self.task, **{name: getattr(self, name) for name in names})


@dataclass(frozen=True)
class Method:
    """A way to score the edges or nodes of a model."""

    level: Literal["edge", "node", "search"]
    """What it scores; "search" makes its own choice of edges."""
    summary: str
    cost: str
    scores: Callable[[_Call], xr.DataArray] | None = None
    finer: bool = False
    """Whether it can tell positions apart, and neurons from the rest of their MLP."""


_ALL = ("direction", "metric", "batch_size", "progress")
_FINER = ("positions", "neurons")


def _edges(summary: str, cost: str, **choices: object) -> Method:
    """Edge scores from gradients."""

    def scores(call: _Call) -> xr.DataArray:
        return call.run(partial(attribution_edge_scores, **choices), *_ALL, *_FINER)  # type: ignore[arg-type]

    return Method("edge", summary, cost, scores, finer=True)


def _nodes(method: str) -> Callable[[_Call], xr.DataArray]:
    return lambda call: call.run(partial(attribution_node_scores, method=method), *_ALL)


def _random_edges(call: _Call) -> xr.DataArray:
    graph = Graph.of(call.model, neurons=call.neurons)
    labels = call.task.position_labels if call.positions else ()
    shape = (len(labels), *graph.exists.shape) if call.positions else graph.exists.shape
    draws = np.random.default_rng(call.seed).random(shape, dtype=np.float32)
    attrs = {**provenance(call.model, call.task), "method": "random", "seed": call.seed, "seconds": 0.0}
    return labelled_edges(graph, draws, attrs, labels)


METHODS: Mapping[str, Method] = {
    "eap": _edges("edge attribution patching", "one backward pass"),
    "eap-ig": _edges("EAP, gradients along the embeddings' path", "5 backward passes", path="inputs"),
    "eap-ig-activations": _edges(
        "EAP, gradients along the path of each layer's output",
        "5 backward passes for each attention layer and MLP",
        path="activations",
    ),
    "eap-clean-corrupted": _edges("EAP, gradients of both runs", "two backward passes", path="clean-corrupted"),
    "relp": _edges("EAP with relevance rules", "one backward pass", rules="relp"),
    "secant": Method(
        "edge",
        "secant flow: what runs along each edge",
        "one backward pass",
        lambda call: call.run(secant_edge_scores, "metric", "batch_size", "progress", *_FINER),
        finer=True,
    ),
    "exact": Method(
        "edge",
        "the exact effect of every edge",
        "a run an edge: small models only",
        lambda call: call.run(exact_edge_scores, "direction", "metric", "progress", *_FINER),
        finer=True,
    ),
    "edge-pruning": Method(
        "edge",
        "a learned gate on every edge",
        "some hundred training steps",
        lambda call: call.run(edge_pruning_scores, "seed", "batch_size", "progress"),
    ),
    "acdc": Method("search", "cut edge by edge from the logits down", "a run for each edge into the circuit"),
    "node-atp": Method("node", "attribution patching of nodes", "two backward passes", _nodes("atp")),
    "node-relp": Method("node", "relevance patching of nodes", "two backward passes", _nodes("relp")),
    "node-secant": Method("node", "secant patching of nodes", "two backward passes", _nodes("secant")),
    "node-exact": Method(
        "node", "exact effects of nodes", "a run a node", lambda call: call.run(exact_node_scores, *_ALL)
    ),
    "hisp": Method(
        "node",
        "head importance score for pruning",
        "one backward pass",
        lambda call: call.run(hisp_scores, "metric", "batch_size", "progress"),
    ),
    "subnetwork-probing": Method(
        "node",
        "a learned gate on every node",
        "some hundred training steps",
        lambda call: call.run(subnetwork_probing_scores, "seed", "batch_size", "progress"),
    ),
    "cdt": Method(
        "node",
        "contextual decomposition, grown backwards from the logits",
        "a run a node and iteration",
        lambda call: call.run(contextual_node_scores, "metric", "batch_size", "progress"),
    ),
    "codes": Method(
        "node",
        "codes of head outputs that change with the behaviour",
        "two forward passes and a small autoencoder",
        lambda call: call.run(code_scores, "seed", "batch_size", "progress"),
    ),
    "random": Method("edge", "random scores: the floor", "nothing", _random_edges, finer=True),
    "node-random": Method(
        "node", "random scores of nodes", "nothing", lambda call: random_node_scores(call.model, seed=call.seed)
    ),
}
"""Discovery methods by name."""


def discover(
    model: Model,
    task: Task,
    method: str = "relp",
    *,
    edges: int | None = None,
    nodes: int | None = None,
    threshold: float | None = None,
    selection: Selection = "top",
    signed: bool = False,
    prune: bool = True,
    direction: Direction = "noise",
    metric: str | Metric | None = None,
    positions: bool = False,
    neurons: Neurons = (),
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> Circuit:
    """Find the circuit of a behaviour.

    >>> circuit = discover(model, task, "eap-ig", edges=200)

    Args:
        model: a model whose stream is a sum of what is written.
        task: clean and corrupted prompts with answers.
        method: a name in `METHODS`.
        edges: edges to keep, before dead ends are dropped; 200 (or a tenth of a small graph) by default. A method that
            scores nodes keeps edges between its best nodes.
        nodes: for methods that score nodes: keep all edges among so many of the best (heads and MLPs).
        threshold: keep edges of this score or more instead; for "acdc", how much worse a removal may make things
            (0.01 by default, nats unless a metric is named).
        selection: "top" or "greedy": see `Circuit.select`.
        signed: rank by signed scores instead of magnitudes.
        prune: drop edges that are on no way from the embedding to the logits.
        direction: "noise" asks what breaks when an edge is corrupted, "denoise" what it restores. Methods that have no
            direction ignore it.
        metric: as in `activation_patching`; learned masks always take the divergence from the model's prediction, and
            "acdc" does so unless a metric is named.
        positions: tell positions apart: an edge is kept at some positions and cut at others. For prompts of one length
            in which every position means the same; those that score edges in one go can (`METHODS`: `finer`).
        neurons: (layer, neuron) of neurons that are to be nodes of their own, beside the rest of their MLP; the same
            methods can. `top_neurons` chooses them.
        seed: of methods that draw numbers.
        batch_size: prompts a pass.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        The circuit, with the scores of all edges: `select` makes others of them, `evaluate` evaluates them.

    Raises:
        ValueError: for an unknown method, or choices that it does not have.
        SiteUnavailable: for a model whose stream is normed after every addition.
    """
    found = METHODS[method_named(method)]
    neurons = tuple(neurons)
    check_choices(
        method,
        edges=edges,
        nodes=nodes,
        threshold=threshold,
        selection=selection,
        positions=positions,
        neurons=bool(neurons),
    )
    if positions:
        check_one_length(task)
    if found.level == "search":
        threshold = 0.01 if threshold is None else threshold
        return acdc(model, task, threshold=threshold, metric=metric or KL, progress=progress)
    graph = Graph.of(model, neurons=neurons)
    assert found.scores is not None
    scores = found.scores(_Call(model, task, direction, metric, positions, neurons, seed, batch_size, progress))
    values, attrs = scores.values.astype(np.float32), {**provenance(model, task), **scores.attrs}
    if found.level == "node":
        if nodes is not None:
            threshold = _of_best_nodes(values, nodes)
        values = edge_scores_of_nodes(graph, values)
    attrs |= {"method": method, "level": found.level}
    if positions:
        attrs["position_labels"] = list(task.position_labels)
    circuit = Circuit(graph, values, np.zeros(values.shape, dtype=bool), attrs)
    if threshold is None and edges is None:
        edges = min(DEFAULT_EDGES, int(np.broadcast_to(graph.exists, values.shape).sum()) // 10)
    return circuit.select(edges=edges, threshold=threshold, selection=selection, signed=signed, prune=prune)


def check_choices(
    method: str,
    *,
    edges: int | None = None,
    nodes: int | None = None,
    threshold: float | None = None,
    selection: str = "top",
    positions: bool = False,
    neurons: bool = False,
) -> None:
    """Raise a ValueError for arguments of `discover` that do not go together; needs no model."""
    found = METHODS[method_named(method)]
    sizes = {"edges": edges, "nodes": nodes, "threshold": threshold}
    given = [name for name, value in sizes.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"give one of {', '.join(given)}")
    if nodes is not None and found.level != "node":
        raise ValueError(f"nodes= is for methods that score nodes; {method!r} scores edges: give edges= or threshold=")
    if found.level == "search" and given and given != ["threshold"]:
        raise ValueError(f"{method!r} chooses edges by threshold=, not {given[0]}=")
    asked = "positions=True" if positions else "neurons=" if neurons else ""
    if asked and not found.finer:
        able = ", ".join(name for name, one in METHODS.items() if one.finer)
        raise ValueError(f"{asked} is nothing that {method!r} can do; methods that can: {able}")
    if positions and selection == "greedy":
        raise ValueError("greedy selection is for scores without a position axis: give selection='top'")


def _of_best_nodes(scores: np.ndarray, n_nodes: int) -> float:
    ranked = np.sort(np.abs(np.nan_to_num(scores[1:])))[::-1]
    if not 1 <= n_nodes <= len(ranked):
        raise ValueError(f"nodes={n_nodes} is outside 1..{len(ranked)}, the heads and MLPs of this model")
    return float(ranked[n_nodes - 1])


def method_named(name: str) -> str:
    """The name, if there is such a method.

    Raises:
        ValueError: if not; near names are offered.
    """
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name!r} is not a discovery method{hint} (methods: {', '.join(METHODS)})")
    return name
