"""Mixtures of experts with secant multipliers.

The two runs may choose different experts for a token. So all experts that either run chose are computed in both, and
weighted by the router's weights, 0 where an expert was not chosen: Σ w·out is then the same sum over the same experts
in both runs, and a product like any other. The way from router logits to weights is one operation: its multiplier is
the mean of the gradients of both runs, with what that leaves unexplained put on the difference of the logits.

Values are those of the model's own call; the sum is computed beside it, for the backward pass.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp.model.anatomy import UnsupportedModel
from interp.patching.rules.experts import Experts
from interp.patching.rules.secant import ROUNDING, secant_correction, secant_elementwise, secant_product, with_term
from interp.patching.rules.secant_pairing import KeptRun


@contextmanager
def paired_experts(run: KeptRun, experts: Experts, router: nn.Module) -> Iterator[None]:
    """Wrap the call of an experts module, in this thread: it keeps what it sees, or gets secant multipliers."""
    module = experts.module
    own = vars(module).get("forward")
    paired = _PairedExperts(run, experts, router)
    hook = router.register_forward_hook(paired.on_router)
    module.forward = paired.forward
    try:
        yield
    finally:
        hook.remove()
        del module.forward
        if own is not None:
            module.forward = own


class _PairedExperts:
    """The experts and the router of one block."""

    def __init__(self, run: KeptRun, experts: Experts, router: nn.Module) -> None:
        self.run, self.experts, self.router = run, experts, router
        self.original: Callable[..., Tensor] = experts.module.forward
        self.owner = threading.get_ident()
        self.routed: list[tuple[Tensor, Tensor]] = []
        """Input and logits of the router, until the experts are called."""

    def on_router(self, router: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if threading.get_ident() == self.owner:
            if not isinstance(output, tuple) or len(output) != 3:
                raise UnsupportedModel(f"the router of {self.experts.path} does not return (logits, weights, indices)")
            self.routed.append((args[0], output[0]))

    def forward(self, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        if threading.get_ident() != self.owner:
            return self.original(hidden, indices, weights)
        router_input, logits = self.routed.pop()
        other = self.run.exchange(self.experts.module, hidden, router_input)
        with torch.no_grad():
            output = self.original(hidden, indices, weights)
        if other is None:
            return output
        choice = _Choice.of(self.router, router_input, other[1])
        mixture = _mixture(self.experts, hidden, other[0], _Choose.apply(logits, choice), choice.other_weights)
        _check_formula(self.experts, mixture, output)
        return with_term(output, mixture)


def _mixture(
    experts: Experts,
    x: Float[Tensor, "token d_model"],
    x_other: Float[Tensor, "token d_model"],
    weights: Float[Tensor, "token expert"],
    weights_other: Float[Tensor, "token expert"],
) -> Float[Tensor, "token d_model"]:
    """Σ w·out over all experts that either run chose."""
    total = torch.zeros_like(x)
    is_chosen = (weights.detach() != 0) | (weights_other != 0)
    for index in is_chosen.any(0).nonzero().flatten().tolist():
        tokens = is_chosen[:, index].nonzero().flatten()
        output, output_other = _expert(experts, index, x[tokens], x_other[tokens])
        weight, weight_other = weights[tokens, index, None], weights_other[tokens, index, None]
        weighted = secant_product(weight, output, weight * output, weight_other, output_other)
        total = total.index_add(0, tokens, weighted.to(total.dtype))
    return total


def _check_formula(experts: Experts, computed: Tensor, output: Tensor) -> None:
    """Refuse experts that compute something else than the sum that multipliers are given to."""
    tolerance = 0.05 if output.dtype in (torch.bfloat16, torch.float16) else 1e-3
    error = float((computed.detach() - output).abs().max())
    if not error <= tolerance * float(output.abs().max()) and bool(output.isfinite().all()):
        raise UnsupportedModel(
            f"{experts.path} ({type(experts.module).__name__}) does not return the sum of down(act(gate)·up) by the "
            "router's weights: no secant multiplier is known"
        )


def _expert(experts: Experts, index: int, x: Tensor, x_other: Tensor) -> tuple[Tensor, Tensor]:
    """(output of one expert, output in the other run)."""
    module = experts.module
    up, up_other = (_projected(module, "gate_up_proj", index, one) for one in (x, x_other))
    if experts.gate is not None:
        (g, u), (g_other, u_other) = experts.gate.split(up), experts.gate.split(up_other)
        a, a_other = _paired(experts.gate.activation, g, g_other)
        b, b_other = _paired(experts.gate.factor, u, u_other)
    else:
        assert experts.activation is not None
        (g, b), (g_other, b_other) = up.chunk(2, -1), up_other.chunk(2, -1)
        a, a_other = _paired(experts.activation.module.forward, g, g_other)
    product = secant_product(a, b, a * b, a_other, b_other)
    return _projected(module, "down_proj", index, product), _projected(module, "down_proj", index, a_other * b_other)


def _projected(module: nn.Module, name: str, index: int, x: Tensor) -> Tensor:
    """X through one expert's part of a stacked projection."""
    weight, bias = getattr(module, name)[index], getattr(module, f"{name}_bias", None)
    projected = x @ weight if getattr(module, "is_transposed", False) else nn.functional.linear(x, weight)
    return projected if bias is None else projected + bias[index]


