"""One counterfactual run: a prompt and the edits to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from interp.model import Edit


@dataclass(frozen=True)
class Variant:
    """One counterfactual run: the index of a prompt, and the edits to it (without `rows`)."""

    prompt: int
    edits: tuple[Edit, ...]


def check_values(values: Tensor, variants: Sequence[Variant]) -> None:
    """Refuse NaN and infinity in what was read of each variant.

    Raises:
        FloatingPointError: naming the edits of the first such variant.
    """
    bad = ~torch.isfinite(values).reshape(len(variants), -1).all(-1)
    if bool(bad.any()):
        variant = variants[int(bad.nonzero()[0])]
        sites = ", ".join(str(edit.site) for edit in variant.edits)
        raise FloatingPointError(f"the metric is NaN or infinite for prompt {variant.prompt} with an edit at {sites}")
