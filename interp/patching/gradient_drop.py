"""GradDrop: gradients without what one layer adds to the residual stream, for each layer in turn.

An effect that goes through a layer may cancel the one that goes round it, so that their sum, the gradient, hides both.
With the outputs of layer l cut off in the backward pass, the other part shows. One forward pass is kept, and goes
backward once a layer.

Source: Kramár et al. 2024 (arXiv 2403.00745), Eq. 11. Checked against runs with detached outputs in
tests/patching/test_gradient_drop.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.model import Model, Site
from interp.model.hooks import Run, Tap, tapped

_IN_ATTENTION = ("q", "k", "v", "rot_q", "rot_k", "attn_scores", "pattern", "z", "result", "attn_out")
_IN_MLP = ("mlp_pre", "mlp_post", "mlp_out")
INSIDE_A_LAYER = frozenset((*_IN_ATTENTION, *_IN_MLP))
"""Kinds of site that reach the output through what their own layer adds to the stream, and in no other way."""


class DroppedLayers:
    """One forward pass, and backward passes through it that each leave out one layer's outputs.

    Args:
        model: the model.
        tokens: prompts of one length.
        metric: from logits at the last position to one value a prompt.
        sites: whose activations and gradients are wanted.
    """

    def __init__(
        self,
        model: Model,
        tokens: Int[Tensor, "batch pos"],
        metric: Callable[[Tensor], Float[Tensor, " batch"]],
        sites: Sequence[Site],
    ) -> None:
        self._n_layers = model.n_layers
        self._dropped = -1
        # From the embedding on, so that the outputs of every layer are in the graph.
        on_path_sites = list(dict.fromkeys([Site("embed"), *sites]))
        with tapped(model.anatomy, self._cuts(model)):
            logits, self._on_path = model.run_on_path(tokens, on_path_sites, logits_to_keep=1)
        with torch.enable_grad():
            self._values = metric(logits[:, -1])

    @property
    def values(self) -> Float[Tensor, " batch"]:
        """The metric of each prompt."""
        return self._values.detach()

    @property
    def activations(self) -> Mapping[str, Tensor]:
        """Activations of the sites."""
        return {site: node.detach() for site, node in self._on_path.items()}

    def gradients(self) -> Iterator[dict[str, Tensor]]:
        """For each layer, the gradients at the sites with that layer's outputs left out.

        Each is 0 at sites within the layer that is left out.
        """
        nodes = list(self._on_path.values())
        for layer in range(self._n_layers):
            self._dropped = layer
            found = torch.autograd.grad(self._values.sum(), nodes, retain_graph=True, allow_unused=True)
            yield {
                site: torch.zeros_like(node) if gradient is None or _is_inside(site, layer) else gradient
                for (site, node), gradient in zip(self._on_path.items(), found, strict=True)
            }

    def _cuts(self, model: Model) -> list[Tap]:
        """Taps on the outputs of every layer that let gradients pass or not."""

        def cut(layer: int) -> Callable[[Tensor, Run], Tensor]:
            def stop(gradient: Tensor) -> Tensor | None:
                return torch.zeros_like(gradient) if self._dropped == layer else None

            def tap(activation: Tensor, run: Run) -> Tensor:
                activation.register_hook(stop)
                # Returned even though it is unchanged: some sites are read as new tensors, which must be on the path.
                return activation

            return tap

        return [
            Tap(Site(kind, layer), cut(layer)) for kind in ("attn_out", "mlp_out") for layer in range(self._n_layers)
        ]


def _is_inside(site: Site, layer: int) -> bool:
    return site.layer == layer and site.kind in INSIDE_A_LAYER
