"""What a tiny random model of one family is made of, for `families.py`.

A `Family` states by hand, independently of `interp.model.anatomy`, what the invariants of `test_families.py` need:
where the blocks are, what stands between attention and the residual stream, how a block goes on from `resid_mid`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

N_POSITIONS, IMAGE_SIZE, PATCH = 9, 8, 4
IMAGE_TOKEN = 60
N_LAYERS, N_HEADS, N_KV_HEADS, D_MODEL, D_HEAD, D_MLP, VOCABULARY, WINDOW = 3, 4, 2, 32, 12, 40, 61, 4
LOCAL_GLOBAL = ["sliding_attention", "full_attention", "sliding_attention"]
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2}
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": D_MODEL,
    "intermediate_size": D_MLP,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": N_HEADS,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

Finish = Callable[[nn.Module, Tensor], Tensor]
"""(block, resid_mid) -> what the block hands to the next one."""


def _path(module: nn.Module, path: str) -> nn.Module:
    return module.get_submodule(path)


def pre_norm(norm: str, mlp: str = "mlp", *, post: str | None = None, multiplier: float = 1.0) -> Finish:
    """resid + multiplier * post(mlp(norm(resid)))"""

    def finish(block: nn.Module, resid: Tensor) -> Tensor:
        out = _path(block, mlp)(_path(block, norm)(resid))
        out = out[0] if isinstance(out, tuple) else out
        return resid + multiplier * (out if post is None else _path(block, post)(out))

    return finish


def finish_olmo2(block: nn.Module, resid: Tensor) -> Tensor:
    return resid + block.post_feedforward_layernorm(block.mlp(resid))


def finish_opt(block: nn.Module, resid: Tensor) -> Tensor:
    return resid + block.fc2(block.activation_fn(block.fc1(block.final_layer_norm(resid))))


def finish_opt_post_norm(block: nn.Module, resid: Tensor) -> Tensor:
    normed = block.self_attn_layer_norm(resid)
    return block.final_layer_norm(normed + block.fc2(block.activation_fn(block.fc1(normed))))


def finish_bloom(block: nn.Module, resid: Tensor) -> Tensor:
    return block.mlp(block.post_attention_layernorm(resid), resid)


def finish_bert(block: nn.Module, resid: Tensor) -> Tensor:
    normed = block.attention.output.LayerNorm(resid)
    return block.output(block.intermediate(normed), normed)


def finish_distilbert(block: nn.Module, resid: Tensor) -> Tensor:
    normed = block.sa_layer_norm(resid)
    return block.output_layer_norm(block.ffn(normed) + normed)


@dataclass(frozen=True)
class Family:
    """One tiny model and the facts about its family."""

    name: str
    """`family` or `family-variant`."""
    architecture: type
    config: dict[str, Any]
    make_inputs: Callable[[], dict[str, Tensor]]
    blocks: str = "model.layers"
    finish: Finish | None = field(default_factory=lambda: pre_norm("post_attention_layernorm"))
    """None: attention and MLP run in parallel."""
    attn: str = "self_attn"
    """The attention module in a block; it owns the norms of q and k, where there are any."""
    o: str = "self_attn.o_proj"
    qk_norm: tuple[str, str] | None = None
    """Norms of q and k over each head; `flat_qk_norm` if over all heads together."""
    flat_qk_norm: bool = False
    attn_input: str = "ln1"
    """The site that q, k and v are computed from."""
    attn_post: str | None = None
    """What stands between an attention output and the residual stream."""
    mlp_post: str | None = None
    residual_multiplier: float = 1.0
    post_norm: bool = False
    causal: bool = True
    interface: bool = True
    """Whether transformers routes its attention through `AttentionInterface`."""
    experts: bool = False
    pooled_norm: bool = False
    """Whether the last norm serves only the pooled output, so that the output compared here does not depend on it."""
    has_kinks: bool = False
    """Whether its activation function is not smooth."""
    vision: Family | None = None
    """The same facts for the vision tower of a vision-language model (its model and inputs are the whole's)."""

    @property
    def parallel(self) -> bool:
        return self.finish is None

    @property
    def implementations(self) -> tuple[str, ...]:
        return ("eager", "sdpa") if self.architecture._supports_sdpa else ("eager",)

    def make_model(self, implementation: str = "eager", dtype: torch.dtype = torch.float32) -> hf.PreTrainedModel:
        """The model in eval mode; the same weights on every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = self.architecture.config_class(**self.config)
            config._attn_implementation = implementation
            if self.experts and dtype == torch.float64:
                # The grouped matrix product that is their default takes no doubles.
                config._experts_implementation = "eager"
            model = self.architecture(config)
            randomise(model)
        return model.to(dtype).eval()


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Random weights that keep activations of order 1; vectors (norms, biases, sinks) get 0.3 randn added."""
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.normal_(std=min(parameter[0].numel(), parameter.shape[-1]) ** -0.5)
        else:
            parameter.add_(0.3 * torch.randn_like(parameter))


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def text() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(5, IMAGE_TOKEN, (2, N_POSITIONS), generator=_generator())}


def padded_text() -> dict[str, Tensor]:
    mask = torch.ones(2, N_POSITIONS, dtype=torch.long)
    mask[1, -3:] = 0
    return text() | {"attention_mask": mask}


def image() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=_generator())}


def text_with_image() -> dict[str, Tensor]:
    """Four image tokens, one a patch, then text."""
    tokens = text()["input_ids"]
    tokens[:, 1 : 1 + (IMAGE_SIZE // PATCH) ** 2] = IMAGE_TOKEN
    return {"input_ids": tokens} | image()


def text_after_prefix() -> dict[str, Tensor]:
    """PaliGemma's prefix (image and question, attended both ways) and causal suffix."""
    inputs = text_with_image()
    token_types = torch.zeros_like(inputs["input_ids"])
    token_types[:, 6:] = 1
    return inputs | {"token_type_ids": token_types}


def text_with_patches() -> dict[str, Tensor]:
    """One image a row for Qwen2-VL: 4 x 4 patches, merged by 2 x 2 into four tokens."""
    tokens = text_with_image()["input_ids"][:1]
    return {
        "input_ids": tokens,
        "pixel_values": torch.randn(16, 3 * 2 * PATCH**2, generator=_generator()),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (tokens == IMAGE_TOKEN).int(),
    }
