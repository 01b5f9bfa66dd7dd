"""Composition: how much each head reads from what earlier heads write, by their weights alone."""

from __future__ import annotations

import time
from typing import Literal

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from interp.heads.weights import by_query_head, check_linear, norm_of, value_weights
from interp.model import Model
from interp.patching.labels import model_provenance
from interp.patching.progress import progress_bar

Kind = Literal["Q", "K", "V"]


def composition(model: Model, kind: Kind, *, progress: bool | None = None) -> xr.DataArray:
    """How much each head reads from the output of each earlier head: ‖W_OV W‖ / (‖W_OV‖ ‖W‖), Frobenius norms.

    W is what the later head does with the stream: as its query W_Q W_Kᵀ ("Q"), as its key W_K W_Qᵀ ("K"), or as its
    value W_V W_O ("V"). Random heads compose a little too: compare with other pairs, not with 0. Costs a product of
    [d_head, d_model] matrices a pair of heads; no [d_model, d_model] matrix is formed.

    Args:
        model: the model.
        kind: where the later head reads: query, key or value. With grouped key/value heads, those are repeated for each
            query head.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        DataArray [layer_from, head_from, layer_to, head_to]; NaN unless layer_from < layer_to.

    Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits". Checked against dense products in
    tests/heads/test_composition.py.
    """
    started = time.perf_counter()
    if kind not in ("Q", "K", "V"):
        raise ValueError(f"kind={kind!r}; it is one of 'Q', 'K', 'V'")
    check_linear(model)
    n_layers, n_heads = model.n_layers, model.n_heads
    scores = np.full((n_layers, n_heads, n_layers, n_heads), np.nan, dtype=np.float32)
    writers = torch.stack([_thin(*value_weights(model, layer)).to(model.device) for layer in range(n_layers)])
    writer_norms = _frobenius(writers)
    with progress_bar(n_layers - 1, f"{kind}-composition", "layer", progress=progress) as bar:
        for later in range(1, n_layers):
            left, right = _reader_weights(model, later, kind)
            # ‖L Rᵀ‖ = ‖L T‖ with T from the QR of R: the wide side shrinks to d_head.
            reader = (left @ _triangle(right)).to(model.device)
            reader_norms = _frobenius(_triangle(left).mT @ _triangle(right)).to(model.device)
            products = torch.tensordot(writers[:later], reader, dims=([3], [1]))
            norms = writer_norms[:later, :, None] * reader_norms
            scores[:later, :, later] = (products.square().sum((2, 4)).sqrt() / norms).cpu().numpy()
            bar.update()
    axes = {"layer_from": n_layers, "head_from": n_heads, "layer_to": n_layers, "head_to": n_heads}
    return xr.DataArray(
        scores,
        dims=tuple(axes),
        coords={name: range(length) for name, length in axes.items()},
        name="composition",
        attrs={
            **model_provenance(model),
            "method": "composition",
            "kind": kind,
            "seconds": time.perf_counter() - started,
        },
    )


def _reader_weights(
    model: Model, layer: int, kind: Kind
) -> tuple[Float[Tensor, "head d_model d_head"], Float[Tensor, "head d_model d_head"]]:
    """(L, R) of each head such that L Rᵀ is what it does with the stream: L reads, R is the other side."""
    if kind == "V":
        W_V, W_O = value_weights(model, layer)
        return W_V, W_O.mT
    norm = norm_of(model, model.tower.blocks[layer].ln1)
    W_Q, W_K = (norm.transposed(by_query_head(model, name, layer).mT).mT for name in ("W_Q", "W_K"))
    return (W_Q, W_K) if kind == "Q" else (W_K, W_Q)


def _thin(
    W_V: Float[Tensor, "head d_model d_head"], W_O: Float[Tensor, "head d_head d_model"]
) -> Float[Tensor, "head d_head d_model"]:
    """A [d_head, d_model] matrix with the same singular values and right side as W_V W_O."""
    return _triangle(W_V).mT @ W_O


def _triangle(tall: Float[Tensor, "head d_model d_head"]) -> Float[Tensor, "head d_head d_head"]:
    """T with Tᵀ standing in for `tall` under the Frobenius norm: ‖A tallᵀ‖ = ‖A T‖ and tallᵀ tall = T Tᵀ."""
    return torch.linalg.qr(tall, mode="r").R.mT


def _frobenius(matrices: Float[Tensor, "*batch rows columns"]) -> Float[Tensor, "*batch"]:
    return torch.linalg.matrix_norm(matrices)
