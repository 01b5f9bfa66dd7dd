"""From last-position logits to a task's metric, computing no more logits than the metric looks at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.metrics import PADDING, READS_ANSWERS_ONLY, Metric
from interp.tasks import Task


@dataclass(frozen=True)
class Reading:
    """A metric with the answers of each prompt, as ids into the logits that are computed."""

    metric: Metric
    answers: Int[Tensor, "prompt n_answers"]
    wrong: Int[Tensor, "prompt n_wrong"]
    columns: Int[Tensor, " column"] | None
    """Token ids whose logits the metric looks at; None: the whole vocabulary."""

    def __call__(self, logits: Float[Tensor, "row column"], prompt: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
        """The metric on the CPU, in float32 at least, with the answers of each row's prompt."""
        prompt = prompt.to(self.answers.device)
        answers, wrong = (ids[prompt].to(logits.device) for ids in (self.answers, self.wrong))
        value = self.metric(logits, answers, wrong)
        return value.to(torch.promote_types(value.dtype, torch.float32)).cpu()

    def of_all(self, logits: Float[Tensor, "row d_vocab"], prompt: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
        """The same from logits of the whole vocabulary."""
        return self(logits if self.columns is None else logits[:, self.columns.to(logits.device)], prompt)


def reading(metric: Metric, task: Task) -> Reading:
    """How to read a metric on a task."""
    if metric not in READS_ANSWERS_ONLY:
        return Reading(metric, task.answers, task.wrong, None)
    both = torch.cat([task.answers.flatten(), task.wrong.flatten()])
    columns = both[both != PADDING].unique()
    answers, wrong = (
        torch.searchsorted(columns, ids.contiguous()).masked_fill(ids == PADDING, PADDING)
        for ids in (task.answers, task.wrong)
    )
    return Reading(metric, answers, wrong, columns)
