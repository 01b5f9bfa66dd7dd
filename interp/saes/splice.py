"""Running a model on what its SAEs reconstruct, and reading feature activations.

A splice replaces the activation at an SAE's site by the reconstruction, in every run inside a context: plain calls,
caches, gradients, and each step of a generation, whose tokens are encoded as they come. A transcoder reads its input
site and replaces its target site of the same run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.model import Model, Site
from interp.model.hooks import Run, Tap, tapped
from interp.model.inputs import Prompts
from interp.model.sites import SITE_DIMS
from interp.saes.sae import SAE, from_rows, to_rows

FeatureEdit = Callable[[Site, Tensor], Tensor]
"""From an SAE's input site and its features [batch, pos, d_sae] to the features to go on with."""

Excluded = Bool[Tensor, "batch column"] | None
"""True where a token keeps the model's own activation."""


@contextmanager
def spliced(
    model: Model,
    saes: SAE | Sequence[SAE],
    *,
    keep_error: bool = False,
    features: FeatureEdit | None = None,
    errors: FeatureEdit | None = None,
    exclude: Excluded = None,
) -> Iterator[None]:
    """Every run inside goes on from the reconstructions of the SAEs; also `generate` with a KV cache.

    SAEs see the activations of the run they are in, as SAEs before them and contexts around this one have changed them;
    contexts inside this one see the reconstructions. They compute in their own dtype (float32), and the result is cast
    to the activation's. Gradients flow through them to what comes before.

    >>> without_7 = lambda site, features: features.index_fill(-1, torch.tensor([7]), 0)
    >>> with spliced(model, sae, keep_error=True, features=without_7):
    ...     model.generate("When Mary and John", max_new_tokens=5)

    Args:
        model: the model.
        saes: one or several, of different sites.
        keep_error: add the error that the untouched features leave, as a constant: the run's numbers are the model's
            own (to rounding), and only what `features` changes acts; gradients go through the reconstruction alone.
        features: an intervention on the features, as a function of the SAE's input site and a copy of its features.
        errors: an intervention on the error [batch, pos, d_out], called like `features`; what it returns is added,
            `keep_error` or not.
        exclude: tokens that keep the model's own activation, such as sinks or BOS; columns count padding, later tokens
            of a generation are never excluded. None: no token.

    Raises:
        ValueError: before any run, if an SAE has no site or one of another width, or two replace the same site.

    Source: splicing as in the evaluation of Bricken et al. 2023; the error term after Marks et al. 2024
    (arXiv 2403.19647). Checked against an `Edit` of the same values in tests/saes/test_splice.py.
    """
    chosen = [saes] if isinstance(saes, SAE) else list(saes)
    targets = [sites_of(model, sae)[1] for sae in chosen]
    for site in targets:
        if targets.count(site) > 1:
            raise ValueError(f"two SAEs replace {site}; splice one at a time")
    if keep_error and errors is None:
        errors = _unchanged
    pairs = [_taps(model, sae, features, errors, exclude) for sae in chosen]
    # A transcoder reads what an SAE at the same site has written.
    taps = [write for write, _ in pairs] + [read for _, read in pairs if read is not None]
    with tapped(model.anatomy, taps):
        yield


@torch.no_grad()
def features_of(model: Model, prompts: Prompts, sae: SAE) -> Float[Tensor, "batch pos d_sae"]:
    """Feature activations of an SAE on prompts; NaN at padding, where prompts differ in length.

    Costs one forward pass of all prompts as one batch, and holds batch x pos x d_sae floats.

    Args:
        model: the model; inside `spliced` or `edited`, the features are those of the changed run.
        prompts: text, texts, token ids, or a mapping of inputs, as for a plain call.
        sae: the SAE.

    Raises:
        ValueError: if the SAE has no site, or one of another width.
    """
    site, _ = sites_of(model, sae)
    _, cache = model.run_with_cache(prompts, site, logits_to_keep=1)
    found = sae.encode(_rows(sae, site, cache[site]))
    if cache.n_padding is None:
        return found
    columns = torch.arange(found.shape[1], device=found.device)
    return found.masked_fill((columns < cache.n_padding[:, None].to(found.device))[..., None], torch.nan)


@contextmanager
def replaced(model: Model, site: Site, value: Float[Tensor, " width"], *, exclude: Excluded = None) -> Iterator[None]:
    """Every run inside has one vector at all tokens of a site: what a splice is compared with (zero, the mean).

    Args:
        model: the model.
        site: the site, as `sites_of` names it.
        value: the vector; heads one after the other.
        exclude: tokens that keep the model's own activation.
    """

    def write(activation: Tensor, run: Run) -> Tensor:
        new = value.to(activation).expand_as(to_rows(site, activation))
        return _written(site, new, activation, exclude, run)

    with tapped(model.anatomy, [Tap(site, write)]):
        yield


def counted(tokens: Int[Tensor, "prompt pos"], exclude: Excluded) -> Bool[Tensor, "prompt pos"]:
    """Tokens that are not excluded.

    Raises:
        ValueError: if `exclude` is not a bool for each token.
    """
    if exclude is None:
        return torch.ones_like(tokens, dtype=torch.bool)
    if exclude.shape != tokens.shape or exclude.dtype != torch.bool:
        found = f"{exclude.dtype} {tuple(exclude.shape)}"
        raise ValueError(f"`exclude` is a bool for each token, {tuple(tokens.shape)}; got {found}")
    return ~exclude


