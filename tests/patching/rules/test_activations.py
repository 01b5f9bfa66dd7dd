"""The Identity-rule on single activation functions against closed forms of f(x)/x, and the functions it refuses."""

import math

import numpy as np
import pytest
import scipy.special
import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.bloom.modeling_bloom import BloomGelu

from interp.model.anatomy import UnsupportedModel
from interp.patching.rules.activations import probed_activation, with_identity_rule


def tanh_form(x):
    return 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


SLOPES = {
    "silu": scipy.special.expit,
    "swish": scipy.special.expit,
    "gelu": scipy.special.ndtr,
    "gelu_python": scipy.special.ndtr,
    "gelu_new": tanh_form,
    "gelu_pytorch_tanh": tanh_form,
    "gelu_fast": tanh_form,
    "gelu_accurate": tanh_form,
    "bloom_gelu": tanh_form,
    "quick_gelu": lambda x: scipy.special.expit(1.702 * x),
    "mish": lambda x: np.tanh(np.logaddexp(0, x)),
    "relu": lambda x: np.where(x > 0, 1.0, 0.0),
    "leaky_relu": lambda x: np.where(x > 0, 1.0, 0.01),
    "tanh": lambda x: np.where(x == 0, 1.0, np.tanh(x) / np.where(x == 0, 1.0, x)),
    "linear": np.ones_like,
}
"""f(x)/x with its limit at 0; at the kinks of ReLUs, what autograd takes for the derivative."""
TOLERANCE = {torch.float64: (1e-6, 1e-9), torch.float32: (1e-5, 1e-6), torch.bfloat16: (2e-2, 2e-2)}


def make(name):
    return BloomGelu() if name == "bloom_gelu" else ACT2FN[name]


def inputs(dtype, layout):
    x = torch.cat([torch.linspace(-6, 6, 23), torch.tensor([0.0, -0.0, 1e-6, -1e-6, 3e-2, -8.0, 8.0])]).double()
    x = x.reshape(5, 6) if layout == "contiguous" else x.reshape(6, 5).T
    return x.to(dtype).requires_grad_()


@pytest.mark.parametrize("layout", ["contiguous", "non-contiguous"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", SLOPES)
def test_the_identity_rule_is_its_formula(name, dtype, layout):
    activation = probed_activation(make(name), name)
    x = inputs(dtype, layout)
    y = activation.module(x)
    ruled = with_identity_rule(x, y, activation.slope_at_zero)
    assert torch.equal(ruled, y)
    coefficient = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
    (found,) = torch.autograd.grad(ruled, x, coefficient)
    assert found.dtype == dtype
    expected = torch.from_numpy(SLOPES[name](x.detach().double().numpy())) * coefficient.double()
    relative, absolute = TOLERANCE[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=relative, atol=absolute)


class Parted(nn.Module):
    """Not elementwise."""

    def forward(self, x):
        return torch.softmax(x, -1) * x


class InPlace(nn.Module):
    """Overwrites its input."""

    def forward(self, x):
        return nn.functional.silu(x, inplace=True)


class TwoInputs(nn.Module):
    """Not a function of one tensor."""

    def forward(self, x, y):
        return x * y


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (ACT2FN["relu2"], "grows faster than linearly"),
        (ACT2FN["sigmoid"], "not 0 at 0"),
        (ACT2FN["laplace"], "not 0 at 0"),
        (nn.Softplus(), "not 0 at 0"),
        (nn.Softmax(-1), "not a function of single numbers"),
        (nn.Softmax(0), "not a function of single numbers"),
        (Parted(), "not a function of single numbers"),
        (nn.GLU(), "cannot be probed"),
        (InPlace(), "overwrites its input"),
        (TwoInputs(), "cannot be probed"),
    ],
)
def test_a_function_without_a_rule_is_refused_by_path(module, reason):
    with pytest.raises(UnsupportedModel, match=rf"blocks\.3\.act \({type(module).__name__}\).*({reason})"):
        probed_activation(module, "blocks.3.act")
