"""Figures: scales, axes and labels as the field draws them, and nothing undefined shown as a value."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import pytest
import xarray as xr

from interp.report import figures
from tests.report.synthetic import synthetic_study

STUDY = synthetic_study()


def colour_at(heatmap, value):
    """The colour of a value: the entry of the colour scale nearest to it."""
    share = (value - heatmap.zmin) / (heatmap.zmax - heatmap.zmin)
    return min(heatmap.colorscale, key=lambda entry: abs(entry[0] - share))[1]


def channels(colour):
    return [int(one) for one in colour.removeprefix("rgb(").removesuffix(")").split(",")]


@pytest.mark.parametrize(
    "figure",
    [
        figures.layer_head_heatmap(STUDY["importance_resample"], title="t", unit="u"),
        figures.layer_position_heatmap(STUDY["patch_resid_pre"], title="t", unit="u"),
    ],
)
def test_signed_values_are_blue_above_and_red_below_a_white_zero(figure):
    heatmap = figure.data[0]
    assert heatmap.zmin == -heatmap.zmax
    assert heatmap.zmax == pytest.approx(np.abs(heatmap.z).max())
    red, _, blue = channels(colour_at(heatmap, heatmap.zmax))
    assert blue > red
    red, _, blue = channels(colour_at(heatmap, heatmap.zmin))
    assert red > blue
    assert min(channels(colour_at(heatmap, 0))) > 240


def test_scores_start_at_zero():
    heatmap = figures.layer_head_heatmap(STUDY["induction"], title="t", unit="u", signed=False).data[0]
    assert heatmap.zmin == 0


def test_layers_run_down_and_axes_are_named():
    figure = figures.layer_head_heatmap(STUDY["importance_resample"], title="What it means", unit="logits")
    assert figure.layout.yaxis.autorange == "reversed"
    assert (figure.layout.xaxis.title.text, figure.layout.yaxis.title.text) == ("head", "layer")
    assert "logits" in {annotation.text for annotation in figure.layout.annotations}
    assert figure.layout.title.text == "What it means"


def test_hover_names_head_value_and_interval():
    values = STUDY["importance_resample"]
    figure = figures.layer_head_heatmap(values, title="t", unit="u", low=values - 1, high=values + 1)
    text = figure.data[0].customdata[2][3]
    value = float(values[2, 3])
    assert text == f"L2H3<br>{value:.3f}<br>95% interval {value - 1:.3f} to {value + 1:.3f}"


def test_values_of_key_value_heads_are_called_so():
    figure = figures.layer_head_heatmap(STUDY["patch_value"], title="t", unit="u")
    assert figure.layout.xaxis.title.text == "key/value head"
    assert figure.data[0].customdata[1][0].startswith("L1KV0")


def test_undefined_cells_are_gaps_on_grey_and_say_so():
    values = STUDY["entropy"]
    assert np.isnan(values[0, 0])
    figure = figures.layer_head_heatmap(values, title="t", unit="u")
    assert np.isnan(figure.data[0].z[0][0])
    assert figure.layout.plot_bgcolor == figures.UNDEFINED
    assert figure.data[0].customdata[0][0] == "L0H0<br>not defined"


def test_all_zero_values_draw():
    zeros = xr.zeros_like(STUDY["importance_resample"])
    assert figures.layer_head_heatmap(zeros, title="t", unit="u").data[0].zmax == 1


def test_positions_carry_token_strings_even_when_they_repeat():
    tokens = [" a", " b", " a", "\n", "<b>", " "]
    values = xr.DataArray(np.ones((2, 6)), dims=("layer", "position"), coords={"token": ("position", tokens)})
    axis = figures.layer_position_heatmap(values, title="t", unit="u").layout.xaxis
    assert list(axis.ticktext) == ["a", "b", "a", "⏎", "&lt;b&gt;", "␣"]
    assert list(axis.tickvals) == list(range(6))


def test_position_names_stand_where_prompts_differ():
    values = STUDY["patch_resid_pre"].assign_coords(label=("position", ["When", "IO/S1", *["x"] * 6]))
    assert figures.layer_position_heatmap(values, title="t", unit="u").layout.xaxis.ticktext[1] == "IO/S1"


def test_pattern_has_tokens_on_both_axes_and_an_empty_future():
    figure = figures.attention_pattern(STUDY["top_pattern"][0], title="t")
    shown = np.array(figure.data[0].z, dtype=float)
    assert np.isnan(shown[0, 1:]).all()
    assert np.isfinite(shown[-1]).all()
    assert (figure.data[0].zmin, figure.data[0].zmax) == (0, 1)
    assert figure.layout.xaxis.ticktext == figure.layout.yaxis.ticktext
    assert figure.layout.yaxis.autorange == "reversed"
    assert figure.data[0].customdata[2][1].startswith("and → Mary")


def test_bidirectional_pattern_keeps_its_upper_triangle():
    pattern = STUDY["top_pattern"][0].copy(data=np.full((8, 8), 0.125))
    assert np.isfinite(np.array(figures.attention_pattern(pattern, title="t").data[0].z, dtype=float)).all()


def test_scatter_has_the_diagonal_and_names_the_extremes():
    x, y = [0.0, 0.1, 5.0, -4.0], [0.0, 0.1, 6.0, 2.0]
    figure = figures.effect_scatter(x, y, ["a", "b", "far", "left"], title="t", x_title="x", y_title="y")
    line = figure.data[1]
    assert list(line.x) == list(line.y) == [-4.0, 6.0]
    assert {"far", "left"} <= {annotation.text for annotation in figure.layout.annotations}
    without = figures.effect_scatter(x, y, ["a", "b", "c", "d"], title="t", x_title="x", y_title="y", diagonal=False)
    assert len(without.data) == 1


def test_scatter_labels_keep_their_distance():
    spread = figures.effect_scatter([1.0, 1.01], [1.0, 1.01], ["a", "b"], title="t", x_title="x", y_title="y")
    assert len(spread.layout.annotations) == 1


def test_bars_show_intervals_around_their_ends():
    figure = figures.ranked_bars([2.0, -1.0], ["L0H0", "L1H1"], title="t", unit="u", low=[1.0, -1.5], high=[4.0, 0.0])
    bar = figure.data[0]
    assert list(bar.error_x.array) == [2.0, 1.0]
    assert list(bar.error_x.arrayminus) == [1.0, 0.5]
    assert list(bar.marker.color) == [figures.BLUE, figures.RED]


def test_lens_band_is_the_interval():
    lens = STUDY["lens"]
    figure = figures.line_over_depth(lens, title="t", unit="u", low=STUDY["lens_low"], high=STUDY["lens_high"])
    band, line = figure.data
    assert list(line.x) == lens["depth"].values.tolist()
    assert list(band.y[: len(lens)]) == STUDY["lens_high"].values.tolist()


def test_agreement_writes_the_numbers():
    matrix = xr.DataArray(np.eye(2), dims=("measure", "other"), coords={"measure": ["a", "b"], "other": ["a", "b"]})
    figure = figures.agreement_heatmap(matrix, title="t")
    assert isinstance(figure, go.Figure)
    assert (figure.data[0].zmin, figure.data[0].zmax) == (-1, 1)
    assert "z:.2f" in figure.data[0].texttemplate
