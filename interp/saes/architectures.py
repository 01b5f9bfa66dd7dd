"""The architectures by name, and how a new one is initialised."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.saes.gated import GatedSAE
from interp.saes.jumprelu import JumpReLUSAE
from interp.saes.matryoshka import MatryoshkaSAE
from interp.saes.relu import ReLUSAE
from interp.saes.sae import SAE
from interp.saes.topk import BatchTopKSAE, TopKSAE

ARCHITECTURES: dict[str, type[SAE]] = {
    kind.architecture: kind for kind in (ReLUSAE, GatedSAE, TopKSAE, BatchTopKSAE, JumpReLUSAE, MatryoshkaSAE)
}
"""Name -> class: `ARCHITECTURES[name](**sae.settings())` is an empty one like `sae`."""

INITIAL_THRESHOLD = 0.01
"""Of a new JumpReLU."""


def make(
    architecture: str,
    d_in: int,
    d_sae: int,
    *,
    seed: int = 0,
    b_dec: Float[Tensor, " d_out"] | None = None,
    target_site: str | None = None,
    d_out: int | None = None,
    **settings: Any,
) -> SAE:
    """A new sparse autoencoder or transcoder, on the CPU in float32.

    Decoder rows are random directions of norm 1. The encoder is the decoder transposed; that of a transcoder has random
    directions of its own. Other biases are 0 and thresholds of JumpReLU `INITIAL_THRESHOLD`; a skip connection is 0.

    >>> sae = make("topk", 576, 4608, k=32, site="blocks.15.attn.hook_z")

    Args:
        architecture: a name of `ARCHITECTURES`.
        d_in: width of the input: of `hook_z` heads * d_head.
        d_sae: number of features.
        seed: of the directions.
        b_dec: the decoder's bias, such as the mean or the geometric median of what is predicted; 0 by default.
        target_site: of a transcoder: what is predicted. Then nothing is subtracted from the input.
        d_out: of a transcoder: width of the target.
        **settings: the architecture's own numbers, such as `k` or `l1`, and `site`, `metadata`, `skip`,
            `apply_b_dec_to_input`; see the class and `SAE`.

    Raises:
        ValueError: for an unknown architecture or setting, one that the architecture refuses, or a b_dec of another
            width.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"{architecture!r} is not an architecture; choose one of {', '.join(ARCHITECTURES)}")
    kind = ARCHITECTURES[architecture]
    known = _setting_names(kind)
    unknown = [name for name in settings if name not in known]
    if unknown:
        raise ValueError(f"{architecture} has no setting {unknown[0]!r}; it has {', '.join(known)}")
    is_transcoder = target_site is not None or d_out not in (None, d_in)
    if is_transcoder:
        settings.setdefault("apply_b_dec_to_input", False)
    sae = kind(d_in, d_sae, target_site=target_site, d_out=d_out, **settings)
    if b_dec is not None and b_dec.shape != sae.b_dec.shape:
        raise ValueError(f"b_dec is {list(b_dec.shape)}; it must be {list(sae.b_dec.shape)}, the width of the output")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        sae.W_dec.copy_(_directions(sae.W_dec, generator))
        sae.W_enc.copy_((_directions(sae.W_enc.T, generator) if is_transcoder else sae.W_dec).T)
        if b_dec is not None:
            sae.b_dec.copy_(b_dec)
        if isinstance(sae, JumpReLUSAE):
            sae.threshold.fill_(INITIAL_THRESHOLD)
    return sae


def _directions(like: Tensor, generator: torch.Generator) -> Tensor:
    """Random rows of norm 1."""
    return torch.nn.functional.normalize(torch.randn(like.shape, generator=generator), dim=-1)


def _setting_names(kind: type[SAE]) -> list[str]:
    """Keyword arguments of the class: its own first, then what it takes from the classes above."""
    names: list[str] = []
    for one in kind.__mro__:
        if issubclass(one, SAE) and "__init__" in vars(one):
            parameters = inspect.signature(one.__init__).parameters.values()
            names += [each.name for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY]
    return names
