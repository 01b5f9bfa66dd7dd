"""The section on images; it takes a study with the variables of `vision_study`, and only draws."""

from __future__ import annotations

import html

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from interp.metrics import bootstrap_interval
from interp.report import figures
from interp.report.measures import best_heads, counted, percent
from interp.report.page import Cell, Markup, Section, joined, paragraph, table, token
from interp.report.page import figures as side_by_side
from interp.vision import draw_over_image

OUTLIER = "×"


def vision_section(study: xr.Dataset) -> Section:
    """How attention divides between text and image, where the top heads look, and which heads need the picture."""
    about = study["vision_divergence"].attrs
    if "unreadable" in about:
        attention = [paragraph(f"The attention of this model cannot be read: {about['unreadable']}")]
    else:
        attention = [*mass_parts(study), *map_parts(study)]
    return Section("What heads see", (*attention, *divergence_parts(study)))


def mass_parts(study: xr.Dataset) -> list[Markup]:
    """Attention between text and image: two heat maps, and a table by layer."""
    mass = study["vision_mass"]
    shown = []
    for one, said in (
        ("text", "Share of the attention of text tokens that falls on the image. Text before the image sees none of "
                 "it, and counts with 0."),
        ("image", "Share of the attention of image tokens that stays in the image."),
    ):  # fmt: skip
        values = mass.sel({"from": one, "to": "image"})
        title = f"From {one} to image: {percent(float(values.mean()))} of attention"
        figure = figures.layer_head_heatmap(values, title=title, unit="share of attention", signed=False)
        shown.append((figure, f"{said} {counted(mass)}."))
    return [
        side_by_side(shown, least=400),
        table(mass_table(mass), tall=True),
        paragraph("The same by layer, mean over heads: attention from each kind of token to each.", kind="caption"),
    ]


def mass_table(mass: xr.DataArray) -> dict[str, list[Cell]]:
    """One row a layer: attention from text and image to text and image, mean over heads."""
    columns: dict[str, list[Cell]] = {"layer": [f"L{layer}" for layer in range(mass.sizes["layer"])]}
    for one in ("text", "image"):
        for other in ("image", "text"):
            values = mass.sel({"from": one, "to": other}).mean("head")
            columns[f"{one} → {other}"] = [float(value) for value in values.values]
    return columns


def map_parts(study: xr.Dataset) -> list[Markup]:
    """Where on the picture the heads that matter most look from the last token."""
    if "vision_map" not in study:
        return [paragraph("The images of these prompts have no one grid of patches to draw attention over.")]
    shown = []
    for number in range(study.sizes["vision_shown"]):
        one = study.isel(vision_shown=number)
        shown.append((_maps(one, number), joined(["The prompt:", token(str(one["vision_text"].values))])))
    return [
        paragraph(
            "Where the heads whose resample ablation changes the behaviour most look on the picture: attention from "
            "the last token of the prompt to each patch. The number is the share that falls on the picture at all."
        ),
        side_by_side(shown, least=700),
    ]


def divergence_parts(study: xr.Dataset) -> list[Markup]:
    """Which heads need the picture."""
    values, outlier = study["vision_divergence"], study["vision_outlier"].values.astype(bool)
    figure = figures.layer_head_heatmap(
        values,
        title=f"{best_heads(study, 'vision_divergence')} change most when the image is taken away",
        unit="distance",
        signed=False,
    )
    for layer, head in np.argwhere(outlier):
        figure.add_annotation(x=head, y=layer, text=OUTLIER, showarrow=False, font={"size": 16, "color": figures.RED})
    caption = (
        "Head divergence (VHD): Euclidean distance between a head's output at the last token with the image and with "
        f"its tokens removed. 0 ignores the image. {OUTLIER} marks outliers, whose output surges where there is no "
        f"image: they answer to its absence. {counted(values)}."
    )
    return [paragraph(_owed(study)), side_by_side([(figure, caption)], least=400)]


def _owed(study: xr.Dataset) -> str:
    per_prompt = study["vision_t_vhd"]
    low, high = bootstrap_interval(per_prompt.values)
    outliers = [
        figures.head_label(int(layer), int(head))
        for layer, head in np.argwhere(study["vision_outlier"].values.astype(bool))
    ]
    marked = f"Outlier heads: {', '.join(outliers)}." if outliers else "No head is an outlier."
    return (
        f"What answers owe to the image: T-VHD {float(per_prompt.mean()):.2f} [{float(low):.2f}, {float(high):.2f}] "
        f"(mean, 95% interval over {per_prompt.size} prompts), the sum over layers of the {int(per_prompt.attrs['k'])} "
        f"largest head divergences. {marked}"
    )


def _maps(one: xr.Dataset, number: int) -> go.Figure:
    """Panels of one prompt: the picture, and each head's attention over it."""
    maps = one["vision_map"].rename(image_row="row", image_column="column", vision_head="panel").rename("attention")
    labels = [str(label) for label in one["vision_head_label"].values]
    names = [f"{label}: {percent(float(map.sum()))}" for label, map in zip(labels, maps, strict=True)]
    picture = one["vision_picture"].values.astype(np.uint8)
    # Colours of the picture would mix with those of attention.
    grey = np.repeat(picture.mean(-1, keepdims=True), 3, axis=-1).astype(np.uint8)
    bare = xr.full_like(maps[:1], np.nan)
    figure = draw_over_image(
        xr.concat([bare, maps], "panel"),
        grey,
        panel_titles=["the picture", *map(html.escape, names)],
        columns=len(names) + 1,
    )
    figure.data[0].z = picture
    figure.update_annotations(font_size=11)
    figure.update_coloraxes(colorbar={"thickness": 10, "tickfont_size": 10, "outlinewidth": 0})
    title = f"Picture {number + 1}: where {', '.join(labels[:-1])} and {labels[-1]} look"
    # A report is narrower than the figure by itself.
    figures.finish(figure, title, height=int(figure.layout.height) - 50)
    return figure.update_layout(width=None, margin_l=12)
