"""Attention sinks: which tokens soak up attention, by which massive activations, and what becomes of a model without.

Everything is found in the model at hand: no dimension, layer or token is assumed.
"""

from interp.sinks.calibration import calibrated
from interp.sinks.checks import sink_checks
from interp.sinks.dimensions import phi, phi_rel, sink_dimensions
from interp.sinks.dormant import dormant_heads
from interp.sinks.head_search import calibration_gain, calibration_search, raising_heads
from interp.sinks.interventions import intervene
from interp.sinks.mask import mask
from interp.sinks.massive import massive_activations
from interp.sinks.move import boost_logits, interpolate_pattern, move_mass
from interp.sinks.rate import hidden_sinks, rates, sink_rate
from interp.sinks.redistribution import redistributed
from interp.sinks.sink_window import SinkWindow
from interp.sinks.stream_nll import sink_windows, stream_nll, stream_perplexity
from interp.sinks.streaming import streaming

__all__ = [
    "SinkWindow", "boost_logits", "calibrated", "calibration_gain", "calibration_search", "dormant_heads",
    "hidden_sinks", "interpolate_pattern", "intervene", "mask", "massive_activations", "move_mass", "phi",
    "phi_rel", "raising_heads", "rates", "redistributed", "sink_checks", "sink_dimensions", "sink_rate",
    "sink_windows", "stream_nll", "stream_perplexity", "streaming",
]  # fmt: skip
