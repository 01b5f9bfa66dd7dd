"""`suffix_attention` as a Triton kernel: one program a tile of queries and key/value head.

A tile is some consecutive rows of variants that share their prompt and start, times the query heads of one key/value
head, so that a block of the prefix is read once for all of them, however short each suffix is:

1. the tile's queries meet the prefix keys block by block (online softmax, float32);
2. then the rows of the packed keys that belong to the tile's variants, where a row of another variant is masked out;
3. the sink logit, if there is one, takes its mass; then the sum is divided and stored.

Under `TRITON_INTERPRET=1`, which must be set before triton is first imported, the same kernel runs on a CPU, slowly,
for tests.
"""

# The types inside a kernel are Triton's own.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from interp.kernels.suffix_attention import SuffixLayout

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""As triton saw it when it made the kernel."""
MAX_D_HEAD = 256
"""Largest head size: a tile of queries has to stay on the chip."""
_HEADS_A_TILE = 16
_LOG2_E = tl.constexpr(1.4426950408889634)
_SHARED_BYTES = 96 * 1024


_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def _dot(left, right):
    """The product in float32; the interpreter multiplies bfloat16 as the integers that it stores it in."""
    if _INTERPRETED:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, input_precision="ieee")


@triton.jit
def _online_softmax(scores, values, highest, mass, total):
    """One more block of scores (base 2, hidden ones -inf) and values: the new maximum, sum of weights and output."""
    new = tl.maximum(highest, tl.max(scores, 1))
    # A query that has seen no key yet has no maximum.
    finite = tl.where(new == float("-inf"), 0.0, new)
    weights = tl.exp2(scores - finite[:, None])
    shrink = tl.exp2(highest - finite)
    total = total * shrink[:, None] + _dot(weights.to(values.dtype), values)
    return new, mass * shrink + tl.sum(weights, 1), total


@triton.jit
def _scores(query, keys, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Scores in base 2, after scale and soft-cap."""
    scores = _dot(query, keys) * scale
    if HAS_SOFTCAP:
        # tanh by its exponential form: triton's own tanh is not the same function on every backend.
        scores = (2.0 / (1.0 + tl.exp2(scores / softcap * (-2.0 * _LOG2_E))) - 1.0) * softcap
    return scores * _LOG2_E


