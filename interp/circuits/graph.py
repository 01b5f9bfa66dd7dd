"""The graph of a model: what writes to the residual stream, what reads from it, and which edges lie between.

Edges are entries of arrays [writer, reader], not objects, so that a graph of millions of them is made at once. Writers
stand in the order in which they write (embedding; in each layer its heads, then its MLP), readers in the order in which
they read (in each layer queries, keys and values of its heads, then its MLP; at last the logits). What is upstream of a
reader is therefore always a prefix of the writers.

Neurons of an MLP that are asked for write by themselves, right behind their MLP, whose own writer is then all the rest
of it. They read what their MLP reads: it is one reader that feeds them all, as a shared key feeds several heads.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Int
from numpy import ndarray

from interp.model import Model
from interp.patching.edges import check_paths

EMBED, LOGITS = "embed", "logits"
Neurons = Iterable[tuple[int, int]]
"""Neurons of MLPs, as (layer, neuron)."""


@dataclass(frozen=True)
class Graph:
    """Nodes and edges of a transformer with these sizes.

    Nodes are the embedding, heads, MLPs, chosen neurons and the logits. A head reads three times: its query, and the
    key and value of its key/value head, which under grouped-query attention several heads share.
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    parallel: bool
    """Whether attention and MLP of a block read the same stream, so that there is no edge from one to the other."""
    neurons: tuple[tuple[int, int], ...] = ()
    """(layer, neuron) of those that are writers of their own, in order."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "parallel":
                if not isinstance(value, bool):
                    raise ValueError(f"graph: parallel is {value!r}; it is true or false")
            elif field.name == "neurons":
                object.__setattr__(self, "neurons", _checked_neurons(value, self.n_layers))
            elif not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"graph: {field.name} is {value!r}; it is a positive number")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"graph: {self.n_heads} heads do not share {self.n_kv_heads} key/value heads evenly")

    @classmethod
    def of(cls, model: Model, *, neurons: Neurons = ()) -> Graph:
        """The graph of a model.

        Args:
            model: the model.
            neurons: (layer, neuron) of those that are to be writers of their own.

        Raises:
            SiteUnavailable: for encoders that norm the stream after every addition, where no edge is a part of it; for
                neurons of experts.
            ValueError: for neurons that the model does not have, or whose sum is normed before it is added to the
                stream, so that none of them has a part of its own in it.
        """
        check_paths(model)
        graph = cls(model.n_layers, model.n_heads, model.n_kv_heads, model.tower.parallel, tuple(neurons))
        for layer, neuron in graph.neurons:
            model.site_names("mlp_post")
            if neuron >= (width := len(model.weights.of_block("W_out", layer))):
                raise ValueError(f"graph: neuron {neuron} of layer {layer} is out of range; they run 0..{width - 1}")
            if model.tower.blocks[layer].mlp_post is not None:
                raise ValueError(
                    f"graph: {model.anatomy.family} norms what an MLP writes, so that its neurons have no part of it "
                    "by themselves; leave neurons out"
                )
        return graph

    def as_dict(self) -> dict[str, Any]:
        """The sizes and neurons, for storage."""
        return {name: value for name, value in asdict(self).items() if name != "neurons" or value}

    # Writers

    @cached_property
    def writers(self) -> tuple[str, ...]:
        """Names of the writers: "embed", "L0H0", ..., "mlp0", "mlp0.n17", "L1H0", ..."""
        blocks: list[list[str]] = [
            [*(f"L{layer}H{head}" for head in range(self.n_heads)), f"mlp{layer}"] for layer in self._layers
        ]
        for layer, neuron in self.neurons:
            blocks[layer].append(f"mlp{layer}.n{neuron}")
        return (EMBED, *(name for block in blocks for name in block))

    @cached_property
    def _starts(self) -> tuple[int, ...]:
        """Index of the first writer of each layer, and one past the last."""
        starts = [1]
        for layer in self._layers:
            starts.append(starts[-1] + self.n_heads + 1 + len(self.neurons_of(layer)))
        return tuple(starts)

    def head(self, layer: int, head: int) -> int:
        """Index of a head among the writers."""
        return self._starts[layer] + head

    def heads_of(self, layer: int) -> slice:
        """The heads of a layer among the writers."""
        return slice(self.head(layer, 0), self.head(layer, self.n_heads))

    def mlp(self, layer: int) -> int:
        """Index of an MLP among the writers: all of it, or what is left without its neurons that write themselves."""
        return self.head(layer, self.n_heads)

    def mlp_parts(self, layer: int) -> slice:
        """An MLP and its neurons that write themselves, among the writers; together all that it writes."""
        return slice(self.mlp(layer), self._starts[layer + 1])

    def neurons_of(self, layer: int) -> list[int]:
        """The neurons of a layer that write themselves, in order."""
        return [neuron for at, neuron in self.neurons if at == layer]

    @cached_property
    def writer_index(self) -> dict[str, int]:
        """Index of each writer by its name."""
        return {name: index for index, name in enumerate(self.writers)}

    @cached_property
    def writer_layer(self) -> Int[ndarray, " writer"]:
        """The layer of each writer; −1 for the embedding."""
        return np.concatenate([[-1], np.repeat(np.arange(self.n_layers), np.diff(self._starts))])

    # Readers

    @cached_property
    def readers(self) -> tuple[str, ...]:
        """Names of the readers: "L0H0.q", ..., "L0H0.k", ..., "L0H0.v", ..., "mlp0", ..., "logits"."""
        names = []
        for layer in self._layers:
            for kind, n_heads in (("q", self.n_heads), ("k", self.n_kv_heads), ("v", self.n_kv_heads)):
                names += [f"L{layer}H{head}.{kind}" for head in range(n_heads)]
            names.append(f"mlp{layer}")
        return (*names, LOGITS)

    @property
    def readers_a_layer(self) -> int:
        """Queries, keys, values and the MLP of one layer."""
        return self.n_heads + 2 * self.n_kv_heads + 1

    def attention_readers(self, layer: int) -> slice:
        """Queries, keys and values of a layer among the readers, in this order."""
        first = layer * self.readers_a_layer
        return slice(first, first + self.readers_a_layer - 1)

    def mlp_reader(self, layer: int) -> int:
        """Index of an MLP among the readers."""
        return (layer + 1) * self.readers_a_layer - 1

    @cached_property
    def reader_index(self) -> dict[str, int]:
        """Index of each reader by its name."""
        return {name: index for index, name in enumerate(self.readers)}

    @cached_property
    def reader_layer(self) -> Int[ndarray, " reader"]:
        """The layer of each reader; the number of layers for the logits."""
        return np.concatenate([np.repeat(np.arange(self.n_layers), self.readers_a_layer), [self.n_layers]])

    @cached_property
    def reads_for_later(self) -> Bool[ndarray, " reader"]:
        """Which readers pass on what they see to later positions too: keys and values."""
        return np.array([name.endswith((".k", ".v")) for name in self.readers])

    @cached_property
    def n_upstream(self) -> Int[ndarray, " reader"]:
        """How many writers are upstream of each reader: the first so many."""
        counts = np.empty(len(self.readers), dtype=np.int64)
        for layer in self._layers:
            counts[self.attention_readers(layer)] = self.head(layer, 0)
            counts[self.mlp_reader(layer)] = self.head(layer, 0) if self.parallel else self.mlp(layer)
        counts[-1] = len(self.writers)
        return counts

    # Edges

    @cached_property
    def exists(self) -> Bool[ndarray, "writer reader"]:
        """Which pairs are edges: the writer is upstream of the reader."""
        return np.arange(len(self.writers))[:, None] < self.n_upstream[None, :]

    @property
    def n_edges(self) -> int:
        """Number of edges."""
        return int(self.n_upstream.sum())

    @cached_property
    def feeds(self) -> Bool[ndarray, "reader writer"]:
        """Which nodes each reader is an input of: its head (of k and v all of the group), its MLP; none for logits."""
        feeds = np.zeros((len(self.readers), len(self.writers)), dtype=bool)
        group = self.n_heads // self.n_kv_heads
        for layer in self._layers:
            first = self.attention_readers(layer).start
            for head in range(self.n_heads):
                query, key = first + head, first + self.n_heads + head // group
                feeds[[query, key, key + self.n_kv_heads], self.head(layer, head)] = True
            feeds[self.mlp_reader(layer), self.mlp_parts(layer)] = True
        return feeds

    def edge(self, writer: str, reader: str) -> tuple[int, int]:
        """Indices of an edge.

        Raises:
            ValueError: if there is no such writer, reader or edge.
        """
        for name, known, kind in ((writer, self.writer_index, "writer"), (reader, self.reader_index, "reader")):
            if name not in known:
                raise ValueError(f"{name!r} is not a {kind} of this graph ({self})")
        found = self.writer_index[writer], self.reader_index[reader]
        if not self.exists[found]:
            raise ValueError(f"there is no edge {writer}→{reader}: the reader comes before the writer")
        return found

    @property
    def _layers(self) -> range:
        return range(self.n_layers)

    def __str__(self) -> str:
        heads = f"{self.n_heads} heads" + (
            f" on {self.n_kv_heads} key/value heads" if self.n_kv_heads != self.n_heads else ""
        )
        neurons = f", {len(self.neurons)} neurons by themselves" if self.neurons else ""
        return f"{self.n_layers} layers of {heads}{neurons}, {self.n_edges:,} edges"


def _checked_neurons(neurons: Any, n_layers: int) -> tuple[tuple[int, int], ...]:
    """In order, if they are what neurons may be."""
    pairs = [(pair,) if isinstance(pair, int) else tuple(pair) for pair in neurons]
    for pair in pairs:
        if len(pair) != 2 or not all(isinstance(one, int | np.integer) and one >= 0 for one in pair):
            raise ValueError(f"graph: {pair!r} is no neuron; neurons are (layer, neuron), counted from 0")
        if pair[0] >= n_layers:
            raise ValueError(f"graph: neuron {pair!r}: layer {pair[0]} is out of range; layers run 0..{n_layers - 1}")
    if len(set(pairs)) < len(pairs):
        raise ValueError("graph: a neuron is named twice")
    return tuple(sorted((int(layer), int(neuron)) for layer, neuron in pairs))
