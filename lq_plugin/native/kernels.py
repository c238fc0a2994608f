"""`fake_quantize.cpp` for tensors. Callers ask `ops.kernels_for` first: addresses are taken without more checks."""

from __future__ import annotations

import ctypes
import functools
from typing import Any, ClassVar

import torch
from torch import Tensor

from lq_plugin.native.build import library
from lq_plugin.native.layouts import BlockLayout, Layout, new_mask
from lq_plugin.native.variants import NUMBER, POINTER, SIZE, CompiledKernels, address

#: Types of an operand and of its result (or of a gradient), by the number that the C++ side gives them.
TYPES = {
    (torch.float32, torch.float32): 0,
    (torch.bfloat16, torch.bfloat16): 1,
    (torch.float16, torch.float16): 2,
    (torch.float32, torch.bfloat16): 3,
    (torch.float32, torch.float16): 4,
}


class BlockRule(ctypes.Structure):
    """The quantization of blocks whose scales follow from their values; see `blocks.h`.

    >>> BlockRule(family=BlockRule.MICROEXPONENTS, block=16, quant_max=15, mantissa_bits=4, scale_bits=1).block
    16
    """

    MICROEXPONENTS, OCP, NVFP4, VECTORS = range(4)
    _INTEGERS = (
        "family",
        "block",
        "quant_min",
        "quant_max",
        "mantissa_bits",
        "min_exponent",
        "max_exponent",
        "scale_bits",
        "mode",
    )
    _fields_: ClassVar[Any] = [
        *((name, ctypes.c_int) for name in _INTEGERS),
        ("max_value", ctypes.c_float),
        ("coarse", ctypes.c_float),
    ]


