"""Circuits: the computational graph of a model, discovery, evaluation and drawing.

Not built yet: nothing can be imported from here in this version.
"""
