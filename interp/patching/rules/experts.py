"""Mixtures of experts: fused experts modules, whose gated products no module boundary shows.

Routed experts compute Σ w·down(act(g)·u). The weights w come from the router, which gets the plain gradient. The
Half-rule on act(g)·u is a half on the way into the experts' output and a factor 2 on what goes back to w. Experts that
gate by a formula of their own (gpt-oss) have their `_apply_gate` wrapped.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from interp.model.anatomy import UnsupportedModel
from interp.patching.rules.activations import Activation, with_identity_rule
from interp.patching.rules.gates import with_scaled_gradient


@dataclass(frozen=True)
class ClampedGate:
    """The gate of gpt-oss: f(g)·(clamp(u) + 1) with f(g) = c·sigmoid(alpha·c), c = min(g, limit).

    The columns of g and u alternate.
    """

    alpha: float
    limit: float

    slope_at_zero = 0.5
    """f′(0)."""

    def split(self, gate_up: Tensor) -> tuple[Tensor, Tensor]:
        """The pair (g, u) from the columns of the fused projection."""
        return gate_up[..., ::2], gate_up[..., 1::2]

    def activation(self, gate: Tensor) -> Tensor:
        """f(g)."""
        gate = gate.clamp(max=self.limit)
        return gate * torch.sigmoid(gate * self.alpha)

    def factor(self, up: Tensor) -> Tensor:
        """What f(g) is multiplied by."""
        return up.clamp(-self.limit, self.limit) + 1

    def __call__(self, gate_up: Tensor) -> Tensor:
        """The gated product."""
        gate, up = self.split(gate_up)
        return self.factor(up) * self.activation(gate)


@dataclass(frozen=True)
class Experts:
    """A module that computes all experts of a block and adds them up by the router's weights.

    Called as `experts(hidden_states, indices, weights)`.
    """

    module: nn.Module
    path: str
    weights_name: str
    """Name of its argument that holds the router's weights."""
    activation: Activation | None
    """The activation function of its gate; None if it gates by `gate`."""
    gate: ClampedGate | None


@dataclass(frozen=True)
class SharedExpert:
    """An expert that every token passes: `sigmoid(gate(x)) * module(x)`."""

    module: nn.Module
    gate: nn.Module
    path: str


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds the stacked weights of several experts."""
    down = getattr(module, "down_proj", None)
    return isinstance(down, nn.Parameter) and down.dim() == 3


def probed_experts(module: nn.Module, path: str, activation: Activation | None) -> Experts:
    """A module of experts, its gate checked against the formula that the rules use.

    Raises:
        UnsupportedModel: if it is called, or gates, in a way that no rule is known for.
    """
    name = f"{path} ({type(module).__name__})"
    arguments = list(inspect.signature(module.forward).parameters)
    alpha, limit = getattr(module, "alpha", None), getattr(module, "limit", None)
    if len(arguments) != 3:
        raise UnsupportedModel(f"{name} is not called with (hidden_states, indices, weights): no rule is known")
    if getattr(module, "gate_up_proj", None) is None:
        raise UnsupportedModel(f"{name} has no gate_up_proj: no rule is known for ungated experts")
    gate = None
    if activation is None:
        if not isinstance(alpha, (int, float)) or not isinstance(limit, (int, float)):
            raise UnsupportedModel(f"{name} has no activation module: no rule is known for its gate")
        gate = ClampedGate(alpha, limit)
    _check_gate(module, name, activation, gate)
    return Experts(module, path, arguments[2], activation, gate)


@torch.no_grad()
def _check_gate(module: nn.Module, name: str, activation: Activation | None, gate: ClampedGate | None) -> None:
    apply_gate: Any = getattr(module, "_apply_gate", None)
    if apply_gate is None and activation is not None:
        return
    # Wide enough to reach any clamp.
    gate_up = 20 * torch.randn(3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if gate is not None:
        expected = gate(gate_up)
    else:
        assert activation is not None
        expected = activation.module.forward(gate_up[:, :4]) * gate_up[:, 4:]
    if apply_gate is None or not torch.allclose(apply_gate(gate_up), expected, rtol=1e-9):
        raise UnsupportedModel(f"{name} gates by a formula that no rule is known for")


class _Valued(torch.autograd.Function):
    """Given numbers with the backward pass of another computation of them."""

    @staticmethod
    def forward(ctx: Any, computed: Tensor, values: Tensor) -> Tensor:
        return values.detach()

    @staticmethod
    def backward(ctx: Any, coefficient: Tensor) -> Any:
        return coefficient, None


def with_gate_rules(
    gate: ClampedGate, gate_up: Tensor, gated: Tensor, *, identity: bool, half: bool, stop: bool
) -> Tensor:
    """The gated product `gated` of the columns `gate_up`, with the backward pass of the rules asked for.

    Args:
        gate: the formula.
        gate_up: output of the fused projection.
        gated: what the module made of it.
        identity: Identity-rule on f(g).
        half: half of what arrives for each factor.
        stop: f(g) is a constant.
    """
    branch, up = gate.split(gate_up)
    activated = gate.activation(branch)
    if stop:
        activated = activated.detach()
    elif identity:
        activated = with_identity_rule(branch, activated, gate.slope_at_zero)
    # The clamp and the 1 of the other factor are a cap and a bias: plain gradient.
    computed = gate.factor(up) * activated
    result: Tensor = _Valued.apply(with_scaled_gradient(computed, 0.5) if half else computed, gated)
    return result


GateRule = Callable[[Tensor, Tensor], Tensor]
"""(columns of the fused projection, their gated product) -> the gated product."""

_lock = threading.RLock()
_gate_rules: dict[nn.Module, list[GateRule]] = {}


@contextmanager
def gate_wrapped(experts: nn.Module, rule: GateRule) -> Iterator[None]:
    """Pass what `experts._apply_gate` returns through a function, for the duration of the context, in every thread."""
    module: Any = experts
    with _lock:
        if experts not in _gate_rules:
            _gate_rules[experts] = []
            module._apply_gate = _gate_with_rules(module, module._apply_gate)
        _gate_rules[experts].append(rule)
    try:
        yield
    finally:
        with _lock:
            _gate_rules[experts].remove(rule)
            if not _gate_rules[experts]:
                del _gate_rules[experts]
                del module._apply_gate


def _gate_with_rules(module: nn.Module, original: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def apply_gate(gate_up: Tensor) -> Tensor:
        gated = original(gate_up)
        for rule in list(_gate_rules.get(module, ())):
            gated = rule(gate_up, gated)
        return gated

    return apply_gate
