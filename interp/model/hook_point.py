"""Functions of a user as taps, with TransformerLens's signature `fn(activation, hook)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from interp.model.hooks import Run
from interp.model.sites import Site


class HookPoint:
    """What a hook function receives beside the activation: `name`, `layer()`, and `ctx`, a dict of its own."""

    def __init__(self, site: Site) -> None:
        self.name: str = str(site)
        self.site = site
        self.ctx: dict[str, Any] = {}

    def layer(self) -> int:
        """Index of the block that the hook is in."""
        if self.site.layer is None:
            raise ValueError(f"{self.name} is in no block")
        return self.site.layer


Hook = Callable[[Tensor, HookPoint], Tensor | None]


def hook_tap(fn: Hook, site: Site) -> Callable[[Tensor, Run], Tensor | None]:
    """A user's function as a tap.

    It gets a copy, so that changing it in place neither corrupts caches nor goes unnoticed.
    """
    hook = HookPoint(site)

    def tap(activation: Tensor, run: Run) -> Tensor | None:
        given = activation.clone()
        before = given._version
        returned = fn(given, hook)
        if returned is not None:
            if returned.shape != activation.shape:
                raise ValueError(
                    f"the hook on {site} returned shape {tuple(returned.shape)}; "
                    f"the activation has {tuple(activation.shape)}"
                )
            return returned.to(activation.dtype)
        return given if given._version != before else None

    return tap
