"""What all SAEs share: shapes that an input may have, and how a model's activations are read and written."""

from __future__ import annotations

import pytest
import torch

from interp.saes import ARCHITECTURES, make
from interp.saes.sae import from_rows, to_rows
from tests.saes.random_saes import random_sae, vectors

EACH = pytest.mark.parametrize("architecture", list(ARCHITECTURES))


@EACH
def test_one_vector_alone_is_a_row_of_a_batch(architecture: str) -> None:
    sae, x = random_sae(architecture), vectors(3)
    torch.testing.assert_close(sae.encode(x[1]), sae.encode(x)[1])
    torch.testing.assert_close(sae(x[1]), sae(x)[1])
    names = [name for name, _ in sae.named_parameters()]
    alone = torch.autograd.grad(sae(x[1]).sum(), list(sae.parameters()), allow_unused=True)
    within = torch.autograd.grad(sae(x)[1].sum(), list(sae.parameters()), allow_unused=True)
    for name, one, other in zip(names, alone, within, strict=True):
        torch.testing.assert_close(one, other, msg=lambda text, name=name: f"{name}: {text}")


@EACH
def test_no_vector_has_no_features_and_no_loss(architecture: str) -> None:
    sae, none = random_sae(architecture), vectors(0)
    assert sae.encode(none).shape == (0, sae.d_sae)
    assert sae(none).shape == (0, sae.d_out)
    with pytest.raises(ValueError, match="there is no token to take the mean loss of"):
        sae.loss(none)


def test_rows_of_a_site_with_heads() -> None:
    z = torch.randn(2, 3, 4, 5)
    rows = to_rows("blocks.5.attn.hook_z", z)
    assert torch.equal(rows[..., 5:10], z[:, :, 1])
    assert torch.equal(from_rows("blocks.5.attn.hook_z", rows, z), z)
    stream = torch.randn(2, 3, 8)
    assert to_rows("blocks.5.hook_attn_out", stream) is stream
    assert torch.equal(from_rows("blocks.5.hook_attn_out", stream, stream), stream)
    with pytest.raises(ValueError, match="not one vector a token"):
        to_rows("blocks.5.attn.hook_pattern", torch.randn(2, 4, 3, 3))
    with pytest.raises(ValueError, match="does not fit"):
        from_rows("blocks.5.attn.hook_z", rows[..., :10], z)


def test_repr_says_what_tells_it_apart() -> None:
    sae = make("topk", 4, 16, k=2, site="blocks.5.attn.hook_z")
    shown = repr(sae)
    for said in ("TopKSAE", "blocks.5.attn.hook_z", "d_in=4", "d_sae=16", "k=2"):
        assert said in shown
    assert "target_site" not in shown
