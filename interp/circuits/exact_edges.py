"""The exact effect of every edge, one run an edge; what edge scores are held against on small models."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from interp.circuits.edge_scores import labelled_edges
from interp.circuits.graph import Graph
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
    progress: bool | None = None,
) -> xr.DataArray:
    """What each edge does by itself: it carries the other run, everything after it is recomputed.

    Costs a run an edge and prompt, from the reader's layer on: minutes for thousands of edges, hours for a whole model.

    Args:
        model: a model whose stream is a sum of what is written.
        task: clean and corrupted prompts with answers.
        direction: "noise": clean run, the edge carries the corrupted one; "denoise": the other way round.
        metric: as in `activation_patching`.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        [writer, reader], shares of the gap; NaN where there is no edge.

    Raises:
        ValueError: if the metric is the same for clean and corrupted prompts.
    """
    if direction not in ("denoise", "noise"):
        raise ValueError(f"direction={direction!r}; it is one of denoise, noise")
    started = time.perf_counter()
    name, metric_fn = resolve_metric(metric, task)
    graph, heads = Graph.of(model), HeadOutputs(model)
    totals = np.zeros(graph.exists.shape)
    metrics: list[tuple[float, float]] = []
    with progress_bar(graph.n_edges * len(task), "edges", "run", progress=progress) as bar:
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
                for edges, masks, first_layer in _variants(graph, _bytes_a_writer(own)):
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
    return labelled_edges(graph, (totals / (base_total - other_total)).astype(np.float32), attrs)


def _bytes_a_writer(outputs: Float[Tensor, "writer prompt pos d_model"]) -> int:
    return outputs[0].numel() * outputs.element_size()


def _variants(
    graph: Graph, bytes_a_writer: int
) -> Iterator[tuple[list[tuple[int, int]], Float[Tensor, "circuit writer reader"], int]]:
    """Every edge left out by itself: (edges, masks, layer from which they differ from the whole graph)."""
    whole = torch.from_numpy(graph.exists).float()
    for layer in range(graph.n_layers + 1):
        readers = np.flatnonzero(graph.reader_layer == layer)
        edges = [(int(writer), int(reader)) for reader in readers for writer in range(graph.n_upstream[reader])]
        first_layer = min(layer, graph.n_layers - 1)
        n_own = len(graph.writers) - (graph.head(first_layer, 0) if first_layer else 0)
        step = max(1, VARIANT_BYTES // (n_own * bytes_a_writer))
        for first in range(0, len(edges), step):
            some = edges[first : first + step]
            masks = whole.repeat(len(some), 1, 1)
            masks[range(len(some)), [writer for writer, _ in some], [reader for _, reader in some]] = 0
            yield some, masks, first_layer
