"""How few dimensions a head needs: its queries, keys or values projected onto their principal directions.

1. `head_subspace` collects a head's vectors over prompts, at the places that matter, and finds their mean and principal
   directions, before rotary, so that a direction is the same at every position.
2. `low_rank_metric` runs the model with all but the first few directions replaced by the mean, rank by rank.

Source: Lieberum et al. 2023, Does circuit analysis interpretability scale? (arXiv 2307.09458).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import xarray as xr
from jaxtyping import Bool, Float
from torch import Tensor

from interp.metrics import Metric, accuracy, kl_divergence
from interp.model import Edit, Model, Site
from interp.patching.activation import resolve_metric
from interp.patching.batching import batches
from interp.patching.edges import Writer
from interp.patching.labels import provenance
from interp.patching.progress import progress_bar
from interp.tasks import Task

Part = Literal["q", "k", "v"]
PARTS = ("q", "k", "v")
MEASURES = ("metric", "accuracy", "kl")


@dataclass(frozen=True)
class Subspace:
    """The principal directions of one head's vectors."""

    site: Site
    head: int
    """Among the key/value heads, for k and v."""
    mean: Float[Tensor, " d_head"]
    directions: Float[Tensor, "direction d_head"]
    """Orthonormal, by falling variance; as many as d_head."""
    variance: Float[Tensor, " direction"]
    """Share of the variance along each; NaN if the vectors are all the same."""

    def projected(self, vectors: Float[Tensor, "... d_head"], rank: int) -> Float[Tensor, "... d_head"]:
        """Vectors with their first `rank` directions kept, and the mean in all others."""
        precise = torch.promote_types(vectors.dtype, torch.float32)
        kept = self.directions[:rank].to(vectors.device, precise)
        mean = self.mean.to(vectors.device, precise)
        return (mean + (vectors.to(precise) - mean) @ kept.T @ kept).to(vectors.dtype)

    def edit(self, where: Bool[Tensor, "prompt pos"], rank: int) -> Edit:
        """The edit that projects the head's vectors at some places of a batch."""

        def fn(activation: Float[Tensor, "prompt pos head d_head"]) -> Float[Tensor, "prompt pos head d_head"]:
            chosen = where.to(activation.device)
            own = activation[:, :, self.head]
            activation[:, :, self.head] = torch.where(chosen[..., None], self.projected(own, rank), own)
            return activation

        return Edit(self.site, fn=fn, heads=[self.head])


