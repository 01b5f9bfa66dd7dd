"""Subject-verb agreement: "The keys near the cabinet" -> " are", not " is"."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Literal

from interp.tasks.collect import collect
from interp.tasks.pairs import Pair
from interp.tasks.task import Task
from interp.tasks.template import fill
from interp.tasks.vocabulary import one_token_words
from interp.tasks.words import LANDMARKS, SUBJECTS

if TYPE_CHECKING:
    from interp.model import Model

TEMPLATES = {
    "simple": "The {subject}",
    "across_pp": "The {subject} {preposition} the {attractor}",
    "across_rc": "The {subject} that the {attractor} {verb}",
}
PREPOSITIONS = ("near", "behind", "beside", "by", "from")
VERBS = (("likes", "like"), ("sees", "see"), ("knows", "know"), ("wants", "want"), ("loves", "love"))
ENDINGS = ((" is", " was", " has"), (" are", " were", " have"))


def subject_verb_agreement(
    model: Model,
    n: int = 64,
    *,
    seed: int = 0,
    structure: Literal["simple", "across_pp", "across_rc"] = "across_pp",
    one_length: bool = True,
) -> Task:
    """Subject-verb agreement: the verb takes the number of the subject, not of a noun in between.

    Key positions: SUBJECT, ATTRACTOR (but for "simple"), END. Answers: " is", " was", " has" for one, " are", " were",
    " have" for several; wrong: those of the other number; metric: logit difference of the means.

    Args:
        model: whose tokenizer is used.
        n: how many prompt pairs.
        seed: the same seed gives the same task.
        structure: "simple": "The keys"; "across_pp": "The keys near the cabinet"; "across_rc": "The keys that the boys
            like" (the noun in between has either number).
        one_length: prompts of one length whose key positions coincide.

    Raises:
        ValueError: if too few nouns are one token in both numbers, or n different prompts cannot be found.

    Source: Marks et al. 2024 (arXiv 2403.19647), after Finlayson et al. 2021 (arXiv 2106.06087): structures.
    """
    if structure not in TEMPLATES:
        raise ValueError(f"structure is {structure!r}; it is one of {', '.join(TEMPLATES)}")
    one_token_words(model, [verb.strip() for ending in ENDINGS for verb in ending], kind="verb forms", at_least=6)
    subjects = _one_token_pairs(model, SUBJECTS, "subjects")
    attractors = _one_token_pairs(model, SUBJECTS if structure == "across_rc" else LANDMARKS, "nouns")
    verbs = _one_token_pairs(model, VERBS, "verbs")

    def draw(generator: random.Random) -> Pair:
        subject, other = generator.choice(subjects), generator.choice(attractors)
        number, other_number = generator.randrange(2), generator.randrange(2)
        words = {
            "preposition": generator.choice(PREPOSITIONS),
            "attractor": other[other_number],
            "verb": generator.choice(verbs)[other_number],
        }
        clean, ends = fill(TEMPLATES[structure], words | {"subject": subject[number]})
        corrupted, _ = fill(TEMPLATES[structure], words | {"subject": subject[1 - number]})
        marks = {slot.upper(): ends[slot][0] for slot in ("subject", "attractor") if slot in ends}
        return Pair(clean, corrupted, ENDINGS[number], ENDINGS[1 - number], marks)

    return collect(
        model,
        draw,
        n=n,
        seed=seed,
        one_length=one_length,
        name="subject_verb_agreement",
        metric="logit_diff",
        description="The verb takes the number of the subject.",
        corruption="the subject changes its number",
    )


def _one_token_pairs(model: Model, pairs: tuple[tuple[str, str], ...], kind: str) -> list[tuple[str, str]]:
    """The pairs (singular, plural) of which both are one token."""
    words = [word for pair in pairs for word in pair]
    single = set(one_token_words(model, words, kind=kind, at_least=2))
    kept = [pair for pair in pairs if single.issuperset(pair)]
    if not kept:
        raise ValueError(f"no {kind} are one token in both singular and plural; 1 of {len(pairs)} known ones is needed")
    return kept
