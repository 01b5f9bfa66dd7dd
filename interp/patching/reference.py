"""Counterfactual runs the plain way: every variant is one whole forward pass with hooks, several variants to a batch.

Slow and obvious on purpose: what faster ways are held against. A variant is a prompt and its edits; a variant costs one
row of a forward pass.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.model import Edit, Model, Site
from interp.model.hooks import Run, Tap, tapped
from interp.patching.batching import rows_a_batch
from interp.patching.progress import progress_bar

logger = logging.getLogger(__name__)

Read = Callable[[Float[Tensor, "row d_vocab"], Int[Tensor, " row"]], Float[Tensor, "row ..."]]


@dataclass(frozen=True)
class Variant:
    """One counterfactual run: the index of a prompt, and the edits to it (without `rows`)."""

    prompt: int
    edits: tuple[Edit, ...]


@torch.no_grad()
def run_variants(
    model: Model,
    prompts: Int[Tensor, "prompt pos"],
    variants: Sequence[Variant],
    read: Read,
    *,
    batch_size: int | None = None,
    progress: bool | None = None,
    description: str = "patching",
) -> Float[Tensor, "variant ..."]:
    """What `read` makes of the logits at the last position of each variant.

    Args:
        model: the model.
        prompts: token ids of the base prompts.
        variants: the runs.
        read: from last-position logits [row, d_vocab] and the prompt index of each row to the values kept, [row, ...].
        batch_size: rows a forward pass; by default about a thousand tokens' worth.
        progress: show a progress bar; None: in a terminal or notebook only.
        description: what the bar says.

    Returns:
        The values of each variant in the order given, float32.

    Raises:
        FloatingPointError: if a value is NaN or infinite, naming the edits of the first such variant.
        MemoryError: if a single prompt does not fit; when a batch does not, smaller ones are tried.
    """
    rows = rows_a_batch(prompts.shape[1], batch_size)
    values: list[Tensor] = []
    done = 0
    with progress_bar(len(variants), description, "run", progress=progress) as bar:
        while done < len(variants):
            chunk = variants[done : done + rows]
            try:
                values.append(_run_batch(model, prompts, chunk, read))
            except torch.OutOfMemoryError as error:
                rows = _smaller_batch(len(chunk), prompts.shape[1], error)
                continue
            done += len(chunk)
            bar.update(len(chunk))
    return torch.cat(values)


def _run_batch(
    model: Model, prompts: Int[Tensor, "prompt pos"], chunk: Sequence[Variant], read: Read
) -> Float[Tensor, "variant ..."]:
    which = torch.tensor([variant.prompt for variant in chunk])
    with tapped(model.anatomy, _row_taps(model, chunk)):
        logits = model.last_logits(prompts[which])
    value = read(logits, which.to(logits.device)).float()
    _check_finite(value, chunk)
    return value


def _smaller_batch(rows: int, length: int, error: torch.OutOfMemoryError) -> int:
    """Half as many rows.

    Raises:
        MemoryError: if even one prompt does not fit.
    """
    if rows == 1:
        raise MemoryError(f"one prompt of {length} tokens does not fit into memory: {error}") from error
    logger.warning("out of memory with %d prompts at once: going on with %d", rows, rows // 2)
    return rows // 2


def _row_taps(model: Model, chunk: Sequence[Variant]) -> list[Tap]:
    """One tap a site, which applies to each row the edits of its variant."""
    by_site: dict[Site, list[tuple[int, Callable[[Tensor, Run], Tensor | None]]]] = defaultdict(list)
    for row, variant in enumerate(chunk):
        for edit in variant.edits:
            for tap in model.edit_taps(edit):
                by_site[tap.site].append((row, tap.fn))
    return [Tap(site, _edit_rows(changes)) for site, changes in by_site.items()]


def _edit_rows(
    changes: Sequence[tuple[int, Callable[[Tensor, Run], Tensor | None]]],
) -> Callable[[Tensor, Run], Tensor]:
    def apply(activation: Tensor, run: Run) -> Tensor:
        edited = activation.clone()
        for row, fn in changes:
            new = fn(edited[row : row + 1], run)
            if new is not None:
                edited[row : row + 1] = new
        return edited

    return apply


def _check_finite(value: Tensor, chunk: Sequence[Variant]) -> None:
    bad = ~torch.isfinite(value).reshape(len(chunk), -1).all(-1)
    if bool(bad.any()):
        variant = chunk[int(bad.nonzero()[0])]
        sites = ", ".join(str(edit.site) for edit in variant.edits)
        raise FloatingPointError(f"the metric is NaN or infinite for prompt {variant.prompt} with an edit at {sites}")
