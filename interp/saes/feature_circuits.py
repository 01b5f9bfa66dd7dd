"""Circuits of SAE features: which nodes are kept, and how much of a behaviour they carry by themselves.

`feature_circuit` keeps the nodes of largest effect. `feature_faithfulness` runs the model with every other node
ablated, at several sizes, beside the complement and random nodes of the same number. No edge is cut there: a node that
is kept acts on everything after it. What edges carry, `interp.saes.feature_edges` says.

Source: Marks et al. 2024 (arXiv 2403.19647).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Literal

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float
from numpy import ndarray
from torch import Tensor

from interp.metrics import Metric
from interp.model import Model, Site
from interp.patching.activation import Ablation, resolve_metric
from interp.patching.batching import batches
from interp.patching.labels import provenance
from interp.patching.progress import progress_bar
from interp.saes.feature_effects import ERROR, NodeValues, Placed, check_choice, node_values, place
from interp.saes.sae import SAE
from interp.saes.splice import spliced
from interp.tasks import Task

Errors = Literal["nodes", "keep", "remove"]
ERRORS: tuple[Errors, ...] = ("nodes", "keep", "remove")
THRESHOLD = 0.1
"""Of the magnitude of effects, in the unit of the metric (Marks et al.: 0.1 to 0.2 of a difference of logits)."""

Kept = Mapping[Site, Bool[Tensor, "*pos node"]]
Fill = Mapping[Site, NodeValues]


def feature_circuit(
    effects: xr.DataArray, *, n: int | None = None, threshold: float = THRESHOLD, errors: Errors = "nodes"
) -> xr.DataArray:
    """The nodes of largest effect by magnitude, as a mask with the dims and labels of the effects.

    Args:
        effects: of `feature_effects`.
        n: how many to keep; of equal effects the earlier node. None: all above the threshold.
        threshold: of the magnitude, in the unit of the effects.
        errors: "nodes": errors of SAEs are kept or left out like features; "keep": all are in the circuit, beside the n
            features; "remove": none is.

    Raises:
        ValueError: if there are not so many nodes, or for another choice of errors.
    """
    check_choice("errors", errors, ERRORS)
    ranked = _ranked(effects, errors)
    if n is None:
        kept = ranked > threshold
    else:
        n_ranked = int((ranked > -np.inf).sum())
        if not 0 <= n <= n_ranked:
            raise ValueError(f"n={n} is outside 0..{n_ranked}, the nodes that there are")
        kept = np.zeros(ranked.size, dtype=bool)
        kept[np.argsort(-ranked, axis=None, kind="stable")[:n]] = True
        kept = kept.reshape(ranked.shape)
    if errors == "keep":
        kept = kept | _is_error(effects)
    chosen = {"errors": errors, **({"threshold": threshold} if n is None else {"n": n})}
    return effects.copy(data=kept).rename("kept").assign_attrs(chosen)


def nodes_of(circuit: xr.DataArray) -> list[tuple[str, int, int | None]]:
    """The nodes of a circuit as (site, feature, position); feature −1 is the error, position None: all."""
    sites, features = circuit["site"].values, circuit["feature"].values
    positions = circuit["position"].values if "position" in circuit.dims else [None]
    places = np.argwhere(np.atleast_2d(circuit.values))
    return [
        (str(sites[node]), int(features[node]), None if positions[at] is None else int(positions[at]))
        for at, node in places
    ]


@torch.no_grad()
def feature_faithfulness(
    model: Model,
    task: Task,
    saes: SAE | Sequence[SAE],
    effects: xr.DataArray,
    sizes: Sequence[int],
    *,
    ablation: Ablation = "mean",
    errors: Errors = "nodes",
    n_random: int = 3,
    metric: str | Metric | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> xr.Dataset:
    """How much of a behaviour the n nodes of largest effect carry, for several n; and what is left without them.

    faithfulness = (m(circuit) − m(∅)) / (m(model) − m(∅)), of mean metrics m over the clean prompts; in ∅ every node
    that can be ablated is. Completeness is the faithfulness of all nodes but the circuit's: the lower, the more the
    circuit has of what matters. Errors are those of the run itself, which may have another input than the model's.

    Costs a forward pass of all prompts for each size, twice, and for each random circuit; and one of the corrupted
    prompts. Holds batch x position x d_sae floats of every SAE.

    Args:
        model: the model.
        task: prompts with answers; others than those of the effects, if the circuit is to generalise.
        saes: the SAEs of the effects.
        effects: of `feature_effects`, with positions or without.
        sizes: numbers of nodes.
        ablation: what nodes outside carry: their "mean" over the corrupted prompts (of the same length) at each
            position; "resample", what they carry in the corrupted prompt; "zero". All but "resample" also take away
            what a clean prompt shares with its corrupted twin, which effects between these two say nothing about.
        errors: "nodes": errors of SAEs are nodes like features; "keep": they are never ablated, and only features are
            counted; "remove": they are always ablated, so that even all features together may not reach 1.
        n_random: random circuits of each size, drawn among the nodes that have an effect; a size beyond them takes all.
        metric: name in `interp.metrics.METRICS` or a function; the task's own by default.
        seed: of the random circuits.
        batch_size: prompts a pass; by default about a thousand tokens' worth.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        Dataset over [size]: `faithfulness`, `completeness`, `metric`, `metric_complement`; and over [draw, size]:
        `random`, the faithfulness of random circuits. Attrs hold `metric_model` and `metric_empty`.

    Raises:
        ValueError: for an unknown choice, effects of other SAEs or other positions, sizes that there are not, or if
            model and ∅ have the same metric.
        FloatingPointError: if a metric is NaN or infinite.

    Source: Marks et al. 2024 (arXiv 2403.19647). Checked on a wired model in tests/saes/test_feature_circuits.py.
    """
    started = time.perf_counter()
    check_choice("ablation", ablation, ("mean", "resample", "zero"))
    placed = place(model, saes)
    check_nodes(effects, placed, task)
    name, metric_fn = resolve_metric(metric, task)
    counts = sorted(sizes)
    circuits = [feature_circuit(effects, n=count, errors=errors).values for count in counts]
    lowest, highest = _bounds(effects, errors)
    random = [one for draw in range(n_random) for one in _random_circuits(effects, counts, errors, (seed, draw))]
    masks = np.stack([lowest, *circuits, *((highest & ~kept) | lowest for kept in circuits), *random])
    whole, found = _mean_metrics(model, task, placed, masks, metric_fn, ablation, batch_size, progress)
    empty, *others = found
    if whole == empty:
        raise ValueError(f"the metric {name!r} is the same for the model and with all nodes ablated: no behaviour")
    values = np.array(others).reshape(2 + n_random, len(counts))
    shares = (values - empty) / (whole - empty)
    data = {
        "faithfulness": ("size", shares[0]),
        "completeness": ("size", shares[1]),
        "metric": ("size", values[0]),
        "metric_complement": ("size", values[1]),
        "random": (("draw", "size"), shares[2:]),
    }
    attrs = {
        **provenance(model, task),
        "method": str(effects.attrs.get("method", "")),
        "metric": name,
        "ablation": ablation,
        "errors": errors,
        "random_seed": seed,
        "metric_model": whole,
        "metric_empty": empty,
        "seconds": time.perf_counter() - started,
    }
    return xr.Dataset(data, coords={"size": counts, "draw": range(n_random)}, attrs=attrs)


def ablated(model: Model, placed: Sequence[Placed], kept: Kept, fill: Fill) -> AbstractContextManager[None]:
    """Every run inside has the nodes that are not kept at other values; numbers are the model's own if all are kept.

    Args:
        model: the model.
        placed: the SAEs.
        kept: by input site of an SAE, which nodes go on as they are, with a position axis or without.
        fill: what the others carry, with a batch axis of the run's length or 1.
    """

    def features(site: Site, found: Tensor) -> Tensor:
        return torch.where(kept[site][..., :-1], found, fill[site].features)

    def error(site: Site, found: Tensor) -> Tensor:
        return torch.where(kept[site][..., -1:], found, fill[site].error)

    return spliced(model, [one.sae for one in placed], features=features, errors=error)


def _is_error(effects: xr.DataArray) -> Bool[ndarray, "*pos node"]:
    return np.broadcast_to(effects["feature"].values == ERROR, effects.shape)


def _ranked(effects: xr.DataArray, errors: Errors) -> Float[ndarray, "*pos node"]:
    """Magnitudes; −inf for errors where they are no matter of choice."""
    magnitude = np.abs(effects.values)
    return magnitude if errors == "nodes" else np.where(_is_error(effects), -np.inf, magnitude)


def _bounds(effects: xr.DataArray, errors: Errors) -> tuple[Bool[ndarray, "*pos node"], Bool[ndarray, "*pos node"]]:
    """The smallest and the largest circuit."""
    is_error = _is_error(effects)
    nothing, everything = np.zeros_like(is_error), np.ones_like(is_error)
    return (is_error if errors == "keep" else nothing), (~is_error if errors == "remove" else everything)


def _random_circuits(
    effects: xr.DataArray, counts: Sequence[int], errors: Errors, seed: tuple[int, int]
) -> Iterator[Bool[ndarray, "*pos node"]]:
    """Nested circuits of these sizes, of nodes in one random order."""
    lowest, _ = _bounds(effects, errors)
    order = np.random.default_rng(seed).permutation(np.flatnonzero(_ranked(effects, errors) > 0))
    for count in counts:
        kept = lowest.copy()
        kept.flat[order[:count]] = True
        yield kept


def check_nodes(effects: xr.DataArray, placed: Sequence[Placed], task: Task) -> None:
    """Raise a ValueError if effects, or a circuit, are not of these SAEs or not of prompts as long as the task's."""
    expected = [(str(one.source), feature) for one in placed for feature in (*range(one.sae.d_sae), ERROR)]
    if list(zip(effects["site"].values, effects["feature"].values, strict=True)) != expected:
        found = ", ".join(dict.fromkeys(map(str, effects["site"].values)))
        raise ValueError(f"these nodes are of other SAEs (sites {found}): give those that they were computed with")
    lengths = {len(ids) for ids in task.clean_ids}
    if "position" in effects.dims and lengths != {effects.sizes["position"]}:
        others = ", ".join(map(str, sorted(lengths)))
        raise ValueError(
            f"these nodes are for prompts of {effects.sizes['position']} tokens; the task has prompts of {others}: "
            "use by_position=False"
        )