def sites_of(model: Model, sae: SAE) -> tuple[Site, Site]:
    """Where an SAE reads in this model and which activation it stands for; the same but for transcoders.

    Raises:
        ValueError: if the SAE does not say, the site has no vector a token, or its width is another.
    """
    if sae.site is None:
        raise ValueError('this SAE does not say where it reads: set sae.site, such as "blocks.5.attn.hook_z"')
    source = _site(model, sae.site, sae.d_in, "reads")
    target = source if sae.target_site is None else _site(model, sae.target_site, sae.d_out, "predicts")
    if model.sites.index(target) < model.sites.index(source):
        raise ValueError(f"the transcoder predicts {target}, which is computed before its input {source}")
    return source, target


def _site(model: Model, name: str, width: int, verb: str) -> Site:
    found = model.site_names(name)
    if len(found) > 1:
        raise ValueError(f"an SAE {verb} one site; {name!r} names {len(found)}: give the layer")
    expected = site_width(model, found[0])
    if expected != width:
        raise ValueError(f"the SAE {verb} vectors of width {width}; {found[0]} of {model.name} has {expected}")
    return found[0]


def site_width(model: Model, site: Site) -> int:
    """Numbers a token at a site, heads taken together.

    Raises:
        ValueError: for scores and patterns, which have no vector a token.
    """
    dims = SITE_DIMS[site.kind]
    tower = model.anatomy.towers[site.tower]
    if "key" in dims:
        raise ValueError(f"{site} has no vector a token (its axes are {', '.join(dims)}): no SAE fits there")
    heads = model.n_heads_at(site.kind, site.tower) if "head" in dims else 1
    if dims[-1] == "neuron":
        down: Any = tower.blocks[site.layer or 0].down
        return int(down.weight.numel()) // tower.d_model
    return heads * (tower.d_head if dims[-1] == "d_head" else tower.d_model)


def _taps(
    model: Model, sae: SAE, features: FeatureEdit | None, errors: FeatureEdit | None, exclude: Excluded
) -> tuple[Tap, Tap | None]:
    """The tap that replaces the target, and the one that reads the input where that is another site."""
    source, target = sites_of(model, sae)
    waiting: list[Tensor] = []

    def read(activation: Tensor, run: Run) -> None:
        # A copy: the model may go on to write into the tensor.
        waiting[:] = [_rows(sae, source, activation.clone())]

    def write(activation: Tensor, run: Run) -> Tensor:
        if source != target and not waiting:
            raise ValueError(f"the run reached {target} without passing {source}, which its transcoder reads")
        # Of the tensor itself a copy: some sites are written in place, and the backward pass needs what was read.
        own = _rows(sae, target, activation.clone())
        x = waiting.pop() if source != target else own
        new = _reconstruction(sae, source, x, own, features, errors)
        return _written(target, new.to(activation.dtype), activation, exclude, run)

    return Tap(target, write), Tap(source, read) if source != target else None


def _reconstruction(
    sae: SAE,
    source: Site,
    x: Float[Tensor, "batch pos d_in"],
    target: Float[Tensor, "batch pos d_out"],
    features: FeatureEdit | None,
    errors: FeatureEdit | None,
) -> Float[Tensor, "batch pos d_out"]:
    found = sae.encode(x)
    # A copy: the intervention may write into it, and the error is that of the untouched features.
    changed = found if features is None else features(source, found.clone())
    if changed.shape != found.shape:
        raise ValueError(f"`features` returned shape {tuple(changed.shape)}; the features have {tuple(found.shape)}")
    new = sae.decode(changed, x)
    if errors is not None:
        untouched = new if features is None else sae.decode(found, x)
        new = new + errors(source, (target - untouched).detach())
    return new


def _unchanged(site: Site, error: Tensor) -> Tensor:
    return error


def _rows(sae: SAE, site: Site, activation: Tensor) -> Float[Tensor, "batch pos width"]:
    """The activation as the SAE takes it: heads together, in its dtype; on another device, the SAE refuses it."""
    return to_rows(site, activation).to(sae.dtype)


def _written(
    site: Site, new: Float[Tensor, "batch pos width"], activation: Tensor, exclude: Excluded, run: Run
) -> Tensor:
    """The new rows in the activation's shape, with the run's own ones where tokens are excluded."""
    if exclude is None or run.n_past >= exclude.shape[1]:
        return from_rows(site, new, activation)
    columns = exclude[:, run.n_past : run.n_past + new.shape[1]].to(new.device)
    if run.decoding:
        columns = torch.nn.functional.pad(columns, (0, new.shape[1] - columns.shape[1]))
    if columns.shape != new.shape[:2] or (not run.decoding and exclude.shape != new.shape[:2]):
        raise ValueError(f"`exclude` has shape {tuple(exclude.shape)}; the run has {tuple(new.shape[:2])} tokens")
    return from_rows(site, torch.where(columns[..., None], to_rows(site, activation), new), activation)
