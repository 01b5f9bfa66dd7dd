"""Keeping decoder rows at unit norm while training: project the gradient, step, normalise."""

from __future__ import annotations

import torch

from interp.saes.sae import SAE

BLOCK = 128
"""Rows at once on a CPU, so that what is made on the way stays in its cache."""
SMALLEST = 1e-12
"""Norm below which a row is not scaled to 1."""


@torch.no_grad()
def remove_parallel_gradient(sae: SAE) -> None:
    """Removes from the decoder's gradient, in place, what would only change the length of a row.

    Call it between backward and the optimiser's step. A row of zeros keeps its gradient.
    """
    gradient = sae.W_dec.grad
    if gradient is not None:
        for rows, slopes in zip(sae.W_dec.split(_block(sae)), gradient.split(_block(sae)), strict=True):
            sizes = rows.square().sum(-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
            slopes.addcmul_(rows, (slopes * rows).sum(-1, keepdim=True) / sizes, value=-1)


@torch.no_grad()
def normalise_decoder(sae: SAE) -> None:
    """Scales every decoder row to norm 1, in place; a row of zeros stays.

    It changes the function; `fold_decoder_norm` does not.
    """
    for rows in sae.W_dec.split(_block(sae)):
        rows.div_(torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp_min(SMALLEST))


def _block(sae: SAE) -> int:
    return BLOCK if sae.device.type == "cpu" else sae.d_sae
