"""Path patching: the exact effect of an edge, a writer's influence on one reader alone.

1. Put the writers' activations of the other run into the base run and see what that adds to the stream that the reader
   reads: directly (everything between stays as in the base run), or with the MLPs between recomputed.
2. Let the reader alone see the changed stream: its query, key, value or MLP output becomes what it makes of it.
3. Run on from there, everything after the reader recomputed; the change of the metric is the effect.

All three go through the sweep engine, so that all edges into a reader are one sweep, and per-head inputs exist for
the readers asked for only.

Sources: Wang et al. 2022 (arXiv 2211.00593), whose protocol recomputes MLPs; Goldowsky-Dill et al. 2023 (arXiv
2304.05969).
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from interp.metrics import Metric
from interp.model import Cache, Edit, Model, Site
from interp.patching.activation import Direction, check_axes, normalised_shares, resolve_metric
from interp.patching.batching import batches
from interp.patching.cells import Axis, grid
from interp.patching.edges import Edge, Reader, Writer, check_paths, is_upstream
from interp.patching.labels import labelled, provenance
from interp.patching.progress import progress_bar
from interp.patching.reading import Reading, reading
from interp.patching.sweep import sweep, sweep_activations
from interp.patching.variant import Variant
from interp.tasks import Task

Mlps = Literal["frozen", "recomputed"]
WRITERS = ("z", "attn_out", "mlp_out", "embed")
STREAM_BYTES = 64 * 2**20
"""Changed streams that are held at once, one for each prompt, set of edges and reader."""


def path_patching(
    model: Model,
    task: Task,
    *,
    readers: str | Sequence[str],
    site: str = "z",
    by: Sequence[Axis] = ("layer", "head"),
    mlps: Mlps = "frozen",
    direction: Direction = "denoise",
    metric: str | Metric | None = None,
    normalised: bool = True,
    per_prompt: bool = False,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> xr.DataArray:
    """Exact effect of every writer of a kind on the metric through some readers alone.

    >>> path_patching(model, task, readers=["L9H9.q", "L9H6.q"])  # which heads feed the name movers' queries?

    Args:
        model: a model with a residual stream, served by the sweep engine.
        task: clean and corrupted prompts with answers.
        readers: names of the readers that see the change: "L9H6.q", "L9H6.k", "L9H6.v" (key/value heads for k and v),
            "mlp9", "logits". Several see it together.
        site: the writers: "z" (head outputs), "attn_out", "mlp_out" or "embed".
        by: the axes of the writers that are kept; without "layer", all layers write together.
        mlps: "frozen": the path is direct. "recomputed": it may also run through MLPs between writer and reader
            (attention stays as in the base run), as in Wang et al.
        direction: as in `activation_patching`.
        metric: as in `activation_patching`.
        normalised: as in `activation_patching`.
        per_prompt: keep a leading `prompt` axis.
        batch_size: prompts at once; by default what memory allows.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        DataArray with the dims in `by`; NaN where a writer is not upstream of any of the readers (no such edge).

    Raises:
        ValueError: for an unknown reader or writer, or an axis that the writers do not have.
        SiteUnavailable: for a model whose stream is normed after every addition.
    """
    started = time.perf_counter()
    check_paths(model)
    sites = model.site_names(site)
    if sites[0].kind not in WRITERS:
        raise ValueError(f"{site!r} writes nothing to the residual stream; writers are {', '.join(WRITERS)}")
    axes = check_axes(sites, task, by)
    found = [Reader.parse(name, model) for name in ([readers] if isinstance(readers, str) else readers)]
    shape = (1, len(task.clean_ids[0]), model.n_heads, model.d_head)
    lengths, cells = grid(sites, axes, shape)
    sets = [
        [
            Edge(writer, reader)
            for one, place in cell
            for writer in [Writer(one, place.get("head"), place.get("position"))]
            for reader in found
            if is_upstream(writer, reader, parallel=model.tower.parallel)
        ]
        for cell in cells
    ]
    effects, metrics, name = _effects(model, task, sets, mlps, direction, metric, batch_size, progress)
    values = normalised_shares(effects, *metrics, name) if normalised else effects
    values = values.masked_fill(torch.tensor([not one for one in sets]), torch.nan).reshape(len(task), *lengths)
    attrs = _attrs(mlps, direction, name, normalised, metrics, started) | {
        "site": site,
        "readers": ", ".join([readers] if isinstance(readers, str) else readers),
    }
    kept, dims = (values, ("prompt", *axes)) if per_prompt else (values.mean(0), axes)
    return labelled(kept, dims, model, task, attrs, sites=sites)


def edge_effects(
    model: Model,
    task: Task,
    edge_sets: Sequence[Sequence[tuple[str, str]]],
    *,
    mlps: Mlps = "frozen",
    direction: Direction = "denoise",
    metric: str | Metric | None = None,
    normalised: bool = True,
    per_prompt: bool = False,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> xr.DataArray:
    """Exact effect of sets of edges, the edges of a set patched together.

    Each reader of a set sees the base run's stream plus what its writers of the other run add to it; what a writer
    sends is the other run's, also where it is a reader itself.

    >>> edge_effects(model, task, [[("L5H5", "L7H3.k"), ("L5H5", "L7H3.v")], [("mlp0", "logits")]])

    Args:
        model: as in `path_patching`.
        task: clean and corrupted prompts with answers.
        edge_sets: sets of (writer, reader) names; see `interp.patching.edges`.
        mlps: as in `path_patching`.
        direction: as in `activation_patching`.
        metric: as in `activation_patching`.
        normalised: as in `activation_patching`.
        per_prompt: keep a leading `prompt` axis.
        batch_size: prompts at once; by default what memory allows.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        DataArray with the dim "edges", labelled "L5H5→L7H3.k, ...".

    Raises:
        ValueError: for an unknown writer or reader, or a writer that is not upstream of its reader.
        SiteUnavailable: for a model whose stream is normed after every addition.
    """
    started = time.perf_counter()
    check_paths(model)
    sets = [[_edge(model, writer, reader) for writer, reader in one] for one in edge_sets]
    effects, metrics, name = _effects(model, task, sets, mlps, direction, metric, batch_size, progress)
    values = normalised_shares(effects, *metrics, name) if normalised else effects
    names = [", ".join(f"{writer}→{reader}" for writer, reader in one) for one in edge_sets]
    return xr.DataArray(
        (values if per_prompt else values.mean(0)).numpy(),
        dims=("prompt", "edges") if per_prompt else ("edges",),
        coords={"edges": np.array(names, dtype=str)},
        name="effect",
        attrs={**provenance(model, task), **_attrs(mlps, direction, name, normalised, metrics, started)},
    )


def _edge(model: Model, writer: str, reader: str) -> Edge:
    edge = Edge(Writer.parse(writer), Reader.parse(reader, model))
    edge.writer.check(model)
    if not is_upstream(edge.writer, edge.reader, parallel=model.tower.parallel):
        raise ValueError(f"there is no edge {writer}→{reader}: the reader comes before the writer")
    return edge


def _attrs(
    mlps: Mlps, direction: Direction, metric: str, normalised: bool, metrics: tuple[Tensor, Tensor], started: float
) -> dict[str, object]:
    clean, corrupted = metrics
    return {
        "method": "path_patching",
        "mlps": mlps,
        "direction": direction,
        "metric": metric,
        "normalised": int(normalised),
        "metric_clean": float(clean.mean()),
        "metric_corrupted": float(corrupted.mean()),
        "seconds": time.perf_counter() - started,
    }


def _effects(
    model: Model,
    task: Task,
    sets: Sequence[Sequence[Edge]],
    mlps: Mlps,
    direction: Direction,
    metric: str | Metric | None,
    batch_size: int | None,
    progress: bool | None,
) -> tuple[Float[Tensor, "prompt set"], tuple[Float[Tensor, " prompt"], Float[Tensor, " prompt"]], str]:
    """Effects (not normalised) of every set on every prompt; metric of the clean and the corrupted runs; its name."""
    if mlps not in ("frozen", "recomputed"):
        raise ValueError(f"mlps={mlps!r}; it is one of frozen, recomputed")
    if direction not in ("denoise", "noise"):
        raise ValueError(f"direction={direction!r}; it is one of denoise, noise")
    name, metric_fn = resolve_metric(metric, task)
    found = []
    with progress_bar(len(task) * len(sets), "patching paths", "path", progress=progress) as bar:
        for group in task.by_length():
            for rows in batches(len(group), group.clean.shape[1], batch_size):
                paths = _Paths(model, group[rows], sets, mlps, direction, reading(metric_fn, group[rows]))
                found.append(paths.run(bar.update))
    order = torch.cat([torch.as_tensor(group.index) for group in task.by_length()]).argsort()
    effects, clean, corrupted = (torch.cat(parts)[order] for parts in zip(*found, strict=True))
    return effects, (clean, corrupted), name


@dataclass(frozen=True)
class _Changed:
    """One reader's changed input: which prompt and set of edges it belongs to, and what it adds to the stream."""

    prompt: int
    set_index: int
    reader: Reader
    writers: tuple[Writer, ...]


