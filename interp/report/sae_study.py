"""The numbers behind the section on an SAE: measured here, drawn by `sae_section`, kept in the study between.

1. Effects of all features on the task's metric by relevance patching through the SAE, and exactly for the largest.
2. What the SAE is worth, on running text.
3. For each head the features that lie in it most.
4. Dashboards of a few features: those asked for, or those of largest effect on the task.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float

from interp.metrics import bootstrap_interval
from interp.model import Model
from interp.model.edit import resolve_columns
from interp.model.sites import Site
from interp.patching.activation import resolve_metric
from interp.patching.batching import batches
from interp.patching.progress import progress_bar
from interp.report.feature_reading import described, fires_on
from interp.report.sink_study import calibration_texts
from interp.saes.attribution import feature_attribution, token_strings
from interp.saes.contexts import feature_contexts
from interp.saes.evaluate import evaluate
from interp.saes.feature_effects import ERROR, feature_effects
from interp.saes.head_share import head_features
from interp.saes.sae import SAE
from interp.saes.splice import features_of, sites_of, spliced
from interp.tasks import Task

Variables = dict[str, Any]
"""Name -> DataArray, or (dims, values)."""

TEXTS, LENGTH = 64, 128
"""Running text that contexts are taken from."""
EVALUATED = 16
"""Texts to evaluate on, which costs five times as much."""
LISTED = 12
"""Features of largest effect to list."""
A_HEAD = 10
"""Features listed for each head."""


def check_features(model: Model, sae: SAE, features: int | Sequence[int] | None, n_features: int) -> None:
    """Raises ValueError if the SAE does not fit the model, or features are out of range."""
    sites_of(model, sae)
    if features is not None:
        resolve_columns(features, sae.d_sae, "feature")
    if not 0 < n_features <= sae.d_sae:
        raise ValueError(f"n_features={n_features}; the SAE has {sae.d_sae} features, so it runs 1..{sae.d_sae}")


def sae_choices(sae: SAE, features: int | Sequence[int] | None, n_features: int) -> dict[str, Any]:
    """What the numbers depend on beside model and task, as JSON-able values."""
    weights = [float(parameter.detach().double().sum()) for parameter in sae.parameters()]
    chosen = features if features is None or isinstance(features, int) else list(features)
    return {"sae": [sae.architecture, sae.site, sae.target_site, weights], "features": chosen, "n_features": n_features}


def sae_variables(
    model: Model,
    task: Task,
    sae: SAE,
    *,
    features: int | Sequence[int] | None = None,
    n_features: int = 4,
    seed: int = 0,
    progress: bool | None = None,
) -> Variables:
    """What an SAE is worth, which of its features matter for a task, and what these and those of each head do.

    Costs two forward passes and a backward one a prompt, one forward pass a prompt for each of a dozen features, and
    about 140 of texts of 128 tokens.

    Args:
        model: the model.
        task: prompts of one length.
        sae: the SAE, at any site; only on `hook_z` can heads be told apart.
        features: what to make dashboards of; None: those of largest effect on the task, in size.
        n_features: how many, if none are named.
        seed: of texts, samples and intervals.
        progress: show progress bars; None: in a terminal or notebook only.

    Raises:
        ValueError: if the SAE does not fit the model, a feature is out of range, or the metric has no gradient.
    """
    check_features(model, sae, features, n_features)
    by_position = feature_effects(model, task, sae, method="relp", progress=progress)
    ranked = by_effect(by_position)
    asked = ranked[:n_features] if features is None else resolve_columns(features, sae.d_sae, "feature")
    listed = list(dict.fromkeys([*ranked[:LISTED], *asked]))
    exact = exact_effects(model, task, sae, listed, progress=progress)
    texts, source = calibration_texts(model, task, seed, n=TEXTS, length=LENGTH)
    evaluation = evaluate(model, sae, texts[:EVALUATED], progress=progress)
    heads = head_features(model, sae, k=min(A_HEAD, sae.d_sae)) if sites_of(model, sae)[1].kind == "z" else None
    in_heads = [] if heads is None else heads["feature"].values.ravel().tolist()
    named = sorted({*listed, *in_heads})
    contexts = feature_contexts(model, sae, texts, named, n_top=10, per_interval=3, seed=seed, progress=progress)
    of_listed = described(model, sae, texts, contexts.sel(feature=listed), n_attributions=0, n_logits=3, progress=False)
    shown = described(model, sae, texts, contexts.sel(feature=asked), n_attributions=3, n_logits=10, progress=progress)
    shown = shown.assign(_on_prompts(model, task, sae, by_position.sel(node=asked)))
    found = {
        **packed("sae_evaluation", evaluation.drop_vars("prompt_ce").assign_attrs(_about(sae, source))),
        **packed("sae_effects", _effects(by_position, listed, exact, of_listed, seed)),
        **packed("sae_shown", shown.assign_attrs(chosen="by effect" if features is None else "as asked for")),
    }
    if heads is None:
        return found
    return found | packed("sae_heads", _heads(heads, contexts, evaluation["firing_rate"]))


def by_effect(by_position: xr.DataArray) -> list[int]:
    """Features by the size of their effect summed over positions, largest first; those without any are left out."""
    total = by_position.sum("position")
    features = total["feature"].values
    order = np.argsort(-np.abs(total.values), kind="stable")
    return [int(features[one]) for one in order if features[one] != ERROR and total.values[one]]


@torch.no_grad()
def exact_effects(
    model: Model, task: Task, sae: SAE, features: Sequence[int], *, progress: bool | None
) -> Float[np.ndarray, "feature prompt"]:
    """What the metric loses when one feature is as in the corrupted run at every position; one run a feature."""
    metric = resolve_metric(None, task)[1]
    found = np.zeros((len(features), len(task)), dtype=np.float32)
    with progress_bar(len(features) * len(task), "running features", "run", progress=progress) as bar:
        for rows in batches(len(task), len(task.clean_ids[0]), None):
            prompts = task[rows]
            there = features_of(model, prompts.corrupted, sae)
            clean = _score(model, prompts, metric)
            for row, feature in enumerate(features):

                def put(site: Site, own: torch.Tensor, column: int = feature, new: torch.Tensor = there) -> Any:
                    changed = own.clone()
                    changed[..., column] = new[..., column]
                    return changed

                with spliced(model, sae, keep_error=True, features=put):
                    found[row, rows] = (clean - _score(model, prompts, metric)).numpy()
                bar.update(len(prompts))
    return found


def _score(model: Model, prompts: Task, metric: Any) -> Float[torch.Tensor, " prompt"]:
    logits = model(prompts.clean, logits_to_keep=1)[:, -1]
    found: torch.Tensor = metric(logits, prompts.answers.to(logits.device), prompts.wrong.to(logits.device))
    return found.float().cpu()


def _effects(
    by_position: xr.DataArray, listed: list[int], exact: Float[np.ndarray, "feature prompt"], of_listed: xr.Dataset,
    seed: int,
) -> xr.Dataset:  # fmt: skip
    """Estimated and exact effects of the features listed, with a word on each."""
    low, high = bootstrap_interval(exact, seed=seed, axis=1)
    mine = by_position.sel(node=listed).transpose("node", "position").values
    columns = {
        "by_position": (("feature", "position"), mine),
        "effect": (("feature",), mine.sum(1)),
        "exact": (("feature",), exact.mean(1)),
        "low": (("feature",), low),
        "high": (("feature",), high),
        "all": ((), float(by_position.sum())),
        "error": ((), float(by_position.sel(node=by_position["feature"].values == ERROR).sum())),
    }
    kept = ["logit_token", "head_share", "density"]
    about = {name: by_position.attrs[name] for name in ("metric", "metric_clean", "metric_corrupted", "rules")}
    return xr.Dataset(
        {**columns, **of_listed[[one for one in kept if one in of_listed]], **_fired(of_listed, listed)},
        coords={"feature": listed, "label": ("position", by_position["label"].values)},
        attrs={**about, "n_prompts": exact.shape[1]},
    )


def _fired(contexts: xr.Dataset, features: list[int]) -> dict[str, Any]:
    """What features fire on: `fired` and `fired_times`, of `fired_of` contexts."""
    found = [fires_on(contexts, one) or ("", 0, 0) for one in features]
    texts = np.array([one for one, _, _ in found], dtype=object)
    return {
        "fired": (("feature",), texts),
        "fired_times": (("feature",), np.array([one for _, one, _ in found])),
        "fired_of": (("feature",), np.array([one for _, _, one in found])),
    }


def _heads(heads: xr.Dataset, contexts: xr.Dataset, rate: xr.DataArray) -> xr.Dataset:
    """The features of each head, with the token that each fires on and how often it does."""
    found = heads.isel(layer=0, drop=True)
    ids = found["feature"].values
    by_rank: dict[str, Any] = {"rate": (("head", "rank"), rate.values[ids])}
    for name, (_, values) in _fired(contexts, ids.ravel().tolist()).items():
        by_rank[name] = (("head", "rank"), values.reshape(ids.shape))
    return found.assign(by_rank).assign_attrs(layer=int(heads["layer"].values[0]))


def _on_prompts(model: Model, task: Task, sae: SAE, by_position: xr.DataArray) -> dict[str, Any]:
    """Features on the first prompt pair, and what they read at one place of the clean prompt."""
    asked = by_position["feature"].values.tolist()
    runs = [features_of(model, ids[:1], sae)[0][:, asked].T.cpu().numpy() for ids in (task.clean, task.corrupted)]
    texts = [token_strings(model, ids[0]) for ids in (task.clean, task.corrupted)]
    effects = by_position.transpose("node", "position").values
    at = [_read_at(*pair) for pair in zip(effects, runs[0], strict=True)]
    found = {
        "prompt_activation": (("feature", "run", "prompt_position"), np.stack(runs, 1)),
        "prompt_token": (("run", "prompt_position"), np.array(texts, dtype=object)),
        "prompt_at": (("feature",), np.array(at)),
        "run": ["clean", "corrupted"],
    }
    if sites_of(model, sae)[0].kind != "z":
        return found
    reads = [
        feature_attribution(model, sae, task.clean[0], feature, positions=int(place))
        for feature, place in zip(asked, at, strict=True)
    ]
    names = ("bias", "pre_activation")
    return found | {
        "prompt_source": (("feature", "prompt_position"), np.stack([one["attribution"].values[0, 0] for one in reads])),
        **{f"prompt_{name}": (("feature",), np.array([one[name].item() for one in reads])) for name in names},
    }


def _read_at(effect: Float[np.ndarray, " position"], activation: Float[np.ndarray, " position"]) -> int:
    """Where the effect over all prompts is largest among the positions at which the feature is on in this prompt."""
    size = np.abs(effect)
    # Of several places without an effect, the one where it is strongest.
    return int((np.where(activation > 0, size + 1e-9 * activation, -1) if (activation > 0).any() else size).argmax())


def _about(sae: SAE, source: str) -> dict[str, Any]:
    """What is said of an SAE as a whole."""
    made = {"of": sae.metadata.get("model_name", sae.metadata.get("model")), "tokens": sae.metadata.get("tokens")}
    known = {f"made_{name}": value for name, value in made.items() if isinstance(value, str | int)}
    return {"text": source, "architecture": sae.architecture, **known}


def packed(name: str, found: xr.Dataset) -> Variables:
    """A Dataset as variables of a study, its variables and dimensions named after it."""
    renamed = found.rename({one: f"{name}_{one}" for one in (*found.variables, *found.dims)})
    return {**{str(one): renamed[one] for one in renamed.data_vars}, name: ((), json.dumps(found.attrs, default=str))}


def unpacked(study: xr.Dataset, name: str) -> xr.Dataset:
    """The Dataset that `packed` made variables of."""
    prefix = f"{name}_"
    mine = study[[str(one) for one in study.variables if str(one).startswith(prefix)]]
    mine = mine.drop_vars([one for one in mine.coords if not str(one).startswith(prefix)])
    attrs: Mapping[str, Any] = json.loads(str(study[name].values))
    plain = {str(one): str(one).removeprefix(prefix) for one in (*mine.variables, *mine.dims)}
    return mine.rename(plain).assign_attrs(attrs)
