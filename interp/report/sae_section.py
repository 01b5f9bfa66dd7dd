"""The section on an SAE; it takes a study with the variables of `sae_study`, and only draws."""

from __future__ import annotations

import html

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from interp.report import figures
from interp.report.feature_parts import (
    HOW_TO_READ,
    coloured,
    context_line,
    feature_link,
    feature_parts,
    largest_head,
    raised_tokens,
)
from interp.report.measures import metric_unit, percent, signed_number
from interp.report.page import Cell, Markup, Section, joined, paragraph, table, token, visible
from interp.report.page import figures as side_by_side
from interp.report.sae_study import unpacked

RUNS = {
    "clean": "the model's own",
    "spliced": "the SAE's reconstruction",
    "zero": "set to 0",
    "mean": "set to its mean",
}
WIDEST = 8
"""Letters of a token in the table of heads, which would not fit on a page otherwise."""
POLYSEMANTIC = (
    "How many things does a head do? No number here says. “Directions” is geometry: the participation ratio of the "
    "cosines between the ten features' decoder blocks in that head, 1 if they all write one line, 10 if they are "
    "orthogonal; features of one theme can be orthogonal, and features of two themes can be close. The lists are for "
    "reading, and what they can show is one-sided: ten features that clearly differ speak for a head that does several "
    "things, ten that are alike do not show that it does only one: they are ten out of many, of this SAE. "
    "The published “at least 90% of heads are polysemantic” (Kissane et al. 2024) was found by people who read "
    "such lists, not computed."
)


def sae_section(study: xr.Dataset) -> Section:
    """What an SAE is worth, which of its features matter for the task, the features of each head, and a few in full."""
    evaluation, effects, shown = (unpacked(study, f"sae_{name}") for name in ("evaluation", "effects", "shown"))
    links = shown["feature"].values.tolist()
    parts = [
        *evaluation_parts(evaluation),
        _heading("Features that matter for the task"),
        *effect_parts(study, effects, links),
    ]
    if "sae_heads" in study:
        parts += [_heading("Features of each head"), *head_parts(unpacked(study, "sae_heads"), links)]
    how = "of largest effect on the task" if shown.attrs["chosen"] == "by effect" else "asked for"
    parts.append(paragraph(f"Below: the features {how}. {HOW_TO_READ}"))
    for feature in links:
        parts.append(Markup(f'<h3 class="part" id="feature-{feature}">Feature {feature}</h3>'))
        parts += feature_parts(shown, feature, prompts=prompt_lines(shown, feature))
    return Section("Features of a sparse autoencoder", tuple(parts))


def evaluation_parts(evaluation: xr.Dataset) -> list[Markup]:
    """Which SAE this is, and what it is worth."""
    about = evaluation.attrs
    made = f" of {about['made_of']}" if "made_of" in about else ""
    made += f", trained on {int(about['made_tokens']):,} tokens" if "made_tokens" in about else ""
    where = about["site"] if about["site"] == about["target_site"] else f"{about['site']} → {about['target_site']}"
    numbers = (
        f"{float(evaluation['l0']):.1f} features are on in a token (L0); explained variance "
        f"{_decimals(evaluation['explained_variance'])}; {percent(float(evaluation['dead_share']))} of features never "
        f"fire here. Running on reconstructions wins back {_recovered(evaluation, 'ce')} of the cross-entropy, and "
        f"{_recovered(evaluation, 'kl')} of the divergence from the model, that setting the activation to 0 costs."
    )
    columns: dict[str, list[Cell]] = {
        "activation": list(RUNS.values()),
        "cross-entropy": evaluation["ce"].sel(run=list(RUNS)).values.tolist(),
        "KL from the model": evaluation["kl"].sel(run=list(RUNS)).values.tolist(),
    }
    return [
        paragraph(f"{about['sae']} at {where}{made}: {about['d_sae']} features. {numbers}"),
        table(columns),
        paragraph(
            f"Nats a token, on {about['n_tokens']} tokens of {about['text']}. The four losses stand side by side, "
            "because a share of the loss recovered has a small denominator where a layer matters little.",
            kind="caption",
        ),
    ]


