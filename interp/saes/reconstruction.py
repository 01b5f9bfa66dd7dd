"""How well an SAE reconstructs activations, and how often its features fire: sums over tokens, batch by batch.

Nothing is kept but sums in float64, so that the order and size of the batches do not matter beyond its rounding.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

FORMULAS = {
    "squared_error": "E‖x − x̂‖²",
    "explained_variance": "1 − E‖x − x̂‖² / (E‖x‖² − ‖E x‖²)",
    "fraction_of_variance_explained": "1 − Σ var(x − x̂) / Σ var(x): a constant error costs nothing",
    "cosine": "E cos(x, x̂), over tokens where neither is 0",
    "l2_ratio": "E ‖x̂‖ / ‖x‖, over tokens where x is not 0; below 1: shrinkage",
    "relative_reconstruction_bias": "E‖x̂‖² / E(x·x̂); below 1: shrinkage",
    "l0": "features active in a token, mean",
    "l1": "sum of the activations of a token, mean",
    "dead_share": "features that never fire on these tokens, share",
}
"""What each number is, with x the activation and x̂ its reconstruction; E is the mean over tokens."""


class ReconstructionSums:
    """Sums over the tokens seen so far.

    Args:
        d_out: width of the activations.
        d_sae: number of features.
        device: where the sums are kept.
    """

    def __init__(self, d_out: int, d_sae: int, device: torch.device | str = "cpu") -> None:
        self.n_tokens = 0
        self.fired: Int[Tensor, " d_sae"] = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self._x = torch.zeros(d_out, dtype=torch.float64, device=device)
        self._error = torch.zeros(d_out, dtype=torch.float64, device=device)
        self._sums: dict[str, float] = {}

    def add(
        self,
        x: Float[Tensor, "token d_out"],
        reconstruction: Float[Tensor, "token d_out"],
        features: Float[Tensor, "token d_sae"],
    ) -> None:
        """Take in some tokens."""
        x, reconstruction = x.double(), reconstruction.double()
        error = x - reconstruction
        active = features != 0
        norms, norms_found, dots = x.norm(dim=-1), reconstruction.norm(dim=-1), (x * reconstruction).sum(-1)
        nonzero = norms > 0
        both = nonzero & (norms_found > 0)
        self.n_tokens += len(x)
        self.fired += active.sum(0)
        self._x += x.sum(0)
        self._error += error.sum(0)
        for name, value in (
            ("error²", error.square().sum()),
            ("x²", norms.square().sum()),
            ("found²", norms_found.square().sum()),
            ("dot", dots.sum()),
            ("cosine", (dots[both] / (norms[both] * norms_found[both])).sum()),
            ("n_cosine", both.sum()),
            ("ratio", (norms_found[nonzero] / norms[nonzero]).sum()),
            ("n_ratio", nonzero.sum()),
            ("active", active.sum()),
            ("l1", features.abs().sum(dtype=torch.float64)),
        ):
            self._sums[name] = self._sums.get(name, 0.0) + float(value)

    def firing_rate(self) -> Float[Tensor, " d_sae"]:
        """Share of the tokens in which each feature is active; NaN without tokens."""
        return self.fired.double().cpu() / self.n_tokens if self.n_tokens else torch.full(self.fired.shape, torch.nan)

    def numbers(self) -> dict[str, float]:
        """The numbers of `FORMULAS`; NaN where one is undefined.

        Sources: `explained_variance` as SAELens 6 computes it, `fraction_of_variance_explained` as dictionary_learning
        does; `relative_reconstruction_bias` after Rajamanoharan et al. 2024 (arXiv 2404.16014), Eq. 10.
        """
        sums, n = self._sums, self.n_tokens
        if not n:
            return dict.fromkeys(FORMULAS, float("nan"))
        variance = sums["x²"] / n - float((self._x / n).square().sum())
        error = sums["error²"] / n
        if variance <= 1e-12 * sums["x²"] / n:
            variance = float("nan")  # constant activations: what is left is rounding
        return {
            "squared_error": error,
            "explained_variance": 1 - error / variance,
            "fraction_of_variance_explained": 1 - (error - float((self._error / n).square().sum())) / variance,
            "cosine": _ratio(sums["cosine"], sums["n_cosine"]),
            "l2_ratio": _ratio(sums["ratio"], sums["n_ratio"]),
            "relative_reconstruction_bias": _ratio(sums["found²"], sums["dot"]),
            "l0": sums["active"] / n,
            "l1": sums["l1"] / n,
            "dead_share": float((self.fired == 0).double().mean()),
        }


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else float("nan")
