"""Direct feature attribution: which heads and source tokens a feature of a `hook_z` SAE is made of, exactly.

1. z at a position t is a sum over heads h and source positions s: z^h_t = Σ_s A^h_ts v^h_s.
2. A feature's pre-activation is an affine function of z: w_i · z_t + constant, with one block w^h_i a head.
3. So it is constant + Σ_s Σ_h A^h_ts (w^h_i · v^h_s). The numbers u[s, h] = w^h_i · v^h_s are computed first, so that
   nothing larger than targets x sources x heads is held, never a vector for each of them.

Under grouped-query attention a head reads the values of its group. The value bias is part of v; a learned sink logit
(gpt-oss) takes its share of a row and contributes nothing.
"""

from __future__ import annotations

import html
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, get_args

import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from interp.heads.patterns import pattern
from interp.model import Model, Site
from interp.model.edit import resolve_columns
from interp.patching.labels import model_provenance
from interp.saes.activations import gather
from interp.saes.head_share import layer_of_z
from interp.saes.sae import SAE
from interp.saes.splice import sites_of

if TYPE_CHECKING:
    import plotly.graph_objects as go

By = Literal["head", "source", "both"]
_AXES = {"head": ("head",), "source": ("source",), "both": ("source", "head")}
_SUMS = {"head": "hqs,fsh->fqh", "source": "hqs,fsh->fqs", "both": "hqs,fsh->fqsh"}


@torch.no_grad()
def feature_attribution(
    model: Model,
    sae: SAE,
    prompt: str | Sequence[int] | Int[Tensor, "..."],
    features: int | Sequence[int],
    *,
    by: By = "source",
    positions: int | Sequence[int] | None = None,
) -> xr.Dataset:
    """What each head, each source token, or each pair of them adds to the pre-activation of features.

    Exact: `attribution` summed over its last axes, plus `bias`, is `pre_activation` (attr `sum_error` is the largest
    gap left by rounding). The pre-activation is what the encoder computes before its threshold (a gated SAE: its gate),
    also where the feature is off. Costs a forward pass and one up to the SAE's layer; holds features x positions x
    sources numbers, times heads with by="both".

    Args:
        model: the model.
        sae: an SAE that reads a `hook_z` of this model.
        prompt: one prompt, as text or token ids.
        features: one feature or several.
        by: "head": [feature, position, head]; "source": [feature, position, source]; "both": [feature, position,
            source, head].
        positions: target positions, negative from the end; None: all.

    Returns:
        Dataset of `attribution`, `bias` [feature] (b_enc − w · b_dec), `pre_activation` and `activation` [feature,
        position]; and [position, head] `first_mass`, the attention on the first token (BOS, where there is one), and
        `sink_mass`, what a learned sink takes. Coordinates `token` and `source_token` hold token strings.

    Raises:
        ValueError: if the SAE reads another site, or a feature or position is out of range.
        FloatingPointError: if the model's activations are NaN or infinite.

    Source: Kissane et al. 2024 (arXiv 2406.17759). Checked against loops over heads and positions, and against the
    pre-activation itself, in tests/saes/test_attribution.py.
    """
    started = time.perf_counter()
    if by not in get_args(By):
        raise ValueError(f"by={by!r}; it is one of 'head', 'source', 'both'")
    layer = layer_of_z(sites_of(model, sae)[0])
    chosen = resolve_columns(features, sae.d_sae, "feature")
    ids = prompt_ids(model, prompt)
    targets = list(range(len(ids))) if positions is None else resolve_columns(positions, len(ids), "position")
    attention = pattern(model, ids[None], layer, range(model.n_heads), rows=targets)
    rows_of_pattern = torch.from_numpy(attention.values[0])
    seen = {
        site.kind: one[0].float()
        for site, one in gather(model, ids[None], [Site("v", layer), Site("z", layer)]).items()
    }
    z = seen["z"][targets].to(sae.device)
    rows, bias = encoder_rows(sae, chosen)
    read = _read_values(model, seen["v"], rows)
    pre = sae.pre_activations(z)[:, chosen].T.cpu()
    parts = torch.einsum(_SUMS[by], rows_of_pattern, read)
    total = parts.flatten(2).sum(-1) + bias.cpu()[:, None]
    labels = token_strings(model, ids)
    return xr.Dataset(
        {
            "attribution": (("feature", "position", *_AXES[by]), parts.numpy()),
            "bias": ("feature", bias.cpu().numpy()),
            "pre_activation": (("feature", "position"), pre.numpy()),
            "activation": (("feature", "position"), sae.encode(z)[:, chosen].T.cpu().numpy()),
            "first_mass": (("position", "head"), rows_of_pattern[..., 0].T.numpy()),
            "sink_mass": (("position", "head"), (1 - rows_of_pattern.sum(-1)).clamp(min=0).T.numpy()),
        },
        coords={
            "feature": chosen,
            "position": targets,
            "token": ("position", [labels[one] for one in targets]),
            "source": range(len(ids)),
            "source_token": ("source", labels),
            "head": range(model.n_heads),
        },
        attrs={
            **model_provenance(model),
            "method": "feature_attribution",
            "by": by,
            "layer": layer,
            "sum_error": float((total - pre).abs().max()),
            "seconds": time.perf_counter() - started,
        },
    )


