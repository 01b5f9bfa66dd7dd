"""A report that was interrupted goes on where it was, and never from parts of another computation."""

import pytest
import xarray as xr

import interp
from interp.report import heads
from interp.report.resume import Parts, fingerprint


@pytest.fixture
def task(tiny_llama):
    pairs = [(" Mary", " John"), (" Tom", " James")]
    return interp.tasks.from_pairs(
        tiny_llama,
        [
            {
                "clean": f"When{io} and{s} went to the store,{s} gave a drink to",
                "corrupted": f"When{io} and{s} went to the store,{io} gave a drink to",
                "answer": io,
                "wrong": s,
            }
            for io, s in pairs
        ],
    )


def test_an_interrupted_report_goes_on(tiny_llama, task, tmp_path, monkeypatch):
    import importlib

    study = importlib.import_module("interp.report.study")
    whole = tmp_path / "whole.nc"
    heads(tiny_llama, task, whole, n_interventions=2, n_maps=2)
    calls = []
    original = study._head_table
    monkeypatch.setattr(study, "_head_table", lambda *rest: calls.append("heads") or original(*rest))

    def stop(*rest):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(study, "_position_maps", stop)
        with pytest.raises(KeyboardInterrupt):
            heads(tiny_llama, task, tmp_path / "two.nc", n_interventions=2, n_maps=2)
    assert not (tmp_path / "two.nc").exists()
    assert (tmp_path / ".two.nc.parts" / "heads.nc").is_file()
    heads(tiny_llama, task, tmp_path / "two.nc", n_interventions=2, n_maps=2)
    assert calls == ["heads"], "the table of heads must not be computed twice"
    assert not (tmp_path / ".two.nc.parts").exists()
    xr.testing.assert_allclose(interp.report.read(whole), interp.report.read(tmp_path / "two.nc"))


def test_parts_of_another_computation_and_damaged_ones_are_computed_again(tmp_path):
    def part(value):
        return lambda: xr.Dataset({"x": ("a", [value])})

    folder = tmp_path / "parts"
    assert Parts(folder, "one").get("heads", part(1.0)).x.item() == 1.0
    assert Parts(folder, "one").get("heads", part(2.0)).x.item() == 1.0
    assert Parts(folder, "two").get("heads", part(2.0)).x.item() == 2.0
    (folder / "heads.nc").write_bytes(b"\x89HDF torn")
    assert Parts(folder, "two").get("heads", part(3.0)).x.item() == 3.0
    assert Parts(None, "one").get("heads", part(4.0)).x.item() == 4.0


def test_a_fingerprint_follows_weights_prompts_and_choices(tiny_llama, tiny_gpt2, task):
    one = fingerprint(tiny_llama, task, {"n": 1})
    assert one == fingerprint(tiny_llama, task, {"n": 1})
    assert one != fingerprint(tiny_llama, task, {"n": 2})
    assert one != fingerprint(tiny_llama, task[:1], {"n": 1})
    assert one != fingerprint(tiny_gpt2, task, {"n": 1})
    tiny_llama.hf.model.layers[1].mlp.down_proj.weight.data[0, 0] += 1
    assert one != fingerprint(tiny_llama, task, {"n": 1})