def head_subspace(
    model: Model,
    task: Task,
    head: str,
    *,
    part: Part = "q",
    positions: Sequence[str] | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> Subspace:
    """Mean and principal directions of a head's queries, keys or values on the clean prompts, before rotary.

    Costs one forward pass a prompt; holds all vectors.

    Args:
        model: the model.
        task: its clean prompts.
        head: a query head, "L9H6"; its key/value head is taken for k and v, and is shared by its group.
        part: "q", "k" or "v".
        positions: key positions of the task at which vectors are collected; by default the last token for queries and
            all positions for keys and values.
        batch_size: prompts a forward pass; by default about a thousand tokens' worth.
        progress: show a progress bar; None: in a terminal or notebook only.

    Raises:
        ValueError: for an unknown head, part or position, or a single vector.
    """
    site, index = _site_of(model, head, part)
    collected = []
    with progress_bar(len(task), f"directions of {head}.{part}", "prompt", progress=progress) as bar:
        for prompts, where in _batches(task, part, positions, batch_size):
            _, cache = model.run_with_cache(prompts.clean, [site], logits_to_keep=1)
            vectors = cache[site][:, :, index][where.to(cache[site].device)].cpu()
            collected.append(vectors.to(torch.promote_types(vectors.dtype, torch.float32)))
            bar.update(len(prompts))
    return _principal(site, index, torch.cat(collected), f"{head}.{part}")


def _principal(site: Site, index: int, vectors: Float[Tensor, "vector d_head"], name: str) -> Subspace:
    if len(vectors) < 2:
        raise ValueError(f"one vector of {name}: principal directions take at least two")
    mean = vectors.mean(0)
    # The triangular factor has the same directions as the vectors, and is no larger than d_head × d_head.
    triangle = torch.linalg.qr(vectors - mean, mode="r").R
    _, sizes, directions = torch.linalg.svd(triangle, full_matrices=True)
    variance = torch.zeros(len(mean), dtype=mean.dtype)
    variance[: len(sizes)] = sizes.square()
    total = variance.sum()
    rounding = (16 * torch.finfo(mean.dtype).eps) ** 2 * vectors.square().sum()
    return Subspace(site, index, mean, directions, variance / total if total > rounding else variance * torch.nan)


def low_rank_metric(
    model: Model,
    task: Task,
    head: str,
    ranks: Sequence[int],
    *,
    part: Part = "q",
    positions: Sequence[str] | None = None,
    fit: Task | None = None,
    metric: str | Metric | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> xr.Dataset:
    """The behaviour when a head's queries, keys or values are left only a few principal directions.

    Directions are those of `head_subspace`; what lies outside the first r becomes the mean. Rank 0 replaces the vectors
    by their mean, rank d_head changes nothing but rounding. Costs a forward pass for each rank and prompt, one more,
    and one for each prompt that directions are fitted on.

    Args:
        model: the model.
        task: the prompts that are measured.
        head: as in `head_subspace`.
        ranks: how many directions are kept, 0..d_head.
        part: "q", "k" or "v".
        positions: as in `head_subspace`; vectors elsewhere are left alone. For mcqa, ("LABEL1", ..., "LABEL4") are the
            labels.
        fit: other prompts to fit the directions on, so that the measure is of held-out ones; the same by default.
        metric: as in `activation_patching`.
        batch_size: prompts a forward pass; by default about a thousand tokens' worth.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        Dataset over [rank]: `metric`, `accuracy`, `kl` (from the plain prediction, in nats), and `variance` (share of
        the variance of the fitted vectors kept); attrs `metric_plain` and `accuracy_plain`.

    Raises:
        ValueError: for an unknown head, part or position, or ranks outside 0..d_head or none.
    """
    started = time.perf_counter()
    if not ranks or not all(0 <= rank <= model.d_head for rank in ranks):
        raise ValueError(f"ranks={list(ranks)}; give at least one, of 0..{model.d_head}")
    _site_of(model, head, part)
    _check_positions(task, positions)
    metric_name, metric_fn = resolve_metric(metric, task)
    fitted = task if fit is None else fit
    space = head_subspace(model, fitted, head, part=part, positions=positions, batch_size=batch_size, progress=progress)
    plain, found = [], []
    with progress_bar((1 + len(ranks)) * len(task), f"{head}.{part}", "run", progress=progress) as bar:
        for prompts, where in _batches(task, part, positions, batch_size):
            edits: list[list[Edit]] = [[], *([space.edit(where, rank)] for rank in ranks)]
            without, *projected = _runs(model, prompts, edits, metric_fn, bar.update)
            plain.append(without)
            found.append(torch.stack(projected))
    means = torch.cat(found, dim=-1).mean(-1).numpy()
    metric_plain, accuracy_plain, _ = torch.cat(plain, dim=-1).mean(-1).tolist()
    kept = [float(space.variance[:rank].sum()) for rank in ranks]
    return xr.Dataset(
        {**{name: ("rank", means[:, at]) for at, name in enumerate(MEASURES)}, "variance": ("rank", kept)},
        coords={"rank": list(ranks)},
        attrs={
            **provenance(model, task),
            "method": "low_rank_metric",
            "head": head,
            "part": part,
            "positions": " ".join(positions) if positions else ("last" if part == "q" else "all"),
            "fitted_on": f"{len(fit)} other prompts" if fit is not None else "the same prompts",
            "metric": metric_name,
            "metric_plain": metric_plain,
            "accuracy_plain": accuracy_plain,
            "seconds": time.perf_counter() - started,
        },
    )


def _runs(
    model: Model, prompts: Task, edits: Sequence[Sequence[Edit]], metric: Metric, on_prompts: Callable[[int], object]
) -> list[Float[Tensor, "measure prompt"]]:
    """The measures of some prompts under each set of edits, KL from the first."""
    found: list[Tensor] = []
    for several in edits:
        with model.edited(several):
            logits = model(prompts.clean, logits_to_keep=1)[:, -1]
        if not found:
            base = logits
        answers, wrong = prompts.answers.to(logits.device), prompts.wrong.to(logits.device)
        values = metric(logits, answers, wrong), accuracy(logits, answers, wrong), kl_divergence(base, logits)
        found.append(torch.stack([value.float().cpu() for value in values]))
        on_prompts(len(prompts))
    return found


def _site_of(model: Model, head: str, part: Part) -> tuple[Site, int]:
    """Where a head's vectors are, and its index there."""
    if part not in PARTS:
        raise ValueError(f"part={part!r}; it is one of {', '.join(PARTS)}")
    writer = Writer.parse(head)
    if writer.head is None:
        raise ValueError(f"{head!r} is not a head; heads are called 'L9H6'")
    writer.check(model)
    return Site(part, writer.layer), writer.head * model.n_heads_at(part) // model.n_heads


def _check_positions(task: Task, positions: Sequence[str] | None) -> None:
    if positions is None:
        return
    if not positions:
        raise ValueError("positions is empty: name at least one, or leave it out")
    for name in positions:
        if name not in task.positions:
            raise ValueError(f"{name!r} is not a key position of {task.name!r}; it has {', '.join(task.positions)}")


def _batches(
    task: Task, part: Part, positions: Sequence[str] | None, batch_size: int | None
) -> list[tuple[Task, Bool[Tensor, "prompt pos"]]]:
    """Prompts by length and batch, with the places that vectors are taken from."""
    _check_positions(task, positions)
    found = []
    for group in task.by_length():
        length = group.clean.shape[1]
        for rows in batches(len(group), length, batch_size):
            prompts = group[rows]
            where = torch.full((len(prompts), length), positions is None and part != "q")
            if positions is None and part == "q":
                where[:, -1] = True
            for name in positions or ():
                where[torch.arange(len(prompts)), prompts.positions[name]] = True
            found.append((prompts, where))
    return found
