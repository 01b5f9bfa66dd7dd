"""What a model that sees predicts, as one distribution over classes for each image or prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.model import Model
from interp.vision.patch_grid import vision_tower

Classifier = Callable[[Tensor], Float[Tensor, "image class"]]
"""From what the model returns to class logits, such as a linear probe on CLS or zero-shot text directions."""


def class_logits(model: Model, output: Tensor, classifier: Classifier | None) -> Float[Tensor, "image class"] | None:
    """Logits of classes, in float32.

    Args:
        model: a model with a vision transformer.
        output: what a call of the model returned.
        classifier: what to make of it. None: the logits of a vision classifier, or those of the next token of a model
            that also reads.

    Returns:
        None for a vision model without a head, which predicts no classes.
    """
    if classifier is not None:
        return classifier(output).float()
    if vision_tower(model):
        return output[:, -1].float()
    return output.float() if output.dim() == 2 else None


def batch_labels(batches: list[dict[str, Any]], labels: Int[Tensor, " image"] | None) -> list[Int[Tensor, " _"] | None]:
    """The labels of each batch.

    Raises:
        ValueError: if there is not one for each image (each prompt of a model that reads).
    """
    sizes = [n_predictions(batch) for batch in batches]
    if labels is None:
        return [None] * len(sizes)
    if labels.shape != (sum(sizes),):
        raise ValueError(f"labels have the shape {tuple(labels.shape)}; give one class for each of {sum(sizes)} images")
    return list(labels.split(sizes))


def n_predictions(batch: Mapping[str, Tensor]) -> int:
    """How many distributions a batch gives: one a prompt, or one an image without text."""
    return len(batch["input_ids"] if "input_ids" in batch else batch["pixel_values"])


def chosen_classes(logits: Float[Tensor, "image class"], labels: Int[Tensor, " image"] | None) -> Int[Tensor, " image"]:
    """The labels, or the classes that the model predicts.

    Raises:
        ValueError: if a label is no class.
    """
    if labels is None:
        return logits.argmax(-1)
    n_classes = logits.shape[-1]
    if bool(((labels < 0) | (labels >= n_classes)).any()):
        raise ValueError(f"labels run from {int(labels.min())} to {int(labels.max())}; classes run 0..{n_classes - 1}")
    return labels.to(logits.device)


def jensen_shannon(logits: Float[Tensor, "*axes class"], other: Float[Tensor, "*axes class"]) -> Float[Tensor, "*axes"]:
    """Jensen-Shannon divergence of the two distributions in nats: 0 = the same, ln 2 = no class in common."""
    one, two = (values.float().softmax(-1) for values in (logits, other))
    entropies = (torch.special.entr(one).sum(-1) + torch.special.entr(two).sum(-1)) / 2
    return (torch.special.entr((one + two) / 2).sum(-1) - entropies).clamp(min=0)
