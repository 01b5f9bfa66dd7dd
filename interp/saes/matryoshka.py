"""The Matryoshka autoencoder: the first m features reconstruct the input too, for several m at once.

Features are selected as in BatchTopK. The loss adds up the squared errors of decoding nested prefixes of the
dictionary, so that general features come first and are not absorbed by special ones.

Source: Bussmann et al. 2025 (arXiv 2503.17547).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, ClassVar, Unpack

from jaxtyping import Bool, Float
from torch import Tensor

from interp.saes.losses import Loss, make_loss, squared_error
from interp.saes.topk import BatchTopKFamily, BatchTopKOptions


class MatryoshkaSAE(BatchTopKFamily):
    """Nested prefixes.

    Args:
        d_in: width of the input.
        d_sae: number of features.
        widths: numbers of features of the prefixes, ascending, the last d_sae; by default a sixteenth, an eighth, a
            quarter, a half and all.
        **options: see `BatchTopKFamily`, `TopKFamily` and `SAE`.

    Raises:
        ValueError: if the widths do not ascend to d_sae.
    """

    architecture: ClassVar[str] = "matryoshka"

    def __init__(
        self, d_in: int, d_sae: int, *, widths: Sequence[int] | None = None, **options: Unpack[BatchTopKOptions]
    ) -> None:
        super().__init__(d_in, d_sae, **options)
        if widths is None:
            widths = sorted({max(1, d_sae // part) for part in (16, 8, 4, 2, 1)})
        if not widths or list(widths) != sorted(set(widths)) or widths[0] < 1 or widths[-1] != d_sae:
            raise ValueError(f"widths={list(widths)} must ascend from 1 or more to d_sae={d_sae}")
        self.widths = tuple(widths)

    def settings(self) -> dict[str, Any]:
        """JSON-able keyword arguments that build it again."""
        return {**super().settings(), "widths": list(self.widths)}

    def prefix_outputs(
        self, features: Float[Tensor, "*batch d_sae"], x: Float[Tensor, "*batch d_in"] | None = None
    ) -> list[Float[Tensor, "*batch d_out"]]:
        """The outputs of decoding each prefix; the last is `decode(features, x)`. Costs what `decode` does."""
        output = self.add_skip(self.b_dec.expand(*features.shape[:-1], -1), x)
        outputs = []
        for first, end in itertools.pairwise((0, *self.widths)):
            output = output + features[..., first:end] @ self.W_dec[first:end]
            outputs.append(output)
        return outputs

    def loss(
        self,
        x: Float[Tensor, "*batch d_in"],
        target: Float[Tensor, "*batch d_out"] | None = None,
        *,
        dead: Bool[Tensor, " d_sae"] | None = None,
    ) -> Loss:
        """Sum over prefixes of the squared error + AuxK on the error of all; in training mode moves the threshold."""
        x, target = self.tokens(x, target)
        pre_activations = self.pre_activations(x)
        features = self.select(pre_activations)
        outputs = self.prefix_outputs(features, x)
        errors = [squared_error(output, target) for output in outputs]
        return make_loss(
            sum(errors[1:], start=errors[0]),
            auxiliary=self.auxk_loss(x, pre_activations, target - outputs[-1], dead),
            output=outputs[-1],
            activations=features,
            d_sae=self.d_sae,
        )
