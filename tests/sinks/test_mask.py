"""Sink masks against each rule written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr

import interp
from interp import Edit, heads, sinks
from interp.sinks.mask import default_threshold
from interp.tasks.corpus import natural_text

TOKENS = torch.randint(5, 100, (3, 20), generator=torch.Generator().manual_seed(1))


def resid_pre(model: interp.Model) -> np.ndarray:
    """[layer, prompt, position, d_model]."""
    return model.run_with_cache(TOKENS, "resid_pre")[1].stack("resid_pre").double().numpy()


def test_phi_rule(tiny_llama: interp.Model):
    found = sinks.mask(tiny_llama, TOKENS, dimensions=[4, 11], threshold=0.3, batch_size=2)
    x = resid_pre(tiny_llama)
    phi_rel = np.abs(x[..., [4, 11]]).max(-1) / np.sqrt((x**2).mean(-1) + 1e-6) / np.sqrt(32)
    expected = phi_rel >= 0.3
    assert 0.05 < expected.mean() < 0.95
    np.testing.assert_array_equal(found, expected)
    assert found.dims == ("layer", "prompt", "position")
    assert found.dtype == bool
    assert found.attrs["dimensions"] == [4, 11]


def test_default_thresholds():
    assert default_threshold("phi_rel", 4096) == 0.3125  # the published 20, of √4096
    assert default_threshold("phi_rel", 576) == pytest.approx(20 / 24)
    assert default_threshold("phi_rel", 64) == 0.9  # a φ of 20 is out of reach


def test_a_planted_sink_is_the_only_one(tiny_llama: interp.Model):
    with tiny_llama.edited(Edit("blocks.0.hook_resid_post", value=500.0, positions=[4], neurons=[6], rows=[2])):
        found = sinks.mask(tiny_llama, TOKENS, dimensions=[6])
    assert np.argwhere(found.values).tolist() == [[1, 2, 4], [2, 2, 4]]


def test_norm_rule(tiny_llama: interp.Model):
    site = "blocks.0.hook_resid_post"
    with tiny_llama.edited(Edit(site, value=100.0, positions=[7], rows=[1])):
        found = sinks.mask(tiny_llama, TOKENS, "norm")
        norms = np.linalg.norm(resid_pre(tiny_llama), axis=-1)
    assert not found.sel(layer=0).any()
    assert np.argwhere(found.sel(layer=1).values).tolist() == [[1, 7]]
    # torch's median of an even number is the lower of the two in the middle.
    np.testing.assert_array_equal(found, norms >= 10 * np.sort(norms, -1)[..., 9:10])


def test_attention_rule(tiny_llama: interp.Model):
    attend_to_3 = [
        Edit("blocks.1.attn.hook_rot_q", value=1.0),
        Edit("blocks.1.attn.hook_rot_k", value=50.0, positions=[3]),
        Edit("blocks.2.attn.hook_rot_q", value=1.0),
        Edit("blocks.2.attn.hook_rot_k", value=50.0, positions=[17]),  # over three rows only
    ]
    with tiny_llama.edited(attend_to_3):
        found = sinks.mask(tiny_llama, TOKENS, "attention")
        received = heads.attention_received(tiny_llama, TOKENS).mean("head")
    assert found.sel(layer=1, position=3).all()
    assert (received.sel(layer=2)[..., 17] > 0.9).all()
    assert not found.sel(layer=2, position=17).any()
    judged = (np.arange(20) + 1 <= 10) | (20 - np.arange(20) >= 16)
    np.testing.assert_array_equal(found, (received.values >= 0.3) & judged)


def test_no_sink_dimension_means_no_sink(tiny_llama: interp.Model):
    found = sinks.mask(tiny_llama, TOKENS)
    assert found.attrs["dimensions"] == []
    assert not found.any()


def test_tokens_stand_beside_positions_and_survive_a_file(tiny_llama: interp.Model, tmp_path):
    found = sinks.mask(tiny_llama, TOKENS, "norm")
    assert found["token"].sel(prompt=2).values.tolist() == tiny_llama.to_str_tokens(TOKENS[2])
    found.to_netcdf(tmp_path / "mask.nc", engine="h5netcdf")
    xr.testing.assert_equal(xr.load_dataarray(tmp_path / "mask.nc", engine="h5netcdf"), found)


def test_it_runs_on_inputs_by_name(tiny_llama: interp.Model):
    whole = {"input_ids": TOKENS}
    expected = sinks.mask(tiny_llama, TOKENS, "norm", threshold=1.2)
    xr.testing.assert_equal(sinks.mask(tiny_llama, whole, "norm", threshold=1.2), expected)
    xr.testing.assert_equal(sinks.mask(tiny_llama, whole, "attention"), sinks.mask(tiny_llama, TOKENS, "attention"))
    padded = whole | {"attention_mask": torch.arange(20).expand(3, 20) > 0}
    for by in ("norm", "attention"):
        with pytest.raises(ValueError, match="some prompts are padded"):
            sinks.mask(tiny_llama, padded, by)


def test_what_makes_no_sense_is_refused(tiny_llama: interp.Model):
    with pytest.raises(ValueError, match="by='size'; it is one of phi_rel, attention, norm"):
        # Past the check of types that tests run under, if it is on.
        getattr(sinks.mask, "__wrapped__", sinks.mask)(tiny_llama, TOKENS, "size")
    with pytest.raises(ValueError, match="by='norm' does not use them"):
        sinks.mask(tiny_llama, TOKENS, "norm", dimensions=[1])
    with pytest.raises(ValueError, match="dimension 32 is out of range"):
        sinks.mask(tiny_llama, TOKENS, dimensions=[32])


@pytest.mark.model
def test_smollm2_has_one_sink_a_prompt_in_its_later_layers(smollm2: interp.Model):
    tokens = natural_text(smollm2, 4, 64)
    for by, options in (("phi_rel", {"dimensions": [507]}), ("norm", {})):
        found = sinks.mask(smollm2, tokens, by, **options).sel(layer=slice(12, 27))
        assert found.sel(position=0).all()
        assert not found.sel(position=slice(1, None)).any()
