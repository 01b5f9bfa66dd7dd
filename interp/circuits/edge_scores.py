"""Edge scores from gradients: what a writer adds in one run more than in the other, times the gradient at a reader.

`attribution_edge_scores` (EAP), with integrated gradients along three paths (EAP-IG) and with relevance rules (RelP);
`secant_edge_scores`, whose scores are a flow: into a node comes what goes out of it.

A score is an estimate of the exact effect of the edge, with the same sign and scale: positive where the edge supports
the behaviour, 1 for all of the gap between the metric of clean and corrupted runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from interp.circuits.graph import Graph, Neurons
from interp.circuits.reader_gradients import ByLayer, ReaderGradients
from interp.circuits.writers import HeadOutputs, gathered, writer_sites
from interp.metrics import Metric
from interp.model import Edit, Model, Site
from interp.patching.activation import Direction
from interp.patching.batching import batches
from interp.patching.estimate import Request, request
from interp.patching.labels import provenance
from interp.patching.progress import progress_bar
from interp.patching.relevance import prepared_rules
from interp.patching.rules.secant_rules import kept_run, secant_parts, secant_rules
from interp.patching.secant import secant_metric
from interp.tasks import Task

Path = Literal["none", "inputs", "activations", "clean-corrupted"]
WRITER_BYTES = 2**28
"""Outputs of all writers that are held at once; the pass with gradients holds several times as much."""
READERS_A_PRODUCT = 64
"""Readers whose gradients are multiplied with the writers' outputs together."""


def attribution_edge_scores(
    model: Model,
    task: Task,
    *,
    path: Path = "none",
    steps: int = 5,
    rules: str | None = None,
    direction: Direction = "noise",
    metric: str | Metric | None = None,
    positions: bool = False,
    neurons: Neurons = (),
    batch_size: int | None = None,
    progress: bool | None = None,
) -> xr.DataArray:
    """Edge attribution patching: an estimate of every edge's effect, from one backward pass or a few.

    score(u → r) = Σ (clean − corrupted output of u) · (gradient of the metric at what r sees). Costs two forward passes
    and one backward pass, times `steps` for path "inputs" and times steps × (2 n_layers + 1) for "activations".

    Args:
        model: a model whose stream is a sum of what is written.
        task: clean and corrupted prompts with answers.
        path: where gradients are taken. "none": at the base run (EAP). "inputs": the mean along a straight line between
            the embeddings (EAP-IG). "activations": along a straight line for the output of one layer's attention or MLP
            at a time, the rest recomputed, mean over all of them (as its authors' code does; for single edges that is
            no integral; gradients go on through the output that is moved, which theirs do not). "clean-corrupted": at
            both runs.
        steps: points on the path, at the middle of as many equal pieces.
        rules: relevance rules for the backward pass, a preset of `relevance_rules` ("relp"); None: plain gradients.
        direction: the base run is the clean one for "noise", the corrupted one for "denoise".
        metric: as in `activation_patching`; it needs a gradient.
        positions: keep a leading `position` axis: an edge at each position by itself.
        neurons: (layer, neuron) of those that are to be writers of their own; see `Graph`.
        batch_size: prompts a pass; by default what fits 256 MB of writers' outputs.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        [writer, reader], or [position, writer, reader]; NaN where there is no edge. Shares of the gap.

    Raises:
        ValueError: for an unknown path, prompts of several lengths with positions, neurons that have no part of the
            stream, or a metric without a gradient.
        SiteUnavailable: for a model whose stream is normed after every addition.

    Source: Syed et al. 2023 (arXiv 2310.10348); Hanna et al. 2024 (arXiv 2403.17806), whose edge scores take the left
    ends of the pieces and whose node scores the right ones; here it is the middle.
    """
    if path not in ("none", "inputs", "activations", "clean-corrupted"):
        raise ValueError(f"path={path!r}; it is one of none, inputs, activations, clean-corrupted")
    if steps < 1:
        raise ValueError(f"steps={steps}; it is at least 1")
    if positions:
        check_one_length(task)
    asked = _request(model, task, direction, metric, batch_size, progress)
    within = nullcontext if rules is None else prepared_rules(model, rules)
    graph, heads = Graph.of(model, neurons=neurons), HeadOutputs(model)
    sites = writer_sites(graph)

    def run_batch(prompts: Task, add: _Add) -> tuple[Tensor, Tensor]:
        score = partial(asked.score, prompts=prompts)
        if path == "none":
            with within():
                base = ReaderGradients(model, graph, _tokens(prompts, asked.denoising), score, also=sites)
                other = _run_kept(asked, prompts, _tokens(prompts, not asked.denoising), sites)
                both = (_Kept(base.activations, base.values), other)
                clean, corrupted = both[::-1] if asked.denoising else both
                difference = gathered(graph, clean.kept, heads, minus=corrupted.kept)
                add(difference, base.by_layer(), 1.0)
            return clean.metric, corrupted.metric
        clean, corrupted = (_run_kept(asked, prompts, _tokens(prompts, which), sites) for which in (False, True))
        difference = gathered(graph, clean.kept, heads, minus=corrupted.kept)
        points = list(_points(path, steps, clean, corrupted, asked))
        for is_corrupted, edits in points:
            with model.edited(edits), within():
                gradients = ReaderGradients(model, graph, _tokens(prompts, is_corrupted), score)
                add(difference, gradients.by_layer(), 1 / len(points))
        return clean.metric, corrupted.metric

    name = "relp" if rules == "relp" else "eap" if path == "none" else f"eap-ig-{path}"
    attrs = {"method": name, "path": path, "steps": steps, "rules": rules or "none"}
    return _collect(asked, graph, run_batch, attrs, positions=positions)