def effect_parts(study: xr.Dataset, effects: xr.Dataset, links: list[int]) -> list[Markup]:
    """The features of largest effect on the task: how much, where, and what they are."""
    about, unit = effects.attrs, metric_unit(study)
    features = effects["feature"].values.tolist()
    if not features:
        return [paragraph("No feature differs between clean and corrupted prompts.")]
    said = (
        f"What the {unit} loses if a feature is as in the corrupted run, at all positions: estimated for all features "
        "at once by relevance patching through the SAE, and exactly for those listed, one run "
        f"each{_agreement(effects)}. By the estimate all features and the SAE's error come to "
        f"{signed_number(float(effects['all']))} together, the error alone to "
        f"{signed_number(float(effects['error']))}; clean and corrupted prompts are "
        f"{signed_number(about['metric_clean'] - about['metric_corrupted'])} apart."
    )
    return [
        paragraph(said),
        table(effect_table(effects, links), sortable=True, tall=True),
        paragraph(
            f"n = {about['n_prompts']} prompts; positive: the feature supports the behaviour. “Fires on”: the token "
            "that most of its strongest contexts on running text have at their peak.",
            kind="caption",
        ),
        side_by_side([(effect_map(effects, unit), "Estimates, by the position of the feature.")], least=420),
    ]


def effect_table(effects: xr.Dataset, links: list[int]) -> dict[str, list[Cell]]:
    """One row a feature, those of largest estimated effect first."""
    features = effects["feature"].values.tolist()
    order = sorted(range(len(features)), key=lambda row: -abs(float(effects["effect"].values[row])))
    columns: dict[str, list[Cell]] = {
        "feature": [_named(features[row], links) for row in order],
        "effect, exact": [float(effects["exact"].values[row]) for row in order],
        "95% interval": [
            f"{effects['low'].values[row]:+.3f} to {effects['high'].values[row]:+.3f}".replace("-", "−")
            for row in order
        ],
        "estimate": [float(effects["effect"].values[row]) for row in order],
        "mostly at": [_where(effects, row) for row in order],
        "fires on": [_fired(effects.isel(feature=row)) for row in order],
    }
    if "logit_token" in effects:
        columns["raises"] = [raised_tokens(effects, features[row]) for row in order]
    if "head_share" in effects:
        columns["largest head"] = [largest_head(effects["head_share"].isel(feature=row)) for row in order]
    return columns


def effect_map(effects: xr.Dataset, unit: str) -> go.Figure:
    """Feature by position, in the order of the table."""
    order = np.argsort(-np.abs(effects["effect"].values), kind="stable")
    values = effects["by_position"].values[order]
    names = [f"feature {one}" for one in effects["feature"].values[order]]
    best = np.unravel_index(int(np.abs(values).argmax()), values.shape)
    labels = [figures.token_label(str(one)) for one in effects["label"].values]
    where = visible(str(effects["label"].values[best[1]])).strip()
    title = f"Feature {effects['feature'].values[order][best[0]]} acts most, at “{where}”"
    return figures.label_position_heatmap(values, names, labels, title=title, unit=f"{unit} lost")


def head_parts(heads: xr.Dataset, links: list[int]) -> list[Markup]:
    """The features that lie most in each head."""
    return [
        paragraph(POLYSEMANTIC),
        Markup(f'<div class="dense">{table(head_columns(heads, links), tall=True)}</div>'),
        paragraph(
            f"The {heads.sizes['rank']} features with the largest share of their decoder norm in a head, that share, "
            "and the token that most of their strongest contexts have at their peak; † never on in the texts of the "
            "evaluation. “Own”: features that have their largest share in this head.",
            kind="caption",
        ),
    ]


