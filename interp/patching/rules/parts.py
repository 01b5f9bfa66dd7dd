"""The parts of a live model that are not linear: norms, activation functions, gated products, experts, attention.

Every leaf module is accounted for: it is linear, a norm or an activation function (both checked by a probe against the
formula that the rules use), part of a router, or a set of experts. Any other raises `UnsupportedModel` with its path,
because rules that silently left it out would give numbers that mean nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from torch import nn
from transformers.pytorch_utils import Conv1D

from interp.model import Model
from interp.model.anatomy import LAYOUTS, UnsupportedModel
from interp.model.tower import Tower
from interp.patching.rules.activations import Activation, probed_activation
from interp.patching.rules.experts import Experts, SharedExpert, is_experts, probed_experts
from interp.patching.rules.gates import GatedProduct
from interp.patching.rules.norms import Norm, NormRole, probed_norm

_LINEAR = (
    nn.Linear,
    Conv1D,
    nn.Embedding,
    nn.Identity,
    nn.Flatten,
    nn.modules.conv._ConvNd,
    nn.modules.dropout._DropoutNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
)
_LINEAR_NAMES = ("Linear", "Embedding", "LayerScale", "DropPath")
"""What the class names of other linear modules contain (rotary embeddings hand out constants)."""
_NOT_COMPUTING = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict, nn.modules.loss._Loss)
_ROUTER_NAMES = ("gate", "router")
_QK_NORM_NAMES = {"q_norm", "k_norm", "q_layernorm", "k_layernorm"}
_BLOCK_NORMS: tuple[NormRole, ...] = ("ln1", "ln2", "attn_post", "mlp_post")


@dataclass(frozen=True)
class Parts:
    """The non-linear parts of a model, all towers and what is around them included."""

    norms: tuple[Norm, ...]
    activations: tuple[Activation, ...]
    """Every activation module, also those of gated products and experts."""
    gated: tuple[GatedProduct, ...]
    experts: tuple[Experts, ...]
    shared_experts: tuple[SharedExpert, ...]
    towers: tuple[Tower, ...]
    """Their blocks hold the attention modules."""


def parts_of(model: Model) -> Parts:
    """Find the non-linear parts of a model.

    Runs each norm and activation function on a few numbers, the rest of the model not at all.

    Raises:
        UnsupportedModel: naming the dotted path of a module that no rule is known for.
    """
    root = model.anatomy.root
    modules = dict(root.named_modules())
    towers = tuple(model.anatomy.towers.values())
    blocks = [f"{tower.path}.{block.index}" for tower in towers for block in tower.blocks]
    experts_paths = [path for path, module in modules.items() if is_experts(module)]
    routers = _routers(experts_paths, modules)
    roles = _norm_roles(towers)
    norms, activations = [], dict(_global_activations(modules))
    for path, module in modules.items():
        if next(module.children(), None) is not None or _is_linear(module) or _inside(path, [*routers, *experts_paths]):
            continue
        if "Norm" in type(module).__name__:
            norms.append(probed_norm(module, path, _role(path, module, roles)))
        elif next(module.parameters(), None) is None:
            activations[path] = probed_activation(module, path)
        elif _inside(path, blocks):
            raise UnsupportedModel(f"{path} ({type(module).__name__}) is of no known kind: no rule is known for it")
    for path in experts_paths:
        activations |= _child_activations(path, modules)
    experts = [_experts_at(path, modules, activations) for path in experts_paths]
    _check_blocks(blocks, activations, experts)
    return Parts(
        norms=tuple(norms),
        activations=tuple(activations.values()),
        gated=tuple(_gated_products(modules, activations)),
        experts=tuple(experts),
        shared_experts=tuple(_shared_experts(modules)),
        towers=towers,
    )


def _is_linear(module: nn.Module) -> bool:
    name = type(module).__name__
    return isinstance(module, (*_LINEAR, *_NOT_COMPUTING)) or any(part in name for part in _LINEAR_NAMES)


def _inside(path: str, owners: list[str]) -> bool:
    return any(path == owner or path.startswith(owner + ".") for owner in owners)


def _routers(experts_paths: list[str], modules: Mapping[str, nn.Module]) -> list[str]:
    """Paths of what stands beside the experts and chooses among them."""
    beside = [f"{path.rpartition('.')[0]}.{name}" for path in experts_paths for name in _ROUTER_NAMES]
    return [path for path in beside if path in modules]


def _norm_roles(towers: tuple[Tower, ...]) -> dict[nn.Module, NormRole]:
    roles: dict[nn.Module, NormRole] = {}
    for tower in towers:
        if tower.ln_final is not None:
            roles[tower.ln_final] = "ln_final"
        for block in tower.blocks:
            roles |= {module: role for role in _BLOCK_NORMS if (module := getattr(block, role)) is not None}
    return roles


def _role(path: str, module: nn.Module, roles: Mapping[nn.Module, NormRole]) -> NormRole:
    return "qk" if _QK_NORM_NAMES.intersection(path.split(".")) else roles.get(module, "other")


def _global_activations(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, Activation]]:
    """Activation modules that belong to a Python module instead of the model, as `gelu` in RoBERTa's head."""
    for name in sorted({type(module).__module__ for module in modules.values()} - {"transformers.activations"}):
        for attribute, value in vars(sys.modules[name]).items():
            if type(value).__module__ == "transformers.activations" and isinstance(value, nn.Module):
                path = f"{name}.{attribute}"
                yield path, probed_activation(value, path)


