"""The twin and the Triton kernel against a brute force in float64; without a GPU the kernel runs interpreted."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from interp.kernels import suffix_attention as twin_module
from interp.kernels import suffix_attention_triton as triton_module
from interp.kernels.suffix_attention import SuffixLayout, suffix_attention, suffix_attention_reference
from interp.kernels.suffix_attention_triton import INTERPRETED, suffix_attention_triton

TRITON_DEVICE = "cpu" if INTERPRETED else "cuda"
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Absolute, for values of about 1. In half precision the inputs are rounded before the brute force too, so what is left
is the rounding of the output, and in the kernel of the attention weights."""
N_PROMPTS, LONGEST_PREFIX = 3, 6


@dataclass(frozen=True)
class Case:
    """One call."""

    query: Tensor
    key: Tensor
    value: Tensor
    prefix_key: Tensor
    prefix_value: Tensor
    layout: SuffixLayout
    options: Mapping[str, Any]

    def to(self, target: torch.device | torch.dtype | str) -> Case:
        """The same case with all tensors moved or rounded."""

        def move(x: Any) -> Any:
            return x.to(target) if isinstance(x, Tensor) else x

        options = {name: move(option) for name, option in self.options.items()}
        tensors = {field.name: move(getattr(self, field.name)) for field in dataclasses.fields(self)}
        return Case(**{**tensors, "options": options})

    def run(self, attend: Callable[..., Tensor]) -> Tensor:
        """The case by one implementation."""
        tensors = (self.query, self.key, self.value, self.prefix_key, self.prefix_value)
        return attend(*tensors, self.layout, **self.options)


