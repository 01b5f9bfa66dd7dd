"""Training sparse autoencoders on a model's activations.

1. Text is read in chunks of sequences; one forward pass a chunk gives the activations of all sites and goes no further
   than the last of them.
2. The tokens to train on go into a buffer that mixes them (or come from a cache on disk), and leave it as batches.
3. Each site's SAE makes one step of Adam a batch: warm-up, plateau, decay; decoder rows of unit norm, their gradient
   projected; features that died are revived by AuxK (in the loss) or by resampling.
4. With a folder, the curve goes to log.csv and the whole state to a checkpoint: killed at any moment, the same call
   goes on as if nothing had happened.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Required, TypedDict, Unpack, overload

import torch

from interp.model import Model, Site
from interp.patching.writing import only_writer
from interp.saes.activation_cache import ActivationCache
from interp.saes.activations import Batches, Buffer, LeftOut, digest_of_mask, keeper
from interp.saes.distributed import process_group
from interp.saes.recipe import Recipe
from interp.saes.sae import SAE
from interp.saes.text import Text, TextSource, open_text
from interp.saes.training_run import TrainingRun


class TrainingOptions(TypedDict, total=False):
    """The keyword arguments of `train`, for type checkers."""

    n_tokens: Required[int]
    architecture: str
    expansion: float
    d_sae: int | None
    k: int | None
    l1: float | None
    k_aux: int | None
    settings: Mapping[str, Any] | None
    target: str | None
    batch_size: int
    learning_rate: float | None
    warm_up: int | None
    decay: int | None
    sparsity_warm_up: int
    clip: float | None
    unit_decoder: bool
    normalise: bool
    dead_after_tokens: int | None
    resample_every: int | None
    resample_times: int
    mask: LeftOut | None
    skip_tokens: Sequence[int]
    positions: slice
    length: int
    buffer_tokens: int
    chunk_tokens: int
    autocast: torch.dtype | None
    device: torch.device | str | None
    seed: int
    out: str | Path | None
    log_every: int
    checkpoint_seconds: float
    progress: bool | None


@overload
def train(  # type: ignore[overload-overlap]  # a str is a sequence of str, too
    model: Model, site: str, text: TextSource | ActivationCache, **options: Unpack[TrainingOptions]
) -> SAE: ...
@overload
def train(
    model: Model, site: Sequence[str], text: TextSource | ActivationCache, **options: Unpack[TrainingOptions]
) -> dict[str, SAE]: ...
def train(
    model: Model,
    site: str | Sequence[str],
    text: TextSource | ActivationCache,
    *,
    n_tokens: int,
    architecture: str = "topk",
    expansion: float = 8,
    d_sae: int | None = None,
    k: int | None = None,
    l1: float | None = None,
    k_aux: int | None = None,
    settings: Mapping[str, Any] | None = None,
    target: str | None = None,
    batch_size: int = 4096,
    learning_rate: float | None = None,
    warm_up: int | None = None,
    decay: int | None = None,
    sparsity_warm_up: int = 0,
    clip: float | None = 1.0,
    unit_decoder: bool = True,
    normalise: bool = False,
    dead_after_tokens: int | None = None,
    resample_every: int | None = None,
    resample_times: int = 4,
    mask: LeftOut | None = None,
    skip_tokens: Sequence[int] = (),
    positions: slice = slice(None),
    length: int = 128,
    buffer_tokens: int = 2**17,
    chunk_tokens: int = 1024,
    autocast: torch.dtype | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    log_every: int = 10,
    checkpoint_seconds: float = 300.0,
    progress: bool | None = None,
) -> SAE | dict[str, SAE]:
    """Train a sparse autoencoder on the activations of a site, or one for each of several sites on the same text.

    Costs one forward pass (as far as the last site) of each token, unless `text` is a cache, and holds `buffer_tokens`
    activations of each site. Under torchrun, data-parallel: see `interp.saes.distributed`.

    Args:
        model: the model; it is not trained.
        site: where activations are read, e.g. "blocks.5.attn.hook_z" (heads concatenated); or several such names.
        text: token ids [sequence, pos], an iterable of such tensors, "natural" (on every machine), a folder of .txt
            files, a data set's name (`interp.saes.text`), or a cache on disk (`interp.saes.cache_activations`). All but
            iterables are read again when they end.
        n_tokens: tokens to train on; rounded up to whole batches.
        architecture: a name in `interp.saes.ARCHITECTURES`.
        expansion: features a dimension of the input.
        d_sae: features, instead.
        k: features active in a token; of the TopK family.
        l1: sparsity coefficient; of the ReLU and gated SAEs.
        k_aux: dead features that explain the error of a token together; of the TopK family.
        settings: further numbers of the architecture, by name.
        target: what a transcoder predicts; with one site only.
        batch_size: tokens a step, of each process.
        learning_rate: by default 2e-4 * √(16,384 / d_sae).
        warm_up: steps of linear warm-up, at the start and after resampling; by default 1000, at most a tenth of all.
        decay: last steps, in which the learning rate falls to 0 linearly; by default a fifth of all.
        sparsity_warm_up: steps in which the sparsity penalty rises to its full size.
        clip: norm that all gradients together are cut to; None: never.
        unit_decoder: keep decoder rows at norm 1, with gradients projected on what that leaves free.
        normalise: train on activations (and targets) scaled to a mean norm of √d; the result reads and returns them as
            they are, its decoder rows longer or shorter than 1 by as much.
        dead_after_tokens: a feature that has not fired for so many tokens is dead, for AuxK and in the log; by default
            ten million, at most a tenth of n_tokens.
        resample_every: steps between resamplings of features that never fired since the one before; None: none. Draws
            from a hundred batches at once, or from what the buffer holds.
        resample_times: resamplings at most.
        mask: tokens to leave out (True), e.g. of `interp.sinks.mask`, or a function from token ids to them.
        skip_tokens: token ids to leave out: BOS, padding (on the right).
        positions: positions to keep.
        length: tokens a row of text; of token ids it is their own.
        buffer_tokens: activations that are mixed.
        chunk_tokens: tokens a forward pass.
        autocast: a type of numbers for the SAE's matrix products; weights and losses stay float32.
        device: where the SAE and its buffer are; by default with the model.
        seed: of weights, order and mixing.
        out: a folder for log.csv, TensorBoard (if installed), the checkpoint, and the SAE when it is done. A call with
            the same folder and settings goes on after an interruption; the result is the same to the last bit on a CPU.
        log_every: steps between rows of the log.
        checkpoint_seconds: time between checkpoints; each holds the buffer.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        The SAE; for a sequence of sites a dict by site.

    Raises:
        ValueError: before anything is run, if sites, sizes or settings do not fit, the cache is of another model, or
            the folder holds a training with other settings; if the text has no batch of tokens.
        BlockingIOError: if another training is writing to the folder.

    Source: recipes of Kissane et al. 2024 (arXiv 2406.17759) and Gao et al. 2024 (arXiv 2406.04093).
    """
    given = {"k": k, "l1": l1, "k_aux": k_aux}
    recipe = Recipe(
        architecture=architecture,
        settings={name: value for name, value in given.items() if value is not None} | dict(settings or {}),
        expansion=expansion,
        d_sae=d_sae,
        n_tokens=n_tokens,
        batch_size=batch_size,
        learning_rate=learning_rate,
        warm_up=warm_up,
        decay=decay,
        sparsity_warm_up=sparsity_warm_up,
        clip=clip,
        unit_decoder=unit_decoder,
        normalise=normalise,
        dead_after_tokens=dead_after_tokens,
        resample_every=resample_every,
        resample_times=resample_times,
        autocast=None if autocast is None else str(autocast).removeprefix("torch."),
        seed=seed,
    )
    for name, value in {"log_every": log_every, "length": length, "chunk_tokens": chunk_tokens}.items():
        if value < 1:
            raise ValueError(f"{name}={value}; give 1 or more")
    pairs = _sites(model, site, target)
    sites = list(dict.fromkeys(one for pair in pairs for one in pair if one is not None))
    where = model.device if device is None else torch.device(device)
    folder = None if out is None else Path(out)
    with process_group(where) as (rank, n_processes):
        recipe = recipe.for_processes(n_processes)
        if isinstance(text, ActivationCache):
            if mask is not None or skip_tokens or positions != slice(None):
                raise ValueError("a cache holds the tokens that were kept when it was made: choose them there")
            text.check_model(model)
            reading: dict[str, Any] = {"text": text.text}
            batches: Batches = text.batches(sites, batch_size=recipe.batch_size, seed=recipe.seed, device=where)
        else:
            opened = open_text(model, text, length=length, chunk_tokens=chunk_tokens, seed=recipe.seed)
            chosen: _Chosen = {"mask": mask, "skip_tokens": [int(one) for one in skip_tokens], "positions": positions}
            reading, batches = _buffer(model, opened, sites, chosen, buffer_tokens, recipe, where)
        with _alone(folder if rank == 0 else None):
            run = TrainingRun(model, pairs, recipe, reading, batches, device=where, out=folder)
            trained = run.complete(log_every=log_every, checkpoint_seconds=checkpoint_seconds, progress=progress)
    return trained[str(pairs[0][0])] if isinstance(site, str) else trained


class _Chosen(TypedDict):
    """Which tokens."""

    mask: LeftOut | None
    skip_tokens: list[int]
    positions: slice


def _buffer(
    model: Model,
    text: Text,
    sites: Sequence[Site],
    chosen: _Chosen,
    capacity: int,
    recipe: Recipe,
    device: torch.device,
) -> tuple[dict[str, Any], Buffer]:
    """What the batches depend on, and where they come from."""
    reading = {
        "text": text.name,
        "length": text.length,
        "chunk": text.chunk_size,
        "buffer_tokens": capacity,
        "mask": digest_of_mask(chosen["mask"]),
        "skip_tokens": chosen["skip_tokens"],
        "positions": str(chosen["positions"]),
    }
    keep = keeper(text, sites, **chosen)
    size, seed = recipe.batch_size, recipe.seed
    return reading, Buffer(model, text, sites, keep=keep, capacity=capacity, batch_size=size, seed=seed, device=device)


def _alone(folder: Path | None) -> AbstractContextManager[None]:
    """Nobody else writes to the folder, which is made if need be."""
    if folder is None:
        return nullcontext()
    folder.mkdir(parents=True, exist_ok=True)
    return only_writer(folder)


def _sites(model: Model, site: str | Sequence[str], target: str | None) -> list[tuple[Site, Site | None]]:
    """Pairs of input and target.

    Raises:
        ValueError: if a name stands for no site or for several, or there are several inputs to one target.
    """
    names = [site] if isinstance(site, str) else list(site)
    if not names:
        raise ValueError("no sites were asked for")
    if target is not None and len(names) > 1:
        raise ValueError("a target goes with one site; train transcoders one at a time")
    found = [_one_site(model, name) for name in names]
    if len(set(found)) < len(found):
        raise ValueError(f"a site is named twice in {', '.join(found)}; name each once")
    return [(one, None if target is None else _one_site(model, target)) for one in found]


def _one_site(model: Model, name: str) -> Site:
    found = model.site_names(name)
    if len(found) > 1:
        raise ValueError(f"{name!r} stands for {len(found)} sites, e.g. {found[0]}: name one, or give a list of names")
    return found[0]
