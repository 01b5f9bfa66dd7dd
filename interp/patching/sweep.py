"""The sweep engine: thousands of counterfactual runs that differ from a base run in a few activations each, exactly.

All that is computed of a variant is what its edits can have changed: later layers and, in a causal model, later
positions. The steps:

1. run the base prompts once, keeping block inputs and keys and values (`base_run`);
2. find where each variant leaves its base run; what never does is not run (`entry`);
3. carry the others through the layers as one packed matrix (`packed_pass`);
4. compute the logits that are read, at the last position only.

Results do not depend on how the variants are cut into chunks; a chunk that does not fit into memory is halved.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.model import Edit, Model, Site
from interp.model.sites import SITE_DIMS
from interp.patching.base_run import run_base
from interp.patching.batching import batches
from interp.patching.entry import BaseDifferences, Entry, SiteEdit, entry_of, site_edits
from interp.patching.packed_pass import PackedPass
from interp.patching.progress import progress_bar
from interp.patching.reference import Read, row_taps, run_variants
from interp.patching.variant import Variant, check_values

logger = logging.getLogger(__name__)

CPU_BYTES = 384 * 2**20
"""Memory for the rows of one chunk on a CPU; on a GPU half of what is free."""
ROWS_A_BLOCK = {"cpu": 1024, "cuda": 16384}
"""Rows that pass a layer together: enough for matrix products at full rate, few enough to stay in a CPU's cache."""

OnRuns = Callable[[int], Any]
"""Told a number of runs that are done."""
Consume = Callable[["_Group", Sequence[Entry], OnRuns], None]


def why_reference(model: Model, sites: Sequence[Site]) -> str:
    """Why variants with edits at these sites have to be run the reference way; "" if the engine serves them."""
    if not model.tower.uses_attention_interface:
        return f"transformers implements the attention of {model.anatomy.family} outside its AttentionInterface"
    if any(site.tower for site in sites):
        return "edits in the vision tower"
    return ""


@torch.no_grad()
def sweep(
    model: Model,
    prompts: Int[Tensor, "prompt pos"],
    variants: Sequence[Variant],
    read: Read,
    *,
    columns: Int[Tensor, " column"] | None = None,
    base_edits: Sequence[Sequence[Edit]] = (),
    reference: bool = False,
    batch_size: int | None = None,
    progress: bool | None = None,
    description: str = "patching",
) -> Float[Tensor, "variant ..."]:
    """What `read` makes of the logits at the last position of each variant.

    Costs, for each variant, the layers from its first edit on, at the positions from its first edit on; a variant
    whose edits change nothing costs nothing. Holds the base run of about a thousand
    tokens, and up to 400 MB of rows (on a GPU half of what is free).

    Args:
        model: the model. Families whose attention is outside transformers' interface are run the reference way.
        prompts: token ids of the base prompts.
        variants: the runs.
        read: from last-position logits [row, column] and the prompt index of each row to the values kept, [row, ...].
        columns: token ids whose logits `read` gets, in this order; None: the whole vocabulary.
        base_edits: by prompt, edits that its base run carries, and so each of its variants before its own.
        reference: run every variant as a whole forward pass with plain hooks: slow, and what the engine is held
            against.
        batch_size: variants (and base prompts) at once; by default what memory allows.
        progress: show a progress bar; None: in a terminal or notebook only.
        description: what the bar says.

    Returns:
        The values of each variant in the order given, float32 (float64 if `read` gives it).

    Raises:
        FloatingPointError: if a value is NaN or infinite, naming the edits of the first such variant.
        MemoryError: if a single variant does not fit.
    """
    length = prompts.shape[1]
    edits = [site_edits(model, variant.edits, length) for variant in variants]
    base = [site_edits(model, one, length) for one in base_edits]
    by_reference = reference or bool(why_reference(model, _sites_of([*edits, *base])))
    packed = [index for index, one in enumerate(edits) if not (by_reference or _needs_all_rows_at_the_end(one))]
    others = sorted(set(range(len(variants))).difference(packed))
    values = _Values(len(variants))

    def keep(group: _Group, index: Sequence[int], prompt: Sequence[int], logits: Tensor) -> None:
        found = read(logits, torch.tensor(prompt, device=logits.device) + group.first_prompt)
        check_values(found, [variants[one] for one in index])
        values.put(index, found)

    def consume(group: _Group, entries: Sequence[Entry], on_runs: OnRuns) -> None:
        with group.packed.installed():
            resid = group.packed.resid_final(entries, group.in_runs(entries, model.n_layers, on_runs))
            for some, logits in group.packed.logits(entries, resid, columns):
                keep(group, [one.index for one in entries[some]], [one.prompt for one in entries[some]], logits)

    with progress_bar(len(packed), description, "run", progress=progress) as bar:
        for group in _groups(
            model, prompts, variants, edits, packed, base_edits, _sites_of([*edits, *base]), batch_size
        ):
            if group.unchanged:
                index, prompt = zip(*group.unchanged, strict=True)
                logits = group.packed.base.logits[list(prompt)]
                keep(group, index, prompt, logits if columns is None else logits[:, columns.to(logits.device)])
                bar.update(len(index))
            group.in_chunks(consume, bar.update)
    if others:
        found = run_variants(
            model,
            prompts,
            [variants[index] for index in others],
            read,
            columns=columns,
            base_edits=base_edits,
            batch_size=batch_size,
            progress=progress,
            description=description,
        )
        values.put(others, found)
    return values.tensor()


