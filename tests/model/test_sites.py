"""Site names: what is accepted, what is offered when a name is wrong, and how unknown families are treated."""

import copy
import pickle

import pytest
import torch
from torch import nn

from interp import Model, Site, SiteUnavailable, UnsupportedModel


def test_a_site_is_its_name():
    site = Site("z", layer=3)
    assert site == "blocks.3.attn.hook_z"
    assert hash(site) == hash("blocks.3.attn.hook_z")
    assert Site.parse("blocks.3.attn.hook_z").layer == 3
    assert Site.parse("vision.blocks.0.hook_resid_pre").tower == "vision."
    assert Site("post", 2) == "blocks.2.mlp.hook_post"
    for other in (copy.deepcopy(site), pickle.loads(pickle.dumps(site))):
        assert (other, other.kind, other.layer, other.tower) == (site, "z", 3, "")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Site("hook_zz", 0), r"'hook_zz' is not a site; did you mean 'hook_z'"),
        (lambda: Site("z"), "needs a layer"),
        (lambda: Site("embed", 1), "takes no layer"),
        (lambda: Site.parse("blocks.0.attn.hook_zz"), r"did you mean 'blocks\.0\.attn\.hook_z'"),
    ],
)
def test_wrong_names_get_near_ones(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_patterns_select_in_computation_order(tiny_llama):
    assert tiny_llama.site_names("z") == [f"blocks.{layer}.attn.hook_z" for layer in range(3)]
    assert tiny_llama.site_names("blocks.[01].hook_resid_p*") == [
        "blocks.0.hook_resid_pre",
        "blocks.0.hook_resid_post",
        "blocks.1.hook_resid_pre",
        "blocks.1.hook_resid_post",
    ]
    assert tiny_llama.site_names(["mlp_out", "blocks.2.attn.hook_q"]) == [
        "blocks.0.hook_mlp_out",
        "blocks.1.hook_mlp_out",
        "blocks.2.attn.hook_q",
        "blocks.2.hook_mlp_out",
    ]
    assert tiny_llama.site_names("*")[0] == "hook_embed"
    assert tiny_llama.site_names("*")[-1] == "ln_final.hook_normalized"
    with pytest.raises(ValueError, match="matches no site"):
        tiny_llama.site_names("blocks.*.attn.hook_zz")
    with pytest.raises(ValueError, match="no vision tower"):
        tiny_llama.site_names("vision.blocks.0.hook_resid_pre")


def test_a_family_that_the_table_does_not_know_is_recognised_by_its_modules(tiny_llama):
    hf = copy.deepcopy(tiny_llama.hf)
    hf.config.model_type = "llama_of_tomorrow"
    model = Model(hf)
    tokens = torch.randint(0, model.d_vocab, (1, 5))
    _, cache = model.run_with_cache(tokens, ["resid_pre", "attn_out", "mlp_out", "resid_post"])
    torch.testing.assert_close(
        cache["resid_pre", 1] + cache["attn_out", 1] + cache["mlp_out", 1], cache["resid_post", 1]
    )


def test_a_block_with_parts_that_no_layout_explains_is_refused(tiny_llama):
    hf = copy.deepcopy(tiny_llama.hf)
    hf.config.model_type = "llama_with_extras"
    for block in hf.model.layers:
        block.memory = nn.Linear(4, 4)
    with pytest.raises(UnsupportedModel, match="memory"):
        Model(hf)


def test_a_missing_role_is_named_with_the_module_tree(tiny_llama):
    hf = copy.deepcopy(tiny_llama.hf)
    for block in hf.model.layers:
        del block.self_attn.o_proj
    with pytest.raises(UnsupportedModel, match=r"o \(self_attn\.o_proj\)") as error:
        Model(hf)
    assert "q_proj: Linear" in str(error.value)


def test_no_blocks_at_all_is_refused():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = type("Config", (), {"model_type": "bare"})()
            self.layer = nn.Linear(2, 2)

    with pytest.raises(UnsupportedModel, match=r"no list of transformer blocks(.|\n)*layer: Linear"):
        Model(Bare())


def test_scores_need_an_implementation_with_a_mask(tiny_llama):
    hf = copy.deepcopy(tiny_llama.hf)
    hf.config._attn_implementation_internal = "flex_attention"
    model = Model(hf)
    with pytest.raises(ValueError, match="load the model with attn_implementation='sdpa' or 'eager'"):
        model.run_with_cache(torch.tensor([[1, 2]]), "pattern")
    assert hf.config._attn_implementation == "flex_attention"
    assert not issubclass(SiteUnavailable, UnsupportedModel)
