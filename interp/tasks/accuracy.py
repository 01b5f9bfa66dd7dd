"""How well a model does a task: accuracy and metric on clean and corrupted prompts, with bootstrap intervals."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray

from interp import metrics
from interp.tasks.task import Task

if TYPE_CHECKING:
    from interp.model import Model

RUNS = ("clean", "corrupted")
STATISTICS = ("mean", "low", "high")


def accuracy(
    model: Model, task: Task, *, batch_size: int = 64, level: float = 0.95, n_resamples: int = 1000, seed: int = 0
) -> xr.Dataset:
    """Accuracy and mean metric of a model on a task, on clean and corrupted prompts.

    Costs two forward passes a prompt, in batches; only the last position's logits are computed. Right and wrong answers
    are those of the clean prompt in both runs, so that a good pair has a high accuracy clean and a low one corrupted.

    Args:
        model: the model.
        task: the task; prompts of several lengths are run length by length.
        batch_size: prompts in one forward pass.
        level: of the bootstrap intervals over prompts.
        n_resamples: bootstrap samples.
        seed: of the bootstrap.

    Returns:
        Dataset with, by [run, statistic] (statistic: mean, low, high), `accuracy` (the best right answer beats every
        wrong one), `top1` (it is the model's first choice in the whole vocabulary) and `metric` (the task's);
        `gap` [statistic], the metric's clean − corrupted; and the values of every prompt, by [run, prompt]:
        `prompt_accuracy`, `prompt_rank`, `prompt_metric`. attrs: model, task, metric, corruption, level, and `chance`,
        the accuracy of a guess among the answers named.
    """
    score = metrics.metric_named(task.metric)
    values = {name: np.full((len(RUNS), len(task)), np.nan) for name in ("accuracy", "rank", "metric")}
    for group in task.by_length():
        for rows in torch.arange(len(group)).split(batch_size):
            part = group[rows.tolist()]
            for run, prompts in enumerate((part.clean, part.corrupted)):
                logits = model(prompts, logits_to_keep=1)[:, -1]
                for name, metric in (("accuracy", metrics.accuracy), ("rank", metrics.answer_rank), ("metric", score)):
                    values[name][run, part.index.numpy()] = metric(logits, part.answers, part.wrong).cpu().numpy()

    def with_interval(per_prompt: NDArray[np.float64]) -> NDArray[np.float64]:
        low, high = metrics.bootstrap_interval(per_prompt, level=level, n_resamples=n_resamples, seed=seed, axis=-1)
        return np.stack([per_prompt.mean(axis=-1), low, high], axis=-1)

    # A first choice that is tied with nothing has rank 0; an undefined rank stays undefined.
    top1 = np.where(np.isnan(values["rank"]), np.nan, values["rank"] == 0)
    per_run = {"accuracy": values["accuracy"], "top1": top1, "metric": values["metric"]}
    n_right, n_wrong = ((ids != metrics.PADDING).sum(dim=-1) for ids in (task.answers, task.wrong))
    return xr.Dataset(
        {name: (("run", "statistic"), with_interval(each)) for name, each in per_run.items()}
        | {"gap": (("statistic",), with_interval(values["metric"][0] - values["metric"][1]))}
        | {f"prompt_{name}": (("run", "prompt"), each) for name, each in values.items()},
        coords={"run": list(RUNS), "statistic": list(STATISTICS), "prompt": np.arange(len(task))},
        attrs={
            "model": model.name,
            "task": task.name,
            "metric": task.metric,
            "corruption": task.corruption,
            "level": level,
            "chance": float((n_right / (n_right + n_wrong)).mean()),
        },
    )
