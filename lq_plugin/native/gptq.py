"""`gptq.cpp` for tensors: the columns of a block, one after the other."""

from __future__ import annotations

import functools
from typing import ClassVar

import torch
from torch import Tensor

from lq_plugin.native.ops import is_watched
from lq_plugin.native.switch import active
from lq_plugin.native.variants import NUMBER, POINTER, SIZE, CompiledKernels


class GPTQKernels(CompiledKernels):
    """The compiled library."""

    source = "gptq"
    functions: ClassVar = {"lq_gptq_block": [*[POINTER] * 5, SIZE, POINTER, POINTER, SIZE, SIZE, *[NUMBER] * 4]}

    def block(
        self,
        bounds: tuple[int, int],
        w: Tensor,
        y: Tensor,
        done: Tensor,
        total: Tensor,
        turned: Tensor,
        scale: Tensor,
        zero_point: Tensor,
    ) -> None:
        """Rounds the columns of a block from the last to the first.

        Args:
            bounds: quant_min and quant_max.
            w: the weights, float64 `[columns, rows]`, contiguous; becomes what rounding takes off them.
            y: sums over the columns outside the block that are done, likewise; it stays as it is.
            done: takes the rounded weights, float32, likewise.
            total: squared errors are added to it, float64 `[rows]`.
            turned: the block of the factor, upper triangular, float64 `[columns, columns]`, its rows contiguous.
            scale, zero_point: float32 `[columns, rows]`, contiguous.
        """
        self._library.lq_gptq_block(
            w.data_ptr(), y.data_ptr(), done.data_ptr(), total.data_ptr(), turned.data_ptr(), turned.stride(0),
            scale.data_ptr(), zero_point.data_ptr(), *w.shape, *bounds, self._number, torch.get_num_threads(),
        )  # fmt: skip


def gptq_kernels(x: Tensor) -> GPTQKernels | None:
    """Returns the kernels where they may stand in for torch operations on `x`; None elsewhere."""
    if x.device.type != "cpu" or is_watched(x) or active() is None:
        return None
    return _compiled()


_compiled = functools.cache(GPTQKernels)
