"""The commands on circuits: what they print and write, exit codes, and errors of one line."""

from __future__ import annotations

import json
import re

import networkx as nx
import numpy as np
import pandas as pd
import pytest

import interp
from interp.circuits import METHODS, discover, load
from interp.circuits.job import SUMMARY
from interp.circuits.reuse import overlap
from interp.cli.circuit_commands import distinct_names
from interp.report import read
from interp.tasks import read as read_pairs
from tests.command_line import refused, run
from tests.conftest import tiny_gpt2_hf, tiny_llama_hf

PAIRS = """clean,corrupted,answer,wrong
"When Mary and John went to the store, John gave a drink to","When Mary and John went to the store, Mary gave a drink to"," Mary"," John"
"When Tom and Bob went to the park, Bob gave a book to","When Tom and Bob went to the park, Tom gave a book to"," Tom"," Bob"
"""  # noqa: E501
COMMANDS = ("discover", "evaluate", "circuits compare", "circuits methods", "circuits run")


@pytest.fixture(scope="module")
def folder(tiny_tokenizer, tmp_path_factory):
    """A tiny model and two prompt pairs, on disk."""
    path = tmp_path_factory.mktemp("tiny")
    tiny_llama_hf(len(tiny_tokenizer)).save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    (path / "pairs.csv").write_text(PAIRS)
    return path


@pytest.fixture(scope="module")
def on_tiny(folder):
    return ("--model", folder, "--task", folder / "pairs.csv", "--no-progress")


@pytest.fixture(scope="module")
def files(on_tiny, tmp_path_factory):
    """Circuits of two methods, as `interp discover` writes them."""
    path = tmp_path_factory.mktemp("circuits")
    for method in ("eap", "secant"):
        assert run("discover", *on_tiny, "--method", method, "--edges", 40, "--out", path / f"{method}.json")[0] == 0
    return path / "eap.json", path / "secant.json"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_has_examples(command):
    code, out, _ = run(*command.split(), "--help")
    assert code == 0
    assert "Example" in out
    assert f"interp {command}" in out


# discover


def test_discover_writes_the_circuit_that_discover_finds(folder, files):
    model = interp.load(folder)
    expected = discover(model, read_pairs(model, folder / "pairs.csv"), "eap", edges=40)
    circuit = load(files[0])
    assert circuit.edges == expected.edges
    np.testing.assert_allclose(circuit.scores, expected.scores, rtol=1e-6)


def test_discover_passes_its_options_on(on_tiny, tmp_path):
    path = tmp_path / "circuit.json"
    options = ("--method", "node-atp", "--nodes", 3, "--direction", "denoise", "--metric", "prob_diff", "--signed")
    code, _, err = run("discover", *on_tiny, *options, "--n", 1, "--out", path)
    assert code == 0, err
    circuit = load(path)
    said = {name: circuit.attrs[name] for name in ("method", "direction", "metric", "n_prompts", "signed", "selection")}
    assert said == {
        "method": "node-atp",
        "direction": "denoise",
        "metric": "prob_diff",
        "n_prompts": 1,
        "signed": 1,
        "selection": "threshold",
    }
    assert len([name for name in circuit.nodes if name != "embed"]) <= 3


def test_discover_tells_positions_apart(folder, tmp_path):
    (tmp_path / "one.csv").write_text("\n".join(PAIRS.splitlines()[:2]))
    on_one = ("--model", folder, "--task", tmp_path / "one.csv", "--no-progress")
    out_to = ("--out", tmp_path / "run")
    assert run("discover", *on_one, "--method", "eap", "--positions", "--edges", 40, *out_to)[0] == 0
    path = tmp_path / "run" / "circuit.json"
    circuit = load(path)
    model = interp.load(folder)
    expected = discover(model, read_pairs(model, tmp_path / "one.csv"), "eap", edges=40, positions=True)
    assert (circuit.mask == expected.mask).all()
    assert "summed over" in (tmp_path / "run" / "circuit.html").read_text()
    code, out, err = run("discover", *on_one, "--method", "eap", "--positions", "--edges", 40)
    assert code == 0, err
    assert re.search(r"\d+ of [\d,]+ edges at \d+ positions", out)
    assert "positions" in out.partition("strongest edges")[2]
    for ending in ("csv", "json", "nc"):
        code, out, err = run("evaluate", "--circuit", path, *on_one, "--out", tmp_path / f"curve.{ending}")
        assert code == 0, err
        assert "the circuit itself: faithfulness" in out
    assert "methods that can: eap" in refused("discover", *on_one, "--method", "cdt", "--positions")


