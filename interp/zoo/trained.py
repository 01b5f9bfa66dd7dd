"""The trained models: what they are, what they were trained on, and their weights as they ship with the package.

Their prompts are drawn here, for training and for tasks alike; `interp.zoo.training` holds the scripts.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

from interp.zoo.configurations import llama_config
from interp.zoo.prompts import Prompt
from interp.zoo.words import BOS, BOS_WORD, SYMBOLS

WEIGHTS = Path(__file__).parent / "weights"

NAMES = (
    "Mary", "John", "Anna", "Paul", "Emma", "Jack", "Lucy", "Mark", "Rose", "Adam",
    "Kate", "Luke", "Jane", "Dean", "Ruth", "Carl", "Lily", "Noah", "Grace", "Henry",
)  # fmt: skip
PLACES = ("store", "park", "school", "office", "station", "garden")
GIFTS = ("drink", "ring", "book", "ball", "bone", "basket")
# All of one length, so that a batch and a task are one tensor.
TEMPLATES = tuple(
    template.split()
    for template in (
        "When {first} and {second} visited the {place} , {S2} gave a {gift} to",
        "Then {first} and {second} found a {gift} , and {S2} handed it to",
        "After {first} and {second} left the {place} , {S2} showed a {gift} to",
        "At the {place} {first} met {second} , and {S2} passed the {gift} to",
    )
)
_FIXED = tuple(dict.fromkeys(word for template in TEMPLATES for word in template if not word.startswith("{")))
IOI_WORDS = (BOS_WORD, *NAMES, *PLACES, *GIFTS, *_FIXED)


def induction_2l() -> Any:
    """Llama of 2 layers with 4 heads, attention only: its MLPs are zero. Random weights otherwise."""
    hf = _llama(len(SYMBOLS), num_hidden_layers=2, num_key_value_heads=4, intermediate_size=4)
    for block in hf.model.layers:
        for parameter in block.mlp.parameters():
            torch.nn.init.zeros_(parameter)
    return hf


def ioi_small() -> Any:
    """Llama of 3 layers with 4 heads on 2 key/value heads, and gated MLPs. Random weights."""
    return _llama(len(IOI_WORDS), num_hidden_layers=3, num_key_value_heads=2, intermediate_size=128)


def _llama(n_words: int, **sizes: int) -> Any:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM(
        llama_config(
            n_words,
            rope_theta=1e4,
            hidden_size=64,
            num_attention_heads=4,
            head_dim=16,
            max_position_embeddings=64,
            **sizes,
        )
    )


def with_weights(hf: Any, name: str) -> Any:
    """The model with the weights that ship for this name.

    Raises:
        FileNotFoundError: if the installation lacks the file.
    """
    from safetensors.torch import load_file

    path = WEIGHTS / f"{name}.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"the weights of {name!r} are missing: {path}; install interp again")
    hf.load_state_dict(load_file(path), strict=True)
    return hf


def is_held_out(one: int, other: int) -> bool:
    """Whether the names with these tokens never meet in training: a fifth of the pairs, in both orders."""
    return (one + other) % 5 == 0


def draw_ioi(rng: random.Random, number: int, *, held_out: bool = True) -> Prompt:
    """A sentence with two names that never met in training (or did), S first for odd numbers; corrupted, S2 is IO."""
    while True:
        subject, other = rng.sample(range(1, 1 + len(NAMES)), 2)
        if is_held_out(subject, other) == held_out:
            break
    subject_first = number % 2 == 1
    template = rng.choice(TEMPLATES)
    words = {
        "{first}": subject if subject_first else other,
        "{second}": other if subject_first else subject,
        "{S2}": subject,
        "{place}": IOI_WORDS.index(rng.choice(PLACES)),
        "{gift}": IOI_WORDS.index(rng.choice(GIFTS)),
    }
    clean = (BOS, *(words[word] if word in words else IOI_WORDS.index(word) for word in template))
    first, second, s2 = (1 + template.index(word) for word in ("{first}", "{second}", "{S2}"))
    return Prompt(
        clean=clean,
        corrupted=(*clean[:s2], other, *clean[s2 + 1 :]),
        answer=other,
        wrong=subject,
        positions={
            "IO": second if subject_first else first,
            "S1": first if subject_first else second,
            "S2": s2,
            "END": len(clean) - 1,
        },
    )
