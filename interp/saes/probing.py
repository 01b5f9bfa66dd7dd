"""Do a few features know what a text is about? Probes on an SAE's best features, beside one on the activation itself.

A text is the mean of its tokens' features (and of their activations). On the training texts, the k features whose means
differ most between the classes are chosen, and a logistic regression is fitted on them; the dense probe has the whole
activation. What counts is how near few features come to the dense probe.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Hashable, Sequence

import numpy as np
import torch
import xarray as xr
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from interp.model import Model, Site
from interp.patching.batching import batches
from interp.patching.labels import model_provenance
from interp.patching.progress import progress_bar
from interp.saes.activations import gather
from interp.saes.attribution import prompt_ids
from interp.saes.sae import SAE
from interp.saes.splice import sites_of

Texts = Sequence[str] | Sequence[Sequence[int]] | Int[Tensor, "text pos"]

STATISTICS = ("value", "low", "high")
_FEWEST = 4
"""Texts a class: two to train on and two to test on, about."""


def sparse_probing(
    model: Model,
    sae: SAE,
    texts: Texts,
    labels: Sequence[Hashable],
    *,
    k: Sequence[int] = (1, 2, 5),
    first: int = 0,
    test_share: float = 0.25,
    regularisation: float = 1.0,
    level: float = 0.95,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> xr.Dataset:
    """Accuracy on held-out texts of probes on the k best features, and of a dense probe on the activation.

    Of two classes, the second (sorted as text) is told from the first; of more, each from all others. Costs one
    forward pass a text, as far as the site, and a logistic regression for each class and probe.

    Args:
        model: the model.
        sae: the SAE; of a transcoder, the dense probe has its input.
        texts: texts, or their token ids, of any lengths.
        labels: the class of each text.
        k: numbers of features.
        first: tokens before this position are left out of a text's mean, such as a BOS.
        test_share: share of the texts that is held out, the same of every class.
        regularisation: scikit-learn's C, of all probes; inputs are standardised.
        level: of the intervals: Wilson's, which do not shrink to nothing when every test text is right.
        seed: of the split.
        batch_size: texts of one length a forward pass; by default about a thousand tokens' worth.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        Dataset with `accuracy` [class, probe, statistic] (probe: "dense", "k=1", ...; statistic: value, low, high),
        `chance` [class], the accuracy of always naming the more frequent answer, and the best features of each class,
        best first: `feature` [class, rank] and `mean_difference` [class, rank] (in the class minus outside).

    Raises:
        ValueError: before any run, if labels and texts do not fit, a class has fewer than four texts, too few are held
            out for each class to be among them, or a number is out of range.

    Source: Gurnee et al. 2023 (arXiv 2305.01610); for SAEs Gao et al. 2024 and SAEBench, with the same choice of
    features. A planted feature is found in tests/saes/test_probing.py.
    """
    from sklearn.model_selection import train_test_split

    source, _ = sites_of(model, sae)
    labels = list(labels)
    classes = _check(len(texts), labels, k, sae.d_sae, level, test_share, regularisation)
    started = time.perf_counter()
    index = np.array([classes.index(label) for label in labels])
    train, test = train_test_split(np.arange(len(index)), test_size=test_share, stratify=index, random_state=seed)
    features, dense = _pooled(model, sae, source, texts, first, batch_size, progress)
    told = range(1, 2) if len(classes) == 2 else range(len(classes))
    accuracy = np.full((len(told), 1 + len(k), len(STATISTICS)), np.nan)
    best = np.zeros((len(told), max(k)), dtype=np.int64)
    difference = np.zeros((len(told), max(k)))
    chance = np.zeros(len(told))
    for row, one in enumerate(told):
        is_one = index == one
        gaps = features[train][is_one[train]].mean(0) - features[train][~is_one[train]].mean(0)
        best[row] = np.argsort(-np.abs(gaps), kind="stable")[: max(k)]
        difference[row] = gaps[best[row]]
        chance[row] = max(is_one[test].mean(), 1 - is_one[test].mean())
        for column, inputs in enumerate([dense, *(features[:, best[row, :few]] for few in k)]):
            right = _right(inputs, is_one, train, test, regularisation)
            accuracy[row, column] = _with_interval(right, level)
    return xr.Dataset(
        {
            "accuracy": (("class", "probe", "statistic"), accuracy),
            "chance": (("class",), chance),
            "feature": (("class", "rank"), best),
            "mean_difference": (("class", "rank"), difference),
        },
        coords={
            "class": [str(classes[one]) for one in told],
            "probe": ["dense", *(f"k={few}" for few in k)],
            "statistic": list(STATISTICS),
            "rank": range(1, max(k) + 1),
        },
        attrs={
            **model_provenance(model),
            "method": "sparse_probing",
            "site": str(source),
            "n_train": len(train),
            "n_test": len(test),
            "first": first,
            "regularisation": regularisation,
            "level": level,
            "seed": seed,
            "seconds": time.perf_counter() - started,
        },
    )


def _check(
    n_texts: int,
    labels: list[Hashable],
    k: Sequence[int],
    d_sae: int,
    level: float,
    test_share: float,
    regularisation: float,
) -> list[Hashable]:
    """The classes, sorted."""
    if len(labels) != n_texts:
        raise ValueError(f"{n_texts} texts have {len(labels)} labels: give one for each")
    classes = sorted(dict.fromkeys(labels), key=str)
    if len(classes) < 2:
        raise ValueError("there is one class only: nothing can be told apart")
    for one in classes:
        if labels.count(one) < _FEWEST:
            raise ValueError(f"class {one!r} has {labels.count(one)} texts; a class needs {_FEWEST} or more")
    if not k or not all(1 <= few <= d_sae for few in k):
        raise ValueError(f"k={tuple(k)}: numbers of features run 1..{d_sae}")
    for name, share in (("level", level), ("test_share", test_share)):
        if not 0 < share < 1:
            raise ValueError(f"{name} is {share}; it is a share between 0 and 1")
    if not regularisation > 0:
        raise ValueError(f"regularisation={regularisation} must be more than 0; the smaller, the stronger")
    return classes


@torch.no_grad()
def _pooled(
    model: Model, sae: SAE, site: Site, texts: Texts, first: int, batch_size: int | None, progress: bool | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean over the tokens of each text of its features, and of the activation."""
    ids = [prompt_ids(model, text) for text in texts]
    by_length: dict[int, list[int]] = defaultdict(list)
    for row, one in enumerate(ids):
        by_length[len(one)].append(row)
    shortest = min(by_length)
    if not 0 <= first < shortest:
        raise ValueError(f"first={first} leaves nothing of text {by_length[shortest][0]}, of {shortest} tokens")
    features, dense = np.empty((len(ids), sae.d_sae)), np.empty((len(ids), sae.d_in))
    with progress_bar(len(ids), "features of texts", "text", progress=progress) as bar:
        for length, rows in by_length.items():
            for some in batches(len(rows), length, batch_size):
                tokens = torch.stack([ids[row] for row in rows[some]]).to(model.device)
                found = gather(model, tokens, [site])[site][:, first:].to(sae.dtype)
                dense[rows[some]] = found.double().mean(1).cpu().numpy()
                features[rows[some]] = sae.encode(found).double().mean(1).cpu().numpy()
                bar.update(len(tokens))
    return features, dense


def _right(
    inputs: NDArray[np.float64],
    is_one: NDArray[np.bool_],
    train: NDArray[np.int64],
    test: NDArray[np.int64],
    regularisation: float,
) -> NDArray[np.bool_]:
    """Which of the test texts a probe fitted to the training texts gets right."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    fitted = make_pipeline(StandardScaler(), LogisticRegression(C=regularisation, max_iter=2000))
    fitted.fit(inputs[train], is_one[train])
    right: NDArray[np.bool_] = fitted.predict(inputs[test]) == is_one[test]
    return right


def _with_interval(right: NDArray[np.bool_], level: float) -> tuple[float, float, float]:
    from scipy.stats import binomtest

    interval = binomtest(int(right.sum()), len(right)).proportion_ci(level, method="wilson")
    return float(right.mean()), interval.low, interval.high