@triton.jit
def _suffix_attention_kernel(
    query,
    key,
    value,
    prefix_key,
    prefix_value,
    z,
    tiles,
    first_tile,
    row_position,
    row_variant,
    sink_logits,
    scale,
    softcap,
    window,
    key_class,
    query_row,
    query_head,
    query_dim,
    key_row,
    key_head,
    key_dim,
    value_row,
    value_head,
    value_dim,
    prefix_key_prompt,
    prefix_key_pos,
    prefix_key_head,
    prefix_key_dim,
    prefix_value_prompt,
    prefix_value_pos,
    prefix_value_head,
    prefix_value_dim,
    z_row,
    z_head,
    z_dim,
    PER_KV_HEAD: tl.constexpr,
    D_HEAD: tl.constexpr,
    D_VALUE: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SINK: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    TILING: tl.constexpr,
):
    tile = tiles + (tl.load(first_tile + TILING) + tl.program_id(0)) * 6
    prompt, start = tl.load(tile), tl.load(tile + 1)
    first_row, end_row = tl.load(tile + 2), tl.load(tile + 3)
    first_own, end_own = tl.load(tile + 4), tl.load(tile + 5)

    head_blocks: tl.constexpr = (PER_KV_HEAD + HEADS - 1) // HEADS
    kv_head = (tl.program_id(1) // head_blocks).to(tl.int64)
    lane = tl.arange(0, BLOCK_QUERIES)
    row = first_row + lane // HEADS
    in_group = (tl.program_id(1) % head_blocks) * HEADS + lane % HEADS
    head = kv_head * PER_KV_HEAD + in_group
    real = (row < end_row) & (in_group < PER_KV_HEAD)
    position = tl.load(row_position + row, mask=row < end_row, other=0)
    variant = tl.load(row_variant + row, mask=row < end_row, other=-1)
    dim, value_lane, key_lane = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_KEYS)
    queries = tl.load(
        query + row[:, None] * query_row + head[:, None] * query_head + dim[None, :] * query_dim,
        mask=real[:, None] & (dim < D_HEAD)[None, :],
        other=0.0,
    )
    highest = tl.full([BLOCK_QUERIES], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_QUERIES], tl.float32)
    total = tl.zeros([BLOCK_QUERIES, BLOCK_V], tl.float32)

    first_prefix = start * 0
    if HAS_WINDOW:
        # The rows of a tile may start over with the next variant, at `start`; one variant alone goes on from its first.
        earliest = tl.min(tl.where(row < end_row, position, start + end_row), 0)
        first_prefix = tl.maximum(earliest - window + 1, 0)
        first_own = tl.maximum(first_own, first_row - window + 1)
        end_own = tl.minimum(end_own, end_row + window - 1)
    prefix_keys = prefix_key + prompt * prefix_key_prompt + kv_head * prefix_key_head
    prefix_values = prefix_value + prompt * prefix_value_prompt + kv_head * prefix_value_head
    for first in range(first_prefix, start, BLOCK_KEYS):
        pos = first + key_lane
        keys = tl.load(
            prefix_keys + pos[None, :] * prefix_key_pos + dim[:, None] * prefix_key_dim,
            mask=(pos < start)[None, :] & (dim < D_HEAD)[:, None],
            other=0.0,
        )
        values = tl.load(
            prefix_values + pos[:, None] * prefix_value_pos + value_lane[None, :] * prefix_value_dim,
            mask=(pos < start)[:, None] & (value_lane < D_VALUE)[None, :],
            other=0.0,
        )
        seen = (pos < start)[None, :]
        if HAS_WINDOW:
            seen = seen & (position[:, None] - pos[None, :] < window)
        scores = tl.where(seen, _scores(queries, keys, scale, softcap, HAS_SOFTCAP), float("-inf"))
        highest, mass, total = _online_softmax(scores, values, highest, mass, total)

    for first in range(first_own, end_own, BLOCK_KEYS):
        own = first + key_lane
        pos = tl.load(row_position + own, mask=own < end_own, other=0)
        owner = tl.load(row_variant + own, mask=own < end_own, other=-2)
        keys = tl.load(
            key + own[None, :] * key_row + kv_head * key_head + dim[:, None] * key_dim,
            mask=(own < end_own)[None, :] & (dim < D_HEAD)[:, None],
            other=0.0,
        )
        values = tl.load(
            value + own[:, None] * value_row + kv_head * value_head + value_lane[None, :] * value_dim,
            mask=(own < end_own)[:, None] & (value_lane < D_VALUE)[None, :],
            other=0.0,
        )
        distance = position[:, None] - pos[None, :]
        seen = owner[None, :] == variant[:, None]
        if CAUSAL:
            seen = seen & (distance >= 0)
        if HAS_WINDOW:
            seen = seen & (distance < window) & (-distance < window)
        scores = tl.where(seen, _scores(queries, keys, scale, softcap, HAS_SOFTCAP), float("-inf"))
        highest, mass, total = _online_softmax(scores, values, highest, mass, total)

    if HAS_SINK:
        sink = tl.load(sink_logits + head, mask=real, other=0.0).to(tl.float32) * _LOG2_E
        # The maximum is finite here: every real query has seen its own key.
        new = tl.maximum(highest, sink)
        shrink = tl.exp2(highest - new)
        mass = mass * shrink + tl.exp2(sink - new)
        total = total * shrink[:, None]
    total = total / tl.where(mass == 0.0, 1.0, mass)[:, None]
    tl.store(
        z + row[:, None] * z_row + head[:, None] * z_head + value_lane[None, :] * z_dim,
        total.to(z.dtype.element_ty),
        mask=real[:, None] & (value_lane < D_VALUE)[None, :],
    )


_TILINGS = (16, 32, 64, 128)
"""Queries (rows times heads) a tile; the table of tiles has a part for each."""


def _config(block_queries: int, block_keys: int, warps: int, stages: int) -> triton.Config:
    blocks = {
        "BLOCK_QUERIES": block_queries,
        "BLOCK_KEYS": block_keys,
        "TILING": _TILINGS.index(block_queries),
    }
    return triton.Config(blocks, num_warps=warps, num_stages=stages)


_CONFIGS = [
    _config(16, 32, warps=4, stages=1),
    _config(32, 32, warps=4, stages=2),
    _config(64, 32, warps=4, stages=3),
    _config(64, 64, warps=4, stages=2),
    _config(128, 64, warps=8, stages=2),
]
INTERPRETED_BLOCKS = {"BLOCK_QUERIES": 32, "BLOCK_KEYS": 16, "TILING": 1}
"""The interpreter is not tuned; small blocks let small tests cross their borders."""


def _fitting(configs: Sequence[triton.Config], named_args: dict[str, object], **meta: int) -> list[triton.Config]:
    """Without the block shapes that cannot fit on the chip with these head and element sizes."""
    query = named_args["query"]
    assert isinstance(query, Tensor)
    a_row = query.element_size() * max(meta["BLOCK_D"], meta["BLOCK_V"])

    def size(config: triton.Config) -> int:
        return a_row * (config.kwargs["BLOCK_QUERIES"] + 2 * config.num_stages * config.kwargs["BLOCK_KEYS"])

    return [config for config in configs if size(config) <= _SHARED_BYTES] or [min(configs, key=size)]


