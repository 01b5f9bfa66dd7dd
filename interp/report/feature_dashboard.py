"""Dashboards of SAE features: what a feature fires on, what it writes, where it lives and what it reads, in one file.

For each feature: how often and how strongly it is on, the share of each head in its decoder row, the tokens that it
raises and lowers, its contexts coloured by activation, and under the strongest ones the source tokens coloured by what
each adds to the pre-activation (SAEs on `hook_z` only: there heads and sources can be told apart).
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import torch
import xarray as xr
from jaxtyping import Int
from torch import Tensor

from interp.model import Model
from interp.patching.progress import progress_bar
from interp.report import figures
from interp.report.page import Markup, Section, joined, page, paragraph, table, token
from interp.report.page import figures as side_by_side
from interp.report.writing import check_target, write_text
from interp.saes.attribution import feature_attribution
from interp.saes.contexts import feature_contexts
from interp.saes.head_share import head_share
from interp.saes.logit_weights import LOGIT_SITES, logit_weights
from interp.saes.sae import SAE
from interp.saes.splice import features_of, sites_of

N_SHOWN = 10
"""Features of a dashboard for which none are named."""
SOURCES_SHOWN = 40
"""Source tokens before the target; what earlier ones add is written as one number."""
BLUE, RED = "33,102,172", "178,24,43"


@dataclass(frozen=True)
class Dashboard:
    """A page, shown by Jupyter as the value of a cell."""

    html: str
    """The whole file."""
    path: Path | None
    """Where it was written."""
    features: tuple[int, ...]

    def _repr_html_(self) -> str:
        # A frame of its own: the page brings style sheet and scripts that must not touch the notebook's.
        return (
            f'<iframe srcdoc="{html.escape(self.html)}" title="feature dashboard" '
            'style="width: 100%; height: 800px; border: 1px solid #e1e5eb"></iframe>'
        )


def dashboard(
    model: Model,
    sae: SAE,
    tokens: Int[Tensor, "sequence pos"],
    features: int | Sequence[int] | None = None,
    out: str | Path | None = None,
    *,
    n_top: int = 10,
    n_intervals: int = 4,
    per_interval: int = 3,
    n_attributions: int = 3,
    n_logits: int = 10,
    exclude: Sequence[int] = (),
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> Dashboard:
    """One self-contained HTML page on features of an SAE.

    Costs one forward pass a sequence, and two of at most a sequence's length for every attribution shown.

    Args:
        model: the model.
        sae: the SAE; parts that its site does not allow (heads, sources, logits) are left out.
        tokens: the text, as token ids.
        features: which; None: ten that are on in the first sequences, drawn at random.
        out: the file to write, whole or not at all; None: only return the page.
        n_top: strongest contexts.
        n_intervals: parts of the activation range that further contexts are drawn from.
        per_interval: contexts from each.
        n_attributions: strongest contexts whose source tokens are attributed.
        n_logits: tokens raised and lowered.
        exclude: positions that do not count, such as a BOS at [0].
        seed: of the draws.
        batch_size: sequences a forward pass; by default about a thousand tokens' worth.
        progress: show progress bars; None: in a terminal or notebook only.

    Returns:
        The page; in Jupyter it shows itself.

    Raises:
        ValueError: if a feature is out of range, or none is on where some are to be drawn.
        FileNotFoundError: if the folder of `out` does not exist. Both before the text is read.
    """
    target = None if out is None else check_target(out)
    site = sites_of(model, sae)[1]
    shown = _drawn(model, sae, tokens, exclude, seed) if features is None else features
    chosen = [shown] if isinstance(shown, int) else list(shown)
    writes = site.kind in LOGIT_SITES and not model.tower.post_norm
    logits = logit_weights(model, sae, chosen, n=n_logits) if writes else None
    heads = head_share(model, sae) if site.kind == "z" else None
    contexts = feature_contexts(
        model, sae, tokens, chosen, n_top=n_top, n_intervals=n_intervals, per_interval=per_interval, exclude=exclude,
        seed=seed, batch_size=batch_size, progress=progress,
    )  # fmt: skip
    sections = []
    with progress_bar(len(chosen), "attributing features", "feature", progress=progress) as bar:
        for feature in contexts["feature"].values.tolist():
            sources = _sources(model, sae, tokens, contexts, feature, n_attributions)
            sections.append(_section(contexts, feature, heads, logits, sources))
            bar.update(1)
    name = f"Features of {site} in {model.name}"
    text = page(name, [paragraph(_made(sae, contexts)), _overview(contexts, heads, logits)], sections)
    if target is not None:
        write_text(text, target)
    return Dashboard(text, target, tuple(contexts["feature"].values.tolist()))


def _drawn(model: Model, sae: SAE, tokens: Int[Tensor, "sequence pos"], exclude: Sequence[int], seed: int) -> list[int]:
    found = features_of(model, tokens[:8], sae).detach()
    found[:, list(exclude)] = 0
    live = (found > 0).flatten(0, 1).any(0).nonzero().flatten().cpu()
    if not len(live):
        raise ValueError("no feature is on in the first eight sequences; name the features to show")
    order = torch.randperm(len(live), generator=torch.Generator().manual_seed(seed))[:N_SHOWN]
    return sorted(live[order].tolist())


def _sources(
    model: Model, sae: SAE, tokens: Int[Tensor, "sequence pos"], contexts: xr.Dataset, feature: int, n: int
) -> dict[int, xr.Dataset]:
    """By context, what each source token adds at the strongest position; nothing for an SAE that is not on `hook_z`."""
    if sites_of(model, sae)[0].kind != "z":
        return {}
    mine = contexts.sel(feature=feature)
    listed = [row for row in np.flatnonzero(mine["group"].values == "top")[:n] if mine["sequence"].values[row] >= 0]
    return {
        int(row): feature_attribution(
            model,
            sae,
            # What follows the target cannot matter in a causal model, and would cost.
            tokens[int(mine["sequence"].values[row])][: int(mine["position"].values[row]) + 1],
            feature,
            positions=-1,
        )
        for row in listed
    }


def _section(
    contexts: xr.Dataset,
    feature: int,
    heads: xr.DataArray | None,
    logits: xr.Dataset | None,
    sources: dict[int, xr.Dataset],
) -> Section:
    mine = contexts.sel(feature=feature)
    parts = [paragraph(_activity(mine))]
    drawn = [(_histogram(mine), "Tokens by activation, where it is above 0; counts on a logarithmic axis.")]
    if heads is not None:
        caption = "Norm of each head's block of the decoder row, as a share of all."
        drawn.append((_head_bars(heads.sel(feature=feature)), caption))
    parts.append(side_by_side(drawn, least=360))
    if logits is not None:
        one = logits.sel(feature=feature)
        sides = {"top": "raises", "bottom": "lowers"}
        columns: dict[str, list[str | float]] = {}
        for side, verb in sides.items():
            cells = one.sel(side=side)
            columns[verb] = [token(str(text)) for text in cells["token"].values]
            columns[f"{verb} by"] = cells["weight"].values.tolist()
        parts.append(table(columns))
    if float(mine["n_active"]):
        parts.append(_context_lines(mine, sources))
    return Section(f"Feature {feature}", tuple(parts))


def _activity(mine: xr.Dataset) -> str:
    n_active = int(mine["n_active"])
    if not n_active:
        return "Never on in this text."
    return f"On at {n_active} tokens ({_percent(float(mine['density']))}), at most {float(mine['max']):.3f}."


def _context_lines(mine: xr.Dataset, sources: dict[int, xr.Dataset]) -> Markup:
    strongest = float(mine["max"])
    lines, previous = [], None
    for row, group in enumerate(mine["group"].values):
        if int(mine["sequence"].values[row]) < 0:
            continue
        if group != previous:
            lines.append(f"<h3>{html.escape(_group_title(mine, str(group)))}</h3>")
            previous = group
        context = mine.isel(context=row)
        where = f"sequence {int(context['sequence'])}, position {int(context['position'])}"
        cells = [
            _coloured(str(text), value, value / strongest, BLUE, f"{value:.3f}", marked=offset == 0)
            for text, value, offset in zip(
                context["token"].values, context["activation"].values.tolist(), context["offset"].values, strict=True
            )
            if not math.isnan(value)
        ]
        peak = f'<span class="peak" title="{where}">{float(context["peak"]):.2f}</span>'
        lines.append(f'<p class="context">{peak}{"".join(cells)}</p>')
        if row in sources:
            lines.append(_source_line(sources[row]))
    return Markup("".join(lines))


def _group_title(mine: xr.Dataset, group: str) -> str:
    if group == "top":
        return "Strongest contexts, tokens coloured by activation"
    edges = [0.0, *mine["interval_edge"].values.tolist()]
    number = mine["interval"].values.tolist().index(group)
    return f"Drawn from activations {edges[number]:.3f} to {edges[number + 1]:.3f}"


def _source_line(found: xr.Dataset) -> str:
    """Source tokens coloured by what they add: blue raises the pre-activation, red lowers it."""
    values = found["attribution"].values[0, 0].tolist()
    largest = max(map(abs, values)) or 1.0
    first = max(0, len(values) - SOURCES_SHOWN)
    cells = [
        _coloured(text, value, abs(value) / largest, BLUE if value > 0 else RED, f"adds {value:+.3f}")
        for text, value in zip(found["source_token"].values.tolist()[first:], values[first:], strict=True)
    ]
    earlier = f"earlier tokens {sum(values[:first]):+.2f}, " if first else ""
    pre, bias = (float(found[name].squeeze()) for name in ("pre_activation", "bias"))
    return (
        f'<p class="context sources"><span class="peak">reads</span>{"".join(cells)}'
        f'<span class="soft"> {earlier}bias {bias:+.2f} → pre-activation {pre:.2f}</span></p>'
    )


def _coloured(text: str, value: float, share: float, colour: str, label: str, *, marked: bool = False) -> str:
    """One token on a ground of a colour; hovering tells the number."""
    shown = html.escape(text.replace("\n", "⏎")) or "∅"
    ground = f' style="background: rgba({colour},{0.75 * min(share, 1):.3f})"' if value else ""
    ink = ' class="marked"' if marked else ""
    return f'<span{ink}{ground} title="{html.escape(repr(text))}: {label}">{shown}</span>'


def _histogram(mine: xr.Dataset) -> go.Figure:
    counts, edges = mine["histogram"].values, mine["bin_edge"].values
    used = int(np.flatnonzero(counts).max(initial=0)) + 1
    width = float(edges[0])
    figure = go.Figure(
        go.Bar(
            x=edges[:used] - width / 2,
            y=np.where(counts > 0, counts.astype(float), np.nan)[:used],
            width=width,
            marker_color=figures.BLUE,
            customdata=edges[:used] - width,
            hovertemplate="%{y} tokens from %{customdata:.3f}<extra></extra>",
        )
    )
    figure.update_xaxes(title_text="activation", rangemode="tozero")
    figure.update_yaxes(title_text="tokens", type="log", dtick="D2")
    return figures.finish(figure, "How strongly it is on", height=240)


def _head_bars(share: xr.DataArray) -> go.Figure:
    names = [figures.head_label(int(share.attrs["layer"]), int(head)) for head in share["head"].values]
    figure = go.Figure(
        go.Bar(x=names, y=share.values, marker_color=figures.BLUE, hovertemplate="%{x}: %{y:.1%}<extra></extra>")
    )
    figure.update_xaxes(title_text="head")
    figure.update_yaxes(title_text="share of the decoder row", tickformat=".0%", rangemode="tozero")
    return figures.finish(figure, "Which heads it lies in", height=240)


def _overview(contexts: xr.Dataset, heads: xr.DataArray | None, logits: xr.Dataset | None) -> Markup:
    features = contexts["feature"].values.tolist()
    columns: dict[str, Sequence[str | float | int]] = {
        "feature": [Markup(f'<a href="#feature-{one}">{one}</a>') for one in features],
        "on at tokens": [_percent(float(one)) for one in contexts["density"].values],
        "maximum": contexts["max"].values.tolist(),
    }
    if heads is not None:
        columns["largest head"] = [_largest_head(heads.sel(feature=one)) for one in features]
    if logits is not None:
        top = logits["token"].sel(side="top")
        columns["raises"] = [joined([token(str(text)) for text in top.sel(feature=one).values[:3]]) for one in features]
    return table(columns, sortable=True, tall=True)


def _largest_head(share: xr.DataArray) -> str:
    if np.isnan(share.values).any():
        return "–"
    largest = int(share.values.argmax())
    return f"{figures.head_label(int(share.attrs['layer']), largest)} ({_percent(float(share.values[largest]))})"


def _made(sae: SAE, contexts: xr.Dataset) -> str:
    return (
        f"{sae.architecture} SAE with {sae.d_sae} features; {contexts.attrs['n_sequences']} sequences, "
        f"{contexts.attrs['n_tokens']} tokens read. A feature's strongest token in a context is framed; in lines "
        "marked “reads”, blue source tokens raise its pre-activation there and red ones lower it. Hover for numbers."
    )


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"
