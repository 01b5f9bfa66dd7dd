"""The section on attention sinks; it takes a study with the variables of `sink_study`, and only draws."""

from __future__ import annotations

import json

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from interp.report import figures
from interp.report.measures import counted, percent
from interp.report.page import Cell, Markup, Section, paragraph, table
from interp.report.page import figures as side_by_side
from interp.report.sink_figures import massive_lives, perplexity_bars
from interp.sinks.dormant import MASS

INTERVENTIONS = {
    "baseline": "untouched",
    "zero": "set to 0",
    "mean": "set to their mean",
    "random": "others set to 0",
}
MANY = 100
"""Dormant heads to list at most."""


def sink_section(study: xr.Dataset) -> Section:
    """Sink dimensions, massive activations, sink rates, keys and values, dormant heads."""
    about = study["sink_dimensions"].attrs
    return Section(
        "Attention sinks",
        (
            paragraph(
                "A sink is a token that receives far more attention than it has to say, mostly the first one: heads "
                "that have nothing to do rest there. What makes it stand out is a massive activation, a value at a "
                f"fixed dimension of the residual stream above {about['threshold']:g} and {about['ratio']:g} times the "
                f"median. Measured on {about['source']}: {about['n_texts']} texts of {about['length']} tokens for the "
                f"sink dimensions, the first {about['n_few']} for all else."
            ),
            *massive_parts(study),
            *attention_parts(study),
        ),
    )


def massive_parts(study: xr.Dataset) -> list[Markup]:
    """Which dimensions are massive, in which layers they live, and what overwriting them does."""
    dimensions, lives = study["sink_dimensions"].values.tolist(), spans(study)
    if not lives:
        return [paragraph(dimensions_sentence(study))]
    marked = [one for one in lives if one[0] in dimensions] or lives
    shown = [
        (
            massive_lives(study["sink_peak"], study["sink_median"], marked, title=_life_title(marked)),
            "Size of the massive dimensions in each block's output, the largest of any token, mean over texts; dotted: "
            f"the median of all values. Shaded where {'a sink dimension' if dimensions else 'one'} lives: it may be "
            f"built, erased and built again. {texts(study['sink_peak'])}.",
        )
    ]
    if "sink_perplexity" in study:
        shown.append((_intervention_figure(study), _intervention_caption(study)))
    return [
        paragraph(dimensions_sentence(study)),
        side_by_side(shown, least=420),
        table(lives_table(study)),
    ]


def spans(study: xr.Dataset) -> list[tuple[int, int, float]]:
    """(dimension, first layer with it, first layer without it or NaN) of every life, in the order of birth."""
    columns = (study[f"sink_{name}"].values.tolist() for name in ("span_dimension", "born", "erased"))
    return [(int(dimension), int(born), float(erased)) for dimension, born, erased in zip(*columns, strict=True)]


def lives_table(study: xr.Dataset) -> dict[str, list[Cell]]:
    """One row a life of a massive dimension."""
    columns: dict[str, list[Cell]] = {
        name: [] for name in ("dimension", "sink dimension", "born after block", "gone after block", "largest |x|")
    }
    kept = study["sink_dimensions"].values.tolist()
    for dimension, born, erased in spans(study):
        end = None if np.isnan(erased) else int(erased)
        largest = float(study["sink_peak"].sel(massive_dimension=dimension).values[born:end].max())
        row = (str(dimension), "yes" if dimension in kept else "no", str(born), "stays" if end is None else str(end))
        for name, value in zip(columns, (*row, f"{largest:,.0f}"), strict=True):
            columns[name].append(value)
    return columns


