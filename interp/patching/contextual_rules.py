"""The rules of contextual decomposition: how a part of an activation goes through each operation of a transformer.

Every activation is total = relevant + irrelevant. The relevant parts of several sources travel through the model's own
code as further rows of its batch, beneath the total: rows [total, source 1, source 2, ...]. What is linear without a
bias (residual sums, rotary, projections, scalings) is then right as it is. Hooks put in the rules for everything else:

| operation | relevant part of the output (b: of what is relevant, c = total − b) |
|---|---|
| bias b₀ of Wx + b₀ | "shared": b₀·abs(Wb)/(abs(Wb) + abs(Wc) + 1e-8) is added to Wb; "irrelevant": nothing is |
| norm | with the total's scale: (b − mean b)·w/s, no mean for RMSNorm; bias likewise, by abs(b) and abs(c) |
| activation function f | f(total) − f(c) |
| gated product f(g)·u | f(g)·u of the total − that of the irrelevant parts |
| attention | softmax(scores of b) · v of b, or frozen: the total's pattern · v of b |
| soft-cap of logits | as an activation function |

Shares of a bias jump where Wb and Wc are both near 0, and what jumps is spread by the next layer: on random models with
biases, errors of 1e-8 become visible within three layers. Without biases, or with them left irrelevant, nothing jumps.

Source: Hsu et al., ICLR 2025 (arXiv 2407.00886), where biases are shared. The irrelevant part is what is left, so that
parts always add up to the model's own activation; in the paper's code a bias is left out of both parts where both are
0. Rules that the paper does not have, because GPT-2 and BERT do not need them: RMSNorm, gated products and soft-caps;
rotary is linear, norms of q and k follow the norm's rule, grouped heads share their key's and value's parts.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from interp.model import Model
from interp.model.attention import (
    AttentionCall,
    AttentionResult,
    attention_pattern,
    attention_scores,
    attention_wrapped,
    by_query_head,
    implementation_of,
)
from interp.model.projections import bias_of
from interp.patching.rules.gates import GatedProduct
from interp.patching.rules.norms import Norm
from interp.patching.rules.parts import Parts

Bias = Literal["shared", "irrelevant"]
TINY = 1e-8
"""Keeps shares of a bias finite; the paper's code has the same."""


@dataclass(frozen=True)
class Choice:
    """What can be chosen about the rules; see `contextual_decomposition`."""

    frozen_attention: bool = False
    sign_fix: bool = False
    bias: Bias = "shared"

    def __post_init__(self) -> None:
        if self.bias not in get_args(Bias):
            raise ValueError(f"bias={self.bias!r}; it is one of {', '.join(get_args(Bias))}")


def linear_rule(
    total: Float[Tensor, "1 *shape"],
    part: Float[Tensor, "source *shape"],
    bias: Float[Tensor, " out"],
    *,
    shared: bool = True,
) -> Float[Tensor, "source *shape"]:
    """The relevant part of Wx + b from Wx + b of the total and of the part: with a share of the bias, or none of it."""
    own = part - bias
    return own + bias * _share(own, total - part) if shared else own


def norm_rule(
    norm: Norm, total: Float[Tensor, "1 *shape"], part: Float[Tensor, "source *shape"], *, shared: bool = True
) -> Float[Tensor, "source *shape"]:
    """The relevant part of a norm's output from its input, in float32 at least: the scale is the total's."""
    wide = part.to(torch.promote_types(part.dtype, torch.float32))
    centred = wide - wide.mean(-1, keepdim=True) if norm.kind == "layer" else wide
    scaled = centred * norm.inverse_scale(total)
    weight, bias = norm.weight(), bias_of(norm.module)
    scaled = scaled if weight is None else scaled.mul_(weight)
    return scaled if bias is None or not shared else scaled + bias * _share(wide, total - wide)


