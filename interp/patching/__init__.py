"""Counterfactual runs: activation patching and ablation at any site, exactly."""

from interp.patching.activation import activation_patching
from interp.patching.reference import Variant, run_variants

__all__ = ["Variant", "activation_patching", "run_variants"]