@torch.no_grad()
def sweep_activations(
    model: Model,
    prompts: Int[Tensor, "prompt pos"],
    variants: Sequence[Variant],
    site: Site,
    *,
    base_edits: Sequence[Sequence[Edit]] = (),
    batch_size: int | None = None,
) -> Float[Tensor, "variant pos ..."]:
    """The activation of a site in each variant; layers after it are not computed.

    Args:
        model: a model that the engine serves.
        prompts: token ids of the base prompts.
        variants: the runs.
        site: a site of a block with a position axis.
        base_edits: by prompt, edits that its base run carries.
        batch_size: variants (and base prompts) at once; by default what memory allows.

    Raises:
        NotImplementedError: for a model that only the reference way serves, or another site.
    """
    length = prompts.shape[1]
    edits = [site_edits(model, variant.edits, length) for variant in variants]
    base = [site_edits(model, one, length) for one in base_edits]
    reason, layer = why_reference(model, [*_sites_of([*edits, *base]), site]), site.layer
    if reason or layer is None or "position" not in SITE_DIMS[site.kind]:
        raise NotImplementedError(f"{site}: {reason or 'only sites of a block with a position axis can be read'}")
    values = _Values(len(variants))

    def consume(group: _Group, entries: Sequence[Entry], on_runs: OnRuns) -> None:
        prompts_of = [entry.prompt for entry in entries]
        found = group.packed.base.activations[site][prompts_of].clone()
        inside = [place for place, entry in enumerate(entries) if entry.layer <= layer]
        if inside:
            found[inside] = group.packed.activations([entries[place] for place in inside], site, found[inside])
        values.put([entry.index for entry in entries], found)

    sites = list(dict.fromkeys([*_sites_of([*edits, *base]), site]))
    for group in _groups(model, prompts, variants, edits, range(len(variants)), base_edits, sites, batch_size):
        if group.unchanged:
            index, prompt = zip(*group.unchanged, strict=True)
            values.put(index, group.packed.base.activations[site][list(prompt)])
        group.in_chunks(consume, lambda n_runs: None)
    return values.tensor()


def _sites_of(edits: Sequence[Sequence[SiteEdit]]) -> list[Site]:
    return list(dict.fromkeys(one.site for several in edits for one in several))


def _needs_all_rows_at_the_end(edits: Sequence[SiteEdit]) -> bool:
    """Whether an edit of the final norm looks at all positions: the pass has only the last one there."""
    return any(edit.site.kind == "ln_final" and edit.sees_all_positions for edit in edits)


class _Values:
    """Values by variant, in any order of arrival."""

    def __init__(self, n_variants: int) -> None:
        self._n_variants = n_variants
        self._tensor: Tensor | None = None

    def put(self, index: Sequence[int], values: Tensor) -> None:
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        if self._tensor is None:
            self._tensor = values.new_empty(self._n_variants, *values.shape[1:])
        self._tensor[list(index)] = values

    def tensor(self) -> Tensor:
        return torch.empty(self._n_variants) if self._tensor is None else self._tensor