def encoder_rows(sae: SAE, features: Sequence[int]) -> tuple[Float[Tensor, "feature d_in"], Float[Tensor, " feature"]]:
    """The pre-activations of features as an affine function of the SAE's input: (rows, constants)."""
    zero = torch.zeros(1, sae.d_in, device=sae.device)
    return affine_parts(sae.pre_activations, zero, [(0, feature) for feature in features])


def affine_parts(
    function: Callable[[Tensor], Tensor], x: Float[Tensor, "row d_in"], entries: Sequence[tuple[int, int]]
) -> tuple[Float[Tensor, "entry d_in"], Float[Tensor, " entry"]]:
    """Entries (row, feature) of a function that is affine around x: value = gradient · x[row] + constant.

    Returns:
        (gradients, constants), one an entry.
    """
    with torch.enable_grad():
        # Asked of autograd rather than of W_enc: architectures scale and shift differently between input and feature.
        point = x.detach().clone().requires_grad_()
        values = function(point)
        rows = [torch.autograd.grad(values[row, feature], point, retain_graph=True)[0][row] for row, feature in entries]
    found = torch.stack(rows) if rows else x[:0]
    at = torch.stack([x[row] for row, _ in entries]) if rows else x[:0]
    value = torch.stack([values[entry].detach() for entry in entries]) if rows else x.new_zeros(0)
    return found, value - (found * at).sum(-1)


def prompt_ids(model: Model, prompt: str | Sequence[int] | Int[Tensor, "..."]) -> Int[Tensor, " pos"]:
    """The token ids of one prompt.

    Raises:
        ValueError: if there are several prompts, or none.
    """
    ids = torch.atleast_2d(model.to_tokens(prompt) if isinstance(prompt, str) else torch.as_tensor(prompt))
    if len(ids) != 1 or ids.shape[1] == 0:
        raise ValueError(f"one prompt at a time; got token ids of shape {list(ids.shape)}")
    return ids[0].cpu()


def token_strings(model: Model, ids: Int[Tensor, " pos"]) -> list[str]:
    """The text of each token; the id itself for a model without a tokenizer."""
    return [str(one) for one in ids.tolist()] if model.tokenizer is None else model.to_str_tokens(ids)


def _read_values(
    model: Model, v: Float[Tensor, "source d_values"], rows: Float[Tensor, "feature d_in"]
) -> Float[Tensor, "feature source head"]:
    """u: the dot product of each feature's block for a head with that head's value at each source."""
    blocks = rows.unflatten(-1, (model.n_kv_heads, model.n_heads // model.n_kv_heads, model.d_head))
    values = v.unflatten(-1, (model.n_kv_heads, model.d_head))
    return torch.einsum("fgrd,sgd->fsgr", blocks.cpu(), values.cpu()).flatten(2)


def draw_attribution(attribution: xr.Dataset, feature: int, position: int) -> go.Figure:
    """The source tokens of one pre-activation, coloured by what each adds: one row, or one row a head with by="both".

    Args:
        attribution: what `feature_attribution` returned, by "source" or "both".
        feature: one of its features.
        position: one of its target positions.

    Raises:
        ValueError: if the result has no source axis, or does not hold that feature and position.
    """
    import plotly.graph_objects as go

    parts = attribution["attribution"]
    if "source" not in parts.dims:
        raise ValueError("the attribution has no source tokens to colour: ask for by='source' or by='both'")
    for dim, wanted in (("feature", feature), ("position", position)):
        if wanted not in attribution[dim].values:
            raise ValueError(
                f"{dim} {wanted} is not in this attribution: {dim}s are {attribution[dim].values.tolist()}"
            )
    cell = parts.loc[{"feature": feature, "position": position}]
    by_head = "head" in cell.dims
    cells = cell.values.T if by_head else cell.values[None]
    names = [f"L{attribution.attrs['layer']}H{one}" for one in attribution["head"].values] if by_head else ["all heads"]
    tokens = [_token_label(str(one)) for one in attribution["source_token"].values]
    limit = float(abs(cells).max()) or 1.0
    figure = go.Figure(
        go.Heatmap(
            z=cells,
            y=names,
            customdata=[tokens] * len(names),
            hovertemplate="%{y}, %{customdata} (position %{x})<br>%{z:.4f}<extra></extra>",
            colorscale="RdBu",
            zmin=-limit,
            zmax=limit,
            colorbar={"title": "adds to the<br>pre-activation"},
        )
    )
    here = attribution.loc[{"feature": feature, "position": position}]
    token = _token_label(str(here["token"].values))
    title = (
        f"What feature {feature} of layer {attribution.attrs['layer']} reads at {token!r} (position {position}): "
        f"pre-activation {float(here['pre_activation']):.3f}, of it bias {float(here['bias']):.3f}"
    )
    figure.update_layout(
        title={"text": title, "x": 0, "font_size": 15},
        height=220 + 22 * len(names),
        template="none",
        margin={"l": 80, "r": 20, "t": 60, "b": 90},
        font={"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 12, "color": "#1b2430"},
    )
    figure.update_xaxes(tickmode="array", tickvals=list(range(len(tokens))), ticktext=tokens, title_text="source token")
    figure.update_yaxes(autorange="reversed", title_text="")
    return figure


def _token_label(text: str) -> str:
    """A token as plotly shows it: blanks visible, its own marks escaped."""
    return html.escape(text.strip(" ").replace("\n", "⏎") or "␣")
