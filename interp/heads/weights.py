"""Weights of single heads with the norms around them folded in.

Folded are the gain of the norm that a head reads through (and its centring, for LayerNorm) and of the norm after
attention where a family has one. A norm's scale is a positive number and changes neither sign nor ratio. Rotary
embedding, norms of q and k, and biases are left out, as usual.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from interp.heads.norms import LinearNorm, linear_norm
from interp.model import Model, UnsupportedModel


def value_weights(
    model: Model, layer: int
) -> tuple[Float[Tensor, "head d_model d_head"], Float[Tensor, "head d_head d_model"]]:
    """(W_V, W_O) of each query head, float32, with the norms before and after attention folded in."""
    block = model.tower.blocks[layer]
    W_V = norm_of(model, block.ln1).transposed(by_query_head(model, "W_V", layer).mT).mT
    W_O = norm_of(model, block.attn_post).apply(model.weights.of_block("W_O", layer).float())
    return W_V, W_O


def by_query_head(model: Model, name: str, layer: int) -> Float[Tensor, "head d_model d_head"]:
    """W_Q, W_K or W_V of one layer, key/value heads repeated for their query heads."""
    weight = model.weights.of_block(name, layer).float()
    return weight.repeat_interleave(model.n_heads // len(weight), dim=0)


def norm_of(model: Model, module: nn.Module | None) -> LinearNorm:
    """The linear part of one of the model's norms."""
    return linear_norm(module, model.d_model, model.device)


def check_linear(model: Model) -> None:
    """Refuse models whose weights do not compose through a residual stream.

    Raises:
        UnsupportedModel: for post-norm models and those that embed in another width than they compute in.
    """
    if model.tower.post_norm:
        raise UnsupportedModel(
            f"{model.anatomy.family} normalises after each addition (post-norm): its weights do not compose linearly"
        )
    if model.W_E.shape[1] != model.d_model:
        raise UnsupportedModel(f"{model.anatomy.family} embeds in {model.W_E.shape[1]} and computes in {model.d_model}")
