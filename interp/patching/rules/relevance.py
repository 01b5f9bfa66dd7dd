"""Relevance rules: ordinary autograd on a live model gives the propagation coefficients of LRP.

Inside `relevance_rules(model)` every forward pass has the same bits as without it, and the gradient of a metric with
respect to an activation a is its coefficient C = R/a, R the relevance that layer-wise relevance propagation gives it:

1. the non-linear parts of the model are found (`parts_of`), or the model is refused;
2. module hooks replace what a part returns by the same numbers with another backward pass; inside attention, the rules
   wrap its call;
3. whatever ends the context takes them away. They act in this thread only. Where contexts on one model are nested, the
   innermost one's rules hold.

Linear maps, residual additions, rotary embeddings, soft-caps and routers keep the plain gradient. Parameters of norms
get no gradient.
"""

from __future__ import annotations

import difflib
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from interp.model import Model
from interp.model.attention import AttentionWrapper, attention_wrapped
from interp.patching.rules.activations import with_identity_rule
from interp.patching.rules.attention import detached_pattern, scaled_gradients
from interp.patching.rules.experts import Experts, gate_wrapped, with_gate_rules
from interp.patching.rules.gates import with_scaled_gradient
from interp.patching.rules.norms import with_frozen_scale
from interp.patching.rules.parts import Parts, parts_of

RULES: dict[str, str] = {
    "ln": "norms on the residual path and before or after a sublayer: their scale is a constant",
    "ln-qk": "the same for the norms of q and k",
    "identity": "activation functions hand on relevance unchanged: slope f(x)/x",
    "half": "gated products, those of experts included: half for each factor",
    "half-router": "a router's weight times an expert's output: half for each factor",
    "stop-gate": "gated products: the gate is a constant, the other factor gets all",
    "ah": "the attention pattern is a constant",
    "half-qk": "q·k: half for each factor",
    "uniform-attention": "both products of attention share evenly: a quarter for q and k, half for v",
}
"""What each rule says."""

_RELP = frozenset({"ln", "identity", "half"})
PRESETS: dict[str, frozenset[str]] = {
    "relp": _RELP,
    "relp+ah": _RELP | {"ah"},
    "qk": _RELP | {"ln-qk", "half-qk"},
    "attnlrp": _RELP | {"ln-qk", "half-router", "uniform-attention"},
    "cp-lrp": frozenset({"ln", "identity", "stop-gate", "ah"}),
}
"""RelP as published (arXiv 2508.21258); with the AH-rule; for models with QK-norm; AttnLRP (arXiv 2402.05602); CP-LRP
(arXiv 2202.07304) as the authors of AttnLRP carry it over to gated MLPs."""

_ALIASES = {"+ah": "relp+ah"}
_EXCLUSIVE = (("half", "stop-gate"), ("ah", "half-qk", "uniform-attention"))
_IN_ATTENTION = frozenset({"ah", "half-qk", "uniform-attention"})


def rules_label(rules: str | Iterable[str]) -> str:
    """How results name a choice of rules: the preset, or the rules themselves."""
    return _ALIASES.get(rules, rules) if isinstance(rules, str) else "+".join(sorted(rules))


def rule_names(rules: str | Iterable[str]) -> frozenset[str]:
    """The rules that a preset, a rule or several rules stand for.

    Raises:
        ValueError: for an unknown name (near ones are offered), or rules that contradict each other.
    """
    if isinstance(rules, str):
        rules = _ALIASES.get(rules, rules)
        if rules in PRESETS:
            return PRESETS[rules]
        rules = (rules,)
        known = [*PRESETS, *RULES]
    else:
        known = list(RULES)
    names = frozenset(rules)
    for name in names - RULES.keys():
        near = difflib.get_close_matches(name, known, n=3) or known
        raise ValueError(f"{name!r} is no relevance rule or preset; did you mean {', '.join(near)}?")
    for exclusive in _EXCLUSIVE:
        both = sorted(names.intersection(exclusive))
        if len(both) > 1:
            raise ValueError(f"the rules {' and '.join(both)} say different things about one product; choose one")
    return names


def relevance_rules(model: Model, rules: str | Iterable[str] = "relp") -> AbstractContextManager[None]:
    """Put relevance rules under the backward pass of a model, for the duration of the context, in this thread.

    Edits and hooks act on what the rules hand on, whichever context was entered first: a site's gradient is the
    coefficient of the activation there.

    Args:
        model: the model.
        rules: a preset ("relp", "relp+ah", "qk", "attnlrp", "cp-lrp"), or names from `RULES`.

    Raises:
        ValueError: for an unknown or contradictory choice of rules.
        UnsupportedModel: if a norm, an activation function or a gate has no rule, naming its dotted path.
        NotImplementedError: for rules inside attention on a family that goes round transformers' AttentionInterface.
    """
    return prepared_rules(model, rules)()


def prepared_rules(model: Model, rules: str | Iterable[str] = "relp") -> Callable[[], AbstractContextManager[None]]:
    """`relevance_rules` for several uses: what can go wrong goes wrong here, and the parts are found once.

    Returns:
        A function that makes the context.
    """
    names = rule_names(rules)
    parts = parts_of(model)
    _check_attention(names, parts)
    return partial(_in_force, model.anatomy.root, parts, names)


