"""`interp sae train`: what it writes and prints, going on, and errors of one line."""

from __future__ import annotations

import pytest

from interp.saes import load
from interp.saes.checkpoint import read_checkpoint
from tests.command_line import run
from tests.conftest import tiny_llama_hf


@pytest.fixture(scope="module")
def command(tiny_tokenizer, tmp_path_factory):
    """A training on a tiny model and a folder of text, all but what it is of and where it goes."""
    path = tmp_path_factory.mktemp("tiny")
    tiny_llama_hf(len(tiny_tokenizer)).save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    (path / "words").mkdir()
    (path / "words" / "a.txt").write_text(" the boy runs and Mary went to the park with John" * 60)
    sizes = ("--tokens", 640, "--batch-size", 64, "--buffer-tokens", 8192, "--length", 16, "--k", 4)
    return ("sae", "train", "--model", path, "--text", path / "words", *sizes, "--no-progress")


def test_help_has_examples():
    code, out, _ = run("sae", "train", "--help")
    assert code == 0
    assert "interp sae train" in out


def test_it_writes_an_sae_a_site_and_goes_on(command, tmp_path):
    sites = ("--site", "blocks.1.attn.hook_z", "--site", "blocks.2.hook_resid_pre")
    code, out, err = run(*command, *sites, "--out", tmp_path / "two")
    assert code == 0, err
    assert "blocks.1.attn.hook_z: topk, 32 -> 256, 640 tokens" in out
    sae = load(tmp_path / "two" / "blocks.2.hook_resid_pre")
    assert sae.settings()["k"] == 4
    assert (tmp_path / "two" / "blocks.1.attn.hook_z" / "cfg.json").is_file()
    log = (tmp_path / "two" / "log.csv").read_text()
    assert run(*command, *sites, "--out", tmp_path / "two")[0] == 0
    assert (tmp_path / "two" / "log.csv").read_text() == log


def test_width_and_first_position_are_chosen(command, tmp_path):
    words = ("--site", "blocks.1.attn.hook_z", "--d-sae", 48, "--from-position", 3, "--out", tmp_path / "sae")
    code, out, err = run(*command, *words)
    assert code == 0, err
    assert "blocks.1.attn.hook_z: topk, 32 -> 48, 640 tokens" in out
    settings = read_checkpoint(tmp_path / "sae").settings
    assert settings["positions"] == "slice(3, None, None)"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--site", "z"), "'z' stands for 3 sites"),
        (("--site", "blocks.9.attn.hook_z"), "layer 9 is out of range"),
        (("--site", "blocks.1.attn.hook_z", "--architecture", "tok"), "--architecture 'tok': it is one of relu"),
        (("--site", "blocks.1.attn.hook_z", "--learning-rate", -1), "learning_rate=-1.0; give more than 0"),
        (("--site", "blocks.1.attn.hook_z", "--k", 300), "k=300 is outside 1..256"),
        (("--site", "blocks.1.attn.hook_z", "--from-position", 16), "slice(16, None, None) names no position"),
        (("--site", "blocks.1.attn.hook_z", "--length", 1), "length=1; a row of text has 2 tokens or more"),
    ],
)
def test_errors_are_one_line(command, tmp_path, words, message):
    code, out, err = run(*command, *words, "--out", tmp_path / "none")
    assert code == 2, (out, err)
    assert out == ""
    assert err.count("\n") == 1
    assert message in err