def elementwise_rule(
    function: Callable[[Tensor], Tensor],
    total: Float[Tensor, "1 *shape"],
    part: Float[Tensor, "source *shape"],
    output: Float[Tensor, "1 *shape"],
) -> Float[Tensor, "source *shape"]:
    """The relevant part of f's output at `total`: what goes when the part goes."""
    return output - function(total - part)


def product_rule(
    product: Float[Tensor, "1 *shape"],
    left: Float[Tensor, "row *shape"],
    right: Float[Tensor, "row *shape"],
) -> Float[Tensor, "source *shape"]:
    """The relevant part of a product of two factors, each given as [total, parts]: what goes when both parts go."""
    return product - (left[:1] - left[1:]).mul_(right[:1] - right[1:])


def without_opposition(
    total: Float[Tensor, "1 *shape"], part: Float[Tensor, "source *shape"]
) -> Float[Tensor, "source *shape"]:
    """Where relevant and irrelevant part have opposite signs, the larger one is given their sum and the other 0.

    Source: `normalize_rel_irrel` of the paper's code.
    """
    rest = total - part
    winner = torch.where(part.abs() > rest.abs(), total, 0.0)
    return torch.where(part * rest < 0, winner, part)


def _share(own: Tensor, rest: Tensor) -> Tensor:
    own = own.abs()
    return own / (own + rest.abs() + TINY)


@contextmanager
def contextual_rules(model: Model, parts: Parts, n_rows: int, choice: Choice) -> Iterator[None]:
    """Let runs inside, in this thread, take their batch as [total, source 1, source 2, ...].

    Args:
        model: the model; every run inside must have `n_rows` times the prompts of the total.
        parts: its non-linear parts.
        n_rows: number of sources plus one.
        choice: of rules; the sign fix is not made here.
    """
    shared = choice.bias == "shared"
    install = _Installer(n_rows)
    with install.stack:
        for module in model.anatomy.root.modules():
            if isinstance(module, nn.Linear | Conv1D) and bias_of(module) is not None:
                install.on_output(module, partial(_linear, shared=shared))
        for norm in parts.norms:
            install.on_output(norm.module, partial(_norm, norm, shared=shared))
        for activation in parts.activations:
            install.on_output(activation.module, _elementwise)
        for gated in parts.gated:
            _install_product(install, gated)
        attend = partial(_attend, n_rows, choice.frozen_attention, install.owner)
        install.stack.enter_context(attention_wrapped({block.attn: attend for block in model.tower.blocks}))
        yield


