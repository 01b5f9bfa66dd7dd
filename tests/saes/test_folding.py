"""Folds leave the function as it is, and do what they say to the weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from interp.saes.architectures import ARCHITECTURES, make
from interp.saes.folding import as_jumprelu, fold_b_dec, fold_decoder_norm, fold_input_scale
from interp.saes.jumprelu import JumpReLUSAE
from interp.saes.sae import SAE
from interp.saes.topk import BatchTopKFamily

EACH = pytest.mark.parametrize("architecture", list(ARCHITECTURES))
KINDS: dict[str, dict[str, Any]] = {
    "autoencoder": {},
    "not subtracted": {"apply_b_dec_to_input": False},
    "skip transcoder": {"d_out": 5, "skip": True, "target_site": "blocks.0.hook_mlp_out"},
}
ALL = pytest.mark.parametrize("kind", list(KINDS))
D_IN, D_SAE = 6, 14


def random_sae(architecture: str, kind: str = "autoencoder") -> SAE:
    """Every parameter random, decoder norms from about 1 to 4, thresholds that some pre-activations pass."""
    settings = {"k": 4} if "k" in ARCHITECTURES[architecture](1, 64).settings() else {}
    sae = make(architecture, D_IN, D_SAE, site="blocks.0.ln2.hook_normalized", **settings, **KINDS[kind]).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        sae.W_dec.copy_(torch.nn.functional.normalize(sae.W_dec, dim=-1))
        if architecture != "topk":
            sae.W_dec.mul_(1 + 3 * torch.rand(D_SAE, 1, generator=generator))
        else:
            sae.W_dec.mul_(2.5)
        if isinstance(sae, JumpReLUSAE):
            sae.threshold.abs_()
        if isinstance(sae, BatchTopKFamily):
            sae.threshold.fill_(0.7)
    return sae


def inputs() -> Tensor:
    return torch.randn(50, D_IN, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


@EACH
@ALL
def test_decoder_norms(architecture: str, kind: str) -> None:
    sae, x = random_sae(architecture, kind), inputs()
    before = copy.deepcopy(sae.state_dict())
    folded = fold_decoder_norm(sae)
    norms = sae.W_dec.norm(dim=-1)
    torch.testing.assert_close(folded(x), sae(x))
    torch.testing.assert_close(folded.encode(x), sae.encode(x) * norms)
    torch.testing.assert_close(folded.W_dec.norm(dim=-1), torch.ones_like(norms))
    assert 0.05 < (sae.encode(x) > 0).double().mean() < 0.6
    assert isinstance(folded, JumpReLUSAE if isinstance(sae, BatchTopKFamily) else type(sae))
    assert (folded.site, folded.target_site) == (sae.site, sae.target_site)
    assert all(torch.equal(before[name], one) for name, one in sae.state_dict().items())


@EACH
def test_a_decoder_row_of_zeros_stays(architecture: str) -> None:
    sae = random_sae(architecture)
    if architecture == "topk":
        return
    with torch.no_grad():
        sae.W_dec[2] = 0
    folded = fold_decoder_norm(sae)
    torch.testing.assert_close(folded(inputs()), sae(inputs()))
    torch.testing.assert_close(folded.encode(inputs())[:, 2], sae.encode(inputs())[:, 2])


@EACH
@ALL
def test_input_scale(architecture: str, kind: str) -> None:
    sae, x = random_sae(architecture, kind), inputs()
    target_scale = 0.3 if kind == "skip transcoder" else 2.5
    folded = fold_input_scale(sae, 2.5, target_scale=target_scale)
    torch.testing.assert_close(folded(x), sae(2.5 * x) / target_scale)
    torch.testing.assert_close(folded.encode(x), sae.encode(2.5 * x))
    torch.testing.assert_close(fold_input_scale(sae, 2.5)(x), sae(2.5 * x) / 2.5)


@EACH
@ALL
def test_b_dec(architecture: str, kind: str) -> None:
    sae, x = random_sae(architecture, kind), inputs()
    folded = fold_b_dec(sae)
    assert not folded.apply_b_dec_to_input
    torch.testing.assert_close(folded(x), sae(x))
    torch.testing.assert_close(folded.encode(x), sae.encode(x))
    torch.testing.assert_close(folded.b_dec, sae.b_dec)


@EACH
def test_folds_follow_each_other(architecture: str) -> None:
    sae, x = random_sae(architecture), inputs()
    folded = fold_decoder_norm(fold_b_dec(fold_input_scale(sae, 0.4)))
    torch.testing.assert_close(folded(x), sae(0.4 * x) / 0.4)


def test_batch_top_k_as_jump_relu() -> None:
    sae, x = random_sae("batch_topk", "skip transcoder").float(), inputs().float()
    assert isinstance(sae, BatchTopKFamily)
    jump = as_jumprelu(sae)
    assert torch.equal(jump.threshold, torch.full((D_SAE,), 0.7))
    assert torch.equal(jump.encode(x), sae.encode(x))
    assert jump.dtype == torch.float32
    assert jump.W_enc.requires_grad
    assert not as_jumprelu(sae.requires_grad_(False)).W_enc.requires_grad
    assert torch.equal(jump(x), sae(x))


def test_top_k_with_several_norms_is_refused() -> None:
    sae = random_sae("topk")
    with torch.no_grad():
        sae.W_dec[0] *= 1.5
    with pytest.raises(ValueError, match="would change what it selects"):
        fold_decoder_norm(sae)


def test_scales_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="must be positive"):
        fold_input_scale(random_sae("relu"), 0.0)
    with pytest.raises(ValueError, match="share b_dec"):
        fold_input_scale(random_sae("relu"), 2.0, target_scale=1.0)
