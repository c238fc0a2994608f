"""SmoothQuant (Xiao et al., ICML 2023)."""

from typing import TYPE_CHECKING

from lq_plugin.utilities.lazy import attributes

if TYPE_CHECKING:
    from lq_plugin.ptq.smooth_quant.smooth import smooth_quant as smooth_quant

__getattr__, __dir__, __all__ = attributes(__name__, __file__)
