"""A job of many cells: what it writes, what it takes over, and that killing it anywhere changes no byte."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import interp
from interp.circuits import cell_files, discover, evaluate, job, load
from interp.circuits.job import run_job
from interp.circuits.sweep_file import Sweep
from interp.patching.writing import only_writer
from interp.tasks import read
from tests.conftest import tiny_gpt2_hf, tiny_llama_hf

NAMES = ("Mary", "John", "Tom", "James", "Alice", "Bob", "Kate", "Anna")
SWEEP = {"methods": ["eap", "secant"], "n": 3, "n_evaluation": 2, "edges": 40, "sizes": [0.1, 0.5, 1.0]}


@pytest.fixture(scope="module")
def here(tiny_tokenizer, tmp_path_factory):
    """Two tiny models and two tasks, on disk."""
    path = tmp_path_factory.mktemp("job")
    for name, hf in (("llama", tiny_llama_hf(len(tiny_tokenizer))), ("gpt2", tiny_gpt2_hf(len(tiny_tokenizer)))):
        hf.save_pretrained(path / name)
        tiny_tokenizer.save_pretrained(path / name)
    for name, place in (("stores", "store"), ("parks", "park")):
        rows = [
            f"When {one} and {other} went to the {place}, {other} gave a book to,"
            f"When {one} and {other} went to the {place}, {one} gave a book to, {one}, {other}"
            for one, other in pairwise(NAMES)
        ]
        lines = [row.replace("store, ", "store and ").replace("park, ", "park and ") for row in rows]
        (path / f"{name}.csv").write_text("\n".join(["clean,corrupted,answer,wrong", *lines]) + "\n")
    return path


@pytest.fixture(scope="module")
def sweep(here):
    models, tasks = ([str(here / name) for name in names] for names in (("llama",), ("stores.csv",)))
    return {"models": models, "tasks": tasks, **SWEEP}


@pytest.fixture(scope="module")
def finished(sweep, tmp_path_factory):
    """A finished job: its folder and its summary."""
    out = tmp_path_factory.mktemp("finished") / "out"
    return out, run_job(sweep, out)


def bytes_of(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def folders_of(out: Path) -> set[str]:
    return {str(path.relative_to(out)) for path in out.rglob("*") if path.is_dir()}


# What it writes


def test_a_cell_holds_the_circuit_and_its_test(here, finished):
    out, rows = finished
    model = interp.load(here / "llama")
    pairs = read(model, here / "stores.csv")
    for row in rows.itertuples():
        folder = out / "llama" / "stores" / row.method
        assert {path.name for path in folder.iterdir()} == {"circuit.json", "curve.csv", "cell.json"}
        circuit = load(folder / "circuit.json")
        expected = discover(model, pairs[:3], row.method, edges=40)
        assert circuit.edges == expected.edges
        np.testing.assert_array_equal(circuit.scores, expected.scores)
        assert set(expected.attrs) - set(circuit.attrs) == {"seconds"}
        # Tested on the two pairs that come after those that it was found on.
        tested = evaluate(model, pairs[3:5], expected, sizes=SWEEP["sizes"])
        curve = pd.read_csv(folder / "curve.csv")
        np.testing.assert_allclose(
            curve["faithfulness"].to_numpy().reshape(2, 3), tested["faithfulness"].values, rtol=1e-6, atol=1e-9
        )
        assert set(curve) == {"ranking", "size", "n_edges", "metric", "faithfulness", "kl", "accuracy"}
        assert row.cpr == pytest.approx(tested.attrs["cpr"])
        assert row.cmd == pytest.approx(tested.attrs["cmd"])
        assert row.faithfulness == pytest.approx(float(tested["circuit_faithfulness"]))
        assert row.n_edges == expected.n_edges
        assert row.n_nodes == len(expected.nodes)


def test_the_summary_has_a_row_for_each_cell(finished):
    out, rows = finished
    stored = pd.read_csv(out / job.SUMMARY)
    assert stored["method"].tolist() == ["eap", "secant"]
    assert list(stored.columns) == ["model", "task", "method", *job.MEASURES, "error"]
    assert list(rows.columns) == [*stored.columns, "seconds"]
    assert (rows["seconds"] > 0).all()
    assert stored["error"].isna().all()
    np.testing.assert_allclose(stored["cmd"], rows["cmd"])


def test_nothing_that_varies_is_stored(finished, sweep, tmp_path):
    out, _ = finished
    assert not any("seconds" in content.decode() for content in bytes_of(out).values())
    assert str(tmp_path.parent) not in "".join(content.decode() for content in bytes_of(out).values())
    time.sleep(1.1)  # a date to the second would show
    run_job(sweep, tmp_path / "again")
    assert bytes_of(tmp_path / "again") == bytes_of(out)


def test_a_toml_file_says_the_same_as_a_mapping(sweep, finished, tmp_path):
    lines = [f"{name} = {json.dumps(value)}" for name, value in sweep.items()]
    (tmp_path / "sweep.toml").write_text("\n".join(lines))
    assert Sweep.of(tmp_path / "sweep.toml") == Sweep.of(sweep)
    assert len(Sweep.of(sweep).cells) == 2


def test_a_curve_of_one_size_has_no_area(sweep, tmp_path):
    for _ in range(2):  # computed, then read
        rows = run_job({**sweep, "methods": ["eap"], "sizes": [0.5]}, tmp_path / "out")
        assert rows[["cpr", "cmd"]].isna().all(axis=None)
        assert rows["error"].tolist() == [""]
        assert rows["faithfulness"].notna().all()


def test_prompts_are_those_of_discovery_if_none_are_asked_for(sweep, finished, tmp_path):
    one = run_job({**sweep, "methods": ["eap"], "n": 5, "n_evaluation": 0}, tmp_path / "out")
    circuit = load(tmp_path / "out" / "llama" / "stores" / "eap" / "circuit.json")
    model = interp.load(sweep["models"][0])
    tested = evaluate(model, read(model, sweep["tasks"][0])[:5], circuit, sizes=SWEEP["sizes"])
    assert one["cmd"][0] == pytest.approx(tested.attrs["cmd"])


# What it takes over


def computed(rows: pd.DataFrame) -> list[str]:
    return rows.loc[rows["seconds"].notna(), "method"].tolist()


def test_finished_cells_are_taken_and_others_computed(sweep, finished, tmp_path):
    out = copied(finished[0], tmp_path)
    before = bytes_of(out)
    again = run_job(sweep, out)
    assert computed(again) == []
    pd.testing.assert_frame_equal(again.drop(columns="seconds"), finished[1].drop(columns="seconds"))
    assert bytes_of(out) == before
    more = run_job({**sweep, "methods": ["eap", "random", "secant"]}, out)
    assert computed(more) == ["random"]
    assert {name: content for name, content in bytes_of(out).items() if name in before and name != job.SUMMARY} == {
        name: content for name, content in before.items() if name != job.SUMMARY
    }


@pytest.mark.parametrize(
    "change",
    [{"edges": 41}, {"seed": 1}, {"n_evaluation": 3}, {"n": 4}, {"ablation": "mean"}, {"sizes": [0.1, 1.0]}],
)
def test_another_choice_is_another_cell(sweep, finished, tmp_path, change):
    out = copied(finished[0], tmp_path)
    only = {"methods": ["eap"]}
    assert computed(run_job({**sweep, **only}, out)) == []
    assert computed(run_job({**sweep, **only, **change}, out)) == ["eap"]
    assert computed(run_job({**sweep, **only, **change}, out)) == []


def test_other_weights_are_another_model(here, sweep, finished, tiny_tokenizer, tmp_path):
    out, other = copied(finished[0], tmp_path), tmp_path / "llama"
    hf = tiny_llama_hf(len(tiny_tokenizer))
    hf.save_pretrained(other)
    tiny_tokenizer.save_pretrained(other)
    elsewhere = {**sweep, "models": [str(other)]}
    assert computed(run_job(elsewhere, out)) == []  # the same weights under another path
    weight = hf.model.layers[2].mlp.down_proj.weight
    weight.data[-1, -1] += 1e-3
    hf.save_pretrained(other)
    assert computed(run_job(elsewhere, out)) == ["eap", "secant"]
    hf.config.rms_norm_eps = 1e-3
    hf.save_pretrained(other)
    assert computed(run_job(elsewhere, out)) == ["eap", "secant"]


@pytest.mark.parametrize("damage", ["circuit.json", "curve.csv", "cell.json"])
@pytest.mark.parametrize("how", ["cut", "gone"])
def test_a_damaged_cell_is_computed_again(sweep, finished, tmp_path, damage, how):
    out = copied(finished[0], tmp_path)
    path = out / "llama" / "stores" / "secant" / damage
    if how == "cut":
        path.write_bytes(path.read_bytes()[:-20])
    else:
        path.unlink()
    assert computed(run_job(sweep, out)) == ["secant"]
    assert bytes_of(out) == bytes_of(finished[0])


def copied(out: Path, to: Path) -> Path:
    return Path(shutil.copytree(out, to / "out"))


# What fails


def test_a_bad_cell_does_not_stop_the_others(sweep, tmp_path, monkeypatch):
    whole = job.discover

    def fails(model, task, method, **choices):
        if method == "eap":
            raise RuntimeError("out of something\nwith details")
        return whole(model, task, method, **choices)

    monkeypatch.setattr(job, "discover", fails)
    rows = run_job(sweep, tmp_path / "out")
    assert rows["error"].tolist() == ["RuntimeError: out of something", ""]
    assert computed(rows) == ["secant"]
    stored = pd.read_csv(tmp_path / "out" / job.SUMMARY)
    assert stored["error"].fillna("").tolist() == ["RuntimeError: out of something", ""]
    assert stored["cmd"].isna().tolist() == [True, False]
    assert not (tmp_path / "out" / "llama" / "stores" / "eap").exists()
    monkeypatch.undo()
    assert computed(run_job(sweep, tmp_path / "out")) == ["eap"]


def test_a_model_or_task_that_cannot_be_had_fails_its_cells(here, sweep, finished, tmp_path):
    out = copied(finished[0], tmp_path)
    (tmp_path / "empty").mkdir()
    few = tmp_path / "few.csv"
    few.write_text("\n".join((here / "stores.csv").read_text().splitlines()[:3]))
    models, tasks = [str(tmp_path / "empty"), *sweep["models"]], [str(few), *sweep["tasks"]]
    rows = run_job({**sweep, "models": models, "tasks": tasks}, out).set_index(["model", "task", "method"])
    assert "no config.json" in rows["error"]["empty", "stores", "eap"]
    assert "few.csv has 2 prompt pairs; n + n_evaluation is 5" in rows["error"]["llama", "few", "eap"]
    assert (rows["error"]["llama", "stores"] == "").all()
    assert bytes_of(out / "llama" / "stores") == bytes_of(finished[0] / "llama" / "stores")


def test_a_model_that_is_gone_leaves_its_cells(sweep, finished, tmp_path):
    out = copied(finished[0], tmp_path)
    (tmp_path / "llama").mkdir()
    assert run_job({**sweep, "models": [str(tmp_path / "llama")]}, out)["error"].str.contains("no config.json").all()
    assert bytes_of(out / "llama") == bytes_of(finished[0] / "llama")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ["eapp"]}, "'eapp' is not a discovery method; did you mean 'eap'"),
        ({"methods": []}, "methods is empty"),
        ({"methods": "eap"}, "field 'methods' is 'eap'; it must be a list"),
        ({"methods": ["eap", "eap"]}, "two of them are called 'eap'"),
        ({"models": ["a/x", "a--x"]}, "two of them are called 'a--x'"),
        ({"models": None}, "field 'models' is missing"),
        ({"models": [1]}, "field 'models' has 1; it must be text"),
        ({"tasks": ["ioy"]}, "'ioy' is not a task; did you mean 'ioi'"),
        ({"n": 0}, "n=0; it is at least 1"),
        ({"n": "many"}, "field 'n' is 'many'; it must be int"),
        ({"n": True}, "field 'n' is True"),
        ({"edges": 0}, "edges=0"),
        ({"sizes": [2.0]}, "shares of all edges"),
        ({"direction": "sideways"}, "one of denoise, noise"),
        ({"ablation": "none"}, "one of resample, mean, zero"),
        ({"selection": "best"}, "one of top, greedy"),
        ({"metric": "loss"}, "loss"),
        ({"dtype": "float33"}, "float33"),
        ({"dtype": "int8"}, "dtype='int8'; there are float32"),
        ({"device": "gpu"}, "device='gpu'; it is cpu, cuda"),
        ({"threshold": -1}, "threshold=-1"),
        ({"edgs": 3}, "'edgs' is not a field of a sweep; did you mean 'edges'"),
    ],
)
def test_a_sweep_that_cannot_be_run_is_refused_at_once(sweep, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        run_job({**sweep, **change}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_and_damaged_files_are_named(sweep, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.csv"):
        run_job({**sweep, "tasks": ["none.csv"]}, tmp_path / "out")
    (tmp_path / "sweep.toml").write_text("models = [")
    with pytest.raises(ValueError, match=r"sweep\.toml: not TOML"):
        run_job(tmp_path / "sweep.toml", tmp_path / "out")
    (tmp_path / "sweep.toml").write_text("models = ['gpt2']")
    with pytest.raises(ValueError, match=r"sweep\.toml: field 'tasks' is missing"):
        run_job(tmp_path / "sweep.toml", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run_job(sweep, tmp_path / "nowhere" / "out")


def test_a_second_job_at_the_same_time_is_refused(sweep, finished, tmp_path):
    out = copied(finished[0], tmp_path)
    writing = out / "llama" / "stores" / ".secant.part"
    writing.mkdir()
    with only_writer(out), pytest.raises(BlockingIOError, match="another job is writing to this folder"):
        run_job(sweep, out)
    assert writing.exists()  # what the first one is at stays
    run_job(sweep, out)
    assert bytes_of(out) == bytes_of(finished[0])


# Killed


class Killed(BaseException):
    """What no `except Exception` sees, as a signal is not seen."""


class Steps:
    """Counts the moments before and after every step that touches files, and stops at one of them."""

    def __init__(self, monkeypatch):
        self.n, self.stop = 0, -1
        self._rmtree, self._unlink = shutil.rmtree, self._counted(Path.unlink)
        monkeypatch.setattr(os, "replace", self._counted(os.replace))
        monkeypatch.setattr(cell_files.shutil, "rmtree", self._remove)
        monkeypatch.setattr(job, "save", self._counted(job.save))

    def _moment(self):
        self.n += 1
        if self.n == self.stop:
            raise Killed

    def _counted(self, step):
        def counted(*given, **choices):
            self._moment()
            done = step(*given, **choices)
            self._moment()
            return done

        return counted

    def _remove(self, folder, ignore_errors=False):
        for path in sorted(folder.glob("*"), reverse=True):  # a folder can be left half removed
            self._unlink(path)
        self._rmtree(folder, ignore_errors=ignore_errors)

    def survives(self, stop: int, run) -> bool:
        """Whether the run came to its end before the moment where it was to be stopped."""
        self.n, self.stop = 0, stop
        try:
            run()
        except Killed:
            return False
        finally:
            self.stop = -1
        return True


def test_stopped_before_or_after_any_step_with_files_it_goes_on_to_the_same_bytes(sweep, tmp_path, monkeypatch):
    """In one process: an older job's cell is replaced, and each moment of that is where the job stops once."""
    sweep = {**sweep, "methods": ["eap"]}
    older, undisturbed = tmp_path / "older", tmp_path / "undisturbed"
    run_job({**sweep, "edges": 30}, older)
    run_job(sweep, undisturbed)
    # Loaded and computed once: what is asked here is what happens to files.
    plan = Sweep.of(sweep)
    loaded = job._load(sweep["models"][0], plan)
    cell = job._compute(loaded.model, job._prompts(loaded.model, sweep["tasks"][0], plan), plan, "eap", False)
    monkeypatch.setattr(job, "_load", lambda *_: loaded)
    monkeypatch.setattr(job, "_compute", lambda *_: cell)
    steps, stop = Steps(monkeypatch), 1
    out = copied(older, tmp_path / "at1")
    while not steps.survives(stop, lambda: run_job(sweep, out)):  # noqa: B023
        for record in out.glob("*/*/[!.]*/cell.json"):  # whatever is there is whole
            known = json.loads(record.read_text())["files"]
            assert known == {name: cell_files._sha256(record.parent / name) for name in known}
        run_job(sweep, out)
        assert bytes_of(out) == bytes_of(undisturbed), stop
        assert folders_of(out) == folders_of(undisturbed), stop
        stop += 1
        out = copied(older, tmp_path / f"at{stop}")
    assert stop > 15


