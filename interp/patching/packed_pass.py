"""One pass over the layers that carries all variants of a chunk as one packed matrix.

1. A variant enters at its layer, as the rows from its start to the end of the base run's block input. Where that layer
   changes some positions alone (a patch of z at one position), only these go through it, and the rest joins after it.
2. In every layer the rows go through the model's own block, in blocks of whole variants: norms, projections and MLP
   see one large matrix, without padding.
3. Inside attention the rows of a variant attend to the base run's keys before its start, shared by all variants, and
   to its own (`interp.kernels.suffix_attention`).
4. Edits are written by the site hooks, in the layer where the variant enters or any later one.
5. After the attention of the last layer only the last position goes on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from interp.patching.packing import Packing, RowBlock, Span, pack

_PATTERN_KINDS = ("attn_scores", "pattern")
LOGIT_BYTES = 64 * 2**20
"""Logits held at once, where all of the vocabulary is read."""

_Rows = tuple[Packing, Tensor]
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
        self._changed: dict[tuple[Entry, int], Tensor] = {}
        self._only_attention = False
        self._known_z: Tensor | None = None

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
        last = self.model.n_layers - 1
        rows = self.through(entries, last, on_rows)
        inside = [place for place, entry in enumerate(entries) if entry.joins <= last]
        ending = [Span(entry, self._length - 1, self._length) for entry in entries]
        out = self._base_rows(last + 1, pack(ending))
        if inside:
            packing, hidden = self._enter(entries, last, rows)
            out[inside] = self._through_last_layer(packing, hidden, on_rows).to(out.device)
        for (entry, position), row in self._local(entries, last, on_rows).items():
            if position == self._length - 1:
                out[entries.index(entry)] = row
        return out

    def through(self, entries: Sequence[Entry], n_layers: int, on_rows: OnRows) -> _Rows | None:
        """Carry the variants that join there through the first layers; None if there are none yet."""
        rows: _Rows | None = None
        self._changed = {}
        for layer in range(min(entry.layer for entry in entries), n_layers):
            if any(entry.joins <= layer for entry in entries):
                packing, hidden = self._enter(entries, layer, rows)
                out = torch.empty_like(hidden)
                for block in packing.blocks(self.rows_a_block):
                    out[block.rows] = self._through_layer(layer, hidden[block.rows], block)
                    on_rows(block.rows.stop - block.rows.start)
                rows = packing, out
            self._changed = self._local(entries, layer, on_rows)
        return rows

    def _local(
        self, entries: Sequence[Entry], layer: int, on_rows: OnRows
    ) -> dict[tuple[Entry, int], Float[Tensor, " d_model"]]:
        """What the layer makes of the positions of variants that it changes there alone.

        Every position stands for itself: what it attends to is as in the base run.
        """
        spans = [
            Span(entry, position, position + 1)
            for entry in entries
            if entry.layer == layer and entry.local is not None
            for position in entry.local
        ]
        if not spans:
            return {}
        packing = pack(sorted(spans, key=lambda span: (span.entry.prompt, span.start)))
        hidden = self._base_rows(layer, packing)
        out = torch.empty_like(hidden)
        for block in packing.blocks(self.rows_a_block):
            out[block.rows] = self._through_layer(layer, hidden[block.rows], block)
            on_rows(block.rows.stop - block.rows.start)
        return {(span.entry, span.start): row for span, row in zip(packing.spans, out, strict=True)}

    def activations(
        self, entries: Sequence[Entry], site: Site, base: Float[Tensor, "variant pos ..."]
    ) -> Float[Tensor, "variant pos ..."]:
        """The activation of a site in each variant; layers after it are not run.

        Args:
            entries: variants that enter before the site, those of one prompt and start together.
            site: a site of a block, with a position axis.
            base: the activation in each variant's base run, which it keeps at the positions that do not change.
        """
        assert site.layer is not None
        found, places = base.clone(), {entry: place for place, entry in enumerate(entries)}

        def keep(activation: Tensor, run: Run) -> None:
            if self._block is not None and self._layer == site.layer:
                for span, row in zip(self._block.spans, self._block.first_row, strict=True):
                    found[places[span.entry], span.start : span.stop] = activation[0, row : row + span.n_rows]

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
            spans = [Span(entry, self._length - 1, self._length) for entry in entries[some]]
            self._placed = self._placed_at(self.model.n_layers, zip(spans, range(len(spans)), strict=True))
            try:
                yield some, self.model.logits_from_resid(resid[some], columns)
            finally:
                self._placed = {}

    @property
    def _length(self) -> int:
        return self.base.resid_final.shape[1]

    def _base_rows(self, layer: int, packing: Packing) -> Float[Tensor, "row d_model"]:
        """What the layer receives in the base run, at packed rows."""
        layers = self.base.layers
        resid = self.base.resid_final if layer == len(layers) else layers[layer].resid
        rows = (packing.prompt * self._length + packing.position).to(resid.device)
        return resid.flatten(0, 1).index_select(0, rows)

    def _enter(self, entries: Sequence[Entry], layer: int, rows: _Rows | None) -> _Rows:
        """The packed rows with those of the variants that join at this layer."""
        if rows is not None and not any(entry.joins == layer for entry in entries):
            return rows
        spans = [Span(entry, entry.start, self._length) for entry in entries if entry.joins <= layer]
        packing = pack(spans)
        hidden = self._base_rows(layer, packing)
        if rows is not None:
            kept = [place for place, span in enumerate(spans) if span.entry.joins < layer]
            hidden.index_copy_(0, packing.rows_of(kept).to(hidden.device), rows[1].to(hidden.device))
        changed = [
            (packing.first_row[place] + position - span.start, self._changed[span.entry, position])
            for place, span in enumerate(spans)
            if span.entry.joins == layer and span.entry.local is not None
            for position in span.entry.local
        ]
        if changed:
            index, new = zip(*changed, strict=True)
            hidden[list(index)] = torch.stack(new).to(hidden.device)
        return packing, hidden

    def _through_layer(self, layer: int, rows: Float[Tensor, "row d_model"], block: RowBlock) -> Tensor:
        arguments, options = packed_options(self.base.layers[layer], block.prompt, block.position)
        self._placed, self._block, self._layer = self._placed_in(layer, block), block, layer
        try:
            out = self.model.tower.blocks[layer].module(rows[None], *arguments, **options)
        finally:
            self._placed, self._block = {}, None
        return (out[0] if isinstance(out, tuple) else out)[0]

    def _through_last_layer(
        self, packing: Packing, hidden: Float[Tensor, "row d_model"], on_rows: OnRows
    ) -> Float[Tensor, "span d_model"]:
        """The last layer's output at each variant's last position.

        Only attention needs the other rows: the block is left as soon as z is known, and called again with the last
        rows alone, which take their z from the first call.
        """
        last = self.model.n_layers - 1
        out = []
        for block in packing.blocks(self.rows_a_block):
            rows = hidden[block.rows]
            ends = pack([Span(span.entry, span.stop - 1, span.stop) for span in block.spans])
            at_end = torch.tensor(
                [row + span.n_rows - 1 for row, span in zip(block.first_row, block.spans, strict=True)]
            )
            at_end = at_end.to(rows.device)
            if any(one.edit.sees_all_positions for edits in self._placed_in(last, block).values() for one in edits):
                out.append(self._through_layer(last, rows, block)[at_end])
            else:
                z = self._z_of(last, rows, block)[at_end]
                (end,) = ends.blocks(len(rows))
                out.append(self._with_known_z(last, rows[at_end], end, z))
            on_rows(len(rows))
        return torch.cat(out)

    def _z_of(self, layer: int, rows: Float[Tensor, "row d_model"], block: RowBlock) -> Tensor:
        """Z of a layer; what follows its attention is not computed."""
        self._only_attention = True
        try:
            self._through_layer(layer, rows, block)
        except _AttentionDone as done:
            return done.z
        finally:
            self._only_attention = False
        raise RuntimeError(f"the block of layer {layer} never called its attention")

    def _with_known_z(self, layer: int, rows: Float[Tensor, "row d_model"], block: RowBlock, z: Tensor) -> Tensor:
        """A layer's output where its z is known."""
        self._known_z = z
        try:
            return self._through_layer(layer, rows, block)
        finally:
            self._known_z = None

    def _placed_in(self, layer: int, block: RowBlock) -> dict[Site, list[PlacedEdit]]:
        """The edits of a layer by site; the base run's own before the variant's."""
        return self._placed_at(layer, zip(block.spans, block.first_row, strict=True))

    def _placed_at(self, layer: int, places: Iterable[tuple[Span, int]]) -> dict[Site, list[PlacedEdit]]:
        placed: dict[Site, list[PlacedEdit]] = defaultdict(list)
        for span, first_row in places:
            entry = span.entry
            for edits in (self.base_edits[entry.prompt] if self.base_edits else (), entry.edits):
                for edit in edits:
                    if edit.layer == layer:
                        placed[edit.site].append(PlacedEdit(edit, first_row, span.start, span.stop))
        return placed

    def _edit_at(self, site: Site) -> Callable[[Tensor, Run], Tensor | None]:
        def edit(activation: Tensor, run: Run) -> Tensor | None:
            placed = self._placed.get(site)
            return apply_packed(activation, placed) if placed else None

        return edit

    def _attend(self, call: AttentionCall) -> AttentionResult:
        if self._block is None:
            return call.run()
        if self._known_z is not None:
            return self._known_z[None], None
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
        for edits in self._pattern_edits().values():
            z[edits[0].rows] = self._z_of_edited_pattern(call, edits)
        if self._only_attention:
            raise _AttentionDone(z)
        return z[None], None

    def _pattern_edits(self) -> dict[int, list[PlacedEdit]]:
        """Edits of scores and pattern by the first row of their variant."""
        by_variant: dict[int, list[PlacedEdit]] = defaultdict(list)
        for kind in _PATTERN_KINDS:
            for one in self._placed.get(Site(kind, self._layer), ()):
                by_variant[one.first_row].append(one)
        return by_variant

    def _z_of_edited_pattern(
        self, call: AttentionCall, edits: Sequence[PlacedEdit]
    ) -> Float[Tensor, "row head d_head"]:
        """Z of one variant whose scores or pattern are edited, by plain attention over its whole prompt."""
        base, first, rows = self.base.layers[self._layer], edits[0], edits[0].rows
        assert self._block is not None
        prompt = int(self._block.prompt[rows.start])
        # Keys after the variant's rows are there for the shape of scores and pattern: no row may look at them.
        key, value = (
            torch.cat([whole[:, :, : first.start], own[:, :, rows], whole[:, :, first.stop :]], dim=2)
            for whole, own in (
                (base.key[prompt].transpose(0, 1)[None], call.key),
                (base.value[prompt].transpose(0, 1)[None], call.value),
            )
        )
        allowed = allowed_pairs(self._length, causal=base.causal, window=base.window)[first.start : first.stop]
        query = call.query[:, :, rows]
        options = {name: call.options[name] for name in ("scaling", "softcap") if name in call.options}
        scores = attention_scores(call.module, query, key, allowed.to(query.device)[None, None], **options)
        pattern = attention_pattern(_edited(scores, edits, "attn_scores"), call.options.get("s_aux"))
        pattern = _edited(pattern, edits, "pattern")
        z = torch.matmul(pattern.to(value.dtype), by_query_head(value, query.shape[1]))
        return z[0].transpose(0, 1)


class _AttentionDone(Exception):
    """Leaves a block once its z is known."""

    def __init__(self, z: Float[Tensor, "row head d_head"]) -> None:
        super().__init__()
        self.z = z


def _edited(activation: Tensor, edits: Sequence[PlacedEdit], kind: str) -> Tensor:
    for one in edits:
        if one.edit.site.kind == kind:
            new = one.edit.tap(activation, one.run)
            activation = activation if new is None else new
    return activation
