"""Looks for the front with a regression over the finished trials: what single choices and pairs of them do."""

from typing import TYPE_CHECKING

from lq_plugin.utilities.lazy import attributes

if TYPE_CHECKING:
    from lq_plugin.search.surrogate.problem import Problem as Problem
    from lq_plugin.search.surrogate.sampler import SurrogateSampler as SurrogateSampler

__getattr__, __dir__, __all__ = attributes(__name__, __file__)
