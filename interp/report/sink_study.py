"""The numbers behind the section on sinks: measured here, drawn by `sink_section`, kept in the study between.

Massive activations, sink rates, keys, values and dormant heads are of running text, since a task's prompts are short
and alike; what the first token receives on the task's prompts stands beside them.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Int
from torch import Tensor

from interp.heads import attention_received
from interp.metrics import bootstrap_interval
from interp.model import Model, SiteUnavailable
from interp.sinks import (
    dormant_heads,
    intervene,
    mask,
    massive_activations,
    rates,
    sink_checks,
    sink_dimensions,
    sink_rate,
)
from interp.sinks.dimensions import CALIBRATION_LENGTH, MIN_SEQUENCES
from interp.sinks.rate import EPSILON
from interp.tasks import Task
from interp.tasks.corpus import natural_text

Variables = dict[str, Any]
"""Name -> DataArray, or (dims, values)."""

Texts = Int[Tensor, "text pos"]

FEW = 16
"""Texts for what costs more than looking for the sink dimensions."""
MOST_UNKNOWN = 0.1
NATURAL_TEXT = "natural text (docstrings of installed packages)"


def sink_variables(
    model: Model,
    texts: Texts,
    *,
    source: str,
    task: Task | None = None,
    few: int = FEW,
    epsilon: float = EPSILON,
    seed: int = 0,
    progress: bool | None = None,
) -> Variables:
    """Everything that is said of a model's sinks, as variables of a study.

    Where a family's attention cannot be read, what needs it is left out, and the attr `unreadable` of `sink_dimensions`
    says why. Costs one forward pass of all texts, five of the few, five of 16 for the intervention, and one of
    the task's prompts.

    Args:
        model: the model.
        texts: token ids of running text.
        source: what the texts are, for the reader.
        task: prompts of one length, to see what their first token receives; None: no such part.
        few: how many texts to measure all but the sink dimensions on.
        epsilon: a position is a sink of a head if it receives more than this.
        seed: of the random dimensions of an intervention, and of intervals.
        progress: show progress bars; None: in a terminal or notebook only.
    """
    dimensions = sink_dimensions(model, texts, min_sequences=1, progress=progress)
    some = texts[:few]
    massive = massive_activations(model, some, progress=progress)
    found = _lives(massive) | _intervention(model, some[:FEW], dimensions, massive, seed, progress)
    about: dict[str, Any] = {
        "source": source,
        "n_texts": len(texts),
        "n_few": len(some),
        "length": texts.shape[1],
        "epsilon": epsilon,
        "threshold": dimensions.attrs["threshold"],
        "ratio": dimensions.attrs["ratio"],
    }
    try:
        found |= _attention(model, some, dimensions, epsilon, progress)
        if task is not None:
            found |= _on_task(model, task, epsilon, progress)
    except SiteUnavailable as reason:
        about["unreadable"] = str(reason)
    return found | {
        "sink_dimensions": (("sink_rank",), dimensions.values, about),
        "sink_layer_share": (("sink_rank",), dimensions["layer_share"].values),
    }


def calibration_texts(
    model: Model, task: Task, seed: int, *, n: int = MIN_SEQUENCES, length: int = CALIBRATION_LENGTH
) -> tuple[Texts, str]:
    """(texts, what they are): natural text, or the task's own prompts for a model that cannot read it.

    Args:
        model: the model.
        task: prompts of one length.
        seed: which passages.
        n: texts.
        length: tokens a text, at most.
    """
    length = min(length, int(getattr(model.tower.config, "max_position_embeddings", length)))
    texts = _readable(model, n, length, seed)
    return (task.clean, "the task's prompts") if texts is None else (texts, NATURAL_TEXT)


def _readable(model: Model, n: int, length: int, seed: int) -> Texts | None:
    """Natural text, unless it is beyond the model's vocabulary."""
    try:
        texts = natural_text(model, n, length, seed)
    except ValueError:
        return None
    unknown = getattr(model.tokenizer, "unk_token_id", None)
    return None if unknown is not None and (texts == unknown).float().mean() > MOST_UNKNOWN else texts


def _lives(massive: xr.Dataset) -> Variables:
    """Massive dimensions over layers, and the spans in which they live."""
    at_first = (massive["position"].sel(rank=0) == 0).mean("prompt")
    return {
        "sink_peak": (
            ("layer", "massive_dimension"),
            massive["peak"].values,
            {"n_prompts": massive.attrs["n_prompts"]},
        ),
        "massive_dimension": (("massive_dimension",), massive["massive_dimension"].values),
        "sink_median": (("layer",), massive["median_size"].mean("prompt").values),
        "sink_at_first": (("layer",), at_first.values),
        "sink_span_dimension": (("sink_span",), massive["span_dimension"].values),
        "sink_born": (("sink_span",), massive["born"].values),
        "sink_erased": (("sink_span",), massive["erased"].values),
    }