class _Paths:
    """Path patching on a batch of prompts of one length."""

    def __init__(
        self,
        model: Model,
        prompts: Task,
        sets: Sequence[Sequence[Edge]],
        mlps: Mlps,
        direction: Direction,
        read: Reading,
    ) -> None:
        self.model, self.sets, self.mlps, self.direction, self.read = model, sets, mlps, direction, read
        self.tokens: Int[Tensor, "prompt pos"]
        self.tokens, other = prompts.corrupted, prompts.clean
        if direction == "noise":
            self.tokens, other = other, self.tokens
        edges = [edge for one in sets for edge in one]
        writers = list(dict.fromkeys(edge.writer.site for edge in edges)) or [Site("embed")]
        streams = [edge.reader.input_site(model) for edge in edges]
        attention = [site for site in writers if site.kind == "z"]
        layers = range(model.n_layers) if mlps == "recomputed" else [site.layer for site in attention]
        attention_outs = [Site("attn_out", layer) for layer in layers]
        self.base_metric, self.base = self._run(self.tokens, [*writers, *streams, *attention_outs])
        self.other_metric, self.other = self._run(other, writers)

    def _run(self, tokens: Tensor, sites: Sequence[Site]) -> tuple[Float[Tensor, " prompt"], Cache]:
        logits, cache = self.model.run_with_cache(tokens, list(dict.fromkeys(sites)), logits_to_keep=1)
        return self.read.of_all(logits[:, -1], torch.arange(len(tokens))), cache

    def run(
        self, on_paths: Callable[[int], Any]
    ) -> tuple[Float[Tensor, "prompt set"], Float[Tensor, " prompt"], Float[Tensor, " prompt"]]:
        """Effects, and the metric of the clean and of the corrupted prompts."""
        effects = torch.zeros(len(self.tokens), len(self.sets), dtype=self.base_metric.dtype)
        places = [(prompt, number) for prompt in range(len(self.tokens)) for number in range(len(self.sets))]
        for some in self._batches(places):
            edits = self._reader_edits(some)
            variants = [Variant(prompt, tuple(edits.get((prompt, number), ()))) for prompt, number in some]
            unpatched = [Variant(prompt, ()) for prompt in range(len(self.tokens))]
            values = sweep(
                self.model, self.tokens, [*unpatched, *variants], self.read, columns=self.read.columns, progress=False
            )
            prompt, number = torch.tensor(some).T
            effects[prompt, number] = values[len(unpatched) :] - values[prompt]
            on_paths(len(some))
        if self.direction == "denoise":
            return effects, self.other_metric, self.base_metric
        return -effects, self.base_metric, self.other_metric

    def _batches(self, places: Sequence[tuple[int, int]]) -> Iterator[Sequence[tuple[int, int]]]:
        """Prompts and sets whose changed streams fit into `STREAM_BYTES`."""
        n_readers = max((len({edge.reader for edge in one}) for one in self.sets), default=0)
        bytes_a_place = max(1, n_readers) * self.tokens.shape[1] * self.model.d_model * self.model.dtype.itemsize
        step = max(1, STREAM_BYTES // bytes_a_place)
        return (places[begin : begin + step] for begin in range(0, len(places), step))

    def _reader_edits(self, places: Sequence[tuple[int, int]]) -> dict[tuple[int, int], list[Edit]]:
        """For each prompt and set, the edits that let its readers see their changed inputs."""
        by_stream: dict[Site, list[_Changed]] = defaultdict(list)
        for prompt, number in places:
            writers: dict[Reader, list[Writer]] = defaultdict(list)
            for edge in self.sets[number]:
                writers[edge.reader].append(edge.writer)
            for reader, several in writers.items():
                by_stream[reader.input_site(self.model)].append(_Changed(prompt, number, reader, tuple(several)))
        edits: dict[tuple[int, int], list[Edit]] = defaultdict(list)
        for stream, changed in by_stream.items():
            seen = self._base_of(stream, changed) + self._added(stream, changed)
            for one, edit in zip(changed, self._seen_by_readers(stream, changed, seen), strict=True):
                edits[one.prompt, one.set_index].append(edit)
        return edits

    def _base_of(self, site: Site, changed: Sequence[_Changed]) -> Tensor:
        return self.base[site][[one.prompt for one in changed]]

    def _added(self, stream: Site, changed: Sequence[_Changed]) -> Float[Tensor, "changed pos d_model"]:
        """What the other run's writers add to the stream, beyond what those of the base run do."""
        written = [self._written(one) for one in changed]
        if self.mlps == "recomputed":
            frozen = [self._frozen(stream, one.prompt, patched) for one, patched in zip(changed, written, strict=True)]
            variants = [
                Variant(one.prompt, tuple(Edit(site, value=value) for site, value in {**rest, **patched}.items()))
                for one, rest, patched in zip(changed, frozen, written, strict=True)
            ]
            return sweep_activations(self.model, self.tokens, variants, stream) - self._base_of(stream, changed)
        added = torch.zeros_like(self._base_of(stream, changed))
        by_site: dict[Site, list[int]] = defaultdict(list)
        for number, patched in enumerate(written):
            for site in patched:
                by_site[site].append(number)
        for site, numbers in by_site.items():
            out, values = site, torch.stack([written[number][site] for number in numbers])
            if site.kind == "z":
                out = Site("attn_out", site.layer)
                variants = [
                    Variant(changed[number].prompt, (Edit(site, value=value),))
                    for number, value in zip(numbers, values, strict=True)
                ]
                values = sweep_activations(self.model, self.tokens, variants, out)
            added[numbers] += values - self._base_of(out, [changed[number] for number in numbers])
        return added

    def _written(self, one: _Changed) -> dict[Site, Tensor]:
        """By site, the base run's activation with what the writers of the other run have there."""
        mixed: dict[Site, Tensor] = {}
        for writer in one.writers:
            base, other = self.base[writer.site][one.prompt], self.other[writer.site][one.prompt]
            place: tuple[Any, ...] = (slice(None) if writer.position is None else writer.position,)
            place += () if writer.head is None else (writer.head,)
            mixed.setdefault(writer.site, base.clone())[place] = other[place]
        return mixed

    def _frozen(self, stream: Site, prompt: int, patched: Mapping[Site, Tensor]) -> dict[Site, Tensor]:
        """Attention as in the base run up to the stream, save in the layers where it is patched."""
        assert stream.layer is not None
        n_layers = stream.layer if stream.kind == "resid_pre" else stream.layer + 1
        free = {site.layer for site in patched if site.kind in ("z", "attn_out")}
        return {
            Site("attn_out", layer): self.base["attn_out", layer][prompt]
            for layer in range(n_layers)
            if layer not in free
        }

    def _seen_by_readers(self, stream: Site, changed: Sequence[_Changed], seen: Tensor) -> list[Edit]:
        """For each reader, the edit that makes it what it would be if it saw the changed stream."""
        variants = [Variant(one.prompt, (Edit(stream, value=value),)) for one, value in zip(changed, seen, strict=True)]
        edits: list[Edit | None] = [None] * len(changed)
        by_reader: dict[Site | None, list[int]] = defaultdict(list)
        for number, one in enumerate(changed):
            by_reader[None if one.reader.kind == "logits" else one.reader.output_site].append(number)
        for site, numbers in by_reader.items():
            if site is None:
                values, site = seen[numbers], stream
            else:
                values = sweep_activations(self.model, self.tokens, [variants[number] for number in numbers], site)
            for number, value in zip(numbers, values, strict=True):
                head = changed[number].reader.head
                edits[number] = Edit(site, value=value, heads=None if head is None else [head])
        return [edit for edit in edits if edit is not None]