def test_discover_without_a_file_prints_edges_and_heads(on_tiny):
    code, out, err = run("discover", *on_tiny, "--method", "eap", "--edges", 40)
    assert code == 0, err
    assert re.search(r"pairs, eap: \d+ of 190 edges .*heads and .* nodes in all", out)
    assert "strongest edges" in out
    assert "heads by Σ |score|" in out
    assert "L0H1.q" in out or "mlp" in out


def test_discover_fills_a_folder(on_tiny, tmp_path):
    code, out, err = run("discover", *on_tiny, "--method", "eap", "--edges", 40, "--out", tmp_path / "run")
    assert code == 0, err
    names = ["circuit.dot", "circuit.graphml", "circuit.html", "circuit.json"]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == names
    assert out.count("wrote ") == 4
    circuit = load(tmp_path / "run" / "circuit.json")
    drawn = nx.read_graphml(tmp_path / "run" / "circuit.graphml")
    assert set(circuit.nodes) <= set(drawn.nodes)
    assert (tmp_path / "run" / "circuit.dot").read_text().startswith("digraph circuit {")
    page = (tmp_path / "run" / "circuit.html").read_text()
    assert page.startswith("<!doctype html>")
    assert circuit.edges[0][1] in page
    # The same folder once more: an existing one will do.
    assert run("discover", *on_tiny, "--method", "eap", "--out", tmp_path / "run")[0] == 0


@pytest.mark.parametrize("ending", ["dot", "graphml", "html"])
def test_discover_writes_one_file_by_its_ending(on_tiny, tmp_path, ending):
    path = tmp_path / f"circuit.{ending}"
    code, out, err = run("discover", *on_tiny, "--method", "eap", "--edges", 40, "--out", path)
    assert code == 0, err
    assert f"wrote {path}" in out
    assert list(tmp_path.iterdir()) == [path]


def test_discover_refuses_before_the_model_is_loaded(tmp_path):
    nowhere = ("--model", "no/such-model")
    assert "did you mean 'eap-ig'" in refused("discover", *nowhere, "--method", "eapig")
    assert "must end in .json, .graphml, .dot, .html, or be a folder" in refused(
        "discover", *nowhere, "--out", tmp_path / "circuit.pdf"
    )
    assert "does not exist: make it first" in refused("discover", *nowhere, "--out", tmp_path / "no" / "circuit.json")
    assert "one of top, greedy" in refused("discover", *nowhere, "--selection", "best")
    assert "one of noise, denoise" in refused("discover", *nowhere, "--direction", "up")
    assert "did you mean 'logit_diff'" in refused("discover", *nowhere, "--metric", "logit_dif")
    assert "is not a task" in refused("discover", *nowhere, "--task", "ioy")


def test_acdc_takes_the_divergence_by_name(on_tiny):
    code, out, err = run("discover", *on_tiny, "--method", "acdc", "--metric", "kl", "--threshold", 0.5, "--n", 1)
    assert code == 0, err
    assert "acdc" in out


def test_report_refuses_a_circuit_before_the_model_is_loaded(folder, tmp_path):
    nowhere = ("--model", "no/such-model", "--out", tmp_path / "report.html")
    assert "did you mean 'eap-ig'" in refused("report", *nowhere, "--circuit", "eapig")
    assert "none.json" in refused("report", *nowhere, "--circuit", tmp_path / "none.json")
    assert "not a circuit file" in refused("report", *nowhere, "--circuit", folder / "config.json")


