"""Taps on a live model: for the duration of a context, call functions with the activations of chosen sites.

A tap is a site and a function `fn(activation, run) -> replacement or None`. Returning None leaves the model's tensor
untouched (the very same object goes on, so that observed runs are bit-identical). All taps of one module and side share
one PyTorch hook. Taps fire only in the thread that set them, and are removed whatever ends the context.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from interp.model.attention import AttentionTap, attention_taps
from interp.model.points import Point, head_results, locate
from interp.model.projections import bias_of
from interp.model.sites import Site
from interp.model.tower import Anatomy, Tower


@dataclass
class Run:
    """What a tap needs to know of the forward pass it is in; refreshed as the pass reaches a block."""

    n_past: int = 0
    """Tokens already in the KV cache: the first column of the activation is position `n_past`."""
    n_padding: Tensor | None = None
    """Left padding of each row, [batch]; None if there is none."""
    decoding: bool = False
    """Whether a KV cache is in use, so that later passes may bring further positions."""
    first_key: int = 0
    """Position of the first row of `rot_k`: 0 wherever keys come whole (also from a KV cache)."""
    lead: tuple[int, int] = (1, 1)
    """(batch, positions) of the block inputs, for families that flatten them inside."""


TapFn = Callable[[Tensor, Run], Tensor | None]


@dataclass(frozen=True)
class Tap:
    """A function to be called with the activation of a site."""

    site: Site
    fn: TapFn


@contextmanager
def tapped(anatomy: Anatomy, taps: Sequence[Tap]) -> Iterator[None]:
    """Install taps for the duration of the context.

    Raises:
        SiteUnavailable, ValueError: before anything is installed, if a site does not exist in this model.
    """
    points = [(locate(anatomy, tap.site), tap.fn) for tap in taps]
    runs = {prefix: Run() for prefix in {tap.site.tower for tap in taps}}
    owner = threading.get_ident()
    with ExitStack() as stack:
        for prefix, run in runs.items():
            _watch_run(stack, anatomy, anatomy.towers[prefix], run, owner)
        by_hook: dict[tuple[nn.Module, str], list[tuple[Point, TapFn]]] = defaultdict(list)
        inside = []
        for point, fn in points:
            if point.where == "attention":
                inside.append((point.module, _attention_tap(point, fn, runs[point.site.tower])))
            else:
                by_hook[point.module, point.where].append((point, fn))
        for (module, where), group in by_hook.items():
            tower = anatomy.towers[group[0][0].site.tower]
            register = _register_input if where == "input" else _register_output
            handle = register(module, group, tower, runs[tower.prefix], owner)
            stack.callback(handle.remove)
        if inside:
            stack.enter_context(attention_taps(inside))
        yield


def _watch_run(stack: ExitStack, anatomy: Anatomy, tower: Tower, run: Run, owner: int) -> None:
    """Keep `run` up to date: cache length and padding from the model's arguments, shape from each block's."""

    def on_root(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() == owner:
            past = kwargs.get("past_key_values")
            run.decoding = past is not None
            run.n_past = int(past.get_seq_length()) if past is not None else 0
            run.n_padding = left_padding(kwargs.get("attention_mask"))

    def on_block(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() == owner:
            hidden = args[0] if args else kwargs["hidden_states"]
            run.lead = (1, hidden.shape[0]) if hidden.dim() == 2 else tuple(hidden.shape[:2])

    # Every block, not the first alone: the sweep engine calls later blocks by themselves.
    watched = [(block.module, on_block) for block in tower.blocks]

    def on_root_of_vision(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        grids = kwargs.get("image_grid_thw")
        if threading.get_ident() == owner and grids is not None and len(grids) > 1:
            raise NotImplementedError(
                f"the vision tower of {anatomy.family} runs all images of a batch as one row: use sites in it with one "
                "image at a time (batch_size=1)"
            )

    watched.append((anatomy.root, on_root if tower is anatomy.text else on_root_of_vision))
    for module, fn in watched:
        stack.callback(module.register_forward_pre_hook(fn, with_kwargs=True).remove)


def left_padding(attention_mask: Any) -> Tensor | None:
    """Number of masked positions at the start of each row of a [batch, position] mask; None if there are none."""
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        return None
    n_padding = (attention_mask.cumsum(-1) == 0).sum(-1)
    return n_padding if bool(n_padding.any()) else None


def _attention_tap(point: Point, fn: TapFn, run: Run) -> AttentionTap:
    return AttentionTap(point.site.kind, lambda activation: fn(activation, run))


def _transform(raw: Tensor, group: Sequence[tuple[Point, TapFn]], run: Run) -> Tensor:
    """Pass a raw tensor through its taps in turn; the same object comes back if none replaced anything."""
    shaped = _with_batch_and_position(raw, run)
    current = shaped
    for point, fn in group:
        activation = point.read(current)
        new = fn(activation.clone() if point.overwritten_later else activation, run)
        if new is not None:
            current = point.write(current, new)
    return raw if current is shaped else current.reshape(raw.shape)


def _with_batch_and_position(raw: Tensor, run: Run) -> Tensor:
    """A raw tensor with both axes: some families flatten them inside a block, some norm one pooled vector a prompt."""
    if raw.dim() > 2:
        return raw
    return raw.view(*run.lead, -1) if len(raw) == run.lead[0] * run.lead[1] else raw[:, None]


def _register_input(module: nn.Module, group: list[tuple[Point, TapFn]], tower: Tower, run: Run, owner: int) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if threading.get_ident() != owner:
            return None
        if args:
            return (_transform(args[0], group, run), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": _transform(kwargs["hidden_states"], group, run)}

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def _register_output(module: nn.Module, group: list[tuple[Point, TapFn]], tower: Tower, run: Run, owner: int) -> Any:
    results = [(point, fn) for point, fn in group if point.site.kind == "result"]
    others = [(point, fn) for point, fn in group if point.site.kind != "result"]

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if threading.get_ident() != owner:
            return None
        raw = output[0] if isinstance(output, tuple) else output
        new = raw
        for point, fn in results:
            new = _add_result_change(args[0], new, point, fn, tower, run)
        new = _transform(new, others, run)
        if new is raw:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else new

    return module.register_forward_hook(hook)


def _add_result_change(z: Tensor, output: Tensor, point: Point, fn: TapFn, tower: Tower, run: Run) -> Tensor:
    """Head results exist only on request; a changed one changes the projection's output by the difference."""
    assert point.site.layer is not None
    block = tower.blocks[point.site.layer]
    results = head_results(_with_batch_and_position(z, run), block, tower)
    new = fn(results, run)
    if new is None:
        return output
    if new is results:
        # Asked onto the path as they are (for gradients): the output has to be made of them.
        bias = bias_of(block.o)
        total = new.sum(-2) if bias is None else new.sum(-2) + bias
        return total.reshape(output.shape)
    return output + (new - results).sum(-2).reshape(output.shape)
