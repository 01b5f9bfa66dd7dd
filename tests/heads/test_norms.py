import pytest
import torch
import transformers
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from interp.heads.norms import linear_norm


def randomised(norm: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in norm.parameters():
        nn.init.normal_(parameter, mean=0.5)
    return norm


@pytest.mark.parametrize("width", [16, 17])
@pytest.mark.parametrize(
    ("make", "centred"),
    [(nn.LayerNorm, True), (LlamaRMSNorm, False), (Gemma2RMSNorm, False)],
    ids=["LayerNorm", "RMSNorm", "Gemma's 1 + weight"],
)
def test_parts_of_a_norm_put_it_together_again(make, centred: bool, width: int) -> None:
    module = randomised(make(width))
    norm = linear_norm(module, width, torch.device("cpu"))
    x = torch.randn(5, width) * 3 + 1
    assert norm.centred is centred
    torch.testing.assert_close(norm.apply(x) * norm.inverse_scale(x) + norm.bias, module(x), atol=1e-5, rtol=1e-5)
    direction = torch.randn(width)
    torch.testing.assert_close(x @ norm.transposed(direction), norm.apply(x) @ direction, atol=1e-4, rtol=1e-4)


def test_gain_bias_and_scale_are_those_of_the_formula() -> None:
    module = randomised(nn.LayerNorm(16))
    norm = linear_norm(module, 16, torch.device("cpu"))
    torch.testing.assert_close(norm.gain, module.weight.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(norm.bias, module.bias.detach())
    x = torch.randn(3, 16)
    expected = 1 / (x.var(-1, unbiased=False, keepdim=True) + module.eps).sqrt()
    torch.testing.assert_close(norm.inverse_scale(x), expected, atol=1e-5, rtol=1e-5)


def test_no_norm_is_the_identity() -> None:
    norm = linear_norm(None, 4, torch.device("cpu"))
    x = torch.randn(2, 4)
    assert torch.equal(norm.apply(x) * norm.inverse_scale(x) + norm.bias, x)


def test_half_precision_norms_are_read_in_float32_and_left_alone() -> None:
    module = randomised(transformers.models.gpt2.modeling_gpt2.nn.LayerNorm(16)).to(torch.bfloat16)
    norm = linear_norm(module, 16, torch.device("cpu"))
    assert norm.gain.dtype == torch.float32
    assert module.weight.dtype == torch.bfloat16
    torch.testing.assert_close(norm.gain, module.weight.detach().float(), atol=1e-5, rtol=1e-5)


def test_what_is_no_norm_is_refused() -> None:
    norm = linear_norm(nn.Sequential(nn.LayerNorm(16), nn.GELU()), 16, torch.device("cpu"))
    with pytest.raises(ValueError, match="cannot be linearised"):
        norm.inverse_scale(torch.randn(3, 16))
