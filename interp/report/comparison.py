"""How well estimates agree with exact effects, as one page: a number for each method and site, and every cell."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import xarray as xr

from interp.patching.compare import EXACT
from interp.report import figures
from interp.report.page import Section, definitions, page, paragraph, table
from interp.report.page import figures as side_by_side

MEASURES = {
    "pearson": "Pearson",
    "spearman": "Spearman",
    "recall_20": "of the 20 largest effects, share among the 20 largest scores",
}


def comparison_page(compared: Mapping[str, xr.DataArray], agreed: pd.DataFrame) -> str:
    """A page to read.

    Args:
        compared: what `interp.patching.compare.compare` returns.
        agreed: what `agreement_by_method` makes of it.
    """
    attrs = next(iter(compared.values())).attrs
    n, direction = attrs["n_prompts"], str(attrs["direction"]).removesuffix("e") + "ing"
    lead = paragraph(
        f"Estimates of what patching does ({direction}, {attrs['metric']}, {n} prompts), held against exact effects of "
        "every cell. One cell can carry a Pearson correlation: read it beside Spearman, recall, and the row without "
        "layer 0. Intervals are 95 % bootstrap intervals over prompts."
    )
    maps = [
        (measure_heatmap(agreed, measure), f"{name}; mean map over {n} prompts.") for measure, name in MEASURES.items()
    ]
    lines = [(layer_agreement(agreed, site), "Pearson within each layer.") for site in compared]
    scatters = [
        (method_scatter(arrays, site, method), "One point a cell; the line is estimate = exact effect.")
        for site, arrays in compared.items()
        for method in methods_of(arrays)
    ]
    sections = [
        Section("Agreement", (side_by_side(maps, least=300), table(summary_columns(agreed), sortable=True))),
        Section("Every cell", (side_by_side(scatters, least=300),)),
        Section("How this was made", (definitions({name: str(value) for name, value in attrs.items()}),)),
    ]
    if any("layer" in str(cells) for cells in agreed.index.get_level_values("cells")):
        sections.insert(1, Section("By layer", (side_by_side(lines, least=320),)))
    return page(f"{attrs['model']}, {attrs['task']}: estimates against exact effects", [lead], sections)


def methods_of(arrays: xr.DataArray) -> list[str]:
    """The estimates among the methods, in order."""
    return [str(method) for method in arrays["estimate"].values if method != EXACT]


def summary_columns(agreed: pd.DataFrame) -> dict[str, list]:
    """The table of whole maps: each number with its interval, with layer 0 and without."""
    kept = agreed[agreed.index.get_level_values("cells").isin(["all", "without layer 0"])]
    columns: dict[str, list] = {name: list(kept.index.get_level_values(name)) for name in ("method", "site", "cells")}
    for measure in [name for name in agreed.columns if f"{name}_low" in agreed.columns]:
        columns[measure.replace("_", " ")] = [
            _with_interval(*row) for row in kept[[measure, f"{measure}_low", f"{measure}_high"]].itertuples(index=False)
        ]
    return columns


def _with_interval(value: float, low: float, high: float) -> str:
    if np.isnan(value):
        return "undefined"
    return f"{value:.3f}" if np.isnan(low) else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def measure_heatmap(agreed: pd.DataFrame, measure: str) -> go.Figure:
    """One measure of agreement for each method and site, over all cells."""
    whole = agreed.xs("all", level="cells")[measure].unstack("site", sort=False)
    matrix = xr.DataArray(
        whole.to_numpy(), dims=("method", "site"), coords={"method": list(whole.index), "site": list(whole)}
    )
    title = {"pearson": "Pearson with exact effects", "spearman": "Spearman with exact effects"}
    return figures.agreement_heatmap(matrix, title=title.get(measure, "Recall of the largest effects"))


def layer_agreement(agreed: pd.DataFrame, site: str) -> go.Figure:
    """Pearson within each layer, one line a method."""
    rows = agreed.xs(site, level="site")["pearson"].unstack("cells", sort=False)
    layers = [str(name) for name in rows.columns if str(name).startswith("layer ")]
    values = xr.DataArray(
        rows[layers].to_numpy().T,
        dims=("layer", "part"),
        coords={"layer": [int(name.split()[1]) for name in layers], "part": list(rows.index)},
    )
    return figures.layer_lines(values, title=f"{site}: agreement by layer", unit="Pearson")


def method_scatter(arrays: xr.DataArray, site: str, method: str) -> go.Figure:
    """Every cell's estimate against its exact effect."""
    exact, scores = (arrays.sel(estimate=name).mean("prompt") for name in (EXACT, method))
    axes = [[_cell_name(str(dim), value, exact) for value in exact[dim].values] for dim in exact.dims]
    labels = [" ".join(parts) for parts in product(*axes)]
    return figures.effect_scatter(
        exact.values.ravel(), scores.values.ravel(), labels,
        title=f"{site}: {method}", x_title="exact effect (share of the gap)", y_title=f"{method} score",
    )  # fmt: skip


def _cell_name(dim: str, value: object, array: xr.DataArray) -> str:
    if dim == "position" and "label" in array.coords:
        return figures.token_label(str(array["label"].sel(position=value).item()))
    return f"{ {'layer': 'L', 'head': 'H'}.get(dim, dim + ' ') }{value}"
