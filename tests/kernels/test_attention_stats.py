"""The twin and the Triton kernels against a brute force in float64; without a GPU the kernels run interpreted."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from interp.kernels import attention_stats as twin_module
from interp.kernels import attention_stats_triton as triton_module
from interp.kernels.attention_stats import AttentionStats, attention_stats, attention_stats_reference
from interp.kernels.attention_stats_triton import INTERPRETED, attention_stats_triton
from interp.kernels.visible_keys import VisibleKeys

TRITON_DEVICE = "cpu" if INTERPRETED else "cuda"
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-5, torch.bfloat16: 1e-5}
"""Absolute, and relative beyond 1. Half precision is rounded before the brute force too, and computed in float32."""
OFFSETS = (0, 1, 3, -2, 40)


@dataclass(frozen=True)
class Case:
    """One call."""

    query: Tensor
    key: Tensor
    visible: VisibleKeys
    scale: float = 1.0
    softcap: float | None = None
    sink_logits: Tensor | None = None
    key_sets: Tensor | None = None
    exclude: Tensor | None = None
    offsets: Sequence[int] = OFFSETS

    def run(self, compute: Callable[..., AttentionStats], dtype: torch.dtype, device: str = "cpu") -> AttentionStats:
        """The case by one implementation, in one precision; what comes back is float64 on the CPU."""

        def moved(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            return x.to(device, dtype if x.is_floating_point() else x.dtype)

        visible = replace(self.visible, real=moved(self.visible.real), mask=moved(self.visible.mask))
        names = ("scale", "softcap", "sink_logits", "key_sets", "exclude", "offsets")
        options = {name: moved(getattr(self, name)) for name in names}
        found = compute(moved(self.query), moved(self.key), visible, **options)
        assert all(x.dtype == torch.promote_types(dtype, torch.float32) for x in found if x.is_floating_point())
        return AttentionStats(*(x.cpu().double() for x in found))

    def rounded(self, dtype: torch.dtype) -> Case:
        """With the numbers that this precision makes of them."""
        sinks = None if self.sink_logits is None else self.sink_logits.to(dtype).double()
        return replace(self, query=self.query.to(dtype).double(), key=self.key.to(dtype).double(), sink_logits=sinks)


def brute_force(case: Case) -> AttentionStats:
    """Row by row and key by key, from the definitions, in float64."""
    visible, n_batch, (n_heads, n_queries) = case.visible, len(case.query), case.query.shape[1:3]
    n_keys = case.key.shape[2]
    keys = case.key.repeat_interleave(n_heads // case.key.shape[1], dim=1)
    scores = torch.einsum("bhqd,bhkd->bhqk", case.query, keys) * case.scale
    if case.softcap is not None:
        scores = (scores / case.softcap).tanh() * case.softcap
    seen = torch.ones_like(scores, dtype=torch.bool)
    position = [n_keys - n_queries + row for row in range(n_queries)]
    for b, row, k in ((b, row, k) for b in range(n_batch) for row in range(n_queries) for k in range(n_keys)):
        distance = position[row] - k
        seen[b, :, row, k] &= distance >= 0 or not visible.causal
        seen[b, :, row, k] &= visible.window is None or abs(distance) < visible.window
        if visible.real is not None:
            seen[b, :, row, k] &= bool(visible.real[b, k] and visible.real[b, position[row]])
    if visible.mask is not None and visible.mask.dtype == torch.bool:
        seen &= visible.mask
    elif visible.mask is not None:
        scores, seen = scores + visible.mask, seen & (visible.mask > -1e30)
    weights = scores.exp() * seen
    mass = weights.sum(-1)
    if case.sink_logits is not None:
        mass = mass + case.sink_logits.exp()[:, None]
    pattern = (weights / mass[..., None]).nan_to_num(0)
    empty = ~seen.any(-1)
    left = seen if case.exclude is None else seen & ~case.exclude[:, None, None]
    kept = pattern * left / (pattern * left).sum(-1, keepdim=True)
    away = (torch.tensor(position)[:, None] - torch.arange(n_keys)).abs()
    stripes = torch.full((len(case.offsets), n_batch, n_heads, n_queries), math.nan, dtype=torch.float64)
    for index, offset in enumerate(case.offsets):
        for row in range(n_queries):
            if 0 <= position[row] - offset < n_keys:
                stripes[index, :, :, row] = pattern[:, :, row, position[row] - offset]
    sets = torch.zeros(0, n_batch, n_keys) if case.key_sets is None else case.key_sets
    return AttentionStats(
        received=pattern.sum(2),
        n_queries=seen.sum(2).double(),
        mass=torch.stack([*((pattern * one[:, None, None]).sum(-1) for one in sets), pattern.sum(-1)])[:-1].masked_fill(
            empty, math.nan
        ),
        maximum=pattern.amax(-1).masked_fill(empty, math.nan),
        entropy=torch.special.entr(kept).sum(-1),
        distance=(kept * away).sum(-1),
        n_keys=left.sum(-1).double(),
        stripes=stripes.masked_fill(empty, math.nan),
    )


def make_case(
    *,
    n_batch: int = 2,
    n_kv_heads: int = 2,
    per_kv_head: int = 2,
    n_queries: int = 11,
    n_keys: int = 11,
    d_head: int = 8,
    causal: bool = True,
    window: int | None = None,
    padding: bool = False,
    mask: str | None = None,
    sink: bool = False,
    n_sets: int = 2,
    exclude: bool = False,
    seed: int = 0,
    **options: Any,
) -> Case:
    """Random float64 numbers."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    n_heads = n_kv_heads * per_kv_head
    query, key = random(n_batch, n_heads, n_queries, d_head), random(n_batch, n_kv_heads, n_keys, d_head)
    real = random(n_batch, n_keys) > -0.8 if padding else None
    masks = {
        None: lambda: None,
        "bool": lambda: random(1, 1, n_queries, n_keys) > -0.5,
        "bias": lambda: random(n_batch, n_heads, n_queries, n_keys),
        "float": lambda: torch.where(random(n_batch, 1, n_queries, n_keys) > -0.5, 0.0, torch.finfo(torch.half).min),
    }
    visible = VisibleKeys(n_queries, n_keys, causal=causal, window=window, real=real, mask=masks[mask]())
    return Case(
        query,
        key,
        visible,
        scale=1.5 / math.sqrt(d_head),
        sink_logits=random(n_heads) if sink else None,
        key_sets=random(n_sets, n_batch, n_keys) > 0 if n_sets else None,
        exclude=random(n_batch, n_keys) > 0.7 if exclude else None,
        **options,
    )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Odd sizes, length 1, every option."""
    n_keys = draw(st.integers(1, 40))
    return make_case(
        n_batch=draw(st.integers(1, 3)),
        n_kv_heads=draw(st.sampled_from([1, 2, 3])),
        per_kv_head=draw(st.sampled_from([1, 2, 3])),
        n_queries=n_keys if draw(st.booleans()) else draw(st.integers(1, n_keys)),
        n_keys=n_keys,
        d_head=draw(st.sampled_from([1, 3, 8, 17])),
        causal=draw(st.booleans()),
        window=draw(st.sampled_from([None, 1, 2, 7])),
        padding=draw(st.booleans()),
        sink=draw(st.booleans()),
        n_sets=draw(st.integers(0, 3)),
        exclude=draw(st.booleans()),
        softcap=draw(st.sampled_from([None, 1.5])),
        seed=draw(st.integers(0, 1000)),
    )


def check(case: Case, compute: Callable[..., AttentionStats], dtype: torch.dtype) -> None:
    device = TRITON_DEVICE if compute is attention_stats_triton else "cpu"
    case = case.rounded(dtype)
    for name, value, expected in zip(
        AttentionStats._fields, case.run(compute, dtype, device), brute_force(case), strict=True
    ):
        torch.testing.assert_close(
            value,
            expected,
            atol=TOLERANCE[dtype],
            rtol=TOLERANCE[dtype],
            equal_nan=True,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@given(case=cases())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_twin_equals_brute_force(case: Case) -> None:
    check(case, attention_stats_reference, torch.float64)


@given(case=cases())
@settings(max_examples=18, deadline=None, derandomize=True)
def test_kernels_equal_brute_force(case: Case) -> None:
    check(case, attention_stats_triton, torch.float32)


BOTH = pytest.mark.parametrize("compute", [attention_stats_reference, attention_stats_triton], ids=["twin", "triton"])


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_precision(compute: Callable[..., AttentionStats], dtype: torch.dtype) -> None:
    check(make_case(sink=True, softcap=2.0, window=4), compute, dtype)
    check(make_case(causal=False, exclude=True, padding=True, n_queries=5), compute, dtype)


@BOTH
def test_blocks_meet_their_borders(compute: Callable[..., AttentionStats], monkeypatch: pytest.MonkeyPatch) -> None:
    """More queries and keys than a block of either implementation."""
    monkeypatch.setattr(twin_module, "SCORE_BYTES", 1)
    sizes = {"n_batch": 1, "n_kv_heads": 1, "n_keys": 70}
    check(make_case(n_queries=70, **sizes), compute, torch.float32)
    check(make_case(n_queries=37, window=9, exclude=True, padding=True, **sizes), compute, torch.float32)
    check(make_case(n_queries=50, window=20, causal=False, sink=True, **sizes), compute, torch.float32)


@pytest.mark.parametrize("mask", ["bool", "float", "bias"])
@pytest.mark.parametrize("causal", [True, False])
def test_twin_reads_masks_in_blocks(monkeypatch: pytest.MonkeyPatch, mask: str, causal: bool) -> None:
    case = make_case(mask=mask, causal=causal, exclude=True, n_queries=19, n_keys=23, n_batch=3)
    check(case, attention_stats_reference, torch.float64)
    monkeypatch.setattr(twin_module, "SCORE_BYTES", 1)
    monkeypatch.setattr("interp.kernels.visible_keys._BLOCK", 4)
    check(case, attention_stats_reference, torch.float64)


@BOTH
def test_inputs_need_not_be_contiguous(compute: Callable[..., AttentionStats]) -> None:
    case = make_case(per_kv_head=3)

    def scattered(x: Tensor) -> Tensor:
        """The same numbers with the axes in reverse order in memory, and gaps between them."""
        gaps = torch.full((2 * x.shape[-1], *reversed(x.shape[:-1])), float("nan"), dtype=x.dtype)
        strided = gaps[::2].permute(*reversed(range(x.ndim)))
        strided.copy_(x)
        return strided

    strided = replace(case, query=scattered(case.query), key=scattered(case.key))
    found = strided.run(
        compute, torch.float64 if compute is attention_stats_reference else torch.float32, TRITON_DEVICE
    )
    for value, expected in zip(found, brute_force(case), strict=True):
        torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-5, equal_nan=True)


@BOTH
def test_large_scores_do_not_overflow(compute: Callable[..., AttentionStats]) -> None:
    case = replace(make_case(n_sets=1), scale=60.0)
    found = case.run(compute, torch.float32, TRITON_DEVICE if compute is attention_stats_triton else "cpu")
    expected = replace(case.rounded(torch.float32)).run(attention_stats_reference, torch.float64)
    # A score of a few hundred is rounded to 1e-5 of itself, which moves its weight by that much.
    torch.testing.assert_close(found.received, expected.received, atol=5e-3, rtol=0)
    torch.testing.assert_close(found.entropy, expected.entropy, atol=5e-3, rtol=0, equal_nan=True)


@BOTH
def test_uniform_attention_is_known_exactly(compute: Callable[..., AttentionStats]) -> None:
    length = 12
    key_sets = torch.zeros(1, 1, length, dtype=torch.bool)
    key_sets[..., 0] = True
    case = replace(make_case(n_batch=1, n_keys=length, n_queries=length), key_sets=key_sets, scale=0.0)
    found = case.run(compute, torch.float32, TRITON_DEVICE if compute is attention_stats_triton else "cpu")
    n = torch.arange(1, length + 1).double()
    for value, expected in (
        (found.entropy, n.log()),
        (found.maximum, 1 / n),
        (found.mass[0], 1 / n),
        (found.distance, (n - 1) / 2),
        (found.n_keys, n),
        (found.n_queries, n.flip(0)),
        (found.received, (1 / n).flip(0).cumsum(0).flip(0)),
    ):
        torch.testing.assert_close(value, expected.expand(value.shape), atol=1e-6, rtol=1e-6)


def test_twin_holds_memory_linear_in_the_length() -> None:
    """No tensor that it makes is larger than a few rows of the pattern."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            made = [x for x in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(x, Tensor)]
            largest = max([largest, *(x.untyped_storage().nbytes() for x in made)])
            return out

    query, key = torch.randn(1, 3, 4096, 16), torch.randn(1, 1, 4096, 16)
    with Watch():
        attention_stats(query, key, scale=0.25, offsets=(1,))
    assert largest <= twin_module.SCORE_BYTES
    assert largest < 4 * 3 * 4096**2 / 40


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from interp.kernels.attention_stats_triton import _columns_kernel, _rows_kernel

