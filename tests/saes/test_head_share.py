"""Decoder norms by head against loops, and the table of heads and features on planted decoders."""

import numpy as np
import pytest
import torch

from interp.saes.architectures import make
from interp.saes.head_share import head_features, head_share


def test_shares_are_block_norms_and_sum_to_one(tiny_llama) -> None:
    sae = make("topk", 32, 20, k=3, site="blocks.1.attn.hook_z")
    found = head_share(tiny_llama, sae)
    assert found.dims == ("feature", "head")
    assert found.attrs["layer"] == 1
    W_dec = sae.W_dec.detach().numpy()
    for feature in range(20):
        # Four query heads of 8 dimensions, though there are two key/value heads.
        norms = [np.sqrt((W_dec[feature, 8 * head : 8 * head + 8] ** 2).sum()) for head in range(4)]
        assert found.sel(feature=feature).values == pytest.approx(np.array(norms) / sum(norms), abs=1e-6)
    assert found.sum("head").values == pytest.approx(np.ones(20), abs=1e-6)


def test_a_zero_decoder_row_has_no_share(tiny_llama) -> None:
    sae = make("relu", 32, 4, site="blocks.0.attn.hook_z")
    with torch.no_grad():
        sae.W_dec[2] = 0
    found = head_share(tiny_llama, sae)
    assert np.isnan(found.sel(feature=2)).all()
    assert not np.isnan(found.sel(feature=1)).any()
    table = head_features(tiny_llama, sae, k=3)
    assert 2 not in table["feature"].values
    assert int(table["n_largest"].sum()) == 3


def test_a_head_lists_its_features_and_the_directions_that_they_write(tiny_llama) -> None:
    sae = make("relu", 32, 8, site="blocks.2.attn.hook_z")
    with torch.no_grad():
        sae.W_dec.zero_()
        for feature in range(4):  # head 0: one line; shares fall with the feature, the rest lies in head 3
            sae.W_dec[feature, 0] = 4.0 - feature
            sae.W_dec[feature, 31] = 1.0
        for feature in range(4, 8):  # head 1: four orthogonal directions
            sae.W_dec[feature, 8 + feature - 4] = 1.0
    found = head_features(tiny_llama, sae, k=4).sel(layer=2)
    assert found["feature"].sel(head=0).values.tolist() == [0, 1, 2, 3]
    assert found["share"].sel(head=0).values == pytest.approx([0.8, 0.75, 2 / 3, 0.5])
    assert sorted(found["feature"].sel(head=1).values.tolist()) == [4, 5, 6, 7]
    assert found["n_directions"].sel(head=[0, 1]).values == pytest.approx([1, 4])
    assert found["n_largest"].values.tolist() == [4, 4, 0, 0]  # of feature 3's tie the first head


def test_several_layers_stand_in_order(tiny_gpt2) -> None:
    saes = [make("relu", 32, 12, seed=layer, site=f"blocks.{layer}.attn.hook_z") for layer in (2, 0)]
    table = head_features(tiny_gpt2, saes, k=2)
    assert table["layer"].values.tolist() == [0, 2]
    alone = head_features(tiny_gpt2, saes[0], k=2)
    np.testing.assert_array_equal(table.sel(layer=2)["feature"], alone.sel(layer=2)["feature"])


@pytest.mark.parametrize(
    ("site", "width", "message"),
    [
        ("blocks.1.hook_attn_out", 32, r"heads can be told apart at blocks\.\*\.attn\.hook_z only"),
        ("blocks.7.attn.hook_z", 32, "layer 7 is out of range"),
        ("blocks.1.attn.hook_z", 30, "width 30"),
        (None, 32, "does not say where it reads"),
    ],
)
def test_saes_without_heads_are_refused(tiny_gpt2, site, width, message) -> None:
    with pytest.raises(ValueError, match=message):
        head_share(tiny_gpt2, make("relu", width, 8, site=site))


def test_two_saes_of_a_layer_and_too_many_features_are_refused(tiny_gpt2) -> None:
    sae = make("relu", 32, 8, site="blocks.1.attn.hook_z")
    with pytest.raises(ValueError, match="one SAE a layer"):
        head_features(tiny_gpt2, [sae, sae])
    with pytest.raises(ValueError, match=r"k runs 1\.\.8"):
        head_features(tiny_gpt2, sae, k=9)
