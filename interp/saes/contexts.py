"""Where in a text a feature is active: its strongest contexts, samples over its whole range, and how often it fires.

The text is read once, batch by batch, and only the contexts that are kept are held:

* the strongest ones in a heap for each feature;
* the samples by random keys: of everything in a bin the entries with the smallest keys stay, which is a uniform sample
  whatever the order and size of batches;
* bins divide the range from 0 to a power of two. When a feature exceeds its range, the range doubles and neighbouring
  bins are merged, which is exact for counts and for such samples.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from interp.model import Model
from interp.model.edit import resolve_columns
from interp.patching.batching import batches
from interp.patching.labels import model_provenance
from interp.patching.progress import progress_bar
from interp.saes.activations import gather
from interp.saes.attribution import token_strings
from interp.saes.sae import SAE
from interp.saes.splice import sites_of

N_BINS = 64
MAX_INTERVALS = N_BINS // 2
"""The maximum lies in the upper half of the range, so that at least this many bins are in use."""


@torch.no_grad()
def feature_contexts(
    model: Model,
    sae: SAE,
    tokens: Int[Tensor, "sequence pos"] | Iterable[Int[Tensor, "sequence pos"]],
    features: int | Sequence[int],
    *,
    n_top: int = 20,
    n_intervals: int = 4,
    per_interval: int = 5,
    window: tuple[int, int] = (10, 5),
    exclude: Sequence[int] = (),
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> xr.Dataset:
    """Contexts in which features are active, the strongest ones and samples by strength, with their token strings.

    A sequence stands for its strongest position, so that no sequence is listed twice in a group; of the same passage in
    several sequences the strongest contexts list the strongest one only. Costs one forward pass a sequence, up to the
    SAE's site; holds batch x pos x d_sae numbers and the windows that are kept.

    Args:
        model: the model.
        sae: the SAE, at any site.
        tokens: sequences of token ids, or an iterable of such blocks, read once.
        features: one feature or several.
        n_top: strongest contexts, one a sequence, no two with the same tokens.
        n_intervals: equal parts of the range from 0 to the feature's maximum (to a bin's width), up to 32; 0 for none.
        per_interval: contexts drawn from each part; a part with fewer gives what it has.
        window: tokens shown before and after the strongest position.
        exclude: positions that do not count, such as a BOS at [0].
        seed: of the draw.
        batch_size: sequences a forward pass; by default about a thousand tokens' worth.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        Dataset over `feature`, `context` (coordinate `group`: "top", "interval 1", ... from the weakest part up),
        `offset` from the strongest position, and `bin`:

        * `activation`, `token_id`, `token` [feature, context, offset]: NaN, -1 and "" beyond the sequence and where
          there are too few contexts;
        * `sequence`, `position` (-1 if none) and `peak` [feature, context];
        * `histogram` [feature, bin] of positive activations over tokens, with upper edges `bin_edge`;
        * `interval_edge` [feature, interval], their upper edges;
        * `n_active`, `density`, `max` [feature]: tokens at which the feature is on, their share, its maximum (NaN if it
          never is).

    Raises:
        ValueError: if a feature or position is out of range, or a count is negative.
        FloatingPointError: if the model's activations are NaN or infinite.
    """
    started = time.perf_counter()
    site, _ = sites_of(model, sae)
    chosen = resolve_columns(features, sae.d_sae, "feature")
    if n_top < 0 or per_interval < 0 or min(window) < 0 or not 0 <= n_intervals <= MAX_INTERVALS:
        raise ValueError(
            f"n_top={n_top}, per_interval={per_interval}, window={window} must be 0 or more, and "
            f"n_intervals={n_intervals} 0..{MAX_INTERVALS}"
        )
    reading = _Reading(len(chosen), n_top, per_interval if n_intervals else 0, window, np.random.default_rng(seed))
    total = len(tokens) if isinstance(tokens, Tensor) else 0
    with progress_bar(total, "reading contexts", "sequence", progress=progress) as bar:
        for ids in _blocks(tokens, batch_size):
            found = sae.encode(gather(model, ids, [site])[site].to(sae.dtype))[..., chosen].float().cpu()
            excluded = sorted(set(resolve_columns(exclude, ids.shape[1], "position")))
            found[:, excluded] = 0
            reading.add(ids.cpu().numpy(), found.numpy(), ids.numel() - len(excluded) * len(ids))
            bar.update(len(ids))
    if not reading.n_sequences:
        raise ValueError("there are no sequences to read: tokens is empty")
    attrs = {
        **model_provenance(model),
        "method": "feature_contexts",
        "site": str(sae.site),
        "n_sequences": reading.n_sequences,
        "n_tokens": reading.n_tokens,
        "exclude": list(exclude),
        "seed": seed,
    }
    result = _labelled(model, reading, chosen, n_intervals, attrs)
    return result.assign_attrs(seconds=time.perf_counter() - started)


class _Context(NamedTuple):
    """One window; compares by its first field, then by where it stands."""

    key: float
    sequence: int
    position: int
    peak: float
    ids: np.ndarray
    activations: np.ndarray


@dataclass
class _Reading:
    """What is kept of the text read so far."""

    n_features: int
    n_top: int
    per_bin: int
    window: tuple[int, int]
    random: np.random.Generator
    n_sequences: int = 0
    n_tokens: int = 0
    counts: Int[np.ndarray, "feature bin"] = field(init=False)
    high: Float[np.ndarray, " feature"] = field(init=False)
    """Upper end of the range, a power of two; 0 while the feature has not been on."""
    highest: Float[np.ndarray, " feature"] = field(init=False)
    tops: list[list[_Context]] = field(init=False)
    """By feature, a heap of the strongest."""
    samples: list[list[list[_Context]]] = field(init=False)
    """By feature and bin, a heap that holds the smallest random keys, negated."""

    def __post_init__(self) -> None:
        self.counts = np.zeros((self.n_features, N_BINS), dtype=np.int64)
        self.high, self.highest = np.zeros((2, self.n_features))
        self.tops = [[] for _ in range(self.n_features)]
        self.samples = [[[] for _ in range(N_BINS)] for _ in range(self.n_features)]

    def add(
        self, ids: Int[np.ndarray, "batch pos"], activations: Float[np.ndarray, "batch pos feature"], n_tokens: int
    ) -> None:
        """Read one batch."""
        keys = self.random.random((len(ids), self.n_features))
        for index in range(self.n_features):
            mine = activations[..., index]
            positive = mine[mine > 0].astype(np.float64)
            if not len(positive):
                continue
            self.highest[index] = max(positive.max(), self.highest[index])
            self._widen(index, float(positive.max()))
            self.counts[index] += np.bincount(self._bins(index, positive), minlength=N_BINS)
            best, peaks = mine.argmax(1), mine.max(1).astype(np.float64)
            places = self._bins(index, peaks)
            for row in np.flatnonzero(peaks > 0).tolist():
                sample, draw = self.samples[index][places[row]], -float(keys[row, index])
                if _enters(sample, self.per_bin, draw):
                    _push(sample, self.per_bin, self._context(draw, row, int(best[row]), ids[row], mine[row]))
                if _enters(self.tops[index], self.n_top, peaks[row]):
                    entry = self._context(float(peaks[row]), row, int(best[row]), ids[row], mine[row])
                    self._list(self.tops[index], entry)
        self.n_sequences += len(ids)
        self.n_tokens += n_tokens

    def _list(self, strongest: list[_Context], entry: _Context) -> None:
        """Into the strongest, in place of the same passage if that is there."""
        before = min(entry.position, self.window[0])
        for slot, one in enumerate(strongest):
            if min(one.position, self.window[0]) == before and np.array_equal(one.ids, entry.ids):
                if entry.key > one.key:
                    strongest[slot] = entry
                    heapq.heapify(strongest)
                return
        _push(strongest, self.n_top, entry)

    def _bins(self, index: int, values: np.ndarray) -> np.ndarray:
        """Bins are open below and closed above, which doubling the range leaves true; division by 2^n is exact."""
        return np.ceil(values / self.high[index] * N_BINS).astype(np.int64) - 1

    def _widen(self, index: int, value: float) -> None:
        if self.high[index] == 0:
            self.high[index] = 2.0 ** np.ceil(np.log2(value))
        while value > self.high[index]:
            self.high[index] *= 2
            pairs = self.counts[index].reshape(-1, 2).sum(1)
            self.counts[index] = np.concatenate([pairs, np.zeros_like(pairs)])
            old = self.samples[index]
            merged = [heapq.nlargest(self.per_bin, old[at] + old[at + 1]) for at in range(0, N_BINS, 2)]
            for one in merged:
                heapq.heapify(one)
            self.samples[index] = merged + [[] for _ in merged]

    def _context(self, key: float, row: int, at: int, ids: np.ndarray, activations: np.ndarray) -> _Context:
        shown = slice(max(0, at - self.window[0]), at + self.window[1] + 1)
        peak = float(activations[at])
        # Counted downwards, so that of equal keys the sequence read first is the larger and stays.
        return _Context(key, -(self.n_sequences + row), at, peak, ids[shown].copy(), activations[shown].copy())

    def intervals(self, index: int, n_intervals: int) -> Iterator[tuple[float, list[_Context]]]:
        """(upper edge, the sample) of each part of a feature's range, weakest first."""
        used = int(self.counts[index].nonzero()[0].max(initial=-1)) + 1
        for part in np.array_split(np.arange(used), n_intervals):
            edge = self.high[index] * (part[-1] + 1) / N_BINS if len(part) else np.nan
            yield edge, heapq.nlargest(self.per_bin, [one for at in part for one in self.samples[index][at]])


