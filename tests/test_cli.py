"""The command line: what commands print and write, exit codes, and errors of one line."""

from __future__ import annotations

import subprocess
import sys

import pandas as pd
import pytest
from typer.testing import CliRunner

from interp.cli import app
from interp.report import read
from tests.command_line import refused, run
from tests.conftest import tiny_llama_hf

COMMANDS = ("report", "patch", "compare", "heads", "tasks", "models", "show")
PAIRS = """clean,corrupted,answer,wrong
"When Mary and John went to the store, John gave a drink to","When Mary and John went to the store, Mary gave a drink to"," Mary"," John"
"When Tom and Bob went to the park, Bob gave a book to","When Tom and Bob went to the park, Tom gave a book to"," Tom"," Bob"
"""  # noqa: E501


@pytest.fixture(scope="module")
def folder(tiny_tokenizer, tmp_path_factory):
    """A tiny model and two prompt pairs, on disk."""
    path = tmp_path_factory.mktemp("tiny")
    tiny_llama_hf(len(tiny_tokenizer)).save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    (path / "pairs.csv").write_text(PAIRS)
    return path


@pytest.fixture
def on_tiny(folder):
    return ("--model", folder, "--task", folder / "pairs.csv", "--no-progress")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_has_examples(command):
    code, out, _ = run(command, "--help")
    assert code == 0
    assert "Example" in out
    assert f"interp {command}" in out


def test_help_lists_the_commands():
    code, out, _ = run("--help")
    assert code == 0
    assert all(command in out for command in COMMANDS)
    assert "--debug" in out


def test_commands_import_libraries_only_when_run():
    code = "import sys, interp.cli; print({'plotly', 'pandas', 'xarray', 'transformer_lens'} & set(sys.modules))"
    before = "import sys, interp; print({'plotly', 'pandas', 'xarray', 'transformer_lens'} & set(sys.modules))"
    found, without = (
        subprocess.run([sys.executable, "-c", one], capture_output=True, text=True, check=True).stdout
        for one in (code, before)
    )
    assert found == without


def test_tasks_are_listed_with_a_line_each():
    code, out, _ = run("tasks")
    assert code == 0
    assert "ioi" in out
    assert "Indirect-object identification" in out


def test_a_task_is_shown_with_the_models_accuracy(folder):
    code, out, err = run("tasks", "--show", folder / "pairs.csv", "--model", folder)
    assert code == 0, err
    assert "John gave a drink to" in out
    assert "accuracy" in out
    assert "n = 2" in out


def test_models_names_families_and_what_is_here():
    code, out, _ = run("models")
    assert code == 0
    assert "llama" in out
    assert "offline" in out


def test_show_gives_shape_and_statistics(folder):
    code, out, err = run("show", "--model", folder, "--prompt", "When Mary and John", "--site", "blocks.1.attn.hook_z")
    assert code == 0, err
    assert "blocks.1.attn.hook_z" in out
    assert "[1, 4, 4, 8]" in out
    assert "next token" in out


@pytest.mark.parametrize("ending", ["nc", "json", "csv", "html"])
def test_patch_writes_every_format(on_tiny, tmp_path, ending):
    path = tmp_path / f"effects.{ending}"
    code, out, err = run("patch", *on_tiny, "--site", "z", "--by", "layer,head", "--out", path)
    assert code == 0, err
    assert f"wrote {path}" in out
    if ending in ("nc", "json"):
        effects = read(path)["effect"]
    elif ending == "csv":
        effects = pd.read_csv(path).set_index(["layer", "head"])["effect"].to_xarray()
    else:
        assert "resample" in path.read_text()
        return
    assert effects.dims == ("layer", "head")
    assert effects.shape == (3, 4)
    assert list(tmp_path.iterdir()) == [path]


