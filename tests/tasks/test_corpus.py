"""Natural text from installed packages: shape, determinism, no repetition, and what counts as prose."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import interp
from interp.tasks import corpus
from interp.tasks.corpus import natural_text


def test_same_seed_same_text(tiny_llama: interp.Model):
    tokens = natural_text(tiny_llama, 12, 40, seed=3)
    assert tokens.shape == (12, 40)
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens, natural_text(tiny_llama, 12, 40, seed=3))
    assert torch.equal(tokens[:5], natural_text(tiny_llama, 5, 40, seed=3))
    assert not torch.equal(tokens, natural_text(tiny_llama, 12, 40, seed=4))


def test_no_paragraph_occurs_twice(monkeypatch: pytest.MonkeyPatch):
    some = corpus._folders()[::20]
    monkeypatch.setattr(corpus, "_folders", lambda: (*some, *some))
    passages = list(corpus._passages(600, seed=0))
    paragraphs = [paragraph for passage in passages for paragraph in passage.split("\n\n")]
    assert len(set(paragraphs)) == len(paragraphs) > 50
    assert min(map(len, passages)) >= 600


def test_passages_begin_a_paragraph_and_read_like_english(tiny_llama: interp.Model):
    for row in natural_text(tiny_llama, 8, 200):
        text = tiny_llama.tokenizer.decode(row)
        assert text[0].isupper()
        assert ">>>" not in text
        assert sum(character.isalpha() or character == " " for character in text) > 0.85 * len(text)


def test_passages_come_from_one_folder_after_the_other(monkeypatch: pytest.MonkeyPatch):
    some = [folder for folder in corpus._folders()[::20] if sum(map(len, corpus._paragraphs(folder))) > 1000]
    monkeypatch.setattr(corpus, "_folders", lambda: some)
    assert len(some) > 5
    homes = [
        folder
        for passage, _ in zip(corpus._passages(300, seed=0), some, strict=False)
        for folder in some
        if passage.split("\n\n")[0] in corpus._paragraphs(folder)
    ]
    assert sorted(homes) == sorted(some)


PROSE = "The {} is what the function returns, and it is used by all of the others that are in this part of the list. "


@pytest.mark.parametrize(
    ("block", "kept"),
    [
        (PROSE.format("value") * 2, True),
        (PROSE.format("``value``") * 2, True),
        (PROSE.format(":class:`~torch.Tensor`") * 2, True),
        (PROSE.format("value")[:60] + ".", False),
        (">>> " + PROSE.format("value") * 2, False),
        ("n_jobs : int. " + PROSE.format("value") * 2, False),
        (PROSE.format("value").lower() * 2, False),
        (PROSE.format("value").rstrip(". ") * 2, False),
        (PROSE.format("value = {}") * 2, False),
        ("Alpha, beta, gamma, delta, epsilon, zeta, eta, theta, iota, kappa, lambda, mu, nu, xi, omicron. " * 2, False),
    ],
)
def test_what_is_prose(block: str, kept: bool):
    found = corpus._prose(block.strip())
    assert bool(found) == kept
    assert "`" not in found


def test_lists_of_parameters_fall_apart_into_names_and_descriptions(tmp_path):
    description = "The number of rows that are read at a time, and so the memory that is used for them by the reader."
    (tmp_path / "module.py").write_text(
        f'''def read():
    """Short first line.

    Parameters
    ----------
    chunk : int
        {description}
        If it is not given, all of the rows are read in one go, which may be more than there is memory for.
    other : str
        Too short.
    """
'''
    )
    found = corpus._paragraphs(tmp_path)
    assert len(found) == 1
    assert found[0].startswith(description)
    assert "other" not in found[0]


def test_a_bos_stands_first_where_the_tokenizer_adds_one(tiny_llama: interp.Model):
    from tokenizers import processors

    copied = PreTrainedTokenizerFast.from_pretrained(tiny_llama.tokenizer.name_or_path)
    copied.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", 0)]
    )
    with_bos = interp.Model(tiny_llama.hf, copied)
    plain = natural_text(tiny_llama, 3, 20)
    tokens = natural_text(with_bos, 3, 20)
    assert (tokens[:, 0] == 0).all()
    assert torch.equal(tokens[:, 1:], plain[:, :-1])


def test_more_than_there_is_says_how_much_there_is(tiny_llama: interp.Model, monkeypatch: pytest.MonkeyPatch):
    some = corpus._folders()[:1]
    monkeypatch.setattr(corpus, "_folders", lambda: some)
    with pytest.raises(ValueError, match=r"hold 0 sequences of 1000000 tokens; 1 were asked for"):
        natural_text(tiny_llama, 1, 1_000_000)


def test_a_model_without_a_tokenizer_is_refused(tiny_llama: interp.Model):
    with pytest.raises(ValueError, match="no tokenizer"):
        natural_text(interp.Model(tiny_llama.hf), 1, 10)


def test_a_tokenizer_of_few_words_is_named():
    with pytest.raises(ValueError, match="the tokenizer of zoo:colours cannot read English prose"):
        natural_text(interp.zoo.load("colours"), 2, 8)