@contextmanager
def _in_force(root: nn.Module, parts: Parts, names: frozenset[str]) -> Iterator[None]:
    with ExitStack() as stack:
        is_active = stack.enter_context(_innermost(root))
        install = _Installer(stack, is_active)
        _install_norms(install, parts, names)
        _install_activations(install, parts, names)
        _install_products(install, parts, names)
        wrapper = _attention_rule(names, is_active)
        if wrapper is not None:
            modules = [block.attn for tower in parts.towers for block in tower.blocks]
            stack.enter_context(attention_wrapped(dict.fromkeys(modules, wrapper)))
        yield


class _Nesting(threading.local):
    """The contexts of this thread by model, outermost first."""

    def __init__(self) -> None:
        self.by_root: dict[nn.Module, list[object]] = defaultdict(list)


_nesting = _Nesting()


@contextmanager
def _innermost(root: nn.Module) -> Iterator[Callable[[], bool]]:
    """A function that tells whether this context is the innermost one on its model in the thread that asks."""
    token = object()
    _nesting.by_root[root].append(token)

    def is_active() -> bool:
        tokens = _nesting.by_root.get(root, [])
        return bool(tokens) and tokens[-1] is token

    try:
        yield is_active
    finally:
        _nesting.by_root[root].remove(token)
        if not _nesting.by_root[root]:
            del _nesting.by_root[root]


class _Installer:
    """Registers hooks that stay silent without gradients, in other threads and under inner contexts.

    They come before all other hooks of a module: what an edit has put there is not the module's own output.
    """

    def __init__(self, stack: ExitStack, is_active: Callable[[], bool]) -> None:
        self.stack = stack
        self.is_active = is_active

    def on_output(self, module: nn.Module, rule: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Replace what `module` returns by `rule(its input, its output)`."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
            x = args[0] if args else next(iter(kwargs.values()))
            return rule(x, output) if self.concerns(x) and output.requires_grad else None

        self.stack.callback(module.register_forward_hook(hook, prepend=True, with_kwargs=True).remove)

    def scale_input(self, module: nn.Module, position: int, name: str, factor: float) -> None:
        """Scale the gradient of one argument of `module`, given by position or by name."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given = args[position] if position < len(args) else kwargs[name]
            if not self.concerns(given):
                return None
            scaled = with_scaled_gradient(given, factor)
            if position < len(args):
                return (*args[:position], scaled, *args[position + 1 :]), kwargs
            return args, kwargs | {name: scaled}

        self.stack.callback(module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True).remove)

    def scale_output(self, module: nn.Module, factor: float) -> None:
        """Scale the gradient that comes to the output of `module`."""

        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            return with_scaled_gradient(output, factor) if self.concerns(output) else None

        if factor != 1:
            self.stack.callback(module.register_forward_hook(hook, prepend=True).remove)

    def concerns(self, x: Tensor) -> bool:
        """Whether the rules act on a tensor here and now."""
        return x.requires_grad and torch.is_grad_enabled() and self.is_active()


def _install_norms(install: _Installer, parts: Parts, names: frozenset[str]) -> None:
    for norm in parts.norms:
        if ("ln-qk" if norm.role == "qk" else "ln") in names:
            install.on_output(norm.module, partial(with_frozen_scale, norm))


def _install_activations(install: _Installer, parts: Parts, names: frozenset[str]) -> None:
    gates = {one.activation for one in parts.gated} | {one.activation for one in parts.experts}
    for activation in parts.activations:
        if "stop-gate" in names and activation in gates:
            install.on_output(activation.module, lambda x, y: y.detach())
        elif "identity" in names:
            install.on_output(activation.module, partial(with_identity_rule, slope_at_zero=activation.slope_at_zero))


def _install_products(install: _Installer, parts: Parts, names: frozenset[str]) -> None:
    if "half" in names:
        for gated in parts.gated:
            install.scale_input(gated.down, 0, "input", 0.5)
    for experts in parts.experts:
        _install_experts(install, experts, names)
    if "half-router" in names:
        for shared in parts.shared_experts:
            install.scale_output(shared.module, 0.5)
            install.scale_output(shared.gate, 0.5)


def _install_experts(install: _Installer, experts: Experts, names: frozenset[str]) -> None:
    router_share = 0.5 if "half-router" in names else 1.0
    if experts.gate is not None:
        install.scale_output(experts.module, router_share)
        gate_rule = partial(
            with_gate_rules,
            experts.gate,
            identity="identity" in names,
            half="half" in names,
            stop="stop-gate" in names,
        )

        def rule(gate_up: Tensor, gated: Tensor) -> Tensor:
            return gate_rule(gate_up, gated) if install.concerns(gate_up) else gated

        install.stack.enter_context(gate_wrapped(experts.module, rule))
        return
    install.scale_output(experts.module, router_share * (0.5 if "half" in names else 1.0))
    if "half" in names:
        # The half on the output reaches the router's weights too, which are no part of the gated product.
        install.scale_input(experts.module, 2, experts.weights_name, 2.0)


def _attention_rule(names: frozenset[str], is_active: Callable[[], bool]) -> AttentionWrapper | None:
    if "ah" in names:
        return detached_pattern(is_active)
    if "half-qk" in names:
        return scaled_gradients(is_active, query_key=0.5, value=1.0)
    if "uniform-attention" in names:
        return scaled_gradients(is_active, query_key=0.25, value=0.5)
    return None


def _check_attention(names: frozenset[str], parts: Parts) -> None:
    inside = sorted(names & _IN_ATTENTION)
    for tower in parts.towers:
        if inside and not tower.uses_attention_interface:
            raise NotImplementedError(
                f"transformers implements the attention of {tower.config.model_type} outside its AttentionInterface, "
                f"where the rules {', '.join(inside)} cannot reach it; use rules without them, such as 'relp'"
            )
