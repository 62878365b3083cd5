"""Records -> tables, figures and pages. No torch here: a report is made wherever the records are.

`statistics` (intervals, paired differences), `tables.write_table`, `figures.save_figure` and `figures.model_styles` are
what other reports, such as the ablations', are made with.
"""

from sunets.report.build import build_report
from sunets.report.explain import explain

__all__ = ["build_report", "explain"]
