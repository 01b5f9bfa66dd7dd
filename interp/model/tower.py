"""The live modules of a model by role: its towers (text, vision), their blocks, and the parts of each block."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from interp.model.anatomy import ATTENTION_PATHS, BlockLayout, UnsupportedModel, child_at, family_of, module_tree

_FINAL_NORM_NAMES = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "layernorm", "post_layernorm")


@dataclass(frozen=True)
class Block:
    """The live modules of one block, by role; None where the block has no such part."""

    index: int
    module: nn.Module
    attn: nn.Module
    o: nn.Module
    q: nn.Module | None
    k: nn.Module | None
    v: nn.Module | None
    qkv: nn.Module | None
    ln1: nn.Module | None
    ln2: nn.Module | None
    mlp: nn.Module | None
    gate: nn.Module | None
    up: nn.Module | None
    gate_up: nn.Module | None
    down: nn.Module | None
    attn_post: nn.Module | None
    mlp_post: nn.Module | None
    resid_mid: nn.Module | None


@dataclass(frozen=True)
class Tower:
    """One stack of blocks: a text model, or the vision part of one."""

    prefix: str
    """Put before every site name: "" or "vision."."""
    path: str
    """Where the list of blocks is, e.g. `model.layers`."""
    blocks: tuple[Block, ...]
    stack: nn.Module
    """The module that owns the blocks and calls them in order."""
    ln_final: nn.Module | None
    config: Any
    layout: BlockLayout
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_model: int
    parallel: bool
    post_norm: bool
    residual_multiplier: float
    overwrites_mlp_out: bool
    uses_attention_interface: bool
    """Whether transformers routes this family's attention through `AttentionInterface`."""

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(self.blocks)


@dataclass(frozen=True)
class Anatomy:
    """The towers of a model by prefix: "" is the one that produces the output, "vision." feeds it."""

    root: nn.Module
    family: str
    towers: dict[str, Tower]

    @property
    def text(self) -> Tower:
        """The tower that produces the output."""
        return self.towers[""]


def resolve(hf: nn.Module) -> Anatomy:
    """Find every tower of a live Hugging Face model and the modules in it by role.

    Raises:
        UnsupportedModel: if no list of blocks is found, or a role is missing; the message prints the module tree.
    """
    family = getattr(hf.config, "model_type", type(hf).__name__)
    lists = [
        (path, module)
        for path, module in hf.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and child_at(module[0], "|".join(ATTENTION_PATHS)) is not None
    ]
    if not lists:
        raise UnsupportedModel(f"no list of transformer blocks in this {family} model. Its modules:\n{module_tree(hf)}")
    towers: dict[str, Tower] = {}
    for path, blocks in lists:
        vision = "visi" in path or "visual" in path
        prefix = "vision." if vision and len(lists) > 1 else ""
        if prefix in towers:
            raise UnsupportedModel(f"{family}: both {towers[prefix].path} and {path} look like the text model's blocks")
        towers[prefix] = _tower(hf, prefix, path, blocks)
    return Anatomy(hf, family, towers)


def _tower(hf: nn.Module, prefix: str, path: str, modules: nn.ModuleList) -> Tower:
    parent_path = path.rpartition(".")[0]
    stack = hf.get_submodule(parent_path)
    config = _tower_config(hf, parent_path)
    layout_family = family_of(config, modules[0])
    layout = layout_family.layout
    parallel = layout_family.parallel(config)
    if getattr(config, "apply_residual_connection_post_layernorm", False):
        raise UnsupportedModel("BLOOM with apply_residual_connection_post_layernorm has no residual stream to hook")
    blocks = tuple(_block(index, module, layout) for index, module in enumerate(modules))
    n_heads, n_kv_heads, d_head, d_model = _sizes(config, blocks[0], layout)
    return Tower(
        prefix=prefix,
        path=path,
        blocks=blocks,
        stack=stack,
        ln_final=_final_norm(hf, parent_path),
        config=config,
        layout=layout,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        d_head=d_head,
        d_model=d_model,
        parallel=parallel,
        post_norm=layout_family.post_norm(config),
        residual_multiplier=float(layout_family.residual_multiplier(config)),
        overwrites_mlp_out=layout_family.overwrites_mlp_out,
        uses_attention_interface=_uses_attention_interface(blocks[0].attn, config),
    )


def modeling_module(attn: nn.Module, name: str) -> Any | None:
    """`name` from the Python module that defines the class of `attn` (or a base class of it), None if there is none."""
    for cls in type(attn).__mro__:
        found = getattr(sys.modules.get(cls.__module__), name, None)
        if found is not None and cls.__module__ != "torch.nn.modules.module":
            return found
    return None


def _uses_attention_interface(attn: nn.Module, config: Any) -> bool:
    # GPT-2 with reorder_and_upcast_attn goes round the interface whenever the implementation is called "eager".
    upcasts = getattr(config, "reorder_and_upcast_attn", False)
    return modeling_module(attn, "ALL_ATTENTION_FUNCTIONS") is not None and not upcasts


def _tower_config(hf: nn.Module, parent_path: str) -> Any:
    """The config nearest to the blocks: that of the owning module, else of what contains it."""
    parts = parent_path.split(".") if parent_path else []
    for depth in range(len(parts), -1, -1):
        config = getattr(hf.get_submodule(".".join(parts[:depth])), "config", None)
        if config is not None:
            return config
    raise UnsupportedModel(f"no config above {parent_path}")


def _final_norm(hf: nn.Module, parent_path: str) -> nn.Module | None:
    """The norm after the last block: beside the list of blocks, or one level above it (an `encoder` wrapper)."""
    above = [parent_path] + ([parent_path.rpartition(".")[0]] if parent_path.rpartition(".")[2] == "encoder" else [])
    for path in above:
        owner = hf.get_submodule(path)
        for name in _FINAL_NORM_NAMES:
            if isinstance(getattr(owner, name, None), nn.Module):
                return getattr(owner, name)
    return None


def _block(index: int, module: nn.Module, layout: BlockLayout) -> Block:
    roles = [field.name for field in fields(Block) if field.name not in ("index", "module")]
    parts: dict[str, Any] = {role: child_at(module, getattr(layout, role)) for role in roles}
    return Block(index=index, module=module, **parts)


def _sizes(config: Any, block: Block, layout: BlockLayout) -> tuple[int, int, int, int]:
    n_heads = getattr(config, "num_attention_heads", None) or config.num_heads
    d_z, d_model = shape_of(block.o)
    d_head = d_z // n_heads
    if block.k is not None:
        n_kv_heads = shape_of(block.k)[1] // d_head
    elif layout.fused == "concatenated":
        assert block.qkv is not None
        n_kv_heads = (shape_of(block.qkv)[1] // d_head - n_heads) // 2
    elif layout.fused == "falcon" and config.new_decoder_architecture:
        n_kv_heads = config.num_kv_heads
    elif layout.fused == "falcon" and config.multi_query:
        n_kv_heads = 1
    else:
        n_kv_heads = n_heads
    return n_heads, n_kv_heads, d_head, d_model


def shape_of(projection: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a projection: `nn.Linear` keeps [out, in], GPT-2's `Conv1D` [in, out]."""
    rows, columns = projection.get_parameter("weight").shape
    return (rows, columns) if type(projection).__name__ == "Conv1D" else (columns, rows)