@dataclass(frozen=True)
class _Group:
    """Some base prompts with their base run, and the variants of them."""

    packed: PackedPass
    first_prompt: int
    length: int
    entries: tuple[Entry, ...]
    """Variants that change something, those of one prompt and start together."""
    unchanged: tuple[tuple[int, int], ...]
    """Index and prompt (within the group) of the others."""
    max_rows: int
    max_variants: int

    def in_chunks(self, consume: Consume, on_runs: OnRuns) -> None:
        """Hand the variants on in chunks that fit into memory.

        Raises:
            MemoryError: if a single variant does not fit.
        """
        done, max_rows = 0, self.max_rows
        while done < len(self.entries):
            chunk = self._chunk(done, max_rows)
            try:
                consume(self, chunk, on_runs)
            except torch.OutOfMemoryError as error:
                rows = sum(self.length - entry.start for entry in chunk)
                if len(chunk) == 1:
                    raise MemoryError(f"one variant of {rows} tokens does not fit into memory: {error}") from error
                max_rows = rows // 2
                self.packed.rows_a_block = max(1, min(self.packed.rows_a_block, max_rows))
                logger.warning("out of memory with %d rows at once: going on with %d", rows, max_rows)
                continue
            done += len(chunk)

    def _chunk(self, begin: int, max_rows: int) -> Sequence[Entry]:
        rows, end = 0, begin
        while end < len(self.entries) and end - begin < self.max_variants:
            rows += self.length - self.entries[end].start
            if rows > max_rows and end > begin:
                break
            end += 1
        return self.entries[begin:end]

    def in_runs(self, entries: Sequence[Entry], n_layers: int, on_runs: OnRuns) -> Callable[[int], None]:
        """A counter of rows that have passed a layer, told on as whole variants."""
        total = sum(
            (n_layers - entry.joins) * (self.length - entry.start) + len(entry.local or ()) for entry in entries
        )
        passed = told = 0

        def on_rows(n_rows: int) -> None:
            nonlocal passed, told
            passed += n_rows
            runs = len(entries) * passed // total
            on_runs(runs - told)
            told = runs

        if not total:
            on_runs(len(entries))
        return on_rows


def _groups(
    model: Model,
    prompts: Int[Tensor, "prompt pos"],
    variants: Sequence[Variant],
    edits: Sequence[tuple[SiteEdit, ...]],
    chosen: Sequence[int],
    base_edits: Sequence[Sequence[Edit]],
    sites: Sequence[Site],
    batch_size: int | None,
) -> Iterator[_Group]:
    """Base runs of some prompts at a time, with the chosen variants of these prompts.

    The prompts are cut as every other run over a task cuts them (`batches`): equal shapes give equal bits, so that an
    activation taken from another run of the same tokens is seen to change nothing.
    """
    length = prompts.shape[1]
    by_prompt: dict[int, list[int]] = {}
    for index in chosen:
        by_prompt.setdefault(variants[index].prompt, []).append(index)
    max_rows = max(1, _budget(model) // (4 * model.d_model * model.dtype.itemsize))
    rows_a_block = ROWS_A_BLOCK.get(model.device.type, ROWS_A_BLOCK["cuda"])
    for which in batches(len(prompts), length, batch_size):
        here = range(*which.indices(len(prompts)))
        if not any(prompt in by_prompt for prompt in here):
            continue
        carried = [base_edits[prompt] if base_edits else () for prompt in here]
        taps = row_taps(model, [Variant(place, tuple(one)) for place, one in enumerate(carried)])
        base = run_base(model, prompts[which], sites, taps)
        resolved = [site_edits(model, one, length) for one in carried]
        packed = PackedPass(model, base, resolved if base_edits else (), sites, rows_a_block)
        indices = [index for prompt in here for index in by_prompt.get(prompt, ())]
        entries, unchanged = _entries(packed, variants, edits, indices, here.start)
        yield _Group(packed, here.start, length, entries, unchanged, max_rows, batch_size or len(variants))


def _entries(
    packed: PackedPass,
    variants: Sequence[Variant],
    edits: Sequence[tuple[SiteEdit, ...]],
    indices: Sequence[int],
    first_prompt: int,
) -> tuple[tuple[Entry, ...], tuple[tuple[int, int], ...]]:
    """Where the variants leave their base runs, and those that never do."""
    differences = BaseDifferences(packed.base.activations)
    entries: list[Entry] = []
    unchanged: list[tuple[int, int]] = []
    for index in indices:
        variant = replace(variants[index], prompt=variants[index].prompt - first_prompt)
        inherited = packed.base_edits[variant.prompt] if packed.base_edits else ()
        whole = not packed.base.causal or any(edit.sees_all_positions for edit in inherited)
        entry = entry_of(variant, index, edits[index], differences, whole=whole)
        if entry is None:
            unchanged.append((index, variant.prompt))
        else:
            entries.append(entry)
    entries.sort(key=lambda entry: (entry.prompt, entry.start, entry.layer))
    return tuple(entries), tuple(unchanged)


def _budget(model: Model) -> int:
    if model.device.type != "cuda":
        return CPU_BYTES
    free, _ = torch.cuda.mem_get_info(model.device)
    return free // 2
