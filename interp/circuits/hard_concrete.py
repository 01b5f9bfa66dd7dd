"""Hard-concrete gates: random numbers in 0..1 that are often exactly 0 or 1, and whose distribution has a gradient.

A gate is a logistic variable squashed into LOW..HIGH, a little wider than 0..1, and cut off at 0 and 1:
z = clamp(sigmoid((logit u + log_alpha) / TEMPERATURE) · (HIGH − LOW) + LOW), with u uniform in 0..1. Its one parameter
log_alpha is learned: large, and the gate is open.

Source: Louizos et al. 2018 (arXiv 1712.01312). Checked against closed forms and sampled gates in
tests/circuits/test_hard_concrete.py.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

TEMPERATURE = 2 / 3
LOW, HIGH = -0.1, 1.1
_SHIFT = TEMPERATURE * math.log(-LOW / HIGH)
_SMALLEST = 1e-6
"""Uniform numbers stay so far from 0 and 1, where their logits are infinite."""


def sampled_gates(log_alpha: Float[Tensor, "*gate"], generator: torch.Generator) -> Float[Tensor, "*gate"]:
    """One draw of every gate; differentiable in log_alpha where the draw is neither 0 nor 1.

    Args:
        log_alpha: the parameters.
        generator: on the CPU, so that gates on every device are drawn alike.
    """
    uniform = torch.rand(log_alpha.shape, generator=generator).to(log_alpha)
    noise = (_SMALLEST + (1 - 2 * _SMALLEST) * uniform).logit()
    return _stretched((noise + log_alpha) / TEMPERATURE)


def median_gates(log_alpha: Float[Tensor, "*gate"]) -> Float[Tensor, "*gate"]:
    """The median of every gate's distribution: what stands for the gate when nothing is to be drawn."""
    return _stretched(log_alpha / TEMPERATURE)


def open_probability(log_alpha: Float[Tensor, "*gate"]) -> Float[Tensor, "*gate"]:
    """How likely each gate is not 0; the sum is the expected number of open gates (the L0 penalty)."""
    return torch.sigmoid(log_alpha - _SHIFT)


def log_alpha_of(probability: float) -> float:
    """The parameter of a gate that is open with this probability."""
    return math.log(probability / (1 - probability)) + _SHIFT


def _stretched(logit: Float[Tensor, "*gate"]) -> Float[Tensor, "*gate"]:
    return (torch.sigmoid(logit) * (HIGH - LOW) + LOW).clamp(0, 1)
