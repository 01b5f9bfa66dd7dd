"""Prompt templates: text with named slots, and where the words that fill them end."""

from __future__ import annotations

import string
from collections.abc import Mapping


def fill(template: str, words: Mapping[str, str]) -> tuple[str, dict[str, list[int]]]:
    """The text of a template, and for each slot the character counts at which its words end, in order.

    >>> fill("When {A} met {B}, {A}", {"A": "Mary", "B": "John"})
    ('When Mary met John, Mary', {'A': [9, 24], 'B': [18]})
    """
    text = ""
    ends: dict[str, list[int]] = {}
    for literal, slot, _, _ in string.Formatter().parse(template):
        text += literal
        if slot is not None:
            text += words[slot]
            ends.setdefault(slot, []).append(len(text))
    return text, ends
