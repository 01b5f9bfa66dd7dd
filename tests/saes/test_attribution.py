"""Direct feature attribution: against loops, the pre-activation itself, and ablation with the pattern frozen."""

import itertools

import numpy as np
import pytest
import torch

import interp
from interp.saes.architectures import ARCHITECTURES, make
from interp.saes.attribution import affine_parts, draw_attribution, feature_attribution
from tests.model.families import FAMILIES
from tests.saes.shaken import z_sae

FEATURES = [2, 7]


def family(name: str, implementation: str = "eager") -> tuple[interp.Model, torch.Tensor]:
    one = FAMILIES[name]
    return interp.Model(one.make_model(implementation)), one.make_inputs()["input_ids"][0]


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "gpt_oss", "gpt_neox"])
def test_terms_equal_loops_over_heads_and_sources(name) -> None:
    model, ids = family(name)
    sae = z_sae(model)
    both = feature_attribution(model, sae, ids, FEATURES, by="both")["attribution"]
    _, cache = model.run_with_cache(ids[None], ["pattern", "v"])
    A, v = cache["pattern", 2][0].numpy(), cache["v", 2][0].numpy()
    W_enc = sae.W_enc.detach().numpy().T.reshape(24, model.n_heads, model.d_head)
    group = model.n_heads // model.n_kv_heads
    for feature, t, s, h in itertools.product(FEATURES, (0, 4, 8), range(9), range(model.n_heads)):
        expected = A[h, t, s] * float(W_enc[feature, h] @ v[s, h // group])
        assert float(both.loc[feature, t, s, h]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("by", ["head", "source", "both"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_terms_and_bias_sum_to_the_pre_activation(tiny_llama, architecture, by) -> None:
    sae = z_sae(tiny_llama, 1, architecture)
    prompt = "When Mary and John went to the store"
    found = feature_attribution(tiny_llama, sae, prompt, FEATURES, by=by, positions=[-1, 2])
    _, cache = tiny_llama.run_with_cache(prompt, "z")
    pre = sae.pre_activations(cache["z", 1][0].flatten(-2)).detach()[[-1, 2]][:, FEATURES].T.numpy()
    axes = [one for one in found["attribution"].dims if one not in ("feature", "position")]
    total = found["attribution"].sum(axes) + found["bias"]
    np.testing.assert_allclose(total.values, pre, atol=1e-4)
    np.testing.assert_allclose(found["pre_activation"].values, pre, atol=1e-5)
    assert found.attrs["sum_error"] < 1e-4
    strings = tiny_llama.to_str_tokens(prompt)
    assert found["token"].values.tolist() == [strings[-1], strings[2]]
    assert found["source_token"].values.tolist() == strings


def test_the_bias_is_that_of_the_encoder_less_the_decoder_bias(tiny_gpt2) -> None:
    sae = z_sae(tiny_gpt2)
    found = feature_attribution(tiny_gpt2, sae, "Mary and John", 5)
    expected = float(sae.b_enc[5] - sae.W_enc[:, 5] @ sae.b_dec)
    assert float(found["bias"][0]) == pytest.approx(expected, abs=1e-6)


def test_by_head_and_by_source_are_sums_of_both(tiny_llama) -> None:
    sae = z_sae(tiny_llama)
    found = {by: feature_attribution(tiny_llama, sae, "Tom went to the park", FEATURES, by=by) for by in
             ("head", "source", "both")}  # fmt: skip
    both = found["both"]["attribution"]
    np.testing.assert_allclose(both.sum("source"), found["head"]["attribution"], atol=1e-5)
    np.testing.assert_allclose(both.sum("head"), found["source"]["attribution"], atol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_removing_a_source_under_the_frozen_pattern_takes_away_its_term(implementation) -> None:
    model, ids = family("llama", implementation)
    sae = z_sae(model)
    found = feature_attribution(model, sae, ids, 2, positions=-1)
    _, cache = model.run_with_cache(ids[None], "pattern")
    frozen = cache["pattern", 2]
    source = 3
    hooks = [
        ("blocks.2.attn.hook_pattern", lambda _, hook: frozen),
        ("blocks.2.attn.hook_v", lambda v, hook: v.index_fill(1, torch.tensor([source]), 0.0)),
    ]
    seen: list[torch.Tensor] = []
    hooks.append(("blocks.2.attn.hook_z", lambda z, hook: seen.append(z.flatten(-2))))
    model.run_with_hooks(ids[None], hooks)
    without = float(sae.pre_activations(seen[0])[0, -1, 2])
    term = float(found["attribution"].sel(source=source).squeeze())
    assert float(found["pre_activation"].squeeze()) - without == pytest.approx(term, abs=1e-5)


def test_attention_that_a_learned_sink_takes_is_stated() -> None:
    model, ids = family("gpt_oss")
    found = feature_attribution(model, z_sae(model), ids, 2, by="head")
    _, cache = model.run_with_cache(ids[None], "pattern")
    np.testing.assert_allclose(found["sink_mass"].values, 1 - cache["pattern", 2][0].sum(-1).T.numpy(), atol=1e-5)
    assert float(found["sink_mass"].max()) > 0.05
    model, ids = family("llama")
    assert float(feature_attribution(model, z_sae(model), ids, 2)["sink_mass"].max()) < 1e-5


def test_attention_on_the_first_token_is_stated(tiny_llama) -> None:
    found = feature_attribution(tiny_llama, z_sae(tiny_llama), "Mary and John went", 2, by="head", positions=[-1, 1])
    _, cache = tiny_llama.run_with_cache("Mary and John went", "pattern")
    expected = cache["pattern", 2][0, :, [-1, 1], 0].T.numpy()
    np.testing.assert_allclose(found["first_mass"].transpose("position", "head").values, expected, atol=1e-6)


def test_an_edited_pattern_is_the_one_that_is_read(tiny_gpt2) -> None:
    sae = z_sae(tiny_gpt2)
    with tiny_gpt2.hooks([("blocks.2.attn.hook_pattern", lambda pattern, hook: torch.ones_like(pattern) / 3)]):
        found = feature_attribution(tiny_gpt2, sae, "Mary and John", FEATURES)
    assert found.attrs["sum_error"] < 1e-4
    assert found["attribution"].values[0] == pytest.approx(found["attribution"].values[0][:1].repeat(3, 0), abs=1e-6)


def test_parts_of_an_affine_function() -> None:
    weight, x = torch.randn(5, 3), torch.randn(2, 5)
    rows, constants = affine_parts(lambda one: (one @ weight - 1).abs(), x, [(1, 2), (0, 0)])
    signs = (x @ weight - 1).sign()
    assert torch.allclose(rows[0], signs[1, 2] * weight[:, 2])
    assert torch.allclose(constants, torch.stack([-signs[1, 2], -signs[0, 0]]), atol=1e-6)


def test_the_figure_names_tokens_and_is_centred(tiny_gpt2) -> None:
    found = feature_attribution(tiny_gpt2, z_sae(tiny_gpt2), "Mary <b>and</b> John", 2, by="both", positions=-1)
    position = int(found["position"][0])
    figure = draw_attribution(found, 2, position)
    assert figure.data[0].z.shape == (4, found.sizes["source"])
    assert list(figure.data[0].y) == ["L2H0", "L2H1", "L2H2", "L2H3"]
    assert figure.data[0].zmin == -figure.data[0].zmax
    assert not any("<" in label for label in figure.layout.xaxis.ticktext)
    assert len(draw_attribution(found.sum("head", keep_attrs=True), 2, position).data[0].z) == 1
    with pytest.raises(ValueError, match="feature 3 is not in this attribution"):
        draw_attribution(found, 3, position)
    with pytest.raises(ValueError, match="ask for by='source'"):
        draw_attribution(feature_attribution(tiny_gpt2, z_sae(tiny_gpt2), "Mary", 2, by="head"), 2, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": 24}, "feature 24 is out of range; features run 0..23"),
        ({"positions": 9}, "position 9 is out of range"),
        ({"by": "token"}, "by='token'; it is one of"),
        ({"prompt": torch.zeros(2, 3, dtype=torch.long)}, r"one prompt at a time; got token ids of shape \[2, 3\]"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_refused(tiny_gpt2, changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        feature_attribution(tiny_gpt2, z_sae(tiny_gpt2), **({"prompt": "Mary and John", "features": 2} | changes))


def test_an_sae_of_another_site_is_refused(tiny_gpt2) -> None:
    with pytest.raises(ValueError, match="heads can be told apart"):
        feature_attribution(tiny_gpt2, make("relu", 32, 8, site="blocks.1.hook_mlp_out"), "Mary", 2)
