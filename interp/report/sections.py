"""The sections of the report on heads, in the order in which the field tells the story of a circuit.

Behaviour -> where the answer appears (logit lens, layers) -> which heads write it -> what they look at -> where the
information is (patching maps) -> which heads matter -> moved by values or by patterns -> kinds of attention -> backup
-> the circuit -> features of an SAE -> attention sinks -> what heads see in images -> do the measures agree -> all
heads -> how it was made. Each function takes the study (see `study.py`) and only draws.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import xarray as xr

from interp.report import figures
from interp.report.circuit_section import circuit_section
from interp.report.head_sections import (
    agreement,
    all_heads,
    attention_kinds,
    backup,
    direct_effects,
    importance,
    top_heads,
    values_and_patterns,
)
from interp.report.measures import counted, interval, metric_unit, percent
from interp.report.page import Markup, Section, definitions, escaped, joined, paragraph, table, token
from interp.report.page import figures as side_by_side
from interp.report.sae_section import sae_section
from interp.report.sink_section import sink_section
from interp.report.vision_section import vision_section

PROMPTS_SHOWN = 8


def sections(study: xr.Dataset) -> list[Section]:
    """The sections for which the study has the numbers: some models and tasks cannot have all."""
    story: list[tuple[Callable[[xr.Dataset], Section], tuple[str, ...]]] = [
        (behaviour, ("clean_metric",)),
        (depth, ("lens",)),
        (direct_effects, ("direct",)),
        (top_heads, ("top_pattern",)),
        (position_maps, ("patch_resid_pre",)),
        (importance, ("importance_resample",)),
        (values_and_patterns, ("patch_value", "patch_pattern")),
        (attention_kinds, ("induction",)),
        (backup, ("direct_before",)),
        (circuit_section, ("circuit_score",)),
        (sae_section, ("sae_effects",)),
        (sink_section, ("sink_dimensions",)),
        (vision_section, ("vision_divergence",)),
        (agreement, ("importance_resample",)),
        (all_heads, ("importance_resample",)),
        (making, ()),
    ]
    return [section(study) for section, needed in story if all(name in study for name in needed)]


def behaviour(study: xr.Dataset) -> Section:
    """What the prompts ask and how well the model does it."""
    few = study.isel(prompt=slice(PROMPTS_SHOWN))
    columns = {
        "clean prompt": [str(text) for text in few["clean_text"].values],
        "corrupted prompt": [str(text) for text in few["corrupted_text"].values],
        "answer": [token(str(text)) for text in few["answer"].values],
        "wrong": [token(str(text)) for text in few["wrong"].values],
        "model says": [token(str(text)) for text in few["predicted"].values],
        "p(answer)": few["answer_probability"].values.tolist(),
        f"{metric_unit(study)}, clean": few["clean_metric"].values.tolist(),
        f"{metric_unit(study)}, corrupted": few["corrupted_metric"].values.tolist(),
    }
    shown = f"The first {few.sizes['prompt']} of {study.sizes['prompt']} prompt pairs."
    return Section(
        "The behaviour",
        (
            paragraph(f"{study.attrs['description']} Corruption: {study.attrs['corruption']}."),
            table(columns),
            paragraph(f"{shown} The metric is the {metric_unit(study)} at the last token.", kind="caption"),
        ),
    )


def depth(study: xr.Dataset) -> Section:
    """Where along the depth the answer appears: logit lens, and what each layer adds."""
    lens = figures.line_over_depth(
        study["lens"],
        title="Reading the residual stream early: when the answer takes shape",
        unit=metric_unit(study),
        **interval(study, "lens"),
    )
    shown = [
        (
            lens,
            "Logit lens: final norm and unembedding applied to the stream at the last token. "
            f"{counted(study['lens'])}; band: 95% bootstrap interval over prompts.",
        )
    ]
    if "contribution" in study:
        added = figures.layer_lines(
            study["contribution"], title="What each layer adds to the answer directly", unit="logit difference"
        )
        caption = (
            "Direct effect of each layer's attention and MLP on the logit difference, with the final norm's scale "
            f"frozen. {counted(study['contribution'])}."
        )
        shown.append((added, caption))
    return Section("Where the answer appears", (side_by_side(shown, least=420),))


def position_maps(study: xr.Dataset) -> Section:
    """Layer by position maps of denoising the residual stream, attention outputs and MLP outputs."""
    shown = []
    for name, title in (
        ("patch_resid_pre", "Residual stream: where the information is"),
        ("patch_attn_out", "Attention outputs: which layers move it"),
        ("patch_mlp_out", "MLP outputs: which layers compute on it"),
    ):
        values = study[name]
        where = np.unravel_index(int(np.nanargmax(np.abs(values.values))), values.shape)
        peak = f"Largest at layer {where[0]}, "
        label = str(values["label"].values[where[1]])
        figure = figures.layer_position_heatmap(
            values, title=title, unit="share of the gap restored", **interval(study, name)
        )
        share = f": {percent(float(values.values[where]))} of the gap. {counted(values)}."
        shown.append((figure, joined([peak, token(label), share])))
    return Section(
        "Where the information is",
        (
            paragraph(
                "Denoising: in a run on the corrupted prompt, one activation is replaced by that of the clean prompt. "
                "1 restores the behaviour in full, 0 does nothing, below 0 makes it worse. Patches before the first "
                "token in which the prompts differ change nothing and are 0 exactly. Where prompts have different "
                "words at a position, its name (S1, S2 ...) stands in their place."
            ),
            side_by_side(shown),
        ),
    )


def making(study: xr.Dataset) -> Section:
    """What it took: sizes, versions, seconds."""
    seconds = json.loads(study.attrs["seconds"])
    entries = {
        "command": Markup(f"<code>{escaped(study.attrs['command'])}</code>"),
        "model": "{model}: {architecture}, {model_dtype} on {device}".format(**study.attrs),
        "task": "{task}, seed {seed}, {prompts} prompt pairs".format(prompts=study.sizes["prompt"], **study.attrs),
        "seconds": ", ".join(f"{name} {spent:.1f}" for name, spent in seconds.items())
        + f"; {sum(seconds.values()):.0f} in all",
        "versions": ", ".join(f"{name} {study.attrs[name]}" for name in ("interp", "torch", "transformers", "python")),
        "hardware": str(study.attrs["hardware"]),
        "date": str(study.attrs["date"]),
    }
    return Section("How this was made", (definitions(entries),))
