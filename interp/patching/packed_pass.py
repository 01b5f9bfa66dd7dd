"""One pass over the layers that carries all variants of a chunk as one packed matrix.

1. A variant enters at its layer, as the rows from its start to the end of the base run's block input.
2. In every layer the rows go through the model's own block, in blocks of whole variants: norms, projections and MLP
   see one large matrix, without padding.
3. Inside attention the rows of a variant attend to the base run's keys before its start, shared by all variants, and
   to its own (`interp.kernels.suffix_attention`).
4. Edits are written by the site hooks, in the layer where the variant enters or any later one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.kernels.suffix_attention import suffix_attention
from interp.model import Model, Site
from interp.model.attention import (
    AttentionCall,
    AttentionResult,
    attention_pattern,
    attention_scores,
    attention_wrapped,
    by_query_head,
)
from interp.model.hooks import Run, Tap, tapped
from interp.patching.base_run import BaseRun, allowed_pairs, packed_options
from interp.patching.entry import Entry, SiteEdit
from interp.patching.packed_edits import PlacedEdit, apply_packed
from interp.patching.packing import Packing, RowBlock, pack

_PATTERN_KINDS = ("attn_scores", "pattern")
LOGIT_BYTES = 64 * 2**20
"""Logits held at once, where all of the vocabulary is read."""

OnRows = Callable[[int], None]
"""Told a number of rows whenever these have passed a layer."""


class PackedPass:
    """The state of a pass: the hooks ask it what to do with the rows that are in the layer now.

    Args:
        model: a model whose attention goes through transformers' interface.
        base: the base run of the prompts that the variants belong to.
        base_edits: by prompt, what the base run itself carries: variants get it too.
        sites: every site that is edited.
        rows_a_block: rows that pass a layer together.
    """

    def __init__(
        self,
        model: Model,
        base: BaseRun,
        base_edits: Sequence[Sequence[SiteEdit]],
        sites: Sequence[Site],
        rows_a_block: int,
    ) -> None:
        self.model = model
        self.base = base
        self.base_edits = base_edits
        self.sites = sites
        self.rows_a_block = rows_a_block
        self._placed: Mapping[Site, list[PlacedEdit]] = {}
        self._block: RowBlock | None = None
        self._layer = 0

    @contextmanager
    def installed(self, *, extra: Sequence[Tap] = ()) -> Iterator[None]:
        """Set the hooks; `extra` taps see what the edits have made of a site."""
        hooked = [Tap(site, self._edit_at(site)) for site in self.sites if site.kind not in _PATTERN_KINDS]
        attentions = {block.attn: self._attend for block in self.model.tower.blocks}
        with tapped(self.model.anatomy, [*hooked, *extra]), attention_wrapped(attentions):
            yield

    def resid_final(self, entries: Sequence[Entry], on_rows: OnRows) -> Float[Tensor, "variant d_model"]:
        """What the last block returns at the last position of each variant. To be called while installed.

        Args:
            entries: variants, those of one prompt and start together.
            on_rows: called with a number of rows whenever these have passed a layer.
        """
        packing, hidden = self.through(entries, self.model.n_layers, on_rows)
        packing, hidden = self._enter(entries, self.model.n_layers, packing, hidden)
        return hidden[packing.last_rows.to(hidden.device)]

    def through(self, entries: Sequence[Entry], n_layers: int, on_rows: OnRows) -> tuple[Packing | None, Tensor | None]:
        """Carry the variants that enter there through the first layers; their packing and rows (None without any)."""
        packing: Packing | None = None
        hidden: Tensor | None = None
        for layer in range(min(entry.layer for entry in entries), n_layers):
            packing, hidden = self._enter(entries, layer, packing, hidden)
            out = torch.empty_like(hidden)
            for block in packing.blocks(self.rows_a_block):
                out[block.rows] = self._through_layer(layer, hidden[block.rows], block)
                on_rows(block.rows.stop - block.rows.start)
            hidden = out
        return packing, hidden

    def activations(
        self, entries: Sequence[Entry], site: Site, base: Float[Tensor, "variant pos ..."]
    ) -> Float[Tensor, "variant pos ..."]:
        """The activation of a site in each variant; layers after it are not run.

        Args:
            entries: variants that enter before the site, those of one prompt and start together.
            site: a site of a block, with a position axis.
            base: the activation in each variant's base run, whose rows before its start it keeps.
        """
        assert site.layer is not None
        found, places = base.clone(), {id(entry): place for place, entry in enumerate(entries)}

        def keep(activation: Tensor, run: Run) -> None:
            if self._block is not None and self._layer == site.layer:
                row = 0
                for entry, length in zip(self._block.entries, self._block.layout.length, strict=True):
                    found[places[id(entry)], entry.start :] = activation[0, row : row + length]
                    row += length

        with self.installed(extra=[Tap(site, keep)]):
            self.through(entries, site.layer + 1, lambda n_rows: None)
        return found

    def logits(
        self,
        entries: Sequence[Entry],
        resid: Float[Tensor, "variant d_model"],
        columns: Int[Tensor, " column"] | None,
    ) -> Iterator[tuple[slice, Float[Tensor, "variant column"]]]:
        """Logits at the last position of each variant, some variants at a time. To be called while installed."""
        n_columns = self.model.d_vocab if columns is None else len(columns)
        step = max(1, LOGIT_BYTES // (n_columns * resid.element_size()))
        for begin in range(0, len(entries), step):
            some = slice(begin, begin + step)
            length = self.base.layers[0].resid.shape[1]
            rows = [(entry, row, length - 1) for row, entry in enumerate(entries[some])]
            self._placed = self._placed_at(self.model.n_layers, rows)
            try:
                yield some, self.model.logits_from_resid(resid[some], columns)
            finally:
                self._placed = {}

    def _enter(
        self, entries: Sequence[Entry], layer: int, packing: Packing | None, hidden: Tensor | None
    ) -> tuple[Packing, Tensor]:
        """The packed rows with those of the variants that enter at this layer."""
        if packing is not None and hidden is not None and not any(entry.layer == layer for entry in entries):
            return packing, hidden
        n_layers = self.model.n_layers
        resid = self.base.resid_final if layer == n_layers else self.base.layers[layer].resid
        active = [entry for entry in entries if entry.layer <= layer]
        new = pack(active, resid.shape[1])
        rows = resid.flatten(0, 1).index_select(0, new.base_rows.to(resid.device))
        if packing is not None and hidden is not None:
            kept = [place for place, entry in enumerate(active) if entry.layer < layer]
            rows.index_copy_(0, new.rows_of(kept).to(rows.device), hidden.to(rows.device))
        return new, rows

    def _through_layer(self, layer: int, rows: Float[Tensor, "row d_model"], block: RowBlock) -> Tensor:
        arguments, options = packed_options(self.base.layers[layer], block.prompt, block.position)
        places = [
            (entry, first - block.rows.start, entry.start)
            for entry, first in zip(block.entries, _first_rows(block), strict=True)
        ]
        self._placed, self._block, self._layer = self._placed_at(layer, places), block, layer
        try:
            out = self.model.tower.blocks[layer].module(rows[None], *arguments, **options)
        finally:
            self._placed, self._block = {}, None
        return (out[0] if isinstance(out, tuple) else out)[0]

    def _placed_at(self, layer: int, places: Sequence[tuple[Entry, int, int]]) -> dict[Site, list[PlacedEdit]]:
        """The edits of a layer by site; the base run's own before the variant's."""
        length = self.base.layers[0].resid.shape[1]
        placed: dict[Site, list[PlacedEdit]] = defaultdict(list)
        for entry, first_row, start in places:
            for edits in (self.base_edits[entry.prompt] if self.base_edits else (), entry.edits):
                for edit in edits:
                    if edit.layer == layer:
                        placed[edit.site].append(PlacedEdit(edit, first_row, start, length))
        return placed

    def _edit_at(self, site: Site) -> Callable[[Tensor, Run], Tensor | None]:
        def edit(activation: Tensor, run: Run) -> Tensor | None:
            placed = self._placed.get(site)
            return apply_packed(activation, placed) if placed else None

        return edit

    def _attend(self, call: AttentionCall) -> AttentionResult:
        if self._block is None:
            return call.run()
        base = self.base.layers[self._layer]
        query, key, value = (one[0].transpose(0, 1) for one in (call.query, call.key, call.value))
        scaling = call.options.get("scaling")
        z = suffix_attention(
            query,
            key,
            value,
            base.key,
            base.value,
            self._block.layout,
            scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
            causal=base.causal,
            softcap=call.options.get("softcap"),
            window=base.window,
            sink_logits=call.options.get("s_aux"),
        )
        for first_row, edits in self._pattern_edits().items():
            rows = slice(first_row, first_row + edits[0].length - edits[0].start)
            z[rows] = self._z_of_edited_pattern(call, rows, edits)
        return z[None], None

    def _pattern_edits(self) -> dict[int, list[PlacedEdit]]:
        """Edits of scores and pattern by the first row of their variant."""
        by_variant: dict[int, list[PlacedEdit]] = defaultdict(list)
        for kind in _PATTERN_KINDS:
            for one in self._placed.get(Site(kind, self._layer), ()):
                by_variant[one.first_row].append(one)
        return by_variant

    def _z_of_edited_pattern(
        self, call: AttentionCall, rows: slice, edits: Sequence[PlacedEdit]
    ) -> Float[Tensor, "row head d_head"]:
        """Z of one variant whose scores or pattern are edited, by plain attention over its whole prompt."""
        base, first = self.base.layers[self._layer], edits[0]
        assert self._block is not None
        prompt = int(self._block.prompt[rows.start])
        key, value = (
            torch.cat([prefix[prompt, : first.start].transpose(0, 1)[None], own[:, :, rows]], dim=2)
            for prefix, own in ((base.key, call.key), (base.value, call.value))
        )
        allowed = allowed_pairs(first.length, causal=base.causal, window=base.window)[first.start :]
        query = call.query[:, :, rows]
        options = {name: call.options[name] for name in ("scaling", "softcap") if name in call.options}
        scores = attention_scores(call.module, query, key, allowed.to(query.device)[None, None], **options)
        pattern = attention_pattern(_edited(scores, edits, "attn_scores"), call.options.get("s_aux"))
        pattern = _edited(pattern, edits, "pattern")
        z = torch.matmul(pattern.to(value.dtype), by_query_head(value, query.shape[1]))
        return z[0].transpose(0, 1)


def _edited(activation: Tensor, edits: Sequence[PlacedEdit], kind: str) -> Tensor:
    for one in edits:
        if one.edit.site.kind == kind:
            new = one.edit.tap(activation, one.run)
            activation = activation if new is None else new
    return activation


def _first_rows(block: RowBlock) -> Iterator[int]:
    row = block.rows.start
    for length in block.layout.length:
        yield row
        row += length
