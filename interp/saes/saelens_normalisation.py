"""SAELens's normalisation of the input, folded into the weights where it is an affine map of known numbers.

| `normalize_activations` | what is done |
|---|---|
| none | nothing |
| expected_average_only_in | trained on c * x; c is read from `activation_scaler.json` beside the weights |
| covariance_whitening | trained on (x - mean) @ M; these are read from `activation_whitening.safetensors` |
| layer_norm, constant_norm_rescale | refused: every token has its own scale, which no weights can hold |
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch

from interp.saes.folding import fold_input_scale
from interp.saes.gated import GatedSAE
from interp.saes.sae import SAE
from interp.saes.weight_files import Settings, read_settings, read_weights

SCALER_FILE = "activation_scaler.json"
WHITENING_FILE = "activation_whitening.safetensors"


def fold_normalisation(sae: SAE, settings: Settings) -> SAE:
    """The SAE that reads activations as they are.

    Raises:
        NotImplementedError: for a normalisation with numbers of each token, or whose numbers are not in the folder.
        ValueError: for one that is not known.
    """
    mode, folder = settings.get("normalize_activations", str, "none"), settings.path.parent
    if mode == "none":
        return sae
    field = f"{settings.path}: field 'normalize_activations' is {mode!r}"
    if sae.target_site is not None or sae.d_out != sae.d_in:
        raise NotImplementedError(f"{field}; normalised transcoders are not read")
    if mode in ("layer_norm", "constant_norm_rescale"):
        raise NotImplementedError(f"{field}: a scale for each token cannot be folded into the weights")
    if mode == "expected_average_only_in":
        if not (folder / SCALER_FILE).exists():
            raise NotImplementedError(
                f"{field}, and {SCALER_FILE} with its 'scaling_factor', sqrt(d_in) / mean norm, is not there"
            )
        return fold_input_scale(sae, _scale(folder / SCALER_FILE))
    if mode == "covariance_whitening":
        if not (folder / WHITENING_FILE).exists():
            raise NotImplementedError(f"{field}, and {WHITENING_FILE} is not there")
        return _fold_whitening(sae, folder / WHITENING_FILE)
    raise ValueError(f"{field}, which is not known")


def _scale(path: Path) -> float:
    scale = read_settings(path).get("scaling_factor", float)
    if not 0 < scale < float("inf"):
        raise ValueError(f"{path}: field 'scaling_factor' is {scale}; it must be positive")
    return scale


@torch.no_grad()
def _fold_whitening(sae: SAE, path: Path) -> SAE:
    """Encoder and decoder of (x - mean) @ matrix as those of x, in float64: the matrix can be badly conditioned."""
    file, d = read_weights(path), sae.d_in
    mean, matrix, inverse = (
        file.take(name, *shape, dtype=torch.float64)
        for name, shape in (("mean", (d,)), ("matrix", (d, d)), ("inverse_matrix", (d, d)))
    )
    folded = copy.deepcopy(sae)
    W_enc = matrix @ sae.W_enc.double()
    folded.W_enc.copy_(W_enc)
    folded.W_dec.copy_(sae.W_dec.double() @ inverse)
    folded.b_dec.copy_(sae.b_dec.double() @ inverse + mean)
    if not sae.apply_b_dec_to_input:
        shift = mean @ W_enc
        if isinstance(folded, GatedSAE):
            folded.b_gate.sub_(shift)
            folded.b_mag.sub_(shift * folded.r_mag.exp())
        else:
            folded.b_enc.sub_(shift)
    return folded