def _child_activations(path: str, modules: Mapping[str, nn.Module]) -> dict[str, Activation]:
    names = [f"{path}.{name}" for name, _ in modules[path].named_children()]
    return {name: probed_activation(modules[name], name) for name in names}


def _experts_at(path: str, modules: Mapping[str, nn.Module], activations: Mapping[str, Activation]) -> Experts:
    own = [activation for name, activation in activations.items() if name.startswith(path + ".")]
    if len(own) > 1:
        raise UnsupportedModel(f"{path} has several activation functions: no rule is known for it")
    return probed_experts(modules[path], path, own[0] if own else None)


def _check_blocks(blocks: list[str], activations: Mapping[str, Activation], experts: list[Experts]) -> None:
    """An MLP whose activation function is no module would be taken for a linear one."""
    known = [*activations, *(one.path for one in experts)]
    for block in blocks:
        if not any(path.startswith(block + ".") for path in known):
            raise UnsupportedModel(f"{block} has no activation module: what its MLP does to its neurons cannot be seen")


def _gated_products(modules: Mapping[str, nn.Module], activations: Mapping[str, Activation]) -> Iterator[GatedProduct]:
    """Modules with the children that a gated MLP has in one of the known layouts."""
    for path, module in modules.items():
        children = dict(module.named_children())
        for names in _gated_layouts():
            if not children.keys() >= set(names):
                continue
            own = [activations[name] for child in children if (name := f"{path}.{child}") in activations]
            if len(own) != 1:
                raise UnsupportedModel(f"{path} is a gated MLP with {len(own)} activation modules instead of one")
            yield GatedProduct(path, own[0], children[names[-2]], len(names) == 2, children[names[-1]])


@cache
def _gated_layouts() -> tuple[tuple[str, ...], ...]:
    """Names of (gate, up, down), or (gate and up in one, down), in the gated MLPs of all known layouts."""
    found = set()
    for layout in LAYOUTS:
        if layout.gate or layout.gate_up:
            paths = (layout.gate, layout.up, layout.down) if layout.gate else (layout.gate_up, layout.down)
            found.add(tuple(path.removeprefix(f"{layout.mlp}.") for path in paths if path))
    return tuple(sorted(found))


def _shared_experts(modules: Mapping[str, nn.Module]) -> Iterator[SharedExpert]:
    for path, module in modules.items():
        gate = modules.get(f"{path}_gate")
        if path.endswith(".shared_expert") and gate is not None:
            yield SharedExpert(module, gate, path)