_tuned = triton.autotune(
    configs=_CONFIGS,
    key=["PER_KV_HEAD", "D_HEAD", "D_VALUE", "key_class"],
    prune_configs_by={"early_config_prune": _fitting},
)(_suffix_attention_kernel)


def suffix_attention_triton(
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
    """`suffix_attention` by the kernel; all tensors on one CUDA device, or on the CPU when triton is interpreted.

    The first call with a new head size or a new length of keys tries a few block shapes.

    Raises:
        ValueError: if a head is larger than `MAX_D_HEAD` or the numbers are float64.
    """
    n_rows, n_heads, d_head = query.shape
    n_kv_heads, d_value = value.shape[1:]
    if max(d_head, d_value) > MAX_D_HEAD or query.dtype == torch.float64:
        raise ValueError(
            f"the kernel takes heads up to {MAX_D_HEAD} in float32 or less; use suffix_attention_reference"
        )
    z = query.new_empty(n_rows, n_heads, d_value)
    if not z.numel():
        return z
    per_kv_head = n_heads // n_kv_heads
    heads = min(triton.next_power_of_2(per_kv_head), _HEADS_A_TILE)
    tiles, first_tile, counts = _tiles(layout, heads, causal, query.device)
    grid_heads = n_kv_heads * triton.cdiv(per_kv_head, heads)
    tensors = (query, key, value, prefix_key, prefix_value, z)
    kernel = _suffix_attention_kernel if INTERPRETED else _tuned
    with torch.cuda.device(query.device) if query.is_cuda else contextlib.nullcontext():
        kernel[lambda meta: (counts[meta["TILING"]], grid_heads)](
            *tensors,
            tiles,
            first_tile,
            layout.positions(query.device),
            layout.row_variants(query.device),
            query if sink_logits is None else sink_logits.contiguous(),
            scale,
            1.0 if softcap is None else softcap,
            0 if window is None else window,
            _key_class(layout),
            *(stride for tensor in tensors for stride in tensor.stride()),
            PER_KV_HEAD=per_kv_head,
            D_HEAD=d_head,
            D_VALUE=d_value,
            CAUSAL=causal,
            HAS_SOFTCAP=softcap is not None,
            HAS_WINDOW=window is not None,
            HAS_SINK=sink_logits is not None,
            HEADS=heads,
            BLOCK_D=max(16, triton.next_power_of_2(d_head)),
            BLOCK_V=max(16, triton.next_power_of_2(d_value)),
            **(INTERPRETED_BLOCKS if INTERPRETED else {}),
        )
    return z


def _key_class(layout: SuffixLayout) -> int:
    """Short, middle or long: the block shapes are tuned once for each."""
    longest = max(start + length for start, length in zip(layout.start, layout.length, strict=True))
    return (longest > 64) + (longest > 512)


def _tiles(
    layout: SuffixLayout, heads: int, causal: bool, device: torch.device
) -> tuple[Int[Tensor, "tile 6"], Int[Tensor, " tiling"], list[int]]:
    """The table of tiles for every tiling, where each one's part begins, and how many tiles it has.

    A tile is: prompt, start, first row, end of its rows, first and end of the rows that its queries may attend to.
    """
    name = ("tiles", heads, causal, device)
    if name not in layout.kept:
        parts = [_tiling(layout, max(1, queries // heads), causal) for queries in _TILINGS]
        counts = [len(part) for part in parts]
        first = torch.tensor([sum(counts[:index]) for index in range(len(counts))])
        layout.kept[name] = (torch.cat(parts).to(device), first.to(device), counts)
    return layout.kept[name]


def _tiling(layout: SuffixLayout, rows_a_tile: int, causal: bool) -> Int[Tensor, "tile 6"]:
    """Tiles of up to `rows_a_tile` rows, none of which goes over to another prompt or start."""
    prompt, start, length, first_row = layout.variants(torch.device("cpu")).T
    changes = (prompt.diff() != 0) | (start.diff() != 0)
    run_rows = torch.cat([first_row[:1], first_row[1:][changes], torch.tensor([layout.n_rows])])
    first = torch.cat([torch.arange(a, b, rows_a_tile) for a, b in run_rows.unfold(0, 2, 1).tolist()])
    # A tile ends where the next begins: the last tile of a run may be shorter.
    end = torch.cat([first[1:], run_rows[-1:]])
    which = layout.row_variants(torch.device("cpu"))
    one, last = which[first], which[end - 1]
    end_own = end if causal else first_row[last] + length[last]
    return torch.stack([prompt[one], start[one], first, end, first_row[one], end_own], dim=1)
