"""Attention of many suffixes over shared prefixes, without padding: what a sweep of counterfactual runs needs.

A variant is a run that differs from a base prompt from position `start` on. Its rows of a packed matrix are its
suffix; they attend to the base prompt's keys before `start`, which all variants of that prompt share, and to the keys
of the suffix itself. `suffix_attention` runs the Triton kernel on CUDA and `suffix_attention_reference`, its twin in
plain PyTorch, elsewhere:

1. consecutive variants with the same prompt, start and length form a group;
2. the queries of a group, stacked over variants, positions and the query heads of a key/value head, meet the shared
   prefix in one matrix product a key/value head, and their own keys in one batched product;
3. one softmax over both, one mask [position, key] a group, and two products with the values.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

SCORE_BYTES = 16 * 2**20
"""Scores of the twin that are held at once: small enough to stay near the processor, large enough for long products."""
KEPT_MASK_BYTES = 2**20
"""Masks of the twin up to this size are made once a layout; making a larger one costs little beside its scores."""


@dataclass(frozen=True)
class SuffixGroup:
    """Consecutive variants with the same prompt, start and length."""

    prompt: int
    start: int
    length: int
    n_variants: int
    first_row: int

    @property
    def rows(self) -> slice:
        """The group's rows of the packed matrix."""
        return slice(self.first_row, self.first_row + self.n_variants * self.length)


@dataclass(frozen=True)
class SuffixLayout:
    """Which rows of a packed matrix belong to which variant.

    Variant i owns `length[i]` consecutive rows, which are positions `start[i]`, `start[i] + 1`, ... of `prompt[i]`.
    Variants of one (prompt, start, length) that follow each other are computed together, so sort by these.

    Raises:
        ValueError: if the tuples differ in length, or an entry is negative, or a suffix is empty.
    """

    prompt: tuple[int, ...]
    start: tuple[int, ...]
    length: tuple[int, ...]

    def __post_init__(self) -> None:
        if not len(self.prompt) == len(self.start) == len(self.length):
            sizes = f"{len(self.prompt)} prompts, {len(self.start)} starts, {len(self.length)} lengths"
            raise ValueError(f"a layout has one prompt, start and length a variant; got {sizes}")
        if min(self.prompt, default=0) < 0 or min(self.start, default=0) < 0 or min(self.length, default=1) < 1:
            raise ValueError("prompts and starts are 0 or more and lengths 1 or more in a layout")

    @cached_property
    def first_row(self) -> tuple[int, ...]:
        """The first row of each variant."""
        return tuple(itertools.accumulate(self.length, initial=0))[:-1]

    @cached_property
    def n_rows(self) -> int:
        """Rows of all variants together."""
        return sum(self.length)

    @cached_property
    def groups(self) -> tuple[SuffixGroup, ...]:
        """Maximal runs of consecutive variants with equal (prompt, start, length), in order."""
        groups: list[SuffixGroup] = []
        row = 0
        for (prompt, start, length), run in itertools.groupby(zip(self.prompt, self.start, self.length, strict=True)):
            n_variants = sum(1 for _ in run)
            groups.append(SuffixGroup(prompt, start, length, n_variants, row))
            row += n_variants * length
        return tuple(groups)

    @cached_property
    def kept(self) -> dict[Hashable, Any]:
        """What is derived from the layout once and used for every layer: index tensors, masks, tiles."""
        return {}

    def variants(self, device: torch.device) -> Int[Tensor, "variant 4"]:
        """Prompt, start, length and first row of each variant."""
        return self._once("variants", device, self._make_variants)

    def row_variants(self, device: torch.device) -> Int[Tensor, " row"]:
        """The variant of each row."""
        return self._once("row_variants", device, self._make_row_variants)

    def positions(self, device: torch.device) -> Int[Tensor, " row"]:
        """The position in its prompt of each row."""
        return self._once("positions", device, self._make_positions)

    def _once(self, name: str, device: torch.device, make: Callable[[], Tensor]) -> Tensor:
        if (name, device) not in self.kept:
            self.kept[name, device] = make().to(device)
        return self.kept[name, device]

    def _make_variants(self) -> Tensor:
        columns = [self.prompt, self.start, self.length, self.first_row]
        return torch.tensor(columns, dtype=torch.int64).T.contiguous()

    def _make_row_variants(self) -> Tensor:
        return torch.arange(len(self.length)).repeat_interleave(torch.tensor(self.length, dtype=torch.int64))

    def _make_positions(self) -> Tensor:
        of_row = self._make_variants()[self._make_row_variants()]
        return torch.arange(self.n_rows) - of_row[:, 3] + of_row[:, 1]


