"""AtP*: attribution patching with exact softmaxes for queries and keys, and gradients without one layer at a time.

1. Queries and keys: the pattern that the other run's query (or key) makes is computed exactly, and only what follows
   the pattern is taken to first order (`query_key_fix`). All other sites: difference times gradient.
2. Cancellation: the gradient is taken once with each layer's outputs left out (`gradient_drop`), and magnitudes are
   averaged.

`qk_fixed_patching` is the first step alone, signed; `atp_star` both, as published.

Source: Kramár et al. 2024 (arXiv 2403.00745).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor, nn

from interp.metrics import Metric
from interp.model import Model, Site
from interp.model.attention import AttentionCall, AttentionResult, attention_scores, attention_wrapped
from interp.patching.activation import Direction
from interp.patching.cells import Axis
from interp.patching.estimate import (
    BatchScores,
    Pair,
    Request,
    as_measured,
    collect,
    request,
    run_other,
    run_pair,
    widened,
)
from interp.patching.gradient_drop import INSIDE_A_LAYER, DroppedLayers
from interp.patching.query_key_fix import keys_fixed, rows_fixed
from interp.patching.verify import verified_top
from interp.tasks import Task

QUERIES, KEYS = ("q", "rot_q"), ("k", "rot_k")


def qk_fixed_patching(
    model: Model,
    task: Task,
    *,
    site: str,
    by: Sequence[Axis] = ("layer", "position"),
    direction: Direction = "denoise",
    metric: str | Metric | None = None,
    normalised: bool = True,
    per_prompt: bool = False,
    verify: int | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> xr.DataArray:
    """Attribution patching in which changed queries and keys go through the softmax exactly (AtP* without GradDrop).

    A gradient says nothing of a saturated softmax. For sites other than q, k, rot_q and rot_k this is
    `attribution_patching`. Keys are changed one position at a time if `by` keeps the position, else all at once, as in
    the exact patch. Where one norm spans all heads (OLMo-2), the rotated query or key of the other run is put in as it
    was scaled there.

    Costs two forward passes and one backward pass.

    Args:
        model: the model; for q and k its attention must go through transformers' interface.
        task: clean and corrupted prompts with answers.
        site: a kind of site ("q", "k", "z", ...).
        by: the axes kept, as in `activation_patching`.
        direction: as in `activation_patching`; the gradient is taken at the base run.
        metric: as in `activation_patching`; it needs a gradient.
        normalised: as in `activation_patching`.
        per_prompt: keep a leading `prompt` axis instead of averaging over prompts.
        verify: re-compute this many entries of largest magnitude exactly: see `verified_top`.
        batch_size: prompts a pass; by default about a thousand tokens' worth.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        An array with the dims, sign and scale of `activation_patching`.

    Raises:
        ValueError: for an axis that the site does not have, or a metric without a gradient.
        FloatingPointError: if a run or a score is NaN or infinite.
    """
    asked = request(
        model,
        task,
        sites=[site],
        by=by,
        direction=direction,
        metric=metric,
        normalised=normalised,
        per_prompt=per_prompt,
        batch_size=batch_size,
        progress=progress,
    )
    return verified_top(asked, qk_fixed_scores(asked), verify)[site]


def atp_star(
    model: Model,
    task: Task,
    *,
    site: str,
    by: Sequence[Axis] = ("layer", "position"),
    direction: Direction = "denoise",
    metric: str | Metric | None = None,
    normalised: bool = True,
    per_prompt: bool = False,
    verify: int | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> xr.DataArray:
    """AtP* as published: mean over prompts of the magnitude of the effect, with the QK fix and GradDrop. Unsigned.

    A score is the mean over prompts and left-out layers of |estimate|; the layer that holds the site itself, whose
    share is 0, is not counted. Hold it against magnitudes of exact effects (`agreement` does).

    Costs two forward passes and one backward pass for each layer of the model.

    Args:
        model: a model of two layers at least; for q and k its attention must go through transformers' interface.
        task: clean and corrupted prompts with answers.
        site: a kind of site ("q", "k", "z", "mlp_post", ...).
        by: the axes kept; what is patched together is added up before the magnitude is taken.
        direction: as in `activation_patching`; the paper's is "noise".
        metric: as in `activation_patching`; it needs a gradient.
        normalised: divide by the magnitude of the mean of metric(clean) − metric(corrupted).
        per_prompt: keep a leading `prompt` axis instead of averaging over prompts.
        verify: as in `qk_fixed_patching`.
        batch_size: prompts a pass; by default about a thousand tokens' worth.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        Magnitudes with the dims of `activation_patching`; attrs say `unsigned`.

    Raises:
        ValueError: as `qk_fixed_patching`, and for a model of one layer, which has no other to leave out.
        FloatingPointError: if a run or a score is NaN or infinite.
    """
    asked = request(
        model,
        task,
        sites=[site],
        by=by,
        direction=direction,
        metric=metric,
        normalised=normalised,
        per_prompt=per_prompt,
        batch_size=batch_size,
        progress=progress,
    )
    return verified_top(asked, atp_star_scores(asked), verify)[site]


def qk_fixed_scores(asked: Request) -> dict[str, xr.DataArray]:
    """`qk_fixed_patching` of all sites asked for, in one backward pass."""

    def run_batch(prompts: Task) -> BatchScores:
        softmaxes = _Softmaxes(asked.model)
        pair = run_pair(asked, prompts, _sites_read(asked), within=softmaxes.recorded)
        return BatchScores(_scores(asked, pair, softmaxes), *pair.clean_and_corrupted)

    return collect(asked, run_batch, method="qk_fixed_patching")


def atp_star_scores(asked: Request) -> dict[str, xr.DataArray]:
    """`atp_star` of all sites asked for, from one forward pass of the base run.

    Raises:
        ValueError: for a model of one layer.
    """
    n_layers = asked.model.n_layers
    if n_layers < 2:
        raise ValueError("GradDrop leaves out one layer at a time, and this model has only one: use qk_fixed_patching")

    def run_batch(prompts: Task) -> BatchScores:
        softmaxes = _Softmaxes(asked.model)
        sites = _sites_read(asked)
        base_tokens, others, other_metric = run_other(asked, prompts, sites)
        with softmaxes.recorded():
            dropped = DroppedLayers(asked.model, base_tokens, lambda logits: asked.score(logits, prompts), sites)
        pair = Pair(dropped.activations, others, {}, dropped.values, other_metric, asked.denoising)
        totals: dict[str, Tensor] = {}
        for gradient in dropped.gradients():
            for name, scores in _scores(asked, replace(pair, gradient=gradient), softmaxes).items():
                totals[name] = totals.get(name, torch.zeros(())) + scores.abs()
        means = {name: total / _n_counted(asked, name) for name, total in totals.items()}
        return BatchScores(means, *pair.clean_and_corrupted)

    return collect(asked, run_batch, method="atp_star", unsigned=True)


def _n_counted(asked: Request, name: str) -> int:
    """How many layers can be left out without leaving out the site itself."""
    kind = asked.sites[name][0].kind
    is_inside = kind in INSIDE_A_LAYER or (kind in ("ln1", "ln2") and not asked.model.tower.post_norm)
    return asked.model.n_layers - is_inside


def _sites_read(asked: Request) -> list[Site]:
    """What has to be kept of the runs: the sites themselves; for queries and keys what makes the pattern."""
    read: list[Site] = []
    for site in asked.all_sites:
        if site.kind in QUERIES + KEYS:
            read += [Site(kind, site.layer, tower=site.tower) for kind in ("rot_q", "rot_k", "pattern")]
        else:
            read.append(as_measured(site))
    return list(dict.fromkeys(read))


def _scores(asked: Request, pair: Pair, softmaxes: _Softmaxes) -> dict[str, Tensor]:
    def of_site(site: Site) -> Tensor:
        if site.kind in QUERIES + KEYS:
            return _query_key_effect(asked, pair, softmaxes, site)
        return pair.first_order(as_measured(site))

    return {name: asked.cells(sites, of_site) for name, sites in asked.sites.items()}


def _query_key_effect(asked: Request, pair: Pair, softmaxes: _Softmaxes, site: Site) -> Tensor:
    """Effect of the query, or key, of each position and head: [batch, position, head, 1]."""
    rot_q, rot_k, pattern = (Site(kind, site.layer, tower=site.tower) for kind in ("rot_q", "rot_k", "pattern"))
    softmax = softmaxes.of(site)
    query, key = pair.base[rot_q], pair.base[rot_k]
    scores = softmax.scores(query, key)
    if site.kind in QUERIES:
        new_scores = softmax.scores(pair.other[rot_q], key)
    else:
        new_scores = softmax.scores(query, pair.other[rot_k])
    fixed = keys_fixed if site.kind in KEYS and "position" in asked.axes else rows_fixed
    effects = fixed(scores, new_scores, pair.gradient[pattern], softmax.sinks)
    if site.kind in KEYS:
        effects = effects.unflatten(1, (key.shape[2], -1)).sum(2)
    effects = effects.transpose(1, 2)[..., None]
    return effects if pair.denoising else -effects


@dataclass(frozen=True)
class _Softmax:
    """How one attention module makes scores of queries and keys."""

    module: nn.Module
    mask: Tensor | None
    options: Mapping[str, Any]

    @property
    def sinks(self) -> Tensor | None:
        """Learned sink logits, one a head."""
        return self.options.get("s_aux")

    def scores(
        self, query: Float[Tensor, "batch pos head d_head"], key: Float[Tensor, "batch pos kv_head d_head"]
    ) -> Float[Tensor, "batch head query key"]:
        """In float32 at least."""
        query, key = (widened(one).transpose(1, 2) for one in (query, key))
        return attention_scores(self.module, query, key, self.mask, **self.options)


class _Softmaxes:
    """The softmaxes of one run, layer by layer."""

    def __init__(self, model: Model) -> None:
        self._modules = {
            (prefix, block.index): block.attn
            for prefix, tower in model.anatomy.towers.items()
            for block in tower.blocks
        }
        self._used: dict[nn.Module, _Softmax] = {}

    def of(self, site: Site) -> _Softmax:
        """The softmax in the layer of a site."""
        assert site.layer is not None
        return self._used[self._modules[site.tower, site.layer]]

    def recorded(self) -> AbstractContextManager[None]:
        """A context in which the softmaxes of a run are kept."""

        def keep(call: AttentionCall) -> AttentionResult:
            self._used[call.module] = _Softmax(call.module, call.mask, call.options)
            return call.run()

        return attention_wrapped(dict.fromkeys(self._modules.values(), keep))
