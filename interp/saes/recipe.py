"""How SAEs are trained, as one frozen value: what a checkpoint must agree with."""

from __future__ import annotations

import json
import operator
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from interp.saes.schedule import resampling_steps

WIDTH_OF_RATE = 2**14
"""Features at which the default learning rate is 2e-4."""
MOST_WARM_UP = 1000
DEAD_AFTER = 10_000_000


@dataclass(frozen=True)
class Recipe:
    """The numbers of `interp.saes.train`, under its names; JSON-able. With model, sites and text they give the result.

    Raises:
        ValueError: naming the first number that is out of range.
    """

    architecture: str
    settings: Mapping[str, Any]
    """The architecture's own numbers: k, l1, ..."""
    expansion: float
    d_sae: int | None
    n_tokens: int
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
    autocast: str | None
    seed: int

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if str(one.type).startswith("int") and value is not None:
                # Of any type that is whole: a seed of numpy is to draw what the same one of Python does.
                object.__setattr__(self, one.name, _whole(one.name, value))
        for name in ("n_tokens", "batch_size", "expansion"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}; give more than 0")
        for name in ("d_sae", "learning_rate", "clip", "dead_after_tokens", "resample_every"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value}; give more than 0, or None")
        for name in ("warm_up", "decay", "sparsity_warm_up", "resample_times"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name}={getattr(self, name)}; give 0 or more")
        if self.autocast not in (None, "bfloat16", "float16"):
            raise ValueError(f"autocast={self.autocast}; give torch.bfloat16 or torch.float16, or None")
        for name, value in {**self.settings, **vars(self)}.items():
            try:
                json.dumps(value)
            except (TypeError, ValueError):
                raise ValueError(f"{name}={value!r}; give a plain number, text or list, as files can hold") from None

    def for_processes(self, n: int) -> Recipe:
        """With the batch of all processes together."""
        return replace(self, batch_size=self.batch_size * n)

    @property
    def n_steps(self) -> int:
        """Steps in all."""
        return -(-self.n_tokens // self.batch_size)

    @property
    def warm_up_steps(self) -> int:
        """Steps of warm-up: a thousand, at most a tenth of all, unless given."""
        return min(MOST_WARM_UP, self.n_steps // 10) if self.warm_up is None else self.warm_up

    @property
    def decay_steps(self) -> int:
        """Steps of the final decay: a fifth of all unless given."""
        return self.n_steps // 5 if self.decay is None else self.decay

    @property
    def dead_after(self) -> int:
        """Tokens without firing after which a feature is dead: ten million, at most a tenth of all, unless given."""
        most = max(1, min(DEAD_AFTER, self.n_tokens // 10))
        return most if self.dead_after_tokens is None else self.dead_after_tokens

    @property
    def resampling_steps(self) -> list[int]:
        """Steps before which dead features are resampled."""
        return resampling_steps(
            self.n_steps, every=self.resample_every, times=self.resample_times, decay=self.decay_steps
        )

    def features(self, d_in: int) -> int:
        """Width of the SAE of an activation of this width."""
        return self.d_sae or max(1, round(self.expansion * d_in))

    def rate(self, d_sae: int) -> float:
        """The full learning rate of an SAE of this width."""
        return self.learning_rate or 2e-4 / (d_sae / WIDTH_OF_RATE) ** 0.5


def _whole(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name}={value!r}; give a whole number") from None
