"""What codes (integers) of nodes say about two classes of examples: counts, information, and their chance level."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray


def unique_counts(
    positive: Int[ndarray, "example node"], negative: Int[ndarray, "example node"]
) -> Float[ndarray, " node"]:
    """Number of codes of each node that occur in positive examples and in no negative one."""
    in_positive, in_negative = code_frequencies(positive, negative)
    return ((in_positive > 0) & (in_negative == 0)).sum(1).astype(float)


def code_information(
    positive: Int[ndarray, "example node"], negative: Int[ndarray, "example node"]
) -> Float[ndarray, " node"]:
    """Mutual information of code and class in nats, classes taken as equally likely: 0 to log 2.

    The Jensen-Shannon divergence of the codes' frequencies in the two classes.
    """
    in_positive, in_negative = code_frequencies(positive, negative)
    both = (in_positive + in_negative) / 2
    return _entropy(both) - (_entropy(in_positive) + _entropy(in_negative)) / 2


def changed_share(
    positive: Int[ndarray, "example node"], negative: Int[ndarray, "example node"]
) -> Float[ndarray, " node"]:
    """Share of pairs (example by example) in which the node's code differs."""
    return np.asarray((positive != negative).mean(0))


def code_frequencies(
    positive: Int[ndarray, "example node"], negative: Int[ndarray, "example node"]
) -> tuple[Float[ndarray, "node code"], Float[ndarray, "node code"]]:
    """Share of positive, and of negative, examples in which each node has each code."""
    n_nodes = positive.shape[1]
    width = 1 + int(max(positive.max(), negative.max()))
    both = [
        np.bincount((codes + width * np.arange(n_nodes)).ravel(), minlength=n_nodes * width).reshape(n_nodes, width)
        / len(codes)
        for codes in (positive, negative)
    ]
    return both[0], both[1]


def _entropy(frequencies: Float[ndarray, "node code"]) -> Float[ndarray, " node"]:
    logs = np.log(frequencies, out=np.zeros_like(frequencies), where=frequencies > 0)
    return -(frequencies * logs).sum(1)


def swapped(
    statistic: Callable[[ndarray, ndarray], ndarray],
    positive: Int[ndarray, "example node"],
    negative: Int[ndarray, "example node"],
    n_permutations: int,
    seed: int,
) -> Float[ndarray, "permutation node"]:
    """A statistic with the two examples of each pair swapped at random: its values where class means nothing."""
    draws = np.random.default_rng(seed).random((n_permutations, len(positive), 1)) < 0.5
    values = [statistic(np.where(one, negative, positive), np.where(one, positive, negative)) for one in draws]
    return np.array(values).reshape(n_permutations, positive.shape[1])


def unique_pair_counts(
    positive: Int[ndarray, "example node"], negative: Int[ndarray, "example node"], layers: Int[ndarray, " node"]
) -> Float[ndarray, "writer reader"]:
    """Number of pairs of codes that occur in one positive example at least and in no negative one; NaN off the graph.

    Each writer's pairs are integers in sorted sets: an array over all pairs of codes would have
    (nodes × codes)² entries.

    Args:
        positive: codes of the positive examples.
        negative: codes of the negative examples.
        layers: layer of each node; a pair is a node and one in a later layer.
    """
    width = 1 + int(max(positive.max(), negative.max()))
    counts = np.full((len(layers), len(layers)), np.nan)
    for writer, layer in enumerate(layers):
        readers = np.flatnonzero(layers > layer)
        place = width * width * np.arange(len(readers))
        in_positive, in_negative = (
            np.unique(place + width * codes[:, writer, None].astype(np.int64) + codes[:, readers])
            for codes in (positive, negative)
        )
        only_positive = np.setdiff1d(in_positive, in_negative, assume_unique=True)
        counts[writer, readers] = np.bincount(only_positive // (width * width), minlength=len(readers))
    return counts
