"""Recursive attribution: exact sums, and single terms against recomputing z with pattern and norm scale frozen."""

import numpy as np
import pandas as pd
import pytest
import torch

import interp
from interp.model import Site, UnsupportedModel
from interp.saes.architectures import ARCHITECTURES, make
from interp.saes.recursive import recursive_attribution, tree_text
from interp.saes.sae import SAE
from tests.model.families import FAMILIES
from tests.saes.shaken import transcoder, z_sae

FEATURE, POSITION = 3, 7


def family(name: str) -> tuple[interp.Model, torch.Tensor]:
    return interp.Model(FAMILIES[name].make_model("eager")), FAMILIES[name].make_inputs()["input_ids"][0]


def pre_activation(model: interp.Model, sae: SAE, ids: torch.Tensor) -> float:
    _, cache = model.run_with_cache(ids[None], "z")
    return float(sae.pre_activations(cache[sae.site][0].flatten(-2))[POSITION, FEATURE])


def check_sums(tree: pd.DataFrame, value: float) -> None:
    assert tree["contribution"][0] == pytest.approx(value, abs=1e-5)
    assert tree.loc[tree["leaf"], "contribution"].sum() == pytest.approx(value, abs=1e-4)
    for node in tree.index[~tree["leaf"]]:
        children = tree.loc[tree["parent"] == node, "contribution"].sum()
        assert children == pytest.approx(tree["contribution"][node], abs=1e-4), tree["node"][node]


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "olmo2", "cohere", "granite", "gpt_oss", "gpt_neox"])
def test_leaves_sum_to_the_pre_activation_and_children_to_their_parents(name) -> None:
    model, ids = family(name)
    sae, upstream = z_sae(model), [z_sae(model, 0), z_sae(model, 1)]
    tree = recursive_attribution(
        model, sae, ids, FEATURE, position=POSITION, upstream=upstream, depth=3, beam=4, keep=6
    )
    check_sums(tree, pre_activation(model, sae, ids))
    assert tree.attrs["sum_error"] < 1e-4
    assert tree["depth"].max() >= 2  # 3 unless all four features of the first step lie in layer 0
    assert 1 + 4 <= (~tree["leaf"]).sum() <= 1 + 4 + 4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_features_of_every_architecture_are_taken_apart_exactly(architecture) -> None:
    model, ids = family("llama")
    upstream = [z_sae(model, 1, architecture), transcoder(model)]
    tree = recursive_attribution(model, z_sae(model), ids, FEATURE, position=POSITION, upstream=upstream)
    check_sums(tree, pre_activation(model, z_sae(model), ids))
    expanded = tree[(tree["kind"] == "feature") & ~tree["leaf"] & (tree["depth"] > 0)]
    assert len(expanded) > 0
    assert (expanded["activation"] > 0).all()


