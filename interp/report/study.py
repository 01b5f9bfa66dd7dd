"""The numbers behind a report on heads, as one Dataset: computed here, drawn elsewhere, saved and read back between.

Everything is exact: whole forward passes with one activation replaced. What is run, in this order, and what it costs in
forward passes of one prompt (L layers, H heads, G key/value heads):

1. behaviour: every prompt of the task, clean and corrupted;
2. features, if an SAE is given: 64 texts of 128 tokens, five times 16 of them, and about 16 a prompt;
3. logit lens and direct effects: one or two a prompt;
4. heads: 3 L H a prompt for zero, mean and resample ablation, and scores of attention;
5. values and patterns: L G + L H a prompt;
6. positions: 3 L a prompt and position, from the first token that differs;
7. top heads: attention pattern and output of a few heads on one prompt;
8. backup: direct effects once more, with the strongest writer ablated;
9. circuit, if asked for: what its method costs, and 22 circuits to test it;
10. sinks, if asked for: 50 texts of 64 tokens, ten times 16 of them, and one a prompt;
11. vision, where prompts have images: three a prompt, and one for the maps of each of a few prompts.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr

from interp.heads import direct_logit_attribution, logit_lens, pattern, table
from interp.heads.norms import linear_norm
from interp.metrics import bootstrap_interval
from interp.model import Edit, Model, Site
from interp.patching import activation_patching
from interp.report.circuit_section import circuit_variables
from interp.report.figures import head_label
from interp.report.machine import describe_run
from interp.report.measures import extreme_heads
from interp.report.resume import Parts, fingerprint
from interp.report.sae_study import check_features, sae_choices, sae_variables
from interp.report.sink_study import calibration_texts, sink_variables
from interp.report.vision_study import has_images, vision_variables
from interp.saes import SAE
from interp.tasks import Task, accuracy

logger = logging.getLogger(__name__)

Variables = dict[str, Any]
"""Name -> DataArray, or (dims, values)."""

WRITTEN_TOKENS = 5
ROWS = 32
TOP_FOR, TOP_AGAINST = 4, 2


def head_study(
    model: Model,
    task: Task,
    *,
    n_interventions: int = 6,
    n_maps: int = 4,
    n_direct: int = 32,
    seed: int = 0,
    circuit: str | None = None,
    sinks: bool = False,
    sae: SAE | None = None,
    features: int | Sequence[int] | None = None,
    n_features: int = 4,
    command: str = "",
    keep_parts: Path | None = None,
    progress: bool | None = None,
) -> xr.Dataset:
    """Which heads matter for a behaviour, and what they do.

    SmolLM2-135M with the default sizes takes about three minutes on two CPU cores, nearly all of it in parts 4 and 5.

    Args:
        model: the model.
        task: the behaviour; accuracy and metric are measured on all of its prompts.
        n_interventions: prompts for the ablation of every head.
        n_maps: prompts for the layer × position maps, and for value and pattern patches; they share their positions.
        n_direct: prompts for logit lens and direct logit attribution.
        seed: of bootstrap intervals and of the random tokens that attention is scored on.
        circuit: find a circuit by this method, or take it from this .json file, and test it; None: no circuit.
        sinks: look at attention sinks too, on natural text and on the task's prompts.
        sae: look at the features of this SAE too: which matter for the task, which lie in which head.
        features: which of them to show in full; None: those of largest effect on the task.
        n_features: how many, if none are named.
        command: how the study was asked for, kept in its attrs.
        keep_parts: a folder for finished parts: the same call takes them from there instead of computing them again.
        progress: show progress bars; None: in a terminal or notebook only.

    Returns:
        Dataset over layer, head, position, prompt ...; attrs of a variable say on how many prompts it was measured,
        those of the Dataset how it was made.

    Raises:
        ValueError: if the task has fewer than two prompts, since no interval can be given; if the SAE does not fit the
            model, or a feature is out of range.
    """
    if len(task) < 2:
        raise ValueError(f"a report needs at least 2 prompts for its intervals; the task {task.name!r} has {len(task)}")
    if sae is not None:
        check_features(model, sae, features, n_features)
    few, direct = aligned_prompts(task, n_interventions), aligned_prompts(task, n_direct)
    maps = few[:n_maps]
    found = xr.Dataset()
    parts: dict[str, Callable[[], Variables]] = {"behaviour": lambda: _behaviour(model, task)}
    if sae is not None:
        # So early because a model without relevance rules refuses here, and not after minutes.
        parts["features"] = lambda: sae_variables(
            model, direct, sae, features=features, n_features=n_features, seed=seed, progress=progress
        )
    parts |= {
        "logit lens": lambda: _depth(model, few, seed),
        "layers": lambda: _layers(model, direct),
        "heads": lambda: _head_table(model, few, seed, progress),
        "values and patterns": lambda: _values_and_patterns(model, maps, seed, progress),
        "positions": lambda: _position_maps(model, maps, seed, progress),
        "top heads": lambda: _top_heads(model, task, found["importance_resample"]),
        "backup": lambda: _backup(model, direct, found["direct"]),
    }
    if bool((task.wrong < 0).all(-1).any()):
        # Direct effects split logit(answer) − logit(wrong), and this task names no wrong answer.
        parts = {name: compute for name, compute in parts.items() if name not in ("layers", "backup")}
    if circuit is not None:
        parts["circuit"] = lambda: circuit_variables(model, direct, circuit, seed=seed, progress=progress)
    if sinks:
        parts["sinks"] = lambda: _sinks(model, direct, seed, progress)
    if has_images(model, task):
        parts["vision"] = lambda: vision_variables(model, few, found["importance_resample"], progress=progress)
    sizes: dict[str, Any] = {
        "n_interventions": n_interventions,
        "n_maps": n_maps,
        "n_direct": n_direct,
        "seed": seed,
    }
    sizes |= {} if circuit is None else {"circuit": circuit}
    sizes |= {} if sae is None else sae_choices(sae, features, n_features)
    kept = Parts(keep_parts, fingerprint(model, task, sizes))
    seconds: dict[str, float] = {}
    for name, compute in parts.items():
        started = time.perf_counter()
        part = kept.get(name, lambda compute=compute: xr.Dataset(compute()))  # type: ignore[misc]
        found = found.merge(part, compat="identical", join="outer")
        seconds[name] = round(time.perf_counter() - started, 2)
        logger.info("%s: %.1f s", name, seconds[name])
    return found.assign_attrs(
        describe_run(model, task),
        study_seed=seed,
        command=command,
        seconds=json.dumps(seconds),
        top_prompt=task.clean_text[0],
    )


def aligned_prompts(task: Task, n: int) -> Task:
    """Up to n prompts whose key positions stand at the same places, so that a position axis means one thing.

    The places may be taken in another order (the two names of an IOI prompt).
    """
    alignment = [
        (len(ids), *sorted(int(where[row]) for where in task.positions.values()))
        for row, ids in enumerate(task.clean_ids)
    ]
    most, _ = Counter(alignment).most_common(1)[0]
    return task[[row for row, one in enumerate(alignment) if one == most][:n]]


def with_interval(name: str, per_prompt: xr.DataArray, seed: int) -> Variables:
    """The mean over the `prompt` axis, with its 95% bootstrap interval as `name_low` and `name_high`."""
    axis = per_prompt.get_axis_num("prompt")
    low, high = bootstrap_interval(per_prompt.values, seed=seed, axis=axis)
    mean = per_prompt.mean("prompt", keep_attrs=True)
    mean.attrs["n_prompts"] = per_prompt.sizes["prompt"]
    mean = mean.drop_vars([one for one in mean.coords if one not in mean.dims and one not in ("token", "label")])
    return {name: mean, f"{name}_low": mean.copy(data=low), f"{name}_high": mean.copy(data=high)}


def _behaviour(model: Model, task: Task) -> Variables:
    """Metric and accuracy of each prompt, and what the model says."""
    measured = accuracy(model, task)
    rows = [list(ids) for ids in task.clean_ids]
    batches = [rows[start : start + ROWS] for start in range(0, len(rows), ROWS)]
    logits = torch.cat([model(batch, logits_to_keep=1)[:, -1].float().cpu() for batch in batches])
    answers = torch.where(task.answers >= 0, task.answers, 0)
    probabilities = logits.softmax(-1).gather(1, answers).where(task.answers >= 0, 0.0).sum(1)
    texts = {
        "clean_text": list(task.clean_text),
        "corrupted_text": list(task.corrupted_text),
        "answer": [_named(model, ids) for ids in task.answers.tolist()],
        "wrong": [_named(model, ids) for ids in task.wrong.tolist()],
        "predicted": [_named(model, [one]) for one in logits.argmax(-1).tolist()],
    }
    values = {
        "clean_metric": measured["prompt_metric"].sel(run="clean").values,
        "corrupted_metric": measured["prompt_metric"].sel(run="corrupted").values,
        "correct": measured["prompt_accuracy"].sel(run="clean").values,
        "answer_probability": probabilities.numpy(),
    }
    return {name: (("prompt",), column) for name, column in {**texts, **values}.items()}


def _named(model: Model, ids: list[int]) -> str:
    """Answer tokens as text; of many, the first few."""
    tokens = model.to_str_tokens([one for one in ids if one >= 0])
    return " /".join(tokens[:3]) + (" …" if len(tokens) > 3 else "")


def _depth(model: Model, task: Task, seed: int) -> Variables:
    """Logit lens at the last token, by half steps."""
    lens = logit_lens(model, task, per_prompt=True).isel(position=-1, drop=True)
    # The lens counts blocks passed, the rest of the study counts blocks: two axes, not one.
    return with_interval("lens", lens.rename(layer="depth").drop_vars("stage"), seed)


def _layers(model: Model, task: Task) -> Variables:
    """Direct effects of each layer's attention and MLP on the logit difference."""
    added = direct_logit_attribution(model, task, by="layer")
    names = {"effect": "contribution", "low": "contribution_low", "high": "contribution_high"}
    return {new: added[old].assign_attrs(n_prompts=len(task)) for old, new in names.items()}


