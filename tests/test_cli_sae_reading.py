"""`interp sae eval`, `sae show` and `sae convert` on a tiny model and a random SAE."""

from __future__ import annotations

import pytest
import torch
import xarray as xr

import interp
from interp import saes
from interp.report import html_page, read
from interp.tasks import natural_text
from tests.command_line import refused, run
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
    model, sae = interp.load(folder / "model"), saes.load(folder / "sae")
    texts = natural_text(model, 6, 8, 0)
    expected = saes.evaluate(model, sae, texts[:3])
    fitted_to_others = saes.baselines(model, sae, texts[3:])["pca"]
    assert saes.describe_evaluation(saes.evaluate(model, fitted_to_others, texts[:3])) in out
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
    code, out, err = run("sae", "convert", folder / "sae", "--format", "sparsify", "-o", tmp_path / "other")
    assert code == 0, err
    assert out == f"wrote {tmp_path / 'other'}: sparsify, topk, 32 -> 32, blocks.1.attn.hook_z\n"
    before, after = saes.load(folder / "sae"), saes.load(tmp_path / "other")
    x = torch.randn(5, before.d_in, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(after(x), before(x))


def test_a_format_without_a_site_is_read_with_one_given(folder, tmp_path):
    saes.save(saes.make("jumprelu", 32, 16, site="blocks.1.attn.hook_z"), tmp_path / "sae")
    code, out, err = run("sae", "convert", tmp_path / "sae", "--format", "gemma_scope", "-o", tmp_path / "scope")
    assert code == 0, err
    assert out == f"wrote {tmp_path / 'scope'}: gemma_scope, jumprelu, 32 -> 16, the format has no place for the site\n"
    words = ("sae", "eval", tmp_path / "scope", "--model", folder / "model", "--n", "2", "--length", "8")
    assert "no file says where this SAE reads; give --site" in refused(*words)
    assert "did you mean 'blocks.1.attn.hook_z'" in refused(*words, "--site", "blocks.1.attn.hook_y")
    code, out, err = run(*words, "--site", "blocks.1.attn.hook_z")
    assert code == 0, err


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


PAIRS = """clean,corrupted,answer,wrong
"When Mary and John went to the store, John gave a drink to","When Mary and John went to the store, Mary gave a drink to"," Mary"," John"
"When Tom and Bob went to the park, Bob gave a book to","When Tom and Bob went to the park, Tom gave a book to"," Tom"," Bob"
"""  # noqa: E501


def test_report_shows_the_features_asked_for(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("interp.report.sae_study.TEXTS", 4)
    monkeypatch.setattr("interp.report.sae_study.LENGTH", 8)
    monkeypatch.setattr("interp.report.sae_study.LISTED", 2)
    pairs, out = tmp_path / "pairs.csv", tmp_path / "study.nc"
    pairs.write_text(PAIRS)
    sizes = ("--n-interventions", 2, "--n-maps", 2, "--no-progress")
    code, _, err = run(
        "report", "--model", folder / "model", "--task", pairs, "--sae", folder / "sae", *sizes,
        "--feature", 9, "--feature", 3, "--out", out,
    )  # fmt: skip
    assert code == 0, err
    study = read(out)
    assert study["sae_shown_feature"].values.tolist() == [9, 3]
    page = html_page(study)
    assert 'id="feature-9"' in page
    assert "Features of a sparse autoencoder" in page


def test_report_refuses_what_is_no_sae_before_the_model_is_loaded(folder, tmp_path):
    model, out = ("--model", "no/such-model"), ("--out", tmp_path / "x.html")
    assert "no SAE in it" in refused("report", *model, *out, "--sae", tmp_path)
    assert "there is no such folder" in refused("report", *model, *out, "--sae", tmp_path / "none")
    assert "give its folder with --sae" in refused("report", *model, *out, "--feature", 3)
