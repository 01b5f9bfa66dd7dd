"""How spread out, how far and how much on the first token a head attends, on prompts as they are."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
import xarray as xr
from jaxtyping import Int
from torch import Tensor

from interp.heads.attention_calls import call_stats, pattern_rows
from interp.heads.rows import Measure, key_positions, row_means, token_groups
from interp.model import Model
from interp.model.attention import AttentionCall
from interp.patching.labels import model_provenance, provenance
from interp.tasks import Task

MIN_KEYS = 8
"""Rows with fewer keys to choose from say little about spread: entropy leaves them out."""

STATISTICS = ("entropy", "distance", "first_token_mass")


def attention_statistics(
    model: Model,
    prompts: Task | Int[Tensor, "prompt pos"],
    *,
    exclude: Sequence[int] = (),
    batch_size: int | None = None,
    progress: bool | None = None,
) -> xr.Dataset:
    """Entropy, distance and first-token mass of every head, averaged over queries and prompts.

    * `entropy`: −Σ A ln A / ln(number of keys the query may attend to), 0 = one key, 1 = all alike; rows with fewer
      than 8 keys are left out;
    * `distance`: Σ A |query − key|, in tokens;
    * `first_token_mass`: A[q, 0] over all q. Row 0 counts, where it is 1, so short prompts score higher.

    Costs one forward pass a prompt, and each layer's scores once more; no pattern is held.

    Args:
        model: the model.
        prompts: a task (its clean prompts) or token ids.
        exclude: key positions left out of entropy and distance, such as a sink at [0]; rows are renormalised.
        batch_size: prompts a forward pass; by default about a thousand tokens' worth.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        Dataset [layer, head]; NaN where no row defines a statistic. Each variable's attr `n_rows` says how many rows
        were averaged, in the layer that has fewest.

    Source: first-token mass is α_1 of Gu et al. 2024 (arXiv 2410.10781).
    """
    started = time.perf_counter()

    def measure(call: AttentionCall, rows: slice) -> dict[str, Tensor]:
        stats = call_stats(call, key_sets=key_positions(call, [0])[None], exclude=key_positions(call, exclude))
        entropy = stats.entropy / stats.n_keys.clamp(min=2).log()
        return {
            "entropy": entropy.masked_fill(stats.n_keys < MIN_KEYS, torch.nan),
            "distance": stats.distance,
            "first_token_mass": stats.mass[0],
        }

    groups: list[tuple[Tensor, Measure]] = [(tokens, measure) for tokens in token_groups(prompts)]
    means = row_means(model, groups, batch_size=batch_size, progress=progress)
    about = provenance(model, prompts) if isinstance(prompts, Task) else model_provenance(model)
    return xr.Dataset(
        {name: (("layer", "head"), means[name][0].numpy(), {"n_rows": means[name][1]}) for name in STATISTICS},
        coords={"layer": range(model.n_layers), "head": range(model.n_heads)},
        attrs={
            **about,
            "method": "attention_statistics",
            "exclude": list(exclude),
            "seconds": time.perf_counter() - started,
        },
    )


def end_attention(
    model: Model, task: Task, *, batch_size: int | None = None, progress: bool | None = None
) -> xr.DataArray:
    """Attention from the last token, which makes the prediction, to the key positions of the task.

    Args:
        model: the model.
        task: its named positions are the keys; "answer" and "wrong" are added: all positions where a right or a
            wrong answer stands in the prompt, summed.
        batch_size: prompts a forward pass; by default about a thousand tokens' worth.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        DataArray [target, layer, head], mean over prompts; "answer" and "wrong" over the prompts that contain one,
        NaN if none does.
    """
    targets = [name for name in task.positions if name not in ("END", "answer", "wrong")]
    groups = [(group.clean, _from_end(group, targets)) for group in task.by_length()]
    means = row_means(model, groups, batch_size=batch_size, progress=progress)
    names = [*targets, "answer", "wrong"]
    return xr.DataArray(
        torch.stack([means[name][0] for name in names]).numpy(),
        dims=("target", "layer", "head"),
        coords={"target": names, "layer": range(model.n_layers), "head": range(model.n_heads)},
        name="attention",
        attrs={**provenance(model, task), "method": "end_attention"},
    )


def _from_end(group: Task, targets: Sequence[str]) -> Measure:
    stands = {
        name: (group.clean[:, :, None] == ids[:, None, :]).any(-1)
        for name, ids in (("answer", group.answers), ("wrong", group.wrong))
    }

    def measure(call: AttentionCall, rows: slice) -> dict[str, Tensor]:
        last = pattern_rows(call, range(call.query.shape[1]), torch.tensor([call.query.shape[2] - 1]))[:, :, 0]
        prompts = torch.arange(len(last), device=last.device)
        found = {name: last[prompts, :, group.positions[name][rows].to(last.device)] for name in targets}
        for name, where in stands.items():
            here = where[rows, None].to(last.device)
            found[name] = (last * here).sum(-1).masked_fill(~here.any(-1), torch.nan)
        return {name: attention[..., None] for name, attention in found.items()}

    return measure
