"""Multiple choice: which nodes write the answer's letter, which only lead there, and how few dimensions a head needs.

1. `answer_attribution`: the direct effect of every node on the logit of each letter, centred over the letters.
2. `output_nodes`: total against direct effect of every node. Nodes with a large direct effect are output nodes; nodes
   whose total effect is large and whose direct effect is small work through them.
3. `low_rank_metric`: a head's queries, keys or values are projected onto their first few principal directions: how many
   does the behaviour need?

Source: Lieberum et al. 2023, Does circuit analysis interpretability scale? (arXiv 2307.09458). The task is
`interp.tasks.mcqa`; any task whose prompts share one set of possible answers will do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.circuits.graph import Graph
from interp.circuits.node_scores import head_and_mlp_scores, node_array
from interp.heads.direct import Terms, logit_terms
from interp.metrics import PADDING, Metric, accuracy, bootstrap_interval, kl_divergence
from interp.model import Edit, Model, Site
from interp.patching.activation import activation_patching, resolve_metric
from interp.patching.batching import batches
from interp.patching.edges import Writer
from interp.patching.labels import provenance
from interp.patching.path import path_patching
from interp.patching.progress import progress_bar
from interp.tasks import Task

Part = Literal["q", "k", "v"]
PARTS = ("q", "k", "v")


# Direct effects


def answer_attribution(model: Model, task: Task, *, batch_size: int | None = None) -> xr.Dataset:
    """What every node writes towards each possible answer, straight through the final norm, in logits.

    Centred over the answers: what a node adds to all of them alike says nothing. The final norm's scale is that of the
    clean run, so that the effects of all nodes add up to the centred logits (attr `sum_error` is the largest gap left
    by rounding). Where a family soft-caps its logits, these are before the cap. Costs one forward pass for each answer
    and prompt.

    Args:
        model: the model.
        task: its clean prompts, read at the last token. The answers are all tokens that are right or wrong answers of a
            prompt, the same for all prompts; each prompt has one right one.
        batch_size: prompts a forward pass; by default about a thousand tokens' worth.

    Returns:
        Dataset: `effect` [prompt, node, answer], where node is "embed", heads, MLPs, and "bias" (all biases of
        attention, final norm and unembedding); `on_right` [node], the mean over prompts of the effect on the right
        answer, with `low` and `high`, its 95% bootstrap interval. Coordinate `right` [prompt]: the right answer.

    Raises:
        UnsupportedModel: for post-norm models, whose residual stream is not a sum of outputs.
        ValueError: unless all prompts have the same possible answers, one of them right.
    """
    started = time.perf_counter()
    answers, right = _possible_answers(task)
    n_answers = len(answers)
    effects, totals = [], []
    for column, answer in enumerate(answers.tolist()):
        others = torch.cat([answers[:column], answers[column + 1 :]])
        asked = replace(task, answers=torch.full((len(task), 1), answer), wrong=others.expand(len(task), -1).clone())
        terms = logit_terms(model, asked, batch_size=batch_size)
        # logit − mean of the others is n / (n − 1) times logit − mean of all.
        effects.append(_by_node(terms) * (n_answers - 1) / n_answers)
        totals.append(terms.total * (n_answers - 1) / n_answers)
    effect, total = torch.stack(effects, dim=-1), torch.stack(totals, dim=-1)
    on_right = effect.gather(-1, right[:, None, None].expand(-1, effect.shape[1], 1)).squeeze(-1)
    low, high = bootstrap_interval(on_right)
    names = _names(model, answers)
    found = xr.Dataset(
        {
            "effect": (("prompt", "node", "answer"), effect.numpy()),
            "on_right": ("node", on_right.mean(0).numpy()),
            "low": ("node", low.astype("float32")),
            "high": ("node", high.astype("float32")),
        },
        coords={
            "prompt": range(len(task)),
            "node": [*Graph.of(model).writers, "bias"],
            "answer": names,
            "right": ("prompt", [names[column] for column in right.tolist()]),
        },
        attrs={
            **provenance(model, task),
            "method": "answer_attribution",
            "metric": "centred logit",
            "sum_error": float((effect.sum(1) - total).abs().max()),
            "before_soft_cap": int(getattr(model.tower.config, "final_logit_softcapping", None) is not None),
            "seconds": time.perf_counter() - started,
        },
    )
    return found.sortby("answer")  # token ids are in no order that a reader knows


def output_nodes(
    model: Model,
    task: Task,
    *,
    metric: str | Metric | None = None,
    normalised: bool = True,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> xr.Dataset:
    """Total and direct effect of every head and MLP: both exact, of the same patch.

    A node's output in the clean run is replaced, at all positions, by that of the corrupted run. Total: everything
    after it is recomputed (`activation_patching`). Direct: only the logits see the change (`path_patching`), final norm
    included. Positive = supports the right answer.

    Args:
        model: a model with a residual stream, served by the sweep engine.
        task: the corrupted prompts have another right answer.
        metric: as in `activation_patching`.
        normalised: as in `activation_patching`.
        batch_size: as in `activation_patching`.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        Dataset over [node]: `total`, `direct`, and `indirect`, their difference.
    """
    started = time.perf_counter()
    names = Graph.of(model).writers[1:]
    patched = partial(
        activation_patching, model, task, direction="noise", metric=metric, normalised=normalised,
        batch_size=batch_size, progress=progress,
    )  # fmt: skip
    written = partial(
        path_patching, model, task, readers="logits", direction="noise", metric=metric, normalised=normalised,
        batch_size=batch_size, progress=progress,
    )  # fmt: skip
    heads = patched(site="z", by=("layer", "head"))
    total = head_and_mlp_scores(heads.values, patched(site="mlp_out", by=("layer",)).values)
    direct = head_and_mlp_scores(
        written(site="z", by=("layer", "head")).values, written(site="mlp_out", by=("layer",)).values
    )
    found = {"total": node_array(names, total, {}), "direct": node_array(names, direct, {})}
    found["indirect"] = found["total"] - found["direct"]
    attrs = {name: heads.attrs[name] for name in ("direction", "ablation", "metric", "normalised")}
    attrs |= {"method": "output_nodes", "seconds": time.perf_counter() - started}
    return xr.Dataset(found, attrs={**provenance(model, task), **attrs})


def _possible_answers(task: Task) -> tuple[Int[Tensor, " answer"], Int[Tensor, " prompt"]]:
    """(ids of the possible answers, which of them is right in each prompt)."""
    rows = torch.cat([task.answers, task.wrong], dim=1)
    answers = rows[rows != PADDING].unique()
    for row, ids in enumerate(rows):
        if set(ids.tolist()) - {PADDING} != set(answers.tolist()):
            raise ValueError(
                f"prompt {row} has not the same possible answers as the others: an attribution to answers takes a "
                "task such as mcqa, where right and wrong answers together are one set"
            )
    if len(answers) < 2 or bool(((task.answers != PADDING).sum(1) != 1).any()):
        raise ValueError("each prompt needs one right answer and at least one wrong one")
    right = task.answers.max(dim=1).values
    return answers, torch.searchsorted(answers, right)


def _by_node(terms: Terms) -> Float[Tensor, "prompt node"]:
    in_blocks = torch.cat([terms.heads, terms.mlp[..., None]], dim=-1).flatten(1)
    bias = terms.attn_bias.sum(-1) + terms.bias
    return torch.cat([terms.embed[:, None], in_blocks, bias[:, None]], dim=-1)


def _names(model: Model, answers: Int[Tensor, " answer"]) -> list[str]:
    if model.tokenizer is None:
        return [str(token) for token in answers.tolist()]
    return [text.strip() or text for text in model.to_str_tokens(answers)]


# Low rank


@dataclass(frozen=True)
class Subspace:
    """The principal directions of one head's vectors."""

    site: Site
    head: int
    """Among the key/value heads, for k and v."""
    mean: Float[Tensor, " d_head"]
    directions: Float[Tensor, "direction d_head"]
    """Orthonormal, by falling variance; as many as d_head."""
    variance: Float[Tensor, " direction"]
    """Share of the variance along each."""

    def projected(self, vectors: Float[Tensor, "... d_head"], rank: int) -> Float[Tensor, "... d_head"]:
        """Vectors with their first `rank` directions kept, and the mean in all others."""
        kept = self.directions[:rank].to(vectors.device)
        mean = self.mean.to(vectors.device)
        return (mean + (vectors.float() - mean) @ kept.T @ kept).to(vectors.dtype)

    def edit(self, where: Bool[Tensor, "prompt pos"], rank: int) -> Edit:
        """The edit that projects the head's vectors at some places of a batch."""

        def fn(activation: Float[Tensor, "prompt pos head d_head"]) -> Float[Tensor, "prompt pos head d_head"]:
            chosen = where.to(activation.device)
            own = activation[:, :, self.head]
            activation[:, :, self.head] = torch.where(chosen[..., None], self.projected(own, rank), own)
            return activation

        return Edit(self.site, fn=fn, heads=[self.head])


