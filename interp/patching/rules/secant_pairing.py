"""Two runs of a model in step: what its non-linear parts saw in one run, handed to the same parts in the next.

`KeptRun.exchange(part, tensors)` is called by every non-linear part with what it has at hand. In the run that is kept
it stores them and returns None; in a run that replays it returns what the same call had stored. The methods named after
operations do an operation's exchange and, when replaying, give its output the secant multiplier as backward pass.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from interp.patching.rules.norms import Norm
from interp.patching.rules.parts import Parts
from interp.patching.rules.secant import (
    secant_elementwise,
    secant_norm,
    secant_product,
    secant_softmax,
)


class KeptRun:
    """What the non-linear parts of a model saw in one forward pass; filled by `kept_run`, read by `secant_rules`."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.is_replaying = False
        self._seen: dict[nn.Module, list[tuple[Tensor, ...]]] = defaultdict(list)
        self._calls: dict[nn.Module, int] = defaultdict(int)

    def begin(self, args: object = None) -> None:
        """A new forward pass: it is kept instead of the last one, or replays the kept one from its start."""
        self._calls.clear()
        if not self.is_replaying:
            self._seen.clear()

    def exchange(self, part: nn.Module, *tensors: Tensor) -> tuple[Tensor, ...] | None:
        """Keep the tensors of this call of a part, or get those that the same call had in the kept run.

        Raises:
            RuntimeError: if the kept run had no such call.
            ValueError: if its tensors were of another shape.
        """
        if not self.is_replaying:
            self._seen[part].append(tuple(tensor.detach() for tensor in tensors))
            return None
        call = self._calls[part]
        self._calls[part] += 1
        if call >= len(self._seen[part]):
            raise RuntimeError(
                f"{type(part).__name__} was not called in the kept run: run the other prompts inside kept_run first"
            )
        other = self._seen[part][call]
        for here, there in zip(tensors, other, strict=True):
            if here.shape != there.shape:
                raise ValueError(
                    f"{type(part).__name__} has a tensor of shape {tuple(here.shape)}, in the kept run "
                    f"{tuple(there.shape)}: both runs need prompts of the same number and length"
                )
        return other

    def elementwise(
        self, part: nn.Module, function: Callable[[Tensor], Tensor], x: Tensor, y: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(output y of an elementwise function at x, output in the kept run; this run's own while keeping)."""
        other = self.exchange(part, x)
        if other is None:
            return y, y
        with torch.no_grad():
            y_other = function(other[0])
        return secant_elementwise(function, x, y, other[0], y_other), y_other

    def product(self, part: nn.Module, a: Tensor, b: Tensor, product: Tensor, a_other: Tensor) -> Tensor:
        """The elementwise product of a and b; `a_other`, a in the kept run, is known from where a was computed."""
        other = self.exchange(part, b)
        return product if other is None else secant_product(a, b, product, a_other, other[0])

    def norm(self, norm: Norm, x: Tensor, y: Tensor) -> Tensor:
        """The output y of a norm at x."""
        scale = norm.inverse_scale(x)
        other = self.exchange(norm.module, x, scale)
        if other is None:
            return y
        return secant_norm(x, y, other[0], scale, other[1], norm.weight(), centred=norm.kind == "layer")

    def softmax(self, part: nn.Module, scores: Tensor, pattern: Tensor, sink_logits: Tensor | None) -> Tensor:
        """The pattern of masked scores."""
        other = self.exchange(part, scores)
        return pattern if other is None else secant_softmax(scores, pattern, other[0], sink_logits)
