"""Divergence of heads against formulas by hand, plain Hugging Face runs, and a model whose z is known exactly."""

import math

import numpy as np
import pytest
import scipy.spatial.distance
import torch
import transformers
import xarray as xr

import interp
from interp import heads
from interp.heads.divergence import above_median, are_outliers, head_covariance, head_distance
from tests.model.families import FAMILIES

TEXTS = (
    ["Mary and John went to the store", "Tom had a lot of fun at the park and"],
    ["the store", "fun at the park and"],
)


def plain_z(hf: torch.nn.Module, ids: torch.Tensor, n_heads: int) -> torch.Tensor:
    """What the output projections receive at the last position of one prompt: [layer, head, d_head]."""
    seen = []
    gpt2 = hasattr(hf, "transformer")
    blocks = hf.transformer.h if gpt2 else hf.model.layers
    handles = [
        (block.attn.c_proj if gpt2 else block.self_attn.o_proj).register_forward_pre_hook(
            lambda module, args: seen.append(args[0][0, -1].unflatten(-1, (n_heads, -1)))
        )
        for block in blocks
    ]
    with torch.no_grad():
        hf(ids)
    for handle in handles:
        handle.remove()
    return torch.stack(seen)


def test_distances_by_hand() -> None:
    full = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    ablated = torch.tensor([[0.0, 4.0], [0.0, 2.0]])
    assert head_distance(full, ablated).tolist() == [3, pytest.approx(math.sqrt(5))]
    assert head_distance(full, ablated, distance="cosine").tolist() == [pytest.approx(1 - 16 / 20), 1]
    assert head_distance(full, ablated, distance="relative").tolist() == [pytest.approx(3 / 5), pytest.approx(5**0.5)]
    variances = torch.diag_embed(torch.tensor([[9.0, 1.0], [0.25, 4.0]]))
    whitened = head_distance(full, ablated, distance="whitened", covariance=variances)
    assert whitened.tolist() == [pytest.approx(1), pytest.approx(math.sqrt(4 + 1))]


def test_whitened_distance_is_mahalanobis_and_does_not_see_the_units() -> None:
    generator = torch.Generator().manual_seed(0)
    full, ablated = torch.randn(2, 3, 4, 5, generator=generator)
    root = torch.randn(4, 5, 5, generator=generator)
    covariance = root @ root.mT + torch.eye(5)
    found = head_distance(full, ablated, distance="whitened", covariance=covariance)
    for row in range(3):
        for head in range(4):
            inverse = np.linalg.inv(covariance[head].double().numpy())
            expected = scipy.spatial.distance.mahalanobis(full[row, head], ablated[row, head], inverse)
            assert float(found[row, head]) == pytest.approx(expected, rel=1e-5)
    mixing = torch.randn(4, 5, 5, generator=generator)
    mixed = [torch.einsum("hij,nhj->nhi", mixing, z) for z in (full, ablated)]
    again = head_distance(*mixed, distance="whitened", covariance=mixing @ covariance @ mixing.mT)
    torch.testing.assert_close(again, found, rtol=1e-3, atol=1e-4)


def test_undefined_distances_are_nan() -> None:
    zero, one = torch.zeros(1, 3), torch.ones(1, 3)
    assert head_distance(one, zero, distance="cosine").isnan().all()
    assert head_distance(zero, one, distance="relative").isnan().all()
    assert head_distance(zero, zero).tolist() == [0]
    assert head_distance(one, zero, distance="whitened", covariance=torch.zeros(1, 3, 3)).isnan().all()
    with pytest.raises(ValueError, match="a covariance belongs to distance='whitened'"):
        head_distance(one, zero, covariance=torch.eye(3)[None])
    with pytest.raises(ValueError, match="a covariance belongs to distance='whitened'"):
        head_distance(one, zero, distance="whitened")


def test_half_precision_is_measured_in_float32() -> None:
    full = torch.full((1, 64), 300.0, dtype=torch.float16)
    assert head_distance(full, -full).item() == 4800  # its square is beyond float16


