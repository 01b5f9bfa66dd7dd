"""What a behaviour is measured by, prompt by prompt, and how sure a mean over prompts is.

Task metrics share one signature: logits at the answer position, and the token ids of right and wrong answers (padded
with −1 where prompts have different numbers of them). All of them compute in float32 at least, whatever the logits'
type, and the first three can be differentiated. A value that is undefined is NaN, never 0.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

PADDING = -1
"""The id that fills rows of `answers` and `wrong` that are shorter than the longest."""

Metric: TypeAlias = Callable[
    [Float[Tensor, "prompt d_vocab"], Int[Tensor, "prompt n_answers"], Int[Tensor, "prompt n_wrong"]],
    Float[Tensor, "prompt"],
]

_BOOTSTRAP_BUDGET = 4_000_000  # resampled means held at once (32 MB of float64)


def logit_diff(
    logits: Float[Tensor, "prompt d_vocab"],
    answers: Int[Tensor, "prompt n_answers"],
    wrong: Int[Tensor, "prompt n_wrong"],
) -> Float[Tensor, "prompt"]:
    """Mean logit of the right answers minus mean logit of the wrong ones; NaN where a prompt lacks either."""
    return _masked_mean(*_gathered(_widened(logits), answers)) - _masked_mean(*_gathered(_widened(logits), wrong))


def prob_diff(
    logits: Float[Tensor, "prompt d_vocab"],
    answers: Int[Tensor, "prompt n_answers"],
    wrong: Int[Tensor, "prompt n_wrong"],
) -> Float[Tensor, "prompt"]:
    """Total probability of the right answers minus that of the wrong ones (−1..1); NaN without a right answer.

    Source: Hanna et al. 2023 (arXiv 2305.00586), the metric of greater-than.
    """
    probabilities = _widened(logits).softmax(dim=-1)
    right, is_right = _gathered(probabilities, answers)
    other, is_other = _gathered(probabilities, wrong)
    difference = (right * is_right).sum(dim=-1) - (other * is_other).sum(dim=-1)
    return difference.masked_fill(~is_right.any(dim=-1), torch.nan)


def log_prob(
    logits: Float[Tensor, "prompt d_vocab"],
    answers: Int[Tensor, "prompt n_answers"],
    wrong: Int[Tensor, "prompt n_wrong"],
) -> Float[Tensor, "prompt"]:
    """Log of the total probability of the right answers, in nats; wrong answers play no part."""
    right, is_right = _gathered(_widened(logits).log_softmax(dim=-1), answers)
    # A row of nothing but −inf has a NaN gradient, so rows without an answer are filled first and masked afterwards.
    has_answer = is_right.any(dim=-1, keepdim=True)
    total = right.masked_fill(~is_right & has_answer, -torch.inf).logsumexp(dim=-1)
    return total.masked_fill(~has_answer.squeeze(-1), torch.nan)


def accuracy(
    logits: Float[Tensor, "prompt d_vocab"],
    answers: Int[Tensor, "prompt n_answers"],
    wrong: Int[Tensor, "prompt n_wrong"],
) -> Float[Tensor, "prompt"]:
    """1 where the best right answer has a higher logit than every wrong one, else 0; ties count as 0.

    A prompt without wrong answers is held against the whole vocabulary.
    """
    best = _best_answer(logits, answers)
    other, is_other = _gathered(_widened(logits), wrong)
    beats_wrong = (best[:, None] > other.masked_fill(~is_other, -torch.inf)).all(dim=-1)
    is_top = answer_rank(logits, answers, wrong) == 0
    correct = torch.where(is_other.any(dim=-1), beats_wrong, is_top).to(best.dtype)
    return correct.masked_fill(best.isnan(), torch.nan)


def answer_rank(
    logits: Float[Tensor, "prompt d_vocab"],
    answers: Int[Tensor, "prompt n_answers"],
    wrong: Int[Tensor, "prompt n_wrong"],
) -> Float[Tensor, "prompt"]:
    """How many other tokens of the vocabulary are at least as likely as the best right answer: 0 = the model's choice.

    Ties count against the answer; the other right answers and `wrong` play no part.
    """
    best = _best_answer(logits, answers)
    at_least = (_widened(logits) >= best[:, None]).sum(dim=-1)
    right, is_right = _gathered(_widened(logits), answers)
    tied_answers = ((right >= best[:, None]) & is_right).sum(dim=-1)
    return (at_least - tied_answers).to(best.dtype).masked_fill(best.isnan(), torch.nan)


def kl_divergence(
    base_logits: Float[Tensor, "prompt d_vocab"], logits: Float[Tensor, "prompt d_vocab"]
) -> Float[Tensor, "prompt"]:
    """KL(base ‖ other) of the next-token distributions, in nats: 0 where nothing changed.

    Its gradient at `logits = base_logits` is exactly 0, so first-order estimates cannot start there.
    """
    base = _widened(base_logits).log_softmax(dim=-1)
    other = _widened(logits).log_softmax(dim=-1)
    # A token that the base rules out (−inf) contributes 0 · (−inf − x) = 0, not NaN.
    possible = base > -torch.inf
    log_ratio = torch.where(possible, base, 0) - torch.where(possible, other, 0)
    return (base.exp() * log_ratio).sum(dim=-1)


METRICS: dict[str, Metric] = {
    metric.__name__: metric for metric in (logit_diff, prob_diff, log_prob, accuracy, answer_rank)
}
"""Task metrics by name."""

READS_ANSWERS_ONLY: tuple[Metric, ...] = (logit_diff,)
"""Metrics that look at the logits of answers and wrong answers alone, so that the others need not be computed."""


def metric_named(name: str) -> Metric:
    """The task metric of that name.

    Raises:
        ValueError: if there is none; near names are offered.
    """
    if name not in METRICS:
        near = difflib.get_close_matches(name, METRICS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name!r} is not a metric{hint} (metrics: {', '.join(METRICS)})")
    return METRICS[name]


def normalised_effect(
    effect: Float[Tensor, "*prompt_and_axes"], clean: Float[Tensor, "*prompt"], corrupted: Float[Tensor, "*prompt"]
) -> Float[Tensor, "*prompt_and_axes"]:
    """Effect / (clean − corrupted): the share of the behaviour restored or destroyed; 0 none, 1 all.

    The axes of `clean` and `corrupted` (one value a prompt, or a single mean over prompts) are the first axes of
    `effect`. NaN where clean and corrupted are equal to rounding: then there is no behaviour to restore.
    """
    clean, corrupted = _widened(clean), _widened(corrupted)
    gap = clean - corrupted
    rounding = torch.finfo(gap.dtype).eps * torch.maximum(clean.abs(), corrupted.abs())
    gap = gap.masked_fill(gap.abs() <= rounding, torch.nan)
    return _widened(effect) / gap.reshape(gap.shape + (1,) * (effect.dim() - gap.dim()))


def bootstrap_interval(
    values: Tensor | NDArray[np.floating],
    *,
    level: float = 0.95,
    n_resamples: int = 1000,
    seed: int = 0,
    axis: int = 0,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Percentile bootstrap interval of the mean over prompts, for all other axes at once.

    Prompts are drawn with replacement, the same draws for every cell. The interval is NaN where a value is NaN, and
    for fewer than two prompts. Costs n_resamples × values.size multiplications.

    Args:
        values: one value a prompt, [prompt, ...].
        level: share of the bootstrap distribution inside the interval, between 0 and 1.
        n_resamples: bootstrap samples.
        seed: of the draws; the global random state is neither used nor changed.
        axis: the prompt axis.

    Returns:
        (low, high), each with the shape of `values` without `axis`.

    Source: Efron & Tibshirani 1993, ch. 13. Checked against `scipy.stats.bootstrap` in tests/test_metrics.py.
    """
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; it is a share between 0 and 1, such as 0.95")
    if isinstance(values, Tensor):
        values = _widened(values.detach()).cpu().numpy()
    rows = np.moveaxis(np.asarray(values, dtype=np.float64), axis, 0)
    n, shape = rows.shape[0], rows.shape[1:]
    rows = rows.reshape(n, -1)
    if n < 2:
        return np.full(shape, np.nan), np.full(shape, np.nan)
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_resamples) / n
    step = max(1, _BOOTSTRAP_BUDGET // n_resamples)
    tails = [(1 - level) / 2, (1 + level) / 2]
    bounds = np.empty((2, rows.shape[1]))
    for start in range(0, rows.shape[1], step):
        columns = slice(start, start + step)
        bounds[:, columns] = np.quantile(draws @ rows[:, columns], tails, axis=0)
    return bounds[0].reshape(shape), bounds[1].reshape(shape)


def _widened(values: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    """The same values in float32 at least."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _gathered(
    values: Float[Tensor, "prompt d_vocab"], ids: Int[Tensor, "prompt n_ids"]
) -> tuple[Float[Tensor, "prompt n_ids"], Bool[Tensor, "prompt n_ids"]]:
    """Values at token ids, and where these are not padding (padding shows the value of token 0)."""
    ids = ids.to(values.device)
    is_token = ids != PADDING
    return values.gather(-1, ids.masked_fill(~is_token, 0)), is_token


def _masked_mean(values: Float[Tensor, "prompt n_ids"], mask: Bool[Tensor, "prompt n_ids"]) -> Float[Tensor, "prompt"]:
    """Mean over the ids that are tokens; 0/0 = NaN where there is none."""
    return values.masked_fill(~mask, 0).sum(dim=-1) / mask.sum(dim=-1)


def _best_answer(
    logits: Float[Tensor, "prompt d_vocab"], answers: Int[Tensor, "prompt n_answers"]
) -> Float[Tensor, "prompt"]:
    """The highest logit among the right answers; NaN for a prompt that has none."""
    right, is_right = _gathered(_widened(logits), answers)
    if not right.shape[-1]:
        return right.new_full(right.shape[:1], torch.nan)
    best = right.masked_fill(~is_right, -torch.inf).amax(dim=-1)
    return best.masked_fill(~is_right.any(dim=-1), torch.nan)
