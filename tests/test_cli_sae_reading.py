"""`interp sae eval`, `sae show` and `sae convert` on a tiny model and a random SAE."""

from __future__ import annotations

import pytest
import torch
import xarray as xr

import interp
from interp import saes
from interp.tasks import natural_text
from tests.command_line import run
from tests.conftest import tiny_llama_hf


@pytest.fixture(scope="module")
def folder(tiny_tokenizer, tmp_path_factory):
    """A tiny model and an SAE of its heads, on disk."""
    path = tmp_path_factory.mktemp("tiny")
    tiny_llama_hf(len(tiny_tokenizer)).save_pretrained(path / "model")
    tiny_tokenizer.save_pretrained(path / "model")
    site = "blocks.1.attn.hook_z"
    width = interp.load(path / "model").W_O.shape[-2] * interp.load(path / "model").n_heads
    saes.save(saes.make("topk", width, 32, k=4, site=site), path / "sae")
    return path


def test_eval_writes_what_evaluate_returns(folder, tmp_path):
    sizes = ("--n", "3", "--length", "8")
    code, out, err = run(
        "sae", "eval", folder / "sae", "--model", folder / "model", *sizes, "--baselines", "-o", tmp_path / "e.nc"
    )
    assert code == 0, err
    assert "PCA" in out or "pca" in out
    model = interp.load(folder / "model")
    expected = saes.evaluate(model, saes.load(folder / "sae"), natural_text(model, 3, 8, 0))
    with xr.open_dataset(tmp_path / "e.nc", engine="h5netcdf") as written:
        xr.testing.assert_allclose(written["ce"], expected["ce"])


def test_show_writes_a_page(folder, tmp_path):
    page = tmp_path / "features.html"
    code, out, err = run(
        "sae", "show", folder / "sae", "--model", folder / "model", "--n", "4", "--length", "8", "-f", "3", "-o", page
    )
    assert code == 0, err
    assert out.startswith(f"wrote {page}")
    assert "3" in page.read_text(encoding="utf-8")


def test_convert_keeps_the_function(folder, tmp_path):
    code, _, err = run("sae", "convert", folder / "sae", "--format", "sparsify", "-o", tmp_path / "other")
    assert code == 0, err
    before, after = saes.load(folder / "sae"), saes.load(tmp_path / "other")
    x = torch.randn(5, before.d_in, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(after(x), before(x))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("convert", "nowhere", "-o", "x"), "there is no such folder or file"),
        (("eval", "nowhere", "-o", "x.csv"), "the numbers are written as .nc"),
    ],
)
def test_bad_requests_are_one_line(words, message):
    code, _, err = run("sae", *words)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
