"""Secant multipliers: Δout = M·Δin for every operation, at any size of Δ, and gradients where nothing differs."""

import math

import pytest
import torch
import transformers
from torch import nn

from interp.model.attention import attention_pattern
from interp.patching.rules.norms import probed_norm
from interp.patching.rules.secant import (
    ROUNDING,
    elementwise_slope,
    secant_correction,
    secant_elementwise,
    secant_matrix_product,
    secant_norm,
    secant_product,
    secant_softmax,
    softmax_means,
    with_multiplier,
)

DIFFERENCES = [0.0, 1e-14, 1e-9, 3e-7, 1e-5, 1e-4, 1e-3, 1e-2, 0.3, 4.0, 30.0]
"""Sizes of Δ: none, below and above every switch from one form to another, and huge."""


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def pair(*shape, size):
    """An input of the operation, and the same in the other run; a tenth of the numbers do not differ."""
    x = randn(*shape)
    return x.requires_grad_(), (x + size * randn(*shape) * (torch.rand(shape) > 0.1)).detach()


def multiplied(output, inputs, m):
    """What the backward pass makes of an incoming m, for each input."""
    return torch.autograd.grad(output, inputs, m)


def dot(a, b):
    return (a * b).sum()


ACTIVATIONS = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_new": transformers.activations.ACT2FN["gelu_new"].forward,
    "quick_gelu": transformers.activations.ACT2FN["quick_gelu"].forward,
    "sigmoid": torch.sigmoid,
    "soft-cap": lambda x: 1.5 * torch.tanh(x / 1.5),
    "relu": torch.relu,
    "squared relu": lambda x: torch.relu(x).square(),
    "clamp": lambda x: x.clamp(-0.5, 0.7),
}