def head_subspace(
    model: Model,
    task: Task,
    head: str,
    *,
    part: Part = "q",
    positions: Sequence[str] | None = None,
    batch_size: int | None = None,
) -> Subspace:
    """Mean and principal directions of a head's queries, keys or values on the clean prompts, before rotary.

    Args:
        model: the model.
        task: its clean prompts.
        head: a query head, "L9H6"; its key/value head is taken for k and v, and is shared by its group.
        part: "q", "k" or "v".
        positions: key positions of the task at which vectors are collected; by default the last token for queries and
            all positions for keys and values.
        batch_size: prompts a forward pass; by default about a thousand tokens' worth.

    Raises:
        ValueError: for an unknown head, part or position, or a single vector.
    """
    site, index = _site_of(model, head, part)
    collected = []
    for prompts, where in _batches(task, part, positions, batch_size):
        _, cache = model.run_with_cache(prompts.clean, [site], logits_to_keep=1)
        collected.append(cache[site][:, :, index][where.to(cache[site].device)].float().cpu())
    vectors = torch.cat(collected)
    if len(vectors) < 2:
        raise ValueError(f"one vector of {head}.{part}: principal directions take at least two prompts")
    mean = vectors.mean(0)
    _, sizes, directions = torch.linalg.svd(vectors - mean, full_matrices=True)
    variance = torch.zeros(len(mean))
    variance[: len(sizes)] = sizes.square() / sizes.square().sum().clamp_min(torch.finfo(torch.float32).tiny)
    return Subspace(site, index, mean, directions, variance)


