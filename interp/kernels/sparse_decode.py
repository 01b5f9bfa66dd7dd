"""Sums of a few rows of a large matrix: what decodes a sparse code, and what its gradients are made of.

With indices and values [token, k] and a decoder [row, d]:

    sparse_decode(indices, values, decoder)[t]    = sum over k of values[t, k] * decoder[indices[t, k]]
    scatter_rows(indices, values, rows, n)[j]     = sum over (t, k) with indices[t, k] = j of values[t, k] * rows[t]

The second is the gradient of the first to the decoder, and of a top-k encoder to its weights. Both cost token * k * d
instead of the token * row * d of a dense product. On CUDA they are Triton kernels, elsewhere `embedding_bag`, of which
the scattered sum is one, too: a bag is a row, and its entries, sorted, are the tokens that name it. So the sum is the
same every time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional


def sparse_decode(
    indices: Int[Tensor, "token k"], values: Float[Tensor, "token k"], decoder: Float[Tensor, "row d"]
) -> Float[Tensor, "token d"]:
    """Sum of the selected rows of the decoder times their values, with gradients to values and decoder.

    Half precision is summed in float32 and rounded at the end. An index may occur twice in a token.

    Args:
        indices: int64 rows of the decoder, from 0; on CUDA they are not checked.
        values: the factor of each.
        decoder: the rows.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit.
    """
    _check(indices, values, decoder)
    if decoder.is_cuda and decoder.dtype != torch.float64 and _has_triton():
        from interp.kernels.sparse_decode_triton import sparse_decode_triton

        return sparse_decode_triton(indices, values, decoder)
    return sparse_decode_reference(indices, values, decoder)


def sparse_decode_reference(
    indices: Int[Tensor, "token k"], values: Float[Tensor, "token k"], decoder: Float[Tensor, "row d"]
) -> Float[Tensor, "token d"]:
    """`sparse_decode` by `embedding_bag`; the gradient to the decoder by `scatter_rows`."""
    wide = torch.promote_types(decoder.dtype, torch.float32)
    if not indices.numel():
        return decoder.new_zeros(len(indices), decoder.shape[1])
    values, wide_decoder = values.to(wide), decoder.to(wide)
    rows = functional.embedding_bag(indices, wide_decoder.detach(), mode="sum", per_sample_weights=values)
    with_gradient: Tensor = _DecoderGradient.apply(rows, indices, values.detach(), wide_decoder)
    return with_gradient.to(decoder.dtype)


class _DecoderGradient(torch.autograd.Function):
    """Rows decoded already, with the gradient to the decoder: that of `embedding_bag` costs twice as much on a CPU."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, indices: Tensor, values: Tensor, decoder: Tensor) -> Tensor:
        ctx.save_for_backward(indices, values)
        ctx.n_rows = len(decoder)
        return rows.view_as(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, Tensor | None]:
        indices, values = ctx.saved_tensors
        needs_decoder = ctx.needs_input_grad[3]
        grad_decoder = scatter_rows_reference(indices, values, gradient, ctx.n_rows) if needs_decoder else None
        return gradient, None, None, grad_decoder


def scatter_rows(
    indices: Int[Tensor, "token k"], values: Float[Tensor, "token k"], rows: Float[Tensor, "token d"], n_rows: int
) -> Float[Tensor, "row d"]:
    """For each of `n_rows` indices the sum of the rows of the tokens that name it, times their values. No gradient.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit.
    """
    _check(indices, values, rows)
    if len(rows) != len(indices):
        raise ValueError(f"there are {len(indices)} tokens of indices and {len(rows)} rows; give one row a token")
    implementation: Callable[..., Tensor] = scatter_rows_reference
    if rows.is_cuda and rows.dtype != torch.float64 and _has_triton():
        from interp.kernels.sparse_decode_triton import scatter_rows_triton

        implementation = scatter_rows_triton
    return implementation(indices, values, rows, n_rows)


@torch.no_grad()
def scatter_rows_reference(
    indices: Int[Tensor, "token k"], values: Float[Tensor, "token k"], rows: Float[Tensor, "token d"], n_rows: int
) -> Float[Tensor, "row d"]:
    """`scatter_rows` by `embedding_bag` over the entries sorted by row."""
    if not indices.numel():
        return rows.new_zeros(n_rows, rows.shape[1])
    entry, first = sorted_by_row(indices, n_rows)
    wide = torch.promote_types(rows.dtype, torch.float32)
    token, weights = entry // indices.shape[1], values.flatten()[entry].to(wide)
    sums = functional.embedding_bag(token, rows.to(wide), first[:-1], mode="sum", per_sample_weights=weights)
    return sums.to(rows.dtype)


def sorted_by_row(
    indices: Int[Tensor, "token k"], n_rows: int
) -> tuple[Int[Tensor, " entry"], Int[Tensor, " row_plus_1"]]:
    """The flat entries in the order of their row, then of their token; and where each row's entries begin and end."""
    flat, entry = indices.flatten().sort(stable=True)
    return entry, torch.searchsorted(flat, torch.arange(n_rows + 1, device=indices.device))


def _has_triton() -> bool:
    try:
        import triton  # noqa: F401
    except ModuleNotFoundError:
        return False
    return True


def _check(indices: Tensor, values: Tensor, matrix: Tensor) -> None:
    if indices.ndim != 2 or indices.shape != values.shape or matrix.ndim != 2:
        shapes = f"{list(indices.shape)}, {list(values.shape)} and {list(matrix.shape)}"
        raise ValueError(f"indices, values and matrix are {shapes}; they must be [token, k] twice and [row, d]")
    if indices.dtype != torch.int64 or values.dtype != matrix.dtype:
        dtypes = f"{indices.dtype}, {values.dtype} and {matrix.dtype}"
        raise ValueError(f"indices, values and matrix are {dtypes}; indices must be int64, the others of one dtype")
    if not indices.device == values.device == matrix.device:
        devices = f"{indices.device}, {values.device} and {matrix.device}"
        raise ValueError(f"indices, values and matrix are on {devices}; move them to one device")