def frozen_pre_activation(model: interp.Model, sae: SAE, ids: torch.Tensor, change: torch.Tensor, source: int) -> float:
    """The pre-activation if x at one source loses `change`, norm scale and pattern as they are; from raw parameters."""
    layer = Site.parse(str(sae.site)).layer
    _, cache = model.run_with_cache(ids[None], ["resid_pre", "pattern"])
    x, A = cache["resid_pre", layer][0].double(), cache["pattern", layer][0].double()
    block = model.tower.blocks[layer]
    changed = x.clone()
    changed[source] -= change.double()
    if model.anatomy.family == "gpt2":
        scale = (x.var(-1, unbiased=False, keepdim=True) + block.ln1.eps).sqrt()
        normed = (changed - changed.mean(-1, keepdim=True)) / scale * block.ln1.weight + block.ln1.bias
    else:
        scale = (x.square().mean(-1, keepdim=True) + block.ln1.variance_epsilon).sqrt()
        normed = changed / scale * block.ln1.weight
    W_V, b_V = model.W_V[layer].double(), model.b_V[layer].double()
    group = model.n_heads // model.n_kv_heads
    z = [A[h, POSITION] @ (normed @ W_V[h // group] + b_V[h // group]) for h in range(model.n_heads)]
    return float(sae.pre_activations(torch.cat(z).float()[None])[0, FEATURE].detach())


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_leaf_is_what_its_removal_takes_away_with_pattern_and_scale_frozen(name) -> None:
    model, ids = family(name)
    sae, earlier, coder = z_sae(model), z_sae(model, 1), transcoder(model)
    tree = recursive_attribution(
        model, sae, ids, FEATURE, position=POSITION, upstream=[earlier, coder], depth=1, keep=10_000
    )
    _, cache = model.run_with_cache(ids[None], ["embed", "mlp_out", "attn_out", "z", "ln2"])
    terms = tree.set_index("node")["contribution"]
    before = frozen_pre_activation(model, sae, ids, torch.zeros(model.d_model), 0)
    assert before == pytest.approx(pre_activation(model, sae, ids), abs=1e-5)
    features, written = (fn(cache["z", 1][0].flatten(-2)) for fn in (earlier.encode, earlier.forward))
    W_O = model.W_O[1].flatten(0, 1)
    source = 5
    active = int(features[source].argmax())
    read = cache["ln2", 0][0]
    coded = int(coder.encode(read)[source].argmax())
    removed = {
        f"embed@{source}": cache["embed"][0, source],
        f"mlp1@{source}": cache["mlp_out", 1][0, source],
        f"attn0@{source}": cache["attn_out", 0][0, source],
        f"L1.f{active}@{source}": features[source, active] * earlier.W_dec[active] @ W_O,
        f"error L1@{source}": (cache["z", 1][0].flatten(-2) - written)[source] @ W_O,
        f"mlp0.f{coded}@{source}": coder.encode(read)[source, coded] * coder.W_dec[coded],
        f"error mlp0@{source}": (cache["mlp_out", 0][0] - coder(read))[source],
        f"skip mlp0@{source}": read[source] @ coder.W_skip,
    }
    for node, change in removed.items():
        without = frozen_pre_activation(model, sae, ids, change.detach(), source)
        assert terms[node] == pytest.approx(before - without, abs=1e-4), node
    assert not tree["node"].isin([f"embed@{POSITION + 1}"]).any()  # attention does not reach it


def test_layers_without_saes_are_leaves_and_later_saes_are_not_used() -> None:
    model, ids = family("llama")
    tree = recursive_attribution(model, z_sae(model, 1), ids, FEATURE, upstream=[z_sae(model, 2)], keep=1000)
    assert set(tree["kind"]) == {"feature", "embed", "attn", "mlp", "bias"}
    assert (tree["depth"] <= 1).all()
    assert (tree["layer"] <= 1).all()
    first = recursive_attribution(model, z_sae(model, 0), ids, FEATURE, keep=1000)
    assert set(first["kind"]) == {"feature", "embed", "bias"}


def test_what_is_not_listed_is_one_leaf_and_the_text_shows_the_tree(tiny_gpt2) -> None:
    sae, upstream = z_sae(tiny_gpt2), [z_sae(tiny_gpt2, 1)]
    whole, few = (
        recursive_attribution(tiny_gpt2, sae, "Mary and John", FEATURE, upstream=upstream, depth=1, keep=keep)
        for keep in (1000, 2)
    )
    assert few["kind"].tolist().count("other") == 1
    assert len(few) == 1 + 2 + 1 + 1
    other = whole.loc[1:].loc[whole["kind"] != "bias", "contribution"].abs().sort_values().index[:-2]
    assert float(few.loc[few["kind"] == "other", "contribution"].iloc[0]) == pytest.approx(
        whole.loc[other, "contribution"].sum(), abs=1e-5
    )
    lines = tree_text(few).splitlines()
    assert len(lines) == len(few)
    assert f"L2.f{FEATURE}@" in lines[0]
    assert not lines[0].startswith(" ")
    sizes = [abs(float(line.split()[0])) for line in lines[1:]]
    assert sizes == sorted(sizes, reverse=True)
    assert np.isnan(few["activation"]).sum() == (few["feature"] == -1).sum()


def test_a_model_whose_terms_do_not_add_up_is_refused(tiny_gpt2) -> None:
    """Here the values are changed on the way, as by a norm of values that nobody told of."""
    with tiny_gpt2.hooks([("blocks.2.attn.hook_v", lambda v, hook: 2 * v)]):  # noqa: SIM117
        with pytest.raises(UnsupportedModel, match="the terms miss the pre-activation by"):
            recursive_attribution(tiny_gpt2, z_sae(tiny_gpt2), "Mary and John", FEATURE)


def test_a_post_norm_model_is_refused() -> None:
    model = interp.Model(FAMILIES["opt-post_norm"].make_model("eager"))
    with pytest.raises(UnsupportedModel, match="post-norm"):
        recursive_attribution(model, z_sae(model), torch.arange(5, 9), FEATURE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feature": 24}, "feature 24 is out of range"),
        ({"position": 3}, "position 3 is out of range"),
        ({"depth": 0}, "depth=0; it must be 1 or more"),
        ({"beam": -1}, "beam=-1; it must be 0 or more"),
    ],
)
def test_bad_input_is_refused(tiny_gpt2, changes, message) -> None:
    given = {"feature": FEATURE} | changes
    with pytest.raises(ValueError, match=message):
        recursive_attribution(tiny_gpt2, z_sae(tiny_gpt2), [5, 6, 7], **given)


def test_upstream_saes_that_cannot_be_used_are_named(tiny_gpt2) -> None:
    other = make("relu", 32, 8, site="blocks.0.hook_resid_post")
    with pytest.raises(ValueError, match=r"one belongs to blocks\.0\.hook_resid_post"):
        recursive_attribution(tiny_gpt2, z_sae(tiny_gpt2), "Mary", FEATURE, upstream=[other])
    with pytest.raises(ValueError, match="two upstream SAEs belong to"):
        recursive_attribution(tiny_gpt2, z_sae(tiny_gpt2), "Mary", FEATURE, upstream=[z_sae(tiny_gpt2, 1)] * 2)