@pytest.mark.slow
def test_killed_ten_times_at_random_moments_it_ends_with_the_same_bytes(here, tmp_path):
    sweep = {
        "models": [str(here / name) for name in ("llama", "gpt2")],
        "tasks": [str(here / name) for name in ("stores.csv", "parks.csv")],
        **SWEEP,
        "methods": ["eap", "relp", "secant", "eap-clean-corrupted", "node-atp", "hisp", "random"],
    }
    # Processes fork from one that has imported everything, so that a start takes no time.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["interp.circuits.job"])
    undisturbed, out, draw = tmp_path / "undisturbed", tmp_path / "out", random.Random(0)
    assert finish(start(processes, sweep, undisturbed)) == 0
    n_kills, finished_before = 0, set()
    while n_kills < 10:
        process = start(processes, sweep, out)
        # Anywhere in the job: while the model is loaded, in a cell, between cells, while files are written.
        wanted, patience = finished_cells(out) + draw.choice((0, 1, 2)), draw.uniform(0, 0.4)
        while finished_cells(out) < wanted and process.is_alive():
            time.sleep(0.001)
        time.sleep(patience if wanted == 0 else patience / 8)
        process.kill()
        if finish(process) == 0:  # it was done before the signal came: once more from the start
            shutil.rmtree(out)
            continue
        assert process.exitcode == -signal.SIGKILL
        n_kills += 1
        finished_before.add(finished_cells(out))
    assert len(finished_before) > 3
    assert finish(start(processes, sweep, out)) == 0
    assert bytes_of(out) == bytes_of(undisturbed)
    assert folders_of(out) == folders_of(undisturbed)


def start(processes, sweep, out: Path):
    process = processes.Process(target=run_job, args=(sweep, out), kwargs={"progress": False})
    process.start()
    return process


def finish(process) -> int:
    process.join()
    return process.exitcode


def finished_cells(out: Path) -> int:
    return len([path for path in out.glob("*/*/*/cell.json") if not path.parent.name.startswith(".")])
