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
    functions: ClassVar = {"lq_gptq_block": [*[POINTER] * 4, SIZE, POINTER, POINTER, SIZE, SIZE, *[NUMBER] * 4]}

    def block(
        self, w: Tensor, done: Tensor, factor: Tensor, scale: Tensor, zero_point: Tensor, bounds: tuple[int, int]
    ) -> Tensor:
        """Rounds the columns of a block and returns their errors, float64 `[columns, rows]`.

        Args:
            w: the weights when the block's turn comes, float64 `[columns, rows]`, contiguous; it stays as it is.
            done: takes the rounded weights, float32, likewise.
            factor: the block of the upper triangular factor, float64 `[columns, columns]`, its rows contiguous.
            scale, zero_point: float32 `[columns, rows]`, contiguous.
            bounds: quant_min and quant_max.
        """
        errors = torch.empty_like(w)
        self._library.lq_gptq_block(
            w.data_ptr(), done.data_ptr(), errors.data_ptr(), factor.data_ptr(), factor.stride(0), scale.data_ptr(),
            zero_point.data_ptr(), *w.shape, *bounds, self._number, torch.get_num_threads(),
        )  # fmt: skip
        return errors


def gptq_kernels(x: Tensor) -> GPTQKernels | None:
    """Returns the kernels where they may stand in for torch operations on `x`; None elsewhere."""
    if x.device.type != "cpu" or is_watched(x) or active() is None:
        return None
    return _compiled()


@functools.cache
def _compiled() -> GPTQKernels:
    return GPTQKernels()
