"""Which tokens a feature writes for and against, read off the weights: its decoder row through the unembedding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from interp.heads.weights import check_linear, norm_of
from interp.model import Model, Site
from interp.model.edit import resolve_columns
from interp.patching.labels import model_provenance
from interp.saes.attribution import token_strings
from interp.saes.sae import SAE
from interp.saes.splice import sites_of

LOGIT_SITES = ("z", "embed", "resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
"""Kinds of site that have logit weights: what is written to the residual stream, directly or through W_O."""


@torch.no_grad()
def logit_weights(model: Model, sae: SAE, features: int | Sequence[int], *, n: int = 10) -> xr.Dataset:
    """The tokens whose logits a feature raises and lowers most by itself, straight to the output.

    The row is W_dec[i] W_O W_U for a `hook_z` SAE, W_dec[i] W_U where the SAE writes to the residual stream. As usual
    (TransformerLens folds it into W_U), the final norm's gain, and for LayerNorm its centring, are taken along, and so
    is the norm after attention where the family has one. The norms' scales depend on the prompt and are left out:
    compare tokens of a feature, not features with each other. Later layers are passed over. W_U is the model's own,
    with its logit scale. Its bias, which is no feature's, and a soft-cap on logits, which keeps their order, are left
    out; the mean over tokens, which no probability depends on, is not taken off.

    Args:
        model: the model.
        sae: an SAE whose output is a `hook_z` or a place in the residual stream.
        features: one feature or several.
        n: tokens on each side.

    Returns:
        Dataset [feature, side, rank] with side "top" (largest first) and "bottom" (smallest first): `token_id`, `token`
        and `weight`.

    Raises:
        ValueError: if a feature is out of range, n is, or the SAE writes elsewhere.
        UnsupportedModel: for post-norm models and those that embed in another width than they compute in.

    Source: logit lens, nostalgebraist 2020; for SAEs on z, Kissane et al. 2024 (arXiv 2406.17759). Checked against
    dense products in tests/saes/test_logit_weights.py.
    """
    chosen = resolve_columns(features, sae.d_sae, "feature")
    if not 0 < n <= model.d_vocab:
        raise ValueError(f"n={n} tokens of each kind; the vocabulary has {model.d_vocab}, so n runs 1..{model.d_vocab}")
    rows = _written(model, sae, chosen)
    W_U = model.W_U.float()
    logits = norm_of(model, model.tower.ln_final).apply(rows.to(model.device)).to(W_U.device) @ W_U
    logits = logits * model.weights.logit_scale
    found = [logits.topk(n, largest=largest) for largest in (True, False)]
    ids = torch.stack([one.indices for one in found], dim=1).cpu()
    strings = token_strings(model, ids.flatten())
    dims = ("feature", "side", "rank")
    return xr.Dataset(
        {
            "token_id": (dims, ids.numpy()),
            "token": (dims, np.array(strings, dtype=object).reshape(ids.shape)),
            "weight": (dims, torch.stack([one.values for one in found], dim=1).cpu().numpy()),
        },
        coords={"feature": chosen, "side": ["top", "bottom"], "rank": range(n)},
        attrs={**model_provenance(model), "method": "logit_weights", "n": n},
    )


def _written(model: Model, sae: SAE, features: Sequence[int]) -> Float[Tensor, "feature d_model"]:
    """What each feature adds to the residual stream, a norm after attention taken by its gain alone."""
    check_linear(model)
    site: Site = sites_of(model, sae)[1]
    rows = sae.W_dec.detach()[list(features)].float()
    if site.tower or site.kind not in LOGIT_SITES:
        raise ValueError(
            f"logit weights need an SAE that writes to hook_z or the residual stream; this one writes {site}"
        )
    if site.kind != "z" or site.layer is None:
        return rows
    W_O = model.weights.of_block("W_O", site.layer).float().flatten(0, 1)
    written = rows.to(W_O.device) @ W_O * model.tower.residual_multiplier
    return norm_of(model, model.tower.blocks[site.layer].attn_post).apply(written)
