"""`attention_stats` as two Triton kernels, neither of which writes a score to memory.

1. One program a block of queries and head goes through the keys they may attend to (online softmax): the row's maximum
   and its weights summed with the columns (1, kept, sets of keys), with score - maximum, and with the distance.
2. One program a block of keys and head goes through the queries that may attend to them, recomputes the scores, and
   adds up what each key receives: exp(score - the row's log-sum-exp).

Stripes need one score a row and offset, which plain PyTorch gathers.

Under `TRITON_INTERPRET=1`, which must be set before triton is first imported, the same kernels run on a CPU, slowly,
for tests.
"""

# The types inside a kernel are Triton's own.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float
from torch import Tensor

from interp.kernels.attention_stats import AttentionStats, row_share, row_statistics, stat_columns
from interp.kernels.visible_keys import VisibleKeys

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""As triton saw it when it made the kernels."""
MAX_D_HEAD = 256
"""Largest head size: a block of queries has to stay on the chip."""
_INTERPRETED = tl.constexpr(INTERPRETED)
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _block(
    tensor, first, end, stride_pos, stride_dim, D_HEAD: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Some positions of one head [position, dim]; 0 beyond the last."""
    pos, dim = first + tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    return tl.load(
        tensor + pos[:, None].to(tl.int64) * stride_pos + dim[None, :] * stride_dim,
        mask=(pos < end)[:, None] & (dim < D_HEAD)[None, :],
        other=0.0,
    )


