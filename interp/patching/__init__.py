"""Counterfactual runs: activation patching and ablation at any site, exactly."""

from interp.patching.activation import activation_patching
from interp.patching.reference import run_variants
from interp.patching.sweep import sweep, sweep_activations
from interp.patching.variant import Variant

__all__ = ["Variant", "activation_patching", "run_variants", "sweep", "sweep_activations"]