@pytest.mark.parametrize("distance", ["l2", "cosine", "relative"])
def test_divergence_equals_plain_runs_one_prompt_at_a_time(tiny, distance) -> None:
    found = heads.divergence(tiny, *TEXTS, distance=distance, per_prompt=True)
    assert found.dims == ("prompt", "layer", "head")
    assert dict(found.sizes) == {"prompt": 2, "layer": tiny.n_layers, "head": tiny.n_heads}
    for row, (full, ablated) in enumerate(zip(*TEXTS, strict=True)):
        z, without = (plain_z(tiny.hf, tiny.to_tokens(text), tiny.n_heads) for text in (full, ablated))
        expected = head_distance(z, without, distance=distance)
        np.testing.assert_allclose(found[row], expected, atol=2e-5, rtol=1e-4)
        np.testing.assert_allclose(found.ablated_activation[row], without.square().sum(-1), atol=1e-5, rtol=1e-4)
        alone = heads.divergence(tiny, full, ablated, distance=distance)
        assert alone.dims == ("layer", "head")
        np.testing.assert_allclose(alone, found[row], atol=2e-5, rtol=1e-4)
        of_ids = heads.divergence(tiny, tiny.to_tokens(full), tiny.to_tokens(ablated)[0], distance=distance)
        np.testing.assert_allclose(of_ids, alone, atol=1e-6)
    mean = heads.divergence(tiny, *TEXTS, distance=distance)
    np.testing.assert_allclose(mean, found.mean("prompt"), atol=1e-6)
    np.testing.assert_allclose(mean.ablated_activation, found.ablated_activation.mean("prompt"), rtol=1e-5)


def test_nothing_removed_is_no_divergence_and_the_choices_are_told(tiny, tmp_path) -> None:
    same = heads.divergence(tiny, TEXTS[0], TEXTS[0])
    assert (same == 0).all()
    expected = {"method": "divergence", "distance": "l2", "position": -1, "tower": "", "n_prompts": 2}
    assert expected.items() <= same.attrs.items()
    assert same.attrs["model"] == tiny.name
    same.to_netcdf(tmp_path / "divergence.nc")
    xr.testing.assert_identical(xr.load_dataarray(tmp_path / "divergence.nc"), same)


def test_positions_count_from_either_end(tiny) -> None:
    full, ablated = (tiny.to_tokens(text) for text in (TEXTS[0][0], TEXTS[1][0]))
    earlier = heads.divergence(tiny, full, ablated, position=-2)
    np.testing.assert_allclose(earlier, heads.divergence(tiny, full[:, :-1], ablated[:, :-1]), atol=1e-5)
    first = heads.divergence(tiny, *TEXTS, position=0)
    np.testing.assert_allclose(
        first[0, 0], head_distance(*(z_of_first_token(tiny, texts) for texts in TEXTS)).mean(0)[0], atol=1e-5
    )
    with pytest.raises(ValueError, match="position -40 is outside the prompt"):
        heads.divergence(tiny, full, ablated, position=-40)


def z_of_first_token(model: interp.Model, texts: list[str]) -> torch.Tensor:
    """Z of layer 0 at each text's first token, [prompt, head, d_head]."""
    return torch.stack([model.run_with_cache(text, "z")[1]["z", 0][0, 0] for text in texts])


def test_covariance_equals_numpy_and_leaves_padding_out(tiny) -> None:
    found = head_covariance(tiny, TEXTS[0], shrinkage=0.0).numpy()
    z = [tiny.run_with_cache(text, "z")[1].stack("z")[:, 0].numpy() for text in TEXTS[0]]
    rows = np.concatenate(z, axis=1)
    for layer, head in ((0, 1), (tiny.n_layers - 1, 3)):
        np.testing.assert_allclose(found[layer, head], np.cov(rows[layer, :, head].T), atol=1e-5, rtol=1e-3)
    shrunk = head_covariance(tiny, TEXTS[0], shrinkage=0.3)
    scale = np.trace(found[1, 2]) / tiny.d_head
    np.testing.assert_allclose(shrunk[1, 2], 0.7 * found[1, 2] + 0.3 * scale * np.eye(tiny.d_head), atol=1e-6)
    with pytest.raises(ValueError, match=r"shrinkage=2\.0; it runs from 0"):
        head_covariance(tiny, TEXTS[0], shrinkage=2.0)