def _mean_metrics(
    model: Model,
    task: Task,
    placed: Sequence[Placed],
    masks: Bool[ndarray, "circuit *pos node"],
    metric: Metric,
    ablation: Ablation,
    batch_size: int | None,
    progress: bool | None,
) -> tuple[float, list[float]]:
    """Mean metric over the clean prompts of the model, and of each circuit."""
    widths = [one.n_nodes for one in placed]
    total = torch.zeros(1 + len(masks), dtype=torch.float64)
    with progress_bar(len(masks) * len(task), "feature circuits", "run", progress=progress) as bar:
        for group in task.by_length():
            cuts = list(batches(len(group), len(group.clean_ids[0]), batch_size))
            mean = _mean_values(model, placed, [group[rows] for rows in cuts]) if ablation == "mean" else None
            for prompts in (group[rows] for rows in cuts):
                fill = mean or _corrupted_values(model, placed, prompts, zero=ablation == "zero")
                total[0] += _summed_metric(model, prompts, metric)
                for number, mask in enumerate(masks, start=1):
                    parts = torch.from_numpy(mask).to(model.device).split(widths, dim=-1)
                    kept = {one.source: part for one, part in zip(placed, parts, strict=True)}
                    with ablated(model, placed, kept, fill):
                        total[number] += _summed_metric(model, prompts, metric)
                    bar.update(len(prompts))
    if not bool(total.isfinite().all()):
        raise FloatingPointError("the metric of a feature circuit is NaN or infinite: check metric, weights, dtype")
    whole, *found = (total / len(task)).tolist()
    return whole, found