def test_patch_formats_hold_equal_numbers(on_tiny, tmp_path):
    found = []
    for ending in ("nc", "json", "csv"):
        path = tmp_path / f"effects.{ending}"
        run("patch", *on_tiny, "--site", "attn_out", "--out", path)
        array = (
            pd.read_csv(path).set_index(["layer", "position"])["effect"].to_xarray()
            if ending == "csv"
            else read(path)["effect"]
        )
        found.append(array.values.astype("float32"))
    assert (found[0] == found[1]).all()
    assert (found[0] == found[2]).all()


def test_patch_without_a_file_prints_the_largest_effects(on_tiny):
    code, out, err = run("patch", *on_tiny, "--site", "resid_pre", "--raw")
    assert code == 0, err
    assert "denoise resid_pre: largest effects (logit_diff), n = 2 prompts" in out
    assert "effect" in out


@pytest.mark.parametrize("ending", ["nc", "csv", "html"])
def test_patch_estimates_and_verifies(on_tiny, tmp_path, ending):
    path = tmp_path / f"estimate.{ending}"
    code, out, err = run("patch", *on_tiny, "--method", "relp", "--verify", 5, "--out", path)
    assert code == 0, err
    assert "the 5 largest scores against exact effects: Pearson" in out
    if ending == "nc":
        assert int(read(path)["exact"].notnull().sum()) == 5
    elif ending == "csv":
        assert pd.read_csv(path)["exact"].notna().sum() == 5
    else:
        assert "An estimate, by one backward pass" in path.read_text()
    code, out, err = run("patch", *on_tiny, "--method", "relp", "--verify", 5)
    assert code == 0, err
    assert "relevance_patching scores" in out
    assert "exact" in out


def test_patch_refuses_options_that_do_not_go_together(on_tiny):
    assert "--method exact is exact already" in refused("patch", *on_tiny, "--verify", 5)
    assert "estimates are of resampling" in refused("patch", *on_tiny, "--method", "atp", "--ablation", "zero")
    assert "did you mean 'relp'?" in refused("patch", *on_tiny, "--method", "relpp")


def test_compare_prints_and_writes(on_tiny, tmp_path):
    page, numbers = tmp_path / "agreement.html", tmp_path / "agreement.csv"
    code, out, err = run("compare", *on_tiny, "--methods", "atp,secant", "--sites", "attn_out,mlp_out", "--out", page)
    assert code == 0, err
    assert "agreement with exact effects (denoise, n = 2 prompts)" in out
    assert out.count("secant") == 4  # two sites, with layer 0 and without
    text = page.read_text()
    assert "Pearson with exact effects" in text
    assert "mlp_out: secant" in text
    code, _, err = run("compare", *on_tiny, "--methods", "atp", "--sites", "z", "--by", "layer,head", "--out", numbers)
    assert code == 0, err
    table = pd.read_csv(numbers)
    assert list(table.columns[:4]) == ["method", "site", "cells", "n_cells"]
    assert set(table["cells"]) == {"all", "without layer 0", "layer 0", "layer 1", "layer 2"}
    assert "did you mean 'secant'" in refused("compare", *on_tiny, "--methods", "secan")
    assert "must end in .html or .csv" in refused("compare", *on_tiny, "--out", tmp_path / "x.pdf")


def test_heads_prints_and_writes(on_tiny, tmp_path):
    code, out, err = run("heads", *on_tiny, "--top", "3")
    assert code == 0, err
    assert out.count("L0H") + out.count("L1H") + out.count("L2H") == 3
    path = tmp_path / "heads.csv"
    assert run("heads", *on_tiny, "--out", path)[0] == 0
    assert len(pd.read_csv(path)) == 12


def test_report_writes_a_page_with_its_command(on_tiny, tmp_path):
    path = tmp_path / "report.html"
    code, out, err = run("report", *on_tiny, "--n-interventions", 2, "--n-maps", 2, "--out", path)
    assert code == 0, err
    assert out.startswith(f"wrote {path} (")
    assert path.read_text().startswith("<!doctype html>")
    assert list(tmp_path.iterdir()) == [path]


