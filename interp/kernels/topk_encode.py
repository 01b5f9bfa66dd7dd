"""The k largest pre-activations of each token, with a gradient that touches only the selected columns.

The forward is a dense matrix product and torch's `topk`; on a CPU in blocks of tokens, with `topk` of the best groups
of columns only. The backward that autograd would take scatters the k gradients of a token into a row of zeros as wide
as the dictionary and multiplies the lot. Here it is a sum of token * k rows (`scatter_rows`).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from interp.kernels.sparse_decode import scatter_rows, sparse_decode

BLOCK = 1024
"""Tokens at once on a CPU where their pre-activations are not kept: these stay in memory that is in use already."""
GROUP = 8
"""Columns of a group of which the largest is looked at first."""


def topk_encode(
    x: Float[Tensor, "token d"],
    shift: Float[Tensor, " d"] | None,
    encoder: Float[Tensor, "d row"],
    bias: Float[Tensor, " row"],
    k: int,
    *,
    keep: bool = True,
) -> tuple[Float[Tensor, "token k"], Int[Tensor, "token k"], Float[Tensor, "kept row"]]:
    """The k largest of `(x - shift) @ encoder + bias` in each token, their columns, and all of them without gradient.

    The values have gradients to x, shift, encoder and bias, as if taken from the product by autograd. Which of the
    k comes first is not defined.

    Args:
        x: the tokens.
        shift: what is subtracted from them.
        encoder: the columns.
        bias: what is added to each column's product.
        k: how many are selected.
        keep: give all pre-activations; without, that tensor has no rows, and less memory is taken.

    Raises:
        ValueError: if k is not between 1 and the number of columns.
    """
    if not 1 <= k <= encoder.shape[1]:
        raise ValueError(f"k={k} is outside 1..{encoder.shape[1]}, the number of columns of the encoder")
    found = []
    with torch.no_grad():
        for block in x.split(max(1, len(x)) if keep or x.is_cuda else BLOCK):
            pre_activations = torch.addmm(bias, block if shift is None else block - shift, encoder)
            found.append(_largest(pre_activations, k))
        values, indices = (torch.cat(parts) for parts in zip(*found, strict=True))
        kept = pre_activations if keep else pre_activations.new_empty(0, encoder.shape[1])
    return selected_columns(x, shift, encoder, bias, indices, values), indices, kept


def _largest(rows: Float[Tensor, "token row"], k: int) -> tuple[Float[Tensor, "token k"], Int[Tensor, "token k"]]:
    """The k largest of each row and their columns, in any order.

    They lie in the k groups of columns whose largest are largest, and to look for those first takes half the time.
    """
    n_columns = rows.shape[1]
    n_groups = n_columns // GROUP
    if rows.device.type != "cpu" or n_columns % GROUP or n_groups < 2 * k:
        values, columns = rows.topk(k, dim=-1, sorted=False)
        return values, columns
    # Columns that are n_groups apart make a group, so that the maximum runs along the memory.
    groups = rows.view(len(rows), GROUP, n_groups).amax(1).topk(k, dim=-1, sorted=False).indices
    candidates = (groups[:, :, None] + torch.arange(0, n_columns, n_groups)).flatten(1)
    values, chosen = rows.gather(1, candidates).topk(k, dim=-1, sorted=False)
    return values, candidates.gather(1, chosen)


def selected_columns(
    x: Float[Tensor, "token d"],
    shift: Float[Tensor, " d"] | None,
    encoder: Float[Tensor, "d row"],
    bias: Float[Tensor, " row"],
    indices: Int[Tensor, "token k"],
    values: Float[Tensor, "token k"],
) -> Float[Tensor, "token k"]:
    """Entries of `(x - shift) @ encoder + bias` whose values are known already, with their gradients.

    Under autocast the values may be in half precision; they come back in the encoder's.
    """
    selected: Tensor = _SelectedColumns.apply(x, shift, encoder, bias, indices, values.detach())
    return selected


class _SelectedColumns(torch.autograd.Function):
    """`selected_columns`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shift: Tensor | None, encoder: Tensor, bias: Tensor, indices: Tensor, values: Tensor
    ) -> Tensor:
        # Under autocast x may be in half precision, too.
        centred = (x if shift is None else x - shift).to(encoder.dtype)
        ctx.save_for_backward(centred, encoder, indices)
        return values.to(encoder.dtype, copy=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        centred, encoder, indices = ctx.saved_tensors
        needs_x, needs_shift, needs_encoder, needs_bias = ctx.needs_input_grad[:4]
        grad_x = grad_shift = grad_encoder = grad_bias = None
        if needs_shift or needs_bias:
            grad_bias = _sums(indices, grad, encoder.shape[1])
        if needs_shift and grad_bias is not None:
            # The sum over tokens comes first, so that no token's gradient to its input has to be made.
            grad_shift = -(encoder @ grad_bias)
        if needs_x:
            grad_x = sparse_decode(indices, grad, encoder.T)
        if needs_encoder:
            grad_encoder = scatter_rows(indices, grad, centred, encoder.shape[1]).T
        return grad_x, grad_shift, grad_encoder, grad_bias if needs_bias else None, None, None


def _sums(indices: Int[Tensor, "token k"], values: Float[Tensor, "token k"], n_rows: int) -> Float[Tensor, " row"]:
    """Sum of the values of each index."""
    if values.is_cuda:
        # There `index_add_` is atomic, so that its sums differ from run to run.
        return scatter_rows(indices, values, values.new_ones(len(values), 1), n_rows)[:, 0]
    return values.new_zeros(n_rows).index_add_(0, indices.flatten(), values.flatten())