def _paired(function: Callable[[Tensor], Tensor], x: Tensor, x_other: Tensor) -> tuple[Tensor, Tensor]:
    y, y_other = function(x.detach()), function(x_other)
    return secant_elementwise(function, x, y, x_other, y_other), y_other


@dataclass(frozen=True)
class _Routing:
    """A router's call on its own, from its logits to one weight an expert."""

    logits: Float[Tensor, "token expert"]
    weights: Float[Tensor, "token expert"]
    eps: float

    @classmethod
    @torch.enable_grad()
    def of(cls, router: nn.Module, x: Tensor) -> _Routing:
        logits, weights, indices = router.forward(x.detach().requires_grad_())
        spread = torch.zeros_like(logits, dtype=weights.dtype).scatter(1, indices, weights)
        # Routers compute in float32, whatever type they return.
        return cls(logits, spread, max(torch.finfo(weights.dtype).eps, torch.finfo(torch.float32).eps))

    def gradient(self, multiplier: Tensor) -> Tensor:
        """Of the weights times a multiplier, with respect to the logits."""
        (gradient,) = torch.autograd.grad(self.weights, self.logits, multiplier, retain_graph=True)
        return gradient


@dataclass(frozen=True)
class _Choice:
    """A router in both runs."""

    here: _Routing
    other: _Routing

    @classmethod
    def of(cls, router: nn.Module, x: Tensor, x_other: Tensor) -> _Choice:
        return cls(_Routing.of(router, x), _Routing.of(router, x_other))

    @property
    def other_weights(self) -> Tensor:
        return self.other.weights.detach()


class _Choose(torch.autograd.Function):
    """From router logits to weights; backward with the mean gradient, corrected to be exact."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, choice: _Choice) -> Tensor:
        ctx.choice = choice
        return choice.here.weights.detach()

    @staticmethod
    def backward(ctx: Any, multiplier: Tensor) -> Any:
        here, other = ctx.choice.here, ctx.choice.other
        gradient = (here.gradient(multiplier) + other.gradient(multiplier)) / 2
        weights, weights_other = here.weights.detach(), other.weights.detach()
        rise = torch.linalg.vecdot(multiplier, weights - weights_other)
        size = torch.linalg.vecdot(multiplier.abs(), weights + weights_other)
        difference = (here.logits - other.logits).detach()
        return secant_correction(gradient, difference, rise, ROUNDING * here.eps * size), None
