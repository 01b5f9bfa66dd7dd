"""φ against closed forms, and sink dimensions found where they were planted."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import xarray as xr

import interp
from interp import Edit, sinks
from interp.tasks.corpus import natural_text

TOKENS = torch.arange(10, 90).reshape(20, 4)


def test_phi_of_a_spike_is_the_root_of_the_width():
    resid = torch.zeros(2, 3, 64)
    resid[0, 1, 9] = -300
    resid[1, 2] = 7
    assert sinks.phi(resid, [9])[0, 1] == pytest.approx(8)
    assert sinks.phi_rel(resid, [9])[0, 1] == pytest.approx(1)
    assert sinks.phi(resid, [3])[0, 1] == 0
    assert sinks.phi(resid, [3])[1, 2] == pytest.approx(1)  # a flat token
    assert sinks.phi(resid, [3, 9]).shape == (2, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_phi_equals_its_formula(dtype: torch.dtype):
    resid = (torch.randn(5, 32, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    values = resid.double().numpy()
    rms = np.sqrt((values**2).mean(-1) + 1e-6)
    expected = np.abs(values[:, [2, 30]]).max(-1) / rms
    for dimensions in ([2, 30], torch.tensor([2, 30]), xr.DataArray([2, 30], dims="rank")):
        found = sinks.phi(resid, dimensions)
        assert found.dtype == torch.float32
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(sinks.phi_rel(resid, [2, 30]), expected / math.sqrt(32), rtol=1e-5)


def test_phi_counts_epsilon_under_the_root():
    resid = torch.zeros(1, 4)
    resid[0, 0] = 1e-3
    assert sinks.phi(resid, [0]).item() == pytest.approx(1e-3 / math.sqrt(1e-6 / 4 + 1e-6), rel=1e-5)


def test_phi_refuses_dimensions_that_are_not_there():
    with pytest.raises(ValueError, match=r"dimension 8 is out of range; dimensions run 0\.\.7"):
        sinks.phi(torch.zeros(1, 8), [8])
    with pytest.raises(ValueError, match="at least one sink dimension"):
        sinks.phi(torch.zeros(1, 8), [])


def planted() -> list[Edit]:
    """Dimension 5 in all sequences and two layers of three, 7 in 17 of 20 sequences, 9 in one layer."""
    site = "blocks.{}.hook_resid_post".format
    return [
        Edit(site(0), value=-90000.0, positions=[2], neurons=[5]),
        Edit(site(0), value=80000.0, positions=[1], neurons=[7], rows=range(17)),
        Edit(site(1), value=70000.0, positions=[0], neurons=[9]),
        Edit(site(2), value=0.0, neurons=[5, 7]),
        Edit(site(2), value=0.0, neurons=[9]),
    ]


def test_planted_dimensions_are_found(tiny_llama: interp.Model):
    options = {"min_sequences": 20, "batch_size": 20}
    with tiny_llama.edited(planted()):
        found = sinks.sink_dimensions(tiny_llama, TOKENS, **options)
        assert found.values.tolist() == [5, 9]  # 7 is in 85 % of the sequences only
        assert found["layer_share"].values == pytest.approx([2 / 3, 1 / 3])
        assert sinks.sink_dimensions(tiny_llama, TOKENS, layer_share=0.5, **options).values.tolist() == [5]
        assert sinks.sink_dimensions(tiny_llama, TOKENS, sequence_share=0.85, **options).values.tolist() == [5, 7, 9]
    assert sinks.sink_dimensions(tiny_llama, TOKENS, **options).size == 0


def test_too_few_sequences_are_refused_before_anything_runs(tiny_llama: interp.Model, monkeypatch):
    monkeypatch.setattr(type(tiny_llama), "_forward", lambda *_: pytest.fail("ran"))
    with pytest.raises(ValueError, match="20 sequences are too few to calibrate on; give at least 50"):
        sinks.sink_dimensions(tiny_llama, TOKENS)


def test_calibration_text_is_found_by_itself(tiny_llama: interp.Model):
    found = sinks.sink_dimensions(tiny_llama)
    assert (found.attrs["n_sequences"], found.attrs["length"]) == (50, 64)


@pytest.mark.model
@pytest.mark.slow
def test_smollm2_has_one_sink_dimension(smollm2: interp.Model):
    found = sinks.sink_dimensions(smollm2)
    assert found.values.tolist() == [507]
    _, cache = smollm2.run_with_cache(natural_text(smollm2, 8, 64, seed=1), "resid_pre", logits_to_keep=1)
    for layer in range(12, 28):
        assert sinks.phi_rel(cache["resid_pre", layer][:, 0], found).min() >= 0.95, layer
