"""What each attention head does: where it attends, what it writes, and how much a behaviour depends on it."""

from interp.heads.composition import composition
from interp.heads.copying import copying_eigenvalues, copying_top_k
from interp.heads.direct import direct_logit_attribution
from interp.heads.importance import gradient_gates, kl_importance, leave_one_out
from interp.heads.lens import logit_lens
from interp.heads.patterns import matching_score, pattern, pattern_scores, planted_tokens
from interp.heads.statistics import attention_statistics, end_attention
from interp.heads.table import table

__all__ = [
    "attention_statistics",
    "composition",
    "copying_eigenvalues",
    "copying_top_k",
    "direct_logit_attribution",
    "end_attention",
    "gradient_gates",
    "kl_importance",
    "leave_one_out",
    "logit_lens",
    "matching_score",
    "pattern",
    "pattern_scores",
    "planted_tokens",
    "table",
]