def test_whitened_divergence_uses_the_reference(tiny) -> None:
    other = ["the boy reads his book and the girl runs", "Anna and Paul were friends"]
    found = heads.divergence(tiny, *TEXTS, distance="whitened", reference=other, shrinkage=0.2)
    covariance = head_covariance(tiny, other, shrinkage=0.2)
    rows = []
    for pair in zip(*TEXTS, strict=True):
        z, without = (plain_z(tiny.hf, tiny.to_tokens(text), tiny.n_heads) for text in pair)
        rows.append(head_distance(z, without, distance="whitened", covariance=covariance))
    np.testing.assert_allclose(found, torch.stack(rows).mean(0), rtol=1e-3)
    assert found.attrs["shrinkage"] == 0.2
    of_itself = heads.divergence(tiny, *TEXTS, distance="whitened")
    expected = heads.divergence(tiny, *TEXTS, distance="whitened", reference=TEXTS[0])
    np.testing.assert_array_equal(of_itself, expected)


def test_t_vhd_sums_the_largest_of_each_layer() -> None:
    values = np.array([[[1.0, 5.0, 2.0], [4.0, 0.0, 3.0]], [[0.0, 0.0, 1.0], [2.0, 2.0, 2.0]]], dtype="float32")
    vhd = xr.DataArray(values, dims=("prompt", "layer", "head"), attrs={"model": "by hand"})
    total = heads.t_vhd(vhd, k=2)
    assert total.dims == ("prompt",)
    assert total.values.tolist() == [5 + 2 + 4 + 3, 1 + 0 + 2 + 2]
    assert total.attrs == {"model": "by hand", "method": "t_vhd", "k": 2}
    assert float(heads.t_vhd(vhd[0])) == values[0].sum()
    with pytest.raises(ValueError, match=r"k=4; this model has 3 heads a layer, so k runs 1\.\.3"):
        heads.t_vhd(vhd, k=4)


def test_an_outlier_is_high_in_both_by_the_sigma_asked_for() -> None:
    # Mean 2; standard deviation 4 of the population, 4.47 of a sample.
    values = torch.tensor([10.0, 0, 0, 0, 0])
    assert are_outliers(values, values).tolist() == [True] + 4 * [False]
    assert not are_outliers(values, values.flip(0)).any(), "high in one of the two is not enough"
    # Mean 1; 1 of the population, 1.1547 of a sample: 2.1 lies between.
    between = torch.tensor([2.1, 1.9, 0.0, 0.0])
    assert float(between.mean() + between.std(correction=0)) < 2.1 < float(between.mean() + between.std())
    assert not are_outliers(between, between).any()
    assert are_outliers(between, between, sigma="population").tolist() == [True, False, False, False]
    with pytest.raises(ValueError, match="sigma='standard'; it is one of sample, population"):
        are_outliers.__wrapped__(values, values, sigma="standard")


def test_selected_heads_are_strictly_above_the_lower_middle() -> None:
    even, odd = torch.tensor([4.0, 1.0, 3.0, 2.0]), torch.tensor([4.0, 1.0, 3.0, 2.0, 5.0])
    assert above_median(even, None).tolist() == [True, False, True, False]
    assert above_median(odd, None).tolist() == [True, False, False, False, True]
    assert not above_median(torch.ones(4), None).any()
    # With head 0 zeroed as an outlier, the lower middle is 1 and head 3 comes in.
    surge = torch.tensor([100.0, 1.0, 3.0, 2.0])
    assert above_median(surge, torch.tensor([9.0, 0, 0, 0])).tolist() == [False, False, True, True]
    assert above_median(surge, None).tolist() == [True, False, True, False]


# A model with one layer whose attention is uniform (queries are 0), so that z is a mean over positions: each head reads
# one dimension of the embedding.

DIM, N_HEADS, GROUPS = 32, 8, 4
SEGMENT, QUESTION = 1, 2


