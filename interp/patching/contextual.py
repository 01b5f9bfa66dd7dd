"""Contextual decomposition for transformers (CD-T): what sets of nodes contribute to other nodes and to the logits.

1. Run the prompts once; what each source adds there is its relevant part: the activation itself, or the activation less
   a reference (a mean, the corrupted run's).
2. Carry the relevant parts of many sources at once through the model, from the first layer that has a source on, each
   as a further row of the batch (`contextual_rules` has the rules).
3. At the targets, each row is the part of the activation that is due to that source.

No gradients and one forward pass a source at most: between an estimate and an exact run. `contextual_patching` makes
effects of it that can be held against `activation_patching`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from interp.metrics import Metric
from interp.model import Model, Site
from interp.model.anatomy import UnsupportedModel
from interp.model.sites import SITE_DIMS, SitePattern
from interp.patching.activation import Ablation, Direction, _check_choice
from interp.patching.batching import mean_activations
from interp.patching.cells import Axis, Cell, grid
from interp.patching.contextual_rules import Bias, Choice, check_supported
from interp.patching.contextual_run import LOGITS, PartsRun
from interp.patching.estimate import BatchScores, Request, collect, request, widened
from interp.patching.progress import progress_bar
from interp.patching.rules.parts import Parts, parts_of
from interp.tasks import Task

_NO_PARTS = ("attn_scores", "pattern")
"""Inside the softmax, whose rule has no parts to read."""


@dataclass(frozen=True)
class Node:
    """A part of one activation: `Node("blocks.3.attn.hook_z", head=2, position=5)`; what is left out means all."""

    site: str
    position: int | None = None
    head: int | None = None
    neuron: int | None = None


@dataclass(frozen=True)
class Decomposition:
    """Parts of activations by source. Keys are sites, and "logits"."""

    relevant: Mapping[str, Float[Tensor, "source prompt ..."]]
    """What is due to each source."""
    total: Mapping[str, Float[Tensor, "prompt ..."]]
    """The model's own activations."""

    def irrelevant(self, target: str) -> Float[Tensor, "source prompt ..."]:
        """What is due to everything but the source."""
        return self.total[target] - self.relevant[target]

    def relevance(self, target: str) -> Float[Tensor, "source prompt"]:
        """Sum of absolute relevant parts over sum of absolute irrelevant parts: unsigned, as circuits are found by it.

        Source: Hsu et al., ICLR 2025 (arXiv 2407.00886), Eq. 16; the code divides by the sum of both instead.
        """
        own, rest = (widened(part).abs().flatten(2).sum(2) for part in (self.relevant[target], self.irrelevant(target)))
        return own / rest


