"""Empirical bias correction (Nagel et al., ICCV 2019, section 4.2)."""

from typing import TYPE_CHECKING

from lq_plugin.utilities.lazy import attributes

if TYPE_CHECKING:
    from lq_plugin.ptq.bias_correction.correct import bias_correct as bias_correct

__getattr__, __dir__, __all__ = attributes(__name__, __file__)
