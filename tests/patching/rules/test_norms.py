"""The LN-rule on single norms against its formula, and the probe that finds a norm's formula."""

import pytest
import torch
import transformers.models as hf
from torch import nn

from interp.model.anatomy import UnsupportedModel
from interp.patching.rules.norms import probed_norm, with_frozen_scale

WIDTH, EPS = 12, 1e-3
NORMS = {
    "LlamaRMSNorm": lambda: hf.llama.modeling_llama.LlamaRMSNorm(WIDTH, EPS),
    "Olmo2RMSNorm": lambda: hf.olmo2.modeling_olmo2.Olmo2RMSNorm(WIDTH, EPS),
    "Gemma2RMSNorm": lambda: hf.gemma2.modeling_gemma2.Gemma2RMSNorm(WIDTH, EPS),
    "CohereLayerNorm": lambda: hf.cohere.modeling_cohere.CohereLayerNorm(WIDTH, EPS),
    "CohereLayerNorm of heads": lambda: hf.cohere.modeling_cohere.CohereLayerNorm((5, WIDTH), EPS),
    "NemotronLayerNorm1P": lambda: hf.nemotron.modeling_nemotron.NemotronLayerNorm1P(WIDTH, EPS),
    "RMSNorm": lambda: nn.RMSNorm(WIDTH, eps=EPS),
    "RMSNorm without weight": lambda: nn.RMSNorm(WIDTH, eps=EPS, elementwise_affine=False),
    "LayerNorm": lambda: nn.LayerNorm(WIDTH, EPS),
    "LayerNorm without bias": lambda: nn.LayerNorm(WIDTH, EPS, bias=False),
    "LayerNorm without weight": lambda: nn.LayerNorm(WIDTH, EPS, elementwise_affine=False),
}
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def make(name, dtype):
    torch.manual_seed(0)
    module = NORMS[name]()
    for parameter in module.parameters():
        nn.init.normal_(parameter, 0.7)
    return module.to(dtype)


def inputs(dtype, layout):
    x = torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 + 0.3
    x[0, 0] = 0
    x[1, 1, :6] = 0
    x[2] *= 1e-2
    if layout == "non-contiguous":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
        assert not x.is_contiguous()
    return x.to(dtype).requires_grad_()


def by_formula(name, module, x, coefficient):
    """C_x of the table, in float64."""
    x, coefficient = x.detach().double(), coefficient.double()
    weight = getattr(module, "weight", None)
    weight = torch.ones(()).double() if weight is None else weight.detach().double()
    weight = weight + 1 if name in ("Gemma2RMSNorm", "NemotronLayerNorm1P") else weight
    if "RMS" in name:
        return weight * coefficient / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS)
    centring = torch.eye(WIDTH, dtype=torch.float64) - 1 / WIDTH
    sigma = torch.sqrt(((x @ centring) ** 2).mean(-1, keepdim=True) + EPS)
    return ((weight * coefficient) @ centring) / sigma


@pytest.mark.parametrize("layout", ["contiguous", "non-contiguous"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_the_ln_rule_is_its_formula(name, dtype, layout):
    module = make(name, dtype)
    norm = probed_norm(module, "norm", "ln1")
    x = inputs(dtype, layout)
    y = module(x)
    ruled = with_frozen_scale(norm, x, y)
    assert torch.equal(ruled, y)
    coefficient = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
    (found,) = torch.autograd.grad(ruled, x, coefficient)
    assert found.dtype == dtype
    expected = by_formula(name, module, x, coefficient)
    error = (found.double() - expected).abs().amax(-1) / expected.abs().amax(-1)
    assert float(error.max()) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", NORMS)
def test_relevance_goes_through_a_norm_unchanged_but_for_the_bias(name):
    module = make(name, torch.float64)
    x = inputs(torch.float64, "contiguous")
    y = module(x)
    coefficient = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ruled = with_frozen_scale(probed_norm(module, "norm", "ln1"), x, y)
    (found,) = torch.autograd.grad(ruled, x, coefficient)
    without_bias = y - getattr(module, "bias", 0) if getattr(module, "bias", None) is not None else y
    torch.testing.assert_close((x * found).sum(-1), (without_bias * coefficient).sum(-1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_the_probe_finds_the_formula(name, dtype):
    norm = probed_norm(make(name, dtype), "a.norm", "ln2")
    assert norm.kind == ("rms" if "RMS" in name else "layer")
    assert norm.offset == (1.0 if name in ("Gemma2RMSNorm", "NemotronLayerNorm1P") else 0.0)
    assert norm.eps == EPS
    assert (norm.weight() is None) == ("without weight" in name)


def test_the_weight_is_read_when_it_is_needed():
    module = make("Gemma2RMSNorm", torch.float32)
    norm = probed_norm(module, "norm", "ln1")
    nn.init.constant_(module.weight, 2.0)
    torch.testing.assert_close(norm.weight(), torch.full((WIDTH,), 3.0))


class SquashedNorm(nn.LayerNorm):
    """Looks like a LayerNorm."""

    def forward(self, x):
        return torch.tanh(super().forward(x))


class OtherEpsilon(nn.LayerNorm):
    """Adds eps outside the root."""

    def forward(self, x):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (x.std(-1, correction=0, keepdim=True) + self.eps) * self.weight + self.bias


@pytest.mark.parametrize(
    "module", [SquashedNorm(WIDTH), OtherEpsilon(WIDTH, EPS), nn.GroupNorm(3, WIDTH), nn.LayerNorm((5, WIDTH))]
)
def test_a_norm_without_a_known_formula_is_refused_by_path(module):
    with pytest.raises(UnsupportedModel, match=rf"model\.blocks\.3\.norm \({type(module).__name__}\)"):
        probed_norm(module, "model.blocks.3.norm", "ln1")


def test_weights_that_are_not_in_memory_are_refused():
    with pytest.raises(UnsupportedModel, match=r"a\.norm: its weight is not in memory"):
        probed_norm(nn.LayerNorm(WIDTH, device="meta"), "a.norm", "ln1")
