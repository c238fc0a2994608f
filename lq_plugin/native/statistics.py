"""`statistics.cpp` for tensors: what range estimators count and search."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from lq_plugin.native.build import library
from lq_plugin.native.ops import is_watched
from lq_plugin.native.switch import active
from lq_plugin.native.variants import NUMBER, POINTER, SIZE


class StatisticsKernels:
    """The compiled library.

    Raises:
        NativeError: it cannot be compiled.
    """

    def __init__(self) -> None:
        self._library = library("statistics")
        least, count = self._library.lq_least_divergence, self._library.lq_count_bins
        least.argtypes, least.restype = [*[POINTER] * 3, *[SIZE] * 3, NUMBER], None
        count.argtypes, count.restype = [POINTER, SIZE, POINTER, SIZE, SIZE], SIZE

    def least_divergence(self, counts: Tensor, beyond: Tensor, levels: int) -> Tensor:
        """Number of bins to keep, `levels..bins`, with the least KL divergence, the last on a tie, int64 `[rows]`.

        Args:
            counts: float64 `[rows, bins]`.
            beyond: mass above the histogram, float64 `[rows]`.
            levels: levels that the kept bins are merged into.
        """
        counts, beyond = counts.contiguous(), beyond.contiguous()
        best = torch.empty(len(counts), dtype=torch.int64, device="cpu")
        self._library.lq_least_divergence(
            counts.data_ptr(), beyond.data_ptr(), best.data_ptr(), *counts.shape, levels, torch.get_num_threads()
        )
        return best

    def count_bins(self, x: Tensor, counts: Tensor, lowest: int) -> int:
        """Adds contiguous float32 values to `counts`, int64 `[2, bins]`, negative ones first.

        The bin is the upper half of the bits of the magnitude, less `lowest`; smaller ones fall into the first bin.

        Args:
            x: contiguous, float32.
            counts: int64 `[2, bins]`, written to.
            lowest: subtracted from the number of a bin.

        Returns:
            How many are zero in that half: these are not counted.
        """
        return int(self._library.lq_count_bins(x.data_ptr(), x.numel(), counts.data_ptr(), counts.shape[1], lowest))


def statistics_kernels(x: Tensor) -> StatisticsKernels | None:
    """The kernels, where they may stand in for torch operations on `x`."""
    if x.device.type != "cpu" or is_watched(x) or active() is None:
        return None
    return _compiled()


_compiled = functools.cache(StatisticsKernels)
