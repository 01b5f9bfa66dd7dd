"""Attention moved between keys: what is taken from some is handed to others, and every row keeps its sum.

Pure functions of tensors. Each of them works in float32 at least and returns the dtype it was given; rows for which a
change is not defined come back as they were, bit for bit.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Target = Literal["identity", "uniform", "sink"]
TARGETS: tuple[Target, ...] = ("identity", "uniform", "sink")


def move_mass(
    pattern: Float[Tensor, "batch head query key"],
    donors: Bool[Tensor, "batch #head key"],
    receivers: Bool[Tensor, "batch #head key"],
    fraction: float | Float[Tensor, "batch head query"],
) -> Float[Tensor, "batch head query key"]:
    """Hand a fraction of the attention on the donors to the receivers, in proportion to what these have already.

    Per row, with g = fraction · Σ over donors of A: a donor keeps A·(1 − fraction), a receiver gets A + g·A/Σ over
    receivers of A, any other key keeps what it has. The row's sum stays (1, or less with learned sink logits). A row in
    which the donors or the receivers have no attention is left as it is.

    Args:
        pattern: attention after softmax; masked keys 0.
        donors: keys that give; one row for all heads, or one a head.
        receivers: keys that get; no key is both.
        fraction: share given, 0 (nothing changes) to 1 (donors keep nothing); one number, or one a row.

    Raises:
        ValueError: if a key is donor and receiver, or a fraction lies outside 0..1.
    """
    fraction = _share(fraction, pattern, "fraction")
    both = donors & receivers
    if bool(both.any()):
        key = int(both.nonzero()[0, -1])
        raise ValueError(f"key {key} is donor and receiver; take it out of one of them")
    wide = _widened(pattern)
    given_up = wide * donors[:, :, None] * fraction
    received = wide * receivers[:, :, None]
    total = received.sum(-1, keepdim=True)
    given = given_up.sum(-1, keepdim=True)
    # Divided first: the share of a key is at most 1, where given / total might overflow.
    moved = wide - given_up + received / total * given
    return torch.where((given > 0) & (total > 0), moved.to(pattern.dtype), pattern)


def interpolate_pattern(
    pattern: Float[Tensor, "batch head query key"],
    allowed: Bool[Tensor, "batch #head query key"],
    share: float | Float[Tensor, "batch head query"],
    *,
    target: Target = "identity",
    sinks: Bool[Tensor, "batch #head key"] | None = None,
) -> Float[Tensor, "batch head query key"]:
    """(1 − u)·A + u·T: attention drawn towards a target, the knob u of SoftPAG.

    T has the sum of the row that it replaces. A row that may not attend to any key of its target is left as it is.

    Args:
        pattern: attention after softmax; queries stand for the last positions of the keys.
        allowed: the keys that each query may attend to.
        share: u, 0 (nothing changes) to 1 (the target); one number, or one a row.
        target: "identity": each position attends to itself; "uniform": to all allowed keys alike; "sink": to the keys
            in `sinks` alike.
        sinks: the keys of target "sink".

    Raises:
        ValueError: for another target, `sinks` missing or out of place, or u outside 0..1.

    Source: SoftPAG of HeadHunter (arXiv 2506.10978), where the target is the identity; after a summary of the paper.
    """
    if target not in TARGETS:
        raise ValueError(f"target={target!r}; it is one of {', '.join(TARGETS)}")
    if (target == "sink") != (sinks is not None):
        raise ValueError(f"target={target!r} {'needs' if sinks is None else 'takes no'} sinks")
    share = _share(share, pattern, "share")
    wide = _widened(pattern)
    n_queries, n_keys = pattern.shape[-2:]
    aimed = allowed
    if target == "identity":
        aimed = allowed & torch.eye(n_keys, dtype=torch.bool, device=pattern.device)[n_keys - n_queries :]
    elif sinks is not None:
        aimed = allowed & sinks[:, :, None]
    n_aimed = aimed.sum(-1, keepdim=True)
    drawn = wide + share * (wide.sum(-1, keepdim=True) * aimed / n_aimed - wide)
    return torch.where((n_aimed > 0) & (share > 0), drawn.to(pattern.dtype), pattern)


def boost_logits(
    scores: Float[Tensor, "batch head query key"],
    keys: Bool[Tensor, "batch #head key"],
    strength: float,
) -> Float[Tensor, "batch head query key"]:
    """Raise the scores e of chosen keys before the softmax, whatever their sign: to e + α·|e|.

    Masked entries (−inf) stay masked. For the last position only, as published, put it into an
    `Edit("attn_scores", positions=[-1], fn=...)`.

    Args:
        scores: attention before softmax.
        keys: keys whose scores are raised; one row for all heads, or one a head.
        strength: α; 0 changes nothing, a negative one lowers.

    Source: "Fixing Imbalanced Attention" (arXiv 2501.12206), α = 0.7 for local and 0.4 for summary tokens.
    """
    chosen = keys[:, :, None] & torch.isfinite(scores)
    wide = _widened(scores)
    return torch.where(chosen, (wide + strength * wide.abs()).to(scores.dtype), scores)


def _share(
    given: float | Float[Tensor, "batch head query"], pattern: Float[Tensor, "batch head query key"], what: str
) -> Float[Tensor, "#batch #head #query 1"]:
    """A share as a tensor that broadcasts to the pattern.

    Raises:
        ValueError: if it lies outside 0..1.
    """
    wide = torch.promote_types(pattern.dtype, torch.float32)
    share = torch.as_tensor(given, dtype=wide, device=pattern.device)
    share = share[..., None] if share.dim() else share.reshape(1, 1, 1, 1)
    outside = share[~((share >= 0) & (share <= 1))]
    if len(outside):
        raise ValueError(f"{what} is {float(outside[0]):g}; it is a share between 0 and 1")
    return share


def _widened(values: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    """The same values in float32 at least."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