def test_report_takes_its_format_from_the_option_first(on_tiny, tmp_path):
    path = tmp_path / "report.txt"
    code, _, err = run("report", *on_tiny, "--n-interventions", 2, "--n-maps", 2, "--out", path, "--format", "csv")
    assert code == 0, err
    assert len(pd.read_csv(path)) == 12


def test_unknown_task_offers_a_near_name_before_the_model_is_loaded():
    message = refused("tasks", "--show", "ioy", "--model", "no/such-model")
    assert "'ioy' is not a task; did you mean 'ioi'?" in message


def test_unknown_site_offers_near_names(on_tiny):
    assert "did you mean" in refused("patch", *on_tiny, "--site", "hook_zz")


def test_unknown_axis_is_refused(on_tiny):
    assert "'colour' is no axis; there are layer, position" in refused("patch", *on_tiny, "--by", "layer,colour")


def test_unknown_model_names_what_is_here(tmp_path):
    assert "nowhere" in refused("show", "--model", tmp_path / "nowhere", "--prompt", "a")


def test_missing_task_file_is_named(folder, tmp_path):
    assert "none.csv" in refused("tasks", "--show", tmp_path / "none.csv", "--model", folder)


def test_damaged_task_file_is_named_with_line_and_field(folder, tmp_path):
    path = tmp_path / "bad.csv"
    path.write_text(PAIRS.replace(" Mary", "", 1).replace("clean,", "cleann,"))
    assert "bad.csv" in refused("tasks", "--show", path, "--model", folder)


@pytest.mark.parametrize("dtype", ["float33", "int8", "nn"])
def test_bad_dtype_is_refused(folder, dtype):
    said = refused("show", "--model", folder, "--prompt", "a", "--dtype", dtype)
    assert f"'{dtype}' is no type of numbers" in said


@pytest.mark.parametrize("command", ["report", "patch"])
def test_place_to_write_is_checked_before_the_model_is_loaded(command, tmp_path):
    message = refused(command, "--model", "no/such-model", "--out", tmp_path / "no" / "x.html")
    assert "does not exist: make it first" in message


def test_unknown_format_is_refused_before_the_model_is_loaded(tmp_path):
    message = refused("report", "--model", "no/such-model", "--out", tmp_path / "x.pdf")
    assert "'pdf' is no format of a report" in message


@pytest.mark.parametrize("words", [["report"], ["patch", "--colour"], ["nonsense"], ["patch", "--n", "many"]])
def test_usage_errors_are_one_line_too(words):
    assert "--help" in refused(*words)


def test_failure_that_is_not_the_users_exits_with_one(folder, monkeypatch):
    def fail(*_, **__):
        raise FloatingPointError("the metric is NaN\nfor prompt 0")

    monkeypatch.setattr("interp.tasks.accuracy", fail)
    message = refused_partly("tasks", "--show", folder / "pairs.csv", "--model", folder)
    assert message == "interp: FloatingPointError: the metric is NaN; for prompt 0\n"


def refused_partly(*words):
    """As `refused`, for a failure after something was printed."""
    code, _, err = run(*words)
    assert code == 1
    return err


def test_debug_shows_the_traceback(folder):
    result = CliRunner().invoke(app, ["tasks", "--show", "ioy", "--model", str(folder), "--debug"])
    assert isinstance(result.exception, ValueError)


def test_long_messages_are_cut_to_their_first_line(folder, monkeypatch):
    def fail(*_, **__):
        raise ValueError("no such part\n" + "\n".join(f"module {one}" for one in range(40)))

    monkeypatch.setattr("interp.model.load.load", fail)
    assert refused("show", "--model", folder, "--prompt", "a") == (
        "interp: no such part (--debug shows 40 more lines)\n"
    )


def test_token_text_is_not_read_as_markup(folder):
    code, out, err = run("show", "--model", folder, "--prompt", "[/red] [bold]", "--site", "embed")
    assert code == 0, err
    assert "hook_embed" in out