def low_rank_metric(
    model: Model,
    task: Task,
    head: str,
    ranks: Sequence[int],
    *,
    part: Part = "q",
    positions: Sequence[str] | None = None,
    fit: Task | None = None,
    metric: str | Metric | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> xr.Dataset:
    """The behaviour when a head's queries, keys or values are left only a few principal directions.

    Directions are those of `head_subspace`; what lies outside the first r becomes the mean. Rank 0 replaces the vectors
    by their mean, rank d_head changes nothing. Costs a forward pass for each rank and prompt, and two more.

    Args:
        model: the model.
        task: the prompts that are measured.
        head: as in `head_subspace`.
        ranks: how many directions are kept, 0..d_head.
        part: "q", "k" or "v".
        positions: as in `head_subspace`; vectors elsewhere are left alone. For mcqa, ("LABEL1", ..., "LABEL4") are the
            labels.
        fit: other prompts to fit the directions on, so that the measure is of held-out ones; the same by default.
        metric: as in `activation_patching`.
        batch_size: prompts a forward pass; by default about a thousand tokens' worth.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        Dataset over [rank]: `metric`, `accuracy`, `kl` (from the plain prediction, in nats), and `variance` (share of
        the variance of the fitted vectors kept); attrs `metric_plain` and `accuracy_plain`.

    Raises:
        ValueError: for an unknown head, part or position, or a rank outside 0..d_head.
    """
    started = time.perf_counter()
    for rank in ranks:
        if not 0 <= rank <= model.d_head:
            raise ValueError(f"rank {rank} is out of range; ranks run 0..{model.d_head}")
    _, places = _site_of(model, head, part), _names_known(task, positions)
    metric_name, metric_fn = resolve_metric(metric, task)
    space = head_subspace(model, fit or task, head, part=part, positions=places, batch_size=batch_size)
    plain, found = [], []
    with progress_bar((1 + len(ranks)) * len(task), f"{head}.{part}", "run", progress=progress) as bar:
        for prompts, where in _batches(task, part, places, batch_size):
            logits = model(prompts.clean, logits_to_keep=1)[:, -1]
            read = _reader(logits, prompts, metric_fn)
            plain.append(read(logits))
            bar.update(len(prompts))
            runs = []
            for rank in ranks:
                with model.edited(space.edit(where, rank)):
                    runs.append(read(model(prompts.clean, logits_to_keep=1)[:, -1]))
                bar.update(len(prompts))
            found.append(torch.stack(runs))
    without, means = torch.cat(plain, dim=-1).mean(-1), torch.cat(found, dim=-1).mean(-1).numpy()
    measures = {name: ("rank", means[:, at]) for at, name in enumerate(("metric", "accuracy", "kl"))}
    kept = [float(space.variance[:rank].sum()) for rank in ranks]
    return xr.Dataset(
        {**measures, "variance": ("rank", kept)},
        coords={"rank": list(ranks)},
        attrs={
            **provenance(model, task),
            "method": "low_rank_metric",
            "head": head,
            "part": part,
            "positions": " ".join(places) if places else ("last" if part == "q" else "all"),
            "fitted_on": f"{len(fit)} other prompts" if fit is not None else "the same prompts",
            "metric": metric_name,
            "metric_plain": float(without[0]),
            "accuracy_plain": float(without[1]),
            "seconds": time.perf_counter() - started,
        },
    )


def _reader(
    base: Float[Tensor, "prompt d_vocab"], prompts: Task, metric: Metric
) -> Callable[[Float[Tensor, "prompt d_vocab"]], Float[Tensor, "measure prompt"]]:
    """From logits to metric, accuracy and divergence from the base logits."""
    answers, wrong = prompts.answers.to(base.device), prompts.wrong.to(base.device)

    def read(logits: Float[Tensor, "prompt d_vocab"]) -> Float[Tensor, "measure prompt"]:
        values = metric(logits, answers, wrong), accuracy(logits, answers, wrong), kl_divergence(base, logits)
        return torch.stack([value.float().cpu() for value in values])

    return read


def _site_of(model: Model, head: str, part: Part) -> tuple[Site, int]:
    """Where a head's vectors are, and its index there."""
    if part not in PARTS:
        raise ValueError(f"part={part!r}; it is one of {', '.join(PARTS)}")
    writer = Writer.parse(head)
    if writer.head is None:
        raise ValueError(f"{head!r} is not a head; heads are called 'L9H6'")
    writer.check(model)
    return Site(part, writer.layer), writer.head * model.n_heads_at(part) // model.n_heads


def _names_known(task: Task, positions: Sequence[str] | None) -> Sequence[str] | None:
    for name in positions or ():
        if name not in task.positions:
            raise ValueError(f"{name!r} is not a key position of {task.name!r}; it has {', '.join(task.positions)}")
    return positions


def _batches(
    task: Task, part: Part, positions: Sequence[str] | None, batch_size: int | None
) -> list[tuple[Task, Bool[Tensor, "prompt pos"]]]:
    """Prompts by length and batch, with the places that vectors are taken from."""
    _names_known(task, positions)
    found = []
    for group in task.by_length():
        length = group.clean.shape[1]
        for rows in batches(len(group), length, batch_size):
            prompts = group[rows]
            where = torch.full((len(prompts), length), positions is None and part != "q")
            if positions is None and part == "q":
                where[:, -1] = True
            for name in positions or ():
                where[torch.arange(len(prompts)), prompts.positions[name]] = True
            found.append((prompts, where))
    return found
