"""Names of activations: TransformerLens's hook names, their short forms, and the axes of each.

A site is a string such as `blocks.3.attn.hook_z`. `Site("z", layer=3)` is that string; wherever a site is asked for,
the full name, the short form and shell patterns (`blocks.*.attn.hook_z`) are understood.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase

SitePattern = str | Iterable[str] | Callable[[str], bool]

_STREAM = ("batch", "position", "d_model")
_NEURONS = ("batch", "position", "neuron")
_HEAD = ("batch", "position", "head", "d_head")
_ATTENTION = ("batch", "head", "query", "key")

SITE_NAMES: dict[str, str] = {
    "embed": "hook_embed",
    "resid_pre": "blocks.{layer}.hook_resid_pre",
    "ln1": "blocks.{layer}.ln1.hook_normalized",
    "q": "blocks.{layer}.attn.hook_q",
    "k": "blocks.{layer}.attn.hook_k",
    "v": "blocks.{layer}.attn.hook_v",
    "rot_q": "blocks.{layer}.attn.hook_rot_q",
    "rot_k": "blocks.{layer}.attn.hook_rot_k",
    "attn_scores": "blocks.{layer}.attn.hook_attn_scores",
    "pattern": "blocks.{layer}.attn.hook_pattern",
    "z": "blocks.{layer}.attn.hook_z",
    "result": "blocks.{layer}.attn.hook_result",
    "attn_out": "blocks.{layer}.hook_attn_out",
    "resid_mid": "blocks.{layer}.hook_resid_mid",
    "ln2": "blocks.{layer}.ln2.hook_normalized",
    "mlp_pre": "blocks.{layer}.mlp.hook_pre",
    "mlp_post": "blocks.{layer}.mlp.hook_post",
    "mlp_out": "blocks.{layer}.hook_mlp_out",
    "resid_post": "blocks.{layer}.hook_resid_post",
    "ln_final": "ln_final.hook_normalized",
}
"""Short form -> name, in the order in which a block computes them."""

SITE_DIMS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(SITE_NAMES, _STREAM),
    **dict.fromkeys(("q", "k", "v", "rot_q", "rot_k", "z"), _HEAD),
    **dict.fromkeys(("attn_scores", "pattern"), _ATTENTION),
    **dict.fromkeys(("mlp_pre", "mlp_post"), _NEURONS),
    "result": ("batch", "position", "head", "d_model"),
}
"""Axes of each site; `head` is the key/value head for k, v and rot_k."""

HEAD_KINDS = tuple(kind for kind, dims in SITE_DIMS.items() if "head" in dims)

ALIASES = {"pre": "mlp_pre", "post": "mlp_post", "scores": "attn_scores"}
"""Further short forms that TransformerLens users type."""

LAYERLESS = ("embed", "ln_final")
INSIDE_ATTENTION = ("rot_q", "rot_k", "attn_scores", "pattern")

_BY_PATTERN = [(kind, re.compile(re.escape(name).replace(r"\{layer\}", r"(\d+)"))) for kind, name in SITE_NAMES.items()]


def short_form(name: str) -> str:
    """The short form that a name stands for: "z" for "z" and "hook_z", "mlp_post" for "post"."""
    name = name.removeprefix("hook_")
    return ALIASES.get(name, name)


class SiteUnavailable(ValueError):
    """A site that exists in the vocabulary but not in this model; the message says why."""


class Site(str):
    """A hook name that knows its parts.

    >>> Site("z", layer=3)
    'blocks.3.attn.hook_z'
    """

    kind: str
    layer: int | None
    tower: str

    def __new__(cls, kind: str, layer: int | None = None, *, tower: str = "") -> Site:
        """The site of this kind (a short form) in this layer.

        Raises:
            ValueError: for an unknown kind, or a layer that is missing or out of place.
        """
        given, kind = kind, short_form(kind)
        if kind not in SITE_NAMES:
            prefix = "hook_" if given.startswith("hook_") else ""
            raise ValueError(f"{given!r} is not a site; {_nearest(given, [prefix + name for name in SITE_NAMES])}")
        if (layer is None) != (kind in LAYERLESS):
            raise ValueError(f"site {kind!r} {'takes no layer' if layer is not None else 'needs a layer'}")
        site = super().__new__(cls, tower + SITE_NAMES[kind].format(layer=layer))
        site.kind, site.layer, site.tower = kind, layer, tower
        return site

    def __getnewargs_ex__(self) -> tuple[tuple[str, int | None], dict[str, str]]:
        return (self.kind, self.layer), {"tower": self.tower}

    @classmethod
    def parse(cls, name: str) -> Site:
        """The site with this full name.

        Raises:
            ValueError: if no site has this name; the message offers near names.
        """
        if isinstance(name, Site):
            return name
        tower, rest = ("vision.", name.removeprefix("vision.")) if name.startswith("vision.") else ("", name)
        for kind, pattern in _BY_PATTERN:
            match = pattern.fullmatch(rest)
            if match:
                return cls(kind, int(match[1]) if match.groups() else None, tower=tower)
        raise ValueError(f"{name!r} is not a site; {_nearest(name, SITE_NAMES.values())}")


def select_sites(pattern: SitePattern, available: Sequence[Site]) -> list[Site]:
    """The available sites that a pattern names, in the order of `available`.

    Args:
        pattern: a full name, a short form ("z": that site in every layer; "vision.z": in those of the vision tower), a
            shell pattern, a sequence of these, or a function of the name.
        available: all sites of the model.

    Raises:
        ValueError: if a name or pattern matches nothing; the message offers near names.
    """
    if callable(pattern):
        chosen = [site for site in available if pattern(site)]
        if not chosen:
            raise ValueError("the function given for `sites` accepted none of the model's sites")
        return chosen
    patterns = [pattern] if isinstance(pattern, str) else list(pattern)
    if not patterns:
        raise ValueError("no sites were asked for")
    wanted = set().union(*(_matching(one, available) for one in patterns))
    return [site for site in available if site in wanted]


def _matching(pattern: str, available: Sequence[Site]) -> set[Site]:
    tower = "vision." if pattern.startswith("vision.") else ""
    kind = short_form(pattern.removeprefix(tower))
    if kind in SITE_NAMES:
        found = {site for site in available if site.kind == kind and site.tower == tower}
    else:
        found = {site for site in available if site == pattern or fnmatchcase(site, pattern)}
    if found:
        return found
    layers = sorted({site.layer for site in available if site.layer is not None and site.tower == ""})
    match = re.search(r"blocks\.(\d+)\.", pattern)
    if match and int(match[1]) not in layers:
        raise ValueError(f"{pattern!r}: layer {match[1]} is out of range; layers run 0..{layers[-1]}")
    raise ValueError(f"{pattern!r} matches no site of this model; {_nearest(pattern, [*available, *SITE_NAMES])}")


def _nearest(name: str, known: Iterable[str]) -> str:
    names = list(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5) or difflib.get_close_matches(
        name.rpartition(".")[2], [one.rpartition(".")[2] for one in names], n=3, cutoff=0.4
    )
    if not near:
        return f"sites are {', '.join(SITE_NAMES)}"
    return "did you mean " + " or ".join(repr(one.format(layer="0")) for one in dict.fromkeys(near)) + "?"
