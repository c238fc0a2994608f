"""`trained.cpp` for tensors: passes of formats with trained levels, PACT and TTQ."""

from __future__ import annotations

import functools
from typing import ClassVar

import torch
from torch import Tensor

from lq_plugin.native.kernels import TYPES
from lq_plugin.native.layouts import Layout
from lq_plugin.native.ops import kernels_for
from lq_plugin.native.variants import NUMBER, POINTER, SIZE, CompiledKernels, address

#: Δ, Wp and Wn of each row, float32 `[rows]`.
Ternary = tuple[Tensor, Tensor, Tensor]


class TrainedKernels(CompiledKernels):
    """The compiled library; addresses are taken without more checks, see `trained_kernels`."""

    source = "trained"
    functions: ClassVar = {
        "lq_pact_backward": [NUMBER, *[POINTER] * 5, *[SIZE] * 3, NUMBER, NUMBER],
        "lq_ternary": [NUMBER, *[POINTER] * 5, SIZE, SIZE, NUMBER, NUMBER],
        "lq_ternary_backward": [NUMBER, *[POINTER] * 8, SIZE, SIZE, NUMBER, NUMBER],
    }

    def pact_backward(
        self, x: Tensor, gradient: Tensor, alpha: Tensor, layout: Layout, needs_x: bool
    ) -> tuple[Tensor | None, Tensor]:
        """Returns PACT's gradients of `x` and, float64 `[outer]`, of alpha.

        Args:
            x: dense.
            gradient: laid out in memory as `x`.
            alpha: float32, contiguous, `[outer]` elements.
            layout: of alpha along `x`; `inner` is 1.
            needs_x: else that of `x` is None.
        """
        result = torch.empty_like(x) if needs_x else None
        slope = torch.empty(layout.outer, dtype=torch.float64, device="cpu")
        self._library.lq_pact_backward(
            TYPES[x.dtype, gradient.dtype], x.data_ptr(), gradient.data_ptr(), address(result),
            alpha.data_ptr(), slope.data_ptr(), *layout[:3],
            self._number, torch.get_num_threads(),
        )  # fmt: skip
        return result, slope

    def ternary(self, x: Tensor, levels: Ternary, dtype: torch.dtype) -> Tensor:
        """Returns -Wn, 0 or +Wp, shaped like `x`.

        Args:
            x: contiguous.
            levels: those of each of the equal parts of `x`.
            dtype: of the result.
        """
        y, rows = torch.empty_like(x, dtype=dtype), levels[0].numel()
        self._library.lq_ternary(
            TYPES[x.dtype, dtype], x.data_ptr(), y.data_ptr(), *(t.data_ptr() for t in levels), rows,
            x.numel() // rows, self._number, torch.get_num_threads(),
        )  # fmt: skip
        return y

    def ternary_backward(
        self, x: Tensor, gradient: Tensor, levels: Ternary, needs_x: bool
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Returns TTQ's gradient of `x`, and the sums of the gradient above Δ and below -Δ, float64 `[rows]` each.

        Args:
            x, gradient: contiguous.
            levels: of the rows.
            needs_x: else that of `x` is None.
        """
        result, rows = torch.empty_like(x) if needs_x else None, levels[0].numel()
        above, below = (
            torch.empty(rows, dtype=torch.float64, device="cpu"),
            torch.empty(rows, dtype=torch.float64, device="cpu"),
        )
        self._library.lq_ternary_backward(
            TYPES[x.dtype, gradient.dtype], x.data_ptr(), gradient.data_ptr(), address(result),
            *(t.data_ptr() for t in levels), above.data_ptr(),
            below.data_ptr(), rows, x.numel() // rows, self._number, torch.get_num_threads(),
        )  # fmt: skip
        return result, above, below


def trained_kernels(
    x: Tensor, dtype: torch.dtype | None = None, qparams: tuple[Tensor, ...] = ()
) -> TrainedKernels | None:
    """Returns the kernels where they may stand in for torch operations on `x`; None elsewhere.

    Args:
        x: what is quantized.
        dtype: of the result; None: that of `x`.
        qparams: see `kernels_for`.
    """
    if torch.compiler.is_compiling() or x.device.type != "cpu" or kernels_for(x, dtype, qparams) is None:
        return None
    return _compiled()


_compiled = functools.cache(TrainedKernels)
