"""Published circuits as data, each with its source.

Head lists of one behaviour differ between papers, so that AUCs against them are not comparable: the lists are named
and kept apart. Edges are those of ACDC's code, without the placeholders that it counts besides (from a head's input to
its query, key or value): 963 of 1041 for IOI, 235 of 262 for greater-than, 24 of 37 for docstring.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from interp.patching.edges import Writer

Edges = frozenset[tuple[str, str]]


@dataclass(frozen=True)
class KnownCircuit:
    """A circuit that a paper found, by the names of nodes and edges (`interp.patching.edges`)."""

    name: str
    """Its key in `KNOWN`."""
    model: str
    """Hugging Face name, or TransformerLens's for its own small models."""
    task: str
    """Name of the builder in `interp.tasks`."""
    heads: Mapping[str, tuple[str, ...]]
    """Names of heads by role; one role, "heads", where the source gives none."""
    source: str
    """Paper and code."""
    mlps: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Names of MLPs by role, where the source chooses among them."""
    edges: Edges = frozenset()
    """(writer, reader); empty where the source has none."""

    @property
    def head_names(self) -> frozenset[str]:
        """All its heads."""
        return frozenset(name for names in self.heads.values() for name in names)

    @property
    def mlp_names(self) -> frozenset[str]:
        """All MLPs that the source names; empty does not mean that it leaves MLPs out."""
        return frozenset(name for names in self.mlps.values() for name in names)


def _heads(text: str) -> tuple[str, ...]:
    """Node names of heads written as "9.6 10.0"."""
    return tuple("L{}H{}".format(*pair.split(".")) for pair in text.split())


def _mlps(layers: Iterable[int]) -> tuple[str, ...]:
    return tuple(f"mlp{layer}" for layer in layers)


def _layer(node: str) -> int:
    return len(_ALL_MLPS) if node == "logits" else Writer.parse(node).layer


def _connected(writers: Iterable[str], nodes: Iterable[str], inputs: str = "qkv") -> Edges:
    """All edges from writers to nodes further on; to heads by their `inputs`, from heads to the MLP beside them too."""
    pairs = [(writer, node) for writer in writers for node in nodes]
    return frozenset(
        (writer, reader)
        for writer, node in pairs
        if _layer(writer) < _layer(node)
        or (_layer(writer) == _layer(node) and writer.startswith("L") and node.startswith("mlp"))
        for reader in ([f"{node}.{one}" for one in inputs] if node.startswith("L") else [node])
    )


_ALL_MLPS = _mlps(range(12))

_IOI_HEADS = {
    "name mover": _heads("9.9 10.0 9.6"),
    "backup name mover": _heads("10.10 10.6 10.2 10.1 11.2 9.7 9.0 11.9"),
    "negative name mover": _heads("10.7 11.10"),
    "S-inhibition": _heads("7.3 7.9 8.6 8.10"),
    "induction": _heads("5.5 5.8 5.9 6.9"),
    "duplicate token": _heads("0.1 0.10 3.0"),
    "previous token": _heads("2.2 4.11"),
}
_IOI_CONNECTIONS = (
    ("input", "previous token", "qkv"),
    ("input", "duplicate token", "qkv"),
    ("input", "S-inhibition", "q"),
    ("input", "name mover", "kv"),
    ("input", "backup name mover", "kv"),
    ("input", "negative name mover", "kv"),
    ("previous token", "induction", "kv"),
    ("induction", "S-inhibition", "kv"),
    ("duplicate token", "S-inhibition", "kv"),
    ("S-inhibition", "name mover", "q"),
    ("S-inhibition", "backup name mover", "q"),
    ("S-inhibition", "negative name mover", "q"),
    ("name mover", "output", ""),
    ("backup name mover", "output", ""),
    ("negative name mover", "output", ""),
)
"""(class of writers, class of readers, their inputs)."""

_GREATER_THAN_HEADS = {
    "early, into early MLPs": _heads("0.1"),
    "early": _heads("0.3 0.5"),
    "mid": _heads("5.5 6.1 6.9 7.10 8.11 9.1"),
}
_GREATER_THAN_MLPS = {"early": _mlps(range(4)), "late": _mlps(range(8, 12))}

_DOCSTRING_HEADS = _heads("0.5 1.2 1.4 2.0 3.0 3.6")


def _ioi_edges() -> Edges:
    """The class connections, and every edge into or out of an MLP: the paper lets all MLPs compute as they would."""
    groups = {"input": ("embed",), "output": ("logits",), **_IOI_HEADS}
    heads = [head for names in _IOI_HEADS.values() for head in names]
    edges = _connected(("embed", *_ALL_MLPS), (*_ALL_MLPS, "logits"))
    edges |= _connected(_ALL_MLPS, heads) | _connected(heads, _ALL_MLPS)
    for writers, readers, inputs in _IOI_CONNECTIONS:
        edges |= _connected(groups[writers], groups[readers], inputs)
    return edges


def _greater_than_edges() -> Edges:
    """Between its groups; all MLPs before the last mid head, and theirs into the mid heads' queries, are left whole."""
    first, beside, mid = _GREATER_THAN_HEADS.values()
    early, late = _GREATER_THAN_MLPS.values()
    before = _mlps(range(max(map(_layer, mid))))
    edges = _connected(("embed",), (*first, *beside, *early)) | _connected((*mid, *late), ("logits",))
    edges |= _connected(early, early) | _connected(late, late) | _connected(before, before)
    edges |= _connected(first, (*early, *mid)) | _connected((*beside, *early), mid) | _connected(mid, late)
    return edges | _connected(before, mid, "q")


