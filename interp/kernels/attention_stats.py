"""What attention patterns look like, from queries and keys, without ever holding a pattern.

For every head: how much attention each key receives, and for every query how much of it falls on given sets of keys,
how spread out it is, how far it reaches, its largest entry, and its entries at given offsets (stripes).
`attention_stats` runs the Triton kernels on CUDA and `attention_stats_reference`, their twin in plain PyTorch,
elsewhere. The twin goes through the queries in blocks:

1. the scores of a block of queries with all keys that some of them may attend to, less each row's maximum;
2. their exponentials times the columns (1, kept, sets of keys) give the sums of each row, and with them its statistics;
3. each exponential as a share of its row's sum is added to what its key receives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.kernels.visible_keys import VisibleKeys

SCORE_BYTES = 4 * 2**20
"""Scores of the twin that are held at once, three times over: small enough to stay near the processor."""
MIN_ROWS = 16
"""Queries a block has at least, where there are so many: fewer would read all keys too often."""
_HIDDEN = -1e30
"""Score of a key that a query may not attend to: finite, so that 0 times it is 0."""


class AttentionStats(NamedTuple):
    """Statistics of attention, float32 (float64 for such input). Rows that may attend to nothing are NaN throughout."""

    received: Float[Tensor, "batch head key"]
    """Attention summed over the queries; rows that may attend to nothing give none."""
    n_queries: Int[Tensor, "batch head key"]
    """Queries that may attend to the key: `received / n_queries` is a mean, NaN where there is none."""
    mass: Float[Tensor, "set batch head query"]
    """Attention to each set of keys."""
    maximum: Float[Tensor, "batch head query"]
    """The largest entry of each row."""
    entropy: Float[Tensor, "batch head query"]
    """In nats, of the row renormalised over the keys that are not excluded; NaN if none of them is left."""
    distance: Float[Tensor, "batch head query"]
    """Mean |query - key| in tokens of the row renormalised over the keys that are not excluded."""
    n_keys: Int[Tensor, "batch head query"]
    """Keys that the query may attend to and that are not excluded; `log(n_keys)` is the largest entropy."""
    stripes: Float[Tensor, "offset batch head query"]
    """A[q, q - offset]; NaN where there is no such position, 0 where there is one that the mask hides."""


def attention_stats(
    query: Float[Tensor, "batch head query d_head"],
    key: Float[Tensor, "batch kv_head key d_head"],
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    sink_logits: Float[Tensor, " head"] | None = None,
    real: Bool[Tensor, "batch key"] | None = None,
    mask: Tensor | None = None,
    key_sets: Bool[Tensor, "set batch key"] | None = None,
    exclude: Bool[Tensor, "batch key"] | None = None,
    offsets: Sequence[int] = (),
) -> AttentionStats:
    """Statistics of softmax(scale · q·k) in memory that is linear in the number of keys.

    Queries are the last rows: query i of n is at position `n_keys - n + i`. Query head h reads key/value head
    `h // (head / kv_head)`. Half precision is computed in float32. No gradient. Costs the product of queries and keys
    once (twice on CUDA) over the visible keys only, if causal or window say which they are.

    Args:
        query: after rotary and QK-norm.
        key: likewise.
        scale: multiplies q·k.
        causal: only keys at positions up to the query's.
        window: only keys less than this many positions away.
        softcap: scores become `tanh(score / softcap) * softcap`.
        sink_logits: one more entry a head in every softmax, which takes mass: rows sum to less than 1. Entropy and
            distance renormalise.
        real: tokens that are not padding; the others neither attend nor are attended to.
        mask: a mask that the arguments above cannot say (a bidirectional prefix), in addition to them: booleans (True =
            may attend) or floats to add to the scores, as transformers makes them, [batch or 1, head or 1, query, key].
            It is read in blocks by the twin, on any device.
        key_sets: sets of keys (sinks, image tokens, a segment) whose `mass` is wanted.
        exclude: keys left out of entropy and distance.
        offsets: which stripes; 1 is the previous token, 0 the token itself.

    Raises:
        ValueError: if a shape does not fit the others, or the window is not positive.
    """
    visible = VisibleKeys(query.shape[2], key.shape[2], causal=causal, window=window, real=real, mask=mask)
    _check(query, key, visible, sink_logits=sink_logits, key_sets=key_sets, exclude=exclude)
    return _implementation(query, visible)(
        query,
        key,
        visible,
        scale=scale,
        softcap=softcap,
        sink_logits=sink_logits,
        key_sets=key_sets,
        exclude=exclude,
        offsets=offsets,
    )


def attention_stats_reference(
    query: Float[Tensor, "batch head query d_head"],
    key: Float[Tensor, "batch kv_head key d_head"],
    visible: VisibleKeys,
    *,
    scale: float,
    softcap: float | None,
    sink_logits: Float[Tensor, " head"] | None,
    key_sets: Bool[Tensor, "set batch key"] | None,
    exclude: Bool[Tensor, "batch key"] | None,
    offsets: Sequence[int],
) -> AttentionStats:
    """`attention_stats` in plain PyTorch: about fifteen operations a block of queries."""
    n_batch, n_heads, n_queries, _ = query.shape
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    columns = stat_columns(n_batch, key.shape[2], key_sets, exclude, dtype, query.device)
    keys = key.to(dtype).contiguous()
    received = columns.new_zeros(n_batch, n_heads, key.shape[2])
    totals = columns.new_empty(n_batch, n_heads, n_queries, columns.shape[-1])
    highest, spread, reach = (columns.new_empty(n_batch, n_heads, n_queries) for _ in range(3))
    stripes = columns.new_zeros(len(offsets), n_batch, n_heads, n_queries)
    for batch, rows in _blocks(n_batch, n_heads, n_queries, key.shape[2], dtype.itemsize):
        seen = visible.span(rows)
        block = (batch, slice(None), rows)
        shifted = _scores(query[block].to(dtype) * scale, keys[batch, :, seen], softcap)
        visible.hide(shifted, batch, rows, seen, value=_HIDDEN)
        top = shifted.amax(-1, keepdim=True)
        weights = shifted.sub_(top).exp()
        highest[block] = top[..., 0]
        total = torch.matmul(weights, columns[batch, None, seen])
        totals[block] = total
        share = row_share(total[..., 0], top[..., 0], sink_logits).masked_fill(top[..., 0] <= _HIDDEN / 2, 0)
        received[batch, :, seen] += torch.matmul(share[..., None, :], weights)[..., 0, :]
        for index, offset in enumerate(offsets):
            stripes[index][block] = _stripe(weights, visible.positions(rows) - offset - seen.start) * share
        kept = columns[batch, None, seen, 1:2]
        spread[block] = torch.matmul(shifted.mul_(weights), kept)[..., 0]
        reach[block] = torch.matmul(weights.mul_(visible.distance(rows, seen, like=weights)), kept)[..., 0]
    highest = highest.masked_fill(highest <= _HIDDEN / 2, float("-inf"))
    return row_statistics(visible, totals, highest, spread, reach, received, stripes, sink_logits, exclude, offsets)


def stat_columns(
    n_batch: int,
    n_keys: int,
    key_sets: Bool[Tensor, "set batch key"] | None,
    exclude: Bool[Tensor, "batch key"] | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Float[Tensor, "batch key column"]:
    """What the weights of a row are summed with: 1, whether the key is kept, whether it is in each set."""
    columns = torch.ones(n_batch, n_keys, 2, dtype=dtype, device=device)
    if exclude is not None:
        columns[..., 1] = ~exclude
    return columns if key_sets is None else torch.cat([columns, key_sets.permute(1, 2, 0).to(dtype)], dim=-1)


def row_share(
    total: Float[Tensor, "batch head query"],
    highest: Float[Tensor, "batch head query"],
    sink_logits: Float[Tensor, " head"] | None,
) -> Float[Tensor, "batch head query"]:
    """Pattern entry of a weight of 1, which is that of the highest score: one over the sum of the row's weights."""
    if sink_logits is not None:
        total = total + (sink_logits.to(total.dtype)[:, None] - highest).exp()
    return 1 / total


