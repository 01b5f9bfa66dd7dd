"""Maps drawn over the picture that they belong to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

if TYPE_CHECKING:
    import plotly.graph_objects as go

SIGNED_FROM = 0.01
"""Negative values below this share of the largest are rounding, not a direction."""


def draw_over_image(
    values: xr.DataArray,
    picture: Any,
    *,
    title: str = "",
    panel_titles: list[str] | None = None,
    columns: int = 4,
    opacity: float = 0.65,
) -> go.Figure:
    """One panel a map, each over the picture.

    Args:
        values: [row, column] or [panel, row, column], as `image_values` makes them; all panels share one scale, which
            diverges around 0 where there are negative values.
        picture: PIL image or array.
        title: over the figure.
        panel_titles: one a panel; by default the panels' coordinate.
        columns: panels side by side.
        opacity: of the map; 0 shows the picture alone.

    Returns:
        The figure; hovering shows row, column and value.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    panels = values if values.ndim == 3 else values.expand_dims("panel")
    names = panel_titles or ([""] if values.ndim == 2 else [str(one) for one in panels[panels.dims[0]].values])
    if len(names) != len(panels):
        raise ValueError(f"{len(names)} panel titles for {len(panels)} panels")
    n_columns = min(columns, len(panels))
    n_rows = -(-len(panels) // n_columns)
    figure = make_subplots(rows=n_rows, cols=n_columns, subplot_titles=names, horizontal_spacing=0.03)
    pixels = np.asarray(picture.convert("RGB") if hasattr(picture, "convert") else picture)
    height, width = pixels.shape[:2]
    strongest = float(np.nanmax(np.abs(panels.values)))
    signed = bool((panels.values < -SIGNED_FROM * strongest).any())
    cells = np.stack(np.meshgrid(*(range(size) for size in panels.shape[1:]), indexing="ij"), -1)
    for number, panel in enumerate(panels):
        where = {"row": number // n_columns + 1, "col": number % n_columns + 1}
        figure.add_trace(go.Image(z=pixels, hoverinfo="skip"), **where)
        figure.add_trace(
            go.Heatmap(
                z=panel.values,
                x=_centres(panel.sizes["column"], width),
                y=_centres(panel.sizes["row"], height),
                customdata=cells,
                hovertemplate="row %{customdata[0]}, column %{customdata[1]}<br>%{z:.3f}<extra></extra>",
                coloraxis="coloraxis",
                opacity=opacity,
            ),
            **where,
        )
    figure.update_xaxes(visible=False, range=[-0.5, width - 0.5])
    figure.update_yaxes(visible=False, range=[height - 0.5, -0.5])
    figure.update_layout(
        title=title,
        coloraxis={
            "colorscale": "RdBu" if signed else "Viridis",
            "cmin": -strongest if signed else 0,
            "cmax": strongest,
            "colorbar": {"title": str(values.name or "")},
        },
        width=220 * n_columns + 120,
        height=220 * n_rows * height / width + 110,
        margin={"l": 20, "r": 20, "t": 80, "b": 20},
    )
    return figure


def _centres(cells: int, pixels: int) -> list[float]:
    """Pixel coordinates of the middle of each cell."""
    return [(cell + 0.5) * pixels / cells - 0.5 for cell in range(cells)]
