"""Everything a run or a search says about itself, on one static page: `model_report`, `study_report`, `write_page`."""

from lq_plugin.report.data import ReportData, Series
from lq_plugin.report.model import model_report
from lq_plugin.report.page import render, write_page
from lq_plugin.report.study import study_report

__all__ = ["ReportData", "Series", "model_report", "render", "study_report", "write_page"]
