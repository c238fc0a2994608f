"""One grid for each tensor that several quantizers read."""

from typing import TYPE_CHECKING

from lq_plugin.utilities.lazy import attributes

if TYPE_CHECKING:
    from lq_plugin.ptq.shared_grids.share import SharedGrids as SharedGrids, share_grids as share_grids

__getattr__, __dir__, __all__ = attributes(__name__, __file__)