def head_columns(heads: xr.Dataset, links: list[int]) -> dict[str, list[Cell]]:
    """One row a head, one column a rank."""
    layer = int(heads.attrs["layer"])
    columns: dict[str, list[Cell]] = {
        "head": [figures.head_label(layer, int(one)) for one in heads["head"].values],
        "own": [int(one) for one in heads["n_largest"].values],
        "directions": [float(one) for one in heads["n_directions"].values],
    }
    for rank in range(heads.sizes["rank"]):
        columns[str(rank + 1)] = [
            _feature_cell(heads.isel(head=head, rank=rank), links) for head in range(heads.sizes["head"])
        ]
    return columns


def prompt_lines(shown: xr.Dataset, feature: int) -> list[Markup]:
    """A feature on the task's first prompt pair, and what it reads there where its effect is largest."""
    mine = shown.sel(feature=feature)
    values = mine["prompt_activation"].values
    limit = float(np.nanmax([values.max(), float(mine["max"])])) or 1.0
    lines = [Markup("<h3>On the task's first prompts</h3>")]
    for row, run in enumerate(mine["run"].values):
        texts = [str(one) for one in mine["prompt_token"].values[row]]
        lines.append(context_line(texts, values[row].tolist(), lead=str(run), hover="activation", limit=limit))
    if "prompt_source" in mine:
        lines.append(_reading(mine))
    return lines


def _reading(mine: xr.Dataset) -> Markup:
    at = int(mine["prompt_at"])
    texts, values = mine["prompt_token"].values[0].tolist(), mine["prompt_source"].values.tolist()
    largest = max(map(abs, values)) or 1.0
    cells = "".join(
        coloured(str(text), value, abs(value) / largest, f"adds {value:+.3f}", marked=place == at)
        for place, (text, value) in enumerate(zip(texts[: at + 1], values, strict=False))
    )
    bias, pre = float(mine["prompt_bias"]), float(mine["prompt_pre_activation"])
    said = f" bias {signed_number(bias)} → pre-activation {signed_number(pre)} at the framed token"
    return Markup(
        f'<p class="context sources"><span class="peak">reads</span>{cells}<span class="soft">{said}</span></p>'
    )


def _named(feature: int, links: list[int]) -> str:
    return feature_link(feature) if feature in links else str(feature)


def _fired(one: xr.Dataset) -> Markup:
    if not int(one["fired_of"]):
        return Markup("–")
    return joined([token(str(one["fired"].values)), f"{int(one['fired_times'])}/{int(one['fired_of'])}"])


def _feature_cell(one: xr.Dataset, links: list[int]) -> Markup:
    never = "" if float(one["rate"]) else "†"
    first = f'{_named(int(one["feature"]), links)}{never} <span class="soft">{float(one["share"]):.0%}</span>'
    text = str(one["fired"].values)
    fired = token(text if len(text) <= WIDEST else f"{text[:WIDEST]}…") if int(one["fired_of"]) else "–"
    return Markup(f"{first}<br>{fired}")


def _heading(text: str) -> Markup:
    return Markup(f'<h3 class="part">{html.escape(text)}</h3>')


def _agreement(effects: xr.Dataset) -> str:
    estimate, exact = effects["effect"].values, effects["exact"].values
    if len(exact) < 3 or not (estimate.std() and exact.std()):
        return ""
    return f" (Pearson {np.corrcoef(estimate, exact)[0, 1]:.2f} among them)".replace("-", "−")


def _where(effects: xr.Dataset, row: int) -> Markup:
    at = int(np.abs(effects["by_position"].values[row]).argmax())
    return token(str(effects["label"].values[at]))


def _decimals(value: xr.DataArray) -> str:
    return f"{float(value):.3f}".replace("-", "−")


def _recovered(evaluation: xr.Dataset, what: str) -> str:
    share = float(evaluation[f"{what}_recovered"].sel(reference="zero"))
    return "an undefined share (it costs nothing)" if np.isnan(share) else f"{share:.1%}".replace("-", "−")
