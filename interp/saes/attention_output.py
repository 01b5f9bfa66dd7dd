"""The attention-output SAEs of Kissane et al.: `<name>.pt` beside `<name>_cfg.json`, one ReLU SAE a layer on z.

    features = ReLU((z - b_dec) @ W_enc + b_enc)        z: the heads' outputs before W_O, concatenated

Source: Kissane et al. 2024 (arXiv 2406.17759); the release is ckkissane/attn-saes-gpt2-small-all-layers.
"""

from __future__ import annotations

from pathlib import Path

from interp.model.sites import Site
from interp.saes.conversion import assemble
from interp.saes.sae import SAE
from interp.saes.weight_files import Settings, read_settings, read_weights

SETTINGS_ENDING = "_cfg.json"


def load(path: Path) -> SAE:
    """The SAE in a `.pt` file, or in a folder with one.

    Raises:
        NotImplementedError: if it was trained on one head.
        ValueError: naming file and field, if a file is damaged or foreign, or there are several in the folder.
    """
    file = _weights_file(path)
    settings, weights = read_settings(settings_of(file)), read_weights(file)
    if not settings.get("concat_heads", bool, True):
        raise NotImplementedError(f"{settings.path}: field 'concat_heads' is false; SAEs of single heads are not read")
    d_in, d_sae = settings.size("act_size"), settings.size("dict_size")
    state = {
        "W_enc": weights.take("W_enc", d_in, d_sae),
        "b_enc": weights.take("b_enc", d_sae),
        "W_dec": weights.take("W_dec", d_sae, d_in),
        "b_dec": weights.take("b_dec", d_in),
    }
    weights.finish()
    metadata = {
        "source_format": "attention_output",
        "model_name": settings.get("model_name", str, None),
        "context_size": settings.get("seq_len", int, None),
    }
    return assemble(
        "relu",
        {"d_in": d_in, "d_sae": d_sae, "apply_b_dec_to_input": True},
        state,
        site=_site(settings),
        metadata={name: value for name, value in metadata.items() if value is not None},
    )


def settings_of(weights_file: Path) -> Path:
    """The settings that belong to a weights file."""
    return weights_file.with_name(weights_file.stem + SETTINGS_ENDING)


def _weights_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    files = sorted(file for file in path.glob("*.pt") if settings_of(file).exists())
    if len(files) != 1:
        named = ", ".join(file.name for file in files) or "none"
        raise ValueError(f"{path}: several SAEs or none ({named}); give the path of one .pt file")
    return files[0]


def _site(settings: Settings) -> str:
    """`act_name` is the whole hook name, or the part after the layer."""
    name = settings.get("act_name", str)
    try:
        return str(Site.parse(name) if name.startswith("blocks.") else Site(name, settings.get("layer", int)))
    except ValueError as error:
        raise ValueError(f"{settings.path}: field 'act_name': {error}") from None
