"""One SAE in training: its optimiser, its schedule, its dead features, and one step."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.model import Site
from interp.saes.architectures import make
from interp.saes.checkpoint import optimiser_tensors, restore_optimiser
from interp.saes.decoder import normalise_decoder, remove_parallel_gradient
from interp.saes.distributed import average_gradients, mean_over_processes
from interp.saes.folding import fold_input_scale
from interp.saes.jumprelu import JumpReLUSAE
from interp.saes.losses import Loss
from interp.saes.recipe import Recipe
from interp.saes.resampling import FiringRecord, resample
from interp.saes.sae import SAE
from interp.saes.schedule import learning_rate_factor, sparsity_factor


class Learner:
    """An SAE in training.

    Args:
        site: where its input is read.
        target_site: what a transcoder predicts; None for an autoencoder.
        recipe: how it is trained.
        widths: numbers a row, by site.
        device: where it is trained.

    It is ready after `start` or `restore`.
    """

    def __init__(
        self, site: Site, target_site: Site | None, recipe: Recipe, widths: Mapping[Site, int], device: torch.device
    ) -> None:
        self.site, self.target_site, self.recipe = site, target_site, recipe
        d_in = widths[site]
        d_sae = recipe.features(d_in)
        self._scale = self._target_scale = 1.0
        more = {} if target_site is None else {"target_site": str(target_site), "d_out": widths[target_site]}
        settings = {**recipe.settings, **more}
        self.sae: SAE = make(recipe.architecture, d_in, d_sae, seed=recipe.seed, site=str(site), **settings).to(device)
        self.rate = recipe.rate(d_sae)
        self.parameters = [one for one in self.sae.parameters() if one.requires_grad]
        self.optimiser = torch.optim.Adam(self.parameters, lr=self.rate, fused=True)
        self.firing = FiringRecord(d_sae, device)
        self._resampled: list[int] = []

    def start(self, rows: Mapping[Site, Tensor]) -> None:
        """Begin from activations: their size gives the scale, their mean b_dec."""
        if self.recipe.normalise:
            self._scale, self._target_scale = (
                float(one.shape[1] ** 0.5 / one.norm(dim=-1).mean()) for one in self._pair(rows)
            )
        with torch.no_grad():
            self.sae.b_dec.copy_(self._pair(rows)[1].mean(0))
            if self.recipe.unit_decoder:
                normalise_decoder(self.sae)

    def step(self, step: int, rows: Mapping[Site, Tensor]) -> Loss:
        """One step on this process's share of a batch; steps count from 0."""
        recipe = self.recipe
        x, target = self._pair(rows)
        loss = self._loss(x, target)
        total = loss.total - (1 - sparsity_factor(step, recipe.sparsity_warm_up)) * loss.sparsity
        self.optimiser.zero_grad()
        total.backward()
        average_gradients(self.parameters)
        if recipe.unit_decoder:
            remove_parallel_gradient(self.sae)
        if recipe.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, recipe.clip)
        for group in self.optimiser.param_groups:
            group["lr"] = self.learning_rate(step)
        self.optimiser.step()
        with torch.no_grad():
            if recipe.unit_decoder:
                normalise_decoder(self.sae)
            if isinstance(self.sae, JumpReLUSAE):
                # Below 0 the penalty would count pre-activations that are off.
                self.sae.threshold.clamp_(min=0)
            # A threshold that follows the activations is each process's own until here.
            for one in self.sae.buffers():
                one.copy_(mean_over_processes(one))
        self.firing.update(loss.counts, recipe.batch_size)
        return loss

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step."""
        recipe = self.recipe
        return self.rate * learning_rate_factor(
            step, recipe.n_steps, warm_up=recipe.warm_up_steps, decay=recipe.decay_steps, resampled=self._resampled
        )

    @property
    def dead(self) -> Bool[Tensor, " d_sae"]:
        """Features that have not fired for as many tokens as the recipe says."""
        return self.firing.dead(self.recipe.dead_after)

    def resample(self, step: int, rows: Mapping[Site, Tensor]) -> int:
        """Give features that did not fire since the last resampling a new start; how many there were."""
        recipe = self.recipe
        x, target = self._pair(rows)
        dead = self.firing.dead((recipe.resample_every or 0) * recipe.batch_size)
        chosen = resample(
            self.sae, self.optimiser, dead, x, target, batch_size=recipe.batch_size, seed=recipe.seed + step
        )
        self.firing.tokens_since[chosen] = 0
        self._resampled.append(step)
        return len(chosen)

    def numbers(self, loss: Loss, rows: Mapping[Site, Tensor]) -> dict[str, float]:
        """What the log says of a step, over all processes."""
        target = self._pair(rows)[1]
        distance = (target - target.mean(0)).square().sum(-1).mean()
        error = (target - loss.output).square().sum(-1).mean()
        values = torch.stack(
            [
                loss.total.detach(),
                loss.reconstruction.detach(),
                loss.sparsity.detach(),
                loss.auxiliary.detach(),
                loss.counts.sum() / len(target),
                1 - error / distance,
            ]
        )
        names = ("loss", "reconstruction", "sparsity", "auxiliary", "l0", "explained_variance")
        means = mean_over_processes(values.float()).tolist()
        return {**dict(zip(names, means, strict=True)), "dead": float(self.dead.float().mean())}

    def finished(self, metadata: Mapping[str, Any]) -> SAE:
        """The SAE for activations as they are: the scale of its input folded into its weights."""
        sae = self.sae
        if self.recipe.normalise:
            sae = fold_input_scale(sae, self._scale, target_scale=self._target_scale)
        sae.metadata = {**sae.metadata, **metadata}
        return sae.eval()

    def state(self) -> dict[str, Tensor]:
        """All that `restore` needs."""
        optimiser = {f"optimiser.{name}": value for name, value in optimiser_tensors(self.optimiser).items()}
        weights = {f"sae.{name}": value for name, value in self.sae.state_dict().items()}
        return {
            **weights,
            **optimiser,
            "tokens_since": self.firing.tokens_since,
            "scales": torch.tensor([self._scale, self._target_scale], dtype=torch.float64),
            "resampled": torch.tensor(self._resampled, dtype=torch.long),
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state."""
        self.sae.load_state_dict(_below("sae.", state))
        restore_optimiser(self.optimiser, _below("optimiser.", state))
        self.firing.tokens_since.copy_(state["tokens_since"])
        self._scale, self._target_scale = state["scales"].tolist()
        self._resampled = state["resampled"].tolist()

    def _loss(self, x: Float[Tensor, "token d_in"], target: Float[Tensor, "token d_out"]) -> Loss:
        autocast = self.recipe.autocast
        with torch.autocast(x.device.type, getattr(torch, autocast)) if autocast else nullcontext():
            return self.sae.loss(x, target, dead=self.dead)

    def _pair(self, rows: Mapping[Site, Tensor]) -> tuple[Tensor, Tensor]:
        """Input and target, scaled."""
        x = _scaled(rows[self.site], self._scale)
        return x, x if self.target_site is None else _scaled(rows[self.target_site], self._target_scale)


def _scaled(rows: Tensor, scale: float) -> Tensor:
    return rows if scale == 1 else rows * scale


def _below(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
