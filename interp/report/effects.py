"""One patching result as a file: its numbers, or a page with its heat map and its largest effects."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import xarray as xr

from interp.report import figures
from interp.report.page import Section, definitions, page, paragraph, table
from interp.report.page import figures as side_by_side
from interp.report.writing import write_json, write_netcdf, write_text

EffectsFormat = Literal["html", "csv", "json", "nc"]
LARGEST = 20


def write_effects(effects: xr.DataArray, path: str | Path) -> Path:
    """Write the effects of a patching call; the format is what the path ends in.

    Args:
        effects: what `interp.patching.activation_patching` returns.
        path: ends in .nc (netCDF), .json, .csv (one row a cell) or .html (a page to read).

    Raises:
        ValueError: for another ending.
        FileNotFoundError: if the folder does not exist.
    """
    kind = check_ending(path)
    if kind == "nc":
        return write_netcdf(effects.to_dataset(), path)
    if kind == "json":
        return write_json(effects.to_dataset(), path)
    if kind == "csv":
        frame = effects.to_dataframe().astype({effects.name: "float64"})
        return write_text(frame.to_csv(), path)
    return write_text(effects_page(effects), path)


def check_ending(path: str | Path) -> EffectsFormat:
    """The format that a path asks for.

    Raises:
        ValueError: if there is no such format.
    """
    ending = Path(path).suffix.removeprefix(".")
    if ending not in get_args(EffectsFormat):
        raise ValueError(f"{str(path)!r} must end in {', '.join('.' + one for one in get_args(EffectsFormat))}")
    return ending  # type: ignore[return-value]


def effects_page(effects: xr.DataArray) -> str:
    """A page with the heat map, where two axes can be drawn, and the largest effects."""
    attrs = effects.attrs
    exact = attrs["method"] == "activation_patching"
    title = f"{attrs['model']}, {attrs['task']}: " + (
        f"patching {attrs['site']}" if exact else f"{attrs['method']} of {attrs['site']}"
    )
    done = {
        "denoise": "Clean activations put into the corrupted run: does that restore the behaviour?",
        "noise": "Activations of the clean run replaced: does that break the behaviour?",
    }[str(attrs["direction"])] + ("" if exact else " An estimate, by one backward pass; not the exact effects.")
    figure = draw_effects(effects)
    map_of_effects = [] if figure is None else [
        Section("Effects", (side_by_side([(figure, f"n = {attrs['n_prompts']} prompts.")], least=420),))
    ]  # fmt: skip
    rest = [
        Section(f"The {LARGEST} largest", (table(_columns(largest_effects(effects, LARGEST)), sortable=True),)),
        Section("How this was made", (definitions({name: str(value) for name, value in attrs.items()}),)),
    ]
    return page(title, [paragraph(done)], map_of_effects + rest)


def draw_effects(effects: xr.DataArray) -> go.Figure | None:
    """The heat map of [layer, head] or [layer, position] effects; None for other axes."""
    unit = "share of the gap" if effects.attrs["normalised"] else str(effects.attrs["metric"]).replace("_", " ")
    title = f"Effect of {effects.attrs['site']}, {effects.attrs['direction'].removesuffix('e')}ing"
    if effects.dims == ("layer", "head"):
        return figures.layer_head_heatmap(effects, title=title, unit=unit)
    if effects.dims == ("layer", "position"):
        return figures.layer_position_heatmap(effects, title=title, unit=unit)
    return None


def largest_effects(effects: xr.DataArray, n: int) -> pd.DataFrame:
    """The cells of largest absolute effect, largest first: a column an axis, the effect, and the exact one if known."""
    flat = effects.values.ravel()
    order = np.argsort(-np.abs(np.nan_to_num(flat)), kind="stable")[:n]
    places = np.unravel_index(order, effects.shape)
    frame = pd.DataFrame({str(dim): effects[dim].values[at] for dim, at in zip(effects.dims, places, strict=True)})
    if "label" in effects.coords:
        after = list(frame.columns).index("position") + 1
        frame.insert(after, "token", effects["label"].values[frame["position"]])
    frame = frame.assign(effect=flat[order].astype(float))
    return frame.assign(exact=effects["exact"].values.ravel()[order]) if "exact" in effects.coords else frame


def _columns(frame: pd.DataFrame) -> dict[str, list]:
    return {str(name): frame[name].tolist() for name in frame}