@triton.jit
def _scores(query, keys, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Scores in base 2, after scale and soft-cap; the interpreter multiplies bfloat16 as integers, so it widens."""
    if _INTERPRETED:
        query, keys = query.to(tl.float32), keys.to(tl.float32)
    scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
    if HAS_SOFTCAP:
        # tanh by its exponential form: triton's own tanh is not the same function on every backend.
        scores = (2.0 / (1.0 + tl.exp2(scores / softcap * (-2.0 * _LOG2_E))) - 1.0) * softcap
    return scores * _LOG2_E


@triton.jit
def _seen(
    queries, keys, first_query, n_keys, real, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, REAL: tl.constexpr
):
    """Which of these query positions may attend to which of these key positions."""
    seen = ((queries >= first_query) & (queries < n_keys))[:, None] & (keys < n_keys)[None, :]
    distance = queries[:, None] - keys[None, :]
    if CAUSAL:
        seen = seen & (distance >= 0)
    if WINDOW:
        seen = seen & (distance < window) & (-distance < window)
    if REAL:
        real_query = tl.load(real + queries, mask=queries < n_keys, other=0)
        real_key = tl.load(real + keys, mask=keys < n_keys, other=0)
        seen = seen & (real_query != 0)[:, None] & (real_key != 0)[None, :]
    return seen


@triton.jit
def _rows_kernel(
    query,
    key,
    columns,
    real,
    totals,
    highest_out,
    spread_out,
    reach_out,
    scale,
    softcap,
    window,
    n_queries,
    n_keys,
    n_heads,
    query_batch,
    query_head,
    query_pos,
    query_dim,
    key_batch,
    key_head,
    key_pos,
    key_dim,
    PER_KV_HEAD: tl.constexpr,
    D_HEAD: tl.constexpr,
    N_COLUMNS: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_REAL: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    batch, head = (tl.program_id(1) // n_heads).to(tl.int64), (tl.program_id(1) % n_heads).to(tl.int64)
    query += batch * query_batch + head * query_head
    key += batch * key_batch + (head // PER_KV_HEAD) * key_head
    columns += batch * n_keys * N_COLUMNS
    real += batch * n_keys
    first_query = n_keys - n_queries
    row = tl.program_id(0) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    position = first_query + row
    queries = _block(
        query, tl.program_id(0) * BLOCK_QUERIES, n_queries, query_pos, query_dim, D_HEAD, BLOCK_QUERIES, BLOCK_D
    )
    highest = tl.full([BLOCK_QUERIES], float("-inf"), tl.float32)
    spread = tl.zeros([BLOCK_QUERIES], tl.float32)
    reach = tl.zeros([BLOCK_QUERIES], tl.float32)
    kept = tl.zeros([BLOCK_QUERIES], tl.float32)
    total = tl.zeros([BLOCK_QUERIES, BLOCK_COLUMNS], tl.float32)

    low = n_keys * 0
    high = n_keys
    earliest = first_query + tl.program_id(0) * BLOCK_QUERIES
    if CAUSAL:
        high = tl.minimum(high, earliest + BLOCK_QUERIES)
    if HAS_WINDOW:
        low = tl.maximum(low, earliest - window + 1)
        high = tl.minimum(high, earliest + BLOCK_QUERIES - 1 + window)
    for first in range(low, high, BLOCK_KEYS):
        keys = first + tl.arange(0, BLOCK_KEYS)
        scores = _scores(
            queries,
            _block(key, first, n_keys, key_pos, key_dim, D_HEAD, BLOCK_KEYS, BLOCK_D),
            scale,
            softcap,
            HAS_SOFTCAP,
        )
        seen = _seen(position, keys, first_query, n_keys, real, window, CAUSAL, HAS_WINDOW, HAS_REAL)
        scores = tl.where(seen, scores, float("-inf"))
        new = tl.maximum(highest, tl.max(scores, 1))
        # A query that has seen no key yet has no maximum.
        finite = tl.where(new == float("-inf"), 0.0, new)
        fallen = tl.where(highest == float("-inf"), 0.0, highest - finite)
        shrink = tl.exp2(highest - finite)
        below = tl.where(seen, scores - finite[:, None], 0.0)
        weights = tl.where(seen, tl.exp2(below), 0.0)
        column = _block(columns, first, n_keys, N_COLUMNS, 1, N_COLUMNS, BLOCK_KEYS, BLOCK_COLUMNS)
        left = tl.load(columns + keys * N_COLUMNS + 1, mask=keys < n_keys, other=0.0)
        weights_left = weights * left[None, :]
        away = tl.abs(position[:, None] - keys[None, :]).to(tl.float32)
        spread = (spread + kept * fallen) * shrink + tl.sum(weights_left * below, 1)
        reach = reach * shrink + tl.sum(weights_left * away, 1)
        kept = kept * shrink + tl.sum(weights_left, 1)
        total = total * shrink[:, None] + tl.dot(weights, column, input_precision="ieee")
        highest = new

    out = tl.program_id(1).to(tl.int64) * n_queries + row
    inside = row < n_queries
    tl.store(highest_out + out, highest / _LOG2_E, mask=inside)
    tl.store(spread_out + out, spread / _LOG2_E, mask=inside)
    tl.store(reach_out + out, reach, mask=inside)
    lane = tl.arange(0, BLOCK_COLUMNS)
    tl.store(
        totals + out[:, None] * N_COLUMNS + lane[None, :],
        total,
        mask=inside[:, None] & (lane < N_COLUMNS)[None, :],
    )


@triton.jit
def _columns_kernel(
    query,
    key,
    real,
    log_sums,
    received,
    scale,
    softcap,
    window,
    n_queries,
    n_keys,
    n_heads,
    query_batch,
    query_head,
    query_pos,
    query_dim,
    key_batch,
    key_head,
    key_pos,
    key_dim,
    PER_KV_HEAD: tl.constexpr,
    D_HEAD: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_REAL: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    batch, head = (tl.program_id(1) // n_heads).to(tl.int64), (tl.program_id(1) % n_heads).to(tl.int64)
    query += batch * query_batch + head * query_head
    key += batch * key_batch + (head // PER_KV_HEAD) * key_head
    real += batch * n_keys
    log_sums += tl.program_id(1).to(tl.int64) * n_queries
    first_query = n_keys - n_queries
    first_key = tl.program_id(0) * BLOCK_KEYS
    pos = first_key + tl.arange(0, BLOCK_KEYS)
    keys = _block(key, first_key, n_keys, key_pos, key_dim, D_HEAD, BLOCK_KEYS, BLOCK_D)
    total = tl.zeros([BLOCK_KEYS], tl.float32)

    low = n_keys * 0
    high = n_queries
    if CAUSAL:
        low = tl.maximum(low, first_key - first_query)
    if HAS_WINDOW:
        low = tl.maximum(low, first_key - window + 1 - first_query)
        high = tl.minimum(high, first_key + BLOCK_KEYS - 1 + window - first_query)
    for first in range(low, high, BLOCK_QUERIES):
        row = first + tl.arange(0, BLOCK_QUERIES)
        queries = _block(query, first, n_queries, query_pos, query_dim, D_HEAD, BLOCK_QUERIES, BLOCK_D)
        scores = _scores(queries, keys, scale, softcap, HAS_SOFTCAP)
        seen = _seen(first_query + row, pos, first_query, n_keys, real, window, CAUSAL, HAS_WINDOW, HAS_REAL)
        log_sum = tl.load(log_sums + row, mask=row < n_queries, other=0.0) * _LOG2_E
        total += tl.sum(tl.exp2(tl.where(seen, scores - log_sum[:, None], float("-inf"))), 0)
    tl.store(received + tl.program_id(1).to(tl.int64) * n_keys + pos, total, mask=pos < n_keys)


def attention_stats_triton(
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
    """`attention_stats` by the kernels; all tensors on one CUDA device, or on the CPU when triton is interpreted.

    Raises:
        ValueError: if a head is larger than `MAX_D_HEAD`, the numbers are float64, or there is a mask tensor.
    """
    n_batch, n_heads, n_queries, d_head = query.shape
    n_keys = key.shape[2]
    if d_head > MAX_D_HEAD or query.dtype == torch.float64 or visible.mask is not None:
        raise ValueError(
            f"the kernels take heads up to {MAX_D_HEAD} in float32 or less and no mask tensor; use "
            "attention_stats_reference"
        )
    columns = stat_columns(n_batch, n_keys, key_sets, exclude, torch.float32, query.device)
    totals = columns.new_empty(n_batch, n_heads, n_queries, columns.shape[-1])
    highest, spread, reach = (columns.new_empty(n_batch, n_heads, n_queries) for _ in range(3))
    received = columns.new_empty(n_batch, n_heads, n_keys)
    real = columns if visible.real is None else visible.real.to(torch.int8).contiguous()
    window = 0 if visible.window is None else visible.window
    numbers = (scale, 1.0 if softcap is None else softcap, window, n_queries, n_keys, n_heads)
    strides = (*query.stride(), *key.stride())
    options = {
        "PER_KV_HEAD": n_heads // key.shape[1],
        "D_HEAD": d_head,
        "CAUSAL": visible.causal,
        "HAS_WINDOW": visible.window is not None,
        "HAS_REAL": visible.real is not None,
        "HAS_SOFTCAP": softcap is not None,
        "BLOCK_D": max(16, triton.next_power_of_2(d_head)),
        **_blocks(d_head),
    }
    n_columns = columns.shape[-1]
    sizes = {"N_COLUMNS": n_columns, "BLOCK_COLUMNS": max(16, triton.next_power_of_2(n_columns))}
    outputs = (totals, highest, spread, reach)
    with torch.cuda.device(query.device) if query.is_cuda else contextlib.nullcontext():
        grid = (triton.cdiv(n_queries, options["BLOCK_QUERIES"]), n_batch * n_heads)
        _rows_kernel[grid](query, key, columns, real, *outputs, *numbers, *strides, **options, **sizes)
        log_sums = highest - row_share(totals[..., 0], highest, sink_logits).log()
        grid = (triton.cdiv(n_keys, options["BLOCK_KEYS"]), n_batch * n_heads)
        _columns_kernel[grid](query, key, real, log_sums, received, *numbers, *strides, **options)
    stripes = columns.new_zeros(len(offsets), n_batch, n_heads, n_queries)
    for index, offset in enumerate(offsets):
        stripes[index] = _stripe(query, key, visible, offset, scale, softcap, log_sums)
    return row_statistics(visible, totals, highest, spread, reach, received, stripes, sink_logits, exclude, offsets)


def _stripe(
    query: Float[Tensor, "batch head query d_head"],
    key: Float[Tensor, "batch kv_head key d_head"],
    visible: VisibleKeys,
    offset: int,
    scale: float,
    softcap: float | None,
    log_sums: Float[Tensor, "batch head query"],
) -> Float[Tensor, "batch head query"]:
    """A[q, q - offset], 0 where hidden or absent: one dot product a row."""
    positions = visible.positions(slice(0, visible.n_queries)).to(query.device)
    keys = (positions - offset).clamp(0, visible.n_keys - 1)
    by_kv_head = query.float().unflatten(1, (key.shape[1], -1))
    scores = (by_kv_head * key[:, :, None, keys].float()).sum(-1).flatten(1, 2) * scale
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    far = math.inf if visible.window is None else visible.window
    if abs(offset) >= far or (visible.causal and offset < 0):
        return torch.zeros_like(scores)
    if visible.real is not None:
        shown = visible.real[:, keys] & visible.real[:, positions]
        scores = scores.masked_fill(~shown[:, None], float("-inf"))
    return (scores - log_sums).exp()


INTERPRETED_BLOCKS = {"BLOCK_QUERIES": 32, "BLOCK_KEYS": 16}
"""Small blocks let small tests cross their borders."""


def _blocks(d_head: int) -> dict[str, int]:
    """Block shapes: a block of queries and two of keys have to fit on the chip."""
    if INTERPRETED:
        return INTERPRETED_BLOCKS
    return {"BLOCK_QUERIES": 64, "BLOCK_KEYS": 64} if d_head <= 128 else {"BLOCK_QUERIES": 32, "BLOCK_KEYS": 32}
