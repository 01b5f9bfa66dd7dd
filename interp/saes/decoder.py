"""Keeping decoder rows at unit norm while training: project the gradient, step, normalise."""

from __future__ import annotations

import torch

from interp.saes.sae import SAE


@torch.no_grad()
def remove_parallel_gradient(sae: SAE) -> None:
    """Removes from the decoder's gradient, in place, what would only change the length of a row.

    Call it between backward and the optimiser's step. A row of zeros keeps its gradient.
    """
    gradient = sae.W_dec.grad
    if gradient is not None:
        directions = torch.nn.functional.normalize(sae.W_dec, dim=-1)
        gradient.sub_((gradient * directions).sum(-1, keepdim=True) * directions)


@torch.no_grad()
def normalise_decoder(sae: SAE) -> None:
    """Scales every decoder row to norm 1, in place; a row of zeros, as a new transcoder's, stays.

    It changes the function; `fold_decoder_norm` does not.
    """
    sae.W_dec.copy_(torch.nn.functional.normalize(sae.W_dec, dim=-1))
