"""Batch norm folded, re-estimated and corrected."""

from typing import TYPE_CHECKING

from lq_plugin.utilities.lazy import attributes

if TYPE_CHECKING:
    from lq_plugin.ptq.batch_norm.correct import correct_batch_norm as correct_batch_norm
    from lq_plugin.ptq.batch_norm.fold import fold_batch_norm as fold_batch_norm
    from lq_plugin.ptq.batch_norm.reestimate import reestimate_batch_norm as reestimate_batch_norm

__getattr__, __dir__, __all__ = attributes(__name__, __file__)
