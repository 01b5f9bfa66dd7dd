"""Counterfactual runs the plain way: every variant is one whole forward pass with hooks, several variants to a batch.

Slow and obvious on purpose: what faster ways are held against. A variant is a prompt and its edits; a variant costs one
row of a forward pass.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.model import Edit, Model, Site
from interp.model.hooks import Run, Tap, tapped
from interp.patching.batching import rows_a_batch
from interp.patching.progress import progress_bar
from interp.patching.variant import Variant, check_values

logger = logging.getLogger(__name__)

Read = Callable[[Float[Tensor, "row column"], Int[Tensor, " row"]], Float[Tensor, "row ..."]]


@torch.no_grad()
def run_variants(
    model: Model,
    prompts: Int[Tensor, "prompt pos"],
    variants: Sequence[Variant],
    read: Read,
    *,
    columns: Int[Tensor, " column"] | None = None,
    base_edits: Sequence[Sequence[Edit]] = (),
    batch_size: int | None = None,
    progress: bool | None = None,
    description: str = "patching",
) -> Float[Tensor, "variant ..."]:
    """What `read` makes of the logits at the last position of each variant.

    Args:
        model: the model.
        prompts: token ids of the base prompts.
        variants: the runs.
        read: from last-position logits [row, column] and the prompt index of each row to the values kept, [row, ...].
        columns: token ids whose logits `read` gets, in this order; None: the whole vocabulary.
        base_edits: by prompt, edits that its base run carries, and so each of its variants before its own.
        batch_size: rows a forward pass; by default about a thousand tokens' worth.
        progress: show a progress bar; None: in a terminal or notebook only.
        description: what the bar says.

    Returns:
        The values of each variant in the order given, float32 (float64 if `read` gives it).

    Raises:
        FloatingPointError: if a value is NaN or infinite, naming the edits of the first such variant.
        MemoryError: if a single prompt does not fit; when a batch does not, smaller ones are tried.
    """
    if base_edits:
        variants = [replace(one, edits=(*base_edits[one.prompt], *one.edits)) for one in variants]
    rows = rows_a_batch(prompts.shape[1], batch_size)
    values: list[Tensor] = []
    done = 0
    with progress_bar(len(variants), description, "run", progress=progress) as bar:
        while done < len(variants):
            chunk = variants[done : done + rows]
            try:
                values.append(_run_batch(model, prompts, chunk, read, columns))
            except torch.OutOfMemoryError as error:
                rows = _smaller_batch(len(chunk), prompts.shape[1], error)
                continue
            done += len(chunk)
            bar.update(len(chunk))
    return torch.cat(values)


def _run_batch(
    model: Model,
    prompts: Int[Tensor, "prompt pos"],
    chunk: Sequence[Variant],
    read: Read,
    columns: Int[Tensor, " column"] | None,
) -> Float[Tensor, "variant ..."]:
    which = torch.tensor([variant.prompt for variant in chunk])
    with tapped(model.anatomy, row_taps(model, chunk)):
        logits = model.last_logits(prompts[which])
    logits = logits if columns is None else logits[:, columns.to(logits.device)]
    values = read(logits, which.to(logits.device))
    check_values(values, chunk)
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _smaller_batch(rows: int, length: int, error: torch.OutOfMemoryError) -> int:
    """Half as many rows.

    Raises:
        MemoryError: if even one prompt does not fit.
    """
    if rows == 1:
        raise MemoryError(f"one prompt of {length} tokens does not fit into memory: {error}") from error
    logger.warning("out of memory with %d prompts at once: going on with %d", rows, rows // 2)
    return rows // 2


def row_taps(model: Model, chunk: Sequence[Variant]) -> list[Tap]:
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
