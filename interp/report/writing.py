"""Files that are whole or not there: written beside their final name, then renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import xarray as xr


@contextmanager
def written(path: str | Path) -> Iterator[Path]:
    """A temporary name to write to, which takes the place of `path` when the block ends without an exception.

    A reader sees the old file or the new one, never a part. A process that is killed inside the block leaves `path`
    as it was.

    Raises:
        FileNotFoundError: if the folder does not exist.
        IsADirectoryError: if `path` is a folder.
    """
    path = check_target(path)
    # The same suffix, because writers go by it.
    temporary = path.with_name(f".{path.stem}.{uuid4().hex[:8]}.part{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_target(path: str | Path) -> Path:
    """`path`, if a file can be written there: asked before a long computation rather than after it.

    Raises:
        FileNotFoundError: if the folder does not exist.
        IsADirectoryError: if `path` is a folder.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder {path.parent} does not exist: make it first, or write elsewhere")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: give the name of a file")
    return path


def write_text(text: str, path: str | Path) -> Path:
    """Write UTF-8 text to `path`, whole or not at all."""
    with written(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def write_netcdf(results: xr.Dataset | xr.DataArray, path: str | Path) -> Path:
    """Write labelled arrays as netCDF 4; `xarray.open_dataset` reads them back with coordinates and attrs.

    NUL in a text, which tokens of single bytes have and HDF5 refuses, is written as ␀.
    """
    # torch's version is a string of a class of its own, which HDF5 refuses.
    plain = results.assign_attrs({name: str(one) for name, one in results.attrs.items() if isinstance(one, str)})
    if isinstance(plain, xr.Dataset):
        plain = plain.assign(
            {name: _without_nul(plain[name]) for name in plain.variables if plain[name].dtype == object}
        )
    with written(path) as temporary:
        plain.to_netcdf(temporary, engine="h5netcdf")
    return Path(path)


def _without_nul(texts: xr.DataArray) -> xr.DataArray:
    clean = [one.replace("\0", "␀") if isinstance(one, str) else one for one in texts.values.ravel().tolist()]
    return texts.copy(data=np.array(clean, dtype=object).reshape(texts.shape))


def write_json(results: xr.Dataset | xr.DataArray, path: str | Path) -> Path:
    """Write labelled arrays as JSON in xarray's `to_dict` form; NaN becomes null. Read back by `read_json`."""
    return write_text(json.dumps(_plain(results.to_dict()), allow_nan=False), path)


def read_json(path: str | Path) -> xr.Dataset:
    """The Dataset that `write_json` wrote.

    Raises:
        ValueError: if the file is not such a file; the message names file and field.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    for field in ("data_vars", "coords", "attrs"):
        if not isinstance(content, dict) or field not in content:
            raise ValueError(f"{path} holds no results: field {field!r} is missing")
    for name, variable in {**content["data_vars"], **content["coords"]}.items():
        if not isinstance(variable, dict) or "data" not in variable or "dims" not in variable:
            raise ValueError(f"{path}: {name!r} lacks its data or dims")
        variable["data"] = _array(variable["data"])
    return xr.Dataset.from_dict(content)


def _array(data: Any) -> np.ndarray:
    """Nested lists as an array; nulls among numbers are NaN."""
    array = np.asarray(data, dtype=object)
    if all(isinstance(one, str) for one in array.ravel()):
        return array
    if any(one is None or isinstance(one, float) for one in array.ravel()):
        return array.astype(float)
    return np.asarray(data)


def _plain(value: Any) -> Any:
    """What JSON can hold: numpy scalars as Python's, NaN as None."""
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not np.isfinite(value) else value
