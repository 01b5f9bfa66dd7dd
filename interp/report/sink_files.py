"""What is known of a model's sinks as files: numbers for programs, and a page to read."""

from __future__ import annotations

from pathlib import Path

import xarray as xr

from interp.model import Model
from interp.patching.labels import model_provenance
from interp.report.page import Section, definitions, page
from interp.report.sink_section import sink_section
from interp.report.sink_study import Texts, sink_variables
from interp.report.writing import check_target, write_json, write_netcdf, write_text

ENDINGS = (".html", ".nc", ".json")


def sink_numbers(
    model: Model,
    texts: Texts,
    *,
    source: str,
    epsilon: float,
    seed: int = 0,
    command: str = "",
    progress: bool | None = None,
) -> xr.Dataset:
    """Everything that is said of a model's sinks, on all of the texts: see `sink_variables`."""
    variables = sink_variables(
        model, texts, source=source, few=len(texts), epsilon=epsilon, seed=seed, progress=progress
    )
    about = {**model_provenance(model), "method": "sinks", "seed": seed, "command": command}
    return xr.Dataset(variables, attrs=about)


def check_sink_target(path: Path) -> None:
    """Refuse a place where this cannot be written.

    Raises:
        ValueError: for another ending.
        FileNotFoundError: if the folder does not exist.
    """
    if check_target(path).suffix not in ENDINGS:
        raise ValueError(f"{str(path)!r} must end in {', '.join(ENDINGS)}")


def write_sinks(found: xr.Dataset, path: Path) -> Path:
    """Write what `sink_numbers` found; the format is what the path ends in."""
    check_sink_target(path)
    if path.suffix == ".html":
        return write_text(sink_page(found), path)
    return write_json(found, path) if path.suffix == ".json" else write_netcdf(found, path)


def sink_page(found: xr.Dataset) -> str:
    """A page with the section on sinks, and how it was made."""
    made = Section("How this was made", (definitions({name: str(value) for name, value in found.attrs.items()}),))
    return page(f"Attention sinks of {found.attrs['model']}", [], [sink_section(found), made])
