"""What each attention head does: where it attends, what it writes, and how much a behaviour depends on it."""

from interp.heads.composition import composition
from interp.heads.copying import copying_eigenvalues, copying_top_k
from interp.heads.direct import direct_logit_attribution
from interp.heads.divergence import divergence, outlier_heads, select_heads, t_vhd, without_segment
from interp.heads.greedy import greedy_selection
from interp.heads.importance import gradient_gates, kl_importance, leave_one_out
from interp.heads.kq_ov import kq_ov, model_kq_ov
from interp.heads.lens import logit_lens
from interp.heads.patterns import matching_score, pattern, pattern_scores, planted_tokens
from interp.heads.rank_agreement import topk_kendall, weighted_kendall
from interp.heads.received import attention_received
from interp.heads.reinforcement import reinforced, reinforced_heads
from interp.heads.similarity import layer_similarity
from interp.heads.soft_selection import injected, mean_head_outputs, soft_selection
from interp.heads.statistics import attention_statistics, end_attention
from interp.heads.structure import attention_parents, structure_alignment
from interp.heads.table import table

__all__ = [
    "attention_parents", "attention_received", "attention_statistics", "composition", "copying_eigenvalues",
    "copying_top_k", "direct_logit_attribution", "divergence", "end_attention", "gradient_gates",
    "greedy_selection", "injected", "kl_importance", "kq_ov", "layer_similarity", "leave_one_out", "logit_lens",
    "matching_score", "mean_head_outputs", "model_kq_ov", "outlier_heads", "pattern", "pattern_scores",
    "planted_tokens", "reinforced", "reinforced_heads", "select_heads", "soft_selection", "structure_alignment",
    "t_vhd", "table", "topk_kendall", "weighted_kendall", "without_segment",
]  # fmt: skip