def secant_edge_scores(
    model: Model,
    task: Task,
    *,
    metric: str | Metric | None = None,
    positions: bool = False,
    neurons: Neurons = (),
    batch_size: int | None = None,
    progress: bool | None = None,
) -> xr.DataArray:
    """Secant flow: how much of the metric's difference runs along each edge.

    Multipliers are exact finite differences between the two runs, so that all edges into the logits add up to the whole
    difference, and what flows into a head (through query, key and value together) or an MLP flows out of it. Behind a
    norm after attention (Gemma) that holds for the heads of a layer together. There is one score for both directions.

    Args:
        model: a model whose attention goes through transformers' interface.
        task: as in `attribution_edge_scores`.
        metric: as in `attribution_edge_scores`.
        positions: as in `attribution_edge_scores`.
        neurons: as in `attribution_edge_scores`.
        batch_size: as in `attribution_edge_scores`.
        progress: as in `attribution_edge_scores`.

    Returns:
        As `attribution_edge_scores`.
    """
    if positions:
        check_one_length(task)
    asked = _request(model, task, "noise", metric, batch_size, progress)
    parts, graph, heads = secant_parts(model), Graph.of(model, neurons=neurons), HeadOutputs(model)
    sites = writer_sites(graph)

    def run_batch(prompts: Task, add: _Add) -> tuple[Tensor, Tensor]:
        score = partial(asked.score, prompts=prompts)
        with kept_run(model, parts) as other:
            logits, kept = model.run_with_cache(prompts.corrupted, sites, logits_to_keep=1)
        corrupted = logits[:, -1]
        with secant_rules(model, other):
            gradients = ReaderGradients(
                model,
                graph,
                prompts.clean,
                lambda logits: secant_metric(score, logits, corrupted),
                also=sites,
            )
            difference = gathered(graph, gradients.activations, heads, minus=kept)
            add(difference, gradients.by_layer(), 1.0)
        return gradients.values, score(corrupted)

    return _collect(asked, graph, run_batch, {"method": "secant"}, positions=positions)


@dataclass(frozen=True)
class _Kept:
    """A run's writers, and its metric."""

    kept: Mapping[Any, Tensor]
    metric: Float[Tensor, " prompt"]


def _tokens(prompts: Task, is_corrupted: bool) -> Int[Tensor, "prompt pos"]:
    return prompts.corrupted if is_corrupted else prompts.clean


def _run_kept(asked: Request, prompts: Task, tokens: Int[Tensor, "prompt pos"], sites: list[str]) -> _Kept:
    logits, kept = asked.model.run_with_cache(tokens, sites, logits_to_keep=1)
    return _Kept(kept, asked.score(logits[:, -1], prompts))


def _points(
    path: Path, steps: int, clean: _Kept, corrupted: _Kept, asked: Request
) -> Iterator[tuple[bool, list[Edit]]]:
    """The runs at which gradients are taken: whether of the corrupted prompts, and with which edits."""
    if path == "clean-corrupted":
        yield from ((False, []), (True, []))
        return
    layers = range(asked.model.n_layers)
    sites = [Site("embed"), *(Site(kind, layer) for layer in layers for kind in ("attn_out", "mlp_out"))]
    for site in sites if path == "activations" else sites[:1]:
        start, end = (_written_at(asked.model, site, run.kept) for run in (corrupted, clean))
        for step in range(steps):
            yield asked.denoising, [Edit(site, fn=_moved_to(torch.lerp(start, end, (step + 0.5) / steps)))]


def _moved_to(value: Tensor) -> Callable[[Tensor], Tensor]:
    """An activation takes a value, and still hands its gradient on to what is before it."""
    return lambda activation: activation + (value - activation).detach()


def _written_at(model: Model, site: Site, kept: Mapping[Any, Tensor]) -> Tensor:
    """An activation of a run whose z is kept, not its attention outputs."""
    if site.kind != "attn_out":
        return kept[site]
    assert site.layer is not None
    heads = HeadOutputs(model)
    return heads(site.layer, kept[Site("z", site.layer)]).sum(0) + heads.bias(site.layer)


_Add = Callable[[Tensor, ByLayer, float], None]
"""Add what all readers get from the writers upstream: (differences, gradients by layer, weight)."""


