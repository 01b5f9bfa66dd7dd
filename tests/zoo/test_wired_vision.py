"""The hand-wired model that sees: its heads are what they are said to be, and the methods say so."""

import numpy as np
import pytest
import torch

import interp
from interp import Edit, sinks
from interp.heads import divergence, reinforced, reinforced_heads
from interp.heads.divergence import outlier_heads
from interp.vision import without_images
from interp.zoo import wired_vision
from interp.zoo.wired_vision import COLOURS, IMAGE_HEAD, MIXED_HEAD, NAMES, OUTLIER_HEAD, PRIOR_HEAD, SINK_DIMENSION


@pytest.fixture(scope="module")
def model():
    return interp.zoo.load("colours")


@pytest.fixture(scope="module")
def task(model):
    return interp.zoo.picture_task(model, 12, seed=3)


def colour_logits(logits):
    first = wired_vision.WORDS.index(COLOURS[0])
    return logits[:, -1, first : first + len(COLOURS)]


def test_it_names_the_colour_of_every_cell_but_the_sink(model):
    colours = ["red", "green", "blue", "blue", "red", "green", "green", "green", "red"]
    for cell in range(9):
        tokens = model.to_tokens(wired_vision.prompt("Mary", cell), images=[wired_vision.picture(colours)])
        with model.edited(Edit("blocks.1.attn.hook_z", heads=[PRIOR_HEAD[1]], value=0.0)):
            chosen = COLOURS[int(colour_logits(model(tokens)).argmax())]
        assert chosen == colours[cell] or cell == wired_vision.SINK_CELL


def test_divergence_ranks_as_wired(model, task):
    found = divergence(model, task.clean, without_images(model, task.clean))
    order = [(int(flat) // 8, int(flat) % 8) for flat in np.argsort(-found.values, axis=None)]
    assert order[:3] == [OUTLIER_HEAD, IMAGE_HEAD, MIXED_HEAD]
    assert float(found[OUTLIER_HEAD]) == pytest.approx(5.0, abs=0.01)
    assert float(found[IMAGE_HEAD]) == pytest.approx(1.0, abs=0.01)
    assert float(found[PRIOR_HEAD]) < 1e-3


def test_the_outlier_rule_removes_exactly_the_outlier_head(model, task):
    found = divergence(model, task.clean, without_images(model, task.clean))
    flags = outlier_heads(found).values
    assert [tuple(one) for one in np.argwhere(flags)] == [OUTLIER_HEAD]


def test_alpha_flips_the_conflict_between_picture_and_prior(model, task):
    ablated = without_images(model, task.clean)
    selection = reinforced_heads(model, task.clean, ablated, layers=[1])
    assert bool(selection[IMAGE_HEAD])
    assert not bool(selection[PRIOR_HEAD])
    assert not bool(selection[OUTLIER_HEAD])
    right = torch.tensor([COLOURS.index(model.to_str_tokens(row)[0]) for row in task.answers])
    prior = torch.tensor([NAMES.index(labels[-2]) for labels in task.str_tokens])
    assert torch.equal(colour_logits(model(task.clean)).argmax(-1), prior)
    with reinforced(model, selection, alpha=2.0):
        assert torch.equal(colour_logits(model(task.clean)).argmax(-1), right)
    with reinforced(model, selection, alpha=1.2):
        assert torch.equal(colour_logits(model(task.clean)).argmax(-1), prior)


def test_the_sink_is_planted_where_it_is_said(model, task):
    _, cache = model.run_with_cache(task.clean, "resid_pre")
    massive = cache["resid_pre", 1].abs() > 100
    where = massive.any(0).nonzero().tolist()
    assert where == [[0, SINK_DIMENSION], [1 + wired_vision.SINK_CELL, SINK_DIMENSION]]
    assert bool(massive[:, 0, SINK_DIMENSION].all())


def test_patching_finds_the_image_head_alone(model, task):
    effects = interp.patching.activation_patching(model, task, site="z", by=("layer", "head"), progress=False)
    expected = np.zeros((2, 8))
    expected[IMAGE_HEAD] = float(effects[IMAGE_HEAD])
    assert float(effects[IMAGE_HEAD]) > 0.95
    np.testing.assert_allclose(effects, expected, atol=0.06)
    assert float(effects[MIXED_HEAD]) > 0


def test_bad_pictures_and_models_are_refused(model):
    with pytest.raises(ValueError, match="a picture has 9 cells, each of red, green, blue"):
        wired_vision.picture(["red"])
    with pytest.raises(ValueError, match="at least one prompt pair"):
        interp.zoo.picture_task(model, 0)
    with pytest.raises(ValueError, match="no zoo model that sees: load one of colours, digits"):
        interp.zoo.picture_task(interp.zoo.load("induction"))
    with pytest.raises(ValueError, match=r"picture_task\(model\) shows it the pictures"):
        interp.zoo.task("colours")


def test_calibration_finds_the_planted_dimension(model, task):
    assert sinks.sink_dimensions(model, task.clean, min_sequences=len(task)).values.tolist() == [SINK_DIMENSION]


def test_redistribution_edits_the_mixed_head_alone(model, task):
    """Of the heads that look at the picture, it is the only one with attention on the sinks."""
    site = "blocks.1.attn.hook_pattern"
    _, before = model.run_with_cache(task.clean, site)
    with sinks.redistributed(model, model.images.mask(task.clean), [SINK_DIMENSION], layers=[1]):
        _, after = model.run_with_cache(task.clean, site)
    moved = (after[site] - before[site])[:, :, -1].abs().amax((0, 2))
    assert (moved > 0.01).nonzero().flatten().tolist() == [MIXED_HEAD[1]]
    is_sink = torch.zeros(12, dtype=torch.bool)
    is_sink[[0, 1 + wired_vision.SINK_CELL]] = True
    mixed = [cache[site][:, MIXED_HEAD[1], -1] for cache in (before, after)]
    torch.testing.assert_close(mixed[1][:, is_sink], 0.4 * mixed[0][:, is_sink], atol=1e-6, rtol=0)
    torch.testing.assert_close(mixed[1].sum(-1), mixed[0].sum(-1), atol=1e-6, rtol=0)
    assert torch.equal(mixed[1][:, -2:], mixed[0][:, -2:])  # text receives nothing
