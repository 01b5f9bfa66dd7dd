"""What every writer adds to the residual stream in a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.circuits.graph import Graph
from interp.model import Model, Site
from interp.model.anatomy import UnsupportedModel
from interp.model.tower import Block
from interp.patching.rules.norms import Norm, probed_norm

WRITER_SITES = ("embed", "z", "mlp_out")
"""Sites from which the outputs of all writers are made, but for neurons."""


def writer_sites(graph: Graph) -> list[str]:
    """Sites from which the outputs of all writers of a graph are made."""
    return [*WRITER_SITES, *(Site("mlp_post", layer) for layer in dict.fromkeys(layer for layer, _ in graph.neurons))]


class HeadOutputs:
    """From z of a layer to what each of its heads adds to the residual stream.

    Where a norm stands behind the attention layer (Gemma), each head's part is scaled as the sum is in the same run, so
    that the parts still add up; a bias before that norm, scaled as well, is shared by the heads evenly.

    Args:
        model: the model.

    Raises:
        UnsupportedModel: where that norm is not an RMSNorm.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self._post = [self._norm_behind(block) for block in model.tower.blocks]

    def _norm_behind(self, block: Block) -> Norm | None:
        if block.attn_post is None:
            return None
        norm = probed_norm(block.attn_post, f"{self.model.tower.path}.{block.index}", "attn_post")
        if norm.kind != "rms":
            raise UnsupportedModel(f"{norm.path}: a LayerNorm behind attention does not split into heads")
        return norm

    def __call__(
        self, layer: int, z: Float[Tensor, "*batch pos head d_head"]
    ) -> Float[Tensor, "head *batch pos d_model"]:
        """What each head of a layer adds, in float32 at least; differentiable."""
        wide = torch.promote_types(z.dtype, torch.float32)
        W_O = self.model.weights.of_block("W_O", layer).to(wide)
        by_head = z.movedim(-2, 0).to(wide)
        out = torch.bmm(by_head.flatten(1, -2), W_O).reshape(*by_head.shape[:-1], -1)
        norm = self._post[layer]
        if norm is not None:
            out = out + self.model.weights.of_block("b_O", layer) / len(out)
            scale = torch.rsqrt(out.sum(0).square().mean(-1, keepdim=True) + norm.eps)
            weight = norm.weight()
            out = out * (scale if weight is None else scale * weight.to(wide))
        return out * self.model.tower.residual_multiplier

    def bias(self, layer: int) -> Float[Tensor, " d_model"]:
        """What the attention layer adds that belongs to no head."""
        bias = self.model.weights.of_block("b_O", layer)
        return torch.zeros_like(bias) if self._post[layer] is not None else bias * self.model.tower.residual_multiplier


def mlp_outputs(
    model: Model,
    graph: Graph,
    layer: int,
    out: Float[Tensor, "*batch pos d_model"],
    post: Float[Tensor, "*batch pos neuron"] | None,
) -> Float[Tensor, "part *batch pos d_model"]:
    """What each part of an MLP adds (`Graph.mlp_parts`), in float32 at least; differentiable.

    Args:
        model: the model.
        graph: its graph.
        layer: which MLP.
        out: all that it adds.
        post: its neurons; needed where some of them write by themselves.
    """
    out = out.to(torch.promote_types(out.dtype, torch.float32))
    neurons = graph.neurons_of(layer)
    if not neurons:
        return out[None]
    assert post is not None
    directions = model.weights.of_block("W_out", layer)[neurons].to(out.dtype) * model.tower.residual_multiplier
    own = torch.einsum("...n,nd->n...d", post[..., neurons].to(out.dtype), directions)
    return torch.cat([(out - own.sum(0))[None], own])


@torch.no_grad()
def writer_outputs(
    model: Model, graph: Graph, tokens: Int[Tensor, "prompt pos"], heads: HeadOutputs
) -> tuple[Float[Tensor, "writer prompt pos d_model"], Float[Tensor, "prompt d_vocab"]]:
    """What every writer adds to the stream on these prompts, and the logits at the last position.

    Holds n_writers × d_model floats a token.
    """
    logits, cache = model.run_with_cache(tokens, writer_sites(graph), logits_to_keep=1)
    return gathered(graph, cache, heads), logits[:, -1]


@torch.no_grad()
def gathered(
    graph: Graph, activations: Mapping[Any, Tensor], heads: HeadOutputs, *, minus: Mapping[Any, Tensor] | None = None
) -> Float[Tensor, "writer prompt pos d_model"]:
    """The outputs of all writers from activations of their sites, or what they add more in one run than in another.

    Args:
        graph: the graph.
        activations: of the graph's `writer_sites`.
        heads: of the model.
        minus: the activations of the other run.
    """
    embed = activations[Site("embed")]
    wide = torch.promote_types(embed.dtype, torch.float32)
    outputs = torch.empty(len(graph.writers), *embed.shape, dtype=wide, device=embed.device)

    def written(run: Mapping[Any, Tensor], layer: int) -> tuple[Tensor, Tensor]:
        post = run.get(Site("mlp_post", layer))
        mlp = mlp_outputs(heads.model, graph, layer, run[Site("mlp_out", layer)], post)
        return heads(layer, run[Site("z", layer)]), mlp

    outputs[0] = embed if minus is None else embed.to(wide) - minus[Site("embed")].to(wide)
    for layer in range(graph.n_layers):
        attention, mlp = written(activations, layer)
        if minus is not None:
            attention, mlp = (own - other for own, other in zip((attention, mlp), written(minus, layer), strict=True))
        outputs[graph.heads_of(layer)], outputs[graph.mlp_parts(layer)] = attention, mlp
    return outputs
