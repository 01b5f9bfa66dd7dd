"""Multiple choice: which nodes write the answer's letter, and how output heads choose among the letters.

1. `answer_attribution`: the direct effect of every node on the logit of each letter, centred over the letters.
2. `letter_attention`: how much every head attends from the last token to the label of each letter.
3. `output_roles`: from both, what kind of output head each is.

Then `interp.circuits.output_nodes` holds direct against total effects and patches output nodes together, and
`interp.circuits.low_rank` asks how few dimensions a head's queries, keys and values need.

Source: Lieberum et al. 2023, Does circuit analysis interpretability scale? (arXiv 2307.09458). The task is
`interp.tasks.mcqa`; any task whose prompts share one set of possible answers will do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor

from interp.circuits.graph import Graph
from interp.heads.direct import Terms, logit_terms
from interp.metrics import PADDING, bootstrap_interval
from interp.model import Model, Site
from interp.model.hooks import Run, Tap, tapped
from interp.patching.batching import batches
from interp.patching.labels import provenance
from interp.patching.progress import progress_bar
from interp.tasks import Task

LABELS = ("LABEL1", "LABEL2", "LABEL3", "LABEL4")
"""Where the labels of `interp.tasks.mcqa` stand."""
ON_LABELS = 0.5
"""Share of a head's output at the last token that has to come from labels, for a role by attention."""
ON_ONE = 0.5
"""Share of the attention to labels that has to go to one, above chance: 0 = as to the others, 1 = all."""
EVENNESS = 0.9
"""Entropy of the attention to labels, as a share of the largest possible, of a uniform head. All three are ours."""


# What is written


def answer_attribution(
    model: Model, task: Task, *, batch_size: int | None = None, progress: bool | None = None
) -> xr.Dataset:
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
        progress: show a progress bar; None: in a terminal or notebook only.

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
    effects, totals = [], []
    with progress_bar(len(answers), "attribution to answers", "answer", progress=progress) as bar:
        for column, answer in enumerate(answers.tolist()):
            others = torch.cat([answers[:column], answers[column + 1 :]]).expand(len(task), -1).clone()
            asked = replace(task, answers=torch.full((len(task), 1), answer), wrong=others)
            terms = logit_terms(model, asked, batch_size=batch_size)
            effects.append(_by_node(terms))
            totals.append(terms.total)
            bar.update()
    # logit − mean of the others is n / (n − 1) times logit − mean of all.
    centring = (len(answers) - 1) / len(answers)
    effect, total = (torch.stack(several, dim=-1) * centring for several in (effects, totals))
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


def _possible_answers(task: Task) -> tuple[Int[Tensor, " answer"], Int[Tensor, " prompt"]]:
    """(ids of the possible answers, which of them is right in each prompt)."""
    rows = [set(ids) - {PADDING} for ids in torch.cat([task.answers, task.wrong], dim=1).tolist()]
    for row, ids in enumerate(rows):
        if ids != rows[0]:
            raise ValueError(
                f"prompt {row} has the possible answers {sorted(ids)}, prompt 0 {sorted(rows[0])}: a comparison of "
                "answers takes a task such as mcqa, where right and wrong answers together are one set"
            )
    answers = torch.tensor(sorted(rows[0]))
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
    texts = model.to_str_tokens(answers)
    bare = [text.strip() or text for text in texts]
    return bare if len(set(bare)) == len(bare) else texts


# What is attended to


