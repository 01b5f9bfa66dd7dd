"""Circuits of a Llama run the slow way: node by node, by the model's own modules and plain hooks.

Each node is computed from streams that are summed up edge by edge, writer by writer, in the order of the graph's names.
"""

from __future__ import annotations

import torch
from torch import Tensor

import interp
from interp.circuits.graph import Graph


@torch.no_grad()
def brute_force_logits(
    model: interp.Model, graph: Graph, tokens: Tensor, reference: Tensor, kept: dict[tuple[str, str], Tensor]
) -> Tensor:
    """Last-position logits of a circuit whose cut edges carry what a run of the reference's prompts writes.

    Args:
        model: a Llama.
        graph: its graph.
        tokens: the prompts.
        reference: the other prompts.
        kept: for each (writer, reader) of the graph, [pos]: 1 where the edge is kept, 0 where it is cut.
    """
    other = _outputs(model, graph, reference)
    own: dict[str, Tensor] = {}
    own["embed"] = model.hf.model.embed_tokens(tokens)
    bias = torch.zeros_like(own["embed"])

    def seen(reader: str) -> Tensor:
        stream = bias.clone()
        for writer, sent in own.items():
            stream += other[writer] + kept[writer, reader][:, None] * (sent - other[writer])
        return stream

    for layer, block in enumerate(model.hf.model.layers):
        made = {}
        for kind, n_heads in (("q", graph.n_heads), ("k", graph.n_kv_heads), ("v", graph.n_kv_heads)):
            projection = getattr(block.self_attn, f"{kind}_proj")
            rows = [projection(block.input_layernorm(seen(f"L{layer}H{head}.{kind}"))) for head in range(n_heads)]
            made[projection] = torch.cat(
                [row.unflatten(-1, (n_heads, -1))[..., head, :] for head, row in enumerate(rows)], -1
            )
        z = _captured(model, tokens, block.self_attn.o_proj, made)
        heads = _heads(graph, layer, block, z)
        streamed = bias + block.self_attn.o_proj.bias
        own, bias = own | heads, streamed
        given = block.post_attention_layernorm(seen(f"mlp{layer}"))
        found = []
        handle = block.mlp.down_proj.register_forward_pre_hook(lambda module, args, found=found: found.append(args[0]))
        out = block.mlp(given)
        handle.remove()
        own |= _mlp(graph, layer, block, found[0], out)
    return model.hf.lm_head(model.hf.model.norm(seen("logits")))[:, -1]


def _captured(
    model: interp.Model, tokens: Tensor, module: torch.nn.Module, made: dict[torch.nn.Module, Tensor]
) -> Tensor:
    """What a module is given in a run in which others return what they are told to."""
    found = []
    handles = [module.register_forward_pre_hook(lambda module, args: found.append(args[0]))]
    handles += [one.register_forward_hook(lambda module, args, out, new=new: new) for one, new in made.items()]
    model.hf(input_ids=tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return found[0]


def _outputs(model: interp.Model, graph: Graph, tokens: Tensor) -> dict[str, Tensor]:
    outputs = {"embed": model.hf.model.embed_tokens(tokens)}
    for layer, block in enumerate(model.hf.model.layers):
        outputs |= _heads(graph, layer, block, _captured(model, tokens, block.self_attn.o_proj, {}))
        post = _captured(model, tokens, block.mlp.down_proj, {})
        outputs |= _mlp(graph, layer, block, post, block.mlp.down_proj(post))
    return outputs


def _heads(graph: Graph, layer: int, block: torch.nn.Module, z: Tensor) -> dict[str, Tensor]:
    weight = block.self_attn.o_proj.weight
    width = weight.shape[1] // graph.n_heads
    return {
        f"L{layer}H{head}": z[..., head * width : (head + 1) * width] @ weight[:, head * width : (head + 1) * width].T
        for head in range(graph.n_heads)
    }


def _mlp(graph: Graph, layer: int, block: torch.nn.Module, post: Tensor, out: Tensor) -> dict[str, Tensor]:
    weight = block.mlp.down_proj.weight
    apart = [neuron for at, neuron in graph.neurons if at == layer]
    neurons = {f"mlp{layer}.n{neuron}": post[..., neuron, None] * weight[:, neuron] for neuron in apart}
    return {f"mlp{layer}": out - sum(neurons.values()), **neurons}
