"""Searches in one process: trials of one model that is loaded and calibrated once."""

from typing import TYPE_CHECKING

from lq_plugin.utilities.lazy import attributes

if TYPE_CHECKING:
    from lq_plugin.search.study.config import tpe as tpe
    from lq_plugin.search.study.report import study_report as study_report

__getattr__, __dir__, __all__ = attributes(__name__, __file__)
