"""Reports of runs and searches on one static page: `model_report`, `write_page`; as pictures: `write_pictures`."""

from typing import TYPE_CHECKING

from lq_plugin.utilities.lazy import attributes

if TYPE_CHECKING:
    from lq_plugin.report.data import ReportData as ReportData, Series as Series
    from lq_plugin.report.model import model_report as model_report
    from lq_plugin.report.page import render as render, write_page as write_page
    from lq_plugin.report.pictures import (
        register_layer_picture as register_layer_picture,
        register_picture as register_picture,
        write_pictures as write_pictures,
    )

# Loaded on first use: `lq-report` and `lq-explain` import torch and matplotlib only once there is something to do.
__getattr__, __dir__, __all__ = attributes(__name__, __file__, {f"{__name__}.pictures": ("matplotlib",)})
