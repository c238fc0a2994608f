"""Biases in whole steps of the integer sums that runtimes add them to."""

from typing import TYPE_CHECKING

from lq_plugin.utilities.lazy import attributes

if TYPE_CHECKING:
    from lq_plugin.ptq.integer_biases.round import RoundedBiases as RoundedBiases, round_biases as round_biases

__getattr__, __dir__, __all__ = attributes(__name__, __file__)
