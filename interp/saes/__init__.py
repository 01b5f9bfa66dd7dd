"""Sparse autoencoders on attention outputs and other sites: training, loading and attribution."""

from interp.saes.activation_cache import ActivationCache, cache_activations
from interp.saes.architectures import ARCHITECTURES, make
from interp.saes.attribution import draw_attribution, feature_attribution
from interp.saes.baselines import baselines, pca, random_decoder
from interp.saes.contexts import feature_contexts
from interp.saes.evaluate import describe_evaluation, draw_evaluation, evaluate
from interp.saes.feature_circuits import feature_circuit, feature_faithfulness
from interp.saes.feature_drawing import draw_feature_circuit
from interp.saes.feature_edges import feature_edges
from interp.saes.feature_effects import feature_effects
from interp.saes.folding import as_jumprelu, fold_b_dec, fold_decoder_norm, fold_input_scale
from interp.saes.head_share import head_features, head_share
from interp.saes.logit_weights import logit_weights
from interp.saes.losses import Loss
from interp.saes.probing import sparse_probing
from interp.saes.recursive import recursive_attribution, tree_text
from interp.saes.sae import SAE, from_rows, to_rows
from interp.saes.splice import features_of, spliced
from interp.saes.storage import convert, load, save
from interp.saes.training import train

__all__ = [
    "ARCHITECTURES", "SAE", "ActivationCache", "Loss", "as_jumprelu", "baselines", "cache_activations", "convert",
    "describe_evaluation", "draw_attribution", "draw_evaluation", "draw_feature_circuit", "evaluate",
    "feature_attribution", "feature_circuit", "feature_contexts", "feature_edges", "feature_effects",
    "feature_faithfulness", "features_of", "fold_b_dec", "fold_decoder_norm", "fold_input_scale", "from_rows",
    "head_features", "head_share", "load", "logit_weights", "make", "pca", "random_decoder",
    "recursive_attribution", "save", "sparse_probing", "spliced", "to_rows", "train", "tree_text",
]  # fmt: skip
