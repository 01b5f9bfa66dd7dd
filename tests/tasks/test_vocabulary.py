"""One-token words, answers in context, and positions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tokenizers import processors

import interp
from interp import tasks
from interp.tasks.template import fill
from interp.tasks.vocabulary import answer_id, one_token_words, prompt_ids, token_position


def test_only_one_token_words_are_kept(tiny_llama: interp.Model):
    assert one_token_words(tiny_llama, ("Mary", "Zebulon", "John", "Mary"), kind="names") == ["Mary", "John"]


def test_too_few_words_say_how_many(tiny_llama: interp.Model):
    with pytest.raises(ValueError, match=r"needs 2 names that are one token; .* has 1 of the 2 known ones \(Mary\)"):
        one_token_words(tiny_llama, ("Mary", "Zebulon"), kind="names", at_least=2)


def test_a_task_without_enough_words(tiny_llama: interp.Model):
    with pytest.raises(ValueError, match="needs 12 argument names that are one token"):
        tasks.docstring(tiny_llama)


def test_more_prompts_than_there_are(tokenised_as: Callable[[str], interp.Model]):
    with pytest.raises(ValueError, match=r"found \d+ different prompts, 500 needed; ask for fewer"):
        tasks.subject_verb_agreement(tokenised_as("single"), n=500, structure="simple")
    with pytest.raises(ValueError, match="n is 0"):
        tasks.ioi(tokenised_as("single"), n=0)


@pytest.mark.parametrize("kind", ["single", "threes", "metaspace"])
def test_answers_and_positions_in_context(kind: str, tokenised_as: Callable[[str], interp.Model]):
    model = tokenised_as(kind)
    text = "When Mary and John went to"
    assert model.to_str_tokens([answer_id(model, text, " Mary")])[0].strip() == "Mary"
    ids = prompt_ids(model, text)
    at = token_position(model, text, text.index(" and"))
    assert ids[at] == answer_id(model, "the", " Mary")
    assert token_position(model, text, len(text)) == len(ids) - 1


def test_a_position_inside_a_token(tiny_llama: interp.Model):
    with pytest.raises(ValueError, match="no token of 'the garden' ends after 'the gar'"):
        token_position(tiny_llama, "the garden", 7)


def test_a_tokenizer_that_closes_texts_is_refused(tiny_llama: interp.Model):
    backend = tiny_llama.tokenizer.backend_tokenizer
    before = backend.post_processor
    backend.post_processor = processors.TemplateProcessing(single="$A <|end|>", special_tokens=[("<|end|>", 0)])
    try:
        with pytest.raises(ValueError, match=r"ends 'the' with '<\|end\|>'; .*add_eos_token=False"):
            prompt_ids(tiny_llama, "the")
    finally:
        backend.post_processor = before or processors.Sequence([])


def test_fill_says_where_words_end():
    text, ends = fill("{A} and {B}, {A}", {"A": "x", "B": "yy"})
    assert text == "x and yy, x"
    assert ends == {"A": [1, 11], "B": [8]}


def test_an_answer_without_a_space_is_read_in_context(tokenised_as: Callable[[str], interp.Model]):
    """By itself, "4" begins with "▁" here and would be another token."""
    model = tokenised_as("metaspace")
    (*_, expected) = model.to_tokens("the year 174")[0].tolist()
    assert answer_id(model, "the year 17", "4") == expected
