from __future__ import annotations

import numpy as np
import pytest
import torch

import interp
from interp import heads

D, HEADS = 6, 4


def weights_of(KQ: torch.Tensor, OV: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Weights of heads as wide as the stream with these products, none of them diagonal."""
    generator = torch.Generator().manual_seed(0)
    W_K, W_O = torch.randn(2, len(KQ), D, D, generator=generator, dtype=KQ.dtype)
    return KQ @ torch.linalg.inv(W_K).mT, W_K, OV @ torch.linalg.inv(W_O), W_O


@pytest.fixture
def published():
    """A positive, a negative, a dummy and a mixed head."""
    KQ, OV = torch.zeros(2, HEADS, D, D, dtype=torch.float64)
    KQ[:, range(D - 1), range(D - 1)] = torch.tensor([3.0, -3.0, 0.01, 1.0]).double()[:, None]
    OV[:, -1, -1] = torch.tensor([2.0, -1.5, 0.0, 0.0]).double()
    KQ[3, 0, 1], KQ[3, -1, 2], KQ[3, 2, -1] = 2, 1, 3
    OV[3, -1, -1], OV[3, 0, 1], OV[3, -1, 0] = 1, 2, 2
    return KQ, OV


def test_known_structure_is_read_off(published):
    found = heads.kq_ov(*weights_of(*published), scale=0.5)
    np.testing.assert_allclose(found["omega"], [1.5, -1.5, 0.005, 0.5], atol=1e-9)
    np.testing.assert_allclose(found["mu"], [2, -1.5, 0, 1], atol=1e-9)
    # The mixed head: diagonal 5 × 1, off it 4, last row and column 1 + 9; OV 1 of 1 + 4 + 4.
    np.testing.assert_allclose(found["identity_share"], [1, 1, 1, 5 / 19], atol=1e-9)
    np.testing.assert_allclose(found["off_diagonal_share"], [0, 0, 0, 4 / 19], atol=1e-9)
    np.testing.assert_allclose(found["last_share"], [0, 0, 0, 10 / 19], atol=1e-9)
    np.testing.assert_allclose(found["mu_share"], [1, 1, np.nan, 1 / 9], atol=1e-9)
    assert list(found["sign"].values) == ["positive", "negative", "dummy", "positive"]
    assert float(found["zero_sum_gap"]) == pytest.approx(1.5)


def test_an_uneven_diagonal_is_what_the_shares_leave_of_one():
    KQ = torch.diag(torch.tensor([1.0, -1, 1, -1, 1, 0]))[None]
    found = heads.kq_ov(*weights_of(KQ, torch.eye(D)[None]), scale=1.0)
    assert float(found["omega"][0]) == pytest.approx(0.2)
    assert float(found["identity_share"][0]) == pytest.approx(0.2**2 * 5 / 5)
    assert float(found["off_diagonal_share"][0]) == pytest.approx(0, abs=1e-6)
    assert float(found["mu_share"][0]) == pytest.approx(1 / 6)


def test_the_scale_is_that_of_attention_and_the_dummy_threshold_is_a_share_of_the_largest(published):
    weights = weights_of(*published)
    plain, scaled = heads.kq_ov(*weights, scale=1.0), heads.kq_ov(*weights)
    np.testing.assert_allclose(scaled["omega"], plain["omega"] / D**0.5)
    assert list(heads.kq_ov(*weights, dummy_below=0.5)["sign"].values)[3] == "dummy"
    assert list(heads.kq_ov(*weights, dummy_below=0.0)["sign"].values)[2] == "positive"
    zero = torch.zeros(2, D, D)
    assert list(heads.kq_ov(zero, zero, zero, zero)["sign"].values) == ["dummy", "dummy"]
    assert heads.kq_ov(zero, zero, zero, zero)["identity_share"].isnull().all()


def test_structure_in_a_turned_basis_is_found_in_that_basis_only(published):
    turned = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)).Q
    KQ, OV = (turned @ one @ turned.mT for one in published)
    expected, weights = heads.kq_ov(*weights_of(*published)), weights_of(KQ, OV)
    found = heads.kq_ov(*weights, basis=turned)
    for name in ("omega", "identity_share", "off_diagonal_share", "last_share", "mu", "zero_sum_gap"):
        np.testing.assert_allclose(found[name], expected[name], atol=1e-9, err_msg=name)
    assert float(heads.kq_ov(*weights)["identity_share"][0]) < 0.9
    part = heads.kq_ov(*weights, basis=turned[:, [0, 1, 5]])
    np.testing.assert_allclose(part["mu"], expected["mu"], atol=1e-9)
    assert float(part["off_diagonal_share"][3]) == pytest.approx(4 / (2 + 4))


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_a_model_gives_the_products_of_its_own_weights(name, request):
    model: interp.Model = request.getfixturevalue(name)
    found = heads.model_kq_ov(model, layers=[2, 0])
    assert found["omega"].dims == ("layer", "head")
    assert found["zero_sum_gap"].dims == ("layer",)
    assert list(found["layer"].values) == [2, 0]
    norm = model.tower.blocks[2].ln1.weight.detach()
    centre = torch.eye(32) - (1 / 32 if name == "tiny_gpt2" else 0)
    for head in range(4):
        group = head * model.n_kv_heads // 4
        W_Q, W_K, W_V = (
            centre @ torch.diag(norm) @ getattr(model, weight)[2, row]
            for weight, row in (("W_Q", head), ("W_K", group), ("W_V", group))
        )
        KQ, OV = W_Q @ W_K.T / 8**0.5, W_V @ model.W_O[2, head]
        here = found.sel(layer=2).isel(head=head)
        assert float(here["omega"]) == pytest.approx(float(KQ.diagonal()[:-1].mean()), abs=1e-5)
        assert float(here["mu"]) == pytest.approx(float(OV[-1, -1]), abs=1e-5)
        inner = KQ[:-1, :-1]
        last = (KQ.square().sum() - inner.square().sum()) / KQ.square().sum()
        assert float(here["last_share"]) == pytest.approx(float(last), abs=1e-5)
    assert found.attrs["model"] == model.name
    assert heads.model_kq_ov(model).sizes == {"layer": 3, "head": 4}


def test_bad_bases_and_layers_are_refused(tiny_llama, published):
    weights = weights_of(*published)
    with pytest.raises(ValueError, match=r"not orthonormal \(off by 3\.0e\+00\)"):
        heads.kq_ov(*weights, basis=2 * torch.eye(D))
    with pytest.raises(ValueError, match="two directions at least"):
        heads.kq_ov(*weights, basis=torch.eye(D)[:, :1])
    with pytest.raises(ValueError, match=r"layer 3 is out of range; layers run 0\.\.2"):
        heads.model_kq_ov(tiny_llama, layers=[3])
    with pytest.raises(ValueError, match="layers is empty"):
        heads.model_kq_ov(tiny_llama, layers=[])