def _request(
    model: Model,
    task: Task,
    direction: Direction,
    metric: str | Metric | None,
    batch_size: int | None,
    progress: bool | None,
) -> Request:
    return request(
        model,
        task,
        sites=["mlp_out"],
        by=("layer",),
        direction=direction,
        metric=metric,
        normalised=True,
        per_prompt=False,
        batch_size=batch_size,
        progress=progress,
    )


def _collect(
    asked: Request,
    graph: Graph,
    run_batch: Callable[[Task, _Add], tuple[Tensor, Tensor]],
    attrs: Mapping[str, Any],
    *,
    positions: bool,
) -> xr.DataArray:
    """Sum an estimate over all prompts, batch by batch, and label it."""
    started = time.perf_counter()
    groups = asked.task.by_length()
    length = len(groups[0].clean_ids[0])
    shape = (len(graph.writers), len(graph.readers))
    wide = torch.promote_types(asked.model.dtype, torch.float32)
    totals = torch.zeros((length, *shape) if positions else shape, dtype=wide)

    def add(differences: Tensor, by_layer: ByLayer, weight: float) -> None:
        for readers, gradients in _in_groups(by_layer):
            upstream = differences[: int(graph.n_upstream[readers.stop - 1])]
            if positions:
                found = torch.einsum("wbtd,rbtd->twr", upstream, gradients)
            else:
                found = upstream.flatten(1) @ gradients.flatten(1).T
            totals[..., : len(upstream), readers] += weight * found.cpu()

    metrics: list[tuple[Tensor, Tensor]] = []
    with progress_bar(len(asked.task), str(attrs["method"]), "prompt", progress=asked.progress) as bar:
        for group in groups:
            for rows in batches(
                len(group), len(group.clean_ids[0]), asked.batch_size or _prompts_a_batch(asked, graph, group)
            ):
                metrics.append(run_batch(group[rows], add))
                bar.update(len(metrics[-1][0]))
    clean, corrupted = (torch.cat([one.detach().cpu() for one in ones]) for ones in zip(*metrics, strict=True))
    gap = float(clean.mean() - corrupted.mean())
    if gap == 0:
        raise ValueError(f"the metric {asked.metric_name!r} is the same for clean and corrupted prompts: no behaviour")
    scores = (totals / len(clean) / gap).numpy()
    if not np.isfinite(scores).all():
        raise FloatingPointError(f"{attrs['method']}: scores are NaN or infinite: check metric, weights, dtype")
    said = {
        **provenance(asked.model, asked.task),
        **attrs,
        "direction": asked.direction,
        "metric": asked.metric_name,
        "metric_clean": float(clean.mean()),
        "metric_corrupted": float(corrupted.mean()),
        "seconds": time.perf_counter() - started,
    }
    return labelled_edges(graph, scores, said, asked.task.position_labels if positions else ())


def _in_groups(by_layer: ByLayer) -> ByLayer:
    """Readers of several layers together: products with few columns are slow."""
    waiting: list[tuple[slice, Tensor]] = []
    for readers, gradients in by_layer:
        waiting.insert(0, (readers, gradients))
        if waiting[-1][0].stop - readers.start >= READERS_A_PRODUCT:
            yield _joined(waiting)
            waiting = []
    if waiting:
        yield _joined(waiting)


def _joined(pieces: Sequence[tuple[slice, Tensor]]) -> tuple[slice, Tensor]:
    return slice(pieces[0][0].start, pieces[-1][0].stop), torch.cat([gradients for _, gradients in pieces])


def _prompts_a_batch(asked: Request, graph: Graph, group: Task) -> int:
    """As many prompts as let the outputs of all writers fit `WRITER_BYTES`, up to the usual batch."""
    length = len(group.clean_ids[0])
    a_prompt = len(graph.writers) * length * asked.model.d_model * 4
    return max(1, min(WRITER_BYTES // a_prompt, 1024 // length))


def check_one_length(task: Task) -> None:
    """Refuse to tell positions apart where they mean something else in every prompt.

    Raises:
        ValueError: for prompts of several lengths.
    """
    lengths = sorted({len(ids) for ids in task.clean_ids})
    if len(lengths) > 1:
        found = ", ".join(map(str, lengths))
        raise ValueError(
            f"positions=True needs prompts of one length, these have {found} tokens: take task.by_length()[0]"
        )


def labelled_edges(
    graph: Graph,
    scores: Float[np.ndarray, "*pos writer reader"],
    attrs: Mapping[str, Any],
    labels: Sequence[str] = (),
) -> xr.DataArray:
    """Edge scores by name; NaN where there is no edge. With a position axis, `labels` say what stands where."""
    dims: Sequence[str] = ("position", "writer", "reader")[-scores.ndim :]
    coords: dict[str, Any] = {"writer": list(graph.writers), "reader": list(graph.readers)}
    if "position" in dims:
        coords |= {"position": range(len(scores)), "label": ("position", list(labels))}
    return xr.DataArray(
        np.where(graph.exists, scores, np.nan), dims=tuple(dims), coords=coords, name="score", attrs=dict(attrs)
    )
