"""Path patching in stages, backwards from the logits: which heads write the answer, which heads tell those, and so on.

1. Path patching into the logits finds the heads that write the answer: stage 1.
2. Path patching into the queries, the keys and the values of these heads, each kind of them all together, finds the
   heads that they listen to: stage 2.
3. The same from each stage to the next, until no head is found.

Heads of two tasks, stage by stage, are compared by `interp.circuits.reuse.top_share_overlap`, the circuits by `overlap`
and `transfer`; `interp.circuits.steering` intervenes on what was found.

Source: Merullo, Eickhoff & Pavlick 2024, Circuit component reuse (arXiv 2310.08744), after Wang et al. 2022 (arXiv
2211.00593).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float
from numpy import ndarray

from interp.circuits.circuit import Circuit
from interp.circuits.graph import LOGITS, Graph
from interp.metrics import Metric
from interp.model import Model
from interp.patching.activation import Direction
from interp.patching.path import Mlps, path_patching
from interp.tasks import Task

Part = Literal["q", "k", "v"]
PARTS: tuple[Part, ...] = ("q", "k", "v")
SHARE = 0.02
"""Share of all heads that the source takes at each step."""
THRESHOLD = 0.01
"""Effect below which no head counts, as a share of the behaviour. Ours: the source stops by hand."""


@dataclass(frozen=True)
class _Path:
    """Readers that are patched together, and what path patching into them found."""

    name: str
    stage: int
    readers: tuple[str, ...]
    score: Float[ndarray, "layer head"]
    kept: Bool[ndarray, "layer head"]


def staged_path_patching(
    model: Model,
    task: Task,
    *,
    share: float = SHARE,
    threshold: float = THRESHOLD,
    parts: Sequence[Part] = PARTS,
    max_stages: int | None = None,
    mlps: Mlps = "frozen",
    direction: Direction = "noise",
    metric: str | Metric | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> xr.Dataset:
    """The heads of a circuit in stages: those that write to the logits, those that write to these, and so on.

    Each step is one `path_patching` of all heads into one kind of reader of the stage before, at all positions, and
    keeps the heads of largest magnitude (negative ones too). A head can be in several stages. Embedding and MLPs are
    not judged. Costs, for each stage but the first, three such sweeps; no more stages than layers.

    >>> stages = staged_path_patching(model, task)
    >>> stages.where(stages.kept).score.to_dataframe().dropna()  # what was found, row by row

    Args:
        model: a model with a residual stream, served by the sweep engine.
        task: clean and corrupted prompts with answers.
        share: how large a share of all heads a step takes at most; at least one head.
        threshold: the least magnitude of an effect, as a share of the behaviour.
        parts: which readers of a head are followed: queries, keys, values.
        max_stages: stop after so many; None: when no head is found any more.
        mlps: as in `path_patching`; "recomputed" follows paths through MLPs, too.
        direction: as in `activation_patching`; "noise" as in the source.
        metric: as in `activation_patching`.
        batch_size: prompts at once; by default what memory allows.
        progress: show a progress bar a step; None: in a terminal or notebook only.

    Returns:
        Dataset over [path, layer, head]: `score`, as `path_patching` gives it (NaN where a head is not upstream), and
        `kept`. Path "logits" is stage 1; "1.q" are the queries of all heads kept in stage 1, and so on: what is kept
        there is of stage 2. Coordinates of path: `stage`, `part` and `readers` (names joined by commas; the key and
        value heads that several heads share are there once). Paths where nothing is kept are listed too.

    Raises:
        ValueError: for a share, threshold or number of stages out of range, an unknown part, and as `path_patching`.
        SiteUnavailable: for a model whose stream is normed after every addition.
    """
    started = time.perf_counter()
    _check(share, threshold, parts, max_stages)
    n_top = max(1, round(share * model.n_layers * model.n_heads))
    patched = partial(
        path_patching,
        model,
        task,
        mlps=mlps,
        direction=direction,
        metric=metric,
        batch_size=batch_size,
        progress=progress,
    )
    found: list[_Path] = []
    readers: dict[str, tuple[str, ...]] = {LOGITS: (LOGITS,)}
    stage = 1
    while readers and (max_stages is None or stage <= max_stages):
        here = []
        for name, several in readers.items():
            effects = patched(readers=several)
            here.append(_Path(name, stage, several, effects.values, _largest(effects.values, n_top, threshold)))
        found += here
        heads = np.argwhere(np.any([path.kept for path in here], axis=0)).tolist()
        followed = {f"{stage}.{part}": _readers(model, heads, part) for part in parts}
        readers = {name: several for name, several in followed.items() if several}
        stage += 1
    attrs = {name: value for name, value in effects.attrs.items() if name not in ("site", "readers")}
    attrs |= {"method": "staged_path_patching", "share": share, "threshold": threshold, "n_top": n_top}
    return _labelled(found, effects, attrs | {"seconds": time.perf_counter() - started})


def circuit_of_stages(model: Model, stages: xr.Dataset, *, whole: bool = False) -> Circuit:
    """The edges that `staged_path_patching` kept, as a circuit.

    An edge scores what its writer does through all readers of the path together, the best of the paths that the reader
    is on: readers were not told apart. With `mlps="recomputed"` an edge may stand for ways through MLPs.

    Args:
        model: the model of the stages.
        stages: what `staged_path_patching` returned.
        whole: keep, besides, every edge between the embedding, MLPs, logits and heads found, none of which the stages
            judge. Without them the circuit is of heads alone, and nothing reaches it when it is run.

    Raises:
        ValueError: if the stages are of a model with other heads.
    """
    graph = Graph.of(model)
    if (stages.sizes["layer"], stages.sizes["head"]) != (graph.n_layers, graph.n_heads):
        raise ValueError(
            f"the stages are of {stages.sizes['layer']} × {stages.sizes['head']} heads; the model has {graph}"
        )
    scores = np.full(graph.exists.shape, np.nan, dtype=np.float32)
    mask = np.zeros(graph.exists.shape, dtype=bool)
    writers = np.array([graph.head(layer, head) for layer, head in np.ndindex(graph.n_layers, graph.n_heads)])
    for number, names in enumerate(stages["readers"].values):
        score, kept = (stages[name].isel(path=number).values.ravel() for name in ("score", "kept"))
        for reader in (graph.reader_index[name] for name in str(names).split(", ")):
            upstream = graph.exists[writers, reader]
            column = scores[writers, reader]
            better = upstream & (np.isnan(column) | (np.abs(score) > np.abs(column)))
            scores[writers[better], reader] = score[better]
            mask[writers[upstream & kept], reader] = True
    if whole:
        mask |= _never_judged(graph, mask)
    return Circuit(graph, scores, mask, {**stages.attrs, "whole": int(whole)})


def _check(share: float, threshold: float, parts: Sequence[Part], max_stages: int | None) -> None:
    if not 0 < share <= 1:
        raise ValueError(f"share={share}; it is a share of all heads, above 0 and at most 1")
    if not threshold > 0:
        raise ValueError(f"threshold={threshold}; it is above 0, or heads without any effect would be followed")
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"part {part!r} is not one of {', '.join(PARTS)}")
    if max_stages is not None and max_stages < 1:
        raise ValueError(f"max_stages={max_stages}; there is at least one")


def _largest(score: Float[ndarray, "layer head"], n_top: int, threshold: float) -> Bool[ndarray, "layer head"]:
    """The heads of largest magnitude that reach the threshold; of equal ones the earlier."""
    magnitude = np.where(np.isnan(score), -np.inf, np.abs(score))
    top = np.zeros(score.size, dtype=bool)
    top[np.argsort(-magnitude, axis=None, kind="stable")[:n_top]] = True
    return top.reshape(score.shape) & (magnitude >= threshold)


def _readers(model: Model, heads: Sequence[Sequence[int]], part: Part) -> tuple[str, ...]:
    """The readers of one kind of some heads; none in layer 0, upstream of which there is no head."""
    group = model.n_heads // model.n_heads_at(part)
    return tuple(dict.fromkeys(f"L{layer}H{head // group}.{part}" for layer, head in heads if layer > 0))


def _labelled(found: Sequence[_Path], like: xr.DataArray, attrs: dict[str, object]) -> xr.Dataset:
    dims = ("path", "layer", "head")
    return xr.Dataset(
        {
            "score": (dims, np.stack([path.score for path in found])),
            "kept": (dims, np.stack([path.kept for path in found])),
        },
        coords={
            "path": [path.name for path in found],
            "layer": like["layer"].values,
            "head": like["head"].values,
            "stage": ("path", [path.stage for path in found]),
            "part": ("path", [path.name.rpartition(".")[2] for path in found]),
            "readers": ("path", [", ".join(path.readers) for path in found]),
        },
        attrs=attrs,
    )


def _never_judged(graph: Graph, kept: Bool[ndarray, "writer reader"]) -> Bool[ndarray, "writer reader"]:
    """Edges with the embedding or an MLP at one end at least, and a head found or the logits at the other."""
    is_head = np.array([name.startswith("L") for name in graph.writers])
    is_in = kept.any(1) | ~is_head
    into_mlp = np.array([name.startswith("mlp") for name in graph.readers])
    is_read = np.any(graph.feeds & is_in, axis=1) | (np.array(graph.readers) == LOGITS)
    judged = is_head[:, None] & ~into_mlp
    return graph.exists & is_in[:, None] & is_read & ~judged