def test_discover_refuses_options_that_do_not_go_together():
    nowhere = ("--model", "no/such-model")
    assert "give one of edges, threshold" in refused("discover", *nowhere, "--edges", 5, "--threshold", 0.1)
    assert "scores edges" in refused("discover", *nowhere, "--method", "eap", "--nodes", 5)
    assert "by threshold=, not edges=" in refused("discover", *nowhere, "--method", "acdc", "--edges", 5)
    assert "nothing that 'acdc' can do" in refused("discover", *nowhere, "--method", "acdc", "--positions")
    assert "without a position axis" in refused("discover", *nowhere, "--positions", "--selection", "greedy")


# evaluate


def test_evaluate_prints_the_curve_and_writes_it(on_tiny, files, tmp_path):
    path = tmp_path / "curve.nc"
    code, out, err = run("evaluate", "--circuit", files[0], *on_tiny, "--out", path)
    assert code == 0, err
    curve = read(path)
    assert curve["faithfulness"].dims == ("ranking", "size")
    assert f"CPR {curve.attrs['cpr']:.3f}, CMD {curve.attrs['cmd']:.3f}" in out
    assert f"the circuit itself: faithfulness {float(curve['circuit_faithfulness']):.3f}" in out
    assert "100.0%" in out
    assert "190" in out
    for one in curve["faithfulness"].sel(ranking="magnitude").values:
        assert f"{one:.3f}" in out
    assert curve.attrs["ablation"] == "resample"


@pytest.mark.parametrize("ending", ["csv", "json"])
def test_evaluate_with_another_ablation_and_format(on_tiny, files, tmp_path, ending):
    path = tmp_path / f"curve.{ending}"
    code, out, err = run("evaluate", "--circuit", files[0], *on_tiny, "--ablation", "zero", "--n", 1, "--out", path)
    assert code == 0, err
    assert "zero ablation, logit_diff, n = 1 prompts" in out
    frame = pd.read_csv(path) if ending == "csv" else read(path).to_dataframe().reset_index()
    whole = frame[frame["size"] == 1]
    np.testing.assert_allclose(whole["faithfulness"], 1, atol=1e-4)


def test_evaluate_takes_the_task_of_the_circuit(folder, files, tmp_path):
    content = json.loads(files[0].read_text())
    content["attrs"]["task"] = "ioi"
    (tmp_path / "circuit.json").write_text(json.dumps(content))
    code, out, err = run("evaluate", "--circuit", tmp_path / "circuit.json", "--model", folder, "--n", 2)
    assert code == 0, err
    assert "on ioi" in out
    del content["attrs"]["task"]
    (tmp_path / "circuit.json").write_text(json.dumps(content))
    assert "give --task" in refused("evaluate", "--circuit", tmp_path / "circuit.json", "--model", folder)


def test_evaluate_refuses(folder, on_tiny, files, tmp_path, tiny_tokenizer):
    assert "no.json" in refused("evaluate", "--circuit", tmp_path / "no.json", *on_tiny)
    assert "not a circuit file" in refused("evaluate", "--circuit", folder / "config.json", *on_tiny)
    assert "one of resample, mean, zero" in refused("evaluate", "--circuit", files[0], *on_tiny, "--ablation", "none")
    assert "must end in .csv, .json, .nc" in refused("evaluate", "--circuit", files[0], "--out", tmp_path / "x.html")
    assert "did you mean 'logit_diff'" in refused(
        "evaluate", "--circuit", files[0], "--model", "no/such-model", "--metric", "logit_dif"
    )
    tiny_gpt2_hf(len(tiny_tokenizer)).save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer.save_pretrained(tmp_path / "gpt2")
    other = ("--model", tmp_path / "gpt2", "--task", folder / "pairs.csv")
    assert "key/value heads, 190 edges; gpt2 has" in refused("evaluate", "--circuit", files[0], *other)


# circuits


