"""Models whose tokenizers differ where tasks care: how digits are split, and whether a BOS comes first."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import interp
from interp.tasks import words

SPOKEN = (
    "So Well I think is such a an really very isn he she t good great nice kind funny smart friendly strong friend "
    "person teacher student neighbor cook doctor writer singer The that the near behind beside by from likes like "
    "sees see knows know wants want loves love was has are were have def self param Q A B C D Answer What color On "
    "there you Then went to gave had lot of fun at working decided thinking about going wanted long argument and "
    "afterwards said After When got give it While commuting lunch Afterwards Friends found lasted year "
)
DIGITS = {"pairs": r" ?\d{1,2}", "single": r"\d", "threes": r"\d{1,3}"}


def word_list() -> list[str]:
    listed = [value for name, value in vars(words).items() if name.isupper()]
    flat = [word for group in listed for item in group for word in ([item] if isinstance(item, str) else item)]
    return [*flat, *(color.capitalize() for color in words.COLORS), *SPOKEN.split()]


def byte_level_tokenizer(digits: str, *, bos: bool) -> transformers.PreTrainedTokenizerFast:
    """Every word of the tasks is one token; digits are split as GPT-2 ("pairs"), SmolLM2 or Llama 3 ("threes") do."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(DIGITS[digits]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=12_000,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    numbers = [str(number) for number in range(1000)] + [f"{number:02d}" for number in range(100)]
    numbers += [f"{number:03d}" for number in range(1000)]
    bpe.train_from_iterator([f" {word} {word}" for word in word_list()] + [f"{one} {one}" for one in numbers], trainer)
    if bos:
        bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="<s>")


def metaspace_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Words carry "▁" and texts begin with one, as in Llama 2; single digits; adds a BOS."""
    bpe = Tokenizer(models.BPE(byte_fallback=True))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first"),
            pre_tokenizers.Split(Regex(r"\d|[.,:?'\n]"), behavior="isolated"),
        ]
    )
    bpe.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="first")
    alphabet = sorted(set("".join(word_list()) + "▁0123456789.,:?'\n\"():'ABCDEFGHIJKLMNOPQRSTUVWXYZ"))
    trainer = trainers.BpeTrainer(
        vocab_size=12_000, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([f"{word} {word} {word}" for word in word_list()], trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="<s>")


def tiny_model(tokenizer: transformers.PreTrainedTokenizerFast, name: str) -> interp.Model:
    """A random one-layer model for that tokenizer."""
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    torch.manual_seed(0)
    return interp.Model(transformers.LlamaForCausalLM(config).eval(), tokenizer, name=name)


@pytest.fixture(scope="session")
def tokenised_as() -> Callable[[str], interp.Model]:
    """A tiny model by the way its tokenizer works: "pairs", "single", "threes" or "metaspace"."""
    made: dict[str, interp.Model] = {}

    def model(kind: str) -> interp.Model:
        if kind not in made:
            tokenizer = (
                metaspace_tokenizer() if kind == "metaspace" else byte_level_tokenizer(kind, bos=kind == "threes")
            )
            made[kind] = tiny_model(tokenizer, kind)
        return made[kind]

    return model
