"""Everything a run or a search says about itself, on one static page: `model_report`, `study_report`, `write_page`."""

from typing import TYPE_CHECKING

from lq_plugin.lazy import attributes

if TYPE_CHECKING:
    from lq_plugin.report.data import ReportData, Series
    from lq_plugin.report.model import model_report
    from lq_plugin.report.page import render, write_page
    from lq_plugin.report.study import study_report

__all__ = ["ReportData", "Series", "model_report", "render", "study_report", "write_page"]

# Loaded on first use: `lq-report` and `lq-explain` must not pay for torch and matplotlib before they have something to
# do.
_FILES = {
    "data": ("ReportData", "Series"),
    "model": ("model_report",),
    "page": ("render", "write_page"),
    "study": ("study_report",),
}

__getattr__, __dir__ = attributes(__name__, _FILES)
