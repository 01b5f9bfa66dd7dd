"""Small models that ship with the package, with their tasks; of the hand-wired ones the circuit is known for certain.

>>> model, task = interp.zoo.load("induction"), interp.zoo.task("induction")
>>> interp.zoo.edges("induction")
"""

from interp.zoo.catalogue import MODELS, edges, load, task

__all__ = ["MODELS", "edges", "load", "task"]
