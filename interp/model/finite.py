"""Finding out where a run that ended in NaN or infinity went wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from interp.model.hooks import Run, Tap, tapped
from interp.model.sites import Site
from interp.model.tower import Anatomy


def check_finite(logits: Tensor, anatomy: Anatomy, sites: Sequence[Site], rerun: Callable[[], object]) -> None:
    """Raise if the output at the last position is not finite. Costs one more forward pass, only when it is not.

    Args:
        logits: [batch, pos, d_vocab].
        anatomy: the model's parts.
        sites: where to look, in computation order.
        rerun: repeats the forward pass.

    Raises:
        FloatingPointError: naming the first site and layer with a NaN or an infinity.
    """
    if bool(torch.isfinite(logits[..., -1, :]).all()):
        return
    bad: list[Site] = []

    def look(site: Site) -> Callable[[Tensor, Run], None]:
        def check(activation: Tensor, run: Run) -> None:
            if not bad and not bool(torch.isfinite(activation).all()):
                bad.append(site)

        return check

    # Masked scores are infinite by design, and head results repeat what z says.
    with tapped(anatomy, [Tap(site, look(site)) for site in sites if site.kind not in ("attn_scores", "result")]):
        rerun()
    where = f"first at {bad[0]}" if bad else "only in the logits"
    raise FloatingPointError(f"the model's output is NaN or infinite, {where}: check weights, dtype and edits")
