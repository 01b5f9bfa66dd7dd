"""How much each head of a vision transformer matters, by four pruning metrics side by side: their ranks disagree."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from interp.metrics import bootstrap_interval
from interp.model import HookPoint, Model, Site
from interp.patching.labels import model_provenance
from interp.patching.progress import progress_bar
from interp.vision.classes import Classifier, batch_labels, chosen_classes, class_logits, jensen_shannon
from interp.vision.patch_grid import Images, image_batches, patch_grid, vision_tower

Ablation = Literal["zero", "mean"]
METRICS = ("probability_drop", "js_divergence", "cls_distance", "gradient")
ROWS = 16
"""Images times heads a forward pass, where the caller does not say."""


@torch.no_grad()
def vision_importance(
    model: Model,
    images: Images,
    labels: Int[Tensor, " image"] | None = None,
    *,
    ablation: Ablation = "zero",
    classifier: Classifier | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> xr.Dataset:
    """Importance of every head of a vision transformer by four metrics, and how their ranks agree.

    Three compare the clean run with one in which the head's z is ablated at all tokens, image by image:

    * `probability_drop`: p(class) − p(class) without the head, of the label or the class predicted;
    * `js_divergence`: Jensen-Shannon divergence of the two class distributions, in nats;
    * `cls_distance`: 1 − cosine of the final CLS embeddings (after the last norm) of the two runs, or of the means over
      patches where there is no CLS;

    and one takes no head out:

    * `gradient`: |∂ log p(class) / ∂ξ| of a gate ξ = 1 on z at all tokens, as `interp.heads.gradient_gates` has it.

    All are averaged over images. Costs layers × heads forward passes an image, several heads of a layer as rows of one
    batch, and one backward pass.

    Args:
        model: a vision model, or one that sees and reads: then heads are those of its vision tower, classes are next
            tokens, and each prompt has one image.
        images: a mapping with `pixel_values`, or token ids with images in them.
        labels: the true class of each image; None: the class that the model predicts.
        ablation: z becomes 0 ("zero") or the head's mean over images and tokens ("mean").
        classifier: from what the model returns to class logits, for models without a classification head. Without one
            their metrics of classes are NaN.
        batch_size: images times heads a forward pass; 16 by default.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        Dataset of `importance` [metric, layer, head], its 95% bootstrap interval over images `low` and `high`,
        `rank_correlation` [metric, other] (Spearman over heads, NaN where undefined), and `label` [image], the class
        meant (-1 if there are no classes).

    Raises:
        ValueError: for an unknown ablation, labels that do not fit, or prompts without exactly one image.

    The four are those of Li et al. 2023, "How Does Attention Work in Vision Transformers? A Visual Analytics Attempt",
    as recalled, not checked against the paper: the formulas are the ones above. Checked against runs one by one and
    finite differences in tests/vision/test_vision_importance.py.
    """
    started = time.perf_counter()
    if ablation not in get_args(Ablation):
        raise ValueError(f"ablation={ablation!r}; it is one of {', '.join(get_args(Ablation))}")
    viewer = _Viewer(model, classifier, vision_tower(model), batch_size or ROWS)
    batches = image_batches(model, images, viewer.rows)
    replacement = viewer.mean_outputs(batches) if ablation == "mean" else None
    scores, chosen = [], []
    n_layers = model.anatomy.towers[viewer.tower].n_layers
    with progress_bar(
        len(batches) * n_layers, f"{ablation} ablation of vision heads", "layer", progress=progress
    ) as bar:
        for batch, given in zip(batches, batch_labels(batches, labels), strict=True):
            clean = viewer.run(batch)
            classes = None if clean.logits is None else chosen_classes(clean.logits, given)
            by_layer = []
            for layer in range(n_layers):
                by_layer.append(viewer.ablated(batch, layer, replacement, clean, classes))
                bar.update()
            gradient = viewer.gradient(batch, classes, like=by_layer[0])
            scores.append(torch.cat([torch.stack(by_layer, dim=2), gradient[:, None]], dim=1).cpu())
            chosen.append(torch.full((len(scores[-1]),), -1) if classes is None else classes.cpu())
    attrs = {
        **model_provenance(model),
        "method": "vision_importance",
        "ablation": ablation,
        "classes": "predicted" if labels is None else "given",
        "seconds": time.perf_counter() - started,
    }
    return _dataset(torch.cat(scores), torch.cat(chosen), attrs)


@dataclass(frozen=True)
class _Prediction:
    """What one run says of each image."""

    logits: Float[Tensor, "image class"] | None
    embedding: Float[Tensor, "image d_model"]


@dataclass(frozen=True)
class _Viewer:
    """Runs of one model on batches of images."""

    model: Model
    classifier: Classifier | None
    tower: str
    rows: int

    def run(self, batch: Mapping[str, Any], ablate: tuple[Site, Any] | None = None) -> _Prediction:
        """Class logits and final embedding of each image."""
        seen: dict[str, Tensor] = {}

        def keep(activation: Tensor, hook: HookPoint) -> None:
            seen[hook.site.kind] = activation

        hooks = [(self._first, keep), (self._final, keep), *([] if ablate is None else [ablate])]
        output = self.model.run_with_hooks(batch, hooks, logits_to_keep=int(self.tower != ""))
        n_tokens, final = seen[self._first.kind].shape[1], seen[self._final.kind].float()
        # Where the last norm is given CLS alone, there is one token.
        has_cls = final.shape[1] < n_tokens or patch_grid(self.model, batch, n_tokens).n_prefix > 0
        embedding = final[:, 0] if has_cls else final.mean(1)
        if len(embedding) != len(output):
            raise ValueError(f"{len(output)} prompts have {len(embedding)} images; give prompts with one image each")
        return _Prediction(class_logits(self.model, output, self.classifier), embedding)

    def ablated(
        self,
        batch: Mapping[str, Any],
        layer: int,
        replacement: Sequence[Tensor] | None,
        clean: _Prediction,
        classes: Int[Tensor, " image"] | None,
    ) -> Float[Tensor, "image metric head"]:
        """The first three metrics of every head of a layer."""
        n_heads = self.model.anatomy.towers[self.tower].n_heads
        n_images = len(clean.embedding)
        at_once = 1 if "image_grid_thw" in batch else max(1, self.rows // n_images)
        parts = []
        for start in range(0, n_heads, at_once):
            heads = range(start, min(start + at_once, n_heads))

            def take_out(z: Tensor, hook: HookPoint, heads: range = heads) -> Tensor:
                by_copy = z.unflatten(0, (len(heads), -1))
                for copy, head in enumerate(heads):
                    by_copy[copy, :, :, head] = 0 if replacement is None else replacement[layer][head].to(z)
                return by_copy.flatten(0, 1)

            run = self.run(_repeated(batch, len(heads)), (Site("z", layer, tower=self.tower), take_out))
            parts.append(_changes(run, clean, classes, len(heads)))
        return torch.cat(parts, dim=-1)

    def gradient(
        self, batch: Mapping[str, Any], classes: Int[Tensor, " image"] | None, *, like: Tensor
    ) -> Float[Tensor, "image layer head"]:
        """|∂ log p / ∂ gate| of each head; NaN without classes."""
        tower = self.model.anatomy.towers[self.tower]
        if classes is None:
            return like.new_full((len(like), tower.n_layers, tower.n_heads), torch.nan)

        def metric(output: Tensor) -> Tensor:
            logits = class_logits(self.model, output, self.classifier)
            assert logits is not None
            return logits.log_softmax(-1).gather(1, classes[:, None])[:, 0]

        sites = [Site("z", layer, tower=self.tower) for layer in range(tower.n_layers)]
        keep = int(self.tower != "")
        _, z, gradient = self.model.run_with_gradients(batch, metric, sites, logits_to_keep=keep)
        return torch.stack([(z[site].float() * gradient[site].float()).sum((1, 3)).abs() for site in sites], dim=1)

    def mean_outputs(self, batches: Sequence[Mapping[str, Any]]) -> list[Float[Tensor, "head d_head"]]:
        """Mean z of every layer over images and tokens."""
        sites = [Site("z", layer, tower=self.tower) for layer in range(self.model.anatomy.towers[self.tower].n_layers)]
        totals = [torch.zeros((), device=self.model.device) for _ in sites]
        count = 0
        for batch in batches:
            _, cache = self.model.run_with_cache(batch, sites, logits_to_keep=int(self.tower != ""))
            totals = [total + cache[site].float().sum((0, 1)) for total, site in zip(totals, sites, strict=True)]
            count += cache[sites[0]].shape[:2].numel()
        return [total / count for total in totals]

    @property
    def _first(self) -> Site:
        return Site("embed", tower=self.tower)

    @property
    def _final(self) -> Site:
        tower = self.model.anatomy.towers[self.tower]
        last = Site("resid_post", tower.n_layers - 1, tower=self.tower)
        return last if tower.ln_final is None else Site("ln_final", tower=self.tower)


def _repeated(batch: Mapping[str, Any], times: int) -> dict[str, Any]:
    """The batch several times over, one copy after the other."""
    if times == 1:
        return dict(batch)
    return {name: torch.cat([one] * times) if isinstance(one, Tensor) else one for name, one in batch.items()}


def _changes(
    run: _Prediction, clean: _Prediction, classes: Int[Tensor, " image"] | None, n_heads: int
) -> Float[Tensor, "image metric head"]:
    """Metrics of runs in which one copy of the batch after the other lacks a head."""
    by_head = run.embedding.unflatten(0, (n_heads, -1))
    distance = 1 - torch.cosine_similarity(by_head, clean.embedding[None], dim=-1)
    if run.logits is None or clean.logits is None or classes is None:
        undefined = torch.full_like(distance, torch.nan)
        return torch.stack([undefined, undefined, distance]).permute(2, 0, 1)
    logits = run.logits.unflatten(0, (n_heads, -1))
    before = clean.logits.softmax(-1).gather(1, classes[:, None])[:, 0]
    after = logits.softmax(-1).gather(2, classes[None, :, None].expand(n_heads, -1, 1))[..., 0]
    divergence = jensen_shannon(logits, clean.logits.expand_as(logits))
    return torch.stack([before - after, divergence, distance]).permute(2, 0, 1)


def _dataset(
    scores: Float[Tensor, "image metric layer head"], classes: Int[Tensor, " image"], attrs: Mapping[str, Any]
) -> xr.Dataset:
    dims = ("metric", "layer", "head")
    mean = scores.double().mean(0)
    low, high = bootstrap_interval(scores)
    table = pd.DataFrame(mean.flatten(1).T.numpy(), columns=list(METRICS))
    return xr.Dataset(
        {
            "importance": (dims, mean.float().numpy()),
            "low": (dims, low.astype("float32")),
            "high": (dims, high.astype("float32")),
            "rank_correlation": (("metric", "other"), table.corr("spearman").to_numpy()),
            "label": ("image", classes.numpy()),
        },
        coords={
            "metric": list(METRICS),
            "other": list(METRICS),
            "layer": range(mean.shape[1]),
            "head": range(mean.shape[2]),
        },
        attrs=dict(attrs),
    )