def suffix_attention(
    query: Float[Tensor, "row head d_head"],
    key: Float[Tensor, "row kv_head d_head"],
    value: Float[Tensor, "row kv_head d_value"],
    prefix_key: Float[Tensor, "prompt pos kv_head d_head"],
    prefix_value: Float[Tensor, "prompt pos kv_head d_value"],
    layout: SuffixLayout,
    *,
    scale: float,
    causal: bool = True,
    softcap: float | None = None,
    window: int | None = None,
    sink_logits: Float[Tensor, " head"] | None = None,
) -> Float[Tensor, "row head d_value"]:
    """Attention output of packed suffix rows over their base prompt's prefix and their own suffix.

    A query at position i of a variant attends to the prefix keys of its prompt at positions before the variant's start
    and to the variant's own keys. Query head h reads key/value head `h // (head / kv_head)`. Half precision is computed
    in float32 and rounded at the end. No gradient.

    Args:
        query: rotated queries of the packed rows.
        key: rotated keys of the packed rows.
        value: values of the packed rows.
        prefix_key: rotated keys of the base prompts; positions from a variant's start on are not read for it.
        prefix_value: values of the base prompts.
        layout: which rows are which variant.
        scale: multiplies q·k.
        causal: only keys at positions up to the query's.
        softcap: scores become `tanh(score / softcap) * softcap`.
        window: only keys less than this many positions away.
        sink_logits: one more entry a head in every softmax, which takes mass and contributes no value.

    Raises:
        ValueError: if a shape does not fit the layout or the others, or the window is not positive.
    """
    _check(query, key, value, prefix_key, prefix_value, layout, window=window, sink_logits=sink_logits)
    return _implementation(query, value)(
        query,
        key,
        value,
        prefix_key,
        prefix_value,
        layout,
        scale=scale,
        causal=causal,
        softcap=softcap,
        window=window,
        sink_logits=sink_logits,
    )


def suffix_attention_reference(
    query: Float[Tensor, "row head d_head"],
    key: Float[Tensor, "row kv_head d_head"],
    value: Float[Tensor, "row kv_head d_value"],
    prefix_key: Float[Tensor, "prompt pos kv_head d_head"],
    prefix_value: Float[Tensor, "prompt pos kv_head d_value"],
    layout: SuffixLayout,
    *,
    scale: float,
    causal: bool = True,
    softcap: float | None = None,
    window: int | None = None,
    sink_logits: Float[Tensor, " head"] | None = None,
) -> Float[Tensor, "row head d_value"]:
    """`suffix_attention` in plain PyTorch: a dozen operations a group, `SCORE_BYTES` of scores at once."""
    n_rows, n_heads, d_head = query.shape
    n_kv_heads, d_value = value.shape[1:]
    per_kv_head = n_heads // n_kv_heads
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    sink = None if sink_logits is None else sink_logits.to(dtype).view(n_kv_heads, 1, 1, per_kv_head)
    z = query.new_empty(n_rows, n_heads, d_value)
    for group in layout.groups:
        shape = (group.n_variants, group.length, n_kv_heads)
        # [kv_head, variant, position, ...]: what belongs to a key/value head is one block, and in it each variant.
        queries = query[group.rows].view(*shape, per_kv_head, d_head).permute(2, 0, 1, 3, 4)
        keys = key[group.rows].view(*shape, d_head).permute(2, 0, 1, 3)
        values = value[group.rows].view(*shape, d_value).permute(2, 0, 1, 3)
        out = z[group.rows].view(*shape, per_kv_head, d_value).permute(2, 0, 1, 3, 4)
        for which, positions in _pieces(group, n_heads * dtype.itemsize):
            seen = range(group.start + positions.start, group.start + positions.stop)
            keys_seen = _keys_seen(group, seen, causal=causal, window=window)
            own = slice(0, keys_seen.stop - group.start)
            prefix = (group.prompt, slice(keys_seen.start, group.start))
            out[:, which, positions] = _attend(
                queries[:, which, positions].to(dtype),
                keys[:, which, own].to(dtype),
                values[:, which, own].to(dtype),
                prefix_key[prefix].to(dtype),
                prefix_value[prefix].to(dtype),
                scale=scale,
                softcap=softcap,
                mask=_mask(layout, seen, keys_seen, causal, window, per_kv_head, like=z),
                sink=sink,
            )
    return z


