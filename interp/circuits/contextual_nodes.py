"""CD-T circuits of nodes: grown backward from the logits by contextual decomposition.

1. Every head and MLP is a source: its relevance to the logits is the estimated effect of taking it away on the metric.
2. The sources of the highest percentile are the first part of the circuit.
3. They become the targets: the relevance of every source before them is the share of their activations that is due to
   it. The highest percentile joins the circuit, and so on.

A node's score is its best percentile rank in any iteration, so that the nodes with score above p are those that are
among the highest 1 − p somewhere. The paper then prunes greedily by runs of the circuit, which is left to evaluation.

Source: Hsu et al., ICLR 2025 (arXiv 2407.00886), Algorithm 1.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from scipy import stats
from torch import Tensor

from interp.circuits.graph import Graph
from interp.circuits.node_scores import head_and_mlp_scores, node_array
from interp.metrics import Metric
from interp.model import Model, Site
from interp.patching.batching import batches, mean_activations
from interp.patching.contextual import Node, contextual_decomposition, contextual_patching
from interp.patching.edges import Writer
from interp.patching.estimate import widened
from interp.patching.progress import progress_bar
from interp.tasks import Task

FLOATS_HELD = 64_000_000
"""Parts of targets held at once (256 MB)."""


def contextual_node_scores(
    model: Model,
    task: Task,
    *,
    n_iterations: int = 3,
    percentile: float = 95.0,
    by_layer: bool = True,
    ablation: Literal["resample", "mean"] = "resample",
    metric: str | Metric | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> xr.DataArray:
    """Score of each head and MLP by CD-T, on the clean prompts.

    Costs one forward pass a node and prompt for each iteration (from the node's layer on), without gradients. Few
    prompts are enough: the paper takes 25 and fewer.

    Args:
        model: a decoder whose attention goes through transformers' interface, without experts.
        task: clean and corrupted prompts with answers.
        n_iterations: 1: relevance to the logits alone; each further one goes back from the nodes found last. Ends
            early when nothing is before them.
        percentile: nodes above this percentile of relevance join the circuit (the paper: 90 to 99), and those in the
            first place in any case.
        by_layer: divide relevance by its mean magnitude over the layer, as the paper does.
        ablation: what of a source is not relevant: the activation of the corrupted run, or the mean over prompts and
            positions of the clean runs.
        metric: as in `contextual_patching`.
        batch_size: rows (sources times prompts) a forward pass; by default about a thousand tokens' worth.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        Scores over `node` between 0 and 1, unsigned; NaN for the embedding. Coordinates: `effect`, the estimated effect
        of the first iteration as a share of the metric's gap (positive = supports the behaviour); `iteration`, the
        first in which the node joined the circuit, 0 if it did not.

    Raises:
        ValueError: for a choice out of range, and as `contextual_patching`.
        NotImplementedError: for models that no rules are known for.
    """
    started = time.perf_counter()
    if n_iterations < 1:
        raise ValueError(f"n_iterations={n_iterations}; it is 1 or more")
    if not 0 <= percentile < 100:
        raise ValueError(f"percentile={percentile}; it is at least 0 and below 100")
    if ablation not in ("resample", "mean"):
        raise ValueError(f"ablation={ablation!r}; it is one of resample, mean")
    graph = Graph.of(model)
    effects = _effects(model, task, graph, ablation, metric, batch_size, progress)
    relevance, layers = np.abs(effects.values[1:]), graph.writer_layer[1:]
    best, iteration = np.zeros(len(layers)), np.zeros(len(layers), dtype=int)
    for step in range(1, n_iterations + 1):
        ranks = percentile_ranks(normalised_by_layer(relevance, layers) if by_layer else relevance)
        best = np.fmax(best, ranks)
        # Several nodes that share the first place have a lower rank than one that has it alone.
        joined = ((ranks > percentile / 100) | (ranks == np.nanmax(ranks))) & (relevance > 0)
        iteration[joined & (iteration == 0)] = step
        targets = [name for name, one in zip(graph.writers[1:], joined, strict=True) if one]
        if step == n_iterations or not upstream_of(graph, targets).any():
            break
        relevance = node_relevance(
            model, task, targets, ablation=ablation, batch_size=batch_size, progress=progress
        ).values[1:]
    attrs = {
        **effects.attrs,
        "method": "contextual",
        "n_iterations": n_iterations,
        "percentile": percentile,
        "by_layer": int(by_layer),
        "unsigned": 1,
        "seconds": time.perf_counter() - started,
    }
    found = node_array(graph.writers, dict(zip(graph.writers[1:], best.tolist(), strict=True)), attrs)
    return found.assign_coords(effect=("node", effects.values), iteration=("node", [0, *iteration.tolist()]))


def node_relevance(
    model: Model,
    task: Task,
    targets: Sequence[str],
    *,
    ablation: Literal["resample", "mean"] = "resample",
    batch_size: int | None = None,
    progress: bool | None = None,
) -> xr.DataArray:
    """Relevance of every head and MLP to other nodes: Σ over targets of the share of their output that is due to it.

    A share is Σ |relevant part| / (Σ |relevant part| + Σ |irrelevant part|), over positions and features of the
    target's output (z for a head), meaned over prompts. The paper divides by the irrelevant part alone; its code does
    as here, which has no pole.

    Args:
        model: as in `contextual_node_scores`.
        task: whose clean prompts are decomposed.
        targets: names of heads and MLPs.
        ablation: as in `contextual_node_scores`.
        batch_size: as in `contextual_node_scores`.
        progress: as in `contextual_node_scores`.

    Returns:
        Shares over `node`; NaN for nodes that are upstream of no target, and the embedding.
    """
    graph = Graph.of(model)
    upstream = upstream_of(graph, targets)
    sources = np.flatnonzero(upstream.any(1))
    total = np.zeros(len(graph.writers))
    groups = task.by_length()
    sites = _source_sites(model)
    means: dict[str, Tensor] = {}
    if ablation == "mean":
        means.update(mean_activations(model, groups, sites, batch_size=batch_size).items())
    with progress_bar(len(sources) * len(task), "relevance to nodes", "source", progress=progress) as bar:
        for group in groups:
            for rows in batches(len(group), len(group.clean_ids[0]), batch_size):
                prompts = group[rows]
                reference = means
                if ablation == "resample":
                    reference = dict(model.run_with_cache(prompts.corrupted, sites, logits_to_keep=1)[1])
                step = _sources_at_once(model, prompts, targets)
                for first in range(0, len(sources), step):
                    chosen = sources[first : first + step]
                    shares = _shares(
                        model, prompts, [graph.writers[one] for one in chosen], targets, reference, batch_size
                    )
                    total[chosen] += (shares * upstream[chosen, :, None]).sum((1, 2))
                    bar.update(len(chosen) * len(prompts))
    total[~upstream.any(1)] = np.nan
    return node_array(graph.writers, dict(zip(graph.writers, (total / len(task)).tolist(), strict=True)), {})


def upstream_of(graph: Graph, targets: Sequence[str]) -> Bool[ndarray, "writer target"]:
    """Which heads and MLPs are upstream of which targets."""
    places = [graph.writer_index[target] for target in targets]
    n_before = graph.feeds[:, places] * graph.n_upstream[:, None]
    found = np.arange(len(graph.writers))[:, None] < n_before.max(0, initial=0)[None, :]
    found[0] = False
    return found


def percentile_ranks(values: Float[ndarray, " node"]) -> Float[ndarray, " node"]:
    """Share of values that are no larger, ties halved: up to 1; NaN stays NaN and does not count."""
    ranks: ndarray = stats.rankdata(values, nan_policy="omit")
    return ranks / max(1, int(np.isfinite(values).sum()))


def normalised_by_layer(values: Float[ndarray, " node"], layers: Int[ndarray, " node"]) -> Float[ndarray, " node"]:
    """Values over the mean magnitude in their layer; 0 where the whole layer is 0."""
    result = values.copy()
    for layer in np.unique(layers):
        inside = values[layers == layer]
        size = np.abs(inside[np.isfinite(inside)]).sum() / max(1, int(np.isfinite(inside).sum()))
        result[layers == layer] = inside / (size or 1.0)
    return result


def _effects(
    model: Model,
    task: Task,
    graph: Graph,
    ablation: Literal["resample", "mean"],
    metric: str | Metric | None,
    batch_size: int | None,
    progress: bool | None,
) -> xr.DataArray:
    """Estimated effects of taking away each head and MLP."""

    def found(site: str, by: Sequence[Literal["layer", "head"]]) -> xr.DataArray:
        return contextual_patching(
            model,
            task,
            site=site,
            by=by,
            direction="noise",
            ablation=ablation,
            metric=metric,
            batch_size=batch_size,
            progress=progress,
        )

    heads, mlps = found("z", ("layer", "head")), found("mlp_out", ("layer",))
    attrs = {key: value for key, value in heads.attrs.items() if key != "site"}
    return node_array(graph.writers, head_and_mlp_scores(heads.values, mlps.values), attrs)


def _source_sites(model: Model) -> list[Site]:
    return [Site(kind, layer) for layer in range(model.n_layers) for kind in ("z", "mlp_out")]


def _sources_at_once(model: Model, prompts: Task, targets: Sequence[str]) -> int:
    """As many sources as keep their parts of the targets within `FLOATS_HELD`."""
    sites = {Writer.parse(target).site for target in targets}
    width = sum(model.n_heads * model.d_head if site.kind == "z" else model.d_model for site in sites)
    return max(1, FLOATS_HELD // (width * len(prompts) * len(prompts.clean_ids[0])))


def _shares(
    model: Model,
    prompts: Task,
    sources: Sequence[str],
    targets: Sequence[str],
    reference: Mapping[str, Tensor],
    batch_size: int | None,
) -> Float[ndarray, "source target prompt"]:
    """Share of each target's output that is due to each source."""
    nodes = [Node(writer.site, head=writer.head) for writer in map(Writer.parse, sources)]
    wanted = [Writer.parse(target) for target in targets]
    parts = contextual_decomposition(
        model,
        prompts.clean,
        nodes,
        targets=list(dict.fromkeys(writer.site for writer in wanted)),
        reference=reference,
        batch_size=batch_size,
        progress=False,
    )
    columns = []
    for writer in wanted:
        sizes = [
            widened(part if writer.head is None else part[..., writer.head, :]).abs().flatten(2).sum(2)
            for part in (parts.relevant[writer.site], parts.irrelevant(writer.site))
        ]
        # Nothing of a target that is 0 altogether is due to anything.
        share = sizes[0] / (sizes[0] + sizes[1]).clamp(min=torch.finfo(sizes[0].dtype).tiny)
        columns.append(share)
    return torch.stack(columns, dim=1).cpu().numpy()
