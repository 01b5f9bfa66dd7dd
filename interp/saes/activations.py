"""Activations to train on: read off one forward pass for all sites, mixed in a buffer, served as shuffled batches."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Protocol, runtime_checkable

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.model import Model, Site
from interp.model.hooks import Run, Tap, tapped
from interp.saes.distributed import exchange_rows, rank_and_size
from interp.saes.randomness import generator
from interp.saes.sae import to_rows
from interp.saes.text import Chunk, Text

Rows = dict[Site, Tensor]
"""By site, [row, d]; the same row is the same token at every site."""

LeftOut = (
    xr.DataArray
    | Bool[Tensor, "text_sequence pos"]
    | Callable[[Int[Tensor, "sequence pos"]], xr.DataArray | Bool[Tensor, "sequence pos"]]
)
"""Tokens to leave out (True), as `interp.sinks.mask` gives them: for the whole text, or a function of its tokens."""


@runtime_checkable
class Batches(Protocol):
    """Where training takes its batches from."""

    def widths(self) -> dict[Site, int]:
        """Numbers a row of each site; costs little."""

    def next_batch(self) -> Rows | None:
        """This process's share of the next batch; None when the text has ended."""

    def sample(self, n: int, seed: int) -> Rows:
        """Up to so many rows at random, without moving on."""

    def state(self) -> dict[str, Tensor]:
        """All that `restore` needs to go on from here exactly."""

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from a state."""


class _Stop(Exception):
    """All sites have been seen: the rest of the forward pass is not needed."""


@torch.no_grad()
def gather(
    model: Model, tokens: Int[Tensor, "sequence pos"], sites: Sequence[Site]
) -> dict[Site, Float[Tensor, "sequence pos d"]]:
    """Activations of the sites, heads concatenated, from one forward pass that ends at the last of them.

    Padding has to stand on the right: nothing in a causal model sees it there.

    Raises:
        FloatingPointError: naming the first site with a NaN or an infinity.
    """
    seen: dict[Site, Tensor] = {}
    # Weights that are brought in for one module's call are sent back at its end, which an early stop would not reach.
    stops = not any(hasattr(module, "_hf_hook") for module in model.hf.modules())

    def keep(site: Site) -> Callable[[Tensor, Run], None]:
        def tap(activation: Tensor, run: Run) -> None:
            seen[site] = to_rows(site, activation)
            if stops and len(seen) == len(sites):
                raise _Stop

        return tap

    try:
        with tapped(model.anatomy, [Tap(site, keep(site)) for site in sites]):
            model(tokens, logits_to_keep=1)
    except _Stop:
        pass
    for site, values in seen.items():
        if not bool(torch.isfinite(values).all()):
            raise FloatingPointError(f"{site} is NaN or infinite: check the model's weights and dtype")
    return seen


Keep = Callable[[Chunk], Bool[Tensor, "sequence pos"]]
"""Which tokens of a chunk are trained on."""


def keeper(
    text: Text, sites: Sequence[Site], *, mask: LeftOut | None, skip_tokens: Sequence[int], positions: slice
) -> Keep:
    """Which tokens are trained on: not left out by mask, by id (BOS, padding) or by position.

    A mask [layer, prompt, position] leaves out what is marked in the layer of any of the sites.

    Raises:
        ValueError: before anything is read, if the mask does not fit the text or no position is left; a function's
            mask is looked at when it comes.
    """
    if not range(text.length)[positions]:
        raise ValueError(f"{positions} names no position; positions run 0..{text.length - 1}")
    if mask is not None and not callable(mask):
        if text.n_sequences is None:
            what = "a mask of all tokens needs text given as token ids"
            raise ValueError(f"{what}; give a function of the tokens instead")
        mask = _marked(mask, sites)
        _check_size(mask, text.n_sequences, text.length)
    skipped = torch.tensor(list(skip_tokens), dtype=torch.long)
    return partial(_kept, sites=sites, mask=mask, skipped=skipped, positions=positions)


def _kept(
    chunk: Chunk,
    sites: Sequence[Site],
    mask: Bool[Tensor, "text_sequence pos"] | Callable[[Tensor], xr.DataArray | Tensor] | None,
    skipped: Int[Tensor, " id"],
    positions: slice,
) -> Bool[Tensor, "sequence pos"]:
    at_position = torch.zeros(chunk.tokens.shape[1], dtype=torch.bool)
    at_position[positions] = True
    kept = at_position & ~torch.isin(chunk.tokens.long(), skipped)
    if mask is None:
        return kept
    left_out = mask[chunk.rows] if isinstance(mask, Tensor) else _marked(mask(chunk.tokens), sites)
    _check_size(left_out, *kept.shape)
    return kept & ~left_out


def _marked(mask: xr.DataArray | Tensor, sites: Sequence[Site]) -> Bool[Tensor, "sequence pos"]:
    if isinstance(mask, Tensor):
        return mask.cpu().bool()
    if "layer" in mask.dims:
        layers = sorted({site.layer for site in sites if site.layer is not None})
        known = mask.get_index("layer").tolist()
        missing = [layer for layer in layers if layer not in known]
        if missing or not layers:
            what = f"layer {missing[0]}" if missing else f"layer for {sites[0]}"
            raise ValueError(f"the mask has no {what}; it has {known}: make it for the sites' layers")
        mask = mask.sel(layer=layers).any("layer")
    return torch.from_numpy(np.asarray(mask.transpose("prompt", "position").values)).bool()


def _check_size(mask: Tensor, n_sequences: int, length: int) -> None:
    if mask.shape != (n_sequences, length):
        raise ValueError(f"the mask marks {tuple(mask.shape)} tokens; the text has {(n_sequences, length)} here")


def digest_of_mask(mask: LeftOut | None) -> str | None:
    """What a checkpoint remembers of a mask; functions are all alike to it."""
    if mask is None or callable(mask):
        return None if mask is None else "function"
    values = mask.cpu() if isinstance(mask, Tensor) else mask
    return hashlib.sha256(np.ascontiguousarray(values, dtype=bool).tobytes()).hexdigest()[:16]


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def digest_of_model(model: Model) -> str:
    """Tells models apart by all their weights: the first of each as they are, the sum of the bits of the others.

    Reads every weight once, where it is; of one that is not in memory, name and shape only.
    """
    digest = hashlib.sha256()
    for name, parameter in model.hf.named_parameters():
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        if not parameter.is_meta:
            bits = parameter.detach().reshape(-1).view(_BITS[parameter.element_size()])
            digest.update(bits[:64].cpu().numpy().tobytes() + str(int(bits.sum(dtype=torch.int64))).encode())
    return digest.hexdigest()[:16]


class Buffer:
    """Activations of a text, mixed: filled to its capacity, served in random order down to half, and filled again.

    Nothing is moved when it is mixed: new rows take the places of those served, and the order is drawn anew. With
    several processes every one holds the same rows, each having computed its share of the chunks.

    Args:
        model: the model.
        text: what it reads.
        sites: what is kept of it.
        keep: which tokens of a chunk.
        capacity: rows held; twice the batch and four chunks at least.
        batch_size: rows a batch, of all processes together.
        seed: of the mixing.
        device: where the rows are held.

    Raises:
        ValueError: if the capacity is too small.
    """

    def __init__(
        self,
        model: Model,
        text: Text,
        sites: Sequence[Site],
        *,
        keep: Keep,
        capacity: int,
        batch_size: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self._most = text.chunk_size * text.length
        least = max(2 * batch_size, 4 * self._most)
        if capacity < least:
            raise ValueError(
                f"the buffer holds {capacity} tokens; it needs {least} for batches of {batch_size} and forward passes "
                f"of {self._most} tokens"
            )
        self._model, self._text, self._sites, self._keep = model, text, list(sites), keep
        self._capacity, self._batch_size, self._seed = capacity, batch_size, seed
        self._device = device
        self._store: Rows = {}
        self._order = torch.empty(0, dtype=torch.long)
        self._free = torch.arange(capacity)
        self._served = self._n_chunks = self._n_refills = 0
        self._chunks: Iterator[Chunk] | None = None
        self._ended = False

    def widths(self) -> dict[Site, int]:
        """Numbers a row of each site, from a forward pass of one token."""
        found = gather(self._model, torch.zeros(1, 1, dtype=torch.long), self._sites)
        return {site: values.shape[-1] for site, values in found.items()}

    def next_batch(self) -> Rows | None:
        """This process's share of the next batch; None when the text has ended."""
        # Of chunks of which little is kept, one filling is not enough.
        while not self._ended and self._n_left < max(self._capacity // 2, self._batch_size):
            self._refill()
        if self._n_left < self._batch_size:
            return None
        rank, size = rank_and_size()
        batch = self._order[self._served : self._served + self._batch_size].chunk(size)[rank]
        self._served += self._batch_size
        return self._take(batch)

    def sample(self, n: int, seed: int) -> Rows:
        """Up to so many of the rows that are still to be served, at random."""
        if not len(self._order) and not self._ended:
            self._refill()
        left = self._order[self._served :]
        return self._take(left[torch.randperm(len(left), generator=generator(seed, "sample"))[:n]])

    def state(self) -> dict[str, Tensor]:
        """The rows still to be served, in their order, and how far the text has been read."""
        left = self._order[self._served :]
        rows = {str(site): store[left.to(store.device)] for site, store in self._store.items()}
        return {**rows, "counts": torch.tensor([self._n_chunks, self._n_refills, int(self._ended)])}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from a state; which place a row is held in may differ, the order in which rows are served does not."""
        self._n_chunks, self._n_refills, ended = state["counts"].tolist()
        self._ended, self._served, self._chunks = bool(ended), 0, None
        n_rows = 0
        for site in self._sites:
            rows = state[str(site)]
            n_rows = len(rows)
            self._place(site, torch.arange(n_rows), rows)
        self._order, self._free = torch.arange(n_rows), torch.arange(n_rows, self._capacity)

    @property
    def _n_left(self) -> int:
        return len(self._order) - self._served

    def _take(self, slots: Int[Tensor, " row"]) -> Rows:
        return {site: store[slots.to(store.device)] for site, store in self._store.items()}

    def _place(self, site: Site, slots: Int[Tensor, " row"], rows: Float[Tensor, "row d"]) -> None:
        if site not in self._store:
            self._store[site] = torch.empty(self._capacity, rows.shape[1], device=self._device)
        self._store[site][slots.to(self._device)] = rows.to(self._device, torch.float32)

    def _refill(self) -> None:
        """Read as many chunks as are sure to fit, whatever the number of processes, and draw the order anew."""
        if self._chunks is None:
            self._chunks = self._text.chunks_from(self._n_chunks)
        self._free = torch.cat([self._order[: self._served], self._free])
        left = self._order[self._served :]
        wanted = len(self._free) // self._most
        chunks = list(itertools.islice(self._chunks, wanted))
        self._ended = len(chunks) < wanted
        added = [self._add(rows) for rows in self._rows_of(chunks)]
        self._n_chunks += len(chunks)
        if chunks and not sum(map(len, added)):
            raise ValueError("every token of the text is left out: check mask, skip_tokens and positions")
        order = torch.cat([left, *added])
        self._order = order[torch.randperm(len(order), generator=generator(self._seed, "mix", self._n_refills))]
        self._served, self._n_refills = 0, self._n_refills + 1

    def _add(self, rows: Rows) -> Int[Tensor, " row"]:
        n_rows = len(next(iter(rows.values())))
        slots, self._free = self._free[:n_rows], self._free[n_rows:]
        for site, values in rows.items():
            self._place(site, slots, values)
        return slots

    def _rows_of(self, chunks: Sequence[Chunk]) -> Iterator[Rows]:
        """Rows of the chunks in order; with several processes each computes every so-manieth chunk."""
        rank, size = rank_and_size()
        for first in range(0, len(chunks), size):
            mine = first + rank
            # Where chunks run out for some processes, they run one again and hand over nothing of it.
            chunk = chunks[min(mine, len(chunks) - 1)]
            own = rows_of(self._model, chunk.tokens, self._sites, self._keep(chunk))
            n_own = None if mine < len(chunks) else 0
            parts = {site: exchange_rows(values[:n_own], self._most) for site, values in own.items()}
            for part in range(min(size, len(chunks) - first)):
                yield {site: values[part] for site, values in parts.items()}


def rows_of(
    model: Model, tokens: Int[Tensor, "sequence pos"], sites: Sequence[Site], kept: Bool[Tensor, "sequence pos"]
) -> Rows:
    """Rows of the tokens that are kept, in reading order."""
    return {site: values[kept.to(values.device)] for site, values in gather(model, tokens, sites).items()}