def _head_table(model: Model, task: Task, seed: int, progress: bool | None) -> Variables:
    """The columns of `interp.heads.table` as [layer, head]."""
    frame = table(model, task, seed=seed, progress=progress)
    shape = (model.n_layers, model.n_heads)
    about = {"n_prompts": len(task), "roles_by": frame.attrs["roles_by"]}
    return {
        str(name): xr.DataArray(frame[name].to_numpy().reshape(shape), dims=("layer", "head"), attrs=about)
        for name in frame.columns.drop(["layer", "head"])
    }


def _values_and_patterns(model: Model, task: Task, seed: int, progress: bool | None) -> Variables:
    """Effect of replacing values, or attention patterns, by those on the corrupted prompt; in the metric's units."""

    def patch(site: str) -> xr.DataArray:
        return activation_patching(
            model, task, site=site, by=("layer", "head"), direction="noise", normalised=False, per_prompt=True,
            progress=progress,
        )  # fmt: skip

    value = patch("v").rename(head="kv_head")
    return {**with_interval("patch_value", value, seed), **with_interval("patch_pattern", patch("pattern"), seed)}


def _position_maps(model: Model, task: Task, seed: int, progress: bool | None) -> Variables:
    """Share of the gap that denoising restores, by layer and position."""
    found: Variables = {}
    for site in ("resid_pre", "attn_out", "mlp_out"):
        effects = activation_patching(
            model, task, site=site, by=("layer", "position"), direction="denoise", per_prompt=True, progress=progress
        )
        found |= with_interval(f"patch_{site}", effects, seed)
    return found


