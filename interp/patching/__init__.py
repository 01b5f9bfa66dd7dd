"""Counterfactual runs, exact and estimated: patching of activations, edges and nodes, and how well estimates agree."""

from interp.patching.activation import activation_patching
from interp.patching.agreement import agreement
from interp.patching.atp_star import atp_star, qk_fixed_patching
from interp.patching.attribution import attribution_patching, gradient_times_input, normgrad
from interp.patching.contextual import contextual_decomposition, contextual_patching
from interp.patching.integrated import integrated_gradients
from interp.patching.methods import METHODS, estimates
from interp.patching.path import edge_effects, path_patching
from interp.patching.relevance import relevance_patching
from interp.patching.rules import relevance_rules
from interp.patching.secant import secant_patching
from interp.patching.subsets import subset_bounds
from interp.patching.sweep import sweep, sweep_activations
from interp.patching.variant import Variant
from interp.patching.verify import verified, verify_top

__all__ = [
    "METHODS", "Variant", "activation_patching", "agreement", "atp_star", "attribution_patching",
    "contextual_decomposition", "contextual_patching", "edge_effects", "estimates", "gradient_times_input",
    "integrated_gradients", "normgrad", "path_patching", "qk_fixed_patching", "relevance_patching",
    "relevance_rules", "secant_patching", "subset_bounds", "sweep", "sweep_activations", "verified", "verify_top",
]  # fmt: skip
