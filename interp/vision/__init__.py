"""Models that see: where the pieces of an image are, what attends to them, and what vision transformers look at."""

from interp.vision.baselines import attention_rollout, token_norm_grad, vision_norm_grad, vision_rollout
from interp.vision.clusters import cluster_heads, draw_clusters, pattern_features
from interp.vision.contrast import contrast_map, salient_regions
from interp.vision.importance import vision_importance
from interp.vision.khop import khop_profile, text_khop_profile
from interp.vision.mass import modality_mass
from interp.vision.outliers import damro_outliers, norm_outliers
from interp.vision.overlay import draw_over_image
from interp.vision.patch_grid import fold_patches
from interp.vision.pattern_codes import mean_patterns, pattern_codes
from interp.vision.token_map import image_values, token_map, without_images

__all__ = [
    "attention_rollout", "cluster_heads", "contrast_map", "damro_outliers", "draw_clusters", "draw_over_image",
    "fold_patches", "image_values", "khop_profile", "mean_patterns", "modality_mass", "norm_outliers",
    "pattern_codes", "pattern_features", "salient_regions", "text_khop_profile", "token_map", "token_norm_grad",
    "vision_importance", "vision_norm_grad", "vision_rollout", "without_images",
]  # fmt: skip
