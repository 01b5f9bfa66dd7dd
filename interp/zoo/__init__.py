"""Small models that ship with the package, with their tasks; of the hand-wired ones the circuit is known for certain.

>>> model, task = interp.zoo.load("induction"), interp.zoo.task("induction")
>>> interp.zoo.edges("induction")

`regression` is apart: a transformer of vectors, whose weights are what it is for.
"""

from interp.zoo import regression
from interp.zoo.catalogue import MODELS, edges, load, task
from interp.zoo.seeing import picture_task

__all__ = ["MODELS", "edges", "load", "picture_task", "regression", "task"]
