"""Secant multipliers: backward passes that carry exact finite differences between two runs of a model.

For a non-linear operation y = f(x) in this run and y′ = f(x′) in the other one, the multiplier M obeys Δy = M·Δx
exactly, with Δ = this run − the other. Each function here returns the output of an operation as it is, with a backward
pass that multiplies by M. What is linear needs none: its gradient is its multiplier, and biases cancel in Δ.

No quotient of two rounding errors is ever taken: where Δx is small, closed forms (norm, softmax) or the derivative in
the middle (elementwise functions) stand in, so that for equal runs multipliers are gradients.

Sources: DeepLIFT's rescale rule (Shrikumar et al. 2017, arXiv 1704.02685) with the other run as the reference; the
logarithmic mean (Ang 2004, LMDI) for softmax; the symmetric split for products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

ROUNDING = 4.0
"""Differences of up to this many rounding errors of the values themselves count as rounding (erf in float32 is off by
three)."""


class _Slope(torch.autograd.Function):
    """Values as they are; backward times a slope for each number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        ctx.dtype = x.dtype
        return y.detach()

    @staticmethod
    def backward(ctx: Any, multiplier: Tensor) -> Any:
        (slope,) = ctx.saved_tensors
        return (multiplier * slope).to(ctx.dtype), None, None


def secant_elementwise(
    function: Callable[[Tensor], Tensor],
    x: Float[Tensor, "*shape"],
    y: Float[Tensor, "*shape"],
    x_other: Float[Tensor, "*shape"],
    y_other: Float[Tensor, "*shape"],
) -> Float[Tensor, "*shape"]:
    """The output y of an elementwise function at x, with the slope of the line through both runs' points.

    Args:
        function: applies the function; asked for its derivative.
        x: its input.
        y: its output.
        x_other: its input in the other run.
        y_other: its output in the other run.
    """
    result: Tensor = _Slope.apply(x, y, elementwise_slope(function, x, y, x_other, y_other))
    return result


@torch.no_grad()
def elementwise_slope(
    function: Callable[[Tensor], Tensor],
    x: Float[Tensor, "*shape"],
    y: Float[Tensor, "*shape"],
    x_other: Float[Tensor, "*shape"],
    y_other: Float[Tensor, "*shape"],
) -> Float[Tensor, "*shape"]:
    """Δy/Δx, or the derivative in the middle wherever that explains Δy to rounding."""
    x, y, x_other, y_other = (_wide(one) for one in (x, y, x_other, y_other))
    difference, rise = x - x_other, y - y_other
    derivative = _derivative(function, torch.lerp(x_other, x, 0.5))
    # Relative to x as well: x·gate(x), with a gate between 0 and 1, is computed to about a rounding error of x.
    size = x.abs().add_(x_other.abs()).add_(y.abs()).add_(y_other.abs())
    unexplained = torch.addcmul(rise, derivative, difference, value=-1).abs_()
    is_explained = unexplained <= size.mul_(ROUNDING * torch.finfo(x.dtype).eps)
    return torch.where(is_explained, derivative, rise.div_(difference))