def brute_force(case: Case) -> Tensor:
    """Row by row and head by head, in float64, from the definition."""
    query, key, value = case.query.double(), case.key.double(), case.value.double()
    options = {"causal": True, "softcap": None, "window": None, "sink_logits": None, **case.options}
    per_kv_head = query.shape[1] // key.shape[1]
    z = torch.zeros(query.shape[0], query.shape[1], value.shape[2], dtype=torch.float64)
    row = 0
    for prompt, start, length in zip(case.layout.prompt, case.layout.start, case.layout.length, strict=True):
        keys = torch.cat([case.prefix_key[prompt, :start].double(), key[row : row + length]])
        values = torch.cat([case.prefix_value[prompt, :start].double(), value[row : row + length]])
        for i in range(start, start + length):
            seen = [
                j
                for j in range(start + length)
                if (j <= i or not options["causal"]) and (options["window"] is None or abs(i - j) < options["window"])
            ]
            for head in range(query.shape[1]):
                scores = keys[seen, head // per_kv_head] @ query[row + i - start, head] * options["scale"]
                if options["softcap"] is not None:
                    scores = (scores / options["softcap"]).tanh() * options["softcap"]
                weights = scores.exp()
                mass = weights.sum()
                if options["sink_logits"] is not None:
                    mass = mass + options["sink_logits"][head].double().exp()
                z[row + i - start, head] = weights / mass @ values[seen, head // per_kv_head]
        row += length
    return z


def make_case(
    variants: list[tuple[int, int, int]],
    *,
    n_kv_heads: int = 2,
    per_kv_head: int = 2,
    d_head: int = 8,
    d_value: int = 8,
    sink: bool = False,
    seed: int = 0,
    **options: Any,
) -> Case:
    """Random float64 numbers for variants given as (prompt, start, length)."""
    prompt, start, length = (tuple(column) for column in zip(*variants, strict=True))
    layout = SuffixLayout(prompt, start, length)
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    n_heads, n_pos = n_kv_heads * per_kv_head, max(LONGEST_PREFIX, *start)
    return Case(
        random(layout.n_rows, n_heads, d_head),
        random(layout.n_rows, n_kv_heads, d_head),
        random(layout.n_rows, n_kv_heads, d_value),
        random(N_PROMPTS, n_pos, n_kv_heads, d_head),
        random(N_PROMPTS, n_pos, n_kv_heads, d_value),
        layout,
        {"scale": 1.5 / math.sqrt(d_head), "sink_logits": random(n_heads) if sink else None, **options},
    )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Few to many variants in mixed order, some of them repeated; odd sizes; every option."""
    runs = draw(
        st.lists(
            st.tuples(
                st.integers(0, N_PROMPTS - 1), st.integers(0, LONGEST_PREFIX), st.integers(1, 5), st.integers(1, 4)
            ),
            min_size=1,
            max_size=4,
        )
    )
    return make_case(
        [(prompt, start, length) for prompt, start, length, repeats in runs for _ in range(repeats)],
        n_kv_heads=draw(st.sampled_from([1, 2, 3])),
        per_kv_head=draw(st.sampled_from([1, 2, 3, 5])),
        d_head=draw(st.sampled_from([1, 3, 8, 17])),
        d_value=draw(st.sampled_from([1, 6, 16, 20])),
        sink=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
        causal=draw(st.booleans()),
        softcap=draw(st.sampled_from([None, 1.5])),
        window=draw(st.sampled_from([None, 1, 2, 4])),
    )


def check(case: Case, attend: Callable[..., Tensor], dtype: torch.dtype) -> None:
    rounded = case.to(dtype)
    on_device = rounded.to(TRITON_DEVICE) if attend is suffix_attention_triton else rounded
    z = on_device.run(attend)
    assert z.dtype == dtype
    torch.testing.assert_close(z.double().cpu(), brute_force(rounded), atol=TOLERANCE[dtype], rtol=0)


@given(case=cases())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_twin_equals_brute_force(case: Case) -> None:
    check(case, suffix_attention_reference, torch.float64)


@given(case=cases())
@settings(max_examples=25, deadline=None, derandomize=True)
def test_kernel_equals_brute_force(case: Case) -> None:
    check(case, suffix_attention_triton, torch.float32)


MIXED = [(2, 3, 4), (2, 3, 4), (0, 0, 5), (1, 6, 1), (2, 3, 4), (1, 6, 1), (0, 2, 3), (0, 2, 2)]
"""Prompts and starts in mixed order, an empty prefix, suffixes of one row, two lengths after one prefix."""
BOTH = pytest.mark.parametrize("attend", [suffix_attention_reference, suffix_attention_triton], ids=["twin", "triton"])


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_precision(attend: Callable[..., Tensor], dtype: torch.dtype) -> None:
    check(make_case(MIXED, sink=True, softcap=2.0, window=4), attend, dtype)
    check(make_case(MIXED, causal=False), attend, dtype)


@BOTH
@pytest.mark.parametrize("d_head", [1, 2, 33, 80, 192, 256])
def test_every_head_size(attend: Callable[..., Tensor], d_head: int) -> None:
    check(make_case(MIXED[:4], d_head=d_head, d_value=max(1, d_head - 1)), attend, torch.float32)


@BOTH
def test_more_heads_and_rows_than_a_tile(attend: Callable[..., Tensor]) -> None:
    """A key/value head with more query heads than a tile holds; one long suffix; more short ones than a tile holds."""
    check(make_case([(0, 5, 37), (1, 40, 3)], n_kv_heads=1, per_kv_head=19), attend, torch.float32)
    check(make_case([(0, 5, 90), (1, 70, 2)], per_kv_head=1, window=20), attend, torch.float32)
    check(make_case([(0, 5, 40)], per_kv_head=1, window=7, causal=False), attend, torch.float32)
    check(make_case([(1, 4, 2)] * 50), attend, torch.float32)


@BOTH
def test_inputs_need_not_be_contiguous(attend: Callable[..., Tensor]) -> None:
    case = make_case(MIXED, per_kv_head=3, window=3).to(torch.float32)

    def scattered(x: Tensor) -> Tensor:
        """The same numbers with the axes in reverse order in memory, and gaps between them."""
        gaps = torch.full((*reversed(x.shape[:-1]), 2 * x.shape[-1]), float("nan"), dtype=x.dtype)
        strided = gaps[..., ::2].permute(*reversed(range(x.ndim - 1)), x.ndim - 1)
        strided.copy_(x)
        return strided

    tensors = ("query", "key", "value", "prefix_key", "prefix_value")
    strided = dataclasses.replace(case, **{name: scattered(getattr(case, name)) for name in tensors})
    assert not strided.query.is_contiguous()
    check(strided, attend, torch.float32)


@BOTH
def test_large_scores_do_not_overflow(attend: Callable[..., Tensor]) -> None:
    case = make_case(MIXED, sink=True, scale=60.0)
    z = case.to(torch.float32).to(TRITON_DEVICE if attend is suffix_attention_triton else "cpu").run(attend)
    # A score of a few hundred is rounded to 1e-5 of itself, which moves its weight by that much.
    torch.testing.assert_close(z.cpu().double(), case.run(suffix_attention_reference), atol=2e-3, rtol=0)


@BOTH
def test_base_positions_after_the_start_are_not_read(attend: Callable[..., Tensor]) -> None:
    case = make_case([(0, 2, 3), (0, 2, 3), (1, 4, 1)]).to(torch.float32)
    case.prefix_key[0, 2:], case.prefix_value[0, 2:], case.prefix_key[1, 4:] = math.nan, math.nan, math.inf
    case.prefix_value[1, 4:], case.prefix_key[2] = math.inf, math.nan
    check(case, attend, torch.float32)


@pytest.mark.parametrize("budget", [1, 400, 3000])
@pytest.mark.parametrize("options", [{}, {"window": 3}, {"causal": False}, {"causal": False, "window": 2}], ids=str)
def test_twin_does_not_depend_on_its_byte_budget(
    monkeypatch: pytest.MonkeyPatch, budget: int, options: dict[str, Any]
) -> None:
    case = make_case([(2, 3, 9)] * 4 + MIXED, **options)
    monkeypatch.setattr(twin_module, "SCORE_BYTES", budget)
    check(case, suffix_attention_reference, torch.float64)


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU the block shapes are tuned")
@pytest.mark.parametrize("config", triton_module._CONFIGS, ids=str)
def test_kernel_does_not_depend_on_its_block_shape(monkeypatch: pytest.MonkeyPatch, config: Any) -> None:
    monkeypatch.setattr(triton_module, "INTERPRETED_BLOCKS", config.kwargs)
    check(
        make_case([(2, 3, 30)] * 3 + MIXED, per_kv_head=3, window=9, sink=True), suffix_attention_triton, torch.float32
    )


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from interp.kernels.suffix_attention_triton import _CONFIGS, _suffix_attention_kernel as kernel

constants = dict(PER_KV_HEAD=3, D_HEAD=64, D_VALUE=64, CAUSAL=True, HAS_SOFTCAP=True, HAS_WINDOW=True, HAS_SINK=True)
constants |= dict(HEADS=4, BLOCK_D=64, BLOCK_V=64, **_CONFIGS[2].kwargs)
types = dict.fromkeys(["query", "key", "value", "prefix_key", "prefix_value", "z", "sink_logits"], "*bf16")
types |= dict.fromkeys(["tiles", "first_tile", "row_position", "row_variant"], "*i64")
types |= dict.fromkeys(["scale", "softcap"], "fp32") | dict.fromkeys(constants, "constexpr")
source = ASTSource(
    fn=kernel,
    signature={name: types.get(name, "i32") for name in kernel.arg_names},
    constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
)
assert triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm["cubin"]
"""


def test_kernel_compiles_for_a_gpu_that_is_not_here(tmp_path: Path) -> None:
    """The interpreter accepts more than the compiler, which needs no GPU to run."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    script = tmp_path / "compile.py"
    script.write_text(COMPILE)
    subprocess.run([sys.executable, "-W", "ignore", script], check=True, env=environment)


def test_layout_says_what_each_row_is() -> None:
    layout = SuffixLayout(prompt=(1, 1, 0, 1), start=(2, 2, 0, 2), length=(2, 2, 3, 2))
    cpu = torch.device("cpu")
    assert layout.n_rows == 9
    assert layout.first_row == (0, 2, 4, 7)
    assert [(group.prompt, group.n_variants, group.rows) for group in layout.groups] == [
        (1, 2, slice(0, 4)),
        (0, 1, slice(4, 7)),
        (1, 1, slice(7, 9)),
    ]
    assert layout.positions(cpu).tolist() == [2, 3, 2, 3, 0, 1, 2, 2, 3]
    assert layout.row_variants(cpu).tolist() == [0, 0, 1, 1, 2, 2, 2, 3, 3]
    assert layout.variants(cpu).tolist() == [[1, 2, 2, 0], [1, 2, 2, 2], [0, 0, 3, 4], [1, 2, 2, 7]]


def test_an_empty_layout_gives_no_rows() -> None:
    layout = SuffixLayout((), (), ())
    rows, prefix = torch.zeros(0, 2, 4), torch.zeros(1, 3, 2, 4)
    assert suffix_attention(rows, rows, rows, prefix, prefix, layout, scale=1.0).shape == (0, 2, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda case: {"query": case.query[1:]}, "query is"),
        (lambda case: {"prefix_value": case.prefix_value[:, 1:]}, "prefix_key is"),
        (lambda case: {"key": case.key[:, :1]}, "must be"),
        (lambda case: {"value": case.value.float()}, "give them the same dtype"),
        (lambda case: {"layout": SuffixLayout((5,), (0,), (case.layout.n_rows,))}, "beyond those given"),
        (lambda case: {"options": {"scale": 1.0, "window": 0}}, "window=0"),
        (lambda case: {"options": {"scale": 1.0, "sink_logits": torch.zeros(7)}}, "one a query head"),
    ],
)
def test_bad_input_is_refused(change: Callable[[Case], dict[str, Any]], message: str) -> None:
    case = make_case(MIXED)
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(case, **change(case)).run(suffix_attention)


@pytest.mark.parametrize(("start", "length"), [((0,), (1, 2)), ((0,), (0,)), ((-1,), (1,))])
def test_impossible_layouts_are_refused(start: tuple[int, ...], length: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="layout"):
        SuffixLayout((0,), start, length)


def test_importing_the_room_does_not_import_triton() -> None:
    """Where the package alone does not: machines without triton use the twin."""
    code = "import interp, sys; before = 'triton' in sys.modules; import interp.kernels.suffix_attention;"
    code += " assert ('triton' in sys.modules) == before"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_everything_on_the_gpu() -> None:
    """This file again in a process of its own, since triton decides when it is imported whether it interprets."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", __file__]
    subprocess.run(command, check=True, env=environment)
