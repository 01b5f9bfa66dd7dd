"""What weights of a head say on their own: is its key-query form a multiple of the identity, its output one entry?

A linear-regression transformer reads examples z = (x, y). Trained, its heads compare x with x alone (KQ is ω times the
identity, with an empty last row and column) and copy y to y alone (OV is one entry, μ, in the last place), and the μ of
all heads add up to 0. `kq_ov` measures how far any head is from that, in any basis whose last direction is the label.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from interp.heads.weights import by_query_head, check_linear, norm_of, value_weights
from interp.model import Model
from interp.patching.labels import model_provenance

ORTHONORMAL = 1e-4
"""Largest entry of BᵀB − 1 at which a basis counts as orthonormal."""


def kq_ov(
    W_Q: Float[Tensor, "head d_model d_head"],
    W_K: Float[Tensor, "head d_model d_head"],
    W_V: Float[Tensor, "head d_model d_value"],
    W_O: Float[Tensor, "head d_value d_model"],
    *,
    basis: Float[Tensor, "d_model direction"] | None = None,
    scale: float | None = None,
    dummy_below: float = 0.1,
) -> xr.Dataset:
    """Structure of KQ = scale · W_Q W_Kᵀ and OV = W_V W_O of each head of one layer.

    The last direction of the basis is that of the label. Shares are of squared Frobenius norms, between 0 and 1.

    Args:
        W_Q: what queries are made with; key/value heads are to be repeated for their query heads.
        W_K: what keys are made with.
        W_V: what values are made with.
        W_O: what z is written with.
        basis: orthonormal directions of the stream, one a column, the label's last; fewer than d_model leave the rest
            of the stream out. None: the stream's own coordinates.
        scale: what scores are multiplied by before the softmax; None: 1/√d_head. With it, ω is the slope of the scores
            as the softmax sees them.
        dummy_below: a head whose |ω| is less than this share of the layer's largest is a dummy.

    Returns:
        Dataset with dim `head`:

        * `omega`: mean diagonal of KQ without its last entry;
        * `identity_share`: how much of KQ is ω times the identity (last row and column empty);
        * `off_diagonal_share`: how much lies off the diagonal, last row and column left out;
        * `last_share`: how much lies in the last row or column. What these three leave of 1 is the unevenness of the
          diagonal;
        * `mu`: the last entry of OV, from label to label;
        * `mu_share`: how much of OV that entry is;
        * `sign`: "positive", "negative" or "dummy", by ω;

        and without dim `zero_sum_gap`: the sum of μ over heads. Shares of a matrix of zeros are NaN.

    Raises:
        ValueError: for a basis that is not orthonormal, or a single direction.

    Source: He et al. 2025 (arXiv 2503.12734). Checked against matrices of known structure in tests/heads/test_kq_ov.py,
    and on a trained transformer in tests/zoo/test_regression.py.
    """
    KQ, OV = _matrices(W_Q, W_K, W_V, W_O, basis)
    KQ = KQ * (W_Q.shape[-1] ** -0.5 if scale is None else scale)
    inner, total = KQ[:, :-1, :-1], _squared(KQ)
    diagonal = inner.diagonal(dim1=-2, dim2=-1)
    omega, mu = diagonal.mean(-1), OV[:, -1, -1]
    by_head = {
        "omega": omega,
        "identity_share": omega.square() * diagonal.shape[-1] / total,
        "off_diagonal_share": (_squared(inner) - diagonal.square().sum(-1)).clamp(min=0) / total,
        "last_share": (total - _squared(inner)).clamp(min=0) / total,
        "mu": mu,
        "mu_share": mu.square() / _squared(OV),
    }
    found: dict[str, tuple[str, object]] = {name: ("head", values.cpu().numpy()) for name, values in by_head.items()}
    return xr.Dataset(
        {**found, "sign": ("head", _signs(omega, dummy_below)), "zero_sum_gap": ((), float(mu.sum()))},
        coords={"head": range(len(omega))},
        attrs={"method": "kq_ov", "dummy_below": dummy_below, "basis": "own" if basis is None else "given"},
    )


def model_kq_ov(
    model: Model,
    *,
    layers: Sequence[int] | None = None,
    basis: Float[Tensor, "d_model direction"] | None = None,
    dummy_below: float = 0.1,
) -> xr.Dataset:
    """`kq_ov` of every head of a language model, with the norms around its weights folded in.

    Rotary embedding, norms of q and k, and biases are left out. Without a basis, the last coordinate of the stream
    stands for the label, which means something only in a model that was made so. Holds two [head, d_model, d_model]
    tensors at a time.

    Args:
        model: the model.
        layers: which; None: all.
        basis: as for `kq_ov`.
        dummy_below: as for `kq_ov`.

    Returns:
        Dataset [layer, head] (`zero_sum_gap` [layer]).

    Raises:
        UnsupportedModel: for post-norm models, whose weights do not compose linearly.
        ValueError: for a layer out of range, or a basis that is not orthonormal.
    """
    check_linear(model)
    chosen = list(range(model.n_layers) if layers is None else layers)
    for layer in chosen:
        if not 0 <= layer < model.n_layers:
            raise ValueError(f"layer {layer} is out of range; layers run 0..{model.n_layers - 1}")
    if not chosen:
        raise ValueError("layers is empty; leave it out for all layers")
    found = [kq_ov(*_folded_weights(model, layer), basis=basis, dummy_below=dummy_below) for layer in chosen]
    together = xr.concat(found, dim=xr.DataArray(chosen, dims="layer", name="layer"))
    return together.assign_attrs(model_provenance(model))


def _folded_weights(model: Model, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    norm = norm_of(model, model.tower.blocks[layer].ln1)
    W_Q, W_K = (norm.transposed(by_query_head(model, name, layer).mT).mT for name in ("W_Q", "W_K"))
    return W_Q, W_K, *value_weights(model, layer)


def _matrices(W_Q: Tensor, W_K: Tensor, W_V: Tensor, W_O: Tensor, basis: Tensor | None) -> tuple[Tensor, Tensor]:
    """(KQ, OV) of each head in the basis, float32 at least."""
    dtype = torch.promote_types(W_Q.dtype, torch.float32)
    reads, compares, values, writes = (one.to(dtype) for one in (W_Q, W_K, W_V, W_O))
    if basis is not None:
        basis = _orthonormal(basis.to(reads.device, dtype))
        reads, compares, values, writes = basis.mT @ reads, basis.mT @ compares, basis.mT @ values, writes @ basis
    if reads.shape[1] < 2:
        raise ValueError("kq_ov needs two directions at least: one of an input, and that of the label")
    return reads @ compares.mT, values @ writes


def _orthonormal(basis: Tensor) -> Tensor:
    error = float((basis.mT @ basis - torch.eye(basis.shape[1], device=basis.device)).abs().max())
    if error > ORTHONORMAL:
        raise ValueError(f"the basis is not orthonormal (off by {error:.1e}); take the Q of torch.linalg.qr(basis)")
    return basis


def _squared(matrices: Float[Tensor, "head row column"]) -> Float[Tensor, " head"]:
    return matrices.square().sum((-2, -1))


def _signs(omega: Float[Tensor, " head"], dummy_below: float) -> list[str]:
    threshold = dummy_below * float(omega.abs().max())
    return [
        "dummy" if value == 0 or abs(value) < threshold else "positive" if value > 0 else "negative"
        for value in omega.tolist()
    ]
