"""`interp sinks`, `interp heads --divergence` and `interp report --sinks`."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

import interp
from interp import sinks
from interp.heads.divergence import divergence, without_segment
from interp.report import read
from interp.report.sink_study import texts_of
from tests.command_line import refused, run
from tests.conftest import tiny_llama_hf

PROMPT, SEGMENT = "When Mary and John went to the store, John gave a drink to", "When Mary and John"
PAIRS_OF_TASK = """clean,corrupted,answer,wrong
"When Mary and John went to the store, John gave a drink to","When Mary and John went to the store, Mary gave a drink to"," Mary"," John"
"When Tom and Bob went to the park, Bob gave a book to","When Tom and Bob went to the park, Tom gave a book to"," Tom"," Bob"
"""  # noqa: E501


@pytest.fixture(scope="module")
def folder(tiny_tokenizer, tmp_path_factory):
    """A tiny model, prompt pairs and a text, on disk."""
    path = tmp_path_factory.mktemp("tiny")
    tiny_llama_hf(len(tiny_tokenizer)).save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    (path / "pairs.csv").write_text(PAIRS_OF_TASK)
    (path / "text.txt").write_text(f"{PROMPT} Mary. " * 12)
    return path


@pytest.fixture(scope="module")
def model(folder):
    return interp.load(folder)


@pytest.mark.parametrize("ending", ["nc", "json"])
def test_sinks_of_a_text_as_numbers(folder, model, tmp_path, ending):
    path = tmp_path / f"sinks.{ending}"
    words = ("--text", folder / "text.txt", "--n", 4, "--length", 20, "--epsilon", 0.1, "--out", path, "--no-progress")
    code, out, err = run("sinks", "--model", folder, *words)
    assert code == 0, err
    assert "4 texts of 20 tokens: text.txt" in out
    assert "No dimension of this model is massive" in out
    assert f"wrote {path}" in out
    texts = texts_of(model, (folder / "text.txt").read_text(), 4, 20)
    rate = sinks.sink_rate(model, texts, epsilon=0.1)
    found = read(path)
    np.testing.assert_allclose(found["sink_rate"].values, rate["rate_by_head"].isel(position=0).values)
    assert f"Sink₁: {float(rate['rate'][0]):.1f}%" in out
    assert found.attrs["command"].split()[0] == "interp"


def test_sinks_of_natural_text_as_a_page(folder, tmp_path):
    path = tmp_path / "sinks.html"
    code, out, err = run("sinks", "--model", folder, "--n", 3, "--length", 16, "--out", path, "--no-progress")
    assert code == 0, err
    assert "natural text" in out
    page = path.read_text()
    assert "Attention sinks of" in page
    assert "heads rest on sinks" in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--n", 0), "--n 0: give at least 1"),
        (("--length", 1), "--length 1: give at least 2"),
        (("--epsilon", 1.5), "--epsilon 1.5 is no share"),
        (("--out", "sinks.csv"), "must end in .html, .nc, .json"),
        (("--text", "nowhere.txt"), "nowhere.txt"),
    ],
)
def test_sinks_refuses_before_a_model_is_loaded(words, message):
    assert message in refused("sinks", "--model", "no/such/model", *words)


def test_a_text_too_short_is_refused(folder):
    assert "give 4000 at least" in refused("sinks", "--model", folder, "--text", folder / "text.txt", "--length", 4000)


def test_divergence_of_one_prompt(folder, model):
    code, out, err = run("heads", "--model", folder, "--divergence", "--prompt", PROMPT, "--segment", SEGMENT)
    assert code == 0, err
    expected = divergence(model, [PROMPT], [without_segment(PROMPT, SEGMENT)])
    best = expected.values.argmax()
    layer, head = divmod(int(best), model.n_heads)
    first = next(line for line in out.splitlines() if f"L{layer}H{head}" in line)
    assert f"{expected.values.max():.3f}" in first
    assert "T-VHD" in out


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_divergence_of_many_prompts(folder, model, tmp_path, ending):
    pairs = [(PROMPT, SEGMENT), ("Tom and Bob had fun at the park", " at the park")]
    frame = pd.DataFrame(pairs, columns=["prompt", "segment"])
    file, path = tmp_path / f"contexts.{ending}", tmp_path / "divergence.csv"
    if ending == "csv":
        frame.to_csv(file, index=False)
    else:
        frame.to_json(file, orient="records", lines=True)
    words = ("--divergence", "--prompts", file, "--distance", "relative", "--out", path)
    code, out, err = run("heads", "--model", folder, *words)
    assert code == 0, err
    assert f"wrote {path}" in out
    full, ablated = [one for one, _ in pairs], [without_segment(*one) for one in pairs]
    expected = divergence(model, full, ablated, distance="relative")
    np.testing.assert_allclose(pd.read_csv(path)["divergence"], expected.values.ravel(), rtol=1e-6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--divergence",), "--divergence needs --prompt and --segment"),
        (("--divergence", "--prompt", "a b"), "--divergence needs --prompt and --segment"),
        (("--prompt", "a b"), "are for --divergence: add it"),
        (("--divergence", "--prompt", "a b", "--segment", "c"), "occurs 0 times"),
        (("--divergence", "--prompt", "a b", "--segment", "a ", "--distance", "l3"), "one of l2, cosine"),
        (("--divergence", "--prompt", "a", "--prompts", "x.jsonl"), "leave --prompt and --segment out"),
        (("--divergence", "--prompts", "x.txt"), "must end in .jsonl or .csv"),
        (("--divergence", "--prompts", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--divergence", "--prompt", "a b", "--segment", "a ", "--out", "x.nc"), "must end in .csv"),
    ],
)
def test_divergence_refuses_before_a_model_is_loaded(words, message):
    assert message in refused("heads", "--model", "no/such/model", *words)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no prompts in it"),
        ('{"prompt": "a b"}\n', "line 1: there is no text 'segment'"),
        ('{"prompt": "a b", "segment": "a "}\n{"prompt"\n', "line 2: not JSON"),
        ("[1]\n", "line 1: there is no text 'prompt'"),
    ],
)
def test_a_damaged_file_of_prompts_is_refused(tmp_path, text, message):
    path = tmp_path / "contexts.jsonl"
    path.write_text(text)
    assert message in refused("heads", "--model", "no/such/model", "--divergence", "--prompts", path)


def test_report_with_sinks(folder, tmp_path):
    path = tmp_path / "report.nc"
    code, _, err = run(
        "report", "--model", folder, "--task", folder / "pairs.csv", "--n-interventions", 2, "--n-maps", 2, "--sinks",
        "--out", path, "--no-progress",
    )  # fmt: skip
    assert code == 0, err
    found = read(path)
    assert found["sink_dimensions"].attrs["source"].startswith("natural text")
    assert found["sink_task_received"].attrs["n_prompts"] == 2
    assert "sinks" in json.loads(found.attrs["seconds"])


def test_help_has_examples():
    code, out, _ = run("sinks", "--help")
    assert code == 0
    assert "interp sinks --model" in out
    code, out, _ = run("heads", "--help")
    assert "interp heads --divergence --prompt" in " ".join(out.split())