def _top_heads(model: Model, task: Task, effects: xr.DataArray) -> Variables:
    """Pattern and written tokens of the heads that matter most, on the first prompt."""
    chosen = extreme_heads(effects, TOP_FOR, TOP_AGAINST)
    ids = torch.tensor([task.clean_ids[0]])
    layers, heads = (sorted(set(indices)) for indices in zip(*chosen, strict=True))
    patterns = pattern(model, ids, layers, heads)
    written = [written_tokens(model, ids, layer, head) for layer, head in chosen]
    labels = [head_label(layer, head) for layer, head in chosen]
    axes = {one: patterns.coords[one] for one in ("query", "key", "query_token", "key_token")}
    maps = np.stack([patterns.sel(layer=layer, head=head).values for layer, head in chosen])
    stacked = xr.DataArray(maps, dims=("top", "query", "key"), coords=axes)
    return {
        "top_pattern": stacked.assign_coords(top=labels),
        "top_layer": (("top",), [layer for layer, _ in chosen]),
        "top_head": (("top",), [head for _, head in chosen]),
        "top_writes": (("top", "rank"), [highest for highest, _ in written]),
        "top_erases": (("top", "rank"), [lowest for _, lowest in written]),
    }


@torch.no_grad()
def written_tokens(model: Model, ids: torch.Tensor, layer: int, head: int) -> tuple[list[str], list[str]]:
    """The tokens whose logits a head's output at the last position raises most, and those it lowers most.

    The output goes through the final norm with the scale it has in this run, then through the unembedding; relative to
    the mean over the vocabulary.
    """
    final = Site("resid_post", model.n_layers - 1)
    _, cache = model.run_with_cache(ids, [Site("z", layer), final], positions=[-1], logits_to_keep=1)
    output = cache["z", layer][0, 0, head].float() @ model.weights.of_block("W_O", layer)[head].float()
    norm = linear_norm(model.tower.ln_final, model.d_model, model.device)
    written = norm.apply(output) * norm.inverse_scale(cache[final][0, 0].float())
    logits = written @ model.W_U.float()
    highest, lowest = (logits.topk(WRITTEN_TOKENS, largest=largest).indices.tolist() for largest in (True, False))
    return model.to_str_tokens(highest), model.to_str_tokens(lowest)


def _backup(model: Model, task: Task, direct: xr.DataArray) -> Variables:
    """Direct effects of all heads, before and after the strongest writer's output is that of the corrupted prompts."""
    layer, head = extreme_heads(direct, 1, 0)[0]
    site = Site("z", layer)
    _, cache = model.run_with_cache(task.corrupted, site, logits_to_keep=1)
    before = direct_logit_attribution(model, task, batch_size=len(task))
    with model.edited(Edit(site, heads=[head], value=cache[site])):
        after = direct_logit_attribution(model, task, batch_size=len(task))
    return {
        f"direct_{when}": measured["effect"].assign_attrs(n_prompts=len(task), ablated=head_label(layer, head))
        for when, measured in (("before", before), ("after", after))
    }


def _sinks(model: Model, task: Task, seed: int, progress: bool | None) -> Variables:
    """Attention sinks on natural text, and on the task."""
    texts, source = calibration_texts(model, task, seed)
    return sink_variables(model, texts, source=source, task=task, seed=seed, progress=progress)