def _docstring_edges() -> Edges:
    copied, direct = _heads("0.5"), ("embed",)
    movers = _heads("3.0 3.6")
    edges = _connected(direct, _heads("0.5 1.4"), "v") | _connected(copied, _heads("1.4"), "v")
    edges |= _connected((*direct, *copied), _heads("1.2 2.0"), "qk") | _connected(_heads("1.4"), _heads("2.0"), "v")
    edges |= _connected(_heads("1.4"), movers, "q") | _connected(_heads("1.2 2.0"), movers, "k")
    return edges | _connected((*direct, *copied), movers, "v") | frozenset((mover, "logits") for mover in movers)


_ACDC = "edges as in the code of Conmy et al. 2023 (arXiv 2304.14997)"
_CDT = "Hsu et al., ICLR 2025 (arXiv 2407.00886)"
_ONEILL = "O'Neill & Bui 2024 (arXiv 2405.12522), the labels of its code"
_ATTN_ONLY = "attn-only-4l"

_PUBLISHED = (
    KnownCircuit("ioi", "gpt2", "ioi", _IOI_HEADS, f"Wang et al. 2022 (arXiv 2211.00593); {_ACDC}", edges=_ioi_edges()),
    KnownCircuit(
        "ioi-cdt",
        "gpt2",
        "ioi",
        {
            "heads": _heads(
                "2.2 4.11 0.1 3.0 0.10 5.5 6.9 5.8 5.9 7.3 7.9 8.6 8.10 10.7 11.0 9.9 9.6 10.0 9.0 9.7 10.1 10.2 10.6 "
                "10.10 11.2 11.9"
            )
        },
        f"{_CDT}; as printed: 11.0 stands where the list of Wang et al. has 11.10",
    ),
    KnownCircuit(
        "ioi-oneill",
        "gpt2",
        "ioi",
        {role: tuple("L11H3" if head == "L9H0" else head for head in names) for role, names in _IOI_HEADS.items()},
        f"{_ONEILL}; 11.3 stands where the list of Wang et al. has 9.0",
    ),
    KnownCircuit(
        "greater_than",
        "gpt2",
        "greater_than",
        _GREATER_THAN_HEADS,
        f"Hanna et al. 2023 (arXiv 2305.00586); {_ACDC}",
        _GREATER_THAN_MLPS,
        _greater_than_edges(),
    ),
    KnownCircuit(
        "greater_than-cdt", "gpt2", "greater_than", {"heads": _heads("5.1 5.5 6.1 6.9 7.10 8.8 8.11 9.1")}, _CDT
    ),
    KnownCircuit(
        "greater_than-oneill",
        "gpt2",
        "greater_than",
        {"heads": _heads("0.1 0.3 0.5 5.5 6.1 6.9 7.10 8.11 9.1")},
        _ONEILL,
    ),
    KnownCircuit(
        "docstring",
        _ATTN_ONLY,
        "docstring",
        {"heads": _DOCSTRING_HEADS},
        f"Heimersheim & Janiak 2023 (alignmentforum.org, 'A circuit for Python docstrings'); {_ACDC}",
        edges=_docstring_edges(),
    ),
    KnownCircuit("docstring-cdt", _ATTN_ONLY, "docstring", {"heads": _heads("0.2 0.4 0.5 1.2 1.4 2.0 3.0 3.6")}, _CDT),
    KnownCircuit("docstring-oneill", _ATTN_ONLY, "docstring", {"heads": _heads("0.5 1.0 1.4 2.0 3.0 3.6")}, _ONEILL),
)

KNOWN: dict[str, KnownCircuit] = {circuit.name: circuit for circuit in _PUBLISHED}
"""Published circuits by name; `ioi`, `greater_than` and `docstring` have edges."""
