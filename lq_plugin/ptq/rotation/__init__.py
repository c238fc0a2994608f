"""Rotations that fold into weights (QuaRot, SpinQuant)."""

from typing import TYPE_CHECKING

from lq_plugin.utilities.lazy import attributes

if TYPE_CHECKING:
    from lq_plugin.ptq.rotation.rotate import rotate as rotate

__getattr__, __dir__, __all__ = attributes(__name__, __file__)
