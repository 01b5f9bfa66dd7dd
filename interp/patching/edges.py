"""Writers, readers and the edges between them: the parts of a model that a path runs through.

A writer adds to the residual stream: the embedding ("embed"), a head ("L9H6"), a whole attention layer ("attn9") or an
MLP ("mlp9"). A reader takes its input from it: a head's query, key or value ("L9H6.q", "L9H6.k", "L9H6.v"; key/value
heads for k and v), an MLP ("mlp9") or the logits ("logits").
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from interp.model import Edit, Model, Site
from interp.model.sites import SiteUnavailable

_HEAD = re.compile(r"L(\d+)H(\d+)")
_READER_HEAD = re.compile(r"L(\d+)H(\d+)\.([qkv])")
_LAYER = re.compile(r"(attn|mlp)(\d+)")


@dataclass(frozen=True)
class Writer:
    """What adds to the residual stream, as a place in an activation."""

    site: Site
    """`embed`, or z, attn_out or mlp_out of a layer."""
    head: int | None = None
    """For z."""
    position: int | None = None
    """Only what is written there; None: everywhere."""

    @classmethod
    def parse(cls, name: str) -> Writer:
        """The writer of this name.

        Raises:
            ValueError: for another name.
        """
        if name == "embed":
            return cls(Site("embed"))
        if head := _HEAD.fullmatch(name):
            return cls(Site("z", int(head[1])), int(head[2]))
        if layer := _LAYER.fullmatch(name):
            return cls(Site(f"{layer[1]}_out", int(layer[2])))
        raise ValueError(f"{name!r} is not a writer; writers are 'embed', 'L9H6', 'attn9' and 'mlp9'")

    @property
    def layer(self) -> int:
        """The layer whose block it is in; −1 for the embedding."""
        return -1 if self.site.layer is None else self.site.layer

    def check(self, model: Model) -> None:
        """Refuse a writer that the model does not have.

        Raises:
            ValueError: for a layer or head out of range.
        """
        model.edit_taps(Edit(self.site, value=0.0, heads=None if self.head is None else [self.head]))


@dataclass(frozen=True)
class Reader:
    """What takes its input from the residual stream."""

    kind: str
    """q, k, v, mlp or logits."""
    layer: int
    """The number of layers for logits."""
    head: int | None = None
    """For q (query head), k and v (key/value head)."""

    @classmethod
    def parse(cls, name: str, model: Model) -> Reader:
        """The reader of this name in a model.

        Raises:
            ValueError: for another name, or a layer or head that the model does not have.
        """
        if name == "logits":
            return cls("logits", model.n_layers)
        if head := _READER_HEAD.fullmatch(name):
            reader = cls(head[3], int(head[1]), int(head[2]))
        elif (layer := _LAYER.fullmatch(name)) and layer[1] == "mlp":
            reader = cls("mlp", int(layer[2]))
        else:
            raise ValueError(f"{name!r} is not a reader; readers are 'L9H6.q', 'L9H6.k', 'L9H6.v', 'mlp9' and 'logits'")
        if reader.layer >= model.n_layers:
            raise ValueError(f"{name!r}: layer {reader.layer} is out of range; layers run 0..{model.n_layers - 1}")
        if reader.head is not None and reader.head >= (n_heads := model.n_heads_at(reader.kind)):
            raise ValueError(f"{name!r}: head {reader.head} is out of range; {reader.kind} heads run 0..{n_heads - 1}")
        return reader

    def input_site(self, model: Model) -> Site:
        """The residual stream that it reads, before its norm."""
        if self.kind == "logits":
            return Site("resid_post", model.n_layers - 1)
        if self.kind == "mlp" and not model.tower.parallel:
            return Site("resid_mid", self.layer)
        return Site("resid_pre", self.layer)

    @property
    def output_site(self) -> Site:
        """What it makes of its input first: q, k, v or mlp_out."""
        return Site("mlp_out" if self.kind == "mlp" else self.kind, self.layer)


@dataclass(frozen=True)
class Edge:
    """A writer and a reader further on."""

    writer: Writer
    reader: Reader


def is_upstream(writer: Writer, reader: Reader, *, parallel: bool) -> bool:
    """Whether there is an edge: the writer's output is part of the reader's input.

    Attention writes before the MLP of its own layer reads, unless the block runs them in parallel.
    """
    same_layer = reader.kind == "mlp" and not parallel and writer.site.kind in ("z", "attn_out")
    return writer.layer < reader.layer or (same_layer and writer.layer == reader.layer)


def check_paths(model: Model) -> None:
    """Refuse models without a residual stream that writers add to.

    Raises:
        SiteUnavailable: for encoders that norm the stream after every addition (BERT).
    """
    if model.tower.post_norm:
        raise SiteUnavailable(
            f"{model.anatomy.family} norms the stream after every addition, so that what is written never reaches a "
            "reader as it is"
        )
