"""Twin and kernels against dense products in float64; without a GPU the kernels run interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from interp.kernels.sparse_decode import (
    scatter_rows,
    scatter_rows_reference,
    sparse_decode,
    sparse_decode_reference,
)
from interp.kernels.sparse_decode_triton import INTERPRETED, scatter_rows_triton, sparse_decode_triton
from interp.kernels.topk_encode import topk_encode

TRITON_DEVICE = "cpu" if INTERPRETED else "cuda"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 6e-2, torch.float16: 8e-3}
"""Absolute, for sums of about 3; in half precision what is left is the rounding of the result."""
DECODERS = pytest.mark.parametrize("decode", [sparse_decode_reference, sparse_decode_triton], ids=["twin", "triton"])
SCATTERS = pytest.mark.parametrize("scatter", [scatter_rows_reference, scatter_rows_triton], ids=["twin", "triton"])
SIZES = pytest.mark.parametrize(
    ("n_tokens", "k", "d", "n_rows"), [(7, 3, 37, 11), (1, 1, 1, 1), (5, 9, 16, 4), (3, 5, 33, 100)]
)
"""Odd sizes, single ones, an index several times in a token, most rows without an entry."""


def case(n_tokens: int, k: int, d: int, n_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(n_rows, (n_tokens, k), generator=generator)
    values = torch.randn(n_tokens, k, generator=generator, dtype=torch.float64)
    return indices, values, torch.randn(n_rows, d, generator=generator, dtype=torch.float64)


def code(indices: Tensor, values: Tensor, n_rows: int) -> Tensor:
    """The dense [token, row] matrix that indices and values stand for."""
    return values.new_zeros(len(indices), n_rows).scatter_add(1, indices, values)


def device_of(function: Callable[..., Tensor]) -> str:
    return TRITON_DEVICE if function in (sparse_decode_triton, scatter_rows_triton) else "cpu"


@DECODERS
@SIZES
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_decode_and_its_gradients_equal_a_dense_product(
    decode: Callable[..., Tensor], n_tokens: int, k: int, d: int, n_rows: int, dtype: torch.dtype
) -> None:
    indices, *exact = case(n_tokens, k, d, n_rows)
    rounded = [one.to(dtype).to(device_of(decode)).requires_grad_() for one in exact]
    wide = [one.detach().double().cpu().requires_grad_() for one in rounded]
    slope = torch.randn(n_tokens, d, generator=torch.Generator().manual_seed(1), dtype=dtype)
    out = decode(indices.to(device_of(decode)), *rounded)
    expected = code(indices, wide[0], n_rows) @ wide[1]
    out.backward(slope.to(out.device))
    expected.backward(slope.double())
    close = {"atol": TOLERANCE[dtype] * max(1, d**0.5 / 4), "rtol": TOLERANCE[dtype]}
    torch.testing.assert_close(out.detach().cpu().double(), expected.detach(), **close)
    for ours, theirs in zip(rounded, wide, strict=True):
        assert ours.grad is not None
        torch.testing.assert_close(ours.grad.cpu().double(), theirs.grad, **close)


@SCATTERS
@SIZES
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_scatter_equals_a_dense_product(
    scatter: Callable[..., Tensor], n_tokens: int, k: int, d: int, n_rows: int, dtype: torch.dtype
) -> None:
    indices, values, _ = case(n_tokens, k, d, n_rows)
    values, rows = values.to(dtype), torch.randn(n_tokens, d, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = code(indices, values.double(), n_rows).T @ rows.double()
    moved = [one.to(device_of(scatter)) for one in (indices, values, rows)]
    out = scatter(*moved, n_rows).cpu().double()
    torch.testing.assert_close(out, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@DECODERS
def test_inputs_need_not_be_contiguous(decode: Callable[..., Tensor]) -> None:
    indices, values, decoder = (one.to(device_of(decode)) for one in case(6, 4, 20, 9))
    values, decoder = values.float(), decoder.float()
    expected = sparse_decode_reference(indices.cpu(), values.cpu(), decoder.cpu())
    strided = (indices.T.contiguous().T, *(one.T.contiguous().T.requires_grad_() for one in (values, decoder)))
    out = decode(*strided)
    torch.testing.assert_close(out.detach().cpu(), expected)
    out.sum().backward()  # the gradient of a sum is an expanded, zero-stride tensor
    assert strided[1].grad is not None
    assert strided[2].grad is not None
    torch.testing.assert_close(strided[1].grad, decoder[indices].sum(-1))
    torch.testing.assert_close(strided[2].grad.cpu(), code(indices, values, 9).sum(0).cpu()[:, None].expand(-1, 20))


@DECODERS
def test_nothing_selected_is_zero(decode: Callable[..., Tensor]) -> None:
    none = torch.zeros(3, 0, dtype=torch.int64, device=device_of(decode))
    decoder = torch.ones(5, 4, device=none.device)
    assert torch.equal(decode(none, none.float(), decoder).cpu(), torch.zeros(3, 4))
    assert decode(none[:0], none[:0].float(), decoder).shape == (0, 4)


@SCATTERS
def test_scatter_is_the_same_every_time(scatter: Callable[..., Tensor]) -> None:
    indices, values, _ = case(20, 6, 1, 5)
    rows = torch.randn(20, 40)
    moved = [one.to(device_of(scatter)) for one in (indices, values.float(), rows)]
    first = scatter(*moved, 5)
    assert all(torch.equal(scatter(*moved, 5), first) for _ in range(3))


def test_gradients_of_the_twin_by_finite_differences() -> None:
    indices, values, decoder = case(4, 3, 5, 6)
    inputs = (indices, values.requires_grad_(), decoder.requires_grad_())
    assert torch.autograd.gradcheck(sparse_decode, inputs)


@pytest.mark.parametrize("shifted", [True, False])
def test_top_k_encoding_equals_the_dense_one(shifted: bool) -> None:
    """Values, and the gradients to all four inputs, against autograd through the whole product."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(9, 6), (6,), (6, 20), (20,)]
    ours = [torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
    theirs = [one.detach().clone().requires_grad_() for one in ours]
    values, indices, pre_activations = topk_encode(ours[0], ours[1] if shifted else None, ours[2], ours[3], 4)
    x, shift, encoder, bias = theirs
    dense = (x - shift if shifted else x) @ encoder + bias
    assert not pre_activations.requires_grad
    torch.testing.assert_close(pre_activations, dense.detach())
    expected, chosen = dense.topk(4, dim=-1)
    order = values.argsort(-1, descending=True)
    assert torch.equal(indices.gather(1, order), chosen)
    torch.testing.assert_close(values.gather(1, order), expected)
    slope = torch.randn(9, 20, generator=generator, dtype=torch.float64)
    (values * slope.gather(1, indices)).sum().backward()
    (expected * slope.gather(1, chosen)).sum().backward()
    for one, other in zip(ours, theirs, strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize(("n_tokens", "k", "n_rows"), [(2050, 3, 48), (5, 4, 64), (0, 3, 64), (3, 1, 16), (4, 9, 64)])
def test_top_k_encoding_in_blocks_and_groups_finds_the_same(n_tokens: int, k: int, n_rows: int) -> None:
    """More tokens than a block, widths that are groups of columns, few and many groups for each k; ties are many."""
    generator = torch.Generator().manual_seed(0)
    x, encoder = (torch.randint(-2, 3, shape, generator=generator).float() for shape in ((n_tokens, 3), (3, n_rows)))
    dense = x @ encoder
    for keep in (True, False):
        values, indices, kept = topk_encode(x, None, encoder, torch.zeros(n_rows), k, keep=keep)
        assert torch.equal(values, dense.gather(1, indices))
        assert torch.equal(values.sort(1, descending=True).values, dense.topk(k).values)
        assert all(len(row.unique()) == k for row in indices)
        assert torch.equal(kept, dense if keep else dense[:0])


def test_top_k_encoding_makes_only_the_gradients_asked_for() -> None:
    x, encoder, bias = torch.randn(3, 4), torch.randn(4, 6, requires_grad=True), torch.randn(6)
    topk_encode(x, None, encoder, bias, 2)[0].sum().backward()
    assert encoder.grad is not None
    assert bias.grad is None
    assert x.grad is None


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from interp.kernels import sparse_decode_triton as kernels

for kernel in (kernels._decode_kernel, kernels._values_kernel, kernels._scatter_kernel):
    types = dict.fromkeys(["indices", "entries", "first_entry"], "*i64")
    types |= dict.fromkeys(["values", "decoder", "gradient", "rows", "out"], "*bf16")
    constants = {name: 512 if name == "BLOCK_D" else 8 for name in kernel.arg_names if name.startswith("BLOCK")}
    types |= dict.fromkeys(constants, "constexpr")
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
        ({"values": torch.zeros(2, 4)}, r"they must be \[token, k\] twice"),
        ({"values": torch.zeros(2, 3).double()}, "of one dtype"),
        ({"indices": torch.zeros(2, 3, dtype=torch.int32)}, "indices must be int64"),
    ],
)
def test_bad_input_is_refused(change: dict[str, Tensor], message: str) -> None:
    good = {
        "indices": torch.zeros(2, 3, dtype=torch.int64),
        "values": torch.zeros(2, 3),
        "decoder": torch.zeros(5, 6),
    }
    with pytest.raises(ValueError, match=message):
        sparse_decode(**{**good, **change})


def test_more_refusals() -> None:
    indices, values, rows = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3), torch.zeros(4, 6)
    with pytest.raises(ValueError, match="2 tokens of indices and 4 rows"):
        scatter_rows(indices, values, rows, 5)
    with pytest.raises(ValueError, match=r"k=7 is outside 1\.\.6"):
        topk_encode(torch.zeros(2, 4), None, torch.zeros(4, 6), torch.zeros(6), 7)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_everything_on_the_gpu() -> None:
    """This file again in a process of its own, since triton decides when it is imported whether it interprets."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", __file__]
    subprocess.run(command, check=True, env=environment)
