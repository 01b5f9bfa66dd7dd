"""Runs of a model with the relevant parts of several sources as further rows of the batch."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from interp.model import Model, Site
from interp.model.hooks import Run, Tap, tapped
from interp.model.sites import SITE_DIMS
from interp.patching.batching import TOKENS_A_BATCH
from interp.patching.cells import Cell
from interp.patching.contextual_rules import Choice, contextual_rules, elementwise_rule, without_opposition
from interp.patching.rules.parts import Parts

LOGITS = "logits"
"""The key of what the model returns, beside sites."""
_SIGN_FIXED = ("mlp_pre", "mlp_out", "resid_mid", "resid_post")
"""Where the paper's code fixes signs: into and out of the MLP, and after every residual sum."""


@dataclass(frozen=True)
class OwnRun:
    """The model's own run of some prompts, and the relevant part of every source site (all of it, to be cut)."""

    tokens: Int[Tensor, "prompt pos"]
    total: Mapping[str, Tensor]
    """By target, and the input of each block that a pass may start from."""
    relevant: Mapping[Site, Tensor]
    forms: Mapping[nn.Module, tuple[Any, ...] | None]
    """By block, what it returned beside the stream; None where it returned the stream by itself."""


@dataclass(frozen=True)
class PartsRun:
    """One call's choices, so that its steps need not hand them on one by one."""

    model: Model
    rules_for: Parts
    cells: Sequence[Cell]
    targets: Sequence[Site]
    choice: Choice
    logits_to_keep: int
    batch_size: int | None

    def prompts(self, tokens: Int[Tensor, "prompt pos"]) -> Iterator[slice]:
        """Slices of prompts, few enough that several sources fit beside their total in a pass."""
        rows = self._rows(tokens.shape[1])
        step = max(1, rows // (1 + len(self.cells)))
        return (slice(first, first + step) for first in range(0, len(tokens), step))

    def own(self, tokens: Int[Tensor, "prompt pos"], reference: Mapping[Site, Tensor]) -> OwnRun:
        """Run the prompts as they are; at the sources, what `reference` does not have is relevant."""
        starts = [Site("resid_pre", layer) for layer in sorted({self._first_layer(cell) for cell in self.cells})]
        sources = list(dict.fromkeys(site for cell in self.cells for site, _ in cell))
        forms: dict[nn.Module, tuple[Any, ...] | None] = {}
        with ExitStack() as stack:
            for block in self.model.tower.blocks:
                stack.callback(block.module.register_forward_hook(partial(_keep_form, forms)).remove)
            wanted = list(dict.fromkeys([*starts, *sources, *self.targets]))
            logits, cache = self.model.run_with_cache(tokens, wanted, logits_to_keep=self.logits_to_keep)
        relevant = {
            site: cache[site] - reference[site].to(cache[site]) if site in reference else cache[site]
            for site in sources
        }
        total: dict[str, Tensor] = {LOGITS: logits, **{site: cache[site] for site in wanted}}
        return OwnRun(tokens, total, relevant, forms)

    def parts(self, own: OwnRun) -> Iterator[tuple[list[int], dict[str, Float[Tensor, "source prompt ..."]]]]:
        """The relevant parts of the targets, for some of the sources at a time.

        Sources without a relevant part are left out, and so are targets before the first layer of the sources.
        """
        live = [
            number
            for number, cell in enumerate(self.cells)
            if any(bool(own.relevant[site][part_index(site, place)].any()) for site, place in cell)
        ]
        live.sort(key=lambda number: self._first_layer(self.cells[number]))
        step = max(1, self._rows(own.tokens.shape[1]) // len(own.tokens) - 1)
        for first in range(0, len(live), step):
            chosen = live[first : first + step]
            yield chosen, self._run(own, [self.cells[number] for number in chosen])

    def _run(self, own: OwnRun, cells: Sequence[Cell]) -> dict[str, Tensor]:
        n_rows, n_prompts = 1 + len(cells), len(own.tokens)
        first = min(self._first_layer(cell) for cell in cells)
        found: dict[str, Tensor] = {}
        taps = [Tap(Site("resid_pre", first), partial(_begin, own.total[Site("resid_pre", first)], n_rows))]
        for site in dict.fromkeys(site for cell in cells for site, _ in cell):
            taps.append(Tap(site, partial(_put_sources, own, cells, site)))
        reached = [site for site in self.model.sites if not site.tower and (site.layer is None or site.layer >= first)]
        if self.choice.sign_fix:
            taps += [Tap(site, partial(_fix_signs, n_rows)) for site in reached if site.kind in _SIGN_FIXED]
        for site in self.targets:
            if site in reached:
                taps.append(Tap(site, partial(_keep_parts, found, site, n_prompts)))
        head: list[Tensor] = []
        with ExitStack() as stack:
            rules = contextual_rules(self.model, self.rules_for, n_rows, self.choice)
            stack.enter_context(rules)
            for block in self.model.tower.blocks[:first]:
                stack.enter_context(_skipped(block.module, own.forms[block.module]))
            stack.enter_context(_head_kept(self.model, head))
            stack.enter_context(tapped(self.model.anatomy, taps))
            logits = self.model(own.tokens.repeat(n_rows, 1), logits_to_keep=self.logits_to_keep)
        found[LOGITS] = self._logit_parts(logits, head, n_rows)
        return found

    def _logit_parts(self, logits: Tensor, head: Sequence[Tensor], n_rows: int) -> Tensor:
        """Parts of the logits after the soft-cap that some families put on them."""
        logits = logits.unflatten(0, (n_rows, -1))
        cap = getattr(self.model.tower.config, "final_logit_softcapping", None)
        if cap is None:
            return logits[1:]
        before = head[-1][:, -logits.shape[2] :].unflatten(0, (n_rows, -1))
        return elementwise_rule(lambda x: torch.tanh(x / cap) * cap, before[:1], before[1:], logits[:1])

    def _first_layer(self, cell: Cell) -> int:
        """Where a source begins; nothing before it has a relevant part."""
        layers = [{"embed": 0, "ln_final": self.model.n_layers - 1}.get(site.kind, site.layer) for site, _ in cell]
        return min(layer for layer in layers if layer is not None)

    def _rows(self, length: int) -> int:
        return max(2, self.batch_size or TOKENS_A_BATCH // length)


def part_index(site: Site, place: Mapping[str, int]) -> tuple[int | slice, ...]:
    """Index of a cell's part of an activation, batch axis included."""
    return tuple(place.get(dim, slice(None)) for dim in SITE_DIMS[site.kind])


def _begin(total: Tensor, n_rows: int, activation: Tensor, run: Run) -> Tensor:
    """The first block of a pass gets the model's own stream as total, and no relevant part yet."""
    return torch.cat([total, total.new_zeros((n_rows - 1) * len(total), *total.shape[1:])])


def _put_sources(own: OwnRun, cells: Sequence[Cell], site: Site, activation: Tensor, run: Run) -> Tensor:
    """The relevant part of each source where it begins, in the place of what came there from its other nodes."""
    rows = activation.clone().unflatten(0, (1 + len(cells), -1))
    for row, cell in zip(rows[1:], cells, strict=True):
        for other, place in cell:
            if other == site:
                row[part_index(site, place)] = own.relevant[site][part_index(site, place)]
    return rows.flatten(0, 1)


def _fix_signs(n_rows: int, activation: Tensor, run: Run) -> Tensor:
    rows = activation.unflatten(0, (n_rows, -1))
    return torch.cat([rows[:1], without_opposition(rows[:1], rows[1:])]).flatten(0, 1)


def _keep_parts(found: dict[str, Tensor], site: Site, n_prompts: int, activation: Tensor, run: Run) -> None:
    found[site] = activation.detach()[n_prompts:].unflatten(0, (-1, n_prompts)).clone()


def _keep_form(forms: dict[nn.Module, tuple[Any, ...] | None], module: nn.Module, args: Any, output: Any) -> None:
    forms[module] = output[1:] if isinstance(output, tuple) else None


@contextmanager
def _skipped(block: nn.Module, form: tuple[Any, ...] | None) -> Iterator[None]:
    """Let a block return its input, in this thread."""
    owner, whole, own = threading.get_ident(), block.forward, vars(block).get("forward")

    def skip(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != owner:
            return whole(*args, **kwargs)
        hidden = args[0] if args else kwargs["hidden_states"]
        return hidden if form is None else (hidden, *form)

    block.forward = skip
    try:
        yield
    finally:
        del block.forward
        if own is not None:
            block.forward = own


@contextmanager
def _head_kept(model: Model, head: list[Tensor]) -> Iterator[None]:
    """Keep what the language-model head returns, before the family's soft-cap."""
    module = model.hf.get_output_embeddings()
    owner = threading.get_ident()

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        if threading.get_ident() == owner:
            head.append(output)

    handle = None if module is None else module.register_forward_hook(hook)
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()
