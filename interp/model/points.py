"""Where each site is in the module tree, and how its activation is read and written there.

A site is reached by an ordinary hook on one module (before or after its call) or inside the attention function.
`locate` says which, and gives the pair `read` (raw tensor -> activation of the site's shape) and `write` (raw tensor
and new activation -> new raw tensor). A site that a model does not have raises `SiteUnavailable` with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from interp.model import projections
from interp.model.sites import INSIDE_ATTENTION, LAYERLESS, SITE_NAMES, Site, SitePattern, SiteUnavailable
from interp.model.tower import Anatomy, Block, Tower

Where = Literal["input", "output", "attention"]


@dataclass(frozen=True)
class Point:
    """One site of one model: the module to hook, on which side, and the way to its activation and back."""

    site: Site
    module: nn.Module
    where: Where
    read: Callable[[Tensor], Tensor]
    write: Callable[[Tensor, Tensor], Tensor]
    in_place: bool = False
    """Written by copying into the raw tensor, because the block holds a second reference to it (the residual
    branch)."""
    overwritten_later: bool = False
    """The model changes the raw tensor in place afterwards: whoever keeps it must copy."""


def available_sites(anatomy: Anatomy) -> list[Site]:
    """Every site of the model, in computation order, vision tower first."""
    sites = []
    for tower in sorted(anatomy.towers.values(), key=lambda tower: tower.prefix == ""):
        kinds = {
            kind: [None] if kind in LAYERLESS else list(range(tower.n_layers))
            for kind in SITE_NAMES
            if not why_absent(kind, tower)
        }
        if "embed" in kinds:
            sites.append(Site("embed", tower=tower.prefix))
        for layer in range(tower.n_layers):
            sites += [Site(kind, layer, tower=tower.prefix) for kind in kinds if kind not in LAYERLESS]
        if "ln_final" in kinds:
            sites.append(Site("ln_final", tower=tower.prefix))
    return sites


def why_absent(kind: str, tower: Tower) -> str:
    """Why a kind of site does not exist in a tower; "" if it does."""
    block = tower.blocks[0]
    family = tower.config.model_type
    if kind == "resid_mid" and tower.parallel:
        return f"attention and MLP of {family} run in parallel, so there is no residual stream between them"
    if kind in ("ln1", "ln2") and getattr(block, kind) is None:
        return f"{family} has no norm in this place"
    if kind == "ln_final" and tower.ln_final is None:
        return f"{family} has no norm after the last block"
    if kind in INSIDE_ATTENTION and not tower.uses_attention_interface:
        return f"transformers implements the attention of {family} outside its AttentionInterface: no hook reaches it"
    if kind in ("mlp_pre", "mlp_post") and block.down is None:
        return f"the MLP of {family} is a mixture of experts: each token has its own neurons; hook_mlp_out is there"
    return ""


def locate(anatomy: Anatomy, site: Site) -> Point:
    """The point of a site.

    Raises:
        SiteUnavailable: if this model does not have it.
        ValueError: if the layer is out of range or the model has no vision tower.
    """
    tower = anatomy.towers.get(site.tower)
    if tower is None:
        raise SiteUnavailable(f"{site}: this {anatomy.family} model has no vision tower")
    if site.layer is not None and not 0 <= site.layer < tower.n_layers:
        raise ValueError(f"{site}: layer {site.layer} is out of range; layers run 0..{tower.n_layers - 1}")
    reason = why_absent(site.kind, tower)
    if reason:
        raise SiteUnavailable(f"{site} is not available: {reason}")
    if site.layer is None:
        return _layerless_point(site, tower)
    block = tower.blocks[site.layer]
    if site.kind in INSIDE_ATTENTION:
        return Point(site, block.attn, "attention", _same, _replace)
    if site.kind in ("q", "k", "v"):
        return _projection_point(site, block, tower)
    if site.kind == "result":
        # Its raw tensor is the pair (z, output) seen by a hook on the output projection: see hooks.py.
        return Point(site, block.o, "output", _same, _replace)
    return _BLOCK_POINTS[site.kind](site, block, tower)


def explain_absence(anatomy: Anatomy, pattern: SitePattern) -> None:
    """Raise `SiteUnavailable` with the reason if a name is a proper site that only this model lacks."""
    for name in [pattern] if isinstance(pattern, str) else [] if callable(pattern) else pattern:
        for layer in (0, None):
            try:
                site = Site(name, layer) if "." not in name else Site.parse(name)
            except ValueError:
                continue
            locate(anatomy, site)


def head_results(z: Tensor, block: Block, tower: Tower) -> Tensor:
    """Contribution of each head to the attention output, without the bias.

    Args:
        z: [..., n_heads * d_head].

    Returns:
        [..., n_heads, d_model].
    """
    by_head = z.unflatten(-1, (tower.n_heads, tower.d_head))
    return torch.einsum("...hd,hdm->...hm", by_head, projections.output_weight(block, tower))


def _same(raw: Tensor) -> Tensor:
    return raw


def _replace(raw: Tensor, new: Tensor) -> Tensor:
    return new.reshape(raw.shape)


def _overwrite(raw: Tensor, new: Tensor) -> Tensor:
    raw.copy_(new.reshape(raw.shape))
    return raw


def _layerless_point(site: Site, tower: Tower) -> Point:
    if site.kind == "embed":
        return Point(site, tower.blocks[0].module, "input", _same, _replace)
    assert tower.ln_final is not None
    return Point(site, tower.ln_final, "output", _same, _replace)


def _projection_point(site: Site, block: Block, tower: Tower) -> Point:
    part: projections.Part = site.kind  # type: ignore[assignment]
    return Point(
        site,
        projections.projection_of(block, part),
        "output",
        lambda raw: projections.split_heads(raw, part, block, tower),
        lambda raw, new: projections.write_heads(raw, new, part, block, tower),
    )


def _z_point(site: Site, block: Block, tower: Tower) -> Point:
    return Point(site, block.o, "input", lambda raw: raw.unflatten(-1, (tower.n_heads, tower.d_head)), _replace)


def _resid_pre_point(site: Site, block: Block, tower: Tower) -> Point:
    return Point(site, block.module, "input", _same, _replace)


def _resid_mid_point(site: Site, block: Block, tower: Tower) -> Point:
    if tower.post_norm:
        # The sum goes nowhere but into the norm: no second reference to keep in step.
        assert block.ln1 is not None
        return Point(site, block.ln1, "input", _same, _replace)
    module = block.resid_mid or block.ln2
    assert module is not None
    return Point(site, module, "input", _same, _overwrite, in_place=True)


def _resid_post_point(site: Site, block: Block, tower: Tower) -> Point:
    if tower.post_norm:
        assert block.ln2 is not None
        return Point(site, block.ln2, "input", _same, _replace)
    return Point(site, block.module, "output", _same, _replace)


def _added_point(site: Site, module: nn.Module, tower: Tower, *, overwritten_later: bool = False) -> Point:
    """attn_out or mlp_out: the output of `module`, times the multiplier with which Granite adds it to the stream."""
    multiplier = tower.residual_multiplier
    if multiplier == 1.0:
        return Point(site, module, "output", _same, _replace, overwritten_later=overwritten_later)
    return Point(
        site, module, "output", lambda raw: raw * multiplier, lambda raw, new: (new / multiplier).reshape(raw.shape)
    )


def _attn_out_point(site: Site, block: Block, tower: Tower) -> Point:
    return _added_point(site, block.attn_post or block.o, tower)


def _mlp_out_point(site: Site, block: Block, tower: Tower) -> Point:
    module = block.mlp_post or block.down or block.mlp
    assert module is not None
    return _added_point(site, module, tower, overwritten_later=tower.overwrites_mlp_out)


def _norm_point(site: Site, block: Block, tower: Tower) -> Point:
    module = getattr(block, site.kind)
    return Point(site, module, "output", _same, _replace)


def _mlp_pre_point(site: Site, block: Block, tower: Tower) -> Point:
    if block.gate_up is not None:

        def write(raw: Tensor, new: Tensor) -> Tensor:
            raw = raw.clone()
            gate = projections.gate_columns(raw)
            gate.copy_(new.reshape(gate.shape))
            return raw

        return Point(site, block.gate_up, "output", projections.gate_columns, write)
    module = block.gate or block.up
    assert module is not None
    return Point(site, module, "output", _same, _replace)


def _mlp_post_point(site: Site, block: Block, tower: Tower) -> Point:
    assert block.down is not None
    return Point(site, block.down, "input", _same, _replace)


_BLOCK_POINTS: dict[str, Callable[[Site, Block, Tower], Point]] = {
    "resid_pre": _resid_pre_point,
    "ln1": _norm_point,
    "z": _z_point,
    "attn_out": _attn_out_point,
    "resid_mid": _resid_mid_point,
    "ln2": _norm_point,
    "mlp_pre": _mlp_pre_point,
    "mlp_post": _mlp_post_point,
    "mlp_out": _mlp_out_point,
    "resid_post": _resid_post_point,
}
