"""Edges between the nodes of a feature circuit: what a node does to the behaviour directly through a later node.

The weight of the edge from u to d is (∂m/∂d) · (∂d/∂u) · (what u loses): that share of the effect of u which goes
through d and through no other SAE on the way.

1. ∂m/∂d and what u loses are those of the effects of nodes (`interp.saes.feature_effects`).
2. One more run of the clean prompts goes on, at the site of every SAE, from a constant of the same value. So a gradient
   ends at the first SAE that it meets, and the derivative left of u is that of direct ways: through the stream, and
   through attention and MLPs that have no SAE.
3. One backward pass for each kept node d, through its own encoder to the sites of all kept nodes u at once; and one for
   the metric itself.

With SAEs on all of resid, attn_out and mlp_out these are the edges as published: mlp → resid, attn → resid, attn → mlp,
and resid → attn, mlp and resid of the next layer, each with gradients stopped at the others. In a block with parallel
attention no way leads from attention to the MLP, and there is no edge.

Source: Marks et al. 2024 (arXiv 2403.19647), whose weights have the opposite sign.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor
from tqdm.auto import tqdm

from interp.metrics import Metric
from interp.model import Model, Site
from interp.model.hooks import Run, Tap, tapped
from interp.patching.activation import normalised_shares
from interp.patching.batching import batches
from interp.patching.estimate import widened
from interp.patching.integrated import Rule
from interp.patching.labels import provenance
from interp.patching.progress import progress_bar
from interp.saes.feature_circuits import check_nodes
from interp.saes.feature_effects import (
    ERROR,
    Change,
    Estimate,
    Method,
    NodeValues,
    Patch,
    Placed,
    changes,
    prepared_estimate,
    products,
)
from interp.saes.sae import SAE, from_rows, to_rows
from interp.tasks import Task

METRIC = "metric"
"""The `downstream_site` of edges that lead to the metric itself."""

End = tuple[Tensor, Tensor]
"""Where a backward pass begins: a tensor of the run, and the gradient that comes to it."""


@dataclass(frozen=True)
class _Kept:
    """The kept nodes of one SAE, in the order: by position, then by feature, the error last."""

    one: Placed
    features: Int[Tensor, " feature"]
    """Those kept at some position."""
    mask: Bool[Tensor, "place column"]
    """Which are kept where: a column for each of these features, then the error's; one place if positions are summed.
    """
    nodes: slice
    """Their places among all kept nodes."""

    def names(self, positions: Sequence[int]) -> list[tuple[str, int, int]]:
        """(site, feature, position) of each."""
        columns = [*self.features.tolist(), ERROR]
        found = self.mask.nonzero().tolist()
        return [(str(self.one.source), columns[column], positions[place]) for place, column in found]


@dataclass(frozen=True)
class _Found:
    """Weights, and what was measured on the way."""

    weights: Float[Tensor, "downstream upstream"]
    """Between kept nodes; the last downstream is the metric."""
    reached: Bool[Tensor, "downstream upstream"]
    """Which edges there are."""
    clean: Float[Tensor, " prompt"]
    corrupted: Float[Tensor, " prompt"]


def feature_edges(
    model: Model,
    task: Task,
    saes: SAE | Sequence[SAE],
    circuit: xr.DataArray,
    *,
    method: Method = "attribution",
    patch: Patch = "corrupted",
    steps: int = 10,
    rule: Rule = "midpoint",
    rules: str | Sequence[str] = "relp",
    metric: str | Metric | None = None,
    normalised: bool = False,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> xr.DataArray:
    """Weights of the edges between kept nodes, and from them to the metric; mean over prompts.

    Costs what the effects of nodes cost, one forward pass, and one backward pass for each kept node (of a feature that
    is inactive in a batch of prompts: none), which ends at the first kept SAE of the model. Holds the activations of
    one forward pass of a batch, and n_nodes² floats.

    All edges into the features and the error of every SAE, together with the edge to the metric, add up to the effect
    of the node where they begin, to first order exactly (for "ig", whose ∂m/∂d are means, nearly; with skip
    transcoders, but for what their skip connections carry).

    Args:
        model: the model.
        task: clean and corrupted prompts with answers.
        saes: the SAEs of the circuit.
        circuit: kept nodes, of `feature_circuit`; with positions, or with positions summed at both ends of an edge.
        method: where ∂m/∂d comes from, as in `feature_effects`: give that of the effects. Under "relp" the derivatives
            between nodes follow the rules too; features are linear for the set of active ones in any case.
        patch: what nodes are compared with, as in `feature_effects`.
        steps: points of integrated gradients.
        rule: where they lie.
        rules: relevance rules of "relp".
        metric: name in `interp.metrics.METRICS` or a function, with a gradient; the task's own by default.
        normalised: divide by the mean over prompts of metric(clean) − metric(corrupted).
        batch_size: prompts a pass; by default about a thousand tokens' worth.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        Array over [edge], of largest magnitude first, positive where the edge supports the behaviour. Beside `edge`
        stand `upstream_site`, `upstream_feature` (−1: the error) and, with positions, `upstream_position` and
        `upstream_label`; the same for `downstream`, whose site is "metric" (feature 0, last position) for what reaches
        the metric through no later SAE. A pair is absent where nothing leads from one to the other, or the later
        feature is active in no clean prompt: where the derivative at the earlier site is 0 in all directions and
        prompts.

    Raises:
        ValueError: for an unknown choice, a circuit without nodes, of other SAEs or positions, or a metric without a
            gradient.
        FloatingPointError: if a run or a weight is NaN or infinite.

    Source: Marks et al. 2024 (arXiv 2403.19647). Checked against finite differences of frozen runs, and against effects
    of nodes, in tests/saes/test_feature_edges.py.
    """
    started = time.perf_counter()
    by_position = "position" in circuit.dims
    chosen = prepared_estimate(
        model,
        task,
        saes,
        method=method,
        patch=patch,
        by_position=by_position,
        through="site",
        steps=steps,
        rule=rule,
        rules=rules,
        metric=metric,
        normalised=normalised,
        batch_size=batch_size,
        progress=progress,
    )
    check_nodes(circuit, chosen.placed, task)
    kept = _kept_nodes(circuit, chosen.placed)
    found = _mean_weights(chosen, kept)
    weights = found.weights
    if normalised:
        gap = found.clean.mean(0, keepdim=True), found.corrupted.mean(0, keepdim=True)
        weights = normalised_shares(weights[None], *gap, chosen.asked.metric_name)[0]
    attrs = {
        **provenance(model, task),
        **chosen.said,
        "n_nodes": weights.shape[1],
        "metric_clean": float(found.clean.mean()),
        "metric_corrupted": float(found.corrupted.mean()),
        "seconds": time.perf_counter() - started,
    }
    return _labelled(weights, found.reached, kept, task, attrs, by_position=by_position)


def _kept_nodes(circuit: xr.DataArray, placed: Sequence[Placed]) -> list[_Kept]:
    """The kept nodes of each SAE that has some."""
    if circuit.dtype != bool:
        raise ValueError(f"circuit holds {circuit.dtype}: give the kept nodes, feature_circuit(effects, ...)")
    kept: list[_Kept] = []
    n_nodes = 0
    parts = torch.from_numpy(np.atleast_2d(circuit.values)).split([one.n_nodes for one in placed], dim=-1)
    for one, part in zip(placed, parts, strict=True):
        features = part[:, :-1].any(0).nonzero()[:, 0]
        mask = torch.cat([part[:, features], part[:, -1:]], dim=-1)
        n_here = int(mask.sum())
        if n_here:
            kept.append(_Kept(one, features.to(one.sae.device), mask, slice(n_nodes, n_nodes + n_here)))
            n_nodes += n_here
    if not kept:
        raise ValueError("the circuit has no nodes, so there are no edges: keep more, or lower its threshold")
    return kept


def _mean_weights(estimate: Estimate, kept: Sequence[_Kept]) -> _Found:
    """Over all prompts; a mean."""
    asked = estimate.asked
    found = []
    n_steps = len(asked.task) * (kept[-1].nodes.stop + 1)
    with progress_bar(n_steps, "feature edges", "node", progress=asked.progress) as bar:
        for group in asked.task.by_length():
            for rows in batches(len(group), len(group.clean_ids[0]), asked.batch_size):
                found.append(_batch_weights(estimate, kept, group[rows], bar))
    weights = torch.stack([one.weights for one in found]).sum(0) / len(asked.task)
    if not bool(weights.isfinite().all()):
        raise FloatingPointError("weights of edges are NaN or infinite: check metric, SAE and model weights, dtype")
    reached = torch.stack([one.reached for one in found]).any(0)
    clean, corrupted = torch.cat([one.clean for one in found]), torch.cat([one.corrupted for one in found])
    return _Found(weights, reached, clean, corrupted)


def _batch_weights(estimate: Estimate, kept: Sequence[_Kept], prompts: Task, bar: tqdm) -> _Found:
    """Summed over the prompts of one batch."""
    n_nodes = kept[-1].nodes.stop
    weights = torch.zeros(n_nodes + 1, n_nodes, dtype=torch.float64)
    reached = torch.zeros(n_nodes + 1, n_nodes, dtype=torch.bool)
    found, clean, corrupted = changes(estimate, prompts, [one.one for one in kept])
    here = [_restricted(change, one.features) for one, change in zip(kept, found, strict=True)]
    with estimate.within():
        run = _CutRun(estimate, prompts, kept)
        for row, ends in enumerate(_all_ends(run, here, kept)):
            for one, change, gradient in zip(kept, here, run.back(ends), strict=True):
                if gradient is not None:
                    weights[row, one.nodes] += _weights(one, change.lost, gradient, estimate.by_position)
                    reached[row, one.nodes] |= _reached(one, gradient)
            bar.update(len(prompts))
    return _Found(weights, reached, clean.cpu(), corrupted.cpu())


def _restricted(change: Change, features: Int[Tensor, " feature"]) -> Change:
    """What these features alone and the error lose."""
    return change._replace(lost=NodeValues(change.lost.features[..., features], change.lost.error))


def _weights(
    one: _Kept, lost: NodeValues, gradient: Float[Tensor, "batch pos d_out"], by_position: bool
) -> Float[Tensor, " node"]:
    """Of the edges from the kept nodes of one SAE, summed over prompts."""
    found = products(one.one.sae.W_dec[one.features], lost, gradient, by_position=by_position)
    return found.reshape(one.mask.shape)[one.mask]


def _reached(one: _Kept, gradient: Float[Tensor, "batch pos d_out"]) -> Bool[Tensor, " node"]:
    """Whether the gradient at the position of each kept node is not 0 in all directions and prompts."""
    at = (gradient != 0).any(-1).any(0).cpu()
    return (at if len(one.mask) > 1 else at.any(0, keepdim=True))[:, None].expand_as(one.mask)[one.mask]


class _CutRun:
    """One run of the clean prompts in which no gradient passes the site of an SAE.

    Args:
        estimate: the choices of the call; its context is in force.
        prompts: prompts of one length.
        kept: the SAEs whose sites gradients are asked for, with their kept nodes.
    """

    def __init__(self, estimate: Estimate, prompts: Task, kept: Sequence[_Kept]) -> None:
        model, self._arriving = estimate.asked.model, dict[Site, Tensor]()
        self._kept = kept
        targets = [one.target for one in estimate.placed]
        with tapped(model.anatomy, [Tap(site, self._cut(site)) for site in targets]):
            logits, self._leaving = model.run_on_path(prompts.clean, estimate.sites, logits_to_keep=1)
        with torch.enable_grad():
            self.metric = estimate.asked.score(logits[:, -1], prompts)

    def _cut(self, site: Site) -> Callable[[Tensor, Run], Tensor]:
        def tap(activation: Tensor, run: Run) -> Tensor:
            # A copy: some sites are written in place.
            self._arriving[site] = activation.clone()
            return activation.detach()

        return tap

    def source(self, one: Placed) -> Tensor:
        """What the encoder of an SAE reads."""
        return self._arriving[one.source] if one.source == one.target else self._leaving[one.source]

    def target(self, one: Placed) -> Tensor:
        """What the model has computed at the site that an SAE stands for."""
        return self._arriving[one.target]

    def back(self, ends: Sequence[End]) -> list[Float[Tensor, "batch pos d_out"] | None]:
        """Gradients at the sites of the kept SAEs, in float32 at least; None where nothing leads from there."""
        sites = [one.one.target for one in self._kept]
        used = [(tensor, gradient) for tensor, gradient in ends if tensor.requires_grad and bool(gradient.any())]
        if not used:
            return [None] * len(sites)
        tensors, gradients = zip(*used, strict=True)
        leaves = [self._leaving[site] for site in sites]
        found = torch.autograd.grad(tensors, leaves, gradients, retain_graph=True, allow_unused=True)
        return [None if one is None else widened(to_rows(site, one)) for site, one in zip(sites, found, strict=True)]


def _all_ends(run: _CutRun, here: Sequence[Change], kept: Sequence[_Kept]) -> Iterator[Sequence[End]]:
    """Where the backward passes of all kept nodes begin, in their order; and last, that of the metric."""
    for one, change in zip(kept, here, strict=True):
        for place, columns in enumerate(one.mask):
            at = slice(place, place + 1) if len(one.mask) > 1 else slice(None)
            if bool(columns.any()):
                yield from _ends_at(run, change, one, at, columns.nonzero()[:, 0].tolist())
    yield [(run.metric, torch.ones_like(run.metric))]


def _ends_at(run: _CutRun, change: Change, kept: _Kept, at: slice, columns: Sequence[int]) -> Iterator[Sequence[End]]:
    """Those of kept nodes of one SAE at some positions: the gradient of each, taken back through the encoder.

    A token's features depend on that token alone, so the encoder sees no others.
    """
    one = change.one
    sae, source, target = one.sae, run.source(one), run.target(one)
    gradient = change.gradient[:, at].to(sae.dtype)
    with torch.enable_grad():
        x = to_rows(one.source, source)[:, at].detach().to(sae.dtype).requires_grad_()
        features = sae.encode(x)
        reconstruction = sae.decode(features, x)
    for column in columns:
        if column < len(kept.features):
            feature = int(kept.features[column])
            share = gradient @ sae.W_dec[feature].detach()
            (back,) = torch.autograd.grad(features[..., feature], x, share, retain_graph=True)
            yield [(source, _placed(one.source, back, at, source))]
        else:
            (back,) = torch.autograd.grad(reconstruction, x, -gradient, retain_graph=True)
            yield [
                (source, _placed(one.source, back, at, source)),
                (target, _placed(one.target, gradient, at, target)),
            ]


def _placed(site: Site, rows: Float[Tensor, "batch pos width"], at: slice, like: Tensor) -> Tensor:
    """Rows at these positions and 0 elsewhere, in the shape of the activation."""
    wide = torch.zeros_like(to_rows(site, like))
    wide[:, at] = rows.to(wide.dtype)
    return from_rows(site, wide, like)


def _labelled(
    weights: Float[Tensor, "downstream upstream"],
    reached: Bool[Tensor, "downstream upstream"],
    kept: Sequence[_Kept],
    task: Task,
    attrs: Mapping[str, object],
    *,
    by_position: bool,
) -> xr.DataArray:
    """The edges that there are, strongest first."""
    length = len(task.clean_ids[0])
    positions = range(length) if by_position else [0]
    names = [name for one in kept for name in one.names(positions)]
    names.append((METRIC, 0, length - 1))
    downstream, upstream = reached.nonzero().numpy().T
    values = weights.numpy()[downstream, upstream]
    order = np.argsort(-np.abs(values), kind="stable")
    coords: dict[str, tuple[str, ndarray]] = {}
    for side, nodes in (("upstream", upstream[order]), ("downstream", downstream[order])):
        sites, features, places = (np.array(column) for column in zip(*names, strict=True))
        coords |= {f"{side}_site": ("edge", sites[nodes]), f"{side}_feature": ("edge", features[nodes])}
        if by_position:
            coords[f"{side}_position"] = ("edge", places[nodes])
            coords[f"{side}_label"] = ("edge", np.array(task.position_labels)[places[nodes]])
    return xr.DataArray(
        values[order].astype(np.float32),
        dims=("edge",),
        coords={"edge": range(len(order)), **coords},
        name="weight",
        attrs=dict(attrs),
    )
