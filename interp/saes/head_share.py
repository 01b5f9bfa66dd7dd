"""Which heads a feature of a `hook_z` SAE writes through, read off its decoder, and which features each head has.

An SAE on `hook_z` sees the outputs of all heads side by side, so a decoder row falls into one block a head. The norm of
a block as a share of all blocks says how much of the feature lies in that head. Under grouped-query attention blocks
still belong to query heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from interp.model import Model, Site
from interp.patching.labels import model_provenance
from interp.saes.sae import SAE
from interp.saes.splice import sites_of


def layer_of_z(site: Site) -> int:
    """The layer of a site that must be a `hook_z`, where heads can be told apart.

    Raises:
        ValueError: if it is another site.
    """
    if site.kind != "z" or site.layer is None or site.tower:
        raise ValueError(f"heads can be told apart at blocks.*.attn.hook_z only; this SAE belongs to {site}")
    return site.layer


@torch.no_grad()
def head_share(model: Model, sae: SAE) -> xr.DataArray:
    """The share of each head in each feature: its block of the decoder row, by norm, over the sum of all blocks' norms.

    Returns:
        DataArray [feature, head]; rows sum to 1. A feature whose decoder row is zero has none (NaN).

    Raises:
        ValueError: if the SAE does not write to a `hook_z` of this model.

    Source: Kissane et al. 2024 (arXiv 2406.17759), weight-based head attribution. Checked against loops in
    tests/saes/test_head_share.py.
    """
    layer, blocks = _decoder_blocks(model, sae)
    norms = blocks.norm(dim=-1)
    return xr.DataArray(
        (norms / norms.sum(-1, keepdim=True)).cpu().numpy(),
        dims=("feature", "head"),
        coords={"feature": range(sae.d_sae), "head": range(model.n_heads)},
        name="head_share",
        attrs={**model_provenance(model), "method": "head_share", "layer": layer},
    )


@torch.no_grad()
def head_features(model: Model, saes: SAE | Sequence[SAE], *, k: int = 10) -> xr.Dataset:
    """For each head the k features that lie in it most, and how many directions these write.

    * `feature`, `share` [layer, head, rank]: the features by their share in the head, largest first;
    * `n_largest` [layer, head]: features that have their largest share here;
    * `n_directions` [layer, head]: participation ratio (Σλ)² / Σλ² of the eigenvalues of the cosines between the k
      features' blocks: 1 if they all write one line, k if they are orthogonal.

    `n_directions` is geometry, not meaning: a head with many directions need not do many things, nor one with few only
    one. The published figure "at least 90% of heads are polysemantic" is what people said after reading the top ten
    features of each head; no number here stands for it. Use these lists to read them.

    Args:
        model: the model.
        saes: one SAE on `hook_z`, or several, of different layers.
        k: features a head.

    Raises:
        ValueError: if an SAE does not write to a `hook_z` of this model, two belong to one layer, or one has fewer than
            k features.
    """
    given = [saes] if isinstance(saes, SAE) else list(saes)
    by_layer = {_decoder_blocks(model, sae)[0]: sae for sae in given}
    if not given or len(by_layer) < len(given):
        raise ValueError(f"one SAE a layer, please: {len(given)} were given for {len(by_layer)} layers")
    smallest = min(sae.d_sae for sae in given)
    if not 0 < k <= smallest:
        raise ValueError(f"k = {k} features a head; the smallest SAE has {smallest}, so k runs 1..{smallest}")
    tables = [_one_layer(model, by_layer[layer], k) for layer in sorted(by_layer)]
    dims = {"feature": 3, "share": 3, "n_largest": 2, "n_directions": 2}
    return xr.Dataset(
        {
            name: (("layer", "head", "rank")[:n_dims], torch.stack([table[name] for table in tables]).numpy())
            for name, n_dims in dims.items()
        },
        coords={"layer": sorted(by_layer), "head": range(model.n_heads), "rank": range(k)},
        attrs={**model_provenance(model), "method": "head_features", "k": k},
    )


def _one_layer(model: Model, sae: SAE, k: int) -> dict[str, Tensor]:
    blocks = _decoder_blocks(model, sae)[1].cpu()
    norms = blocks.norm(dim=-1)
    shares = norms / norms.sum(-1, keepdim=True)
    top = shares.nan_to_num(-1).topk(k, dim=0).indices.T
    unit = torch.nn.functional.normalize(blocks, dim=-1)
    heads = torch.arange(model.n_heads)
    chosen = unit[top, heads[:, None]]
    cosines = chosen @ chosen.mT
    largest = shares.nan_to_num(-1).argmax(-1)[~shares.isnan().any(-1)]
    return {
        "feature": top,
        "share": shares[top, heads[:, None]],
        "n_largest": torch.bincount(largest, minlength=model.n_heads),
        # Eigenvalues sum to the trace of the Gram matrix, their squares to the sum of its squared entries.
        "n_directions": cosines.diagonal(dim1=1, dim2=2).sum(-1) ** 2 / cosines.square().sum((1, 2)),
    }


def _decoder_blocks(model: Model, sae: SAE) -> tuple[int, Float[Tensor, "feature head d_head"]]:
    """(layer, the decoder rows by head)."""
    layer = layer_of_z(sites_of(model, sae)[1])
    return layer, sae.W_dec.detach().float().unflatten(-1, (model.n_heads, model.d_head))
