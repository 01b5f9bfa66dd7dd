"""Scores of the nodes of a model, from which circuits of nodes are cut: estimated, exact, HISP, and random.

Nodes are the writers of the residual stream (`interp.patching.edges`): "embed", heads ("L9H6") and MLPs ("mlp9"). A
score is of the whole output of a node, at all positions together.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from interp.circuits.graph import Graph
from interp.metrics import Metric
from interp.model import Model, Site
from interp.patching.activation import Ablation, Direction, activation_patching
from interp.patching.batching import batches
from interp.patching.estimate import Pair, reduced, request, run_pair, widened
from interp.patching.labels import model_provenance, provenance
from interp.patching.methods import estimates
from interp.patching.progress import progress_bar
from interp.tasks import Task

QKV = ("q", "k", "v")


def node_array(names: Sequence[str], scores: Mapping[str, float], attrs: Mapping[str, Any]) -> xr.DataArray:
    """Scores by node as a labelled array; NaN for nodes without one."""
    values = np.array([scores.get(name, np.nan) for name in names], dtype=np.float32)
    return xr.DataArray(values, dims=("node",), coords={"node": list(names)}, name="score", attrs=dict(attrs))


def head_and_mlp_scores(
    heads: Float[np.ndarray, "layer head"], mlps: Float[np.ndarray, " layer"] | None = None
) -> dict[str, float]:
    """Scores by node name from arrays over all layers."""
    scores = {f"L{layer}H{head}": float(score) for (layer, head), score in np.ndenumerate(heads)}
    if mlps is not None:
        scores |= {f"mlp{layer}": float(score) for layer, score in enumerate(mlps)}
    return scores


def attribution_node_scores(
    model: Model,
    task: Task,
    *,
    method: str = "relp",
    direction: Direction = "noise",
    metric: str | Metric | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> xr.DataArray:
    """Estimated effects of patching each node, as shares of the metric's gap between clean and corrupted runs.

    Costs the estimate's passes twice: once for all heads, once for the embedding and all MLPs, which have no head axis.

    Args:
        model: a decoder.
        task: clean and corrupted prompts with answers.
        method: a name in `interp.patching.METHODS`, with its default options.
        direction: as in `activation_patching`.
        metric: as in `activation_patching`, with a gradient.
        batch_size: prompts a pass; by default about a thousand tokens' worth.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        Scores over `node`; positive = supports the behaviour, unless the attr `unsigned` is 1.

    Raises:
        ValueError: for an unknown method, and as the method.
    """
    started = time.perf_counter()
    graph = Graph.of(model)

    def found(sites: Sequence[str], by: Sequence[Literal["layer", "head"]]) -> dict[str, xr.DataArray]:
        return estimates(
            model,
            task,
            sites=sites,
            method=method,
            by=by,
            direction=direction,
            metric=metric,
            batch_size=batch_size,
            progress=progress,
        )

    heads = found(["z"], ("layer", "head"))["z"]
    streams = {"embed": Site("embed"), **{f"mlp{layer}": Site("mlp_out", layer) for layer in range(model.n_layers)}}
    others = found(list(streams.values()), ())
    scores = {name: float(others[site]) for name, site in streams.items()} | head_and_mlp_scores(heads.values)
    attrs = {key: value for key, value in heads.attrs.items() if key not in ("site", "completeness_gap")}
    attrs |= {"method": method, "estimate": heads.attrs["method"], "seconds": time.perf_counter() - started}
    return node_array(graph.writers, scores, attrs)


def exact_node_scores(
    model: Model,
    task: Task,
    *,
    direction: Direction = "noise",
    ablation: Ablation = "resample",
    metric: str | Metric | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> xr.DataArray:
    """Exact effects of patching each node, as shares of the metric's gap between clean and corrupted runs.

    Costs one run a node and prompt, less what the sweep engine saves.

    Args:
        model: a decoder.
        task: clean and corrupted prompts with answers.
        direction: as in `activation_patching`.
        ablation: as in `activation_patching`.
        metric: as in `activation_patching`.
        batch_size: prompts or variants at once; by default what memory allows.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        Scores over `node`; positive = supports the behaviour.

    Raises:
        ValueError: as `activation_patching`.
    """
    started = time.perf_counter()
    graph = Graph.of(model)

    def found(site: str, by: Sequence[Literal["layer", "head"]]) -> xr.DataArray:
        return activation_patching(
            model,
            task,
            site=site,
            by=by,
            direction=direction,
            ablation=ablation,
            metric=metric,
            batch_size=batch_size,
            progress=progress,
        )

    heads, mlps, embed = found("z", ("layer", "head")), found("mlp_out", ("layer",)), found("embed", ())
    scores = {"embed": float(embed)} | head_and_mlp_scores(heads.values, mlps.values)
    attrs = {key: value for key, value in heads.attrs.items() if key != "site"}
    return node_array(graph.writers, scores, attrs | {"seconds": time.perf_counter() - started})


def hisp_scores(
    model: Model,
    task: Task,
    *,
    ablation: Literal["resample", "zero"] = "resample",
    metric: str | Metric | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> xr.DataArray:
    """HISP, head importance score for pruning, as ACDC was compared with: a published baseline.

    A gate ξ scales each query, key, value and MLP output a of the clean run between its replacement a′ (ξ = 0) and
    itself (ξ = 1). The score is Σ over prompts of |∂m/∂ξ| = |Σ over positions and features of (a − a′)·∂m/∂a|, divided
    by the norm of all scores of the layer. A head gets the largest of its query's, key's and value's: pruned in
    ascending order, it is there as long as one of them is. Query heads that share a key and value share their scores.

    Costs a forward pass of both runs and a backward pass.

    Args:
        model: a decoder.
        task: clean and corrupted prompts with answers.
        ablation: what a′ is: the corrupted run's activation, as in the paper's formula, or "zero": what ACDC's code
            computes, in its experiments with corrupted activations too.
        metric: as in `activation_patching`, with a gradient.
        batch_size: prompts a pass; by default about a thousand tokens' worth.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        Scores over `node`, unsigned; NaN for the embedding.

    Raises:
        ValueError: for an unknown ablation, and as `attribution_patching`.
        FloatingPointError: if a score is NaN or infinite.

    Source: Conmy et al. 2023 (arXiv 2304.14997), after Michel et al. 2019 (arXiv 1905.10650). Checked against finite
    differences of real gates in tests/circuits/test_node_scores.py.
    """
    started = time.perf_counter()
    graph = Graph.of(model)
    if ablation not in ("resample", "zero"):
        raise ValueError(f"ablation={ablation!r}; it is one of resample, zero")
    sites = [Site(kind, layer) for layer in range(model.n_layers) for kind in (*QKV, "mlp_out")]
    asked = request(
        model,
        task,
        sites=[*QKV, "mlp_out"],
        by=(),
        direction="noise",
        metric=metric,
        normalised=False,
        per_prompt=False,
        batch_size=batch_size,
        progress=progress,
    )
    totals: dict[Site, Tensor] = {}
    with progress_bar(len(task), "HISP", "prompt", progress=progress) as bar:
        for group in task.by_length():
            for rows in batches(len(group), len(group.clean_ids[0]), batch_size):
                pair = run_pair(asked, group[rows], sites)
                for site in sites:
                    gates = reduced(_gate_product(pair, site, ablation), site, ("head",))
                    totals[site] = totals.get(site, torch.zeros(())) + gates.abs().sum(0).cpu()
                bar.update(len(group[rows]))
    attrs = {
        **provenance(model, task),
        "method": "hisp",
        "direction": "noise",
        "ablation": ablation,
        "metric": asked.metric_name,
        "unsigned": 1,
        "seconds": time.perf_counter() - started,
    }
    return node_array(graph.writers, _normalised_by_layer(model, totals), attrs)


def _gate_product(pair: Pair, site: Site, ablation: str) -> Tensor:
    """(a − a′)·∂m/∂a, element by element."""
    if ablation == "zero":
        return widened(pair.base[site]) * widened(pair.gradient[site])
    return pair.first_order(site)


def _normalised_by_layer(model: Model, totals: Mapping[Site, Tensor]) -> dict[str, float]:
    """Scores of heads and MLPs from those of queries, keys, values and MLP outputs.

    Raises:
        FloatingPointError: if a score is NaN or infinite.
    """
    scores = {}
    for layer in range(model.n_layers):
        kinds = {kind: totals[Site(kind, layer)].reshape(-1) for kind in (*QKV, "mlp_out")}
        norm = torch.cat(list(kinds.values())).norm()
        if not bool(norm.isfinite()):
            raise FloatingPointError(f"HISP: scores of layer {layer} are NaN or infinite: check metric, weights, dtype")
        by_head = [kinds[kind].repeat_interleave(model.n_heads // len(kinds[kind])) for kind in QKV]
        # A layer without any effect has norm 0, and its scores stay 0.
        size = norm if norm > 0 else torch.ones(())
        for head, score in enumerate((torch.stack(by_head).amax(0) / size).tolist()):
            scores[f"L{layer}H{head}"] = score
        scores[f"mlp{layer}"] = float(kinds["mlp_out"] / size)
    return scores


def random_node_scores(model: Model, *, seed: int = 0) -> xr.DataArray:
    """Uniform random scores of all nodes: the floor that any method must beat."""
    names = Graph.of(model).writers
    draws = np.random.default_rng(seed).random(len(names))
    attrs = {**model_provenance(model), "method": "random", "seed": seed, "unsigned": 1, "seconds": 0.0}
    return node_array(names, dict(zip(names, draws.tolist(), strict=True)), attrs)