def wired_model() -> interp.Model:
    """Key/value head 0 reads the segment's tokens, 1 the question's, five times as strongly, 2 what all tokens share.

    Head 3 reads nothing. Each has two query heads.
    """
    config = transformers.LlamaConfig(
        vocab_size=4,
        hidden_size=DIM,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=N_HEADS,
        num_key_value_heads=GROUPS,
        rms_norm_eps=1e-12,
        tie_word_embeddings=False,
    )
    hf = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        embedding = hf.model.embed_tokens.weight
        embedding[:, 0] = 1
        for token in (SEGMENT, QUESTION):
            embedding[token, token] = 1
        value = hf.model.layers[0].self_attn.v_proj.weight.unflatten(0, (GROUPS, DIM // N_HEADS))
        value[0, 0, SEGMENT], value[1, 0, QUESTION], value[2, 0, 0] = 1, 5, 1
    return interp.Model(hf, name="wired")


def test_wired_heads_diverge_exactly_as_wired() -> None:
    model = wired_model()
    full, ablated = torch.tensor([7 * [SEGMENT] + 3 * [QUESTION]]), torch.tensor([3 * [QUESTION]])
    unit = math.sqrt(DIM / 2)  # every token is two ones before the norm
    vhd = heads.divergence(model, full, ablated)
    share = 7 / 10
    expected = np.repeat([share, 5 * share, 0, 0], 2) * unit
    np.testing.assert_allclose(vhd[0], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(vhd.ablated_activation[0], np.repeat([0, 25, 1, 0], 2) * unit**2, rtol=1e-5, atol=1e-5)

    # The head that reads the question surges when the segment no longer dilutes it.
    surging = [False, False, True, True, False, False, False, False]
    assert heads.outlier_heads(vhd).values.tolist() == [surging]
    image = [True, True, *6 * [False]]
    assert heads.select_heads(vhd).values.tolist() == [image]
    assert heads.select_heads(vhd, outliers=False).values.tolist() == [[True, True, True, True, *4 * [False]]]
    relative = heads.divergence(model, full, ablated, distance="relative")
    np.testing.assert_allclose(relative[0, :6], [1, 1, share / (1 - share), share / (1 - share), 0, 0], atol=1e-4)
    assert np.isnan(relative[0, 6:]).all()
    assert heads.t_vhd(vhd, k=1) == pytest.approx(5 * share * unit)


def test_rules_keep_the_axes_and_ask_for_what_they_need(tiny) -> None:
    found = heads.divergence(tiny, *TEXTS, per_prompt=True)
    chosen = heads.select_heads(found)
    assert chosen.dims == found.dims
    assert chosen.dtype == bool
    assert chosen.attrs["method"] == "select_heads"
    for row in range(2):
        alone = heads.select_heads(heads.divergence(tiny, TEXTS[0][row], TEXTS[1][row]))
        np.testing.assert_array_equal(alone, chosen[row])
    with pytest.raises(ValueError, match="needs the coordinate 'ablated_activation'"):
        heads.select_heads(found.mean("prompt"))
    assert heads.select_heads(found.mean("prompt"), outliers=False).dims == ("layer", "head")


def test_without_segment() -> None:
    prompt = "The bag held a key. When Mary opened it"
    assert heads.without_segment(prompt, "The bag held a key. ") == "When Mary opened it"
    with pytest.raises(ValueError, match="occurs 0 times"):
        heads.without_segment(prompt, "The box")
    with pytest.raises(ValueError, match=r"'e' occurs \d times"):
        heads.without_segment(prompt, "e")
    with pytest.raises(ValueError, match="nothing would be left"):
        heads.without_segment(prompt, prompt)


def test_mistakes_are_named_before_any_run(tiny, monkeypatch) -> None:
    monkeypatch.setattr(tiny.hf, "forward", lambda *args, **options: pytest.fail("the model ran"))
    with pytest.raises(ValueError, match="full has 2 prompts and ablated 1"):
        heads.divergence(tiny, TEXTS[0], TEXTS[1][0])
    with pytest.raises(ValueError, match="distance='l1'; it is one of l2, cosine, relative, whitened"):
        heads.divergence.__wrapped__(tiny, *TEXTS, distance="l1")
    ids = torch.ones(2, 3, dtype=torch.long)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    with pytest.raises(ValueError, match="ablated is padded on the right"):
        heads.divergence(tiny, ids, {"input_ids": ids, "attention_mask": mask})
    with pytest.raises(ValueError, match="matches no site"):
        heads.divergence(tiny, *TEXTS, tower="vision.")


def test_heads_of_a_vision_tower_are_compared_image_by_image() -> None:
    family = FAMILIES["llava"]
    model, full = interp.Model(family.make_model("sdpa")), family.make_inputs()
    other = {**full, "pixel_values": full["pixel_values"].flip(0)}
    found = heads.divergence(model, full, other, tower="vision.", position=0, per_prompt=True)
    z = model.run_with_cache(full, "vision.blocks.*.attn.hook_z")[1]["vision.blocks.1.attn.hook_z"][:, 0]
    np.testing.assert_allclose(found[0, 1], head_distance(z[0], z[1]), atol=1e-5)