@torch.enable_grad()
def _derivative(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    (derivative,) = torch.autograd.grad(function(x).sum(), x)
    return derivative


class _Product(torch.autograd.Function):
    """Values as they are; backward to each factor times the other factor's mean."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, product: Tensor, a_mean: Tensor, b_mean: Tensor) -> Tensor:
        ctx.save_for_backward(a_mean, b_mean)
        ctx.shapes = a.shape, b.shape
        return product.detach()

    @staticmethod
    def backward(ctx: Any, multiplier: Tensor) -> Any:
        a_mean, b_mean = ctx.saved_tensors
        a_shape, b_shape = ctx.shapes
        to_a = (multiplier * b_mean).sum_to_size(a_shape) if ctx.needs_input_grad[0] else None
        to_b = (multiplier * a_mean).sum_to_size(b_shape) if ctx.needs_input_grad[1] else None
        return to_a, to_b, None, None, None


def secant_product(
    a: Float[Tensor, "..."],
    b: Float[Tensor, "..."],
    product: Float[Tensor, "..."],
    a_other: Float[Tensor, "..."],
    b_other: Float[Tensor, "..."],
) -> Float[Tensor, "..."]:
    """The product of a and b, number by number or broadcast: m_a = m·b̄ and m_b = m·ā, bars for means of both runs."""
    result: Tensor = _Product.apply(a, b, product, _mean(a, a_other), _mean(b, b_other))
    return result


class _MatrixProduct(torch.autograd.Function):
    """a @ b; backward to each factor with the other factor's mean."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, a_mean: Tensor, b_mean: Tensor) -> Tensor:
        ctx.save_for_backward(a_mean, b_mean)
        return a @ b

    @staticmethod
    def backward(ctx: Any, multiplier: Tensor) -> Any:
        a_mean, b_mean = ctx.saved_tensors
        to_a = multiplier @ b_mean.mT if ctx.needs_input_grad[0] else None
        to_b = a_mean.mT @ multiplier if ctx.needs_input_grad[1] else None
        return to_a, to_b, None, None


def secant_matrix_product(
    a: Float[Tensor, "*batch row inner"],
    b: Float[Tensor, "*batch inner column"],
    a_other: Float[Tensor, "*batch row inner"],
    b_other: Float[Tensor, "*batch inner column"],
) -> Float[Tensor, "*batch row column"]:
    """A @ b, with m_a = m·b̄ᵀ and m_b = āᵀ·m."""
    result: Tensor = _MatrixProduct.apply(a, b, _mean(a, a_other), _mean(b, b_other))
    return result


class _Norm(torch.autograd.Function):
    """Values as they are; backward through the mean scale, and through the difference of the scales."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        x_mean: Tensor,
        scale: Tensor,
        slope: Tensor,
        weight: Tensor | None,
        centred: bool,
    ) -> Tensor:
        ctx.save_for_backward(x_mean, scale, slope, weight)
        ctx.centred, ctx.dtype = centred, x.dtype
        return y.detach()

    @staticmethod
    def backward(ctx: Any, multiplier: Tensor) -> Any:
        x_mean, scale, slope, weight = ctx.saved_tensors
        scaled = _wide(multiplier) if weight is None else _wide(multiplier) * weight
        along = torch.linalg.vecdot(scaled, x_mean).unsqueeze(-1)
        result = torch.addcmul(scaled * scale, x_mean, along * slope)
        if ctx.centred:
            result -= result.mean(-1, keepdim=True)
        return result.to(ctx.dtype), None, None, None, None, None, None


def secant_norm(
    x: Float[Tensor, "*batch width"],
    y: Float[Tensor, "*batch width"],
    x_other: Float[Tensor, "*batch width"],
    inverse_scale: Float[Tensor, "*batch 1"],
    inverse_scale_other: Float[Tensor, "*batch 1"],
    weight: Float[Tensor, "..."] | None,
    *,
    centred: bool,
) -> Float[Tensor, "*batch width"]:
    """The output y = w·x·r + b of a norm at x, r = (mean x² + ε)^−½; a LayerNorm does so to x less its mean.

    Both factors of x·r share the product: Δ(x·r) = Δx·r̄ + x̄·Δr. And Δr is exactly s·Δ(mean x²) = s·(2/D)·Σ x̄·Δx, with
    s = Δr / Δ(mean x²) = −(r·r′)² / (r + r′), since r = (mean x² + ε)^−½. No difference is divided by another.

    Args:
        x: the norm's input.
        y: its output.
        x_other: its input in the other run.
        inverse_scale: r.
        inverse_scale_other: r in the other run.
        weight: w, if there is one.
        centred: whether the norm takes the mean off first.
    """
    here, other = inverse_scale, inverse_scale_other
    with torch.no_grad():
        x_mean = _mean(_wide(x), _wide(x_other))
        if centred:
            x_mean -= x_mean.mean(-1, keepdim=True)
        slope = (here * other).square() / (here + other) * (-2 / x.shape[-1])
    result: Tensor = _Norm.apply(x, y, x_mean, _mean(here, other), slope, weight, centred)
    return result


class _Softmax(torch.autograd.Function):
    """Values as they are; backward m·L − w·Σ(m·L)."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, pattern: Tensor, mean: Tensor, share: Tensor) -> Tensor:
        ctx.save_for_backward(mean, share)
        ctx.dtype = scores.dtype
        return pattern.detach()

    @staticmethod
    def backward(ctx: Any, multiplier: Tensor) -> Any:
        mean, share = ctx.saved_tensors
        weighted = multiplier * mean
        return torch.addcmul(weighted, share, weighted.sum(-1, keepdim=True), value=-1).to(ctx.dtype), None, None, None


def secant_softmax(
    scores: Float[Tensor, "batch head query key"],
    pattern: Float[Tensor, "batch head query key"],
    scores_other: Float[Tensor, "batch head query key"],
    sink_logits: Float[Tensor, " head"] | None = None,
) -> Float[Tensor, "batch head query key"]:
    """The softmax of scores (masked entries −inf), with Δp = L·(Δs − Σ w·Δs).

    L is the logarithmic mean of p in the two runs, since Δp = L·Δ(log p). And log p = s − log Z, where Δ(log Z) is
    Σ w·Δs with w = (logarithmic mean of e^s) / (logarithmic mean of Z). A learned sink logit is in Z and has no Δ.

    Args:
        scores: as the softmax sees them.
        pattern: its output.
        scores_other: the scores in the other run, masked in the same places.
        sink_logits: one learned logit a head that takes its share of every row.
    """
    result: Tensor = _Softmax.apply(scores, pattern, *softmax_means(scores, scores_other, sink_logits))
    return result


@torch.no_grad()
def softmax_means(
    scores: Float[Tensor, "batch head query key"],
    scores_other: Float[Tensor, "batch head query key"],
    sink_logits: Float[Tensor, " head"] | None = None,
) -> tuple[Float[Tensor, "batch head query key"], Float[Tensor, "batch head query key"]]:
    """L and w of `secant_softmax`, all in logarithms: nothing overflows, whatever the scores."""
    scores, scores_other = _wide(scores), _wide(scores_other)
    masked = torch.isneginf(scores)
    total, total_other = (_log_total(one, sink_logits) for one in (scores, scores_other))
    mean = _log_mean(scores - total, scores_other - total_other)
    larger = torch.maximum(total, total_other)
    share = _log_mean(scores - larger, scores_other - larger) / _log_mean(total - larger, total_other - larger)
    return mean.masked_fill_(masked, 0.0), share.masked_fill_(masked, 0.0)


def _log_total(scores: Tensor, sink_logits: Tensor | None) -> Tensor:
    """Log Z of each row."""
    total = torch.logsumexp(scores, dim=-1, keepdim=True)
    if sink_logits is None:
        return total
    return torch.logaddexp(total, sink_logits.to(total.dtype).view(1, -1, 1, 1))


def _log_mean(log_a: Tensor, log_b: Tensor) -> Tensor:
    """The logarithmic mean (a − b) / (log a − log b) as max(a, b)·(1 − e^−d)/d, d = |log a − log b|."""
    distance = (log_a - log_b).abs_()
    quotient = torch.expm1(-distance).div_(distance).neg_()
    return torch.maximum(log_a, log_b).exp_().mul_(quotient.masked_fill_(distance == 0, 1.0))


def secant_correction(
    gradient: Float[Tensor, "row feature"],
    difference: Float[Tensor, "row feature"],
    rise: Float[Tensor, " row"],
    rounding: Float[Tensor, " row"],
) -> Float[Tensor, "row feature"]:
    """The multiplier of a whole row that is nearest to a gradient: g + Δx·(Δy − g·Δx)/(Δx·Δx).

    For operations known by their values and gradients only. What the gradient leaves unexplained of Δy is put on the
    direction of Δx; nothing is, where it is no more than rounding.

    Args:
        gradient: of y, the mean of both runs.
        difference: Δx.
        rise: Δy.
        rounding: the size of Δy that is within rounding.
    """
    unexplained = rise - torch.linalg.vecdot(gradient, difference)
    length = torch.linalg.vecdot(difference, difference)
    is_explained: Bool[Tensor, " row"] = (unexplained.abs() <= rounding) | (length == 0)
    return torch.addcmul(gradient, difference, torch.where(is_explained, 0.0, unexplained / length).unsqueeze(-1))


def with_multiplier(x: Tensor, y: Float[Tensor, " row"], multiplier: Float[Tensor, "row feature"]) -> Tensor:
    """One value y a row of x, with this multiplier as the backward pass."""
    result: Tensor = _Row.apply(x, y, multiplier)
    return result


class _Row(torch.autograd.Function):
    """Values as they are; backward each row's multiplier times what arrives for its value."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, multiplier: Tensor) -> Tensor:
        ctx.save_for_backward(multiplier)
        ctx.dtype = x.dtype
        return y.detach()

    @staticmethod
    def backward(ctx: Any, multiplier: Tensor) -> Any:
        (own,) = ctx.saved_tensors
        return (multiplier.unsqueeze(-1) * own).to(ctx.dtype), None, None


class _Attached(torch.autograd.Function):
    """Values as they are; backward to them and to a term."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, term: Tensor) -> Tensor:
        return values.detach()

    @staticmethod
    def backward(ctx: Any, multiplier: Tensor) -> Any:
        return multiplier, multiplier


def with_term(values: Float[Tensor, "*shape"], term: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Values that were computed with a term in them, but cut off from it: the term gets their multiplier too."""
    result: Tensor = _Attached.apply(values, term)
    return result


def _mean(a: Tensor, b: Tensor) -> Tensor:
    return torch.lerp(b.detach(), a.detach(), 0.5)


def _wide(x: Tensor) -> Tensor:
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))
