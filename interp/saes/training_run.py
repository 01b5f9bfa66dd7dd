"""One training from its checkpoint, or its beginning, to its end."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from interp.model import Model, Site
from interp.patching.labels import model_provenance
from interp.patching.progress import progress_bar
from interp.saes.activations import Batches, digest_of_model
from interp.saes.checkpoint import Checkpoint, check_settings, read_checkpoint, write_checkpoint
from interp.saes.distributed import rank_and_size
from interp.saes.learner import Learner
from interp.saes.losses import Loss
from interp.saes.recipe import Recipe
from interp.saes.sae import SAE
from interp.saes.storage import save
from interp.saes.training_log import TrainingLog

logger = logging.getLogger(__name__)

FIRST_TOKENS = 2**15
"""Tokens from which b_dec and the scale begin."""
RESAMPLING_BATCHES = 100
"""Batches' worth of tokens that resampling draws from."""


class TrainingRun:
    """SAEs in training, one a site, on the same batches.

    Args:
        model: whose activations they are.
        pairs: input and target sites; target None for autoencoders.
        recipe: how to train, with the batch of all processes.
        reading: what the batches depend on, JSON-able.
        batches: where they come from.
        device: where the SAEs are.
        out: the folder to write to; None: nowhere.

    Raises:
        ValueError: if settings do not fit, or `out` holds a training with others.
    """

    def __init__(
        self,
        model: Model,
        pairs: Sequence[tuple[Site, Site | None]],
        recipe: Recipe,
        reading: Mapping[str, Any],
        batches: Batches,
        *,
        device: torch.device,
        out: Path | None,
    ) -> None:
        self.recipe, self.batches, self.out = recipe, batches, out
        self._is_first = rank_and_size()[0] == 0
        names = [[str(one) if one else None for one in pair] for pair in pairs]
        self._settings = {
            "model": model.name,
            "weights": digest_of_model(model),
            "sites": names,
            **reading,
            **asdict(recipe),
        }
        self._provenance = {**model_provenance(model), **reading}
        self._step, self._seconds, self._ended = 0, 0.0, False
        found = None if out is None else read_checkpoint(out)
        if out is not None and found is not None:
            check_settings(found.settings, self._settings, out)
        # Before the first forward pass of any size, so that settings which do not fit cost nothing.
        widths = batches.widths()
        self.learners = [Learner(site, target, recipe, widths, device) for site, target in pairs]
        if found is None:
            self._start()
        else:
            self._restore(found)

    def _start(self) -> None:
        rows = self.batches.sample(FIRST_TOKENS, self.recipe.seed)
        for learner in self.learners:
            learner.start(rows)

    def _restore(self, found: Checkpoint) -> None:
        self._step, self._seconds, self._ended = found.step, found.values["seconds"], bool(found.values["ended"])
        if not self._ended:
            self.batches.restore(_part(found.tensors, "batches"))
        for number, learner in enumerate(self.learners):
            learner.restore(_part(found.tensors, str(number)))
        logger.info("going on with %s after %d of %d steps", self.out, found.step, self.recipe.n_steps)

    def complete(self, *, log_every: int, checkpoint_seconds: float, progress: bool | None) -> dict[str, SAE]:
        """Train to the end, and write the SAEs; by name of the input site."""
        recipe = self.recipe
        resampling = recipe.resampling_steps
        with (
            TrainingLog(self.out if self._is_first else None, self._step) as log,
            progress_bar(
                recipe.n_steps * recipe.batch_size,
                "training",
                "token",
                progress=progress if self._is_first else False,
                done=self._step * recipe.batch_size,
            ) as bar,
        ):
            written = logged = time.perf_counter()
            begun, logged_step = written - self._seconds, self._step
            while self._step < recipe.n_steps and not self._ended:
                losses = self._one_step(resampling)
                if losses is None and not self._step:
                    raise ValueError(f"the text has less than the {recipe.batch_size} tokens of a batch")
                if losses is None:
                    logger.warning("the text ended after %d of %d steps", self._step, recipe.n_steps)
                    break
                bar.update(recipe.batch_size)
                now = time.perf_counter()
                self._seconds = now - begun
                if self._step % log_every == 0 or self._step == recipe.n_steps:
                    speed = (self._step - logged_step) * recipe.batch_size / (now - logged)
                    bar.set_postfix(self._log(log, losses, speed))
                    logged, logged_step = now, self._step
                if now - written >= checkpoint_seconds:
                    self._write_checkpoint()
                    written = now
        self._ended = True
        return self._finish()

    def _one_step(self, resampling: Sequence[int]) -> list[tuple[Loss, dict[Site, Tensor]]] | None:
        rows = self.batches.next_batch()
        if rows is None:
            return None
        if self._step in resampling:
            drawn = self.batches.sample(RESAMPLING_BATCHES * self.recipe.batch_size, self.recipe.seed + self._step)
            for learner in self.learners:
                n = learner.resample(self._step, drawn)
                logger.info("step %d: %d features of %s resampled", self._step, n, learner.site)
        losses = [(learner.step(self._step, rows), rows) for learner in self.learners]
        self._step += 1
        return losses

    def _log(
        self, log: TrainingLog, losses: Sequence[tuple[Loss, Mapping[Site, Tensor]]], speed: float
    ) -> dict[str, str]:
        """Write a row a site; what the progress bar shows of them."""
        rows = []
        for learner, (loss, batch) in zip(self.learners, losses, strict=True):
            row: dict[str, Any] = {
                "step": self._step,
                "tokens": self._step * self.recipe.batch_size,
                "site": str(learner.site),
                **learner.numbers(loss, batch),
                "learning_rate": learner.learning_rate(self._step - 1),
                "tokens_per_second": round(speed, 1),
            }
            log.write(row)
            rows.append(row)
        return _shown(rows)

    def _write_checkpoint(self) -> None:
        """Write the state, without the batches if none is needed any more."""
        if self.out is None or not self._is_first:
            return
        tensors = {} if self._ended else {f"batches.{name}": value for name, value in self.batches.state().items()}
        for number, learner in enumerate(self.learners):
            tensors |= {f"{number}.{name}": value for name, value in learner.state().items()}
        values = {"seconds": self._seconds, "ended": self._ended}
        write_checkpoint(Checkpoint(self._step, self._settings, values, tensors), self.out)

    def _finish(self) -> dict[str, SAE]:
        facts = {
            **self._provenance,
            "tokens": self._step * self.recipe.batch_size,
            "recipe": asdict(self.recipe),
            "seconds": round(self._seconds, 1),
        }
        trained = {str(learner.site): learner.finished(facts) for learner in self.learners}
        self._write_checkpoint()
        if self.out is not None and self._is_first:
            for name, sae in trained.items():
                save(sae, self.out if len(trained) == 1 else self.out / name)
        return trained


def _shown(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Live numbers, means over sites."""
    means = {name: sum(row[name] for row in rows) / len(rows) for name in ("l0", "explained_variance", "dead")}
    return {
        "L0": f"{means['l0']:.1f}",
        "EV": f"{means['explained_variance']:.3f}",
        "dead": f"{means['dead']:.1%}",
    }


def _part(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
