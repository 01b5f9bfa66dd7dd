"""What an SAE is worth: what the model loses when it runs on reconstructions, how good these are, how features fire.

The loss recovered has a small denominator where the layer matters little (one attention layer, often), so all four
losses stand beside it: of the model as it is, spliced, and with the activation set to zero and to its mean.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from interp.metrics import kl_divergence
from interp.model import Model, Site
from interp.patching.batching import batches
from interp.patching.labels import model_provenance
from interp.patching.progress import progress_bar
from interp.saes.activations import gather
from interp.saes.reconstruction import FORMULAS, ReconstructionSums
from interp.saes.sae import SAE, to_rows
from interp.saes.splice import counted, features_of, replaced, sites_of, spliced

if TYPE_CHECKING:
    import plotly.graph_objects as go

RUNS = ("clean", "spliced", "zero", "mean")
REFERENCES = ("zero", "mean")
DENSITY_EDGES = np.arange(-7.0, 0.125, 0.25)
"""Of the histogram of log10 firing rates; rarer features are counted in the first bin."""

_BLUE, _GREY, _INK = "#2166ac", "#8a94a3", "#1b2430"


@torch.no_grad()
def evaluate(
    model: Model,
    sae: SAE,
    tokens: Int[Tensor, "prompt pos"],
    *,
    exclude: Bool[Tensor, "prompt pos"] | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> xr.Dataset:
    """Losses with an SAE spliced in, quality of its reconstructions, and firing rates of its features.

    Costs four forward passes a prompt, one more as far as the site, for the mean, and one of the first prompt.

    Args:
        model: the model.
        sae: an SAE, transcoder, or baseline.
        tokens: texts of one length, without padding.
        exclude: tokens left out (True), such as BOS or sinks: they keep the model's own activation in every run, their
            predictions count in no loss, and they are in none of the other numbers. None: all tokens count.
        batch_size: prompts a forward pass; by default about a thousand tokens' worth.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        Dataset with

        * `ce` and `kl` [run]: cross-entropy of the next token and KL(clean ‖ run), in nats, means over predictions; run
          is clean, spliced, zero (activation set to 0) and mean (set to its mean over these tokens). `prompt_ce`
          [run, prompt] is for intervals;
        * `ce_recovered` = (CE_reference − CE_spliced) / (CE_reference − CE_clean) and `kl_recovered` = 1 − KL_spliced /
          KL_reference, by [reference] zero and mean; NaN where the reference costs nothing: an ablated layer may well
          have a lower cross-entropy than the model on text unlike that of its training; KL always tells them apart;
        * the numbers of `reconstruction.FORMULAS`; each carries its formula in its attrs;
        * `firing_rate` [feature] and `density` [log10_rate]: number of live features by log10 of their firing rate.

    Raises:
        ValueError: if the SAE does not fit the model, or there is nothing to predict.

    Source: loss recovered as in Bricken et al. 2023 and Kissane et al. 2024 (arXiv 2406.17759). Every number is checked
    against all activations at once in tests/saes/test_evaluate.py.
    """
    source, target = sites_of(model, sae)
    _check(model, tokens)
    kept = counted(tokens, exclude)
    if not bool(kept[:, :-1].any()):
        raise ValueError("`exclude` leaves no token that predicts another one")
    started = time.perf_counter()
    tokens, kept = tokens.to(model.device), kept.to(model.device)
    features_of(model, tokens[:1], sae)  # an SAE on another device shows now, not after the pass for the mean
    sums = ReconstructionSums(sae.d_out, sae.d_sae, sae.device)
    ce = np.zeros((len(RUNS), len(tokens)))
    kl = np.zeros((len(RUNS), len(tokens)))
    n_predictions = kept[:, :-1].sum(1).cpu().numpy()
    with progress_bar(2 * len(tokens), f"evaluating {sae.architecture}", "prompt", progress=progress) as bar:
        mean = _mean(model, target, tokens, kept, batch_size, bar)
        for rows in batches(len(tokens), tokens.shape[1], batch_size):
            left_out = None if exclude is None else ~kept[rows]
            clean, cache = model.run_with_cache(tokens[rows], [source, target])
            _add_activations(sums, sae, cache[source], cache[target], source, target, kept[rows])
            for run, changed in enumerate(_runs(model, sae, target, mean, left_out)):
                with changed:
                    logits = clean if run == 0 else model(tokens[rows])
                ce[run, rows], kl[run, rows] = _losses(clean, logits, tokens[rows], kept[rows])
            bar.update(len(clean))
    return _dataset(model, sae, (source, target), sums, ce, kl, n_predictions).assign_attrs(
        n_excluded=int((~kept).sum()),
        exclusion="excluded tokens keep the model's own activation and count in nothing",
        seconds=time.perf_counter() - started,
    )


def describe_evaluation(evaluation: xr.Dataset) -> str:
    """The numbers of `evaluate` in a few lines, all four losses first."""
    ce, kl = evaluation["ce"], evaluation["kl"]
    lines = [
        f"{evaluation.attrs['sae']} at {evaluation.attrs['site']}: {evaluation.attrs['d_sae']} features, "
        f"{evaluation.attrs['n_tokens']} tokens ({evaluation.attrs['n_excluded']} excluded)",
        "cross-entropy  " + "  ".join(f"{run} {float(ce.sel(run=run)):.4f}" for run in RUNS),
        "KL from clean  " + "  ".join(f"{run} {float(kl.sel(run=run)):.4f}" for run in RUNS[1:]),
    ]
    for name in ("ce_recovered", "kl_recovered"):
        shares = "  ".join(f"of {one} {_percent(float(evaluation[name].sel(reference=one)))}" for one in REFERENCES)
        lines.append(f"{name.replace('_', ' ')}  {shares}")
    lines += [f"{name.replace('_', ' ')}  {float(evaluation[name]):.4g}  ({FORMULAS[name]})" for name in FORMULAS]
    return "\n".join(lines)


def _percent(share: float) -> str:
    return "undefined (it costs nothing)" if np.isnan(share) else f"{share:.2%}"


def draw_evaluation(evaluation: xr.Dataset, *, title: str | None = None) -> go.Figure:
    """Firing rates of the features, and what each run loses against the model as it is; the losses stand at the bars.

    Args:
        evaluation: as `evaluate` returns it.
        title: what the figure shows, as a sentence; by default the loss recovered and the share of dead features.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    density, ce = evaluation["density"], evaluation["ce"]
    clean, changed = float(ce.sel(run="clean")), ce.sel(run=list(RUNS[1:]))
    figure = make_subplots(
        rows=1,
        cols=2,
        column_widths=[0.62, 0.38],
        subplot_titles=("how often features fire", f"cross-entropy above clean ({clean:.4f})"),
    )
    figure.add_trace(
        go.Bar(
            x=density["log10_rate"].values, y=density.values, width=0.25, marker_color=_BLUE,
            hovertemplate="log10 rate about %{x}<br>%{y} features<extra></extra>",
        ),
        row=1,
        col=1,
    )  # fmt: skip
    figure.add_trace(
        go.Bar(
            x=list(RUNS[1:]), y=changed.values - clean, marker_color=[_BLUE, _GREY, _GREY],
            text=[f"{value:.4f}" for value in changed.values], textposition="outside", cliponaxis=False,
            hovertemplate="%{x}: %{text} nats, %{y:+.4f} against clean<extra></extra>",
        ),
        row=1,
        col=2,
    )  # fmt: skip
    rarest = max(np.log10(1 / evaluation.attrs["n_tokens"]), DENSITY_EDGES[0])
    figure.update_xaxes(title_text="log10 of the share of tokens", range=[rarest - 0.5, 0.1], row=1, col=1)
    figure.update_yaxes(title_text="features", row=1, col=1)
    figure.update_xaxes(title_text="activation at the site", row=1, col=2)
    figure.update_yaxes(title_text="nats a token more than clean", row=1, col=2)
    return figure.update_layout(
        title={"text": _headline(evaluation) if title is None else title, "x": 0, "font_size": 15},
        showlegend=False,
        height=380,
        bargap=0.05,
        margin={"l": 50, "r": 12, "t": 80, "b": 44},
        template="plotly_white",
        font={"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 12, "color": _INK},
    )


def _headline(evaluation: xr.Dataset) -> str:
    recovered = float(evaluation["ce_recovered"].sel(reference="zero"))
    loss = "zero ablation costs nothing" if np.isnan(recovered) else f"{recovered:.1%} of the loss recovered"
    return (
        f"{evaluation.attrs['site']}: {loss} with {float(evaluation['l0']):.1f} features a token; "
        f"{float(evaluation['dead_share']):.1%} of features never fire"
    )


def _check(model: Model, tokens: Tensor) -> None:
    if tokens.shape[0] == 0 or tokens.shape[1] < 2:
        raise ValueError(f"there is nothing to predict: the tokens have shape {tuple(tokens.shape)}")
    if bool(model.images.mask(tokens).any()):
        raise ValueError("the prompts have images, whose pieces are no words to predict; give prompts of text alone")
    if model.hf.get_output_embeddings() is None:
        raise ValueError(f"{model.name} has no language-model head: there is no next token to predict")


def _mean(
    model: Model,
    site: Site,
    tokens: Int[Tensor, "prompt pos"],
    kept: Bool[Tensor, "prompt pos"],
    batch_size: int | None,
    bar: Any,
) -> Float[Tensor, " width"]:
    """Mean of a site over the tokens that count."""
    total = torch.zeros((), dtype=torch.float64)
    for rows in batches(len(tokens), tokens.shape[1], batch_size):
        found = gather(model, tokens[rows], [site])[site]
        total = total.to(found.device) + found[kept[rows].to(found.device)].double().sum(0)
        bar.update(len(found))
    return total / int(kept.sum())


def _runs(
    model: Model, sae: SAE, target: Site, mean: Float[Tensor, " width"], exclude: Tensor | None
) -> Iterator[AbstractContextManager[None]]:
    """The contexts of `RUNS`."""
    yield nullcontext()
    yield spliced(model, sae, exclude=exclude)
    for value in (torch.zeros_like(mean), mean):
        yield replaced(model, target, value, exclude=exclude)


def _add_activations(
    sums: ReconstructionSums,
    sae: SAE,
    x: Tensor,
    activation: Tensor,
    source: Site,
    target: Site,
    kept: Bool[Tensor, "prompt pos"],
) -> None:
    inputs = to_rows(source, x)[kept.to(x.device)].to(sae.dtype)
    features = sae.encode(inputs)
    sums.add(to_rows(target, activation)[kept.to(activation.device)], sae.decode(features, inputs), features)


def _losses(
    clean: Float[Tensor, "prompt pos d_vocab"],
    logits: Float[Tensor, "prompt pos d_vocab"],
    tokens: Int[Tensor, "prompt pos"],
    kept: Bool[Tensor, "prompt pos"],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sums over each prompt's predictions of the cross-entropy and of KL(clean ‖ run)."""
    found = []
    # One prompt at a time: log-probabilities over the vocabulary are the largest tensors here.
    for own, other, ids, counts in zip(clean, logits, tokens, kept[:, :-1].to(clean.device), strict=True):
        ids = ids.to(other.device)
        loss = torch.nn.functional.cross_entropy(other[:-1].float(), ids[1:], reduction="none")
        divergence = kl_divergence(own[:-1], other[:-1])
        found.append([float(values[counts].double().sum()) for values in (loss, divergence)])
    ce, kl = np.array(found).T
    return ce, kl


def _dataset(
    model: Model,
    sae: SAE,
    sites: tuple[Site, Site],
    sums: ReconstructionSums,
    ce: NDArray[np.float64],
    kl: NDArray[np.float64],
    n_predictions: NDArray[np.int64],
) -> xr.Dataset:
    mean_ce, mean_kl = ce.sum(1) / n_predictions.sum(), kl.sum(1) / n_predictions.sum()
    rates = sums.firing_rate().numpy()
    logs = np.log10(rates[rates > 0]).clip(DENSITY_EDGES[0])
    centres = (DENSITY_EDGES[:-1] + DENSITY_EDGES[1:]) / 2
    per_prompt = np.divide(ce, n_predictions, out=np.full(ce.shape, np.nan), where=n_predictions > 0)
    return xr.Dataset(
        {
            "ce": (("run",), mean_ce, {"unit": "nats"}),
            "kl": (("run",), mean_kl, {"unit": "nats"}),
            "prompt_ce": (("run", "prompt"), per_prompt, {"unit": "nats"}),
            "ce_recovered": (("reference",), [_share(mean_ce[1], mean_ce[at], mean_ce[0]) for at in (2, 3)]),
            "kl_recovered": (("reference",), [_share(mean_kl[1], mean_kl[at], mean_kl[0]) for at in (2, 3)]),
            **{name: ((), value, {"formula": FORMULAS[name]}) for name, value in sums.numbers().items()},
            "firing_rate": (("feature",), rates),
            "density": (("log10_rate",), np.histogram(logs, DENSITY_EDGES)[0]),
        },
        coords={
            "run": list(RUNS),
            "reference": list(REFERENCES),
            "prompt": range(ce.shape[1]),
            "feature": range(sae.d_sae),
            "log10_rate": centres,
        },
        attrs={
            **model_provenance(model),
            "method": "evaluate",
            "sae": sae.metadata.get("baseline", f"{sae.architecture} SAE"),
            "site": str(sites[0]),
            "target_site": str(sites[1]),
            "d_sae": sae.d_sae,
            "n_tokens": sums.n_tokens,
            "n_predictions": int(n_predictions.sum()),
        },
    )


def _share(spliced_loss: float, reference: float, clean: float) -> float:
    """Share of the reference's extra loss that is recovered; NaN where there is none (float32 rounding is none)."""
    gap = reference - clean
    if gap <= np.finfo(np.float32).eps * max(abs(reference), abs(clean)):
        return float("nan")
    return (reference - spliced_loss) / gap