def attention_parts(study: xr.Dataset) -> list[Markup]:
    """Who attends to sinks, and with what keys and values; or why that cannot be said."""
    about = study["sink_dimensions"].attrs
    if "unreadable" in about:
        return [paragraph(f"What sinks receive is not known, since attention cannot be read: {about['unreadable']}")]
    rate = study["sink_rate"]
    epsilon = about["epsilon"]
    maps = [
        (
            figures.layer_head_heatmap(
                rate,
                title=f"The first token is a sink of {float(rate.mean()):.0f}% of heads",
                unit="% of texts",
                signed=False,
            ),
            f"Share of texts in which a head gives the first token more than {epsilon:g} of its attention, averaged "
            f"over the tokens that see it (Sink₁ at ε = {epsilon:g}). {texts(rate)}.",
        ),
        (
            figures.layer_head_heatmap(
                study["sink_hidden"], title=_hidden_title(study["sink_hidden"]), unit="sinks a text", signed=False
            ),
            "Hidden sinks: tokens other than the first that receive more than five times an equal share of a head's "
            f"attention. {texts(study['sink_hidden'])}.",
        ),
    ]
    return [
        side_by_side(maps, least=400),
        *task_parts(study),
        side_by_side([_rate_lines(study), *_key_and_value_lines(study)], least=340),
        *dormant_parts(study),
    ]


def task_parts(study: xr.Dataset) -> list[Markup]:
    """What tokens receive on the task's prompts, where they were looked at."""
    if "sink_task_received" not in study:
        return []
    first, everywhere = study["sink_task_received"], study["sink_task_by_position"]
    labelled = everywhere.rename(sink_task_position="position").assign_coords(
        label=("position", study["sink_task_label"].values)
    )
    shown = [
        (
            figures.layer_head_heatmap(
                first,
                title=f"On the task, the first token receives {percent(float(first.mean()))} of attention",
                unit="mean attention",
                signed=False,
            ),
            "Attention that the first token of the task's prompts receives from each head, averaged over all tokens, "
            f"itself included. {counted(first)}.",
        ),
        (
            figures.layer_position_heatmap(
                labelled, title="Which tokens of the task soak up attention", unit="mean attention", signed=False
            ),
            "Attention that each token receives from the tokens at and after it, mean over heads. The last tokens are "
            f"seen by few, and look strong for that alone. {counted(everywhere)}.",
        ),
    ]
    return [side_by_side(shown, least=400)]


def dormant_parts(study: xr.Dataset) -> list[Markup]:
    """The heads that rest on sinks and write little."""
    said, rows = paragraph(dormant_sentence(study)), dormant_table(study)
    if not rows["head"]:
        return [said]
    return [
        said,
        table(rows, sortable=True, tall=True),
        paragraph(
            "Dormant heads: where they rest, the norm of what they add to the residual stream, and the median norm of "
            "their layer's heads.",
            kind="caption",
        ),
    ]


def dormant_sentence(study: xr.Dataset) -> str:
    """How many heads rest on sinks, write little, and do both."""
    rests, little, dormant = (int(study[f"sink_{name}"].sum()) for name in ("rests", "writes_little", "dormant"))
    return (
        f"{rests} of {study['sink_rests'].size} heads rest on sinks ({MASS:g} or more of their attention), {little} "
        f"write less than the middle head of their layer; {dormant} do both and are dormant on such text."
    )


def dormant_table(study: xr.Dataset) -> dict[str, list[Cell]]:
    """One row a dormant head, those that rest most on sinks first."""
    mass, norm = study["sink_mass"].values, study["sink_output_norm"].values
    places = [tuple(one) for one in np.argwhere(study["sink_dormant"].values)]
    order = sorted(places, key=lambda place: -mass[place])[:MANY]
    return {
        "head": [figures.head_label(*map(int, place)) for place in order],
        "attention on sinks": [float(mass[place]) for place in order],
        "output norm": [float(norm[place]) for place in order],
        "median of the layer": [float(np.median(norm[place[0]])) for place in order],
    }


def _life_title(lives: list[tuple[int, int, float]]) -> str:
    dimensions = [dimension for dimension, _, _ in lives]
    often = max(set(dimensions), key=dimensions.count)
    times = dimensions.count(often)
    if times > 1:
        return f"Dimension {often} is built {times} times over the layers"
    return f"Dimension {dimensions[0]} is massive for one stretch of layers"


def texts(values: xr.DataArray) -> str:
    """On how many texts a variable was measured."""
    return f"n = {int(values.attrs['n_prompts'])} texts"


