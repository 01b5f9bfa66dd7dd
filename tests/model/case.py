"""One tiny model with its inputs, the output of transformers alone, and every site cached in one run."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import interp
from interp.model import Cache, Site
from interp.model.weights import Weights
from tests.model.families import FAMILIES
from tests.model.family import Family


@dataclass(frozen=True)
class Stack:
    """One tower of a case: its cached sites, and the same blocks as transformers has them."""

    prefix: str
    family: Family
    blocks: nn.ModuleList
    config: Any
    weights: Weights
    cache: Cache

    def __call__(self, kind: str, layer: int) -> Tensor:
        return self.cache[Site(kind, layer, tower=self.prefix)]

    def has(self, kind: str) -> bool:
        return Site(kind, 0, tower=self.prefix) in self.cache

    @property
    def layers(self) -> range:
        return range(len(self.blocks))


@dataclass(frozen=True)
class Case:
    """A model, its inputs, the output of transformers alone, and everything cached in one run."""

    family: Family
    hf: transformers.PreTrainedModel
    model: interp.Model
    inputs: dict[str, Tensor]
    plain: Tensor
    logits: Tensor
    cache: Cache
    stacks: tuple[Stack, ...]

    @property
    def text(self) -> Stack:
        return self.stacks[-1]


@torch.no_grad()
def run_alone(
    hf: transformers.PreTrainedModel, inputs: dict[str, Tensor], *, kv_cache: bool = False, **options: Any
) -> Any:
    """A forward pass of transformers by itself.

    Without a KV cache, as `interp` runs it: several families (GPT-2, OPT, GPT-J, Falcon, ...) hold k and v in another
    memory layout with one, and the same sums then differ by rounding.
    """
    if "use_cache" in inspect.signature(hf.forward).parameters:
        options["use_cache"] = kv_cache
    return hf(**inputs, **options, return_dict=True)


def output_of(hf: transformers.PreTrainedModel, inputs: dict[str, Tensor], *, kv_cache: bool = False) -> Tensor:
    output = run_alone(hf, inputs, kv_cache=kv_cache)
    return output.logits if "logits" in output else output.last_hidden_state


@cache
def make_case(name: str) -> Case:
    family_name, _, implementation = name.partition("/")
    family = FAMILIES[family_name]
    hf = family.make_model(implementation)
    inputs = family.make_inputs()
    plain = output_of(hf, inputs)
    model = interp.Model(hf)
    logits, cache = model.run_with_cache(inputs)
    towers = [("vision.", family.vision)] if family.vision else []
    stacks = []
    for prefix, facts in [*towers, ("", family)]:
        config = hf.config.vision_config if prefix else hf.config.get_text_config()
        weights = Weights(hf, model.anatomy.towers[prefix])
        stacks.append(Stack(prefix, facts, hf.get_submodule(facts.blocks), config, weights, cache))
    return Case(family, hf, model, inputs, plain, logits, cache, tuple(stacks))


def state_of(hf: nn.Module) -> dict[str, Any]:
    """All that a run must not change."""
    modules = dict(hf.named_modules())
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "hooks": {name: [len(getattr(module, kind)) for kind in hooks] for name, module in modules.items()},
        "training": {name: module.training for name, module in modules.items()},
        "implementation": {
            name: module.config._attn_implementation for name, module in modules.items() if hasattr(module, "config")
        },
        "requires_grad": {name: parameter.requires_grad for name, parameter in hf.named_parameters()},
        "gradients": [name for name, parameter in hf.named_parameters() if parameter.grad is not None],
        "classes": {name: type(module) for name, module in modules.items()},
        "forwards": [name for name, module in modules.items() if "forward" in vars(module)],
    }
