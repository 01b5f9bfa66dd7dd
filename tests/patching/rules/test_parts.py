"""The non-linear parts of models: found in every family, and refused where one is unknown."""

import pytest
import torch
from torch import nn

import interp
from interp.model.anatomy import UnsupportedModel
from interp.patching.rules.parts import parts_of
from interp.patching.rules.relevance import relevance_rules
from tests.model.families import FAMILIES
from tests.model.family import N_LAYERS


@pytest.mark.parametrize("name", FAMILIES)
def test_every_part_of_every_family_is_found(name):
    family = FAMILIES[name]
    model = interp.Model(family.make_model())
    parts = parts_of(model)
    found = {norm.module for norm in parts.norms}
    found |= {activation.module for activation in parts.activations}
    expected = {
        module
        for module in model.hf.modules()
        if any(word in type(module).__name__ for word in ("Norm", "GELU", "Gelu", "SiLU", "ReLU"))
        and not list(module.children())
    }
    assert found >= expected
    for tower in parts.towers:
        roles = [norm.role for norm in parts.norms if norm.path.startswith(tower.path + ".")]
        for role in ("ln1", "ln2", "attn_post", "mlp_post"):
            module = getattr(tower.blocks[0], role)
            assert roles.count(role) == (N_LAYERS if module is not None and "Norm" in type(module).__name__ else 0)
    assert ("qk" in {norm.role for norm in parts.norms}) == (family.qk_norm is not None)
    assert bool(parts.experts) == family.experts
    gated = [module for path, module in model.hf.named_modules() if path.endswith(("up_proj", "gate_up_proj"))]
    assert len(parts.gated) == len([one for one in gated if isinstance(one, nn.Linear)])


@pytest.mark.parametrize("name", ["llama", "phi3", "gemma2", "dinov2-gated", "qwen2_moe"])
def test_a_gated_product_is_what_enters_its_down_projection(name):
    family = FAMILIES[name]
    model = interp.Model(family.make_model())
    parts = parts_of(model)
    outputs, products = {}, {}
    for gated in parts.gated:
        for module in (gated.activation.module, gated.up):
            module.register_forward_hook(lambda module, args, y: outputs.update({module: y}))
        gated.down.register_forward_pre_hook(lambda module, args: products.update({module: args[0]}))
    with torch.no_grad():
        model.hf(**family.make_inputs())
    assert len(products) == N_LAYERS
    for gated in parts.gated:
        up = outputs[gated.up].chunk(2, -1)[1] if gated.fused else outputs[gated.up]
        torch.testing.assert_close(outputs[gated.activation.module] * up, products[gated.down])


def test_a_function_that_a_python_module_keeps_is_found_and_left_as_it_was():
    model = interp.Model(FAMILIES["roberta"].make_model())
    by_path = {activation.path: activation.module for activation in parts_of(model).activations}
    gelu = by_path["transformers.models.roberta.modeling_roberta.gelu"]
    with relevance_rules(model):
        assert len(gelu._forward_hooks) == 1
    assert not gelu._forward_hooks


class Opaque(nn.Module):
    """Has a weight and does who knows what."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return x


class Squared(nn.Module):
    """A squared ReLU."""

    def forward(self, x):
        return torch.relu(x) ** 2


class StrangeNorm(nn.LayerNorm):
    """Divides by the largest entry."""

    def forward(self, x):
        return x / x.abs().amax(-1, keepdim=True)


@pytest.mark.parametrize(
    ("path", "module"),
    [
        ("model.layers.1.mlp.act_fn", Squared()),
        ("model.layers.2.input_layernorm", StrangeNorm(32)),
        ("model.norm", StrangeNorm(32)),
        ("model.layers.0.self_attn.extra", Opaque()),
        ("model.layers.0.extra", nn.Softmax(-1)),
        ("extra_norm", StrangeNorm(32)),
    ],
)
def test_a_module_of_unknown_kind_is_refused_by_path(path, module):
    hf = FAMILIES["llama"].make_model()
    parent, _, name = path.rpartition(".")
    setattr(hf.get_submodule(parent), name, module)
    with pytest.raises(UnsupportedModel, match=rf"^{path} \({type(module).__name__}\)"):
        relevance_rules(interp.Model(hf))


def test_an_mlp_whose_function_is_no_module_is_refused():
    hf = FAMILIES["gpt2"].make_model()
    hf.transformer.h[1].mlp.act = None
    with pytest.raises(UnsupportedModel, match=r"^transformer\.h\.1 has no activation module"):
        parts_of(interp.Model(hf))


class Adapted(nn.Module):
    """A projection with a low-rank addition."""

    def __init__(self, base):
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(32, 2, bias=False), nn.Linear(2, 48, bias=False)
        self.dropout, self.options = nn.ModuleDict({"default": nn.Identity()}), nn.ModuleDict()

    def forward(self, x):
        return self.base(x) + self.up(self.down(self.dropout["default"](x)))


def test_adapters_on_projections_are_linear():
    hf = FAMILIES["llama"].make_model()
    model = interp.Model(hf)
    plain = parts_of(model)
    hf.model.layers[1].self_attn.q_proj = Adapted(hf.model.layers[1].self_attn.q_proj)
    assert parts_of(model) == plain
