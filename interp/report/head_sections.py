"""The sections of the report that go head by head; each takes the study (see `study.py`) and only draws."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from interp.report import figures
from interp.report.agreement import agreement_matrix
from interp.report.measures import (
    MEASURES,
    SIGNED,
    best_heads,
    counted,
    effect_unit,
    extreme_heads,
    head_labels,
    interval,
    measure_title,
    measures_in,
    metric_unit,
    signed_number,
)
from interp.report.page import Section, joined, paragraph, table, token
from interp.report.page import figures as side_by_side

RANKED = 12


def direct_effects(study: xr.Dataset) -> Section:
    """Direct logit attribution of each head."""
    figure = figures.layer_head_heatmap(
        study["direct"],
        title=f"{best_heads(study, 'direct')} write the answer most directly",
        unit="logit difference",
        **interval(study, "direct"),
    )
    chosen = extreme_heads(study["direct"], RANKED // 2, RANKED // 2)
    bars = _bars(study, "direct", chosen, "The heads that write for and against the answer", "logit difference")
    caption = (
        "Each head's output at the last token, through the frozen final norm, along answer minus wrong answer. Blue "
        f"writes the answer, red writes against it. {counted(study['direct'])}."
    )
    return Section(
        "Which heads write the answer",
        (
            side_by_side(
                [
                    (figure, caption),
                    (bars, "The most positive and the most negative, with 95% bootstrap intervals over prompts."),
                ],
                least=400,
            ),
        ),
    )


def top_heads(study: xr.Dataset) -> Section:
    """Attention patterns of the heads that matter most, and what they write at the last token."""
    shown = []
    for index, label in enumerate(study["top"].values):
        one = study.isel(top=index)
        layer, head = int(one["top_layer"]), int(one["top_head"])
        effect = float(study["importance_resample"].sel(layer=layer, head=head))
        role = str(study["role"].sel(layer=layer, head=head).values)
        figure = figures.attention_pattern(
            one["top_pattern"], title=f"{label}{f' ({role})' if role else ''}: {_cost(study, effect)}"
        )
        caption = joined(
            ["Writes", *map(token, map(str, one["top_writes"].values)),
             "and against", *map(token, map(str, one["top_erases"].values)), "at the last token."]
        )  # fmt: skip
        shown.append((figure, caption))
    prompt = token(str(study.attrs["top_prompt"]))
    return Section(
        "What the top heads do",
        (
            paragraph(
                joined(
                    [
                        "The heads whose resample ablation changes the behaviour most, up and down. Rows look at "
                        "columns; darker is more attention. The prompt:",
                        prompt,
                    ]
                )
            ),
            side_by_side(shown, least=300),
            paragraph(
                "“Writes” lists the tokens whose logits the head's output at the last token raises most on this prompt "
                "(final norm with its scale frozen, then unembedding); “against” those it lowers most. Roles need both "
                f"an attention pattern and a causal effect: of {measure_title(str(study['role'].attrs['roles_by']))}, "
                "or the direct effect.",
                kind="caption",
            ),
        ),
    )


def importance(study: xr.Dataset) -> Section:
    """Exact ablations of each head."""
    shown = []
    for kind, what in (
        ("resample", "its output on the corrupted prompt"),
        ("mean", "its mean output over prompts and positions"),
        ("zero", "zero"),
    ):
        values = study[f"importance_{kind}"]
        figure = figures.layer_head_heatmap(
            values,
            title=f"{kind.capitalize()} ablation: {best_heads(study, f'importance_{kind}')} matter most",
            unit=effect_unit(study),
            **interval(study, f"importance_{kind}"),
        )
        shown.append((figure, f"Each head's output replaced by {what}, everywhere. {counted(values)}."))
    chosen = extreme_heads(study["importance_resample"], RANKED - 4, 4)
    bars = _bars(
        study, "importance_resample", chosen, "The heads that matter most, with their uncertainty", effect_unit(study)
    )
    shown.append(
        (
            bars,
            "Resample ablation; bars are means, whiskers 95% bootstrap intervals over prompts.",
        )
    )
    return Section(
        "Which heads matter",
        (
            paragraph(
                "Noising, by exact intervention: one head is replaced in the clean run, and the fall of the metric is "
                "its importance. Blue supports the behaviour, red works against it. Zero ablation overstates the first "
                "layers, on whose heads everything after relies; resample ablation removes only what differs between "
                "the clean and the corrupted prompt."
            ),
            side_by_side(shown, least=400),
        ),
    )


def values_and_patterns(study: xr.Dataset) -> Section:
    """Whether a head matters by what it moves (values) or by where it looks (pattern)."""
    value, pattern, output = study["patch_value"], study["patch_pattern"], study["importance_resample"]
    maps = [
        (figures.layer_head_heatmap(value, title="Values: heads that move what differs", unit=effect_unit(study)),
         f"Values of a key/value head replaced by those on the corrupted prompt. {counted(value)}."),
        (figures.layer_head_heatmap(pattern, title="Patterns: heads that look elsewhere", unit=effect_unit(study)),
         f"A head's attention pattern replaced by that on the corrupted prompt. {counted(value)}."),
    ]  # fmt: skip
    grouped = output.shape[1] // value.shape[1]
    by_group = output.values.reshape(*value.shape, grouped).sum(-1)
    named = [
        f"L{layer}KV{group}" if grouped > 1 else figures.head_label(layer, group)
        for layer in range(value.shape[0])
        for group in range(value.shape[1])
    ]
    labels = head_labels(study)
    what = f"sum over the {grouped} heads that share values" if grouped > 1 else "one point a head"
    scatters = [
        (figures.effect_scatter(value.values.ravel(), by_group.ravel(), named, title="Value patch against output patch",
                                x_title="value patch", y_title="output patch"),
         f"Output effect: {what}. On the dotted line, the values carry all of the effect."),
        (figures.effect_scatter(pattern.values.ravel(), output.values.ravel(), labels,
                                title="Pattern patch against output patch", x_title="pattern patch",
                                y_title="output patch"),
         "On the dotted line, where the head looks carries all of its effect."),
    ]  # fmt: skip
    return Section("What heads move, and where they look", (side_by_side([*maps, *scatters], least=420),))


def attention_kinds(study: xr.Dataset) -> Section:
    """Previous-token, duplicate-token and induction scores."""
    shown = [
        (
            figures.layer_head_heatmap(
                study[name], title=f"{title}: {best_heads(study, name, 3)}", unit="mean attention", signed=False
            ),
            caption,
        )
        for name, title, caption in (
            ("previous_token", "Previous token", "Attention from each token to the one before it."),
            ("duplicate_token", "Duplicate token", "Attention to the earlier occurrence of the same token."),
            ("induction", "Induction", "Attention to the token after the earlier occurrence of the same token."),
        )
    ]
    return Section(
        "Kinds of attention",
        (
            paragraph(
                "Mean attention on 50 random tokens followed by the same 50 again, where only the structure can be "
                "attended to. Part 4 says which of these heads this task uses."
            ),
            side_by_side(shown),
        ),
    )


def backup(study: xr.Dataset) -> Section:
    """Direct effects before and after the top writer is ablated."""
    before, after = study["direct_before"], study["direct_after"]
    ablated = str(before.attrs["ablated"])
    labels = head_labels(study)
    change = (after - before).copy()
    change.values.ravel()[labels.index(ablated)] = np.nan
    (layer, head), gained = extreme_heads(change, 1, 0)[0], float(change.max())
    figure = figures.effect_scatter(
        before.values.ravel(), after.values.ravel(), labels,
        title=f"Without {ablated}, {figures.head_label(layer, head)} gains most ({signed_number(gained)})",
        x_title="direct effect before (logit difference)", y_title=f"after ablating {ablated}",
    )  # fmt: skip
    caption = (
        f"Direct effect of every head before and after resample ablation of {ablated}, the head that writes the answer "
        f"most. Points above the dotted line step in (backup). {counted(before)}."
    )
    return Section("What steps in when the top writer is removed", (side_by_side([(figure, caption)]),))


def agreement(study: xr.Dataset) -> Section:
    """Rank correlations between the measures of importance."""
    names = measures_in(study)
    sizes = {measure_title(name): abs(study[name]) for name in names}
    signed = {measure_title(name): study[name] for name in names if name in SIGNED}
    shown = [
        (
            figures.agreement_heatmap(
                agreement_matrix(sizes, correlation="spearman"),
                title="Do the measures rank heads alike?",
            ),
            "Spearman correlation of the sizes of effects (absolute values), over all heads.",
        ),
        (
            figures.agreement_heatmap(
                agreement_matrix(signed, correlation="pearson"),
                title="Do they agree on the values?",
            ),
            "Pearson correlation of the measures that have a sign, over all heads; led by the few large ones.",
        ),
    ]
    if "direct" in study:
        scatter = figures.effect_scatter(
            study["direct"].values.ravel(),
            study["importance_resample"].values.ravel(),
            head_labels(study),
            title="Direct effect against total effect",
            x_title="direct effect (logit difference)",
            y_title=f"resample ablation ({effect_unit(study)})",
        )
        shown.append((scatter, "Heads far from the line act through other heads, or are backed up."))
    return Section(
        "Do the measures agree",
        (
            paragraph("Importance depends on how it is measured; what only one measure says deserves a second look."),
            side_by_side(shown, least=340),
        ),
    )


def all_heads(study: xr.Dataset) -> Section:
    """One row a head."""
    order = np.argsort(-np.abs(study["importance_resample"].values.ravel()), kind="stable")
    n_heads = study.sizes["head"]
    columns: dict[str, list] = {"head": [figures.head_label(*divmod(int(one), n_heads)) for one in order]}
    columns["role"] = [str(one) for one in study["role"].values.ravel()[order]]
    by_head = [str(one) for one in study.data_vars if study[one].dims == ("layer", "head")]
    measured = [one for one in by_head if not one.endswith(("_low", "_high")) and one not in ("role", "direct_before")]
    for name in [*measures_in(study), *(one for one in measured if one not in MEASURES)]:
        columns[measure_title(name)] = study[name].values.ravel()[order].astype(float).tolist()
    return Section(
        "All heads",
        (
            table(columns, sortable=True, tall=True),
            paragraph("Click a column's name to sort by it. – where a score is not defined.", kind="caption"),
        ),
    )


def _cost(study: xr.Dataset, effect: float) -> str:
    """What removing a head does, in words."""
    return f"ablation {'costs' if effect >= 0 else 'adds'} {abs(effect):.2f} {metric_unit(study)}"


def _bars(study: xr.Dataset, name: str, heads: list[tuple[int, int]], title: str, unit: str) -> go.Figure:
    ends = interval(study, name)
    values, low, high = (
        [float(array.values[one]) for one in heads] for array in (study[name], ends["low"], ends["high"])
    )
    labels = [figures.head_label(*one) for one in heads]
    return figures.ranked_bars(values, labels, title=title, unit=unit, low=low, high=high)
