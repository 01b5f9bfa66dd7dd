"""Vocabularies of whole words: a token is a word, so that every plot shows what a position holds."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

BOS = 0
"""Id of the token that begins every prompt."""
BOS_WORD = "<bos>"

LETTERS = (BOS_WORD, *string.ascii_lowercase[:23])
"""The vocabulary of the wired induction models."""
SYMBOLS = (BOS_WORD, *string.ascii_letters, *string.digits)
"""The vocabulary of the trained induction model."""


def word_tokenizer(words: Sequence[str], *, whole: Sequence[str] = ()) -> Any:
    """A Hugging Face tokenizer that splits at spaces and puts a BOS in front; word i is token i.

    A word that is not in the vocabulary is an error, not an unknown token. Words in `whole` need no spaces around them.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: token for token, word in enumerate(words)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS_WORD} $A", special_tokens=[(BOS_WORD, words.index(BOS_WORD))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS_WORD, eos_token=BOS_WORD, extra_special_tokens=list(whole)
    )