def _intervention(
    model: Model, texts: Texts, dimensions: xr.DataArray, massive: xr.Dataset, seed: int, progress: bool | None
) -> Variables:
    """Perplexity with the sink dimensions overwritten in the first layer of the span in which they are largest."""
    chosen = [int(one) for one in dimensions.values]
    place = largest_birth(massive, chosen)
    if place is None:
        return {}
    layer, position = place
    done = intervene(model, texts, chosen, layer, positions=[position], seed=seed, progress=progress)
    low, high = bootstrap_interval(done["nll"].values, seed=seed, axis=1)
    about = {
        "layer": layer,
        "position": position,
        "n_prompts": len(texts),
        "dimensions": json.dumps(chosen),
        "random_dimensions": json.dumps(done.attrs["random_dimensions"]),
    }
    return {
        "sink_perplexity": done["perplexity"].assign_attrs(about),
        "sink_perplexity_low": (("intervention",), np.exp(low)),
        "sink_perplexity_high": (("intervention",), np.exp(high)),
    }


def largest_birth(massive: xr.Dataset, dimensions: list[int]) -> tuple[int, int] | None:
    """(layer, position) where the largest of some dimensions is born, and of the token that it most often stands at.

    Args:
        massive: what `massive_activations` returned.
        dimensions: which; None is returned if none of them ever lives.
    """
    lives = [
        (float(massive["peak"].sel(massive_dimension=dimension)[int(born) :][: _length(born, erased)].max()), int(born))
        for dimension, born, erased in zip(
            massive["span_dimension"].values.tolist(),
            massive["born"].values.tolist(),
            massive["erased"].values.tolist(),
            strict=True,
        )
        if dimension in dimensions
    ]
    if not lives:
        return None
    layer = max(lives)[1]
    position = np.bincount(massive["position"].sel(layer=layer, rank=0).values).argmax()
    return layer, int(position)


def _length(born: float, erased: float) -> int | None:
    return None if np.isnan(erased) else int(erased - born)


def _attention(
    model: Model, texts: Texts, dimensions: xr.DataArray, epsilon: float, progress: bool | None
) -> Variables:
    """Sink rates, hidden sinks, keys and values of sinks, and dormant heads."""
    rate = sink_rate(model, texts, epsilon=epsilon, progress=progress)
    # Without a sink dimension no token stands out, and the first one is looked at.
    where = mask(model, texts, dimensions=dimensions, progress=progress) if len(dimensions) else None
    checks = sink_checks(model, texts, sinks=where, progress=progress)
    dormant = dormant_heads(model, texts, sinks=where, progress=progress)
    counted = {"n_prompts": len(texts), "sinks": "the first token" if where is None else "sink tokens"}
    by_head = {
        "sink_rate": rate["rate_by_head"].isel(position=0),
        "sink_hidden": rate["hidden_sinks"],
        "sink_mass": dormant["sink_mass"],
        "sink_output_norm": dormant["output_norm"],
        "sink_rests": dormant["rests_on_sinks"],
        "sink_writes_little": dormant["writes_little"],
        "sink_dormant": dormant["dormant"],
        "sink_cosine": checks["sink_cosine"],
        "sink_other_cosine": checks["other_cosine"],
    }
    by_kv_head = {f"sink_{one}": checks[one] for one in ("value_norm_ratio", "key_norm_ratio")}
    return {
        **{name: (("layer", "head"), values.values, counted) for name, values in by_head.items()},
        **{name: (("layer", "kv_head"), values.values, counted) for name, values in by_kv_head.items()},
        "sink_rate_by_layer": (("layer",), rate["rate_by_layer"].isel(position=0).values, counted),
        "sink_rate_by_position": (("sink_position",), rate["rate"].values, counted),
    }


def _on_task(model: Model, task: Task, epsilon: float, progress: bool | None) -> Variables:
    """Attention received on the task's prompts: by the first token of every head, by every token of every layer."""
    received = attention_received(model, task.clean, progress=progress)
    first = rates(received, epsilon=epsilon)["rate_by_layer"].isel(position=0)
    counted = {"n_prompts": len(task)}
    return {
        "sink_task_received": (("layer", "head"), received.isel(position=0).mean("prompt").values, counted),
        "sink_task_by_position": (("layer", "sink_task_position"), received.mean(("head", "prompt")).values, counted),
        "sink_task_label": (("sink_task_position",), _labels(model, task)),
        "sink_task_rate": (("layer",), first.values, counted),
    }


def _labels(model: Model, task: Task) -> list[str]:
    """What stands at each position; a piece of an image by its place in the first prompt's."""
    pieces = model.images.labels(task.clean[0].tolist())
    return [pieces.get(position, label) for position, label in enumerate(task.position_labels)]


def texts_of(model: Model, text: str, n_texts: int, length: int) -> Texts:
    """The first tokens of a text as rows of one length, each from where the last one ended.

    A row begins with the BOS, if the model's tokenizer adds one.

    Raises:
        ValueError: if the text is shorter than one row.
    """
    ids = model.to_tokens(text)[0]
    bos = ids[:1] if len(ids) and int(ids[0]) == getattr(model.tokenizer, "bos_token_id", None) else ids[:0]
    body, width = ids[len(bos) :], length - len(bos)
    n_rows = min(n_texts, len(body) // width)
    if n_rows < 1:
        raise ValueError(f"the text has {len(ids)} tokens; give {length} at least, or a smaller length")
    return torch.cat([bos.expand(n_rows, -1), body[: n_rows * width].reshape(n_rows, width)], dim=1)