def row_statistics(
    visible: VisibleKeys,
    totals: Float[Tensor, "batch head query column"],
    highest: Float[Tensor, "batch head query"],
    spread: Float[Tensor, "batch head query"],
    reach: Float[Tensor, "batch head query"],
    received: Float[Tensor, "batch head key"],
    stripes: Float[Tensor, "offset batch head query"],
    sink_logits: Float[Tensor, " head"] | None,
    exclude: Bool[Tensor, "batch key"] | None,
    offsets: Sequence[int],
) -> AttentionStats:
    """The statistics from the sums of each row.

    Args:
        visible: which keys each query may attend to.
        totals: weights, which are exp(score - highest), summed with each column.
        highest: the largest score of each row; -inf if the row may attend to nothing.
        spread: weights times (score - highest), summed over the kept keys.
        reach: weights times distance, summed over the kept keys.
        received: pattern entries summed over queries.
        stripes: pattern entries at the offsets.
        sink_logits: as in `attention_stats`.
        exclude: as in `attention_stats`.
        offsets: as in `attention_stats`.
    """
    empty = torch.isneginf(highest)
    share = row_share(totals[..., 0], highest, sink_logits)
    kept = totals[..., 1].masked_fill(empty, torch.nan)
    n_batch, n_heads, length = received.shape
    n_keys, n_queries = visible.counts(exclude, n_batch, n_heads, received.device)
    keys = visible.positions(slice(0, highest.shape[-1])) - torch.tensor(list(offsets), dtype=torch.int64)[:, None]
    absent = ((keys < 0) | (keys >= length)).to(highest.device)
    return AttentionStats(
        received=received,
        n_queries=n_queries,
        mass=(totals[..., 2:] * share[..., None]).movedim(-1, 0).masked_fill(empty, torch.nan),
        maximum=share.masked_fill(empty, torch.nan),
        entropy=(kept.log() - spread / kept).clamp(min=0),
        distance=reach / kept,
        n_keys=n_keys,
        stripes=stripes.masked_fill(absent[:, None, None] | empty, torch.nan),
    )


