"""Files are whole or not there, and numbers come back as they went."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import xarray as xr

from interp.report import read, written
from interp.report.writing import check_target, write_json, write_netcdf, write_text
from tests.report.synthetic import synthetic_study


def test_file_appears_only_when_whole(tmp_path):
    path = tmp_path / "report.html"
    with written(path) as temporary:
        temporary.write_text("half")
        assert not path.exists()
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".html"
    assert path.read_text() == "half"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_interrupted_writing_leaves_the_old_file_and_no_other(tmp_path, error):
    path = write_text("old", tmp_path / "report.html")

    def write_half():
        with written(path) as temporary:
            temporary.write_text("ne")
            raise error

    with pytest.raises(error):
        write_half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_process_killed_before_the_rename_leaves_no_torn_file(tmp_path):
    path = tmp_path / "report.html"
    code = (
        "import sys, time; from interp.report.writing import written\n"
        "with written(sys.argv[1]) as temporary:\n"
        "    temporary.write_text('half'); print('written', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "written"
        os.kill(process.pid, signal.SIGKILL)
        process.wait(timeout=30)
    finally:
        process.kill()
        process.stdout.close()
    assert not path.exists()
    # What is left behind is hidden, and does not pass for the report.
    assert all(one.name.startswith(".") and ".part" in one.name for one in tmp_path.iterdir())


def test_target_is_checked(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist: make it first"):
        check_target(tmp_path / "nowhere" / "report.html")
    with pytest.raises(IsADirectoryError, match="give the name of a file"):
        check_target(tmp_path)


@pytest.mark.parametrize(("write", "name"), [(write_netcdf, "study.nc"), (write_json, "study.json")])
def test_study_comes_back_equal(tmp_path, write, name):
    study = synthetic_study()
    back = read(write(study, tmp_path / name))
    assert set(back.variables) == set(study.variables)
    assert back.attrs == study.attrs
    for variable in study.variables:
        assert back[variable].dims == study[variable].dims
        expected, found = study[variable].values, back[variable].values
        if expected.dtype.kind == "f":
            np.testing.assert_array_equal(found.astype(expected.dtype), expected)
        else:
            assert found.tolist() == expected.tolist()


def test_json_is_strict_and_keeps_undefined_values(tmp_path):
    path = write_json(synthetic_study(), tmp_path / "study.json")

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    json.loads(path.read_text(), parse_constant=refuse)
    assert np.isnan(read(path)["entropy"][0, 0])


def test_strings_of_other_classes_survive_netcdf(tmp_path):
    class Version(str):
        pass

    path = write_netcdf(xr.Dataset(attrs={"torch": Version("2.13")}), tmp_path / "x.nc")
    assert read(path).attrs["torch"] == "2.13"


def test_damaged_files_are_refused_in_one_line(tmp_path):
    whole = write_netcdf(synthetic_study(), tmp_path / "whole.nc").read_bytes()
    cases = {
        "cut.nc": whole[: len(whole) // 2],
        "cut.json": b'{"data_vars": {"a"',
        "foreign.json": b"[1, 2]",
        "lacking.json": b'{"coords": {}, "attrs": {}, "data_vars": {"a": {"dims": []}}}',
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name) as caught:
            read(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read(tmp_path / "none.nc")


def test_temporary_names_of_two_writers_differ(tmp_path):
    with written(tmp_path / "a.txt") as one, written(tmp_path / "a.txt") as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")
    assert (tmp_path / "a.txt").read_text() == "one"


def test_nul_in_a_text_is_written_as_a_sign(tmp_path):
    texts = xr.Dataset({"text": ("x", np.array(["a\0b", "c"], dtype=object)), "n": ("x", [1, 2])})
    found = read(write_netcdf(texts, tmp_path / "texts.nc"))
    assert found["text"].values.tolist() == ["a␀b", "c"]
    assert texts["text"].values[0] == "a\0b"
