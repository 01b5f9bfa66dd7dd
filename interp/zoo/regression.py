"""A transformer that does linear regression in context: one layer, softmax attention, inputs that are vectors.

A prompt is L examples (x_i, y_i) with y_i = β·x_i + noise, β drawn anew for each prompt, and a query x_q; the answer is
y_q. It is no language model and so no `interp.Model`: what it is for is its weights, whose structure is published
(`interp.heads.kq_ov`).

>>> model = interp.zoo.regression.load(n_heads=2)
>>> interp.heads.kq_ov(model.W_Q, model.W_K, model.W_V, model.W_O)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp.zoo.trained import with_weights

D_INPUT = 5
N_EXAMPLES = 8 * D_INPUT
NOISE = 0.1
"""Variance of the noise on labels; β·x has variance 1."""
HEADS = (1, 2)
"""Numbers of heads that weights ship for."""


class Prompts(NamedTuple):
    """Examples, queries and the labels of the queries."""

    x: Float[Tensor, "prompt example d_input"]
    y: Float[Tensor, "prompt example"]
    x_query: Float[Tensor, "prompt d_input"]
    y_query: Float[Tensor, " prompt"]


class RegressionTransformer(nn.Module):
    """One layer of attention from the query (x_q, 0) to the examples (x_i, y_i); no norm, no MLP, no bias.

    The prediction is what the heads write in the place of the label. What they would write elsewhere plays no part, nor
    does what they would read off the label of the query, which is 0. No training reaches such weights, so there are
    none: the last row of `W_Q` and all columns of `W_O` but the last are zero.

    Args:
        n_heads: heads, each as wide as the stream.
        d_input: length of x.
    """

    def __init__(self, n_heads: int, d_input: int = D_INPUT) -> None:
        super().__init__()
        d_model = d_input + 1
        self.w_query = _normal(n_heads, d_input, d_model)
        self.W_K = _normal(n_heads, d_model, d_model)
        self.W_V = _normal(n_heads, d_model, d_model)
        self.w_label = _normal(n_heads, d_model)

    @property
    def W_Q(self) -> Float[Tensor, "head d_model d_head"]:
        """What queries are made with: `w_query` for x, a row of zeros for the label."""
        return nn.functional.pad(self.w_query, (0, 0, 0, 1))

    @property
    def W_O(self) -> Float[Tensor, "head d_head d_model"]:
        """What z is written with: `w_label` in the last column, zero elsewhere."""
        return nn.functional.pad(self.w_label[..., None], (self.W_V.shape[1] - 1, 0))

    def forward(
        self,
        x: Float[Tensor, "prompt example d_input"],
        y: Float[Tensor, "prompt example"],
        x_query: Float[Tensor, "prompt d_input"],
    ) -> Float[Tensor, " prompt"]:
        """Predicted labels of the queries."""
        examples = torch.cat([x, y[..., None]], dim=-1)
        q = torch.einsum("pm,hmd->phd", x_query, self.w_query)
        k = torch.einsum("pem,hmd->phed", examples, self.W_K)
        pattern = (torch.einsum("phd,phed->phe", q, k) / q.shape[-1] ** 0.5).softmax(dim=-1)
        seen = torch.einsum("phe,pem->phm", pattern, examples)
        z = torch.einsum("phm,hmd->phd", seen, self.W_V)
        return torch.einsum("phd,hd->p", z, self.w_label)


def _normal(n_heads: int, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(n_heads, *shape) / shape[-1] ** 0.5)


def load(n_heads: int = 2) -> RegressionTransformer:
    """The trained transformer with 1 or 2 heads, as its weights ship with the package.

    Raises:
        ValueError: for another number of heads.
    """
    if n_heads not in HEADS:
        raise ValueError(f"n_heads={n_heads}; weights ship for {' and '.join(map(str, HEADS))} heads")
    with torch.random.fork_rng(devices=[]):  # weights are drawn, and overwritten at once
        models: nn.ModuleDict = with_weights(untrained(), "regression")
    chosen = models[str(n_heads)]
    assert isinstance(chosen, RegressionTransformer)
    return chosen.eval()


def untrained() -> nn.ModuleDict:
    """A transformer of each number of heads, by that number, with random weights."""
    return nn.ModuleDict({str(n_heads): RegressionTransformer(n_heads) for n_heads in HEADS})


def draw(n: int, generator: torch.Generator) -> Prompts:
    """Prompts with standard normal x, β of variance 1 / d_input an entry, and labels with noise, the query's too."""
    beta = torch.randn(n, D_INPUT, generator=generator) / D_INPUT**0.5
    x = torch.randn(n, N_EXAMPLES + 1, D_INPUT, generator=generator)
    noise = NOISE**0.5 * torch.randn(n, N_EXAMPLES + 1, generator=generator)
    y = torch.einsum("ped,pd->pe", x, beta) + noise
    return Prompts(x[:, :-1], y[:, :-1], x[:, -1], y[:, -1])


def kernel_predictor(
    prompts: Prompts, omega: Float[Tensor, " head"], mu: Float[Tensor, " head"]
) -> Float[Tensor, " prompt"]:
    """Σ_h μ_h ⟨y, softmax(ω_h X x_q)⟩: what heads of the published structure predict.

    Source: He et al. 2025 (arXiv 2503.12734). The trained transformer predicts the same: tests/zoo/test_regression.py.
    """
    likeness = torch.einsum("ped,pd->pe", prompts.x, prompts.x_query)
    pattern = (omega[:, None, None] * likeness).softmax(dim=-1)
    return torch.einsum("h,hpe,pe->p", mu, pattern, prompts.y)


def expected_loss(omega: Float[Tensor, " head"], mu: Float[Tensor, " head"]) -> Float[Tensor, ""]:
    """Mean squared error of `kernel_predictor` for these ω and μ: 1 + σ² − 2 μᵀω + μᵀ A μ.

    A = ωωᵀ + (1 + σ²) / L · exp(d ωωᵀ), entry by entry. Approximate: exact in the limit of many examples and small ω.

    Source: He et al. 2025 (arXiv 2503.12734).
    """
    return 1 + NOISE - 2 * mu @ omega + mu @ _second_moment(omega) @ mu


def optimal_mu(omega: Float[Tensor, " head"]) -> Float[Tensor, " head"]:
    """The μ that minimises `expected_loss` for these ω: A⁻¹ω. With two heads of opposite ω, they add up to 0."""
    return torch.linalg.solve(_second_moment(omega), omega)


def _second_moment(omega: Float[Tensor, " head"]) -> Float[Tensor, "head head"]:
    products = torch.outer(omega, omega)
    return products + (1 + NOISE) / N_EXAMPLES * torch.exp(D_INPUT * products)