def _attend(
    query: Float[Tensor, "kv_head variant pos per_kv_head d_head"],
    key: Float[Tensor, "kv_head variant own d_head"],
    value: Float[Tensor, "kv_head variant own d_value"],
    prefix_key: Float[Tensor, "prefix kv_head d_head"],
    prefix_value: Float[Tensor, "prefix kv_head d_value"],
    *,
    scale: float,
    softcap: float | None,
    mask: Float[Tensor, "key 1 pos per_kv_head"] | None,
    sink: Float[Tensor, "kv_head 1 1 per_kv_head"] | None,
) -> Float[Tensor, "kv_head variant pos per_kv_head d_value"]:
    """One group at once: softmax over [prefix | own] of its scores, times the values."""
    n_kv_heads, n_variants, n_positions, per_kv_head, d_head = query.shape
    n_own, n_prefix, d_value = key.shape[2], prefix_key.shape[0], value.shape[-1]
    # Keys come before queries: a softmax over a short last axis is twenty times slower than over one before a long one.
    by_query = (n_variants, n_positions, per_kv_head)
    scores = query.new_empty(n_kv_heads, n_prefix + n_own + (sink is not None), *by_query)
    flat = scores.flatten(2)
    stacked = query.reshape(n_kv_heads, -1, d_head)
    if n_prefix:
        part = flat[:, :n_prefix]
        torch.baddbmm(part, prefix_key.transpose(0, 1), stacked.transpose(1, 2), beta=0, alpha=scale, out=part)
    own_key, own_value = key.reshape(-1, n_own, d_head), value.reshape(-1, n_own, d_value)
    own_scores = torch.bmm(own_key, stacked.reshape(len(own_key), -1, d_head).transpose(1, 2))
    own_scores = own_scores.view(n_kv_heads, n_variants, n_own, n_positions, per_kv_head).transpose(1, 2)
    logits = scores[:, : n_prefix + n_own]
    torch.mul(own_scores, scale, out=logits[:, n_prefix:])
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    if mask is not None:
        logits += mask
    if sink is not None:
        scores[:, -1] = sink
    pattern = torch.softmax(flat, dim=1)
    own = pattern[:, n_prefix : n_prefix + n_own].unflatten(2, (n_variants, -1)).permute(0, 2, 3, 1)
    own = own.reshape(len(own_key), -1, n_own)
    if not n_prefix:
        z = own * own_value if n_own == 1 else torch.bmm(own, own_value)
    else:
        z = torch.bmm(pattern[:, :n_prefix].transpose(1, 2), prefix_value.transpose(0, 1))
        z = z.view(len(own_key), -1, d_value)
        z = z.addcmul_(own, own_value) if n_own == 1 else z.baddbmm_(own, own_value)
    return z.view(n_kv_heads, *by_query, d_value)


