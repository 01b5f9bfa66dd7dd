"""What to call a head: a role needs both where it attends and what it causes.

| role | attention | cause |
|---|---|---|
| previous token | `previous_token` ≥ 0.4 | ablating it hurts |
| induction | `induction` ≥ 0.4 | ablating it hurts |
| duplicate token | `duplicate_token` ≥ 0.4 | ablating it hurts |
| mover | END attends to the answer, ≥ 0.3 | it writes for the answer |
| negative mover | END attends to the answer, ≥ 0.3 | it writes against the answer |
| copy suppression | END attends to the wrong answer, ≥ 0.3 | it writes for the answer, that is against the wrong one |

"Hurts" and "writes" mean an effect of at least 2% of the clean metric whose 95% interval leaves out 0: the effect of
ablation (mean ablation if it was run), the direct effect on the logits. A head can have several roles. Roles that need
path patching, such as S-inhibition (it acts through the queries of movers), are not given here.

Sources: Wang et al. 2022 (arXiv 2211.00593) for the roles; McDougall et al. 2023 (arXiv 2310.04625) for copy
suppression. The thresholds are ours.
"""

from __future__ import annotations

import pandas as pd

PATTERN_THRESHOLD = 0.4
TARGET_THRESHOLD = 0.3
EFFECT_THRESHOLD = 0.02

_BY_PATTERN = ("previous_token", "induction", "duplicate_token")


def roles(table: pd.DataFrame, *, importance: str, metric_clean: float, logit_diff_clean: float) -> pd.Series:
    """The roles of each head, joined by commas; "" for none. A missing column or NaN gives no role.

    Args:
        table: one row a head, with the columns of `interp.heads.table`.
        importance: the ablation column to go by, such as "importance_mean"; its bounds end in `_low` and `_high`.
        metric_clean: what effects of ablation are a share of.
        logit_diff_clean: what direct effects are a share of.
    """
    hurts = _above(table, importance, EFFECT_THRESHOLD * abs(metric_clean))
    least = EFFECT_THRESHOLD * abs(logit_diff_clean)
    writes_for, writes_against = _above(table, "direct", least), _above(-table, "direct", least, low="direct_high")
    to_answer, to_wrong = (_column(table, f"end_to_{name}") >= TARGET_THRESHOLD for name in ("answer", "wrong"))
    held = {
        **{name.replace("_", " "): (_column(table, name) >= PATTERN_THRESHOLD) & hurts for name in _BY_PATTERN},
        "mover": to_answer & writes_for,
        "negative mover": to_answer & writes_against,
        "copy suppression": to_wrong & writes_for,
    }
    holds = pd.DataFrame(held)
    return holds.apply(lambda row: ", ".join(name for name in holds.columns if row[name]), axis=1)


def _above(table: pd.DataFrame, column: str, least: float, *, low: str | None = None) -> pd.Series:
    """Whether a value is at least so large and its interval lies above 0."""
    return (_column(table, column) >= least) & (_column(table, low or f"{column}_low") > 0)


def _column(table: pd.DataFrame, name: str) -> pd.Series:
    return table[name] if name in table else pd.Series(float("nan"), index=table.index)
