"""Each remaining task: the answer is what a reader would say."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

import interp
from interp import tasks
from interp.metrics import PADDING
from interp.tasks.words import FEMALE_NAMES, MALE_NAMES, SUBJECTS


@pytest.fixture
def model(tokenised_as: Callable[[str], interp.Model]) -> interp.Model:
    return tokenised_as("threes")


def named(model: interp.Model, task: tasks.Task, row: int) -> tuple[set[str], set[str]]:
    """Right and wrong answers as words."""
    right, wrong = (
        {model.to_str_tokens([token])[0].strip() for token in ids[row].tolist() if token != PADDING}
        for ids in (task.answers, task.wrong)
    )
    return right, wrong


def test_docstring_goes_on_with_the_third_argument(model: interp.Model):
    task = tasks.docstring(model, n=10)
    for row, text in enumerate(task.clean_text):
        arguments = re.search(r"\(self, (.*)\):", text).group(1).split(", ")
        assert re.findall(r":param (\w+):", text) == arguments[2:4]
        right, wrong = named(model, task, row)
        corrupted = re.search(r"\(self, (.*)\):", task.corrupted_text[row]).group(1).split(", ")
        described = re.findall(r":param (\w+):", task.corrupted_text[row])
        assert right == {arguments[4]}
        assert wrong == {*arguments, *corrupted, *described} - right
        assert (corrupted[:2], corrupted[5:]) == (arguments[:2], arguments[5:])
        assert not {*corrupted[2:5], *described} & set(arguments)


def test_induction_repeats_and_changes_one_token(model: interp.Model):
    task = tasks.induction(model, n=10, length=7)
    clean = task.clean[:, 1:]  # without BOS
    assert clean.shape == (10, 13)
    assert (clean[:, :6] == clean[:, 7:]).all()
    assert (clean[:, 6] == task.answers[:, 0]).all()
    assert (task.corrupted[:, 7] == task.wrong[:, 0]).all()
    assert (task.clean != task.corrupted).sum(dim=1).tolist() == [1] * 10
    assert (task.positions["B1"] == 7).all()
    assert all(len(set(row[:7].tolist())) == 7 for row in clean)


def test_induction_needs_two_tokens(model: interp.Model):
    with pytest.raises(ValueError, match="length is 1"):
        tasks.induction(model, length=1)


def test_colored_objects_answers_with_the_colour_of_the_thing(model: interp.Model):
    task = tasks.colored_objects(model, n=20)
    for row, (clean, corrupted) in enumerate(zip(task.clean_text, task.corrupted_text, strict=True)):
        example, question = clean.split("\nQ:")
        assert re.search(r"A: (\w+)$", example).group(1).lower() == color_asked(example)
        right, wrong = named(model, task, row)
        assert right == {color_asked(question).capitalize()}
        assert wrong == {color_asked(corrupted.split("\nQ:")[1]).capitalize()}
        tokens = [task.str_tokens[row][int(task.positions[mark][row])].strip() for mark in ("COLOR", "OBJECT", "ASKED")]
        assert tokens == [color_asked(question), tokens[2], re.search(r"is the (\w+)\?", question).group(1)]
        others = [task.str_tokens[row][int(task.positions[mark][row])].strip() for mark in ("WRONG", "THIRD")]
        assert {color.capitalize() for color in others[:1]} == wrong
        assert {color_asked(question), *others} == set(re.findall(r"\ban? (\w+) \w+[,.]", question))


def color_asked(text: str) -> str:
    thing = re.search(r"What color is the (\w+)\?", text).group(1)
    article, color = re.search(rf"\b(an?) (\w+) {thing}\b", text).groups()
    assert article == ("an" if color[0] in "aeiou" else "a")
    return color


def test_gendered_pronoun_follows_the_name(model: interp.Model):
    task = tasks.gendered_pronoun(model, n=20)
    names = {"he": MALE_NAMES, "she": FEMALE_NAMES}
    for row in range(20):
        ((right,), (wrong,)) = named(model, task, row)
        at = int(task.positions["NAME"][row])
        assert task.str_tokens[row][at].strip() in names[right]
        assert task.corrupted_str_tokens[row][at].strip() in names[wrong]


def test_no_name_has_two_genders():
    assert not set(MALE_NAMES) & set(FEMALE_NAMES)


@pytest.mark.parametrize("structure", ["simple", "across_pp", "across_rc"])
def test_the_verb_agrees_with_the_subject(structure: str, model: interp.Model):
    task = tasks.subject_verb_agreement(model, n=20, structure=structure)
    plurals = {many for _, many in SUBJECTS}
    for row in range(20):
        subject = task.str_tokens[row][int(task.positions["SUBJECT"][row])].strip()
        forms = ({"is", "was", "has"}, {"are", "were", "have"})
        assert named(model, task, row) == (forms[::-1] if subject in plurals else forms)
    assert (task.clean != task.corrupted).sum(dim=1).tolist() == [1] * 20
    assert ("ATTRACTOR" in task.positions) == (structure != "simple")


@pytest.mark.parametrize("corruption", ["answer", "letters"])
def test_mcqa_answers_with_the_letter_of_the_stated_colour(corruption: str, model: interp.Model):
    task = tasks.mcqa(model, n=20, corruption=corruption)
    for row, (clean, corrupted) in enumerate(zip(task.clean_text, task.corrupted_text, strict=True)):
        example, question = clean.split("\n\n")
        assert example.endswith(f"Answer: {letter_of(example)}")
        right, wrong = named(model, task, row)
        assert right == {letter_of(question)}
        assert wrong == set("ABCD") - right
        assert {letter_of(corrupted.split("\n\n")[1])} < wrong
        label, option = (task.str_tokens[row][int(task.positions[mark][row])].strip() for mark in ("LABEL", "OPTION"))
        assert f"\n{label}. {option}\n" in question
        assert {label} == right
        labels = [task.str_tokens[row][int(task.positions[f"LABEL{place}"][row])].strip() for place in (1, 2, 3, 4)]
        assert labels == list("ABCD")


def letter_of(text: str) -> str:
    color = re.search(r"The \w+ is (\w+)\.", text).group(1)
    return re.search(rf"(\w)\. {color}\b", text).group(1)
