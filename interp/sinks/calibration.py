"""ACT: attention on hidden sinks turned down, in chosen heads.

1. A head's column score is the mean attention that a key gets over the rows that may attend to it.
2. Hidden sinks are the keys of the prompt with a score above θ = α/N (N tokens), the first token left out.
3. In every row they keep β of their attention; the rest goes to the other keys, the first token among
   them, in proportion to what they have (`move_mass`).

The sinks of a prompt are kept while tokens are decoded after it, and found anew for the next one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import xarray as xr
from jaxtyping import Bool, Float
from torch import Tensor

from interp.model import Model, Site
from interp.model.hooks import Run, Tap, tapped
from interp.sinks.move import move_mass
from interp.sinks.prefill import PromptKeys

ALPHA = 5.0
BETA = 0.4
KEEP = (0,)


@contextmanager
def calibrated(
    model: Model,
    heads: Bool[Tensor, "layer head"] | xr.DataArray,
    *,
    beta: float = BETA,
    alpha: float = ALPHA,
    theta: float | None = None,
    keep: Sequence[int] = KEEP,
    prompt_length: int | None = None,
) -> Iterator[None]:
    """Attention calibration of the chosen heads on every run inside the context, in this thread; also on `generate`.

    Prompts of a batch do not touch each other. Computes the pattern of the layers concerned in plain PyTorch; what
    changes nothing is left to the model's own attention, bit for bit. A cache that drops keys from the middle is not
    served.

    Args:
        model: the model.
        heads: which heads, such as `calibration_search` selects.
        beta: share of its attention that a hidden sink keeps.
        alpha: a hidden sink's score is above `alpha` times that of even attention, 1/N.
        theta: a hidden sink's score is above this number, instead of `alpha`/N.
        keep: positions that are never hidden sinks, counted from the prompt's first token (padding left out).
        prompt_length: columns of the input, padding included, that are the prompt. None: the whole pass that starts the
            sequence. Needed to generate without a KV cache, where each step is a longer pass from the start.

    Raises:
        ValueError: before any run, for a number out of range or heads of another shape; in a run, if the prompt is
            shorter than `prompt_length`.
        SiteUnavailable: if the attention of this family cannot be edited.

    Source: Yu et al. 2024 (arXiv 2406.15765), whose released scripts use θ = 0.1. Checked against loops over heads and
    rows in tests/sinks/test_calibration.py.
    """
    rule = CalibrationRule(beta=beta, alpha=alpha, theta=theta, keep=tuple(keep), prompt_length=prompt_length)
    chosen = head_selection(model, heads)
    taps = []
    for layer in chosen.any(1).nonzero()[:, 0].tolist():
        at_layer = _AtLayer(rule, chosen[layer].nonzero()[:, 0])
        taps += [Tap(Site("attn_scores", layer), at_layer.see_scores), Tap(Site("pattern", layer), at_layer.edit)]
    with tapped(model.anatomy, taps):
        yield


@dataclass(frozen=True)
class CalibrationRule:
    """What counts as a hidden sink, and what it keeps: the settings of `calibrated`, checked."""

    beta: float = BETA
    alpha: float = ALPHA
    theta: float | None = None
    keep: tuple[int, ...] = KEEP
    prompt_length: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta is {self.beta:g}; it is a share between 0 and 1")
        if self.alpha <= 0 or (self.theta is not None and self.theta <= 0):
            raise ValueError("alpha and theta must be above 0: a score of 0 is no sink")
        if any(position < 0 for position in self.keep):
            raise ValueError(f"keep is {self.keep}; positions count from the first token of the prompt, 0")
        if self.prompt_length is not None and self.prompt_length < 1:
            raise ValueError(f"prompt_length is {self.prompt_length}; a prompt has at least one token")


def column_scores(
    pattern: Float[Tensor, "batch head query key"], allowed: Bool[Tensor, "batch #head query key"]
) -> Float[Tensor, "batch head key"]:
    """Mean attention that each key receives over the rows that may attend to it; NaN for a key that none may.

    In a causal model without a window this is Σ_i A_ik / (T − k). Late keys are averaged over few rows.
    """
    wide = pattern.to(torch.promote_types(pattern.dtype, torch.float32))
    return (wide * allowed).sum(2) / allowed.sum(2)


def hidden_sink_keys(
    scores: Float[Tensor, "batch head key"],
    keep: Bool[Tensor, "#batch key"],
    *,
    alpha: float = ALPHA,
    theta: float | None = None,
) -> Bool[Tensor, "batch head key"]:
    """Keys whose column score is above `theta`, by default `alpha` / (number of keys that have a score).

    Args:
        scores: column scores of whole prompts; NaN for padding.
        keep: keys that are no hidden sinks in any case.
        alpha: times the score of even attention.
        theta: a threshold instead.
    """
    bound = alpha / (~scores.isnan()).sum(-1, keepdim=True) if theta is None else theta
    return (scores > bound) & ~keep[:, None]


def head_selection(model: Model, heads: Bool[Tensor, "layer head"] | xr.DataArray) -> Bool[Tensor, "layer head"]:
    """A choice of heads as a boolean tensor.

    Raises:
        ValueError: if it is no boolean array of [layer, head] of this model.
    """
    if isinstance(heads, xr.DataArray):
        heads = torch.from_numpy(heads.transpose("layer", "head").to_numpy())
    shape = (model.n_layers, model.n_heads)
    if heads.dtype != torch.bool or heads.shape != shape:
        raise ValueError(
            f"heads is {heads.dtype} of shape {tuple(heads.shape)}; it must be torch.bool of [layer, head] = {shape}"
        )
    return heads.cpu()


@dataclass
class _AtLayer:
    """The taps of one layer, and the hidden sinks that they found."""

    rule: CalibrationRule
    heads: Tensor
    sinks: PromptKeys = field(default_factory=PromptKeys)
    allowed: Tensor | None = None
    """Of the pass that starts a sequence, from its scores until its pattern comes."""

    def see_scores(self, scores: Tensor, run: Run) -> None:
        if not run.n_past:
            self.allowed = ~torch.isneginf(scores[:, self.heads.to(scores.device)])

    def edit(self, pattern: Tensor, run: Run) -> Tensor | None:
        heads = self.heads.to(pattern.device)
        chosen = pattern[:, heads]
        if not run.n_past:
            self._find_sinks(chosen, run)
        donors = self.sinks.on_keys(run, chosen)
        moved = move_mass(chosen, donors, ~donors, 1 - self.rule.beta)
        if torch.equal(moved, chosen):
            return None
        new = pattern.clone()
        new[:, heads] = moved
        return new

    def _find_sinks(self, pattern: Tensor, run: Run) -> None:
        n_columns = pattern.shape[2]
        length = self.rule.prompt_length or n_columns
        if n_columns < length:
            raise ValueError(f"prompt_length is {length}, and the prompt has {n_columns} tokens")
        column = torch.arange(length, device=pattern.device)
        padding = column.new_zeros(len(pattern)) if run.n_padding is None else run.n_padding.to(pattern.device)
        position = column - padding[:, None]
        assert self.allowed is not None
        allowed = self.allowed[:, :, :length, :length] & (position >= 0)[:, None, :, None]
        scores = column_scores(pattern[:, :, :length, :length], allowed)
        keep = torch.isin(position, position.new_tensor(self.rule.keep))
        self.sinks.find(hidden_sink_keys(scores, keep, alpha=self.rule.alpha, theta=self.rule.theta))
        self.allowed = None
