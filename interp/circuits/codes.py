"""Discrete-code circuits: which heads say something else when the behaviour is there than when it is not.

1. Average (or take at the last position) what each head adds to the residual stream, prompt by prompt: the clean
   prompts are the positive examples, the corrupted ones the negative.
2. Train one small sparse autoencoder on the head outputs of a few examples (`code_book`).
3. Replace each output by the integer of its largest feature: its code. An output with no feature has a code of its own.
4. A head scores by its codes: in how many pairs of a clean and a corrupted prompt they differ, how many occur in
   positive examples only, or what the code tells about the class. A pair of heads scores by the pairs of codes that
   occur together in positive examples only.

Forward passes only: a few prompts and seconds. Codes show which heads say something else, not whether anything reads
it: a head that reacts to the changed words without a part in the behaviour scores as well.

Source: O'Neill & Bui 2024 (arXiv 2405.12522). What is done otherwise: heads score by changed codes unless the published
count of codes is asked for; everything is seeded; each node's mean output is taken off; outputs are scaled to mean
squared norm 1 and the error is summed over d_model, so that the sparsity penalty means the same in every model; it is
the decoder's directions, one a code, that have norm 1; a step of training takes at most `ROWS_A_STEP` outputs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from interp.circuits.code_book import code_book
from interp.circuits.code_statistics import (
    changed_share,
    code_information,
    swapped,
    unique_counts,
    unique_pair_counts,
)
from interp.circuits.graph import Graph
from interp.circuits.node_scores import node_array
from interp.model import Model, Site
from interp.patching.batching import batches
from interp.patching.labels import provenance
from interp.tasks import Task

HEADS, MLPS = "heads", "mlps"

Positions = Literal["mean", "last"]
Score = Literal["changed", "count", "information"]


def code_scores(
    model: Model,
    task: Task,
    *,
    score: Score = "changed",
    n_train: int = 10,
    n_codes: int = 200,
    steps: int = 300,
    sparsity: float = 0.3,
    centred: bool = True,
    positions: Positions = "mean",
    mlps: bool = False,
    n_permutations: int = 200,
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> xr.DataArray:
    """Score of each head (and MLP) by its codes in clean against corrupted prompts.

    Costs one forward pass of both runs, and the training of an autoencoder of `n_codes` features.

    Args:
        model: a decoder.
        task: clean prompts (positive examples) and corrupted ones (negative); all of them are scored. The corrupted
            ones must not show the behaviour: names all different for IOI (`corruption="abc"`), not names swapped,
            which makes examples of the same kind that no code tells from the clean ones.
        score: "changed" (ours): the share of pairs whose two codes differ, which needs no code to occur twice. "count",
            as published: the number of codes that only positive examples have, which grows with the number of examples
            also where there is nothing to find. "information": what the code tells about the class, in nats. AUC
            against the heads that matter, "changed" and "count": 0.80-0.93 and 0.73-0.90 on SmolLM2 (10 IOI prompts),
            0.84 and 0.69 on the wired "duplicate" model (10 prompts, mean of three seeds).
        n_train: examples to train on, one half clean, one half their corrupted counterparts; fewer if the task has
            fewer. More are not better (the paper: best with 5 to 10).
        n_codes: features of the autoencoder.
        steps: steps of training.
        sparsity: weight of the L1 penalty.
        centred: take off what each node says on average over the training examples, which would use up codes and is no
            news. The paper does not.
        positions: average outputs over positions, or take the last.
        mlps: MLP outputs as well; they share the codes, with a scale of their own.
        n_permutations: swaps of the two examples of pairs at random for the coordinate `p_value`; 0: none.
        batch_size: prompts a pass; by default about a thousand tokens' worth.
        seed: of the choice of training examples, the training and the swaps.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        Scores over `node`, NaN where there is no code (embedding, MLPs left out), with the coordinate `p_value`: the
        share of swaps with a score as high, the actual one counted in. A code that differs in every pair in another way
        is not significant, though it may matter. NaN for "changed", to which swaps make no difference.

    Raises:
        ValueError: for a choice that does not exist or a size out of range.
        FloatingPointError: if the model's output is NaN or infinite.
    """
    started = time.perf_counter()
    if score not in get_args(Score):
        raise ValueError(f"score={score!r}; it is one of {', '.join(get_args(Score))}")
    if n_permutations < 0:
        raise ValueError(f"n_permutations={n_permutations}; it is 0 or more")
    graph = Graph.of(model)
    codes = _codes(
        model,
        task,
        n_train=n_train,
        n_codes=n_codes,
        steps=steps,
        sparsity=sparsity,
        centred=centred,
        positions=positions,
        mlps=mlps,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
    )
    statistic = {"count": unique_counts, "information": code_information, "changed": changed_share}[score]
    values = statistic(codes.positive, codes.negative)
    if score == "changed":
        n_permutations = 0
    p_values = np.full(len(values), np.nan)
    if n_permutations:
        null = swapped(statistic, codes.positive, codes.negative, n_permutations, seed)
        # Equal up to rounding counts as equal.
        p_values = (1 + (null >= values - 1e-9).sum(0)) / (1 + n_permutations)
    found = dict(zip(codes.names, values.tolist(), strict=True))
    attrs = {"method": "codes", "score": score, "n_permutations": n_permutations, "unsigned": 1}
    array = node_array(graph.writers, found, {**codes.attrs, **attrs, "seconds": time.perf_counter() - started})
    p_by_name = dict(zip(codes.names, p_values.tolist(), strict=True))
    return array.assign_coords(p_value=("node", [p_by_name.get(name, np.nan) for name in graph.writers]))


def code_edge_scores(
    model: Model,
    task: Task,
    *,
    n_train: int = 10,
    n_codes: int = 200,
    steps: int = 300,
    sparsity: float = 0.3,
    centred: bool = True,
    positions: Positions = "mean",
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> xr.DataArray:
    """Score of each pair of heads: the number of pairs of codes that occur together in positive examples only.

    A pair is scored where the second head is in a later layer; the score does not say by which input it reads. Costs
    what `code_scores` does, and a sort of every example's codes for each head: memory of n_examples × n_heads integers.

    Args:
        model: as in `code_scores`.
        task: as in `code_scores`.
        n_train: as in `code_scores`.
        n_codes: as in `code_scores`.
        steps: as in `code_scores`.
        sparsity: as in `code_scores`.
        centred: as in `code_scores`.
        positions: as in `code_scores`.
        batch_size: as in `code_scores`.
        seed: as in `code_scores`; the same seed makes the same codes.
        progress: as in `code_scores`.

    Returns:
        [writer, reader] over the names of heads; NaN where the second is not in a later layer.

    Raises:
        ValueError: as `code_scores`.
        FloatingPointError: as `code_scores`.
    """
    started = time.perf_counter()
    codes = _codes(
        model,
        task,
        n_train=n_train,
        n_codes=n_codes,
        steps=steps,
        sparsity=sparsity,
        centred=centred,
        positions=positions,
        mlps=False,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
    )
    layers = np.repeat(np.arange(model.n_layers), model.n_heads)
    counts = unique_pair_counts(codes.positive, codes.negative, layers)
    return xr.DataArray(
        counts.astype(np.float32),
        dims=("writer", "reader"),
        coords={"writer": codes.names, "reader": codes.names},
        name="score",
        attrs={
            **codes.attrs,
            "method": "codes",
            "score": "count",
            "unsigned": 1,
            "seconds": time.perf_counter() - started,
        },
    )


@dataclass(frozen=True)
class _Codes:
    """Codes of all examples."""

    names: list[str]
    positive: Int[ndarray, "example node"]
    negative: Int[ndarray, "example node"]
    attrs: Mapping[str, Any]


def _codes(
    model: Model,
    task: Task,
    *,
    n_train: int,
    n_codes: int,
    steps: int,
    sparsity: float,
    centred: bool,
    positions: Positions,
    mlps: bool,
    batch_size: int | None,
    seed: int,
    progress: bool | None,
) -> _Codes:
    """Steps 1 to 3: run both kinds of prompts, train, encode."""
    if positions not in get_args(Positions):
        raise ValueError(f"positions={positions!r}; it is one of {', '.join(get_args(Positions))}")
    for name, value, least in (
        ("n_train", n_train, 2),
        ("n_codes", n_codes, 1),
        ("steps", steps, 0),
        ("sparsity", sparsity, 0),
    ):
        if value < least:
            raise ValueError(f"{name}={value}; it is {least} or more")
    outputs = [
        _run(model, task, clean=clean, positions=positions, mlps=mlps, batch_size=batch_size) for clean in (True, False)
    ]
    chosen = np.random.default_rng(seed).permutation(len(task))[: n_train // 2].tolist()
    prepared = {kind: _prepare(kind, outputs, chosen, centred) for kind in (HEADS, MLPS)[: 1 + mlps]}
    training = [one.vectors(kind, chosen, by) for kind, by in prepared.items() for one in outputs]
    vectors = torch.cat([layer.flatten(0, 1) for several in training for layer in several])
    book = code_book(vectors, n_codes, steps=steps, sparsity=sparsity, seed=seed, progress=progress)
    positive, negative = (
        torch.cat([book.codes(layer) for kind, by in prepared.items() for layer in one.vectors(kind, None, by)], dim=1)
        for one in outputs
    )
    layers = range(model.n_layers)
    names = [f"L{layer}H{head}" for layer in layers for head in range(model.n_heads)]
    attrs = {
        **provenance(model, task),
        "n_train": 2 * len(chosen),
        "n_scored": 2 * len(task),
        "n_codes": n_codes,
        "steps": steps,
        "sparsity": sparsity,
        "centred": int(centred),
        "positions": positions,
        "metric": "none (clean against corrupted)",
        "direction": "none",
        "code_seed": seed,
    }
    names += [f"mlp{layer}" for layer in layers if mlps]
    return _Codes(names, positive.cpu().numpy(), negative.cpu().numpy(), attrs)


@dataclass(frozen=True)
class _Prepared:
    """What is taken off the outputs of one kind of node, and what they are multiplied by."""

    centre: Float[Tensor, "layer node d_model"] | None
    scale: float


@dataclass(frozen=True)
class _Outputs:
    """What the nodes say in each prompt; heads by z, which is narrower than what they add to the stream."""

    model: Model
    z: Float[Tensor, "prompt layer head d_head"]
    mlps: Float[Tensor, "prompt layer d_model"]
    """Without layers if MLPs are left out."""

    def vectors(
        self, kind: str, prompts: Sequence[int] | None, by: _Prepared
    ) -> Iterator[Float[Tensor, "prompt node d_model"]]:
        """Layer by layer, what the nodes of a kind add to the residual stream, prepared; prompts None: all.

        Of heads it is z·W_O, before a norm behind attention (Gemma), which heads share.
        """
        chosen = slice(None) if prompts is None else list(prompts)
        for layer in range(self.model.n_layers):
            if kind == HEADS:
                W_O = self.model.weights.of_block("W_O", layer).to(self.z)
                found = torch.einsum("phd,hdm->phm", self.z[chosen, layer], W_O)
            else:
                found = self.mlps[chosen, layer, None]
            yield (found if by.centre is None else found - by.centre[layer]) * by.scale


def _prepare(kind: str, outputs: Sequence[_Outputs], chosen: Sequence[int], centred: bool) -> _Prepared:
    """So that the training examples of a kind of node have mean squared norm 1, and each node mean 0 if centred."""
    plain = _Prepared(None, 1.0)
    both = zip(*(one.vectors(kind, chosen, plain) for one in outputs), strict=True)
    layers = torch.stack([torch.cat(several) for several in both], dim=1)
    centre = layers.mean(0) if centred else None
    size = float((layers if centre is None else layers - centre).square().sum(-1).mean())
    return _Prepared(centre, size**-0.5 if size > 0 else 1.0)


@torch.no_grad()
def _run(
    model: Model, task: Task, *, clean: bool, positions: Positions, mlps: bool, batch_size: int | None
) -> _Outputs:
    """One forward pass of the clean or corrupted prompts, grouped by length; the order is the same for both."""
    sites = [Site(kind, layer) for layer in range(model.n_layers) for kind in (("z", "mlp_out") if mlps else ("z",))]
    z, streams = [], []
    for group in task.by_length():
        tokens = group.clean if clean else group.corrupted
        for rows in batches(len(group), tokens.shape[1], batch_size):
            _, cache = model.run_with_cache(tokens[rows], sites, logits_to_keep=1)
            at = {
                site: (one.float().mean(1) if positions == "mean" else one[:, -1].float())
                for site, one in cache.items()
            }
            z.append(torch.stack([at[Site("z", layer)].to(model.device) for layer in range(model.n_layers)], dim=1))
            found = [at[Site("mlp_out", layer)].to(model.device) for layer in range(model.n_layers) if mlps]
            streams.append(torch.stack(found, dim=1) if found else z[-1].new_zeros(len(z[-1]), 0, model.d_model))
    return _Outputs(model, torch.cat(z), torch.cat(streams))
