"""Weights by head, in TransformerLens's names and shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp.model import projections
from interp.model.sites import SiteUnavailable
from interp.model.tower import Block, Tower


class Weights:
    """Weight matrices of one tower, computed when read.

    `block(l)` gives views into the model's own parameters; the stacked forms (`W_Q` [layer, head, d_model, d_head],
    ...) copy all layers into one tensor, as in TransformerLens. Biases that a model does not have are zero.
    """

    NAMES: ClassVar[tuple[str, ...]] = (
        "W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O", "W_in", "W_gate", "W_out", "b_in", "b_out", "W_E",
        "W_U", "b_U",
    )  # fmt: skip

    def __init__(self, hf: nn.Module, tower: Tower) -> None:
        self._hf = hf
        self._tower = tower

    def __getattr__(self, name: str) -> Tensor:
        if name not in _BY_BLOCK:
            raise AttributeError(f"no weight is called {name!r}; there are {', '.join(self.NAMES)}")
        return torch.stack([self.of_block(name, layer) for layer in range(self._tower.n_layers)])

    def of_block(self, name: str, layer: int) -> Tensor:
        """One weight of one block; a view into the model's parameter wherever its column order allows one."""
        return _BY_BLOCK[name](self._tower.blocks[layer], self._tower).detach()

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        """Token embedding."""
        return self._hf.get_input_embeddings().weight.detach()  # type: ignore[operator]

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """Unembedding, without the family's logit scale."""
        return projections.matrix(self._head).detach()

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"]:
        """Bias of the unembedding, zero where there is none."""
        bias = projections.bias_of(self._head)
        return torch.zeros_like(self.W_U[0]) if bias is None else bias.detach()

    @property
    def logit_scale(self) -> float:
        """What the family multiplies logits by (Cohere's `logit_scale`, Granite's `1 / logits_scaling`)."""
        config = self._tower.config
        return float(getattr(config, "logit_scale", None) or 1.0) / float(
            getattr(config, "logits_scaling", None) or 1.0
        )

    def unembed(self, normed: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_vocab"]:
        """Logits of a normed residual stream, with the family's logit scale and soft-cap.

        Raises:
            SiteUnavailable: for a masked-language-model head, which is more than a matrix.
        """
        project_out = getattr(self._tower.stack, "project_out", None)
        logits = self._head(normed if project_out is None else project_out(normed)) * self.logit_scale
        cap = getattr(self._tower.config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    @property
    def _head(self) -> nn.Module:
        head: Any = self._hf.get_output_embeddings()  # type: ignore[operator]
        if head is None or self._tower.post_norm:
            raise SiteUnavailable(f"{type(self._hf).__name__} has no language-model head that is one matrix")
        return head


def _head_bias(part: projections.Part) -> Callable[[Block, Tower], Tensor]:
    def read(block: Block, tower: Tower) -> Tensor:
        bias = projections.head_bias(part, block, tower)
        if bias is not None:
            return bias
        weight = projections.matrix(block.o)
        return torch.zeros(projections.heads_of(part, tower), tower.d_head, dtype=weight.dtype, device=weight.device)

    return read


def _head_weight(part: projections.Part) -> Callable[[Block, Tower], Tensor]:
    return lambda block, tower: projections.head_weight(part, block, tower)


def _mlp_module(block: Block, tower: Tower, role: str) -> nn.Module:
    module = getattr(block, role)
    if module is None:
        raise SiteUnavailable(f"the MLP of {tower.config.model_type} has no {role} projection of its own")
    return module


def _w_in(block: Block, tower: Tower) -> Tensor:
    if block.gate_up is not None:
        fused = projections.matrix(block.gate_up)
        return fused[:, fused.shape[1] // 2 :]
    return projections.matrix(_mlp_module(block, tower, "up"))


def _w_gate(block: Block, tower: Tower) -> Tensor:
    if block.gate_up is not None:
        return projections.gate_columns(projections.matrix(block.gate_up))
    return projections.matrix(_mlp_module(block, tower, "gate"))


def _w_out(block: Block, tower: Tower) -> Tensor:
    return projections.matrix(_mlp_module(block, tower, "down"))


def _bias_or_zero(module: nn.Module) -> Tensor:
    bias = projections.bias_of(module)
    return torch.zeros_like(projections.matrix(module)[0]) if bias is None else bias


def _b_in(block: Block, tower: Tower) -> Tensor:
    if block.gate_up is not None:
        fused = _bias_or_zero(block.gate_up)
        return fused[fused.shape[0] // 2 :]
    return _bias_or_zero(_mlp_module(block, tower, "up"))


_BY_BLOCK: dict[str, Callable[[Block, Tower], Tensor]] = {
    "W_Q": _head_weight("q"),
    "W_K": _head_weight("k"),
    "W_V": _head_weight("v"),
    "W_O": projections.output_weight,
    "b_Q": _head_bias("q"),
    "b_K": _head_bias("k"),
    "b_V": _head_bias("v"),
    "b_O": lambda block, tower: _bias_or_zero(block.o),
    "W_in": _w_in,
    "W_gate": _w_gate,
    "W_out": _w_out,
    "b_in": _b_in,
    "b_out": lambda block, tower: _bias_or_zero(_mlp_module(block, tower, "down")),
}
