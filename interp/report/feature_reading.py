"""All that a dashboard shows of some features, as one Dataset: read here, drawn by `feature_parts`."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Int
from torch import Tensor

from interp.model import Model
from interp.patching.progress import progress_bar
from interp.saes.attribution import feature_attribution
from interp.saes.head_share import head_share
from interp.saes.logit_weights import LOGIT_SITES, logit_weights
from interp.saes.sae import SAE
from interp.saes.splice import sites_of

SOURCES_SHOWN = 40
"""Source tokens before the target; what earlier ones add is kept as one number."""


def described(
    model: Model,
    sae: SAE,
    tokens: Int[Tensor, "sequence pos"],
    contexts: xr.Dataset,
    *,
    n_attributions: int,
    n_logits: int,
    progress: bool | None,
) -> xr.Dataset:
    """Contexts of features with what they write, the heads they lie in, and what they read in their strongest contexts.

    Args:
        model: the model.
        sae: the SAE; parts that its site does not allow are left out.
        tokens: the text that the contexts come from.
        contexts: what `feature_contexts` found.
        n_attributions: strongest contexts to attribute to source tokens.
        n_logits: tokens raised and lowered.
        progress: show a progress bar.

    Returns:
        `contexts`; `logit_token` and `logit_weight` [feature, side, rank]; `head_share` [feature, head]; and
        `source_token`, `source_attribution` [feature, attributed, back], `source_earlier`, `source_bias` and
        `source_pre_activation` [feature, attributed], where `attributed` counts contexts and `back` the tokens up to
        the strongest one, last.
    """
    features = contexts["feature"].values.tolist()
    found = contexts
    site = sites_of(model, sae)[1]
    if site.kind in LOGIT_SITES and not model.tower.post_norm:
        logits = logit_weights(model, sae, features, n=n_logits)
        found = found.assign(logit_token=logits["token"], logit_weight=logits["weight"])
    if site.kind == "z":
        found = found.assign(head_share=head_share(model, sae).sel(feature=features))
    n_top = int((contexts["group"].values == "top").sum())
    if sites_of(model, sae)[0].kind == "z" and min(n_attributions, n_top):
        found = found.assign(_sources(model, sae, tokens, contexts, min(n_attributions, n_top), progress))
    return found


def _sources(
    model: Model, sae: SAE, tokens: Int[Tensor, "sequence pos"], contexts: xr.Dataset, n: int, progress: bool | None
) -> dict[str, Any]:
    """What each source token adds at the strongest position of the first n contexts."""
    features = contexts["feature"].values.tolist()
    shape = (len(features), n, SOURCES_SHOWN)
    texts, values = np.full(shape, "", dtype=object), np.full(shape, np.nan, dtype=np.float32)
    numbers = np.full((3, *shape[:2]), np.nan, dtype=np.float32)
    with progress_bar(len(features), "attributing features", "feature", progress=progress) as bar:
        for row, feature in enumerate(features):
            where = contexts[["sequence", "position"]].sel(feature=feature)
            for column in range(n):
                sequence, position = (int(where[name].values[column]) for name in ("sequence", "position"))
                if sequence < 0:
                    continue
                # What follows the target cannot matter in a causal model, and would cost.
                one = feature_attribution(model, sae, tokens[sequence][: position + 1], feature, positions=-1)
                parts = one["attribution"].values[0, 0]
                shown = min(len(parts), SOURCES_SHOWN)
                values[row, column, -shown:] = parts[-shown:]
                texts[row, column, -shown:] = one["source_token"].values[-shown:]
                numbers[:, row, column] = parts[:-shown].sum(), one["bias"].item(), one["pre_activation"].item()
            bar.update(1)
    axes = ("feature", "attributed")
    names = ("source_earlier", "source_bias", "source_pre_activation")
    return {
        "source_token": ((*axes, "back"), texts),
        "source_attribution": ((*axes, "back"), values),
        **{name: (axes, numbers[at]) for at, name in enumerate(names)},
    }


def fires_on(contexts: xr.Dataset, feature: int) -> tuple[str, int, int] | None:
    """(token, contexts, of how many): the commonest token at the peak of a feature's strongest contexts; None: none."""
    mine = contexts.sel(feature=feature)
    listed = np.flatnonzero((mine["group"].values == "top") & (mine["sequence"].values >= 0))
    at_peak = [str(text) for text in mine["token"].sel(offset=0).values[listed]]
    if not at_peak:
        return None
    # Of equally common ones that of the stronger context: Counter keeps the order of first sight.
    commonest, count = Counter(at_peak).most_common(1)[0]
    return commonest, count, len(at_peak)
