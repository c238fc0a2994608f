"""`integer.cpp` for dense tensors on the CPU; addresses are taken without further checks."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from lq_plugin.intent.spec import IntegerGrid
from lq_plugin.native.build import NativeError
from lq_plugin.native.kernels import TYPES, Kernels
from lq_plugin.native.layouts import Layout
from lq_plugin.native.variants import NUMBER, POINTER, REAL, SIZE, CompiledKernels, address

#: Two products of a byte and a weight up to this fit in 16 bits.
LARGEST_EXACT = 64


class IntegerKernels(CompiledKernels):
    """The compiled library."""

    source = "integer"
    folder = Path(__file__).parent
    functions: ClassVar = {
        "lq_integer_quantize": [
            NUMBER, *[POINTER] * 3, SIZE, REAL, REAL, NUMBER, NUMBER, POINTER, POINTER, NUMBER, NUMBER
        ],
        "lq_integer_quantize_rows": [NUMBER, *[POINTER] * 3, SIZE, SIZE, *[NUMBER] * 5],
        "lq_integer_dequantize": [NUMBER, POINTER, POINTER, SIZE, REAL, REAL, NUMBER, NUMBER],
    }  # fmt: skip
    returning = ("lq_integer_quantize", "lq_integer_quantize_rows")

    def __init__(self, variant: str | None = None) -> None:
        super().__init__(variant)
        self._masks = Kernels(self.variant)

    def quantize(
        self,
        x: Tensor,
        scale: float,
        zero_point: float,
        grid: IntegerGrid,
        masked: bool,
        extremes: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor | None] | None:
        """Levels above `quant_min` as uint8, laid out as `x`, and one bit for each element not clipped, where `masked`.

        Args:
            x: dense tensor.
            scale, zero_point: of the whole tensor.
            grid: at most 256 levels.
            masked: whether the bits are wanted.
            extremes: float32 `[1]` each, which take in the smallest and the largest element, in place.

        Returns:
            None where `x` has a NaN, for which there is no level.
        """
        q = torch.empty_strided(x.shape, x.stride(), dtype=torch.uint8)
        mask = torch.empty(-(-x.numel() // 16), dtype=torch.int16, device="cpu") if masked else None
        low, high = (None, None) if extremes is None else (extremes[0].data_ptr(), extremes[1].data_ptr())
        nan = self._library.lq_integer_quantize(
            _type(x), x.data_ptr(), q.data_ptr(), address(mask), x.numel(), scale,
            zero_point, grid.quant_min, grid.quant_max, low, high, self._number, torch.get_num_threads(),
        )  # fmt: skip
        return None if nan else (q, mask)

    def quantize_weight(self, w: Tensor, scale: Tensor, grid: IntegerGrid, live: bool) -> Tensor | None:
        """Levels as int8 of a contiguous weight on a grid with zero point 0.

        Args:
            w: `[C_out, ...]`.
            scale: float32, contiguous, `[C_out]` or `[1]`; where `live` it becomes that of the extremes, in place.
            grid: within -128..127.
            live: see `scale`.

        Returns:
            None where `w` has a NaN, for which there is no level, or a range without end.
        """
        q = torch.empty_like(w, dtype=torch.int8)
        rows = scale.numel()
        bad = self._library.lq_integer_quantize_rows(
            _type(w), w.data_ptr(), q.data_ptr(), scale.data_ptr(), rows, w.numel() // rows, grid.quant_min,
            grid.quant_max, live, self._number, torch.get_num_threads(),
        )  # fmt: skip
        return None if bad else q

    def dequantize(self, q: Tensor, scale: float, zero_point: float, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns (q - zero_point) · scale, laid out as `q`.

        Args:
            q: uint8.
            scale, zero_point: of the whole tensor.
            dtype: of the result, which is rounded to it once.
        """
        y = torch.empty_strided(q.shape, q.stride(), dtype=dtype)
        self._library.lq_integer_dequantize(
            _type(y), q.data_ptr(), y.data_ptr(), q.numel(), zero_point, scale, self._number, torch.get_num_threads()
        )
        return y

    def keep(self, gradient: Tensor, mask: Tensor) -> None:
        """Puts 0 where the bit is 0, in place; `gradient` lies in memory as what was quantized."""
        self._masks.keep(gradient, mask, Layout(1, 1, gradient.numel(), 1))


def _type(x: Tensor) -> int:
    return TYPES[x.dtype, x.dtype]


@functools.cache
def integer_kernels() -> IntegerKernels | str:
    """The kernels, or why they cannot be had here: tried once in a process."""
    try:
        found = IntegerKernels()
    except NativeError as error:
        return str(error)
    return found if sums_exactly(LARGEST_EXACT) else "this torch has no 8-bit products that sum exactly here"


@functools.cache
def sums_exactly(weight: int) -> bool:
    """Returns whether oneDNN's products of uint8 and int8 are exact here, with weights up to this number.

    Without VNNI instructions pairs of products saturate in 16 bits, which `LARGEST_EXACT` cannot reach.
    """
    x, w = torch.full((4, 64), 255, dtype=torch.uint8), torch.full((16, 64), weight, dtype=torch.int8)
    ones, zeros = torch.ones(16), torch.zeros(16, dtype=torch.int32)
    try:
        packed = torch.ops.onednn.qlinear_prepack(w, [4, 64])
        y = torch.ops.onednn.qlinear_pointwise(
            x, 1.0, 0, packed, ones, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
    except (RuntimeError, AttributeError):
        # A torch without oneDNN has not these operators.
        return False
    return bool((y == 255 * weight * 64).all())