@torch.no_grad()
def letter_attention(
    model: Model,
    task: Task,
    *,
    labels: Sequence[str] = LABELS,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> xr.Dataset:
    """Attention of every head from the last token to the label of each possible answer.

    `value_weighted` is the share of what a head writes: attention times the length of what the head makes of the value
    there (W_O included, a post-norm and output bias not), over the sum of that over all positions; so a sink, to which
    much attention goes and which writes little, counts for little. Costs one forward pass a prompt; holds one layer's
    patterns at a time.

    Args:
        model: the model.
        task: its clean prompts; in each, every possible answer is the token (or the text) of one label.
        labels: key positions of the task at which the labels stand.
        batch_size: prompts a forward pass; by default about a thousand tokens' worth.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        Dataset [prompt, node, answer] of `attention` and `value_weighted`, of heads; NaN where a head writes nothing.
        Coordinate `right` [prompt]: the right answer.

    Raises:
        ValueError: for an unknown key position, labels that are not the possible answers, and as `answer_attribution`.
        SiteUnavailable: if the attention of this family cannot be read.
    """
    started = time.perf_counter()
    answers, right = _possible_answers(task)
    names = _names(model, answers)
    columns = _answers_at(task, labels, answers, names)
    where = torch.stack([task.positions[label] for label in labels], dim=1)
    found = torch.empty(2, len(task), model.n_layers, model.n_heads, len(answers))
    with progress_bar(len(task), "attention to labels", "prompt", progress=progress) as bar:
        for group in task.by_length():
            for rows in batches(len(group), group.clean.shape[1], batch_size):
                prompts = group.index[rows]
                seen = _attention_at(model, group.clean[rows], where[prompts])
                to = columns[prompts][:, None, None].expand(seen.shape[1:])
                found[:, prompts] = torch.zeros_like(seen).scatter(-1, to.expand(seen.shape), seen)
                bar.update(len(prompts))
    dims = ("prompt", "node", "answer")
    data = {
        name: (dims, one.flatten(1, 2).numpy())
        for name, one in zip(("attention", "value_weighted"), found, strict=True)
    }
    heads = [f"L{layer}H{head}" for layer in range(model.n_layers) for head in range(model.n_heads)]
    return xr.Dataset(
        data,
        coords={
            "prompt": range(len(task)),
            "node": heads,
            "answer": names,
            "right": ("prompt", [names[column] for column in right.tolist()]),
        },
        attrs={
            **provenance(model, task),
            "method": "letter_attention",
            "labels": " ".join(labels),
            "seconds": time.perf_counter() - started,
        },
    ).sortby("answer")


def _answers_at(
    task: Task, labels: Sequence[str], answers: Int[Tensor, " answer"], names: Sequence[str]
) -> Int[Tensor, "prompt label"]:
    """Which possible answer each label is, by its token or else by its text (" A" where "A" is the label)."""
    for label in labels:
        if label not in task.positions:
            raise ValueError(f"{label!r} is not a key position of {task.name!r}; it has {', '.join(task.positions)}")
    by_id = {token: column for column, token in enumerate(answers.tolist())}
    by_text = {name.strip(): column for column, name in enumerate(names)}
    rows = []
    for row, (ids, texts) in enumerate(zip(task.clean_ids, task.str_tokens, strict=True)):
        places = [int(task.positions[label][row]) for label in labels]
        found = [by_id.get(ids[place], by_text.get(texts[place].strip(), -1)) for place in places]
        if sorted(found) != list(range(len(answers))):
            stand = ", ".join(repr(texts[place]) for place in places)
            raise ValueError(f"prompt {row}: the labels are {stand}; each of {', '.join(names)} has to be one of them")
        rows.append(found)
    return torch.tensor(rows)


def _attention_at(
    model: Model, tokens: Int[Tensor, "prompt pos"], where: Int[Tensor, "prompt label"]
) -> Float[Tensor, "2 prompt layer head label"]:
    """Attention from the last token, plain and value-weighted, to some positions of each prompt."""
    found: list[Tensor] = []
    lengths: dict[int, Tensor] = {}

    def see_value(value: Tensor, run: Run, layer: int) -> None:
        lengths[layer] = _lengths_written(model, layer, value.float())

    def see_pattern(pattern: Tensor, run: Run, layer: int) -> None:
        plain = pattern[:, :, -1].float()
        weighted = plain * lengths.pop(layer).to(plain.device)
        weighted = weighted / weighted.sum(-1, keepdim=True)
        places = where[:, None].expand(-1, plain.shape[1], -1).to(plain.device)
        found.append(torch.stack([one.gather(-1, places) for one in (plain, weighted)]).cpu())

    def at(layer: int, see: Callable[[Tensor, Run, int], None]) -> Callable[[Tensor, Run], None]:
        return lambda activation, run: see(activation, run, layer)

    sites = (("v", see_value), ("pattern", see_pattern))
    taps = [Tap(Site(kind, layer), at(layer, see)) for layer in range(model.n_layers) for kind, see in sites]
    with tapped(model.anatomy, taps):
        model.last_logits(tokens)
    return torch.stack(found, dim=2)


def _lengths_written(
    model: Model, layer: int, value: Float[Tensor, "prompt pos kv_head d_head"]
) -> Float[Tensor, "prompt head pos"]:
    """The length of what each head makes of each value: ‖v W_O‖."""
    W_O = model.weights.of_block("W_O", layer).to(value.device).float()
    by_head = value.repeat_interleave(model.n_heads // model.n_kv_heads, dim=2)
    squares = torch.einsum("pthd,hde,pthe->pht", by_head, W_O @ W_O.mT, by_head)
    return squares.clamp_min(0).sqrt()


# Both together


def output_roles(attribution: xr.Dataset, attention: xr.Dataset) -> xr.Dataset:
    """What kind of output head each head is: by where it looks among the labels, and what it writes.

    | role | attention from the last token (value-weighted) | writes |
    |---|---|---|
    | correct letter | to labels; among these to that of the right answer | for it |
    | single letter | to labels; among these to one and the same, also where another is right | |
    | uniform | to labels, to all alike | |
    | amplification | elsewhere, such as to the last token itself | for the right answer |

    "For it" means that the 95% interval of the direct effect on the right answer lies above 0. What is none of these is
    "". Take those heads that are output nodes (`interp.circuits.output_nodes`): a head far from the output has
    a pattern, too.

    Args:
        attribution: what `answer_attribution` returned.
        attention: what `letter_attention` returned on the same task.

    Returns:
        Dataset over [node], the heads of `attention`: `role`; `on_labels`, the share of a head's output that comes from
        labels; of the attention to labels, `to_right`, the share that the right one gets (mean over answers, so that
        one that is right more often counts no more), `to_one`, the largest share that one label gets where another is
        right, and `one`, which that is; `evenness`, its entropy as a share of the largest possible; `on_right` with
        `low` and `high`, as in `answer_attribution`. NaN for heads that write nothing.

    Raises:
        ValueError: if the two are of different prompts or answers, or the same answer is right in all prompts.
    """
    for name in ("prompt", "answer", "right"):
        if not np.array_equal(attribution[name].values, attention[name].values):
            raise ValueError(f"attribution and attention differ in {name!r}: run both on one task")
    answers = attention["answer"].values
    is_right = attention["right"].values[:, None] == answers
    if int(is_right.any(0).sum()) < 2:
        raise ValueError("the same answer is right in all prompts: a head that looks at it may look there always")
    share = attention["value_weighted"].transpose("prompt", "node", "answer").values.astype(np.float64)
    among, on_labels = _among_labels(share), share.sum(-1).mean(0)
    to_right = _mean_where(among, is_right)[:, is_right.any(0)].mean(-1)
    elsewhere = _mean_where(among, ~is_right)
    to_one = elsewhere.max(-1)
    written = attribution.sel(node=attention["node"].values)
    entropy = -(among * np.log(np.where(among > 0, among, 1.0))).sum(-1).mean(0)
    found = {
        "on_labels": on_labels,
        "to_right": to_right,
        "to_one": to_one,
        "one": np.where(np.isnan(to_one), "", answers[elsewhere.argmax(-1)]),
        "evenness": entropy / np.log(len(answers)),
        **{name: written[name].values for name in ("on_right", "low", "high")},
    }
    found["role"] = _role(found, chance=1 / len(answers))
    attrs = {name: value for name, value in attention.attrs.items() if name not in ("seconds", "method")}
    thresholds = {"threshold_on_labels": ON_LABELS, "threshold_on_one": ON_ONE, "threshold_evenness": EVENNESS}
    return xr.Dataset(
        {name: ("node", values) for name, values in found.items()},
        coords={"node": attention["node"].values},
        attrs={**attrs, "method": "output_roles", **thresholds},
    )


def _among_labels(share: Float[ndarray, "prompt node answer"]) -> Float[ndarray, "prompt node answer"]:
    """Attention to labels as shares of their sum; NaN where there is none."""
    total = share.sum(-1, keepdims=True)
    return np.divide(share, total, out=np.full_like(share, np.nan), where=total > 0)


def _mean_where(
    values: Float[ndarray, "prompt node answer"], chosen: Bool[ndarray, "prompt answer"]
) -> Float[ndarray, "node answer"]:
    """Mean over the prompts chosen for each answer; NaN for an answer without any."""
    count = chosen.sum(0)
    total = (values * chosen[:, None]).sum(0)
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)


def _role(found: dict[str, ndarray], *, chance: float) -> ndarray:
    at_labels, writes_for = found["on_labels"] >= ON_LABELS, found["low"] > 0
    on_one = chance + ON_ONE * (1 - chance)
    held = {
        "correct letter": at_labels & (found["to_right"] >= on_one) & writes_for,
        "single letter": at_labels & (found["to_one"] >= on_one),
        "uniform": at_labels & (found["evenness"] >= EVENNESS),
        "amplification": (found["on_labels"] < ON_LABELS) & writes_for,
    }
    return np.select(list(held.values()), list(held), default="")
