"""`triton_kernels.py` for tensors on a GPU: the `Arithmetic` of NVIDIA's int8 tensor cores.

A NaN has no level, and to look for one would wait for the device. Instead the scale becomes NaN: of the whole input, so
that all of the output is NaN and no gradient is a number, or of the weight's row, so that its channel of the output is.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from lq_plugin.intent.spec import IntegerGrid
from lq_plugin.layers.integer import triton_kernels as kernels
from lq_plugin.layers.integer.function import Levels, Operands
from lq_plugin.layers.product import Convolution
from lq_plugin.native.layouts import DTYPES, Layout
from lq_plugin.native.triton_kernels import device_of, mask_gradient, tile_sizes

_BLOCK = 2048
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
#: Rows, columns and warps of the tiles of a product, large ones first: they read less.
_PRODUCT_TILES = ((128, 128, 8), (128, 64, 4), (64, 64, 4), (64, 32, 4))
#: The largest tile is taken that makes as many as this: about the multiprocessors of a GPU. Not tuned on one.
_ENOUGH_TILES = 128


class TritonArithmetic:
    """The arithmetic of GPUs, see `lq_plugin.layers.integer.arithmetic.OneDnnArithmetic`."""

    grouped = False

    def why_inexact(self, weight: IntegerGrid, inputs: IntegerGrid) -> str | None:
        return None

    def refusal(self, x: Tensor, weight: Tensor, bias: Tensor | None, convolution: Convolution | None) -> str | None:
        tensors = [x, weight, *(() if bias is None else (bias,))]
        if any(tensor.device != x.device for tensor in tensors):
            return "its tensors are on several devices"
        dtypes = {tensor.dtype for tensor in tensors}
        if not dtypes <= set(DTYPES) or (len(dtypes) > 1 and not torch.is_autocast_enabled(x.device.type)):
            return f"it is in {', '.join(sorted(map(str, dtypes)))}"
        if not _by_rows(weight):
            return "its weight is neither contiguous nor channels-last"
        # Addresses are taken without further checks; torch says what is wrong.
        if (
            x.shape[-1 if convolution is None else 1] != weight.shape[1]
            or min(_output_size(x, weight, convolution)) < 1
        ):
            return "its input does not fit its weight"
        return None

    def levels(
        self,
        x: Tensor,
        qparams: tuple[Tensor, Tensor, IntegerGrid],
        masked: bool,
        extremes: tuple[Tensor, Tensor] | None,
    ) -> Levels:
        q, mask, found = self.quantize(x.detach(), *qparams, masked, extremes)
        return Levels(_side_by_side(q), mask, found[:1], found[1:])

    def operands(self, levels: Levels, weight: Tensor, qparams: tuple[Tensor, IntegerGrid, bool, bool]) -> Operands:
        scale, grid, live, clips = qparams
        q, scale, sums = self.quantize_weight(weight.detach(), scale, grid, live)
        return Operands(levels, _side_by_side(q), scale, grid if clips else None, sums)

    def quantize(
        self,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        grid: IntegerGrid,
        masked: bool,
        extremes: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Returns levels of `x`, as int8 above `quant_min` less 128, and a mask of one bit an element.

        Both are laid out as `x`; the mask, of what is not clipped, is made where `masked`.

        Args:
            x: dense tensor.
            scale, zero_point: float32 `[1]`, of the whole tensor.
            grid: at most 256 levels.
            masked: whether the bits are wanted.
            extremes: float32 `[1]` each, which take in the smallest and the largest element, in place.

        Returns:
            Also scale and zero point of the int8 levels, float32 `[2]`.
        """
        number = x.numel()
        programs = triton.cdiv(number, _BLOCK)
        q = torch.empty_strided(x.shape, x.stride(), dtype=torch.int8, device=x.device)
        mask = torch.empty(-(-number // 16), dtype=torch.int16, device=x.device) if masked else None
        qparams = torch.empty(2, dtype=torch.float32, device=x.device)
        lows, highs = torch.empty(2, programs, dtype=torch.float32, device=x.device)
        # What a kernel does not touch still takes a place among its arguments.
        low, high = (lows, highs) if extremes is None else extremes
        with device_of(x):
            kernels.quantize[programs,](
                x, q, q if mask is None else mask, scale, zero_point, lows, highs, number, float(grid.quant_min),
                float(grid.quant_max),
                MASKED=masked, BLOCK=_BLOCK, **_OPTIONS,
            )  # fmt: skip
            kernels.settle[1,](
                scale, zero_point, qparams, lows, highs, low, high, programs, float(grid.quant_min),
                OBSERVED=extremes is not None,
                BLOCK=1024, **_OPTIONS,
            )  # fmt: skip
        return q, mask, qparams

    def quantize_weight(self, w: Tensor, scale: Tensor, grid: IntegerGrid, live: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Returns a weight's levels as int8, their scales (float32) and sums (int32), both `[C_out]`.

        The grid has zero point 0; the levels are laid out as the weight.

        Args:
            w: `[C_out, ...]`, contiguous or channels-last.
            scale: float32, contiguous, of `C_out` elements or one.
            grid: within -128..127.
            live: the scale is that of the extremes instead, of rows or of all as there are scales.
        """
        rows, length = w.shape[0], w[0].numel()
        together = scale.numel() == 1
        q = torch.empty_strided(w.shape, w.stride(), dtype=torch.int8, device=w.device)
        scales = torch.empty(rows, dtype=torch.float32, device=w.device)
        sums = torch.empty(rows, dtype=torch.int32, device=w.device)
        low, high = torch.aminmax(w) if live and together else (scale, scale)
        with device_of(w):
            kernels.quantize_rows[rows,](
                w, q, scales, sums, scale, low, high, length, float(grid.quant_min), float(grid.quant_max),
                0 if together else 1,
                LIVE=live, TOGETHER=together, BLOCK=min(_BLOCK, max(16, triton.next_power_of_2(length))), **_OPTIONS,
            )  # fmt: skip
        return q, scales, sums

    def product(
        self, operands: Operands, bias: Tensor | None, convolution: Convolution | None, dtype: torch.dtype
    ) -> Tensor:
        (q, _, scale, zero_point), w = operands.levels, operands.q_weight
        size = _output_size(q, w, convolution)
        order = torch.contiguous_format if convolution is None else torch.channels_last
        y = torch.empty(size, dtype=dtype, device=q.device, memory_format=order)
        columns, channels, depth = w.shape[0], w.shape[1], w[0].numel()
        rows = y.numel() // columns
        image, out_image, taps = (
            ((1, 1), (1, 1), (1, 1)) if convolution is None else (q.shape[2:], size[2:], w.shape[2:])
        )
        stride, padding, dilation = ((1, 1), (0, 0), (1, 1)) if convolution is None else convolution[:3]
        height, width, warps = _product_tile(rows, columns)
        step = 32 if channels % 64 == 32 else 64
        how = kernels.ONE_TAP if taps[0] * taps[1] == 1 else kernels.MIXED if channels % step else kernels.WITHIN_TAP
        with device_of(q):
            kernels.multiply[triton.cdiv(rows, height) * triton.cdiv(columns, width),](
                q, w, y, scale, zero_point, operands.weight_scale, operands.weight_sums,
                q if bias is None else bias.detach(), rows, columns, depth, channels, *image, *out_image, taps[1],
                *stride, *padding,
                *dilation, TAPS=how, PADDED=any(padding), EVEN=depth % step == 0, BIASED=bias is not None, ROWS=height,
                COLUMNS=width,
                DEPTH=step, BAND=8, num_warps=warps, num_stages=4, enable_fp_fusion=False,
            )  # fmt: skip
        return y

    def dequantize(self, q: Tensor, scale: float | Tensor, zero_point: float | Tensor, dtype: torch.dtype) -> Tensor:
        y = torch.empty_strided(q.shape, q.stride(), dtype=dtype, device=q.device)
        with device_of(q):
            kernels.dequantize[triton.cdiv(q.numel(), _BLOCK),](
                q, y, scale, zero_point, q.numel(), BLOCK=_BLOCK, **_OPTIONS
            )
        return y

    def keep(self, gradient: Tensor, mask: Tensor) -> None:
        layout = Layout(1, 1, gradient.numel(), 1)
        programs, parts, rows, columns = tile_sizes(layout)
        with device_of(gradient):
            mask_gradient[programs,](
                gradient, gradient, mask, *layout.rows, parts, ROWS=rows, COLUMNS=columns, **_OPTIONS
            )


def _side_by_side(q: Tensor) -> Tensor:
    """Returns `q` laid out so that what a product sums over lies side by side."""
    return q.contiguous(memory_format=torch.channels_last if q.ndim == 4 else torch.contiguous_format)


def _by_rows(weight: Tensor) -> bool:
    """Returns whether all that makes one output lies next to each other, one output after the other."""
    return weight.is_contiguous() or (weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last))


def _output_size(x: Tensor, weight: Tensor, convolution: Convolution | None) -> list[int]:
    if convolution is None:
        return [*x.shape[:-1], weight.shape[0]]
    moves = zip(
        x.shape[2:], weight.shape[2:], convolution.stride, convolution.padding, convolution.dilation, strict=True
    )
    spatial = [
        (length + 2 * padding - dilation * (taps - 1) - 1) // stride + 1
        for length, taps, stride, padding, dilation in moves
    ]
    return [x.shape[0], weight.shape[0], *spatial]


def _product_tile(rows: int, columns: int) -> tuple[int, int, int]:
    # A layer with few outputs has tiles as narrow as it is.
    narrow = max(16, triton.next_power_of_2(columns))
    tiles = [(height, min(width, narrow), warps) for height, width, warps in _PRODUCT_TILES]
    many = [tile for tile in tiles if triton.cdiv(rows, tile[0]) * triton.cdiv(columns, tile[1]) >= _ENOUGH_TILES]
    return (many or tiles[-1:])[0]