def _pieces(group: SuffixGroup, bytes_a_score: int) -> Iterator[tuple[slice, slice]]:
    """A group as (variants, positions) whose scores fit in `SCORE_BYTES`, or single rows where one row does not."""
    rows = max(1, SCORE_BYTES // (bytes_a_score * (group.start + group.length)))
    n_variants, n_positions = max(1, rows // group.length), min(rows, group.length)
    for variant in range(0, group.n_variants, n_variants):
        which = slice(variant, min(variant + n_variants, group.n_variants))
        for position in range(0, group.length, n_positions):
            yield which, slice(position, min(position + n_positions, group.length))


def _keys_seen(group: SuffixGroup, queries: range, *, causal: bool, window: int | None) -> range:
    """Positions of the keys that some of these query positions look at, the group's first position always included."""
    first = 0 if window is None else max(0, queries.start - window + 1)
    return range(min(first, group.start), queries.stop if causal else group.start + group.length)


def _mask(
    layout: SuffixLayout,
    queries: range,
    keys: range,
    causal: bool,
    window: int | None,
    per_kv_head: int,
    *,
    like: Tensor,
) -> Tensor | None:
    """[key, 1, query, per_kv_head]: 0 where a query looks and -inf elsewhere; None where every query looks everywhere.

    Small ones are kept in the layout for the next layer.
    """
    name = ("mask", queries, keys, causal, window, per_kv_head, like.dtype, like.device)
    if name in layout.kept:
        return layout.kept[name]
    distance = torch.arange(queries.start, queries.stop) - torch.arange(keys.start, keys.stop)[:, None]
    hidden = distance < 0 if causal else torch.zeros_like(distance, dtype=torch.bool)
    if window is not None:
        hidden |= distance.abs() >= window
    mask = None
    if bool(hidden.any()):
        hidden = hidden[:, None, :, None].expand(-1, -1, -1, per_kv_head).to(like.device)
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        mask = torch.zeros(hidden.shape, dtype=dtype, device=like.device).masked_fill_(hidden, float("-inf"))
    if mask is None or mask.nbytes <= KEPT_MASK_BYTES:
        layout.kept[name] = mask
    return mask


def _implementation(query: Tensor, value: Tensor) -> Callable[..., Tensor]:
    """The Triton kernel on CUDA, as far as triton is installed and the kernel goes; else the twin."""
    if query.is_cuda and query.dtype != torch.float64:
        try:
            from interp.kernels.suffix_attention_triton import MAX_D_HEAD, suffix_attention_triton
        except ModuleNotFoundError:
            return suffix_attention_reference
        if max(query.shape[-1], value.shape[-1]) <= MAX_D_HEAD:
            return suffix_attention_triton
    return suffix_attention_reference


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    layout: SuffixLayout,
    *,
    window: int | None,
    sink_logits: Tensor | None,
) -> None:
    n_rows, n_heads, d_head = query.shape
    n_kv_heads = key.shape[1]
    wanted = {
        "query": (query, (layout.n_rows, n_heads, d_head)),
        "key": (key, (n_rows, n_kv_heads, d_head)),
        "value": (value, (n_rows, n_kv_heads, value.shape[-1])),
        "prefix_key": (prefix_key, (*prefix_value.shape[:2], n_kv_heads, d_head)),
        "prefix_value": (prefix_value, (*prefix_key.shape[:2], n_kv_heads, value.shape[-1])),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor.dtype != query.dtype:
            raise ValueError(f"{name} is {tensor.dtype} and query {query.dtype}; give them the same dtype")
        if tensor.shape != shape:
            raise ValueError(
                f"{name} is {list(tensor.shape)}; with this layout and the others it must be {list(shape)}"
            )
    if n_heads % n_kv_heads:
        raise ValueError(f"{n_heads} query heads cannot share {n_kv_heads} key/value heads evenly")
    if max(layout.prompt, default=-1) >= len(prefix_key) or max(layout.start, default=0) > prefix_key.shape[1]:
        raise ValueError(f"the layout names prompts or prefixes beyond those given ({list(prefix_key.shape[:2])})")
    if window is not None and window < 1:
        raise ValueError(f"window={window}: a query sees at least itself, so a window is 1 or more")
    if sink_logits is not None and sink_logits.shape != (n_heads,):
        raise ValueError(f"sink_logits is {list(sink_logits.shape)}; it must be [{n_heads}], one a query head")
