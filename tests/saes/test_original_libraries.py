"""Files as the original libraries write them give the features and reconstructions that these libraries computed.

`references/make.py` made the numbers, and compares on more vectors and in the other direction too.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from interp import saes

REFERENCES = Path(__file__).parent / "references"
CASES = json.loads((REFERENCES / "originals.json").read_text())


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return load_file(REFERENCES / "originals.safetensors")


@pytest.mark.parametrize("name", CASES)
def test_features_and_reconstruction(name: str, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    folder = tmp_path / name
    write_case(name, tensors, folder)

    sae = saes.load(folder)

    features, output = tensors[f"{name}:features"], tensors[f"{name}:output"]
    # As in make.py.
    x = (torch.sin(1.7 * torch.arange(64 * sae.d_in)).reshape(64, sae.d_in) * 2)[: len(features)]
    assert sae.dtype == torch.float32
    torch.testing.assert_close(sae.encode(x), features, atol=1e-5, rtol=0)
    torch.testing.assert_close(sae(x), output, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "site", "target"),
    [
        ("JumpReLU", "blocks.3.hook_resid_post", None),
        ("layers.3", "blocks.3.hook_resid_post", None),
        ("layers.3.mlp", "blocks.3.ln2.hook_normalized", "blocks.3.hook_mlp_out"),
        ("standard", "blocks.3.attn.hook_z", None),
        ("skip_transcoder", "blocks.3.hook_resid_post", "blocks.3.hook_mlp_out"),
    ],
)
def test_sites(name: str, site: str, target: str | None, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    write_case(name, tensors, tmp_path / name)
    sae = saes.load(tmp_path / name)
    assert (sae.site, sae.target_site) == (site, target)


def write_case(name: str, tensors: dict[str, Tensor], folder: Path) -> None:
    folder.mkdir()
    files = dict(CASES[name])
    weights = {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}
    path = folder / files.pop("weights")
    if path.suffix == ".pt":
        torch.save(weights, path)
    else:
        save_file(weights, path)
    for file, content in files.items():
        (folder / file).write_text(json.dumps(content))
