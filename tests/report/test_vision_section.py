"""Images in a report: there if prompts have some, with the numbers of `interp.vision` and `interp.heads`."""

from __future__ import annotations

import json

import numpy as np
import pytest
import xarray as xr

import interp
from interp.heads import pattern
from interp.heads.divergence import divergence, outlier_heads, t_vhd
from interp.model import SiteUnavailable
from interp.report import head_study, html_page, read, vision_study
from interp.report.measures import extreme_heads
from interp.report.vision_section import mass_table, vision_section
from interp.report.vision_study import has_images, vision_variables
from interp.report.writing import write_netcdf
from interp.vision import image_values, modality_mass, without_images


@pytest.fixture(scope="module")
def colours():
    model = interp.zoo.load("colours")
    return model, interp.zoo.picture_task(model, n=6)


@pytest.fixture(scope="module")
def study(colours):
    return head_study(*colours, n_interventions=4, n_maps=2, progress=False)


def page_of(study):
    return "".join(map(str, vision_section(study).parts))


def test_the_part_is_there_where_prompts_have_images(colours, study):
    assert "vision" in json.loads(study.attrs["seconds"])
    assert "sink_dimensions" not in study
    assert has_images(*colours)
    letters = interp.zoo.load("induction")
    assert not has_images(letters, interp.zoo.task("induction", n=3))


def test_numbers_are_those_of_the_functions(colours, study):
    model, task = colours
    tokens = task.clean[:4]
    pair = tokens, without_images(model, tokens)
    expected = divergence(model, *pair)
    np.testing.assert_allclose(study["vision_divergence"].values, expected.values)
    assert (study["vision_outlier"].values == outlier_heads(expected).values).all()
    owed = t_vhd(divergence(model, *pair, per_prompt=True), 3)
    np.testing.assert_allclose(study["vision_t_vhd"].values, owed.values)
    np.testing.assert_allclose(study["vision_mass"].values, modality_mass(model, tokens).values)
    assert study["vision_divergence"].attrs["n_prompts"] == 4


def test_maps_are_the_last_rows_of_the_heads_that_matter_most(colours, study):
    model, task = colours
    heads = extreme_heads(abs(study["importance_resample"]), 4, 0)
    assert study["vision_head_label"].values.tolist() == [f"L{layer}H{head}" for layer, head in heads]
    for prompt in range(3):
        for number, (layer, head) in enumerate(heads):
            whole = pattern(model, task.clean[prompt], layer, head)
            expected = image_values(model, task.clean[prompt], whole.isel(query=-1), dim="key").squeeze()
            np.testing.assert_allclose(study["vision_map"].values[prompt, number], expected.values, atol=1e-6)
        _, image = next(model.images.placed(task.clean_ids[prompt]))
        assert (study["vision_picture"].values[prompt] == np.asarray(image.picture.convert("RGB"))).all()


def test_the_section_names_what_was_wired(study):
    page = page_of(study)
    top = extreme_heads(study["vision_divergence"], 1, 0)[0]
    assert f"L{top[0]}H{top[1]}" in page
    outliers = np.argwhere(study["vision_outlier"].values)
    assert len(outliers)
    assert f"Outlier heads: {', '.join(f'L{layer}H{head}' for layer, head in outliers)}." in page
    assert f"T-VHD {float(study['vision_t_vhd'].mean()):.2f} [" in page
    assert "What heads see" in html_page(study)


def test_the_table_adds_up_to_one(study):
    table = mass_table(study["vision_mass"])
    for one in ("text", "image"):
        total = np.array(table[f"{one} → image"]) + np.array(table[f"{one} → text"])
        np.testing.assert_allclose(total, 1, atol=1e-5)


def test_the_section_after_a_file_is_the_same(study, tmp_path):
    write_netcdf(study, tmp_path / "study.nc")
    assert page_of(read(tmp_path / "study.nc")) == page_of(study)


def test_attention_that_cannot_be_read_is_said(colours, monkeypatch):
    def refuse(*args, **options):
        raise SiteUnavailable("this family is closed")

    model, task = colours
    monkeypatch.setattr(vision_study, "modality_mass", refuse)
    effects = xr.DataArray(np.zeros((model.n_layers, model.n_heads)), dims=("layer", "head"))
    page = page_of(xr.Dataset(vision_variables(model, task, effects, progress=False)))
    assert "cannot be read: this family is closed" in page
    assert "T-VHD" in page


def test_images_without_one_grid_get_no_maps(colours, monkeypatch):
    model, task = colours
    monkeypatch.setattr(vision_study, "_map", lambda *_: None)
    effects = xr.DataArray(np.zeros((model.n_layers, model.n_heads)), dims=("layer", "head"))
    found = xr.Dataset(vision_variables(model, task, effects, progress=False))
    assert "vision_map" not in found
    assert "no one grid of patches" in page_of(found)