class Kernels(CompiledKernels):
    """Fake quantization in as few passes over memory as possible, bit for bit as the torch operations do it."""

    source = "fake_quantize"
    functions: ClassVar = {
        "lq_fake_quantize": [NUMBER, *[POINTER] * 5, *[SIZE] * 4, *[NUMBER] * 5],
        "lq_fake_quantize_observed": [
            NUMBER, *[POINTER] * 5, SIZE, NUMBER, NUMBER, POINTER, POINTER, NUMBER, NUMBER
        ],
        "lq_fake_quantize_rows": [NUMBER, *[POINTER] * 5, SIZE, SIZE, *[NUMBER] * 5],
        "lq_row_extremes": [NUMBER, *[POINTER] * 3, SIZE, SIZE, NUMBER, NUMBER],
        "lq_qparams": [NUMBER, *[POINTER] * 3, SIZE, *[NUMBER] * 5],
        "lq_passed_gradient": [NUMBER, *[POINTER] * 5, SIZE, *[NUMBER] * 4],
        "lq_mask_gradient": [NUMBER, *[POINTER] * 3, SIZE, SIZE, NUMBER, NUMBER],
        "lq_grid_errors": [*[POINTER] * 4, *[SIZE] * 3, *[NUMBER] * 5],
        "lq_keep": [NUMBER, *[POINTER] * 2, SIZE, SIZE, NUMBER, NUMBER],
        "lq_learned_backward": [NUMBER, *[POINTER] * 7, *[SIZE] * 3, *[NUMBER] * 5],
    }  # fmt: skip

    def fake_quantize(
        self,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        bounds: tuple[int, int],
        layout: Layout,
        masked: bool,
        learned: bool = False,
        dtype: torch.dtype | None = None,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns quantized `x` and, if `masked`, the bits of the elements that were not clipped.

        The arithmetic is float32 whatever the dtypes; the result is rounded to its own once, at the end.

        Args:
            x: that `kernels_for` gave these kernels for.
            scale, zero_point: contiguous float32 on x's device, `[outer, inner]` elements.
            bounds: quant_min and quant_max.
            layout: of both along x.
            learned: the scale acts by its magnitude, the zero point rounded, as in LSQ.
            dtype: of the result: that of `x` (None), or a smaller one where that is float32.
            out: takes the result, of the shape and strides of `x`; None: new memory.
        """
        y = torch.empty_like(x, dtype=dtype) if out is None else out
        mask = new_mask(x, layout) if masked else None
        self._library.lq_fake_quantize(
            TYPES[x.dtype, y.dtype],
            x.data_ptr(), y.data_ptr(), None if mask is None else mask.data_ptr(), scale.data_ptr(),
            zero_point.data_ptr(), *layout, *bounds, learned, self._number, torch.get_num_threads(),
        )  # fmt: skip
        return y, mask

    def fake_quantize_observed(
        self,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        bounds: tuple[int, int],
        low: Tensor,
        high: Tensor,
        masked: bool,
        dtype: torch.dtype | None = None,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns `fake_quantize` with one scale, and widens `low..high` in place to the extremes of `x`.

        Args:
            x: that `kernels_for` gave these kernels for.
            scale, zero_point: float32 on x's device, one element.
            bounds: quant_min and quant_max.
            low, high: float32, one element each.
            masked: return the mask; else it is None.
            dtype, out: of the result, as in `fake_quantize`.
        """
        whole = Layout(1, 1, x.numel(), 1)
        y = torch.empty_like(x, dtype=dtype) if out is None else out
        mask = new_mask(x, whole) if masked else None
        self._library.lq_fake_quantize_observed(
            TYPES[x.dtype, y.dtype],
            x.data_ptr(), y.data_ptr(), None if mask is None else mask.data_ptr(), scale.data_ptr(),
            zero_point.data_ptr(), x.numel(), *bounds, low.data_ptr(), high.data_ptr(), self._number,
            torch.get_num_threads(),
        )  # fmt: skip
        return y, mask

    def fake_quantize_rows(
        self,
        x: Tensor,
        rows: int,
        bounds: tuple[int, int],
        affine: bool,
        masked: bool,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Returns quantized `x`, its mask, and scales and zero points `[rows]` from the extremes of each part.

        Args:
            x: contiguous, that `kernels_for` gave these kernels for.
            rows: number of equal parts of `x`, each with a range of its own.
            bounds: quant_min and quant_max.
            affine: with a zero point.
            masked: return the mask; else it is None.
            dtype: of the result, as in `fake_quantize`.
        """
        y = torch.empty_like(x, dtype=dtype)
        mask = new_mask(x, Layout(1, rows, x.numel() // rows, 1)) if masked else None
        scale, zero_point = (
            torch.empty(rows, dtype=torch.float32, device="cpu"),
            torch.empty(rows, dtype=torch.float32, device="cpu"),
        )
        self._library.lq_fake_quantize_rows(
            TYPES[x.dtype, y.dtype],
            x.data_ptr(), y.data_ptr(), None if mask is None else mask.data_ptr(), scale.data_ptr(),
            zero_point.data_ptr(), rows, x.numel() // rows, *bounds, affine, self._number, torch.get_num_threads(),
        )  # fmt: skip
        return y, mask, scale, zero_point

    def fake_quantize_blocks(
        self, x: Tensor, layout: BlockLayout, rule: BlockRule, masked: bool, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Returns quantized `x` and, if `masked`, the bits of the elements that were not clipped, as `layout.mask`.

        Args:
            x: that `kernels_for` gave these kernels for.
            layout: of its channels.
            rule: of the format.
            masked: return the mask; else it is None.
            dtype: of the result, as in `fake_quantize`.
        """
        y = torch.empty_like(x, dtype=dtype)
        mask = new_mask(x, layout.mask) if masked else None
        self._blocks(
            TYPES[x.dtype, y.dtype],
            x.data_ptr(), y.data_ptr(), address(mask), *layout, rule, self._number,
            torch.get_num_threads(),
        )  # fmt: skip
        return y, mask

    @functools.cached_property
    def _blocks(self) -> Any:
        # A library of its own: what quantizes integers alone does not wait for its compilation.
        function = library("blocks").lq_fake_quantize_blocks
        function.argtypes = [NUMBER, *[POINTER] * 3, *[SIZE] * 3, ctypes.POINTER(BlockRule), NUMBER, NUMBER]
        function.restype = None
        return function

    def row_extremes(self, x: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Returns the extremes, float32 `[rows]`, of each of the `rows` equal parts of contiguous `x`; a NaN stays."""
        low, high = (
            torch.empty(rows, dtype=torch.float32, device="cpu"),
            torch.empty(rows, dtype=torch.float32, device="cpu"),
        )
        self._library.lq_row_extremes(
            TYPES[x.dtype, x.dtype],
            x.data_ptr(), low.data_ptr(), high.data_ptr(), rows, x.numel() // rows, self._number,
            torch.get_num_threads()
        )  # fmt: skip
        return low, high

    def grid_errors(
        self, x: Tensor, scale: Tensor, zero_point: Tensor | None, bounds: tuple[int, int], rounded: bool = True
    ) -> Tensor:
        """Returns the mean squared errors of each row on some grids, float64 `[rows, candidates]`.

        Args:
            x: float32 `[rows, n]`, contiguous.
            scale: of the grids that are tried on each row, float32 `[rows, candidates]`, contiguous.
            zero_point: likewise; None: all are 0.
            bounds: quant_min and quant_max.
            rounded: False: of clipping alone.
        """
        errors = torch.empty(scale.shape, dtype=torch.float64, device="cpu")
        self._library.lq_grid_errors(
            x.data_ptr(), scale.data_ptr(), None if zero_point is None else zero_point.data_ptr(), errors.data_ptr(),
            *x.shape, scale.shape[1], *bounds, rounded, self._number, torch.get_num_threads(),
        )  # fmt: skip
        return errors

    def qparams(self, x: Tensor, bounds: tuple[int, int], affine: bool) -> tuple[Tensor, Tensor]:
        """Returns scale and zero point, float32 `[1]`, from the extremes of `x`.

        Args:
            x: that `kernels_for` gave these kernels for.
            bounds: quant_min and quant_max.
            affine: with a zero point.
        """
        scale, zero_point = (
            torch.empty(1, dtype=torch.float32, device="cpu"),
            torch.empty(1, dtype=torch.float32, device="cpu"),
        )
        self._library.lq_qparams(
            TYPES[x.dtype, x.dtype],
            x.data_ptr(), scale.data_ptr(), zero_point.data_ptr(), x.numel(), *bounds, affine, self._number,
            torch.get_num_threads(),
        )  # fmt: skip
        return scale, zero_point

    def mask_gradient(self, gradient: Tensor, mask: Tensor, layout: Layout, dtype: torch.dtype | None = None) -> Tensor:
        """Returns the gradient where a bit of `mask` is 1, and 0 elsewhere.

        Args:
            gradient: laid out in memory as the masked tensor; so is the result.
            mask: from the forward pass.
            layout: of the mask.
            dtype: of the masked tensor and of the result: that of `gradient` (None), or float32.
        """
        result = torch.empty_like(gradient, dtype=dtype)
        self._library.lq_mask_gradient(
            TYPES[result.dtype, gradient.dtype],
            gradient.data_ptr(), result.data_ptr(), mask.data_ptr(), *layout.rows, self._number, torch.get_num_threads()
        )  # fmt: skip
        return result

    def keep(self, gradient: Tensor, mask: Tensor, layout: Layout) -> None:
        """Puts 0 where a bit of `mask` is 0, in place: `mask_gradient` without another tensor.

        Args:
            gradient: laid out in memory as the masked tensor.
            mask: from the forward pass.
            layout: of the mask.
        """
        self._library.lq_keep(
            TYPES[gradient.dtype, gradient.dtype],
            gradient.data_ptr(), mask.data_ptr(), *layout.rows, self._number, torch.get_num_threads(),
        )  # fmt: skip

    def passed_gradient(
        self, x: Tensor, gradient: Tensor, scale: Tensor, zero_point: Tensor, bounds: tuple[int, int]
    ) -> Tensor:
        """Returns the gradient where `x` is not clipped, and 0 elsewhere: `mask_gradient` without a mask.

        Args:
            x: that `kernels_for` gave these kernels for.
            gradient: laid out in memory as `x`, of the dtype that `fake_quantize` gave to its result.
            scale, zero_point: float32, one element.
            bounds: quant_min and quant_max.
        """
        result = torch.empty_like(x)
        self._library.lq_passed_gradient(
            TYPES[x.dtype, gradient.dtype], x.data_ptr(), gradient.data_ptr(), result.data_ptr(), scale.data_ptr(),
            zero_point.data_ptr(), x.numel(), *bounds, self._number, torch.get_num_threads(),
        )  # fmt: skip
        return result

    def learned_backward(
        self, x: Tensor, gradient: Tensor, scale: Tensor, zero_point: Tensor, bounds: tuple[int, int], rounded: bool,
        layout: Layout,
        needs_x: bool, needs_zero_point: bool,
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:  # fmt: skip
        """Returns gradients of x and, float64 `[outer]`, of scale and zero point without LSQ's factor.

        `layout.inner` is 1. The gradient has the dtype that `fake_quantize` gave to its result.

        Args:
            x: that was quantized.
            gradient: of the result.
            scale, zero_point: as the layout says.
            bounds: outermost levels.
            rounded: the band is that of the rounded value, see `lq_plugin.functional.lsq`.
            layout: of scales along `x`.
            needs_x, needs_zero_point: whether these gradients are wanted.
        """
        result = torch.empty_like(x) if needs_x else None
        slope = torch.empty(layout.outer, dtype=torch.float64, device="cpu")
        shift = torch.empty_like(slope) if needs_zero_point else None
        self._library.lq_learned_backward(
            TYPES[x.dtype, gradient.dtype],
            x.data_ptr(), gradient.data_ptr(), address(result), scale.data_ptr(), zero_point.data_ptr(),
            slope.data_ptr(),
            address(shift), *layout[:3], *bounds, rounded, self._number, torch.get_num_threads(),
        )  # fmt: skip
        return result, slope, shift