def _enters(heap: list[_Context], size: int, key: float) -> bool:
    """Whether a key is among the largest so many; of equal ones those that were there stay."""
    return len(heap) < size or (size > 0 and bool(key > heap[0].key))


def _push(heap: list[_Context], size: int, entry: _Context) -> None:
    (heapq.heappush if len(heap) < size else heapq.heapreplace)(heap, entry)


def _blocks(
    tokens: Int[Tensor, "sequence pos"] | Iterable[Int[Tensor, "sequence pos"]], batch_size: int | None
) -> Iterator[Int[Tensor, "sequence pos"]]:
    for block in [tokens] if isinstance(tokens, Tensor) else tokens:
        if block.dim() != 2 or block.is_floating_point():
            raise ValueError(f"tokens are ids [sequence, pos]; got {block.dtype} of shape {list(block.shape)}")
        for rows in batches(len(block), block.shape[1], batch_size):
            yield block[rows]


def _labelled(
    model: Model, reading: _Reading, features: Sequence[int], n_intervals: int, attrs: dict[str, Any]
) -> xr.Dataset:
    before, after = reading.window
    groups = ["top"] * reading.n_top
    groups += [f"interval {part + 1}" for part in range(n_intervals) for _ in range(reading.per_bin)]
    shape = (len(features), len(groups))
    ids = np.full((*shape, before + 1 + after), -1)
    activations = np.full(ids.shape, np.nan, dtype=np.float32)
    where = np.full((2, *shape), -1)
    peaks = np.full(shape, np.nan, dtype=np.float32)
    edges = np.full((len(features), n_intervals), np.nan)
    for index in range(len(features)):
        parts = list(reading.intervals(index, n_intervals)) if n_intervals else []
        edges[index] = [edge for edge, _ in parts]
        listed = [(0, reading.n_top, reading.tops[index])]
        listed += [
            (reading.n_top + part * reading.per_bin, reading.per_bin, sample) for part, (_, sample) in enumerate(parts)
        ]
        for first, size, contexts in listed:
            strongest = sorted(contexts, key=lambda one: (-one.peak, -one.sequence))[:size]
            for slot, one in enumerate(strongest, start=first):
                start = before - min(one.position, before)
                ids[index, slot, start : start + len(one.ids)] = one.ids
                activations[index, slot, start : start + len(one.ids)] = one.activations
                where[:, index, slot] = -one.sequence, one.position
                peaks[index, slot] = one.peak
    n_active = reading.counts.sum(1)
    axes = ("feature", "context")
    return xr.Dataset(
        {
            "activation": ((*axes, "offset"), activations),
            "token_id": ((*axes, "offset"), ids),
            "token": ((*axes, "offset"), _strings(model, ids)),
            "sequence": (axes, where[0]),
            "position": (axes, where[1]),
            "peak": (axes, peaks),
            "histogram": (("feature", "bin"), reading.counts),
            "bin_edge": (("feature", "bin"), reading.high[:, None] * np.arange(1, N_BINS + 1) / N_BINS),
            "interval_edge": (("feature", "interval"), edges),
            "n_active": ("feature", n_active),
            "density": ("feature", n_active / reading.n_tokens),
            "max": ("feature", np.where(reading.highest > 0, reading.highest, np.nan)),
        },
        coords={
            "feature": list(features),
            "context": range(len(groups)),
            "group": ("context", np.array(groups, dtype=object)),
            "offset": range(-before, after + 1),
            "interval": [f"interval {part + 1}" for part in range(n_intervals)],
        },
        attrs=attrs,
    )


def _strings(model: Model, ids: Int[np.ndarray, "feature context offset"]) -> np.ndarray:
    """The text of every token; "" where there is none."""
    distinct = np.unique(ids[ids >= 0])
    text = dict(zip(distinct.tolist(), token_strings(model, torch.from_numpy(distinct)), strict=True))
    return np.array([text.get(one, "") for one in ids.ravel().tolist()], dtype=object).reshape(ids.shape)
