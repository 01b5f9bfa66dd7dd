"""Attention rows of chosen heads overwritten, so that one task's circuit behaves like another's.

The last token's row of a head's pattern is set to zero, then to given fractions at given positions, which come from the
task. `row_edits` makes the edits, `steer` measures the task with and without them. The heads are those that
`interp.circuits.staged` finds: in the source, heads that feed the movers' queries in one task and fail to in another.

Source: Merullo, Eickhoff & Pavlick 2024, Circuit component reuse (arXiv 2310.08744).
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from interp.metrics import Metric, accuracy, answer_rank
from interp.model import Edit, Model, Site
from interp.patching.activation import resolve_metric
from interp.patching.batching import batches
from interp.patching.edges import Writer
from interp.patching.labels import provenance
from interp.patching.progress import progress_bar
from interp.tasks import Task


def row_edits(
    model: Model,
    task: Task,
    heads: Sequence[str],
    onto: Sequence[str] | Int[Tensor, "prompt place"],
    *,
    fractions: Sequence[float] | None = None,
) -> list[Edit]:
    """Edits after which the last token of every clean prompt attends, in these heads, to given positions only.

    For `model.edited(...)` around a run of `task.clean`, all prompts at once and in order.

    Args:
        model: the model.
        task: prompts of one length.
        heads: names such as "L12H3".
        onto: names of key positions of the task, such as ("WRONG", "THIRD"), or positions by prompt. Places that
            coincide get the sum of their fractions.
        fractions: how much attention each place gets; the same for each by default, 1 in all. What is missing from 1
            goes nowhere.

    Returns:
        One edit a layer.

    Raises:
        ValueError: for an unknown head or position, fractions that do not fit, or prompts of several lengths.
    """
    places = _places(task, onto)
    weights = torch.tensor(_weights(places.shape[1], fractions), dtype=torch.float32)
    rows = torch.zeros(task.clean.shape).scatter_add_(1, places, weights.expand(len(task), -1))
    by_layer: dict[int, list[int]] = defaultdict(list)
    for name in heads:
        layer, head = _head(name)
        by_layer[layer].append(head)
    edits = [
        Edit(Site("pattern", layer), value=rows[:, None, None, :], heads=some, positions=-1)
        for layer, some in sorted(by_layer.items())
    ]
    for edit in edits:
        model.edit_taps(edit)
    return edits


def steer(
    model: Model,
    task: Task,
    heads: Sequence[str],
    onto: Sequence[str] | Int[Tensor, "prompt place"],
    *,
    fractions: Sequence[float] | None = None,
    metric: str | Metric | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> xr.Dataset:
    """The task with and without the intervention of `row_edits`. Costs two forward passes a prompt.

    Source: in Merullo et al. 2024, inhibition heads and a negative mover head of GPT-2 medium, made to attend to the
    two wrong colours (`onto=("WRONG", "THIRD")` of `interp.tasks.colored_objects`), repair most of its mistakes.

    Args:
        model: the model.
        task: its clean prompts.
        heads: as in `row_edits`.
        onto: as in `row_edits`.
        fractions: as in `row_edits`.
        metric: as in `activation_patching`.
        batch_size: prompts a forward pass; by default about a thousand tokens' worth.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        Dataset over [run, prompt], run "plain" or "steered": `metric`, `accuracy` (against the wrong answers) and
        `top1` (against the whole vocabulary); attrs `n_repaired` and `n_broken` count prompts that `top1` gains and
        loses.

    Raises:
        ValueError: as `row_edits`, of prompts of any lengths.
    """
    started = time.perf_counter()
    metric_name, metric_fn = resolve_metric(metric, task)
    places = _places(task, onto)
    groups = task.by_length()
    parts = []
    with progress_bar(len(task), "steering", "prompt", progress=progress) as bar:
        for group in groups:
            for rows in batches(len(group), len(group.clean_ids[0]), batch_size):
                prompts = group[rows]
                edits = row_edits(model, prompts, heads, places[group.index[rows]], fractions=fractions)
                parts.append(_plain_and_edited(model, prompts, edits, metric_fn))
                bar.update(len(prompts))
    order = torch.cat([group.index for group in groups]).argsort()
    values = torch.cat(parts, dim=-1)[..., order].numpy()
    top1 = values[2] == 0
    data = {"metric": values[0], "accuracy": values[1], "top1": top1.astype(np.float32)}
    return xr.Dataset(
        {name: (("run", "prompt"), one) for name, one in data.items()},
        coords={"run": ["plain", "steered"], "prompt": range(len(task))},
        attrs={
            **provenance(model, task),
            "method": "steer",
            "metric": metric_name,
            "heads": " ".join(heads),
            "onto": " ".join(onto) if not isinstance(onto, Tensor) else "given positions",
            "n_repaired": int((top1[1] & ~top1[0]).sum()),
            "n_broken": int((top1[0] & ~top1[1]).sum()),
            "seconds": time.perf_counter() - started,
        },
    )


def _plain_and_edited(
    model: Model, prompts: Task, edits: Sequence[Edit], metric: Metric
) -> Float[Tensor, "measure run prompt"]:
    plain = model(prompts.clean, logits_to_keep=1)[:, -1]
    with model.edited(edits):
        steered = model(prompts.clean, logits_to_keep=1)[:, -1]
    answers, wrong = prompts.answers.to(plain.device), prompts.wrong.to(plain.device)
    return torch.stack(
        [
            torch.stack([measure(logits, answers, wrong).float().cpu() for logits in (plain, steered)])
            for measure in (metric, accuracy, answer_rank)
        ]
    )


def _weights(n_places: int, fractions: Sequence[float] | None) -> list[float]:
    if fractions is None:
        return [1 / n_places] * n_places if n_places else []
    if len(fractions) != n_places or not all(one >= 0 for one in fractions) or sum(fractions) > 1 + 1e-6:
        raise ValueError(
            f"fractions={list(fractions)}: one for each of {n_places} places, none negative, at most 1 in all"
        )
    return list(fractions)


def _places(task: Task, onto: Sequence[str] | Int[Tensor, "prompt place"]) -> Int[Tensor, "prompt place"]:
    if isinstance(onto, Tensor):
        if onto.dim() != 2 or len(onto) != len(task):
            raise ValueError(
                f"onto has the shape {tuple(onto.shape)}; it is a row of positions for each of {len(task)} prompts"
            )
        for row, (places, ids) in enumerate(zip(onto.tolist(), task.clean_ids, strict=True)):
            if not all(0 <= place < len(ids) for place in places):
                raise ValueError(f"onto: the positions of prompt {row} are {places}; they run 0..{len(ids) - 1}")
        return onto.long().cpu()
    for name in onto:
        if name not in task.positions:
            raise ValueError(f"{name!r} is not a key position of {task.name!r}; it has {', '.join(task.positions)}")
    if not onto:
        return torch.zeros(len(task), 0, dtype=torch.long)
    return torch.stack([task.positions[name] for name in onto], dim=1)


def _head(name: str) -> tuple[int, int]:
    writer = Writer.parse(name)
    if writer.head is None:
        raise ValueError(f"{name!r} is not a head; heads are called 'L9H6'")
    return writer.layer, writer.head
