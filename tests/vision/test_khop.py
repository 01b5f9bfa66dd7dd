import numpy as np
import pytest
import torch

from interp import Model, vision
from interp.vision.khop import grid_hops, khop_strength
from interp.vision.patch_grid import patch_grid
from tests.model.encoders import ENCODERS
from tests.model.families import FAMILIES
from tests.vision.towers import attentions, pixels, vision_model


def grid_of(n_rows: int, n_columns: int):
    model = vision_model("vit")
    images = {"pixel_values": torch.zeros(1, 3, 4 * n_rows, 4 * n_columns)}
    return patch_grid(model, images, n_rows * n_columns + 1)


def by_loop(pattern, hop_of, n_hops):
    """Mass and mass per cell of [query, key] attention, by going through the entries."""
    mass, per_cell = np.zeros(n_hops), [[] for _ in range(n_hops)]
    for query in range(len(pattern)):
        for hop in range(n_hops):
            ring = [float(pattern[query, key]) for key in range(len(pattern)) if hop_of(query, key) == hop]
            mass[hop] += sum(ring) / len(pattern)
            if ring:
                per_cell[hop].append(sum(ring) / len(ring))
    return mass, [np.mean(one) if one else np.nan for one in per_cell]


def chebyshev(n_columns):
    return lambda i, j: max(abs(i // n_columns - j // n_columns), abs(i % n_columns - j % n_columns))


@pytest.mark.parametrize("shape", [(3, 4), (1, 5), (1, 1)])
def test_a_shift_has_all_its_mass_on_one_ring(shape) -> None:
    hops = grid_hops(grid_of(*shape))
    mass, per_cell = khop_strength(torch.eye(len(hops)), hops)
    assert mass.tolist() == [1] + [0] * (max(shape) - 1)
    assert per_cell[0] == 1
    if shape == (1, 5):
        previous = torch.eye(5).roll(1, 0)
        previous[0] = torch.tensor([0, 1.0, 0, 0, 0])  # the first looks ahead: still one step away
        mass, per_cell = khop_strength(previous, hops)
        assert mass.tolist() == [0, 1, 0, 0, 0]
        torch.testing.assert_close(per_cell[1], torch.tensor((1 + 1 + 3 * 0.5) / 5))


def test_uniform_attention_is_the_size_of_the_ring() -> None:
    hops = grid_hops(grid_of(3, 3))
    mass, per_cell = khop_strength(torch.full((9, 9), 1 / 9), hops)
    # Rings of the centre, an edge and a corner of 3 x 3: 1 8 0, 1 5 3, 1 3 5.
    torch.testing.assert_close(mass, torch.tensor([1.0, (8 + 4 * 5 + 4 * 3) / 9, (4 * 3 + 4 * 5) / 9]) / 9)
    torch.testing.assert_close(per_cell, torch.full((3,), 1 / 9))


@pytest.mark.parametrize("name", ["vit", "dinov2_with_registers"])
def test_profile_equals_a_loop_over_transformers_attention(name) -> None:
    model, images = vision_model(name), pixels(2)
    found = vision.khop_profile(model, images)
    n_prefix = {"vit": 1, "dinov2_with_registers": 3}[name]
    patches = attentions(model, images)[..., n_prefix:, n_prefix:]
    patches = patches / patches.sum(-1, keepdim=True)
    for layer, head in ((0, 0), (2, 3)):
        loops = [by_loop(pattern, chebyshev(4), 4) for pattern in patches[layer, :, head]]
        mass, per_cell = (np.mean(one, axis=0) for one in zip(*loops, strict=True))
        np.testing.assert_allclose(found["mass"][layer, head], mass, atol=1e-6)
        np.testing.assert_allclose(found["per_cell"][layer, head], per_cell, atol=1e-6)
    np.testing.assert_allclose(found["mass"].sum("hop"), 1, atol=1e-5)
    assert found.attrs["n_images"] == 2


def test_rows_without_patch_attention_do_not_count() -> None:
    hops = grid_hops(grid_of(1, 2))
    pattern = torch.tensor([[torch.nan, torch.nan], [0.25, 0.75]])
    mass, _ = khop_strength(pattern, hops)
    assert mass.tolist() == [0.75, 0.25]


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_text_profile_equals_a_loop(name) -> None:
    families = FAMILIES | {family.name: family for family in ENCODERS}
    model = Model(families[name].make_model("eager"))
    tokens = torch.randint(5, 50, (2, 7), generator=torch.Generator().manual_seed(1))
    found = vision.text_khop_profile(model, tokens, max_hop=8)
    causal = name == "gpt2"
    patterns = attentions(model, {"input_ids": tokens})
    for layer, head in ((0, 1), (2, 0)):
        loops = [
            by_loop(pattern, lambda i, j: -1 if causal and j > i else abs(i - j), 9)
            for pattern in patterns[layer, :, head]
        ]
        mass, per_cell = (np.mean(one, axis=0) for one in zip(*loops, strict=True))
        np.testing.assert_allclose(found["mass"][layer, head], mass, atol=1e-6)
        np.testing.assert_allclose(found["per_cell"][layer, head], per_cell, atol=1e-6)
    assert np.isnan(found["per_cell"].sel(hop=7)).all()
    with pytest.raises(ValueError, match="max_hop=-1"):
        vision.text_khop_profile(model, tokens, max_hop=-1)
