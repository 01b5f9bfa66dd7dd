"""The circuit in a report: kept in the study, drawn from it, the same after a file."""

from __future__ import annotations

import pytest
import xarray as xr

from interp.circuits import discover, save
from interp.report.circuit_section import check_circuit, circuit_section, circuit_variables, strongest_edges
from interp.report.writing import write_netcdf
from tests.circuits.tiny import tiny_model, tiny_task

TASK = tiny_task(n=3)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def study_of(model, asked):
    return xr.Dataset(circuit_variables(model, TASK, asked, seed=0, progress=False))


def test_the_section_says_what_was_measured(model, tmp_path):
    study = study_of(model, "secant")
    about = study["circuit_score"].attrs
    section = circuit_section(study)
    page = "".join(str(part) for part in section.parts)
    assert section.title == "The circuit"
    assert f"{about['faithfulness']:.0%} of the metric" in page
    assert f"CMD) {about['cmd']:.3f}" in page
    path = write_netcdf(study, tmp_path / "study.nc")
    with xr.open_dataset(path) as again:
        stored = circuit_section(again.load())
    assert [part for part in map(str, stored.parts) if "<table" in part] == [
        part for part in map(str, section.parts) if "<table" in part
    ]


def test_a_circuit_from_a_file_is_the_circuit_shown(model, tmp_path):
    circuit = discover(model, TASK, "eap", edges=25)
    path = save(circuit, tmp_path / "found.json")
    assert check_circuit(str(path)) == str(path)
    kept = study_of(model, str(path))["circuit_kept"].values.astype(bool)
    assert (kept == circuit.mask).all()
    other = tiny_model("gpt2")
    with pytest.raises(ValueError, match=r"found\.json: a circuit of 3 layers"):
        study_of(other, str(path))


def test_a_circuit_with_positions_and_neurons_is_shown_from_its_file(model, tmp_path):
    circuit = discover(model, TASK, "eap", edges=25, positions=True, neurons=[(0, 3), (1, 5)])
    path = save(circuit, tmp_path / "found.json")
    study = study_of(model, str(path))
    write_netcdf(study, tmp_path / "study.nc")
    with xr.open_dataset(tmp_path / "study.nc") as again:
        page = "".join(map(str, circuit_section(again.load()).parts))
    assert f"{circuit.size} between" in page
    assert "summed over 7 positions" in page


def test_positions_of_an_edge_are_named_where_the_task_names_them(model):
    circuit = discover(model, TASK, "eap", edges=60, positions=True)
    table = strongest_edges(circuit, n=5)
    labels = TASK.position_labels
    for writer, reader, found in zip(table["from"], table["to"], table["positions"], strict=True):
        kept = circuit.positions_of(writer, reader)
        named = [f"{at} ({labels[at]})" if labels[at] != "…" else str(at) for at in kept]
        assert found == ", ".join(named)
    assert "6 (END)" in "".join(map(str, table["positions"]))


def test_the_table_lists_the_strongest_first(model):
    circuit = discover(model, TASK, "secant", edges=30)
    table = strongest_edges(circuit, n=5)
    assert [abs(score) for score in table["score"]] == sorted(map(abs, table["score"]), reverse=True)
    assert table["score"][0] == max((circuit.score_of(*edge) for edge in circuit.edges), key=abs)


def test_unknown_methods_are_refused_before_anything_is_run():
    with pytest.raises(ValueError, match="did you mean 'secant'"):
        check_circuit("secants")
