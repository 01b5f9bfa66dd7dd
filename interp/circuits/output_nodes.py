"""Which nodes write the answer to the logits, which only lead there, and how much the writers do together.

1. `output_nodes`: total against direct effect of every head and MLP. Nodes with a large direct effect are output nodes;
   nodes whose total effect is large and whose direct effect is small work through them.
2. `joint_output_effects`: chosen nodes patched together: what share of the behaviour do they carry, and how much would
   as many random nodes?

Source: Lieberum et al. 2023, Does circuit analysis interpretability scale? (arXiv 2307.09458), for multiple choice
(`interp.circuits.multiple_choice`); nothing here depends on the task.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from interp.circuits.graph import LOGITS, Graph
from interp.circuits.node_scores import head_and_mlp_scores, node_array
from interp.metrics import Metric
from interp.model import Cache, Edit, Model, Site
from interp.patching.activation import Direction, activation_patching, normalised_shares, resolve_metric
from interp.patching.batching import batches
from interp.patching.edges import Writer
from interp.patching.labels import provenance
from interp.patching.path import edge_effects, path_patching
from interp.patching.progress import progress_bar
from interp.patching.reading import Reading, reading
from interp.patching.sweep import sweep
from interp.patching.variant import Variant
from interp.tasks import Task

Nodes = tuple[str, ...]


def output_nodes(
    model: Model,
    task: Task,
    *,
    metric: str | Metric | None = None,
    normalised: bool = True,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> xr.Dataset:
    """Total and direct effect of every head and MLP: both exact, of the same patch.

    A node's output in the clean run is replaced, at all positions, by that of the corrupted run. Total: everything
    after it is recomputed (`activation_patching`). Direct: only the logits see the change (`path_patching`), final norm
    included. Positive = supports the right answer.

    Args:
        model: a model with a residual stream, served by the sweep engine.
        task: the corrupted prompts have another right answer.
        metric: as in `activation_patching`.
        normalised: as in `activation_patching`.
        batch_size: as in `activation_patching`.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        Dataset over [node]: `total`, `direct`, and `indirect`, their difference.
    """
    started = time.perf_counter()
    names = Graph.of(model).writers[1:]
    chosen: dict[str, Any] = {
        "direction": "noise",
        "metric": metric,
        "normalised": normalised,
        "batch_size": batch_size,
        "progress": progress,
    }
    patched = partial(activation_patching, model, task, **chosen)
    written = partial(path_patching, model, task, readers=LOGITS, **chosen)
    heads = patched(site="z", by=("layer", "head"))
    total = head_and_mlp_scores(heads.values, patched(site="mlp_out", by=("layer",)).values)
    direct = head_and_mlp_scores(
        written(site="z", by=("layer", "head")).values, written(site="mlp_out", by=("layer",)).values
    )
    found = {"total": node_array(names, total, {}), "direct": node_array(names, direct, {})}
    found["indirect"] = found["total"] - found["direct"]
    attrs = {name: heads.attrs[name] for name in ("direction", "ablation", "metric", "normalised")}
    attrs |= {"method": "output_nodes", "seconds": time.perf_counter() - started}
    return xr.Dataset(found, attrs={**provenance(model, task), **attrs})


def joint_output_effects(
    model: Model,
    task: Task,
    nodes: Sequence[str],
    *,
    n_random: int = 20,
    direction: Direction = "denoise",
    metric: str | Metric | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> xr.Dataset:
    """What share of the behaviour some nodes carry when they are patched together, all exact.

    Beside it, each node alone, and random sets with as many heads and as many MLPs, of all that the model has. Total:
    everything after the patches is recomputed, save what is patched itself. Direct: only the logits see the changes,
    final norm included. Costs two runs for each set and prompt, less what the sweep engine saves: 1 + the nodes +
    n_random sets.

    Args:
        model: a model with a residual stream, served by the sweep engine.
        task: clean and corrupted prompts with answers.
        nodes: heads ("L9H6") and MLPs ("mlp9"), such as those of the largest `direct` in `output_nodes`.
        n_random: random sets.
        direction: "denoise": the nodes of the clean run are put into the corrupted run, and recover so much; "noise":
            the other way round, and they destroy so much.
        metric: as in `activation_patching`; "accuracy" for the share of accuracy recovered.
        seed: of the random sets.
        batch_size: prompts or variants at once; by default what memory allows.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        Dataset of `total` and `direct`, shares of the gap between clean and corrupted; `single_total` and
        `single_direct` [node]; `random_total` and `random_direct` [draw]. Attrs `p_total` and `p_direct`: the share of
        sets, this one among the random ones, that do as much or more.

    Raises:
        ValueError: for no nodes, an unknown one or one named twice, an unknown direction, or, of the metric, as in
            `activation_patching`.
        SiteUnavailable: for a model whose stream is normed after every addition.
    """
    started = time.perf_counter()
    if direction not in ("denoise", "noise"):
        raise ValueError(f"direction={direction!r}; it is one of denoise, noise")
    chosen = _known_nodes(model, nodes)
    draws = _random_sets(model, chosen, n_random, seed)
    sets: list[Nodes] = [chosen, *((node,) for node in chosen), *draws]
    metric_name, _ = resolve_metric(metric, task)
    direct = edge_effects(
        model,
        task,
        [[(node, LOGITS) for node in one] for one in sets],
        direction=direction,
        metric=metric,
        batch_size=batch_size,
        progress=progress,
    )
    effects, clean, corrupted = _total_effects(model, task, sets, direction, metric, batch_size, progress)
    total = normalised_shares(effects, clean, corrupted, metric_name).mean(0)
    found: dict[str, Any] = {}
    p_values = {}
    for name, values in (("total", total.numpy()), ("direct", direct.values)):
        joint, single, random = np.split(values, [1, 1 + len(chosen)])
        found |= {name: ((), joint[0]), f"single_{name}": ("node", single), f"random_{name}": ("draw", random)}
        p_values[f"p_{name}"] = float((1 + (random >= joint[0]).sum()) / (1 + n_random))
    attrs = {
        **provenance(model, task),
        "method": "joint_output_effects",
        "direction": direction,
        "metric": metric_name,
        "metric_clean": float(clean.mean()),
        "metric_corrupted": float(corrupted.mean()),
        "n_random": n_random,
        "random_seed": seed,
        **p_values,
        "seconds": time.perf_counter() - started,
    }
    return xr.Dataset(found, coords={"node": list(chosen), "draw": range(n_random)}, attrs=attrs)


def _known_nodes(model: Model, nodes: Sequence[str]) -> Nodes:
    if isinstance(nodes, str) or not nodes:
        raise ValueError(f"nodes={nodes!r}; give a list of heads ('L9H6') and MLPs ('mlp9')")
    known = Graph.of(model).writers[1:]
    for number, node in enumerate(nodes):
        if node not in known:
            raise ValueError(f"{node!r} is not a head or MLP of this model; they run {known[0]}..{known[-1]}")
        if node in nodes[:number]:
            raise ValueError(f"{node!r} is named twice")
    return tuple(nodes)


def _random_sets(model: Model, nodes: Nodes, n_random: int, seed: int) -> list[Nodes]:
    """Sets with as many heads and MLPs as these."""
    if n_random < 0:
        raise ValueError(f"n_random={n_random}; it is 0 or more")
    known = Graph.of(model).writers[1:]
    kinds = [[node for node in known if node.startswith(start)] for start in ("L", "mlp")]
    sizes = [sum(node in kind for node in nodes) for kind in kinds]
    generator = np.random.default_rng(seed)
    return [
        tuple(
            kind[one]
            for kind, size in zip(kinds, sizes, strict=True)
            for one in sorted(generator.choice(len(kind), size, replace=False))
        )
        for _ in range(n_random)
    ]


def _total_effects(
    model: Model,
    task: Task,
    sets: Sequence[Nodes],
    direction: Direction,
    metric: str | Metric | None,
    batch_size: int | None,
    progress: bool | None,
) -> tuple[Float[Tensor, "prompt set"], Float[Tensor, " prompt"], Float[Tensor, " prompt"]]:
    """Effects (not normalised) of every set on every prompt; metric of the clean and of the corrupted runs."""
    _, metric_fn = resolve_metric(metric, task)
    groups = task.by_length()
    parts = []
    with progress_bar(len(task) * len(sets), "patching together", "run", progress=progress) as bar:
        for group in groups:
            for rows in batches(len(group), group.clean.shape[1], batch_size):
                prompts = group[rows]
                read = reading(metric_fn, prompts)
                parts.append(_effects_on(model, prompts, sets, direction, read, batch_size))
                bar.update(len(prompts) * len(sets))
    order = torch.cat([group.index for group in groups]).argsort()
    effects, clean, corrupted = (torch.cat(several)[order] for several in zip(*parts, strict=True))
    return effects, clean, corrupted


def _effects_on(
    model: Model, prompts: Task, sets: Sequence[Nodes], direction: Direction, read: Reading, batch_size: int | None
) -> tuple[Float[Tensor, "prompt set"], Float[Tensor, " prompt"], Float[Tensor, " prompt"]]:
    """The same on prompts of one length."""
    denoising = direction == "denoise"
    base, other = (prompts.corrupted, prompts.clean) if denoising else (prompts.clean, prompts.corrupted)
    writers = {node: Writer.parse(node) for one in sets for node in one}
    sites = list(dict.fromkeys(writer.site for writer in writers.values()))
    logits, cache = model.run_with_cache(other, sites, logits_to_keep=1)
    other_metric = read.of_all(logits[:, -1], torch.arange(len(prompts)))
    variants = [
        Variant(prompt, _edits([writers[node] for node in one], cache, prompt))
        for prompt in range(len(prompts))
        for one in [(), *sets]
    ]
    values = sweep(model, base, variants, read, columns=read.columns, batch_size=batch_size, progress=False).reshape(
        len(prompts), -1
    )
    # Each prompt's first variant has no edits: what has no effect has the same value to the last bit.
    unpatched, patched = values[:, 0], values[:, 1:]
    if denoising:
        return patched - unpatched[:, None], other_metric, unpatched
    return unpatched[:, None] - patched, unpatched, other_metric


def _edits(writers: Sequence[Writer], source: Cache, prompt: int) -> tuple[Edit, ...]:
    """Edits that make each writer what it is in the other run."""
    heads: dict[Site, list[int]] = defaultdict(list)
    for writer in writers:
        heads[writer.site] += [] if writer.head is None else [writer.head]
    return tuple(Edit(site, value=source[site][prompt], heads=some or None) for site, some in heads.items())
