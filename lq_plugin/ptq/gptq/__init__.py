"""GPTQ (Frantar et al., ICLR 2023)."""

from typing import TYPE_CHECKING

from lq_plugin.utilities.lazy import attributes

if TYPE_CHECKING:
    from lq_plugin.ptq.gptq.quantize import gptq as gptq

__getattr__, __dir__, __all__ = attributes(__name__, __file__)
