"""The exact effect of every edge, one run an edge; what edge scores are held against on small models."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from interp.circuits.edge_scores import check_one_length, labelled_edges
from interp.circuits.graph import Graph, Neurons
from interp.circuits.split_run import Reference, SplitRun
from interp.circuits.writers import HeadOutputs, writer_outputs
from interp.metrics import Metric
from interp.model import Model
from interp.patching.activation import Direction, resolve_metric
from interp.patching.batching import batches
from interp.patching.labels import provenance
from interp.patching.progress import progress_bar
from interp.tasks import Task

VARIANT_BYTES = 2**29
"""Writers' outputs of the runs of one pass."""


@torch.no_grad()
def exact_edge_scores(
    model: Model,
    task: Task,
    *,
    direction: Direction = "noise",
    metric: str | Metric | None = None,
    positions: bool = False,
    neurons: Neurons = (),
    progress: bool | None = None,
) -> xr.DataArray:
    """What each edge does by itself: it carries the other run, everything after it is recomputed.

    Costs a run an edge (and position) and prompt, from the reader's layer on: minutes for thousands of edges, hours for
    a whole model.

    Args:
        model: a model whose stream is a sum of what is written.
        task: clean and corrupted prompts with answers.
        direction: "noise": clean run, the edge carries the corrupted one; "denoise": the other way round.
        metric: as in `activation_patching`.
        positions: as in `attribution_edge_scores`.
        neurons: as in `attribution_edge_scores`.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        [writer, reader], or [position, writer, reader], shares of the gap; NaN where there is no edge.

    Raises:
        ValueError: if the metric is the same for clean and corrupted prompts; for prompts of several lengths with
            positions, or neurons that have no part of the stream.
    """
    if direction not in ("denoise", "noise"):
        raise ValueError(f"direction={direction!r}; it is one of denoise, noise")
    if positions:
        check_one_length(task)
    started = time.perf_counter()
    name, metric_fn = resolve_metric(metric, task)
    graph, heads = Graph.of(model, neurons=neurons), HeadOutputs(model)
    n_positions = len(task.clean_ids[0]) if positions else 1
    totals = np.zeros((n_positions, *graph.exists.shape))
    metrics: list[tuple[float, float]] = []
    with progress_bar(n_positions * graph.n_edges * len(task), "edges", "run", progress=progress) as bar:
        for group in task.by_length():
            for rows in batches(len(group), len(group.clean_ids[0]), None):
                prompts = group[rows]

                def score(logits: Tensor, prompts: Task = prompts) -> Tensor:
                    return metric_fn(logits, prompts.answers.to(logits.device), prompts.wrong.to(logits.device))

                base, other = prompts.clean, prompts.corrupted
                if direction == "denoise":
                    base, other = other, base
                own, base_logits = writer_outputs(model, graph, base, heads)
                reference, other_logits = writer_outputs(model, graph, other, heads)
                run = SplitRun(model, graph, base, Reference(reference), heads)
                base_metric, other_metric = float(score(base_logits).sum()), float(score(other_logits).sum())
                metrics.append((base_metric, other_metric))
                for edges, masks, first_layer in _variants(graph, n_positions, _bytes_a_writer(own)):
                    logits = run.logits(masks.to(model.device), differences=own - reference, first_layer=first_layer)
                    found = torch.stack([score(one).sum() for one in logits]).double().cpu().numpy()
                    totals[tuple(np.array(edges).T)] += base_metric - found
                    bar.update(len(edges) * len(prompts))
    base_total, other_total = np.array(metrics).sum(0)
    if base_total == other_total:
        raise ValueError(f"the metric {name!r} is the same for clean and corrupted prompts: no behaviour")
    clean, corrupted = (base_total, other_total) if direction == "noise" else (other_total, base_total)
    attrs = {
        **provenance(model, task),
        "method": "exact",
        "direction": direction,
        "metric": name,
        "metric_clean": clean / len(task),
        "metric_corrupted": corrupted / len(task),
        "seconds": time.perf_counter() - started,
    }
    # base − variant over base − other: the same share for both directions.
    scores = (totals / (base_total - other_total)).astype(np.float32)
    return (
        labelled_edges(graph, scores, attrs, task.position_labels)
        if positions
        else labelled_edges(graph, scores[0], attrs)
    )


def _bytes_a_writer(outputs: Float[Tensor, "writer prompt pos d_model"]) -> int:
    return outputs[0].numel() * outputs.element_size()


def _variants(
    graph: Graph, n_positions: int, bytes_a_writer: int
) -> Iterator[tuple[list[tuple[int, int, int]], Float[Tensor, "circuit *pos writer reader"], int]]:
    """Every edge left out by itself: (edges, masks, layer from which they differ from the whole graph).

    One position stands for all of them, and masks then have no such axis.
    """
    whole = torch.from_numpy(graph.exists).float().repeat(n_positions, 1, 1)
    for layer in range(graph.n_layers + 1):
        readers = np.flatnonzero(graph.reader_layer == layer)
        edges = [
            (position, int(writer), int(reader))
            for reader in readers
            for writer in range(graph.n_upstream[reader])
            for position in range(n_positions)
        ]
        first_layer = min(layer, graph.n_layers - 1)
        n_own = len(graph.writers) - (graph.head(first_layer, 0) if first_layer else 0)
        step = max(1, VARIANT_BYTES // (n_own * bytes_a_writer))
        for first in range(0, len(edges), step):
            some = edges[first : first + step]
            masks = whole.repeat(len(some), 1, 1, 1)
            masks[range(len(some)), *map(list, zip(*some, strict=True))] = 0
            yield some, masks if n_positions > 1 else masks[:, 0], first_layer