@torch.no_grad()
def contextual_decomposition(
    model: Model,
    tokens: Int[Tensor, "prompt pos"],
    sources: Sequence[Node | Sequence[Node]],
    *,
    targets: SitePattern = LOGITS,
    reference: Mapping[str, Tensor] | None = None,
    frozen_attention: bool = False,
    sign_fix: bool = False,
    bias: Bias = "shared",
    logits_to_keep: int = 1,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> Decomposition:
    """The part of every target that is due to each source.

    Costs one forward pass a source and prompt at most: only layers from the source on, and no source whose relevant
    part is 0. Holds one copy of the targets a source.

    Args:
        model: a decoder or encoder whose attention goes through transformers' interface, without experts.
        tokens: token ids of prompts of equal length.
        sources: each a node or a set of nodes that count as one source.
        targets: "logits", or sites as `run_with_cache` takes them; a list may hold both.
        reference: by site, what is not relevant at the sources there (a mean, the corrupted run's activation), of any
            shape that broadcasts to the activation's. Sites left out: 0, all of the activation is relevant.
        frozen_attention: take attention patterns as they are (the simple variant of the paper's code for BERT).
            Otherwise relevant patterns are the softmax of the relevant scores.
        sign_fix: where relevant and irrelevant part have opposite signs, give their sum to the larger one. The paper's
            code does this in every MLP and after every residual sum (not after attention); contributions are then no
            longer additive, so it is off by default.
        bias: what becomes of biases: "shared" between the parts by their size, as published, or "irrelevant".
        logits_to_keep: logits of this many last positions; 0: of all.
        batch_size: rows (sources times prompts) a forward pass; by default about a thousand tokens' worth.
        progress: show a progress bar; None: in a terminal or notebook only.

    Raises:
        ValueError: before any run, for an unknown site or one outside the text model, or a node that the site does not
            have.
        NotImplementedError: for mixtures of experts, attention outside transformers' interface, or a module that no
            rule is known for; the message names family and part.
    """
    choice = Choice(frozen_attention, sign_fix, bias)
    cells = [_cell(model, source, tokens.shape[1]) for source in sources]
    sites, with_logits = _targets(model, targets)
    run = PartsRun(model, _parts(model), cells, sites, choice, logits_to_keep, batch_size)
    kept = {Site.parse(name): value for name, value in (reference or {}).items()}
    names = [*sites, *([LOGITS] if with_logits else [])]
    totals: dict[str, list[Tensor]] = {name: [] for name in names}
    relevant: dict[str, list[Tensor]] = {name: [] for name in names}
    with progress_bar(len(cells) * len(tokens), "contextual decomposition", "run", progress=progress) as bar:
        for which in run.prompts(tokens):
            own = run.own(tokens[which], _of_prompts(kept, which))
            for name in names:
                totals[name].append(own.total[name])
                relevant[name].append(own.total[name].new_zeros(len(cells), *own.total[name].shape))
            for chosen, rows in run.parts(own):
                for name in names:
                    if name in rows:
                        relevant[name][-1][chosen] = rows[name]
            bar.update(len(cells) * len(own.tokens))
    return Decomposition(
        {name: torch.cat(parts, dim=1) for name, parts in relevant.items()},
        {name: torch.cat(parts) for name, parts in totals.items()},
    )


def contextual_patching(
    model: Model,
    task: Task,
    *,
    site: str = "z",
    by: Sequence[Axis] = ("layer", "head"),
    direction: Direction = "denoise",
    ablation: Ablation = "resample",
    metric: str | Metric | None = None,
    normalised: bool = True,
    per_prompt: bool = False,
    frozen_attention: bool = False,
    sign_fix: bool = False,
    bias: Bias = "shared",
    batch_size: int | None = None,
    progress: bool | None = None,
) -> xr.DataArray:
    """Effects of patching, estimated by contextual decomposition of the base run.

    The relevant part of a cell is what patching would take away: the activation less its replacement. The estimate is
    the metric with the relevant part of the logits taken away, against the metric of the base run.

    Args:
        model: as in `contextual_decomposition`.
        task: clean and corrupted prompts with answers.
        site: a kind of site with positions ("z", "mlp_out", "resid_pre", ...).
        by: as in `activation_patching`.
        direction: as in `activation_patching`; the base run is the corrupted one for "denoise".
        ablation: as in `activation_patching`: what stands in the place of the activation.
        metric: as in `activation_patching`.
        normalised: as in `activation_patching`.
        per_prompt: as in `activation_patching`.
        frozen_attention: as in `contextual_decomposition`.
        sign_fix: as in `contextual_decomposition`.
        bias: as in `contextual_decomposition`.
        batch_size: rows (cells times prompts) a forward pass.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        DataArray with the dims, sign and scale of `activation_patching`.

    Raises:
        ValueError, NotImplementedError: as `activation_patching` and `contextual_decomposition`.
        FloatingPointError: if a run or a score is NaN or infinite.
    """
    choice = Choice(frozen_attention, sign_fix, bias)
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
    sites = asked.sites[site]
    _check_choice(sites, direction, ablation)
    _check_source_kind(sites[0])
    parts = _parts(model)
    means = mean_activations(model, task.by_length(), sites, batch_size=batch_size) if ablation == "mean" else {}

    def run_batch(prompts: Task) -> BatchScores:
        base, other = (prompts.corrupted, prompts.clean) if asked.denoising else (prompts.clean, prompts.corrupted)
        other_logits, others = model.run_with_cache(other, sites, logits_to_keep=1)
        lengths, cells = grid(sites, asked.axes, others[sites[0]].shape)
        run = PartsRun(model, parts, cells, [], choice, 1, batch_size)
        replacement = {site: others[site] for site in sites} if ablation == "resample" else means
        effects, base_metric = _effects(run, asked, prompts, base, replacement)
        metrics = (base_metric, asked.score(widened(other_logits[:, -1]), prompts))
        return BatchScores({site: effects.unflatten(1, lengths)}, *(metrics[::-1] if asked.denoising else metrics))

    attrs = {"ablation": ablation, "frozen_attention": int(frozen_attention), "sign_fix": int(sign_fix), "bias": bias}
    return collect(asked, torch.no_grad()(run_batch), method="contextual_patching", attrs=attrs)[site]


def _effects(
    run: PartsRun, asked: Request, prompts: Task, base: Int[Tensor, "batch pos"], replacement: Mapping[Site, Tensor]
) -> tuple[Float[Tensor, "batch cell"], Float[Tensor, " batch"]]:
    """Effect of each cell (positive = supports the behaviour), and the metric of the base run."""
    effects = torch.zeros(len(prompts), len(run.cells), dtype=torch.promote_types(asked.model.dtype, torch.float32))
    metrics = []
    for which in run.prompts(base):
        own = run.own(base[which], _of_prompts(replacement, which))
        total = widened(own.total[LOGITS][:, -1])
        unpatched = asked.score(total, prompts[which])
        metrics.append(unpatched)
        for chosen, rows in run.parts(own):
            for cell, part in zip(chosen, widened(rows[LOGITS][:, :, -1]), strict=True):
                change = unpatched - asked.score(total - part, prompts[which])
                effects[which, cell] = (-change if asked.denoising else change).to(effects).cpu()
    return effects, torch.cat(metrics)


def _parts(model: Model) -> Parts:
    """The non-linear parts of a model for which all rules are known.

    Raises:
        NotImplementedError: naming the family and the part.
    """
    try:
        parts = parts_of(model)
    except UnsupportedModel as error:
        raise NotImplementedError(f"contextual decomposition of {model.anatomy.family}: {error}") from error
    check_supported(model, parts)
    return parts


def _cell(model: Model, source: Node | Sequence[Node], length: int) -> Cell:
    """A source as the cell of sites and places that it is.

    Raises:
        ValueError: for a site or a place that does not exist.
    """
    nodes = [source] if isinstance(source, Node) else list(source)
    if not nodes:
        raise ValueError("a source without nodes contributes nothing: give it at least one")
    return tuple((site, _place(model, site, node, length)) for node in nodes for site in model.site_names(node.site))


def _place(model: Model, site: Site, node: Node, length: int) -> dict[str, int]:
    _check_source_kind(site)
    dims = SITE_DIMS[site.kind]
    sizes = {"position": length}
    if "head" in dims:
        sizes["head"] = model.n_heads_at(site.kind)
    if "neuron" in dims:
        sizes["neuron"] = model.d_mlp
    place = {axis: index for axis in ("position", "head", "neuron") if (index := getattr(node, axis)) is not None}
    for axis, index in place.items():
        if axis not in sizes:
            raise ValueError(f"{site} has no {axis} axis; its axes are {', '.join(dims[1:])}")
        if not 0 <= index < sizes[axis]:
            raise ValueError(f"{axis} {index} of {site} is out of range; it runs 0..{sizes[axis] - 1}")
    return place


def _check_source_kind(site: Site) -> None:
    if site.kind in (*_NO_PARTS, "result") or site.tower:
        instead = "head results are linear in z: use that" if site.kind == "result" else "use z, or q, k and v"
        reason = "it is outside the text model" if site.tower else instead
        raise ValueError(f"{site} cannot be a source of contextual decomposition: {reason}")


def _targets(model: Model, targets: SitePattern) -> tuple[list[Site], bool]:
    """(sites, whether the logits are a target too)."""
    if callable(targets):
        return model.site_names(targets), False
    names = [targets] if isinstance(targets, str) else list(targets)
    wanted = [name for name in names if name != LOGITS]
    sites = model.site_names(wanted) if wanted else []
    for site in sites:
        if site.kind in _NO_PARTS or site.tower:
            raise ValueError(f"{site} cannot be a target of contextual decomposition; z, q, k, v and streams can")
    return sites, LOGITS in names


def _of_prompts(reference: Mapping[Site, Tensor], which: slice) -> dict[Site, Tensor]:
    """What is not relevant, for some of the prompts: their own rows where each prompt has one."""
    return {
        site: value[which] if value.dim() == len(SITE_DIMS[site.kind]) and len(value) > 1 else value
        for site, value in reference.items()
    }
