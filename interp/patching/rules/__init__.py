"""Other backward passes for a live model: relevance rules, and the non-linear parts that rules are about."""

from interp.patching.rules.parts import Parts, parts_of
from interp.patching.rules.relevance import PRESETS, RULES, relevance_rules

__all__ = ["PRESETS", "RULES", "Parts", "parts_of", "relevance_rules"]
