"""Gradients of a metric with respect to what each reader sees, reader by reader.

1. One forward pass keeps on the autograd path: the streams, their norms' outputs, queries, keys and values, and what
   the MLPs are given.
2. One backward pass gives the gradients at queries, keys, values and MLP inputs, where readers are still apart.
3. For one layer at a time, each goes back through the reader's own columns and the norm to the stream. The norm's
   backward pass is the one recorded, so that relevance rules and secant multipliers hold there as well.

Only one layer's [reader, prompt, pos, d_model] exists at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from interp.circuits.graph import Graph
from interp.model import Model, Site
from interp.model.tower import Block

ByLayer = Iterator[tuple[slice, Float[Tensor, "reader prompt pos d_model"]]]


class ReaderGradients:
    """One run of some prompts, ready to be asked for the gradients of its readers.

    Args:
        model: the model.
        graph: its graph.
        tokens: the prompts.
        score: from last-position logits to one value a prompt.
        also: further sites whose activations are kept.
    """

    def __init__(
        self,
        model: Model,
        graph: Graph,
        tokens: Int[Tensor, "prompt pos"],
        score: Callable[[Tensor], Float[Tensor, " prompt"]],
        *,
        also: Sequence[str] = (),
    ) -> None:
        self._model, self._graph = model, graph
        self._blocks = model.tower.blocks
        last = Site("resid_post", graph.n_layers - 1)
        sites = ["resid_pre", "q", "k", "v", *also, last]
        sites += [] if model.tower.parallel else ["resid_mid"]
        sites += ["ln1"] if self._blocks[0].ln1 is not None else []
        sites += ["ln2"] if self._blocks[0].ln2 is not None else []
        names = [name for pattern in dict.fromkeys(sites) for name in model.site_names(pattern)]
        with _mlp_inputs(self._blocks) as self._mlp_inputs:
            logits, self.activations = model.run_on_path(tokens, names, logits_to_keep=1)
        with torch.enable_grad():
            values = score(logits[:, -1])
            ends = [
                *(self.activations[Site(kind, layer)] for layer in range(graph.n_layers) for kind in "qkv"),
                *(self._mlp_inputs[layer] for layer in range(graph.n_layers)),
                self.activations[last],
            ]
            found = list(torch.autograd.grad(values.sum(), ends, retain_graph=True, materialize_grads=True))
        self.values = values.detach()
        self._logits = found.pop()
        self._attention = found[: 3 * graph.n_layers]
        self._mlp = found[3 * graph.n_layers :]

    def by_layer(self) -> ByLayer:
        """Readers, as a slice of the graph's, with the gradients at the streams they see; the last layer first."""
        wide = torch.promote_types(self._logits.dtype, torch.float32)
        n_readers = len(self._graph.readers)
        yield slice(n_readers - 1, n_readers), self._logits[None].to(wide)
        for block in reversed(self._blocks):
            reader = self._graph.mlp_reader(block.index)
            yield slice(reader, reader + 1), self._at_mlp(block)[None].to(wide)
            yield self._graph.attention_readers(block.index), self._at_attention(block).to(wide)

    def _at_attention(self, block: Block) -> Float[Tensor, "reader prompt pos d_model"]:
        gradients = []
        for kind, gradient in zip("qkv", self._attention[3 * block.index : 3 * block.index + 3], strict=True):
            weight = self._model.weights.of_block(f"W_{kind.upper()}", block.index)
            by_head = gradient.movedim(-2, 0)
            gradients.append(torch.bmm(by_head.flatten(1, 2), weight.mT).unflatten(1, by_head.shape[1:3]))
        return self._through_norm(torch.cat(gradients), "ln1", "resid_pre", block)

    def _at_mlp(self, block: Block) -> Float[Tensor, "prompt pos d_model"]:
        gradient = self._mlp[block.index]
        gradient = gradient.reshape(self._logits.shape)
        stream = "resid_pre" if self._model.tower.parallel else "resid_mid"
        norm = "ln2" if block.ln2 is not None else "ln1" if self._model.tower.parallel else ""
        return self._through_norm(gradient[None], norm, stream, block)[0] if norm else gradient

    def _through_norm(self, gradients: Tensor, norm: str, stream: str, block: Block) -> Tensor:
        if getattr(block, norm) is None:
            return gradients
        ends = self.activations[Site(norm, block.index)], self.activations[Site(stream, block.index)]
        return torch.stack([torch.autograd.grad(*ends, one, retain_graph=True)[0] for one in gradients])


@contextmanager
def _mlp_inputs(blocks: tuple[Block, ...]) -> Iterator[dict[int, Tensor]]:
    """What each MLP is given, as a node of the graph that leads to nothing else."""
    found: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            name = None if args else next(iter(kwargs))
            given = args[0] if name is None else kwargs[name]
            found[layer] = given.clone() if given.requires_grad else given.clone().requires_grad_()
            return ((found[layer], *args[1:]), kwargs) if name is None else (args, {**kwargs, name: found[layer]})

        return hook

    with ExitStack() as stack:
        for block in blocks:
            first = block.mlp or block.up or block.gate_up
            assert first is not None
            stack.callback(first.register_forward_pre_hook(keep(block.index), with_kwargs=True).remove)
        yield found