def _summed_metric(model: Model, prompts: Task, metric: Metric) -> Float[Tensor, ""]:
    logits = model(prompts.clean, logits_to_keep=1)[:, -1]
    values = metric(logits, prompts.answers.to(logits.device), prompts.wrong.to(logits.device))
    return values.double().sum().cpu()


def _corrupted_values(model: Model, placed: Sequence[Placed], prompts: Task, *, zero: bool = False) -> Fill:
    """What nodes carry in the corrupted run of these prompts; or zeros of the same shapes."""
    sites = list(dict.fromkeys(site for one in placed for site in (one.source, one.target)))
    _, activations = model.run_with_cache(prompts.corrupted, sites, logits_to_keep=1)
    values = {one.source: node_values(one, activations) for one in placed}
    if zero:
        return {site: NodeValues(*map(torch.zeros_like, several)) for site, several in values.items()}
    return values


def _mean_values(model: Model, placed: Sequence[Placed], several: Sequence[Task]) -> Fill:
    """Mean over corrupted prompts of one length, at each position."""
    total: dict[Site, NodeValues] = {}
    for prompts in several:
        for site, values in _corrupted_values(model, placed, prompts).items():
            summed = [one.sum(0, keepdim=True) for one in values]
            before = total.get(site, NodeValues(*map(torch.zeros_like, summed)))
            total[site] = NodeValues(before.features + summed[0], before.error + summed[1])
    n_prompts = sum(map(len, several))
    return {site: NodeValues(*(one / n_prompts for one in values)) for site, values in total.items()}
