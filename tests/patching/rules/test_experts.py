"""Rules on mixtures of experts against mixtures written out token by token, routers included."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import interp
from interp.model.anatomy import UnsupportedModel
from interp.patching.rules.experts import ClampedGate, is_experts, probed_experts
from interp.patching.rules.parts import parts_of
from interp.patching.rules.relevance import PRESETS, relevance_rules
from tests.model.families import FAMILIES
from tests.patching.rules.by_hand import ByHand, share, silu

NAMES = ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss"]


def routed(mlp: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """(weights, indices) of the experts of each token, with the plain gradient."""
    _, weights, indices = (mlp.router if hasattr(mlp, "router") else mlp.gate)(x)
    return weights, indices


def clamped(gate_up: Tensor, experts: Any, hand: ByHand) -> Tensor:
    gate, up = gate_up[0::2], gate_up[1::2].clamp(-experts.limit, experts.limit) + 1

    def function(g):
        return g.clamp(max=experts.limit) / (1 + torch.exp(-experts.alpha * g.clamp(max=experts.limit)))

    return hand.gated(gate, up, function)


def mixture(mlp: Any, x: Tensor, hand: ByHand, *, half_router: bool) -> Tensor:
    """What the MLP makes of tokens [token, d_model], one token and expert at a time."""
    experts, (weights, indices) = mlp.experts, routed(mlp, x)
    rows = []
    for token in range(len(x)):
        total = torch.zeros_like(x[0])
        for place, number in enumerate(indices[token].tolist()):
            if hasattr(experts, "gate_up_proj_bias"):
                gate_up = x[token] @ experts.gate_up_proj[number] + experts.gate_up_proj_bias[number]
                out = clamped(gate_up, experts, hand) @ experts.down_proj[number] + experts.down_proj_bias[number]
            else:
                gate, up = (experts.gate_up_proj[number] @ x[token]).chunk(2)
                out = experts.down_proj[number] @ hand.gated(gate, up, silu)
            product = weights[token, place] * out
            total = total + (share(product, 0.5) if half_router else product)
        rows.append(total)
    result = torch.stack(rows)
    if hasattr(mlp, "shared_expert"):
        shared = mlp.shared_expert
        out = shared.down_proj(hand.gated(shared.gate_proj(x), shared.up_proj(x), silu))
        product = torch.sigmoid(mlp.shared_expert_gate(x)) * out
        result = result + (share(product, 0.5) if half_router else product)
    return result


def make(name, dtype):
    model = interp.Model(FAMILIES[name].make_model(dtype=dtype))
    x = 9 * torch.randn(1, 7, model.d_model, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return model, x.to(dtype).requires_grad_()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-4)], ids=str)
@pytest.mark.parametrize("preset", ["relp", "attnlrp", "cp-lrp"])
@pytest.mark.parametrize("name", NAMES)
def test_coefficients_of_a_mixture_equal_those_written_by_hand(name, preset, dtype, tolerance):
    model, x = make(name, dtype)
    mlp = model.hf.model.layers[1].mlp
    with relevance_rules(model, preset):
        y = mlp(x)
    y = y[0] if isinstance(y, tuple) else y
    coefficient = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
    (found,) = torch.autograd.grad(y, x, coefficient)
    hand = ByHand(stop_gate="stop-gate" in PRESETS[preset])
    expected_y = mixture(mlp, x[0], hand, half_router="half-router" in PRESETS[preset])
    (expected,) = torch.autograd.grad(expected_y, x, coefficient[0])
    torch.testing.assert_close(y[0], expected_y, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=10 * tolerance)


def test_the_clamps_of_gpt_oss_are_reached():
    model, x = make("gpt_oss", torch.float64)
    experts = model.hf.model.layers[1].mlp.experts
    gate_up = x[0] @ experts.gate_up_proj[0] + experts.gate_up_proj_bias[0]
    assert (gate_up[:, ::2] > experts.limit).any()
    assert (gate_up[:, 1::2].abs() > experts.limit).any()


@pytest.mark.parametrize("name", NAMES)
def test_the_router_keeps_its_gradient(name):
    # With experts that ignore how they are reached, what is left of the rules is what comes back to the weights.
    model, x = make(name, torch.float64)
    experts = parts_of(model).experts[1]
    router = getattr(model.hf.model.layers[1].mlp, "router", None) or model.hf.model.layers[1].mlp.gate
    _, weights, indices = router(x[0].detach())
    weights = weights.detach().requires_grad_()
    plain = torch.autograd.grad(experts.module(x[0].detach(), indices, weights).square().sum(), weights)[0]
    with relevance_rules(model, "relp"):
        y = experts.module(x[0], indices, weights)
        named = experts.module(x[0], indices, **{experts.weights_name: weights})
    for result in (y, named):
        (found,) = torch.autograd.grad(result.square().sum(), weights, retain_graph=True)
        torch.testing.assert_close(found, plain)


class _Experts(nn.Module):
    """Two experts of width 4 on 3 features."""

    def __init__(self, act_fn=None):
        super().__init__()
        self.gate_up_proj, self.down_proj = (nn.Parameter(torch.ones(2, *shape)) for shape in ((8, 3), (3, 4)))
        if act_fn is not None:
            self.act_fn = act_fn


class OneArgument(_Experts):
    """Weighted outside."""

    def forward(self, hidden_states):
        return hidden_states


class NoFunction(_Experts):
    """Gates by no known formula."""

    def forward(self, hidden_states, indices, weights):
        return hidden_states


class OtherGate(NoFunction):
    """The function on the wrong half."""

    def _apply_gate(self, gate_up):
        gate, up = gate_up.chunk(2, -1)
        return gate * self.act_fn(up)


class OtherClamp(NoFunction):
    """gpt-oss without the 1."""

    alpha, limit = 1.702, 7.0

    def _apply_gate(self, gate_up):
        gate, up = ClampedGate(self.alpha, self.limit).split(gate_up)
        return up * gate * torch.sigmoid(gate)


class Ungated(_Experts):
    """One projection up."""

    def __init__(self):
        super().__init__()
        self.up_proj, self.gate_up_proj = self.gate_up_proj, None

    def forward(self, hidden_states, indices, weights):
        return hidden_states


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (OneArgument(), r"not called with \(hidden_states, indices, weights\)"),
        (NoFunction(), "no activation module"),
        (OtherGate(nn.SiLU()), "gates by a formula"),
        (OtherClamp(), "gates by a formula"),
        (Ungated(), "ungated experts"),
    ],
)
def test_experts_without_a_rule_are_refused_by_path(module, reason):
    assert is_experts(module)
    hf = FAMILIES["mixtral"].make_model()
    hf.model.layers[1].mlp.experts = module
    path = rf"model\.layers\.1\.mlp\.experts \({type(module).__name__}\)"
    with pytest.raises(UnsupportedModel, match=rf"{path}.*{reason}"):
        parts_of(interp.Model(hf))
    if getattr(module, "act_fn", None) is None:
        with pytest.raises(UnsupportedModel, match=reason):
            probed_experts(module, "experts", None)
