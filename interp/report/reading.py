"""Results that were written, read back."""

from __future__ import annotations

from pathlib import Path

import xarray as xr

from interp.report.writing import read_json


def read(path: str | Path) -> xr.Dataset:
    """A study, or patching effects, from a netCDF or JSON file that this package wrote.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged or holds something else; the message names the file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if path.suffix == ".json":
        return read_json(path)
    try:
        with xr.open_dataset(path, engine="h5netcdf") as stored:
            return stored.load()
    except OSError as error:
        raise ValueError(f"{path} is not netCDF, or is damaged: {error}") from None