@pytest.mark.parametrize("size", DIFFERENCES)
@pytest.mark.parametrize("function", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_elementwise_multiplier_times_difference_is_the_rise(function, size):
    x, other = pair(40, 50, size=size)
    y, y_other = function(x), function(other)
    m = randn(40, 50)
    (to_x,) = multiplied(secant_elementwise(function, x, y, other, y_other), [x], m)
    # Squares of numbers of size 60 are computed to 1e-12 only.
    torch.testing.assert_close(to_x * (x - other), m * (y - y_other), rtol=1e-13, atol=1e-12)


@pytest.mark.parametrize("function", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_elementwise_multiplier_of_equal_runs_is_the_gradient(function):
    x, _ = pair(400, size=0)
    y = function(x)
    (gradient,) = multiplied(function(x), [x], torch.ones_like(x))
    torch.testing.assert_close(elementwise_slope(function, x, y, x, y), gradient, rtol=0, atol=0)


@pytest.mark.parametrize("size", [1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1])
@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_new", "quick_gelu", "soft-cap"])
def test_float32_slopes_do_not_divide_rounding_by_rounding(name, size):
    function = ACTIVATIONS[name]
    x = 5 * torch.randn(200_000)
    other = x + size * torch.randn(200_000)
    found = elementwise_slope(function, x, function(x), other, function(other))
    wide, wide_other = x.double(), other.double()
    exact = elementwise_slope(function, wide, function(wide), wide_other, function(wide_other))
    # The derivative at x in place of that in the middle would be off by 5e-4, the quotient alone by 1.
    assert float((found - exact).abs().max()) < 1e-4
    rise = (found.double() * (wide - wide_other) - (function(wide) - function(wide_other))).abs()
    assert bool((rise <= 3 * ROUNDING * 1.2e-7 * (x.abs() + other.abs() + 1)).all())


def test_a_kink_between_two_close_runs_is_kept():
    x, other = torch.tensor([1e-4, 1e-9]), torch.tensor([-1e-4, -3e-9])
    slope = elementwise_slope(torch.relu, x, x.relu(), other, other.relu())
    torch.testing.assert_close(slope, torch.tensor([0.5, 0.25]))


@pytest.mark.parametrize("size", DIFFERENCES)
@pytest.mark.parametrize(("a_shape", "b_shape"), [((6, 5), (6, 5)), ((6, 1), (6, 5)), ((6, 5), (5,))])
def test_product(a_shape, b_shape, size):
    (a, a_other), (b, b_other) = pair(*a_shape, size=size), pair(*b_shape, size=size)
    product = secant_product(a, b, a * b, a_other, b_other)
    m = randn(*product.shape)
    to_a, to_b = multiplied(product, [a, b], m)
    assert to_a.shape == a.shape
    assert to_b.shape == b.shape
    difference = dot(m, a * b - a_other * b_other)
    torch.testing.assert_close(dot(to_a, a - a_other) + dot(to_b, b - b_other), difference, rtol=1e-13, atol=1e-12)
    # Symmetric: each factor's share is the mean over the two orders of changing them.
    share = (dot(m, a * b - a_other * b) + dot(m, a * b_other - a_other * b_other)) / 2
    torch.testing.assert_close(dot(to_a, a - a_other), share, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", DIFFERENCES)
def test_matrix_product(size):
    (a, a_other), (b, b_other) = pair(2, 3, 4, 5, size=size), pair(2, 3, 5, 7, size=size)
    product = secant_matrix_product(a, b, a_other, b_other)
    torch.testing.assert_close(product, a @ b)
    m = randn(*product.shape)
    to_a, to_b = multiplied(product, [a, b], m)
    torch.testing.assert_close(
        dot(to_a, a - a_other) + dot(to_b, b - b_other),
        dot(m, a @ b - a_other @ b_other),
        rtol=1e-13,
        atol=1e-12,
    )
    share = (dot(m, (a - a_other) @ b) + dot(m, (a - a_other) @ b_other)) / 2
    torch.testing.assert_close(dot(to_a, a - a_other), share, rtol=1e-12, atol=1e-12)


class Rms(nn.Module):
    def __init__(self, offset=0.0):
        super().__init__()
        self.weight, self.eps, self.offset = nn.Parameter(randn(12)), 1e-5, offset

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (self.weight + self.offset)


def layer_norm(**options):
    norm = nn.LayerNorm(12, **options).double()
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm


NORMS = {
    "rms": Rms,
    "rms 1+w": lambda: Rms(1.0),
    "layer": layer_norm,
    "layer without bias": lambda: layer_norm(bias=False),
    "layer without weight": lambda: layer_norm(elementwise_affine=False),
}


def with_secant(norm, x, other):
    return secant_norm(
        x,
        norm.module(x).detach(),
        other,
        norm.inverse_scale(x),
        norm.inverse_scale(other),
        norm.weight(),
        centred=norm.kind == "layer",
    )


@pytest.mark.parametrize("size", [*DIFFERENCES, 1e4])
@pytest.mark.parametrize("make", NORMS.values(), ids=NORMS)
def test_norm(make, size):
    norm = probed_norm(make(), "norm", "other")
    x, other = pair(6, 12, size=size)
    m = randn(6, 12)
    (to_x,) = multiplied(with_secant(norm, x, other), [x], m)
    rise = (m * (norm.module(x) - norm.module(other))).sum(-1)
    torch.testing.assert_close((to_x * (x - other)).sum(-1), rise, rtol=1e-12, atol=1e-12 * max(1, size))
    if size == 0:
        (gradient,) = multiplied(norm.module(x), [x], m)
        torch.testing.assert_close(to_x, gradient, rtol=1e-12, atol=1e-12)


def test_norm_of_a_zero_input():
    norm = probed_norm(Rms(), "norm", "other")
    x, other = torch.zeros(1, 12, dtype=torch.float64, requires_grad=True), randn(1, 12)
    m = randn(1, 12)
    (to_x,) = multiplied(with_secant(norm, x, other), [x], m)
    torch.testing.assert_close(
        dot(to_x, x - other), dot(m, norm.module(x) - norm.module(other)), rtol=1e-12, atol=1e-12
    )


def masked_pair(size, scale=1.0):
    """Scores [2, 3, 6, 6] under a causal mask, row 4 of the first head without any key at all."""
    x, other = pair(2, 3, 6, 6, size=size)
    mask = torch.ones(6, 6, dtype=torch.bool).tril().expand(2, 3, 6, 6).clone()
    mask[0, 0, 4] = False
    masked = [(one.detach() * scale).masked_fill(~mask, -math.inf) for one in (x, other)]
    return masked[0].requires_grad_(), masked[1], mask


@pytest.mark.parametrize("sinks", [None, torch.tensor([0.3, -2.0, 5.0], dtype=torch.float64)], ids=["", "sinks"])
@pytest.mark.parametrize("size", [*DIFFERENCES, 1e3])
def test_softmax(size, sinks):
    scores, other, mask = masked_pair(size)
    pattern, pattern_other = attention_pattern(scores.detach(), sinks), attention_pattern(other, sinks)
    m = randn(2, 3, 6, 6)
    found = secant_softmax(scores, pattern, other, sinks)
    assert torch.equal(found, pattern)
    (to_scores,) = multiplied(found, [scores], m)
    assert bool((to_scores[~mask] == 0).all())
    difference = torch.where(mask, scores.detach() - other, 0.0)
    torch.testing.assert_close(
        (to_scores * difference).sum(-1), (m * (pattern - pattern_other)).sum(-1), rtol=1e-12, atol=1e-12
    )
    # Not only in sum: every probability moves as its own multiplier says.
    mean, share = softmax_means(scores.detach(), other, sinks)
    moved = mean * (difference - (share * difference).sum(-1, keepdim=True))
    torch.testing.assert_close(moved, pattern - pattern_other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sinks", [None, torch.tensor([0.3, -2.0, 5.0], dtype=torch.float64)], ids=["", "sinks"])
def test_softmax_of_equal_runs_has_the_gradient(sinks):
    scores, _, mask = masked_pair(0.0)
    has_key = mask.any(-1, keepdim=True)
    m = randn(2, 3, 6, 6)
    (found,) = multiplied(secant_softmax(scores, attention_pattern(scores.detach(), sinks), scores, sinks), [scores], m)
    (gradient,) = multiplied(attention_pattern(scores, sinks), [scores], m)
    torch.testing.assert_close(found, torch.where(has_key, gradient, 0.0), rtol=1e-12, atol=1e-12)


def test_softmax_means_are_logarithmic_means():
    a, b = randn(1, 1, 1, 4), randn(1, 1, 1, 4)
    mean, share = softmax_means(a, b)
    p, q = a.softmax(-1), b.softmax(-1)
    torch.testing.assert_close(mean, (p - q) / (p.log() - q.log()), rtol=1e-11, atol=0)
    e, f = a.exp(), b.exp()
    total = (e.sum() - f.sum()) / (e.sum().log() - f.sum().log())
    torch.testing.assert_close(share, (e - f) / (a - b) / total, rtol=1e-11, atol=0)


@pytest.mark.parametrize("size", [1e-6, 1e-4, 1e-2, 1.0, 30.0])
def test_softmax_in_float32(size):
    scores, other, _ = masked_pair(size, scale=5.0)
    found = softmax_means(scores.detach().float(), other.float())
    exact = softmax_means(scores.detach().float().double(), other.float().double())
    for one, expected in zip(found, exact, strict=True):
        torch.testing.assert_close(one.double(), expected, rtol=1e-4, atol=1e-6)


def test_softmax_of_scores_that_overflow_exponentials():
    scores = torch.tensor([[[[0.0, 900.0, -900.0]]]]).requires_grad_()
    other = torch.tensor([[[[900.0, 0.0, -900.0]]]])
    pattern, pattern_other = attention_pattern(scores.detach()), attention_pattern(other)
    m = torch.tensor([[[[1.0, 2.0, 3.0]]]])
    (to_scores,) = multiplied(secant_softmax(scores, pattern, other), [scores], m)
    torch.testing.assert_close(dot(to_scores, scores - other), dot(m, pattern - pattern_other))


@pytest.mark.parametrize("size", DIFFERENCES)
def test_correction_explains_the_whole_rise(size):
    x, other = pair(5, 8, size=size)

    def value(x):
        return (x.exp().sum(-1) + x.prod(-1)).tanh()

    gradients = [multiplied(value(one.requires_grad_()).sum(), [one], None)[0] for one in (x, other)]
    rise = (value(x) - value(other)).detach()
    rounding = torch.full_like(rise, 1e-15)
    multiplier = secant_correction(sum(gradients) / 2, (x - other).detach(), rise, rounding)
    (to_x,) = multiplied(with_multiplier(x, value(x), multiplier), [x], torch.full_like(rise, 3.0))
    torch.testing.assert_close((to_x * (x - other)).sum(-1), 3 * rise, rtol=1e-12, atol=1e-12)
    if size == 0:
        torch.testing.assert_close(to_x, 3 * gradients[0], rtol=0, atol=0)


def test_correction_leaves_a_linear_function_its_gradient():
    difference, gradient = torch.randn(4, 300), torch.randn(4, 300)
    rise = (difference.double() * gradient).sum(-1).float()
    rounding = 1e-6 * (difference * gradient).abs().sum(-1)
    assert torch.equal(secant_correction(gradient, difference, rise, rounding), gradient)


def test_nothing_changes_values_and_dtypes():
    x = torch.randn(4, 8, dtype=torch.bfloat16, requires_grad=True)
    other = torch.randn(4, 8, dtype=torch.bfloat16)
    y = nn.functional.silu(x)
    found = secant_elementwise(nn.functional.silu, x, y, other, nn.functional.silu(other))
    assert torch.equal(found, y)
    (to_x,) = multiplied(found, [x], torch.ones_like(x))
    assert to_x.dtype == torch.bfloat16
