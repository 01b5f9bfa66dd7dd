"""Maps over pictures: what is drawn, where, on which scale."""

import numpy as np
import pytest
import xarray as xr

from interp.vision import draw_over_image
from tests.vision.seeing import picture


def maps(values):
    return xr.DataArray(np.asarray(values, dtype=float), dims=("head", "row", "column"), name="attention")


def test_every_panel_shows_the_picture_beneath_its_cells():
    values = maps([[[0.1, 0.2], [0.3, 0.4]], [[0.0, 0.5], [0.1, 0.1]]]).assign_coords(head=["L0H1", "L1H0"])
    figure = draw_over_image(values, picture(0), title="what it looks at")
    pictures, heat = figure.data[::2], figure.data[1::2]
    np.testing.assert_array_equal(pictures[0].z, np.asarray(picture(0)))
    np.testing.assert_array_equal(heat[1].z, values[1])
    # Two cells over 16 pixels: their middles are at 3.5 and 11.5, counted from the middle of pixel 0.
    assert list(heat[0].x) == [3.5, 11.5]
    assert [note.text for note in figure.layout.annotations] == ["L0H1", "L1H0"]
    assert figure.layout.coloraxis.cmin == 0
    assert figure.layout.coloraxis.cmax == 0.5


def test_signed_maps_diverge_around_zero():
    figure = draw_over_image(maps([[[-0.2, 0.1]]]), picture(0))
    assert figure.layout.coloraxis.cmin == -figure.layout.coloraxis.cmax == -0.2


def test_titles_must_fit():
    with pytest.raises(ValueError, match="1 panel titles for 2 panels"):
        draw_over_image(maps([[[0.0]], [[1.0]]]), picture(0), panel_titles=["one"])
