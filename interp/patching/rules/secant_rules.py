"""Secant rules on a live model: keep one run, then get exact differences to it from the backward pass of another.

1. `kept_run(model)`: forward passes inside keep what each non-linear part receives (the last one counts);
2. `secant_rules(model, other)`: in a forward pass inside, every non-linear part pairs what it receives with what the
   same call received in the kept run, and returns the same numbers with a secant multiplier as backward pass;
3. the gradient that comes back to an activation a is then its multiplier m, and Σ Δa·m over any cut of the model equals
   the difference of the metric between the runs, if the metric is linear in the logits or made exact itself
   (`interp.patching.secant.secant_metric`).

Hooks and wrapped calls are in this thread only, and are gone when the context ends.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from interp.model import Model
from interp.model.attention import attention_wrapped
from interp.patching.rules.experts import SharedExpert
from interp.patching.rules.gates import GatedProduct
from interp.patching.rules.parts import Parts, parts_of
from interp.patching.rules.secant import with_term
from interp.patching.rules.secant_attention import PairedAttention, soft_cap
from interp.patching.rules.secant_experts import paired_experts
from interp.patching.rules.secant_pairing import KeptRun


def secant_parts(model: Model) -> Parts:
    """The non-linear parts of a model, all of which have secant multipliers.

    Raises:
        UnsupportedModel: if a part is of no known kind, naming its dotted path.
        NotImplementedError: if transformers implements its attention outside the AttentionInterface.
    """
    for tower in model.anatomy.towers.values():
        if not tower.uses_attention_interface:
            raise NotImplementedError(
                f"transformers implements the attention of {tower.config.model_type} outside its AttentionInterface, "
                "where secant multipliers cannot reach it; use relevance_patching or attribution_patching"
            )
    return parts_of(model)


@contextmanager
def kept_run(model: Model, parts: Parts | None = None) -> Iterator[KeptRun]:
    """Keep, of each forward pass inside, what `secant_rules` needs to know of it; a later pass replaces an earlier one.

    Holds the inputs of all norms, activation functions and gated products, and all queries, keys, values, scores and
    patterns.

    Args:
        model: the model.
        parts: what `secant_parts` found, if it was called already.

    Raises:
        UnsupportedModel: if a part is of no known kind, naming its dotted path.
        NotImplementedError: if transformers implements its attention outside the AttentionInterface.
    """
    run = KeptRun(secant_parts(model) if parts is None else parts)
    with _installed(model, run):
        yield run


@contextmanager
def secant_rules(model: Model, other: KeptRun) -> Iterator[None]:
    """Let the backward pass of forward passes inside carry finite differences to a kept run, in this thread.

    Enter it before sites are tapped (`run_with_gradients` inside it does). Prompts must be as many and as long as in
    the kept run. Values are those of the model to rounding: attention is computed step by step, in the kept run too.

    Args:
        model: the model of the kept run.
        other: what `kept_run` gave.

    Raises:
        RuntimeError: in a forward pass, if the kept run is empty.
        ValueError: in a forward pass, if shapes differ from those of the kept run.
    """
    other.is_replaying = True
    with _installed(model, other):
        yield


@contextmanager
def _installed(model: Model, run: KeptRun) -> Iterator[None]:
    parts, root = run.parts, model.anatomy.root
    with ExitStack() as stack:
        hooks = _Hooks(stack)
        hooks.before(root, run.begin)
        for norm in parts.norms:
            hooks.on_output(norm.module, partial(run.norm, norm))
        elsewhere = {one.activation for one in parts.gated} | {one.activation for one in parts.experts}
        for activation in parts.activations:
            if activation not in elsewhere:
                hooks.on_output(activation.module, _Activation(run, activation.module).on_output)
        for product in parts.gated:
            _Product(run, product).install(hooks)
        for shared in parts.shared_experts:
            _SharedExpert(run, shared).install(hooks, root.get_submodule(shared.path.rpartition(".")[0]))
        for experts in parts.experts:
            stack.enter_context(paired_experts(run, experts, _router_beside(root, experts.path)))
        cap, head = getattr(model.tower.config, "final_logit_softcapping", None), model.hf.get_output_embeddings()
        if cap is not None and head is not None:
            _FinalSoftCap(run, head, cap).install(hooks, root)
        modules = [block.attn for tower in parts.towers for block in tower.blocks]
        stack.enter_context(attention_wrapped(dict.fromkeys(modules, PairedAttention(run))))
        yield


class _Hooks:
    """Registers hooks that act in this thread only."""

    def __init__(self, stack: ExitStack) -> None:
        self.stack = stack
        self.owner = threading.get_ident()

    def before(self, module: nn.Module, fn: Callable[[tuple[Any, ...]], Any]) -> None:
        """Call a function with the positional arguments of a module; what it returns takes their place."""
        self.stack.callback(module.register_forward_pre_hook(partial(self._before, fn)).remove)

    def _before(self, fn: Callable[[tuple[Any, ...]], Any], module: nn.Module, args: tuple[Any, ...]) -> Any:
        return fn(args) if threading.get_ident() == self.owner else None

    def on_output(self, module: nn.Module, fn: Callable[[Any, Any], Any]) -> None:
        """Call a function with the first argument and the output of a module; what it returns takes its place."""
        self.stack.callback(module.register_forward_hook(partial(self._on_output, fn), with_kwargs=True).remove)

    def _on_output(
        self,
        fn: Callable[[Any, Any], Any],
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        output: Any,
    ) -> Any:
        if threading.get_ident() != self.owner:
            return None
        return fn(args[0] if args else next(iter(kwargs.values())), output)


class _Activation:
    """An activation function that stands by itself."""

    def __init__(self, run: KeptRun, module: nn.Module) -> None:
        self.run, self.module = run, module

    def on_output(self, x: Tensor, y: Tensor) -> Tensor:
        return self.run.elementwise(self.module, self.module.forward, x, y)[0]


class _Product:
    """act(g)·u, made anew of what the activation and `up` returned, where `down` receives it."""

    def __init__(self, run: KeptRun, product: GatedProduct) -> None:
        self.run, self.product, self.activation = run, product, product.activation.module
        self.factors: dict[str, Tensor] = {}

    def install(self, hooks: _Hooks) -> None:
        hooks.on_output(self.activation, self.on_activation)
        hooks.on_output(self.product.up, self.on_up)
        hooks.before(self.product.down, self.before_down)

    def on_activation(self, x: Tensor, y: Tensor) -> Tensor:
        a, a_other = self.run.elementwise(self.activation, self.activation.forward, x, y)
        self.factors |= {"a": a, "a_other": a_other}
        return a

    def on_up(self, x: Tensor, output: Tensor) -> None:
        self.factors["u"] = output.chunk(2, dim=-1)[1] if self.product.fused else output

    def before_down(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        a, u, a_other = (self.factors.pop(name) for name in ("a", "u", "a_other"))
        return (self.run.product(self.product.down, a, u, args[0], a_other), *args[1:])


class _SharedExpert:
    """sigmoid(gate(x))·expert(x): the product inside the mixture is cut off, a paired one attached to its output."""

    def __init__(self, run: KeptRun, shared: SharedExpert) -> None:
        self.run, self.shared = run, shared
        self.factors: dict[nn.Module, Tensor] = {}

    def install(self, hooks: _Hooks, mixture: nn.Module) -> None:
        for module in (self.shared.gate, self.shared.module):
            hooks.on_output(module, partial(self.cut, module))
        hooks.on_output(mixture, self.attach)

    def cut(self, module: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        self.factors[module] = output
        return output.detach()

    def attach(self, x: Tensor, output: Tensor) -> Tensor:
        gate, expert = (self.factors.pop(module) for module in (self.shared.gate, self.shared.module))
        share, share_other = self.run.elementwise(self.shared.gate, torch.sigmoid, gate, torch.sigmoid(gate.detach()))
        product = self.run.product(self.shared.module, share, expert, share * expert, share_other)
        return with_term(output, product.view_as(output))


class _FinalSoftCap:
    """Gemma 2 bounds its logits after the head, in the model's own forward: they are replaced in its output."""

    def __init__(self, run: KeptRun, head: nn.Module, cap: float) -> None:
        self.run, self.head, self.cap = run, head, cap
        self.uncapped: list[Tensor] = []

    def install(self, hooks: _Hooks, root: nn.Module) -> None:
        hooks.on_output(self.head, self.on_head)
        hooks.on_output(root, self.on_root)

    def on_head(self, x: Tensor, output: Tensor) -> None:
        self.uncapped.append(output)

    def on_root(self, x: Any, output: Any) -> Any:
        function = partial(soft_cap, cap=self.cap)
        output.logits, _ = self.run.elementwise(self.head, function, self.uncapped.pop(), output.logits)
        return output


def _router_beside(root: nn.Module, experts_path: str) -> nn.Module:
    """The router that stands beside a module of experts."""
    children = dict(root.get_submodule(experts_path.rpartition(".")[0]).named_children())
    return children["gate"] if "gate" in children else children["router"]