Rule = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""(module, input rows, output rows) -> the parts of the output, without the total."""


class _Installer:
    """Registers hooks that see activations as [total or source, ...] and change the parts alone, in this thread."""

    def __init__(self, n_rows: int) -> None:
        self.stack = ExitStack()
        self.n_rows = n_rows
        self.owner = threading.get_ident()

    def on_output(self, module: nn.Module, rule: Rule) -> None:
        """Put parts of the output in the place of what the module makes of the parts of its input."""
        self.stack.callback(module.register_forward_hook(partial(self._change_output, rule)).remove)

    def keep_output(self, module: nn.Module, kept: dict[str, Tensor], name: str) -> None:
        """Keep what a module returned last."""
        self.stack.callback(module.register_forward_hook(partial(self._keep_output, kept, name)).remove)

    def on_input(self, module: nn.Module, rule: Callable[[Tensor], Tensor]) -> None:
        """Put `rule(input rows)` in the place of the parts of a module's input."""
        self.stack.callback(module.register_forward_pre_hook(partial(self._change_input, rule)).remove)

    def _rows(self, x: Tensor) -> Tensor:
        """Batch axis (or batch and position as one) as total and sources."""
        return x.unflatten(0, (self.n_rows, -1))

    def _change_output(self, rule: Rule, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if threading.get_ident() != self.owner:
            return None
        rows = self._rows(output)
        parts = rule(module, self._rows(args[0]), rows)
        return torch.cat([rows[:1], parts.to(output.dtype)]).flatten(0, 1)

    def _keep_output(
        self, kept: dict[str, Tensor], name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor
    ) -> None:
        if threading.get_ident() == self.owner:
            kept[name] = self._rows(output)

    def _change_input(
        self, rule: Callable[[Tensor], Tensor], module: nn.Module, args: tuple[Any, ...]
    ) -> tuple[Any, ...] | None:
        if threading.get_ident() != self.owner:
            return None
        rows = self._rows(args[0])
        return (torch.cat([rows[:1], rule(rows).to(rows.dtype)]).flatten(0, 1), *args[1:])


def _linear(module: nn.Module, x: Tensor, y: Tensor, *, shared: bool) -> Tensor:
    bias = bias_of(module)
    assert bias is not None
    return linear_rule(y[:1], y[1:], bias, shared=shared)


def _norm(norm: Norm, module: nn.Module, x: Tensor, y: Tensor, *, shared: bool) -> Tensor:
    return norm_rule(norm, x[:1], x[1:], shared=shared)


def _elementwise(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    # `forward`, not the module's call: the hook that asks is on it.
    return elementwise_rule(module.forward, x[:1], x[1:], y[:1])


def _install_product(install: _Installer, gated: GatedProduct) -> None:
    """A gated product is seen where it enters the down projection; its factors are kept as they are computed."""
    kept: dict[str, Tensor] = {}
    install.keep_output(gated.activation.module, kept, "gate")
    install.keep_output(gated.up, kept, "up")
    install.on_input(gated.down, partial(_product, gated, kept))


def _product(gated: GatedProduct, kept: dict[str, Tensor], product: Tensor) -> Tensor:
    up = kept.pop("up")
    return product_rule(product[:1], kept.pop("gate"), up[..., -product.shape[-1] :] if gated.fused else up)


def _attend(n_rows: int, frozen: bool, owner: int, call: AttentionCall) -> AttentionResult:
    """The model's own attention for the total, and the rule for the parts."""
    if threading.get_ident() != owner:
        return call.run()
    n_totals = len(call.query) // n_rows
    # Every source has the total's mask.
    mask = call.mask if call.mask is None or len(call.mask) == 1 else call.mask[:n_totals]
    total = replace(
        call, query=call.query[:n_totals], key=call.key[:n_totals], value=call.value[:n_totals], mask=mask, taps=()
    )
    value = by_query_head(call.value, call.query.shape[1])[n_totals:]
    if frozen:
        z = (_pattern(total) @ value.unflatten(0, (-1, n_totals))).flatten(0, 1)
    else:
        parts_mask = mask if mask is None or len(mask) == 1 else mask.repeat(n_rows - 1, 1, 1, 1)
        parts = replace(total, query=call.query[n_totals:], key=call.key[n_totals:], mask=parts_mask)
        z = _pattern(parts) @ value
    own, _ = total.run()
    return torch.cat([own, z.transpose(1, 2)]), None


def _pattern(call: AttentionCall) -> Tensor:
    return attention_pattern(attention_scores(call.module, call.query, call.key, call.mask, **call.options))


def check_supported(model: Model, parts: Parts) -> None:
    """Refuse models with a part that no rule is known for.

    Raises:
        NotImplementedError: naming the family and the part.
    """
    family, tower = model.anatomy.family, model.tower
    if parts.experts:
        raise NotImplementedError(
            f"contextual decomposition has no rule for the mixture of experts of {family} ({parts.experts[0].path})"
        )
    if not tower.uses_attention_interface:
        raise NotImplementedError(
            f"contextual decomposition cannot reach the attention of {family}: transformers implements it outside its "
            "AttentionInterface"
        )
    implementation = implementation_of(tower.blocks[0].attn.config)
    if implementation not in ("eager", "sdpa"):
        raise NotImplementedError(
            f"contextual decomposition needs the attention mask of {family}, which {implementation!r} does not build; "
            "load the model with attn_implementation='sdpa' or 'eager'"
        )
