"""Where each family of transformers keeps its parts: one table of module paths, and the code that reads it.

Everything that depends on the family of a model is in this file, as data. The steps:

1. `FAMILIES` maps a `config.model_type` to a `BlockLayout` (module paths relative to one block) and a few facts about
   the block (parallel or sequential, post-norm, residual multiplier) that the module names do not show;
2. a type that the table does not know is matched against all known layouts: the one that explains every
   parameter-carrying module of its blocks is taken;
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from torch import nn

FusedOrder = Literal["concatenated", "per_head", "falcon"]


class UnsupportedModel(ValueError):
    """A model whose parts cannot be told apart; the message shows the module tree and the missing role."""


@dataclass(frozen=True)
class BlockLayout:
    """Module paths of one block, relative to it.

    `a|b` means "the first that exists", a trailing `|` "or none"; None: blocks of this kind have no such part.
    """

    attn: str
    """The module handed to the attention function (it carries `config`, `layer_idx`, `is_causal`)."""
    o: str
    """Output projection; its input is the concatenated z."""
    q: str | None = None
    k: str | None = None
    v: str | None = None
    qkv: str | None = None
    """Fused projection, instead of q, k and v."""
    fused: FusedOrder = "concatenated"
    """How the columns of `qkv` are ordered; see `interp.model.projections`."""
    ln1: str | None = None
    ln2: str | None = None
    mlp: str | None = None
    gate: str | None = None
    """Gate projection of a gated MLP (its output is `mlp.hook_pre`)."""
    up: str | None = None
    """First projection of an ungated MLP, or the linear branch of a gated one."""
    gate_up: str | None = None
    """Fused gate and up projection (gate first)."""
    down: str | None = None
    attn_post: str | None = None
    """Module between the attention output and the residual stream (Gemma-style post-norm, layer scale)."""
    mlp_post: str | None = None
    resid_mid: str | None = None
    """Module whose input is the stream after attention, where that is not `ln2`."""


def _always(config: Any) -> bool:
    return True


def _never(config: Any) -> bool:
    return False


@dataclass(frozen=True)
class Family:
    """A layout and what module names do not show. Callables read the config."""

    layout: BlockLayout
    parallel: Callable[[Any], bool] = _never
    post_norm: Callable[[Any], bool] = _never
    residual_multiplier: Callable[[Any], float] = lambda config: 1.0
    overwrites_mlp_out: bool = False
    """The block adds to the MLP's output in place, so that a cached reference would change under the user."""


def _attention(prefix: str, o: str, names: tuple[str, str, str] = ("q_proj", "k_proj", "v_proj")) -> dict[str, Any]:
    q, k, v = (f"{prefix}.{name}" for name in names)
    return {"attn": prefix, "q": q, "k": k, "v": v, "o": f"{prefix}.{o}"}


