"""The k largest pre-activations of each token, with a gradient that touches only the selected columns.

The forward is a dense matrix product and torch's `topk`, which no kernel of ours would beat by much. The backward is
where a top-k encoder wastes its time: autograd scatters the k gradients of a token into a row of zeros as wide as the
dictionary and multiplies the lot. Here it is a sum of token * k rows (`scatter_rows`).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from interp.kernels.sparse_decode import scatter_rows, sparse_decode


def topk_encode(
    x: Float[Tensor, "token d"],
    shift: Float[Tensor, " d"] | None,
    encoder: Float[Tensor, "d row"],
    bias: Float[Tensor, " row"],
    k: int,
) -> tuple[Float[Tensor, "token k"], Int[Tensor, "token k"], Float[Tensor, "token row"]]:
    """The k largest of `(x - shift) @ encoder + bias` in each token, their columns, and all of them without gradient.

    The values have gradients to x, shift, encoder and bias, as if taken from the product by autograd. Which of the
    k comes first is not defined.

    Raises:
        ValueError: if k is not between 1 and the number of columns.
    """
    if not 1 <= k <= encoder.shape[1]:
        raise ValueError(f"k={k} is outside 1..{encoder.shape[1]}, the number of columns of the encoder")
    with torch.no_grad():
        pre_activations = torch.addmm(bias, x if shift is None else x - shift, encoder)
        values, indices = pre_activations.topk(k, dim=-1, sorted=False)
    return selected_columns(x, shift, encoder, bias, indices, values), indices, pre_activations


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
        ctx.save_for_backward(x if shift is None else x - shift, encoder, indices)
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
