"""Massive activations: the definition, and planted ones that are born, erased and born again."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import interp
from interp import Edit, sinks
from interp.sinks.massive import is_massive, spans
from interp.tasks.corpus import natural_text

TOKENS = torch.arange(5, 29).reshape(3, 8)


def plant(layer: int, value: float, position: int = 0, dimension: int = 5, rows: list[int] | None = None) -> Edit:
    return Edit(f"blocks.{layer}.hook_resid_post", value=value, positions=[position], neurons=[dimension], rows=rows)


def test_definition_needs_both_size_and_ratio():
    resid = torch.full((2, 3, 4), 0.5)
    resid[0, 1, 2] = -600  # 1200 times the median
    resid[0, 0, 0] = 499  # not 1000 times
    resid[1] = 0.01
    resid[1, 2, 3] = 99  # 9900 times, but not above 100
    found = is_massive(resid)
    assert found.nonzero().tolist() == [[0, 1, 2]]
    assert is_massive(resid, threshold=50.0).nonzero().tolist() == [[0, 1, 2], [1, 2, 3]]
    assert is_massive(resid, ratio=998.0).nonzero().tolist() == [[0, 0, 0], [0, 1, 2]]
    # Each prompt has its own median.
    assert torch.equal(is_massive(resid), torch.cat([is_massive(one[None]) for one in resid]))


def test_spans_of_dimensions():
    present = torch.zeros(6, 4, dtype=torch.bool)
    present[1:3, 2] = present[4:, 2] = present[0:4, 0] = present[5, 3] = True
    assert spans(present) == [(0, 0, 4), (2, 1, 3), (2, 4, None), (3, 5, None)]
    assert spans(present & False) == []


def test_a_dimension_that_lives_twice(tiny_llama: interp.Model):
    edits = [plant(0, -5000, position=3), plant(1, 0.1, position=3), plant(2, 6000, position=3)]
    with tiny_llama.edited(edits):
        found = sinks.massive_activations(tiny_llama, TOKENS)
    assert found["massive_dimension"].values.tolist() == [5]
    assert found["massive_share"].values.tolist() == found["alive_share"].values.tolist() == [[1], [0], [1]]
    np.testing.assert_allclose(found["peak"].values[[0, 2], 0], [5000, 6000])
    assert found["span_dimension"].values.tolist() == [5, 5]
    assert found["born"].values.tolist() == [0, 2]
    assert found["erased"][0] == 1
    assert math.isnan(found["erased"][1])
    first = found.isel(rank=0, layer=[0, 2])
    assert (first["value"].values == [[-5000], [6000]]).all()
    assert (first["position"] == 3).all()
    assert (first["dimension"] == 5).all()
    assert first["massive"].all()
    assert not found["massive"].isel(layer=1).any()
    assert (found["token"].isel(rank=0, layer=0, prompt=1) == tiny_llama.to_str_tokens(TOKENS[1])[3]).all()


def test_share_of_prompts_decides_whether_a_dimension_is_massive_in_a_layer(tiny_llama: interp.Model):
    with tiny_llama.edited([plant(1, 5000, rows=[0])]):
        found = sinks.massive_activations(tiny_llama, TOKENS)
        assert found["span_dimension"].size == found["massive_dimension"].size == 0
        found = sinks.massive_activations(tiny_llama, TOKENS, share=0.3)
        assert found["massive_share"].sel(massive_dimension=5).values == pytest.approx([0, 1 / 3, 1 / 3])
        assert found["span_dimension"].values.tolist() == [5]


def test_a_massive_dimension_is_alive_below_the_full_ratio(tiny_llama: interp.Model):
    """After block 0 it is at 600 times the median, after block 2 at many thousand times."""
    with tiny_llama.edited([plant(1, 0.1), plant(2, 50000)]):
        median = float(sinks.massive_activations(tiny_llama, TOKENS)["median_size"].sel(layer=0).mean())
    with tiny_llama.edited([plant(0, 600 * median), plant(1, 0.1), plant(2, 50000)]):
        found = sinks.massive_activations(tiny_llama, TOKENS)
        strict = sinks.massive_activations(tiny_llama, TOKENS, alive=1.0)
    assert found["massive_share"].values.ravel().tolist() == [0, 0, 1]
    assert found["alive_share"].values.ravel().tolist() == [1, 0, 1]
    assert found["born"].values.tolist() == [0, 2]
    assert strict["born"].values.tolist() == [2]


def test_largest_values_are_those_of_the_block_outputs(tiny_gpt2: interp.Model):
    found = sinks.massive_activations(tiny_gpt2, TOKENS, top=4, batch_size=2)
    with torch.no_grad():
        seen = []
        handles = [
            block.register_forward_hook(
                lambda module, args, out: seen.append(out[0] if isinstance(out, tuple) else out)
            )
            for block in tiny_gpt2.hf.transformer.h
        ]
        for row in TOKENS:  # one by one: a batch is each alone
            tiny_gpt2.hf(row[None])
        for handle in handles:
            handle.remove()
    for prompt in range(3):
        for layer in range(3):
            resid = seen[prompt * 3 + layer][0].numpy()
            order = np.argsort(-np.abs(resid).ravel())[:4]
            here = found.isel(layer=layer, prompt=prompt)
            np.testing.assert_allclose(here["value"], resid.ravel()[order], rtol=1e-5)
            assert here["position"].values.tolist() == (order // 32).tolist()
            assert here["dimension"].values.tolist() == (order % 32).tolist()
            median = torch.from_numpy(np.abs(resid)).median()
            np.testing.assert_allclose(here["median_size"], median, rtol=1e-5)
            np.testing.assert_allclose(here["ratio"], np.abs(resid.ravel()[order]) / float(median), rtol=1e-4)


def test_mapping_of_inputs_and_refusals(tiny_llama: interp.Model):
    whole = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}
    np.testing.assert_array_equal(
        sinks.massive_activations(tiny_llama, whole)["value"], sinks.massive_activations(tiny_llama, TOKENS)["value"]
    )
    padded = torch.ones_like(TOKENS)
    padded[0, 0] = 0
    with pytest.raises(ValueError, match="some prompts are padded"):
        sinks.massive_activations(tiny_llama, whole | {"attention_mask": padded})
    with pytest.raises(ValueError, match="nothing to run"):
        sinks.massive_activations(tiny_llama, TOKENS[:0])


def test_result_survives_a_file(tiny_llama: interp.Model, tmp_path):
    import xarray as xr

    found = sinks.massive_activations(tiny_llama, TOKENS)
    found.to_netcdf(tmp_path / "massive.nc", engine="h5netcdf")
    xr.testing.assert_equal(xr.load_dataset(tmp_path / "massive.nc", engine="h5netcdf"), found)


@pytest.mark.model
def test_smollm2_builds_its_sink_dimension_twice(smollm2: interp.Model):
    found = sinks.massive_activations(smollm2, natural_text(smollm2, 16, 64))
    of_507 = [
        (int(born), float(erased))
        for dimension, born, erased in zip(
            found["span_dimension"].values, found["born"].values, found["erased"].values, strict=True
        )
        if dimension == 507
    ]
    assert len(of_507) == 2
    (first, erased), (second, end) = of_507
    # In the stream that enters layers 3 to 9, and again from 12 on.
    assert first == 2
    assert 8 <= erased <= 10
    assert second == 11
    assert 28 <= end <= 29 or math.isnan(end)
    last_blocks = found.isel(rank=0).sel(layer=slice(12, 27))
    assert (last_blocks["position"] == 0).all()
    assert (last_blocks["dimension"] == 507).all()
    assert 1.5e4 < abs(float(found["value"].isel(rank=0).sel(layer=15).mean())) < 3e4