def _scores(
    query: Float[Tensor, "batch head row d_head"], key: Float[Tensor, "batch kv_head key d_head"], softcap: float | None
) -> Float[Tensor, "batch head row key"]:
    n_batch, n_heads, n_rows, d_head = query.shape
    stacked = query.reshape(n_batch, key.shape[1], -1, d_head)
    scores = torch.matmul(stacked, key.transpose(2, 3)).view(n_batch, n_heads, n_rows, -1)
    return scores if softcap is None else scores.div_(softcap).tanh_().mul_(softcap)


def _stripe(
    weights: Float[Tensor, "batch head row key"], columns: Int[Tensor, " row"]
) -> Float[Tensor, "batch head row"]:
    """One entry of each row; 0 where its column is none of these."""
    inside = ((columns >= 0) & (columns < weights.shape[-1])).to(weights.device)
    where = columns.clamp(0, weights.shape[-1] - 1).to(weights.device)
    return weights[:, :, torch.arange(len(columns), device=weights.device), where] * inside


def _blocks(n_batch: int, n_heads: int, n_queries: int, n_keys: int, itemsize: int) -> Iterator[tuple[slice, slice]]:
    """(prompts, queries) whose scores fit in `SCORE_BYTES`, as far as `MIN_ROWS` queries of one prompt do."""
    a_row = n_heads * n_keys * itemsize
    prompts = max(1, SCORE_BYTES // (a_row * min(n_queries, MIN_ROWS)))
    rows = max(MIN_ROWS, SCORE_BYTES // (a_row * min(prompts, n_batch)))
    for prompt in range(0, n_batch, prompts):
        for row in range(0, n_queries, rows):
            yield slice(prompt, min(prompt + prompts, n_batch)), slice(row, min(row + rows, n_queries))


def _implementation(query: Tensor, visible: VisibleKeys) -> Callable[..., AttentionStats]:
    """The Triton kernels on CUDA, as far as triton is installed and they go; else the twin."""
    if query.is_cuda and query.dtype != torch.float64 and visible.mask is None:
        try:
            from interp.kernels.attention_stats_triton import MAX_D_HEAD, attention_stats_triton
        except ModuleNotFoundError:
            return attention_stats_reference
        if query.shape[-1] <= MAX_D_HEAD:
            return attention_stats_triton
    return attention_stats_reference


def _check(
    query: Tensor,
    key: Tensor,
    visible: VisibleKeys,
    *,
    sink_logits: Tensor | None,
    key_sets: Tensor | None,
    exclude: Tensor | None,
) -> None:
    n_batch, n_heads, n_queries, d_head = query.shape
    n_kv_heads, n_keys = key.shape[1:3]
    if key.shape != (n_batch, n_kv_heads, n_keys, d_head) or key.dtype != query.dtype:
        raise ValueError(
            f"key is {key.dtype} {list(key.shape)} and query {query.dtype} {list(query.shape)}; give them the same "
            "dtype, batch and d_head"
        )
    if n_heads % n_kv_heads:
        raise ValueError(f"{n_heads} query heads cannot share {n_kv_heads} key/value heads evenly")
    if not 1 <= n_queries <= n_keys:
        raise ValueError(f"{n_queries} queries cannot be the last rows of {n_keys} keys")
    wanted = {
        "sink_logits": (sink_logits, (n_heads,)),
        "real": (visible.real, (n_batch, n_keys)),
        "exclude": (exclude, (n_batch, n_keys)),
        "key_sets": (key_sets, (0 if key_sets is None else len(key_sets), n_batch, n_keys)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} is {list(tensor.shape)}; with these queries and keys it must be {list(shape)}")
    visible.check(n_batch, n_heads)