_LLAMA = BlockLayout(
    **_attention("self_attn", "o_proj"),
    ln1="input_layernorm",
    ln2="post_attention_layernorm",
    mlp="mlp",
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    down="mlp.down_proj",
)
_MIXTURE = replace(_LLAMA, gate=None, up=None, down=None)
_SANDWICH = replace(
    _LLAMA, ln2="pre_feedforward_layernorm", attn_post="post_attention_layernorm", mlp_post="post_feedforward_layernorm"
)
_OLMO2 = replace(_SANDWICH, ln1=None, ln2=None, resid_mid="mlp")
_ONE_NORM = replace(_LLAMA, ln2=None)
_PHI = replace(_ONE_NORM, o="self_attn.dense", gate=None, up="mlp.fc1", down="mlp.fc2")
_PHI3 = replace(
    _LLAMA, q=None, k=None, v=None, qkv="self_attn.qkv_proj", gate=None, up=None, gate_up="mlp.gate_up_proj"
)
_STARCODER2 = replace(_LLAMA, gate=None, up="mlp.c_fc", down="mlp.c_proj")
_GPT2 = BlockLayout(
    attn="attn",
    qkv="attn.c_attn",
    o="attn.c_proj",
    ln1="ln_1",
    ln2="ln_2",
    mlp="mlp",
    up="mlp.c_fc",
    down="mlp.c_proj",
)
_GPT_NEO = replace(_GPT2, qkv=None, **_attention("attn.attention", "out_proj"))
_GPTJ = replace(_GPT_NEO, **_attention("attn", "out_proj"), ln2=None, up="mlp.fc_in", down="mlp.fc_out")
_GPT_NEOX = BlockLayout(
    attn="attention",
    qkv="attention.query_key_value",
    fused="per_head",
    o="attention.dense",
    ln1="input_layernorm",
    ln2="post_attention_layernorm",
    mlp="mlp",
    up="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h",
)
_BLOOM = replace(_GPT_NEOX, attn="self_attention", qkv="self_attention.query_key_value", o="self_attention.dense")
_FALCON = replace(_BLOOM, fused="falcon", ln1="ln_attn|input_layernorm", ln2="ln_mlp|post_attention_layernorm|")
_OPT = BlockLayout(
    **_attention("self_attn", "out_proj"), ln1="self_attn_layer_norm", ln2="final_layer_norm", up="fc1", down="fc2"
)
_BERT = BlockLayout(
    **(_attention("attention.self", "", ("query", "key", "value")) | {"o": "attention.output.dense"}),
    ln1="attention.output.LayerNorm",
    ln2="output.LayerNorm",
    up="intermediate.dense",
    down="output.dense",
)
_DISTILBERT = BlockLayout(
    **_attention("attention", "out_lin", ("q_lin", "k_lin", "v_lin")),
    ln1="sa_layer_norm",
    ln2="output_layer_norm",
    mlp="ffn",
    up="ffn.lin1",
    down="ffn.lin2",
)
_VIT = BlockLayout(
    **_attention("attention", "o_proj"),
    ln1="layernorm_before",
    ln2="layernorm_after",
    mlp="mlp",
    up="mlp.fc1",
    down="mlp.fc2",
)
_DINOV2 = replace(_VIT, ln1="norm1", ln2="norm2", attn_post="layer_scale1", mlp_post="layer_scale2")
_DINOV2_GATED = replace(_DINOV2, gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj")
_CLIP = replace(_VIT, **_attention("self_attn", "out_proj"), ln1="layer_norm1", ln2="layer_norm2")
_QWEN2_VISION = replace(
    _CLIP, q=None, k=None, v=None, attn="attn", qkv="attn.qkv", o="attn.proj", ln1="norm1", ln2="norm2"
)


_LLAMA_FAMILY = Family(_LLAMA)
_MIXTURE_FAMILY = Family(_MIXTURE)
_POST_NORM_FAMILY = Family(_BERT, post_norm=_always)

FAMILIES: dict[str, Family] = {
    "gpt2": Family(_GPT2),
    "gpt_neo": Family(_GPT_NEO),
    "gptj": Family(_GPTJ, parallel=_always),
    "gpt_neox": Family(_GPT_NEOX, parallel=lambda config: config.use_parallel_residual),
    "opt": Family(_OPT, post_norm=lambda config: not config.do_layer_norm_before),
    "bloom": Family(_BLOOM),
    "falcon": Family(
        _FALCON,
        parallel=lambda config: config.parallel_attn or config.new_decoder_architecture,
        overwrites_mlp_out=True,
    ),
    "llama": _LLAMA_FAMILY,
    "mistral": _LLAMA_FAMILY,
    "mixtral": _MIXTURE_FAMILY,
    "qwen2": _LLAMA_FAMILY,
    "qwen2_moe": _MIXTURE_FAMILY,
    "qwen2_vl_text": _LLAMA_FAMILY,
    "qwen3": _LLAMA_FAMILY,
    "qwen3_moe": _MIXTURE_FAMILY,
    "gemma": _LLAMA_FAMILY,
    "gemma2": Family(_SANDWICH),
    "gemma3_text": Family(_SANDWICH),
    "phi": Family(_PHI, parallel=_always),
    "phi3": Family(_PHI3),
    "olmo2": Family(_OLMO2),
    "stablelm": Family(_LLAMA, parallel=lambda config: config.use_parallel_residual),
    "starcoder2": Family(_STARCODER2),
    "cohere": Family(_ONE_NORM, parallel=_always),
    "granite": Family(_LLAMA, residual_multiplier=lambda config: config.residual_multiplier),
    "smollm3": _LLAMA_FAMILY,
    "gpt_oss": _MIXTURE_FAMILY,
    "bert": _POST_NORM_FAMILY,
    "roberta": _POST_NORM_FAMILY,
    "distilbert": Family(_DISTILBERT, post_norm=_always),
    "vit": Family(_VIT),
    "dinov2": Family(_DINOV2),
    "dinov2_with_registers": Family(_DINOV2),
    "clip_vision_model": Family(_CLIP),
    "clip_text_model": Family(_CLIP),
    "siglip_vision_model": Family(_CLIP),
    "qwen2_vl_vision": Family(_QWEN2_VISION),
}

IMAGE_TOKEN_TYPE: dict[str, int] = {"paligemma": 0}
"""What token type ids say of a piece of an image, where it is not 1 (text is 0); a PaliGemma prompt is all prefix."""

LAYOUTS: tuple[BlockLayout, ...] = (
    *dict.fromkeys(family.layout for family in FAMILIES.values()),
    _DINOV2_GATED,
)
ATTENTION_PATHS: tuple[str, ...] = tuple(dict.fromkeys(layout.attn for layout in LAYOUTS))

_QK_NORMS = {"q_norm", "k_norm", "q_layernorm", "k_layernorm"}


def family_of(config: Any, block: nn.Module) -> Family:
    """The family by `model_type`, or by matching layouts if the type is unknown or its blocks differ from the table.

    Raises:
        UnsupportedModel: if no layout explains the block.
    """
    known = FAMILIES.get(getattr(config, "model_type", ""))
    if known is not None and not missing_roles(block, known.layout):
        return known
    for layout in LAYOUTS:
        if not missing_roles(block, layout) and not unexplained_modules(block, layout):
            if known is not None:
                return replace(known, layout=layout)
            one_norm = layout.ln2 is None and layout.resid_mid is None
            return Family(layout, parallel=_always if one_norm else _never)
    closest = known.layout if known is not None else min(LAYOUTS, key=lambda layout: len(missing_roles(block, layout)))
    missing = ", ".join(missing_roles(block, closest)) or "none; unexplained: " + ", ".join(
        unexplained_modules(block, closest)
    )
    raise UnsupportedModel(
        f"cannot tell the parts of a {type(block).__name__} (model_type {getattr(config, 'model_type', '?')!r}) apart. "
        f"Missing roles: {missing}. Its modules:\n{module_tree(block)}"
    )


def missing_roles(block: nn.Module, layout: BlockLayout) -> list[str]:
    """Roles of `layout` whose path is absent from `block`, as "role (path)"."""
    paths = {field.name: getattr(layout, field.name) for field in fields(layout) if field.name != "fused"}
    return [
        f"{role} ({path})" for role, path in paths.items() if path and child_at(block, path) is None and path[-1] != "|"
    ]


def unexplained_modules(block: nn.Module, layout: BlockLayout) -> list[str]:
    """Paths of parameter-carrying leaf modules of `block` that no role of `layout` covers."""
    covered = [
        path
        for field in fields(layout)
        if field.name not in ("fused", "attn") and (path := getattr(layout, field.name))
    ]
    if layout.down is not None:
        covered = [path for path in covered if path != layout.mlp]
    roots = {alternative for path in covered for alternative in path.split("|")}
    leaves = [
        name
        for name, module in block.named_modules()
        if name and not list(module.children()) and list(module.parameters())
    ]
    return [
        leaf
        for leaf in leaves
        if not _QK_NORMS.intersection(leaf.split("."))
        and not any(leaf == root or leaf.startswith(root + ".") for root in roots)
    ]


def child_at(module: nn.Module, path: str | None) -> nn.Module | None:
    """The submodule at the first of the `|`-separated paths that exists and is not None."""
    for alternative in (path or "").split("|"):
        if not alternative:
            continue
        found: Any = module
        for name in alternative.split("."):
            found = getattr(found, name, None)
        if isinstance(found, nn.Module):
            return found
    return None


def module_tree(module: nn.Module, depth: int = 4) -> str:
    """Names and classes of the submodules, with repeated blocks shown once."""
    lines = []
    for name, child in module.named_modules():
        parts = name.split(".")
        if name and len(parts) <= depth and not any(part.isdigit() and part != "0" for part in parts):
            lines.append("  " * len(parts) + f"{parts[-1]}: {type(child).__name__}")
    return "\n".join(lines)
