"""Tables and figures: from results to one self-contained HTML file, or to numbers in a file."""

from interp.report.agreement import agreement_matrix
from interp.report.effects import write_effects
from interp.report.feature_dashboard import Dashboard, dashboard
from interp.report.head_report import head_table, heads, html_page, write_study
from interp.report.reading import read
from interp.report.study import head_study
from interp.report.writing import written

__all__ = [
    "Dashboard",
    "agreement_matrix",
    "dashboard",
    "head_study",
    "head_table",
    "heads",
    "html_page",
    "read",
    "write_effects",
    "write_study",
    "written",
]
