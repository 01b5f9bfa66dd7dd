"""Behaviours: clean/corrupted prompt pairs with their answers, aligned token by token, for any tokenizer."""

from interp.tasks.accuracy import accuracy
from interp.tasks.colored_objects import colored_objects
from interp.tasks.corpus import natural_text
from interp.tasks.docstring import docstring
from interp.tasks.gendered_pronoun import gendered_pronoun
from interp.tasks.greater_than import greater_than
from interp.tasks.induction import induction
from interp.tasks.ioi import ioi
from interp.tasks.mcqa import mcqa
from interp.tasks.pairs import from_pairs
from interp.tasks.storage import read
from interp.tasks.subject_verb_agreement import subject_verb_agreement
from interp.tasks.task import Task

_BUILDERS = (
    ioi, greater_than, docstring, induction, colored_objects, gendered_pronoun, subject_verb_agreement, mcqa
)  # fmt: skip
TASKS = {builder.__name__: builder for builder in _BUILDERS}
"""The built-in tasks by name; the first line of each docstring says what the task is."""

__all__ = ["TASKS", "Task", "accuracy", "from_pairs", "natural_text", "read", *TASKS]
