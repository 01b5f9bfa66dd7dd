"""Heads in and out of projections: columns of q, k, v (fused or not) cut by head, weights as per-head matrices.

The same functions cut activations `[..., columns]` and weights `[d_model, columns]`.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from interp.model.tower import Block, Tower

Part = Literal["q", "k", "v"]


def heads_of(part: Part, tower: Tower) -> int:
    """Number of heads of a part: query heads for q, key/value heads for k and v."""
    return tower.n_heads if part == "q" else tower.n_kv_heads


def projection_of(block: Block, part: Part) -> nn.Module:
    """The module whose output holds q, k or v: its own projection or the fused one."""
    module = getattr(block, part) or block.qkv
    assert isinstance(module, nn.Module)
    return module


def split_heads(columns: Tensor, part: Part, block: Block, tower: Tower) -> Tensor:
    """q, k or v by head from the output of its projection (a view wherever the column order allows one).

    Args:
        columns: [..., n_columns], as `projection_of(block, part)` returns them.

    Returns:
        [..., n_heads or n_kv_heads, d_head].
    """
    view = _part_view(columns, part, block, tower)
    return view.reshape(*columns.shape[:-1], heads_of(part, tower), tower.d_head)


def write_heads(columns: Tensor, new: Tensor, part: Part, block: Block, tower: Tower) -> Tensor:
    """`columns` with the part replaced by `new`; the inverse of `split_heads`. The input is not modified.

    Args:
        columns: [..., n_columns].
        new: [..., n_heads or n_kv_heads, d_head].
    """
    if block.qkv is None:
        return new.reshape(columns.shape)
    columns = columns.clone()
    view = _part_view(columns, part, block, tower)
    view.copy_(new.reshape(view.shape))
    return columns


def _part_view(columns: Tensor, part: Part, block: Block, tower: Tower) -> Tensor:
    """View of one part, [..., heads, d_head] or, for q in a grouped order, [..., n_kv_heads, heads per group, d_head].

    Column orders of fused projections: `concatenated` (GPT-2, Phi-3) all q heads, then all k, then all v; `per_head`
    (GPT-NeoX, BLOOM) q, k, v of head 0, then of head 1; `falcon` for each key/value head its query heads, then its k,
    then its v.
    """
    n_heads, n_kv_heads, d_head = tower.n_heads, tower.n_kv_heads, tower.d_head
    if block.qkv is None:
        return columns.unflatten(-1, (heads_of(part, tower), d_head))
    if tower.layout.fused == "concatenated":
        start = {"q": 0, "k": n_heads, "v": n_heads + n_kv_heads}[part]
        by_head = columns.unflatten(-1, (n_heads + 2 * n_kv_heads, d_head))
        return by_head[..., start : start + heads_of(part, tower), :]
    per_group = n_heads // n_kv_heads
    grouped = columns.unflatten(-1, (n_kv_heads, per_group + 2, d_head))
    if part == "q":
        return grouped[..., :per_group, :]
    return grouped[..., per_group if part == "k" else per_group + 1, :]


def matrix(projection: nn.Module) -> Tensor:
    """Weight as [inputs, outputs], a view (`nn.Linear` keeps [out, in], GPT-2's `Conv1D` [in, out])."""
    weight = projection.weight
    assert isinstance(weight, Tensor)
    return weight if type(projection).__name__ == "Conv1D" else weight.T


def bias_of(projection: nn.Module) -> Tensor | None:
    """The bias vector of a projection, None if it has none."""
    bias = getattr(projection, "bias", None)
    return bias if isinstance(bias, Tensor) else None


def head_weight(part: Part, block: Block, tower: Tower) -> Tensor:
    """W_Q, W_K or W_V of one block: [heads, d_model, d_head], a view wherever the column order allows one."""
    return split_heads(matrix(projection_of(block, part)), part, block, tower).movedim(-2, 0)


def head_bias(part: Part, block: Block, tower: Tower) -> Tensor | None:
    """b_Q, b_K or b_V of one block: [heads, d_head], None if the projection has no bias."""
    bias = bias_of(projection_of(block, part))
    return None if bias is None else split_heads(bias, part, block, tower)


def output_weight(block: Block, tower: Tower) -> Tensor:
    """W_O of one block: [n_heads, d_head, d_model], a view."""
    return matrix(block.o).unflatten(0, (tower.n_heads, tower.d_head))


def gate_columns(columns: Tensor) -> Tensor:
    """The gate half of a fused gate-and-up projection (a view): [..., 2 * d_mlp] -> [..., d_mlp]."""
    return columns[..., : columns.shape[-1] // 2]