def dimensions_sentence(study: xr.Dataset) -> str:
    """Which dimensions are massive, and at which token."""
    if not study.sizes["sink_span"]:
        return "No dimension of this model is massive in any layer."
    kept, shares = study["sink_dimensions"].values.tolist(), study["sink_layer_share"].values.tolist()
    at_first = study["sink_at_first"].values[int(study["sink_peak"].max("massive_dimension").values.argmax())]
    where = f"Where it is largest, the massive value stands at the first token in {percent(float(at_first))} of texts."
    if not kept:
        return f"Some dimensions are massive, but none in nearly all texts and a quarter of the layers. {where}"
    named = ", ".join(f"{one} ({percent(share)} of layers)" for one, share in zip(kept, shares, strict=True))
    return f"Sink dimensions, massive in nearly all texts: {named}. {where}"


def _intervention_figure(study: xr.Dataset) -> go.Figure:
    perplexity = study["sink_perplexity"]
    untouched, zero, mean, _ = perplexity.values.tolist()
    title = f"Without its massive activation, perplexity goes from {untouched:.1f} to {_short(zero)}"
    if mean < 1.2 * untouched < zero:
        title += "; a constant serves as well"
    return perplexity_bars(
        perplexity,
        study["sink_perplexity_low"],
        study["sink_perplexity_high"],
        names=[INTERVENTIONS[str(one)] for one in perplexity["intervention"].values],
        title=title,
    )


def _intervention_caption(study: xr.Dataset) -> str:
    about = study["sink_perplexity"].attrs
    chosen, others = (", ".join(map(str, json.loads(about[name]))) for name in ("dimensions", "random_dimensions"))
    return (
        f"Perplexity after overwriting dimension {chosen} at token {about['position']} in the output of block "
        f"{about['layer']}: with 0, or with the mean over texts. For comparison as many others ({others}) set to 0. "
        f"{texts(study['sink_perplexity'])}."
    )


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"


def _hidden_title(hidden: xr.DataArray) -> str:
    return f"Hidden sinks: {float(hidden.mean()):.1f} a head and text"


def _rate_lines(study: xr.Dataset) -> tuple[go.Figure, str]:
    lines = {"running text": study["sink_rate_by_layer"]}
    if "sink_task_rate" in study:
        lines["the task's prompts"] = study["sink_task_rate"]
    rates = np.stack([one.values for one in lines.values()], -1)
    figure = figures.layer_lines(
        xr.DataArray(rates, dims=("layer", "part"), coords={"layer": range(len(rates)), "part": list(lines)}),
        title="In which layers the first token is a sink",
        unit="% of heads",
    )
    return figure, "Share of a layer's heads of which the first token is a sink, on running text and on the task."


def _key_and_value_lines(study: xr.Dataset) -> list[tuple[go.Figure, str]]:
    what = study["sink_value_norm_ratio"].attrs["sinks"]
    norms = {"value": study["sink_value_norm_ratio"], "key": study["sink_key_norm_ratio"]}
    cosines = {"sinks": study["sink_cosine"], "other tokens": study["sink_other_cosine"]}
    shortness = float(norms["value"].median())
    ratio = figures.layer_lines(
        _by_layer(norms),
        title="Values and keys of sinks"
        if np.isnan(shortness)
        else f"Values of sinks are {shortness:.2f} times as long as others'",
        unit="norm, sinks / others",
    )
    points = bool(study["sink_cosine"].mean() > study["sink_other_cosine"].mean())
    pointing = figures.layer_lines(
        _by_layer(cosines),
        title="Queries point to the keys of sinks" if points else "Queries and the keys of sinks",
        unit="cosine",
    )
    return [
        (ratio, f"Norms of the values and keys of {what} beside all other tokens, mean over heads. Attention parked on "
                "a short value adds next to nothing."),
        (pointing, f"Cosine of queries with the keys of {what} and of other tokens, mean over heads. Above the other "
                   "line, it is direction that draws attention there, whatever the token says."),
    ]  # fmt: skip


def _by_layer(lines: dict[str, xr.DataArray]) -> xr.DataArray:
    """Means over heads, [layer, part]."""
    means = np.stack([one.mean([one.dims[1]]).values for one in lines.values()], -1)
    return xr.DataArray(means, dims=("layer", "part"), coords={"layer": range(len(means)), "part": list(lines)})
