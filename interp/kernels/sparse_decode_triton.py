"""`sparse_decode` and `scatter_rows` as Triton kernels, blocked over d, so that a row of any width stays on the chip.

1. Decoding: a program a token and block of d takes its rows a few at a time, sums them times their values in float32.
2. The gradient to the values: a program a token and block of k goes through d and sums decoder rows times the gradient.
3. Scattering, which is also the gradient to the decoder: the entries are sorted by row; a program a row and block of d
   goes through that row's entries in the order of their tokens. No two programs write to the same place, so nothing is
   atomic and the sum is the same every time.

Under `TRITON_INTERPRET=1`, which must be set before triton is first imported, the same kernels run on a CPU, slowly,
for tests.
"""

# The types inside a kernel are Triton's own.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import contextlib
import os
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from interp.kernels.sparse_decode import sorted_by_row

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""As triton saw it when it made the kernels."""
WARPS = 4


@triton.jit
def _decode_kernel(
    indices,
    values,
    decoder,
    out,
    k,
    d,
    decoder_row,
    decoder_dim,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    dim = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, k, BLOCK_K):
        entry = first + tl.arange(0, BLOCK_K)
        row = tl.load(indices + token * k + entry, mask=entry < k, other=0)
        value = tl.load(values + token * k + entry, mask=entry < k, other=0.0).to(tl.float32)
        rows = tl.load(
            decoder + row[:, None] * decoder_row + dim[None, :].to(tl.int64) * decoder_dim,
            mask=(entry < k)[:, None] & (dim < d)[None, :],
            other=0.0,
        )
        total += tl.sum(rows.to(tl.float32) * value[:, None], 0)
    tl.store(out + token * d + dim, total.to(out.dtype.element_ty), mask=dim < d)


@triton.jit
def _values_kernel(
    indices,
    gradient,
    decoder,
    out,
    k,
    d,
    gradient_token,
    gradient_dim,
    decoder_row,
    decoder_dim,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    entry = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    row = tl.load(indices + token * k + entry, mask=entry < k, other=0)
    total = tl.zeros([BLOCK_K], tl.float32)
    for first in range(0, d, BLOCK_D):
        dim = (first + tl.arange(0, BLOCK_D)).to(tl.int64)
        slope = tl.load(gradient + token * gradient_token + dim * gradient_dim, mask=dim < d, other=0.0)
        rows = tl.load(
            decoder + row[:, None] * decoder_row + dim[None, :] * decoder_dim,
            mask=(entry < k)[:, None] & (dim < d)[None, :],
            other=0.0,
        )
        total += tl.sum(rows.to(tl.float32) * slope.to(tl.float32)[None, :], 1)
    tl.store(out + token * k + entry, total.to(out.dtype.element_ty), mask=entry < k)


@triton.jit
def _scatter_kernel(
    entries,
    first_entry,
    values,
    rows,
    out,
    k,
    d,
    rows_token,
    rows_dim,
    BLOCK_ENTRIES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    dim = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    begin, end = tl.load(first_entry + row), tl.load(first_entry + row + 1)
    total = tl.zeros([BLOCK_D], tl.float32)
    for first in range(begin, end, BLOCK_ENTRIES):
        place = first + tl.arange(0, BLOCK_ENTRIES)
        entry = tl.load(entries + place, mask=place < end, other=0)
        value = tl.load(values + entry, mask=place < end, other=0.0).to(tl.float32)
        some = tl.load(
            rows + (entry // k)[:, None] * rows_token + dim[None, :].to(tl.int64) * rows_dim,
            mask=(place < end)[:, None] & (dim < d)[None, :],
            other=0.0,
        )
        total += tl.sum(some.to(tl.float32) * value[:, None], 0)
    tl.store(out + row * d + dim, total.to(out.dtype.element_ty), mask=dim < d)


def sparse_decode_triton(
    indices: Int[Tensor, "token k"], values: Float[Tensor, "token k"], decoder: Float[Tensor, "row d"]
) -> Float[Tensor, "token d"]:
    """`sparse_decode` by the kernels; all tensors on one CUDA device, or on the CPU when triton is interpreted."""
    rows: Tensor = _SparseDecode.apply(indices.contiguous(), values, decoder)
    return rows


@torch.no_grad()
def scatter_rows_triton(
    indices: Int[Tensor, "token k"], values: Float[Tensor, "token k"], rows: Float[Tensor, "token d"], n_rows: int
) -> Float[Tensor, "row d"]:
    """`scatter_rows` by the kernel."""
    d = rows.shape[1]
    out = rows.new_empty(n_rows, d)
    entries, first_entry = sorted_by_row(indices, n_rows)
    block = _block(d)
    with _device(rows):
        if out.numel():
            _scatter_kernel[(n_rows, triton.cdiv(d, block))](
                entries,
                first_entry,
                values.contiguous(),
                rows,
                out,
                max(1, indices.shape[1]),
                d,
                *rows.stride(),
                BLOCK_ENTRIES=_few(block),
                BLOCK_D=block,
                num_warps=WARPS,
            )
    return out


class _SparseDecode(torch.autograd.Function):
    """`sparse_decode_triton`."""

    @staticmethod
    def forward(ctx: Any, indices: Tensor, values: Tensor, decoder: Tensor) -> Tensor:
        ctx.save_for_backward(indices, values, decoder)
        n_tokens, k = indices.shape
        d = decoder.shape[1]
        out = decoder.new_empty(n_tokens, d)
        block = _block(d)
        with _device(decoder):
            if out.numel():
                _decode_kernel[(n_tokens, triton.cdiv(d, block))](
                    indices,
                    values.contiguous(),
                    decoder,
                    out,
                    k,
                    d,
                    *decoder.stride(),
                    BLOCK_K=_few(block),
                    BLOCK_D=block,
                    num_warps=WARPS,
                )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor | None, Tensor | None]:
        indices, values, decoder = ctx.saved_tensors
        _, needs_values, needs_decoder = ctx.needs_input_grad
        grad_values = _values_gradient(indices, gradient, decoder) if needs_values else None
        grad_decoder = scatter_rows_triton(indices, values, gradient, len(decoder)) if needs_decoder else None
        return None, grad_values, grad_decoder


def _values_gradient(
    indices: Int[Tensor, "token k"], gradient: Float[Tensor, "token d"], decoder: Float[Tensor, "row d"]
) -> Float[Tensor, "token k"]:
    """Products of the gradient with the rows that each token names."""
    n_tokens, k = indices.shape
    d = decoder.shape[1]
    out = decoder.new_empty(n_tokens, k)
    block = _block(d)
    with _device(decoder):
        if out.numel():
            _values_kernel[(n_tokens, triton.cdiv(k, _few(block)))](
                indices,
                gradient,
                decoder,
                out,
                k,
                d,
                *gradient.stride(),
                *decoder.stride(),
                BLOCK_K=_few(block),
                BLOCK_D=block,
                num_warps=WARPS,
            )
    return out


def _block(d: int) -> int:
    """Dimensions a program: small under the interpreter, so that small tests cross a block's border."""
    return min(triton.next_power_of_2(max(1, d)), 16 if INTERPRETED else 512)


def _few(block: int) -> int:
    """Rows at once: about 32 numbers a thread."""
    return 4 if INTERPRETED else max(1, 32 * 32 * WARPS // block)


def _device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
