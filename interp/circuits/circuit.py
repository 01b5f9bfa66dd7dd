"""`Circuit`: a graph, the scores of its edges, and which of them are kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float
from numpy import ndarray

from interp.circuits.graph import Graph
from interp.circuits.selection import above_threshold, greedy_edges, top_edges, without_dead_ends

Selection = Literal["top", "greedy"]


@dataclass(frozen=True, eq=False, repr=False)
class Circuit:
    """Edges of a model's graph with their scores, and those that belong to the circuit.

    Raises:
        ValueError: if scores or mask do not fit the graph, or keep what is no edge.
    """

    graph: Graph
    scores: Float[ndarray, "*pos writer reader"]
    """NaN where there is no edge, or the method says nothing of it."""
    mask: Bool[ndarray, "*pos writer reader"]
    """The edges of the circuit."""
    attrs: Mapping[str, Any] = field(default_factory=dict)
    """How it was found: model, task, method, selection, versions."""

    def __post_init__(self) -> None:
        shape = self.graph.exists.shape
        for name in ("scores", "mask"):
            array = getattr(self, name)
            if array.shape[-2:] != shape or array.ndim not in (2, 3):
                raise ValueError(f"circuit: {name} has the shape {array.shape}; this graph needs [..., {shape}]")
            array.flags.writeable = False
        if self.scores.shape != self.mask.shape:
            raise ValueError(f"circuit: scores {self.scores.shape} and mask {self.mask.shape} differ in shape")
        if bool((self.mask & ~self.graph.exists).any()):
            raise ValueError("circuit: the mask keeps what is no edge of the graph")

    @classmethod
    def from_scores(cls, graph: Graph, scores: xr.DataArray, mask: Bool[ndarray, "*pos writer reader"]) -> Circuit:
        """A circuit from what a method of this package returned."""
        return cls(graph, scores.values.copy(), mask, dict(scores.attrs))

    def select(
        self,
        *,
        edges: int | None = None,
        threshold: float | None = None,
        selection: Selection = "top",
        signed: bool = False,
        prune: bool = True,
    ) -> Circuit:
        """The circuit of these scores with other edges.

        Args:
            edges: how many edges to keep.
            threshold: or keep those of this score or more.
            selection: "top": the largest scores wherever they are; "greedy": grown from the logits.
            signed: rank by signed scores instead of magnitudes.
            prune: drop edges that are on no way from the embedding to the logits afterwards; attrs say how many.

        Raises:
            ValueError: unless exactly one of edges and threshold is given, or for too many edges.
        """
        if (edges is None) == (threshold is None):
            raise ValueError("give edges or threshold")
        if selection not in ("top", "greedy"):
            raise ValueError(f"selection={selection!r}; it is one of top, greedy")
        if threshold is not None:
            mask = above_threshold(self.graph, self.scores, threshold, signed=signed)
        else:
            assert edges is not None
            chosen = top_edges if selection == "top" else greedy_edges
            mask = chosen(self.graph, self.scores, edges, signed=signed)
        kept = without_dead_ends(self.graph, mask) if prune else mask
        said = {
            "selection": "threshold" if threshold is not None else selection,
            "signed": int(signed),
            "n_selected": int(mask.sum()),
            "n_pruned": int(mask.sum() - kept.sum()),
        }
        return replace(self, scores=self.scores.copy(), mask=kept, attrs={**self.attrs, **said})

    # What is in it

    @property
    def has_positions(self) -> bool:
        """Whether edges are kept position by position."""
        return self.mask.ndim == 3

    @property
    def n_edges(self) -> int:
        """Edges kept; with positions, an edge counts at each of them."""
        return int(self.mask.sum())

    @property
    def size(self) -> str:
        """How many edges of how many: "40 of 190 edges", "40 of 1,330 edges at 7 positions"."""
        if not self.has_positions:
            return f"{self.n_edges:,} of {self.graph.n_edges:,} edges"
        n_positions = len(self.mask)
        return f"{self.n_edges:,} of {n_positions * self.graph.n_edges:,} edges at {n_positions} positions"

    @cached_property
    def flat_mask(self) -> Bool[ndarray, "writer reader"]:
        """Edges kept at any position."""
        return np.any(self.mask, axis=0) if self.has_positions else self.mask

    @cached_property
    def edges(self) -> tuple[tuple[str, str], ...]:
        """The edges kept (at any position), as (writer, reader) names in the order of the graph."""
        pairs = np.argwhere(self.flat_mask)
        return tuple((self.graph.writers[writer], self.graph.readers[reader]) for writer, reader in pairs)

    @cached_property
    def nodes(self) -> tuple[str, ...]:
        """Writers that an edge leaves, or whose query or MLP input an edge enters, in the order of the graph."""
        alone = self.graph.feeds.sum(1) == 1  # an input that several share does not bring in all of them
        fed = ((self.flat_mask.any(0) & alone)[:, None] & self.graph.feeds).any(0)
        alive = self.flat_mask.any(1) | fed
        return tuple(name for name, is_in in zip(self.graph.writers, alive, strict=True) if is_in)

    @property
    def heads(self) -> tuple[str, ...]:
        """Its attention heads."""
        return tuple(name for name in self.nodes if name.startswith("L"))

    def score_of(self, writer: str, reader: str) -> float:
        """The score of an edge (summed over positions)."""
        values = self.scores[..., *self.graph.edge(writer, reader)]
        return float(np.nansum(values)) if self.has_positions else float(values)

    def positions_of(self, writer: str, reader: str) -> list[int]:
        """The positions at which an edge is kept; none for a circuit without positions."""
        kept = self.mask[..., *self.graph.edge(writer, reader)]
        return [int(position) for position in np.flatnonzero(kept)] if self.has_positions else []

    def to_array(self) -> xr.Dataset:
        """Scores and mask by name."""
        dims = ("position", "writer", "reader")[-self.mask.ndim :]
        coords = {"writer": list(self.graph.writers), "reader": list(self.graph.readers)}
        data = {"score": (dims, self.scores), "kept": (dims, self.mask)}
        return xr.Dataset(data, coords=coords, attrs=dict(self.attrs))

    def __repr__(self) -> str:
        said = ", ".join(str(self.attrs[name]) for name in ("model", "task", "method") if name in self.attrs)
        return f"Circuit({said}: {self.size}, {len(self.nodes)} nodes)"
