"""Dashboards of SAE features: what a feature fires on, what it writes, where it lives and what it reads, in one file.

For each feature: how often and how strongly it is on, the share of each head in its decoder row, the tokens that it
raises and lowers, its contexts coloured by activation, and under the strongest ones the source tokens coloured by what
each adds to the pre-activation (SAEs on `hook_z` only: there heads and sources can be told apart).
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import xarray as xr
from jaxtyping import Int
from torch import Tensor

from interp.model import Model
from interp.model.edit import resolve_columns
from interp.report.feature_parts import HOW_TO_READ, feature_parts, overview
from interp.report.feature_reading import described
from interp.report.page import Section, page, paragraph
from interp.report.writing import check_target, write_text
from interp.saes.contexts import feature_contexts
from interp.saes.sae import SAE
from interp.saes.splice import features_of, sites_of

N_SHOWN = 10
"""Features of a dashboard for which none are named."""


@dataclass(frozen=True)
class Dashboard:
    """A page, shown by Jupyter as the value of a cell."""

    html: str = field(repr=False)
    """The whole file."""
    path: Path | None
    """Where it was written."""
    features: tuple[int, ...]

    def _repr_html_(self) -> str:
        # A frame of its own: the page brings style sheet and scripts that must not touch the notebook's. Without a
        # base, links within the page would be relative to the notebook's address, and open the notebook in the frame.
        framed = self.html.replace("<head>", '<head>\n<base href="about:srcdoc">', 1)
        return (
            f'<iframe srcdoc="{html.escape(framed)}" title="feature dashboard" '
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
    excluded = resolve_columns(exclude, tokens.shape[1], "position")
    shown = _drawn(model, sae, tokens, excluded, seed) if features is None else features
    contexts = feature_contexts(
        model, sae, tokens, shown, n_top=n_top, n_intervals=n_intervals, per_interval=per_interval, exclude=exclude,
        seed=seed, batch_size=batch_size, progress=progress,
    )  # fmt: skip
    found = described(model, sae, tokens, contexts, n_attributions=n_attributions, n_logits=n_logits, progress=progress)
    chosen = found["feature"].values.tolist()
    sections = [Section(f"Feature {one}", feature_parts(found, one)) for one in chosen]
    text = page(f"Features of {site} in {model.name}", [paragraph(_made(sae, found)), overview(found)], sections)
    if target is not None:
        write_text(text, target)
    return Dashboard(text, target, tuple(chosen))


def _drawn(
    model: Model, sae: SAE, tokens: Int[Tensor, "sequence pos"], excluded: Sequence[int], seed: int
) -> list[int]:
    on = features_of(model, tokens[:8], sae).detach() > 0
    on[:, excluded] = False
    live = on.flatten(0, 1).any(0).nonzero().flatten().cpu()
    if not len(live):
        raise ValueError("no feature is on in the first eight sequences; name the features to show")
    order = torch.randperm(len(live), generator=torch.Generator().manual_seed(seed))[:N_SHOWN]
    return sorted(live[order].tolist())


def _made(sae: SAE, found: xr.Dataset) -> str:
    return (
        f"{sae.architecture} SAE with {sae.d_sae} features; {found.attrs['n_sequences']} sequences, "
        f"{found.attrs['n_tokens']} tokens read. {HOW_TO_READ}"
    )