options = dict(PER_KV_HEAD=3, D_HEAD=64, CAUSAL=True, HAS_WINDOW=True, HAS_REAL=True, HAS_SOFTCAP=True, BLOCK_D=64)
options |= dict(BLOCK_QUERIES=64, BLOCK_KEYS=64)
for kernel, constants in ((_rows_kernel, options | dict(N_COLUMNS=5, BLOCK_COLUMNS=16)), (_columns_kernel, options)):
    types = dict.fromkeys(["query", "key"], "*bf16") | {"real": "*i8"}
    types |= dict.fromkeys(["columns", "totals", "highest_out", "spread_out", "reach_out"], "*fp32")
    types |= dict.fromkeys(["log_sums", "received"], "*fp32")
    types |= dict.fromkeys(["scale", "softcap"], "fp32") | dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "i32") for name in kernel.arg_names},
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
    )
    assert triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm["cubin"]
"""


def test_kernels_compile_for_a_gpu_that_is_not_here(tmp_path: Path) -> None:
    """The interpreter accepts more than the compiler, which needs no GPU to run."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    script = tmp_path / "compile.py"
    script.write_text(COMPILE)
    subprocess.run([sys.executable, "-W", "ignore", script], check=True, env=environment)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": torch.zeros(2, 2, 11, 7)}, "give them the same"),
        ({"key": torch.zeros(2, 3, 11, 8)}, "share 3 key/value heads"),
        ({"key": torch.zeros(2, 2, 5, 8)}, "11 queries cannot be the last rows of 5 keys"),
        ({"window": 0}, "window=0"),
        ({"sink_logits": torch.zeros(7)}, r"sink_logits is \[7\]"),
        ({"real": torch.ones(2, 3, dtype=torch.bool)}, r"real is \[2, 3\]"),
        ({"key_sets": torch.ones(1, 2, 3, dtype=torch.bool)}, r"it must be \[1, 2, 11\]"),
        ({"mask": torch.ones(2, 11, 11, dtype=torch.bool)}, r"mask is \[2, 11, 11\]"),
    ],
)
def test_bad_input_is_refused(change: dict[str, Any], message: str) -> None:
    arguments = {"query": torch.zeros(2, 4, 11, 8), "key": torch.zeros(2, 2, 11, 8), "scale": 1.0, **change}
    with pytest.raises(ValueError, match=message):
        attention_stats(arguments.pop("query"), arguments.pop("key"), **arguments)


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU the block shapes are given by the head size")
@pytest.mark.parametrize("blocks", [(16, 16), (16, 64), (64, 32)])
def test_kernels_do_not_depend_on_their_block_shape(monkeypatch: pytest.MonkeyPatch, blocks: tuple[int, int]) -> None:
    monkeypatch.setattr(triton_module, "INTERPRETED_BLOCKS", {"BLOCK_QUERIES": blocks[0], "BLOCK_KEYS": blocks[1]})
    check(make_case(n_keys=40, n_queries=33, window=9, sink=True, exclude=True), attention_stats_triton, torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_everything_on_the_gpu() -> None:
    """This file again in a process of its own, since triton decides when it is imported whether it interprets."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", __file__]
    subprocess.run(command, check=True, env=environment)
