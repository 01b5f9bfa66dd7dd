"""Circuits: the graph of a model, methods that find the part that carries a behaviour, and tests of what they find."""

from interp.circuits.acdc import acdc
from interp.circuits.circuit import Circuit
from interp.circuits.controls import completeness, minimality, random_control
from interp.circuits.discover import METHODS, discover
from interp.circuits.drawing import draw, simplified
from interp.circuits.edge_scores import attribution_edge_scores, secant_edge_scores
from interp.circuits.evaluate import evaluate, run_circuits
from interp.circuits.exact_edges import exact_edge_scores
from interp.circuits.graph import Graph
from interp.circuits.job import run_job
from interp.circuits.known import KNOWN
from interp.circuits.low_rank import low_rank_metric
from interp.circuits.multiple_choice import answer_attribution, letter_attention, output_roles
from interp.circuits.optimal_ablation import optimal_constants
from interp.circuits.output_nodes import joint_output_effects, output_nodes
from interp.circuits.paths import strongest_paths
from interp.circuits.reuse import overlap, top_share_overlap, transfer
from interp.circuits.roc import edge_roc, node_roc
from interp.circuits.selection import top_neurons
from interp.circuits.staged import circuit_of_stages, staged_path_patching
from interp.circuits.steering import steer
from interp.circuits.storage import load, save, to_dot, to_graphml, to_networkx

__all__ = [
    "KNOWN", "METHODS", "Circuit", "Graph", "acdc", "answer_attribution", "attribution_edge_scores",
    "circuit_of_stages", "completeness", "discover", "draw", "edge_roc", "evaluate", "exact_edge_scores",
    "joint_output_effects", "letter_attention", "load", "low_rank_metric", "minimality", "node_roc",
    "optimal_constants", "output_nodes", "output_roles", "overlap", "random_control", "run_circuits", "run_job",
    "save", "secant_edge_scores", "simplified", "staged_path_patching", "steer", "strongest_paths", "to_dot",
    "to_graphml", "to_networkx", "top_neurons", "top_share_overlap", "transfer",
]  # fmt: skip