def test_methods_are_listed_with_level_and_cost():
    code, out, _ = run("circuits", "methods")
    assert code == 0
    for name, method in METHODS.items():
        assert name in out
        assert method.summary in out
        assert method.cost in out


def test_compare_prints_and_writes_the_overlap(files, tmp_path):
    path = tmp_path / "overlap.csv"
    code, out, err = run("circuits", "compare", *files, "--out", path)
    assert code == 0, err
    circuits = {file.stem: load(file) for file in files}
    pair = overlap(circuits).sel(first="eap", second="secant")
    assert f"{float(pair['edge_jaccard']):.3f}" in out
    assert f"{float(pair['node_jaccard']):.3f}" in out
    shared = [name for name in circuits["eap"].heads if name in circuits["secant"].heads]
    assert f"heads in all of them: {', '.join(shared)}\n" in out
    frame = pd.read_csv(path).set_index(["first", "second"])
    assert frame.loc[("eap", "secant"), "edge_jaccard"] == pytest.approx(float(pair["edge_jaccard"]))
    assert len(frame) == 4


def test_compare_refuses(files, tmp_path):
    assert "give two or more" in refused("circuits", "compare", files[0])
    assert "named twice" in refused("circuits", "compare", files[0], files[0])
    assert "none.json" in refused("circuits", "compare", files[0], tmp_path / "none.json")


def test_names_of_files_are_what_tells_them_apart(tmp_path):
    def names(*paths):
        return distinct_names([tmp_path / path for path in paths])

    assert names("a.json", "b.json") == ["a", "b"]
    assert names("ioi/eap/circuit.json", "induction/eap/circuit.json") == ["ioi", "induction"]
    assert names("x/ioi/eap/circuit.json", "y/ioi/relp/circuit.json") == ["x/ioi/eap", "y/ioi/relp"]
    assert names("circuit.json", "old/circuit.json") == ["circuit", "old/circuit"]


def test_run_goes_through_a_sweep_and_then_takes_what_is_there(folder, tmp_path):
    sweep, out_folder = tmp_path / "sweep.toml", tmp_path / "out"
    sweep.write_text(
        f'models = ["{folder}"]\ntasks = ["{folder / "pairs.csv"}"]\nmethods = ["eap", "random"]\n'
        "n = 1\nn_evaluation = 1\nedges = 40\nsizes = [0.1, 1.0]\n"
    )
    code, out, err = run("circuits", "run", sweep, "--out", out_folder, "--no-progress")
    assert code == 0, err
    assert "2 cells: 2 computed, 0 there already" in out
    assert f"wrote {out_folder / SUMMARY}" in out
    assert pd.read_csv(out_folder / SUMMARY)["method"].tolist() == ["eap", "random"]
    code, out, err = run("circuits", "run", sweep, "--out", out_folder, "--no-progress")
    assert code == 0, err
    assert "2 cells: 0 computed, 2 there already" in out


def test_run_ends_with_one_if_a_cell_failed(folder, tmp_path):
    sweep = tmp_path / "sweep.toml"
    sweep.write_text(f'models = ["{folder}"]\ntasks = ["{folder / "pairs.csv"}"]\nmethods = ["eap"]\nn = 5\n')
    code, out, err = run("circuits", "run", sweep, "--out", tmp_path / "out", "--no-progress")
    assert code == 1
    assert "pairs.csv has 2 prompt pairs" in out
    assert "1 of 1 cells failed" in err
    assert "Traceback" not in err


def test_run_refuses(tmp_path):
    assert "none.toml" in refused("circuits", "run", tmp_path / "none.toml", "--out", tmp_path / "out")
    (tmp_path / "sweep.toml").write_text('models = ["x"]\ntasks = ["ioi"]\nmethods = ["eap-i"]\n')
    assert "sweep.toml: 'eap-i' is not a discovery method" in refused(
        "circuits", "run", tmp_path / "sweep.toml", "--out", tmp_path / "out"
    )
    assert "--help" in refused("circuits", "run", tmp_path / "sweep.toml")
