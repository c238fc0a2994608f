"""Sensitivity of each tensor to each of its choices."""

from typing import TYPE_CHECKING

from lq_plugin.utilities.lazy import attributes

if TYPE_CHECKING:
    from lq_plugin.search.sensitivity.measure import measure_sensitivity as measure_sensitivity

__getattr__, __dir__, __all__ = attributes(__name__, __file__)
