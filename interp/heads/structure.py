"""Whether attention follows a known structure over the tokens, such as the edges of a graph or of a parse."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from scipy import stats
from torch import Tensor


def structure_alignment(
    pattern: Float[Tensor, "*batch query key"],
    adjacency: Bool[Tensor, "query key"],
    *,
    pairs: Bool[Tensor, "query key"] | None = None,
) -> Float[Tensor, "*batch"]:
    """How well attention tells linked tokens from unlinked ones: the area under the ROC curve of A[query, key].

    The chance that a linked pair has more attention than an unlinked one, ties counting half: 1 = always, 0.5 =
    attention knows nothing of the links, 0 = it avoids them. Short rows have more attention to share out a key, so
    where links depend on position, compare with the alignment to shuffled links.

    Args:
        pattern: attention, one or many heads.
        adjacency: True where query and key are linked; only the entries of `pairs` are read.
        pairs: which pairs count, such as those of node tokens. None: every key before its query. A causal model gives
            no attention to later keys, so leave those out.

    Returns:
        One value a pattern; NaN where the pairs are all linked or all unlinked.

    Source: the diagnostic behind the finding that attention over graph nodes ignores their links. Checked against
    scikit-learn in tests/heads/test_structure.py.
    """
    n_queries, n_keys = pattern.shape[-2:]
    counted = torch.ones(n_queries, n_keys, dtype=torch.bool).tril(-1) if pairs is None else pairs.cpu()
    attention = pattern.float().cpu()[..., counted]
    is_linked = adjacency.cpu()[counted]
    n_linked, n_unlinked = int(is_linked.sum()), int((~is_linked).sum())
    if not n_linked or not n_unlinked:
        return torch.full(pattern.shape[:-2], torch.nan)
    ranks = torch.from_numpy(stats.rankdata(attention.numpy(), axis=-1))
    # Mann-Whitney: the ranks of linked pairs, less what they would be if those came last.
    wins = ranks[..., is_linked].sum(-1) - n_linked * (n_linked + 1) / 2
    return (wins / (n_linked * n_unlinked)).float()


def attention_parents(
    pattern: Float[Tensor, "*batch query key"], *, exclude: Sequence[int] = ()
) -> Int[Tensor, "*batch query"]:
    """The key that each query attends to most, itself and the excluded positions left out: a tree over the tokens.

    Args:
        pattern: attention, one or many heads; queries and keys are the same tokens.
        exclude: key positions that are nobody's parent, such as a sink at [0].

    Returns:
        Position of the parent, the earlier of two alike; −1 where no attention is left.

    Raises:
        ValueError: for a position outside the prompt, or a pattern of fewer queries than keys.
    """
    n_queries, n_keys = pattern.shape[-2:]
    if n_queries != n_keys:
        raise ValueError(f"parents are asked of whole patterns; this one has {n_queries} queries and {n_keys} keys")
    for position in exclude:
        if not 0 <= position < n_keys:
            raise ValueError(f"position {position} is outside the prompt; positions run 0..{n_keys - 1}")
    rest = pattern.clone()
    rest[..., list(exclude)] = 0
    rest.diagonal(dim1=-2, dim2=-1).zero_()
    most, parent = rest.max(dim=-1)
    return parent.masked_fill(most <= 0, -1)
