"""A run in which every edge can be cut: each reader sees its own mixture of this run's writers and of a reference's.

1. The stream that a reader sees is the reference's, plus what each writer whose edge is there adds in this run more
   than in the reference: s_r = Σ_w reference_w + Σ_w mask[w, r] · (current_w − reference_w).
2. Queries, keys and values are made from these streams by the block's own norm and the head's own columns, and put in
   at the sites q, k and v; the MLP and the logits get theirs at the stream itself. Everything else is the model's code.
3. What heads and MLPs make of it is what the readers further on see.

With all edges this is the plain run, with none of them the reference's. Many circuits run together as one batch, and a
run can start at a later layer, where all of them agree up to there. Masks may be fractions, and have gradients.

Sources: the residual-additive form of ACDC (Conmy et al. 2023, arXiv 2304.14997) and of Edge Attribution Patching.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.circuits.graph import Graph
from interp.circuits.writers import HeadOutputs, mlp_outputs
from interp.model import Model, Site
from interp.model.head_path import first_blocks_skipped
from interp.model.hooks import Run, Tap, TapFn, tapped
from interp.model.tower import Block

Mask = Float[Tensor, "circuit *pos writer reader"]


@dataclass(frozen=True)
class Reference:
    """What writers send along the edges that are cut."""

    outputs: Float[Tensor, "writer prompt pos d_model"]
    """By writer; length 1 along `prompt` or `pos` stands for all of them."""


class SplitRun:
    """Runs of circuits on some prompts of one length, against one reference.

    Args:
        model: a model whose stream is a sum of what is written.
        graph: its graph.
        tokens: the prompts, all of one length.
        reference: what absent edges carry.
        heads: the model's `HeadOutputs`, made once.
    """

    def __init__(
        self, model: Model, graph: Graph, tokens: Int[Tensor, "prompt pos"], reference: Reference, heads: HeadOutputs
    ) -> None:
        self.model, self.graph, self.tokens, self.reference = model, graph, tokens, reference
        self._heads = heads

    def logits(
        self,
        masks: Mask,
        *,
        differences: Float[Tensor, "writer prompt pos d_model"] | None = None,
        first_layer: int = 0,
    ) -> Float[Tensor, "circuit prompt d_vocab"]:
        """Logits at the last position of every circuit on every prompt.

        Holds n_writers × d_model floats for each token of each circuit. Masks that need a gradient get one.

        Args:
            masks: 1 where an edge is there, 0 where it is cut; with a position axis, at these positions alone.
            differences: current − reference of the writers before `first_layer` (`differences` of one circuit that
                agrees with all of these up to there).
            first_layer: the first layer in which the circuits differ.
        """
        state = _Pass(self, masks, differences, first_layer)
        n_circuits = masks.shape[0]
        tokens = self.tokens.repeat(n_circuits, 1)
        skipped = first_blocks_skipped(self.model.tower, first_layer) if first_layer > 1 else nullcontext()
        with skipped, tapped(self.model.anatomy, state.taps()):
            if masks.requires_grad:
                end = Site("resid_post", self.graph.n_layers - 1)
                logits, _ = self.model.run_on_path(tokens, [end], logits_to_keep=1)
                logits = logits[:, -1]
            else:
                logits = self.model.last_logits(tokens)
        return logits.unflatten(0, (n_circuits, -1))

    @torch.no_grad()
    def differences(self, mask: Float[Tensor, "*pos writer reader"]) -> Float[Tensor, "writer prompt pos d_model"]:
        """Current − reference of every writer in the run of one circuit."""
        state = _Pass(self, mask[None], None, 0)
        with tapped(self.model.anatomy, state.taps()):
            self.model.last_logits(self.tokens)
        return state.own_differences()[0]


class _Pass:
    """One forward pass: its taps ask what each reader sees, and note what each writer sends."""

    def __init__(self, run: SplitRun, masks: Mask, shared: Tensor | None, first_layer: int) -> None:
        self.run, self.graph, self.first_layer = run, run.graph, first_layer
        self.masks = masks
        self.n_circuits, self.n_prompts = masks.shape[0], len(run.tokens)
        self.n_shared = self.graph.head(first_layer, 0) if first_layer else 0
        self.shared = None if shared is None else shared[: self.n_shared]
        reference = run.reference.outputs
        self._stream = reference[: self.n_shared].sum(0)
        for layer in range(first_layer):
            self._stream = self._stream + run._heads.bias(layer)
        self._chunks: list[Tensor] = []
        self._buffer: Tensor | None = None
        self._n_own = 0
        self._inputs: dict[str, Tensor] = {}
        self._post: Tensor | None = None

    # What taps do

    def taps(self) -> list[Tap]:
        """The taps of all layers that are run."""
        graph, parallel = self.graph, self.run.model.tower.parallel
        mlp_input = "resid_pre" if parallel else "resid_mid"
        taps = [] if self.first_layer else [Tap(Site("embed"), self._embed)]
        for block in self.run.model.tower.blocks[self.first_layer :]:
            layer = block.index
            by_kind: dict[str, TapFn] = {
                mlp_input: self._at_mlp(layer),
                **{kind: self._at_attention(block, kind) for kind in ("q", "k", "v")},
                "z": self._after_attention(layer),
                "mlp_out": self._after_mlp(layer),
            }
            if graph.neurons_of(layer):
                by_kind["mlp_post"] = self._at_neurons
            taps += [Tap(Site(kind, layer), fn) for kind, fn in by_kind.items()]
        return [*taps, Tap(Site("resid_post", graph.n_layers - 1), self._at_logits)]

    def _embed(self, activation: Tensor, run: Run) -> None:
        self._write(activation[None], 0)

    def _at_attention(self, block: Block, kind: str) -> TapFn:
        def tap(activation: Tensor, run: Run) -> Tensor:
            if kind not in self._inputs:
                self._inputs = self._attention_inputs(block)
            return self._inputs.pop(kind).to(activation.dtype).reshape(activation.shape)

        return tap

    def _attention_inputs(self, block: Block) -> dict[str, Tensor]:
        """Queries, keys and values [row, pos, head, d_head] of a layer."""
        seen = self._seen_by(self.graph.attention_readers(block.index)).to(self.run.model.dtype)
        normed = seen if block.ln1 is None else block.ln1(seen)
        n_kv = self.graph.n_kv_heads
        parts = normed.split([self.graph.n_heads, n_kv, n_kv])
        weights = self.run.model.weights
        made = {}
        for kind, part in zip("qkv", parts, strict=True):
            weight, bias = (weights.of_block(f"{name}_{kind.upper()}", block.index) for name in "Wb")
            by_head = torch.bmm(part.flatten(1, 2), weight) + bias[:, None]
            made[kind] = by_head.unflatten(1, part.shape[1:3]).movedim(0, 2)
        return made

    def _after_attention(self, layer: int) -> TapFn:
        def tap(activation: Tensor, run: Run) -> None:
            self._write(self.run._heads(layer, activation), self.graph.head(layer, 0))
            self._stream = self._stream + self.run._heads.bias(layer)

        return tap

    def _at_mlp(self, layer: int) -> TapFn:
        def tap(activation: Tensor, run: Run) -> Tensor:
            reader = self.graph.mlp_reader(layer)
            return self._seen_by(slice(reader, reader + 1))[0].to(activation.dtype).reshape(activation.shape)

        return tap

    def _at_neurons(self, activation: Tensor, run: Run) -> None:
        self._post = activation

    def _after_mlp(self, layer: int) -> TapFn:
        def tap(activation: Tensor, run: Run) -> None:
            parts = mlp_outputs(self.run.model, self.graph, layer, activation, self._post)
            self._write(parts, self.graph.mlp(layer))

        return tap

    def _at_logits(self, activation: Tensor, run: Run) -> Tensor:
        reader = len(self.graph.readers) - 1
        return self._seen_by(slice(reader, reader + 1))[0].to(activation.dtype)

    # Mixtures

    def _write(self, current: Float[Tensor, "writer row pos d_model"], first: int) -> None:
        """Note what writers send; they come in the order of the graph."""
        reference = self.run.reference.outputs[first : first + len(current)]
        by_circuit = current.unflatten(1, (self.n_circuits, self.n_prompts))
        difference = (by_circuit - reference[:, None]).movedim(1, 0)
        self._stream = self._stream + reference.sum(0)
        if self.masks.requires_grad:
            self._chunks.append(difference)
            return
        if self._buffer is None:
            n_own = len(self.graph.writers) - self.n_shared
            self._buffer = difference.new_empty(self.n_circuits, n_own, *difference.shape[2:])
        self._buffer[:, self._n_own : self._n_own + difference.shape[1]] = difference
        self._n_own += difference.shape[1]

    def own_differences(self) -> Float[Tensor, "circuit writer prompt pos d_model"]:
        """Current − reference of the writers that have written in this pass."""
        if self._chunks:
            self._chunks = [torch.cat(self._chunks, dim=1)]
            return self._chunks[0]
        assert self._buffer is not None
        return self._buffer[:, : self._n_own]

    def _seen_by(self, readers: slice) -> Float[Tensor, "reader row pos d_model"]:
        """The stream that each reader sees; all of them see the same writers."""
        n_upstream = int(self.graph.n_upstream[readers.start])
        masks = self.masks[..., :n_upstream, readers].mT
        stream = self._stream
        shape = (
            self.n_circuits,
            readers.stop - readers.start,
            self.n_prompts,
            *self.run.tokens.shape[1:],
            stream.shape[-1],
        )
        seen = stream.expand(shape)
        if self.n_shared:
            assert self.shared is not None
            seen = seen + _mixed(masks[..., : self.n_shared], self.shared[None], shape)
        if n_upstream > self.n_shared:
            own = self.own_differences()[:, : n_upstream - self.n_shared]
            seen = seen + _mixed(masks[..., self.n_shared :], own, shape)
        return seen.movedim(0, 1).flatten(1, 2)


def _mixed(
    masks: Float[Tensor, "circuit *pos reader writer"],
    differences: Float[Tensor, "circuit writer prompt pos d_model"],
    shape: tuple[int, ...],
) -> Float[Tensor, "circuit reader prompt pos d_model"]:
    """Sums of differences, weighted by masks."""
    masks = masks.to(differences.dtype)
    if masks.dim() == 4:
        return torch.einsum("cprw,cwbpd->crbpd", masks, differences.expand(len(masks), *differences.shape[1:]))
    return torch.matmul(masks, differences.flatten(2)).reshape(shape)
