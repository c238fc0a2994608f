"""Everything a run or a search says about itself, on one static page: `model_report`, `write_page`."""

from typing import TYPE_CHECKING

from lq_plugin.utilities.lazy import attributes

if TYPE_CHECKING:
    from lq_plugin.report.data import ReportData as ReportData, Series as Series
    from lq_plugin.report.model import model_report as model_report
    from lq_plugin.report.page import render as render, write_page as write_page

# Loaded on first use: `lq-report` and `lq-explain` must not pay for torch and matplotlib before they have something to
# do.
__getattr__, __dir__, __all__ = attributes(__name__, __file__)
