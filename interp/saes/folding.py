"""The same function with other weights: decoder norms, input scales and b_dec folded into the encoder.

Every fold returns a new SAE, for inference: coefficients and bandwidths of the loss are not translated.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch

from interp.saes.gated import GatedSAE
from interp.saes.jumprelu import JumpReLUSAE
from interp.saes.sae import SAE
from interp.saes.topk import BatchTopKFamily, TopKSAE

AnySAE = TypeVar("AnySAE", bound=SAE)

_EQUAL_NORMS = 1e-4
"""Relative difference up to which decoder norms count as equal, which a TopK needs."""


@torch.no_grad()
def fold_decoder_norm(sae: SAE) -> SAE:
    """Decoder rows of norm 1 (a row of zeros stays), features multiplied by the norms they had; the same output.

    BatchTopK and Matryoshka become JumpReLU (`as_jumprelu`), because each feature then needs its own threshold.

    Raises:
        ValueError: for a TopK whose norms differ: which k features are largest would change.
    """
    folded = as_jumprelu(sae) if isinstance(sae, BatchTopKFamily) else copy.deepcopy(sae)
    norms = folded.W_dec.norm(dim=-1)
    norms = torch.where(norms == 0, 1.0, norms)
    if isinstance(sae, TopKSAE):
        if norms.max() > norms.min() * (1 + _EQUAL_NORMS):
            span = f"{norms.min():.4g}..{norms.max():.4g}"
            raise ValueError(f"decoder norms of this TopK run over {span}; folding them would change what it selects")
        norms = norms.mean().expand_as(norms)
    folded.W_dec.div_(norms[:, None])
    folded.W_enc.mul_(norms)
    for name in folded.feature_vectors:
        if name != "r_mag":
            getattr(folded, name).mul_(norms)
    return folded


@torch.no_grad()
def fold_input_scale(sae: AnySAE, scale: float, *, target_scale: float | None = None) -> AnySAE:
    """Of an SAE that was trained on `scale * x`: the one that reads x and returns the reconstruction of x.

    Features and thresholds keep their values.

    Args:
        sae: what was trained on scaled activations.
        scale: what they were multiplied by.
        target_scale: of a transcoder: what its targets were multiplied by; `scale` by default.

    Raises:
        ValueError: if a scale is not positive, or the scale of the target of an autoencoder differs from the input's.
    """
    target_scale = scale if target_scale is None else target_scale
    if not (0 < scale < float("inf") and 0 < target_scale < float("inf")):
        raise ValueError(f"scale={scale} and target_scale={target_scale} must be positive and finite")
    if sae.apply_b_dec_to_input and target_scale != scale:
        raise ValueError("input and output of this SAE share b_dec: they cannot have different scales; see fold_b_dec")
    folded = copy.deepcopy(sae)
    folded.W_enc.mul_(scale)
    folded.W_dec.div_(target_scale)
    folded.b_dec.div_(target_scale)
    if folded.W_skip is not None:
        folded.W_skip.mul_(scale / target_scale)
    return folded


@torch.no_grad()
def fold_b_dec(sae: AnySAE) -> AnySAE:
    """The subtraction of b_dec from the input folded into the encoder's bias; the same features."""
    folded = copy.deepcopy(sae)
    if not sae.apply_b_dec_to_input:
        return folded
    shift = folded.b_dec @ folded.W_enc
    if isinstance(folded, GatedSAE):
        folded.b_gate.sub_(shift)
        folded.b_mag.sub_(shift * folded.r_mag.exp())
    else:
        folded.b_enc.sub_(shift)
    folded.apply_b_dec_to_input = False
    return folded


@torch.no_grad()
def as_jumprelu(sae: BatchTopKFamily) -> JumpReLUSAE:
    """The JumpReLU SAE with the weights of a BatchTopK or Matryoshka and its threshold for every feature.

    It encodes as the other does at inference; this is also how other libraries store BatchTopK.
    """
    made = JumpReLUSAE(
        sae.d_in,
        sae.d_sae,
        d_out=sae.d_out,
        skip=sae.W_skip is not None,
        apply_b_dec_to_input=sae.apply_b_dec_to_input,
        site=sae.site,
        target_site=sae.target_site,
        metadata=copy.deepcopy(sae.metadata),
    ).to(sae.W_enc)
    made.train(sae.training).requires_grad_(sae.W_enc.requires_grad)
    for name, parameter in made.named_parameters():
        parameter.copy_(getattr(sae, name))
    return made
