"""The protocol of kernels, and `fake_quantize.cpp` for tensors.

Callers check `accepts` first: addresses are taken without more checks.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from lq_plugin.native.build import NativeError, library

#: Variants of the kernels, by the number that the C++ side gives them.
VARIANTS = ("portable", "avx2", "avx512")
#: Dtypes that the kernels of a device take.
DTYPES = {"cpu": (torch.float32,), "cuda": (torch.float32, torch.float16, torch.bfloat16)}
_WORD = 16
#: `LINE` of fake_quantize.cpp.
_LINE = 256


class Layout(NamedTuple):
    """The layout of scales along a tensor in memory, `[repeats, outer, run, inner]`: one for each `(outer, inner)`."""

    repeats: int
    outer: int
    run: int
    inner: int

    @property
    def words(self) -> int:
        """Number of words of a mask."""
        if self.inner == 1:
            return self.repeats * self.outer * -(-self.run // _WORD)
        return self.repeats * self.outer * self.run * -(-self.inner // _WORD)

    @property
    def rows(self) -> tuple[int, int]:
        """Number and length of the runs that begin at a word of a mask."""
        return (
            (self.repeats * self.outer, self.run)
            if self.inner == 1
            else (self.repeats * self.outer * self.run, self.inner)
        )


def accepts(x: Tensor) -> bool:
    """Returns True if `x` has one of its device's `DTYPES` and is dense in memory, in any order of dims."""
    return (
        x.dtype in DTYPES.get(x.device.type, ())
        and x.layout == torch.strided
        and not x.is_neg()
        and (x.is_contiguous() or is_dense(x))
    )


def is_dense(x: Tensor) -> bool:
    """Returns True if elements neither overlap in memory nor have gaps between them."""
    return x.is_contiguous() or bool(torch.ops.aten.is_non_overlapping_and_dense(x))


def layout_of(x: Tensor, scale: Tensor) -> Layout | None:
    """Returns the layout of `scale`, broadcastable to a dense `x`, along it; None if the kernels know no such layout.

    >>> layout_of(torch.zeros(2, 3, 4, 4), torch.ones(1))
    Layout(repeats=1, outer=1, run=96, inner=1)
    >>> layout_of(torch.zeros(2, 3, 4, 4), torch.ones(3, 1, 1))
    Layout(repeats=2, outer=3, run=16, inner=1)
    >>> layout_of(torch.zeros(2, 5, 3), torch.ones(3))
    Layout(repeats=1, outer=1, run=10, inner=3)
    """
    if scale.numel() == 1:
        return Layout(1, 1, x.numel(), 1) if scale.ndim <= x.ndim or x.ndim == 0 else None
    if scale.ndim > x.ndim or not scale.is_contiguous():
        return None
    return layout_along(x, (1,) * (x.ndim - scale.ndim) + tuple(scale.shape))


def layout_along(x: Tensor, sizes: tuple[int, ...]) -> Layout | None:
    """Returns `layout_of` a scale of these sizes, as many as `x` has dims."""
    if len(sizes) != x.ndim:
        return None
    order = range(x.ndim) if x.is_contiguous() else sorted(range(x.ndim), key=x.stride, reverse=True)
    # Neighbouring dims that the scale has, or lacks, are one.
    parts: list[tuple[bool, int]] = []
    kept = []
    for dim in order:
        if x.shape[dim] == 1:
            continue
        has = sizes[dim] > 1
        if has:
            kept.append(dim)
        if parts and parts[-1][0] == has:
            parts[-1] = (has, parts[-1][1] * x.shape[dim])
        else:
            parts.append((has, x.shape[dim]))
    if kept != sorted(kept):
        return None
    flags = [has for has, _ in parts]
    number = [size for _, size in parts]
    known = {
        (): lambda: Layout(1, 1, 1, 1),
        (False,): lambda n: Layout(1, 1, n, 1),
        (True,): lambda a: Layout(1, 1, 1, a),
        (True, False): lambda a, b: Layout(1, a, b, 1),
        (False, True): lambda b, c: Layout(1, 1, b, c),
        (False, True, False): lambda r, a, b: Layout(r, a, b, 1),
        (True, False, True): lambda a, b, c: Layout(1, a, b, c),
        (False, True, False, True): lambda r, a, b, c: Layout(r, a, b, c),
    }
    made = known.get(tuple(flags))
    return None if made is None else made(*number)  # type: ignore[operator]


class BlockRule(ctypes.Structure):
    """The quantization of blocks whose scales follow from their values; see `fake_quantize_blocks.h`.

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


class BlockLayout(NamedTuple):
    """The layout of channels in memory, `[outer, channels, inner]`."""

    outer: int
    channels: int
    inner: int

    @property
    def mask(self) -> Layout:
        """The layout of a mask: each run of elements begins at a word."""
        return (
            Layout(self.outer, 1, self.channels, 1)
            if self.inner == 1
            else Layout(self.outer * self.channels, 1, self.inner, 1)
        )


def block_layout(x: Tensor, axis: int, block: int) -> BlockLayout | None:
    """Returns the layout of the channels of a dense `x`; None if the kernels cannot take blocks of that size.

    Args:
        x: dense.
        axis: of the channels.
        block: channels of a block.

    >>> block_layout(torch.zeros(2, 3, 4, 4), 1, 16), block_layout(torch.zeros(5, 2, 8), 2, 4)
    (BlockLayout(outer=2, channels=3, inner=16), None)
    """
    order = (
        range(x.ndim)
        if x.is_contiguous()
        else sorted((d for d in range(x.ndim)), key=lambda d: (x.stride(d), -d), reverse=True)
    )
    sizes = [x.shape[d] for d in order]
    at = list(order).index(axis % x.ndim)
    found = BlockLayout(math.prod(sizes[:at]), sizes[at], math.prod(sizes[at + 1 :]))
    # Words of a mask would be shared between blocks, or blocks not fit into a line.
    return None if found.inner == 1 and (block % _WORD or block > _LINE) else found


class FakeQuantizeKernels(Protocol):
    """Fake quantization in as few passes over memory as possible, bit for bit as the torch operations do it."""

    @property
    def variant(self) -> str:
        """The name of these kernels."""

    def fake_quantize(
        self,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        bounds: tuple[int, int],
        layout: Layout,
        masked: bool,
        learned: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns quantized `x` and, if `masked`, the bits of the elements that were not clipped.

        Args:
            x: that `accepts` holds for.
            scale, zero_point: contiguous float32 on x's device, `[outer, inner]` elements.
            bounds: quant_min and quant_max.
            layout: of both along x.
            learned: the scale acts by its magnitude, the zero point rounded, as in LSQ.
        """

    def fake_quantize_observed(
        self,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        bounds: tuple[int, int],
        low: Tensor,
        high: Tensor,
        masked: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns `fake_quantize` with one scale, and widens `low..high` in place to the extremes of `x`.

        Args:
            x: that `accepts` holds for.
            scale, zero_point: float32 on x's device, one element.
            bounds: quant_min and quant_max.
            low, high: one element each.
            masked: return the mask; else it is None.
        """

    def fake_quantize_rows(
        self, x: Tensor, rows: int, bounds: tuple[int, int], affine: bool, masked: bool
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Returns quantized `x`, its mask, and scales and zero points `[rows]` from the extremes of each part.

        Args:
            x: contiguous, that `accepts` holds for.
            rows: number of equal parts of `x`, each with a range of its own.
            bounds: quant_min and quant_max.
            affine: with a zero point.
            masked: return the mask; else it is None.
        """

    def mask_gradient(self, gradient: Tensor, mask: Tensor, layout: Layout) -> Tensor:
        """Returns the gradient where a bit of `mask` is 1, and 0 elsewhere.

        Args:
            gradient: laid out in memory as the masked tensor; so is the result.
            mask: from the forward pass.
            layout: of the mask.
        """

    def learned_backward(
        self, x: Tensor, gradient: Tensor, scale: Tensor, zero_point: Tensor, bounds: tuple[int, int], rounded: bool,
        layout: Layout,
        needs_x: bool, needs_zero_point: bool,
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:  # fmt: skip
        """Returns gradients of x and, float64 `[outer]`, of scale and zero point without LSQ's factor.

        `layout.inner` is 1.

        `rounded`: the band is that of the rounded value, see `lq_plugin.functional.lsq`.
        """


class Kernels:
    """The compiled library; see `FakeQuantizeKernels`.

    Args:
        variant: one of `VARIANTS`; None: the fastest that the processor runs.

    Raises:
        NativeError: it cannot be compiled, or the processor does not run the variant.
    """

    def __init__(self, variant: str | None = None) -> None:
        compiled = library("fake_quantize")
        best = compiled.lq_fake_quantize_best()
        self.variants = VARIANTS[: best + 1]
        self.variant = self.variants[-1] if variant is None else variant
        if self.variant not in self.variants:
            raise NativeError(f"variant {variant!r}: this processor runs {', '.join(self.variants)}")
        self._number = VARIANTS.index(self.variant)
        pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        signatures = {
            "lq_fake_quantize": [*[pointer] * 5, *[size] * 4, *[number] * 5],
            "lq_fake_quantize_observed": [*[pointer] * 5, size, number, number, pointer, pointer, number, number],
            "lq_fake_quantize_rows": [*[pointer] * 5, size, size, *[number] * 5],
            "lq_fake_quantize_blocks": [*[pointer] * 3, *[size] * 3, ctypes.POINTER(BlockRule), number, number],
            "lq_fake_quantize_lookup": [*[pointer] * 6, *[size] * 4, *[number] * 7],
            "lq_row_extremes": [*[pointer] * 3, size, size, number, number],
            "lq_mask_gradient": [*[pointer] * 3, size, size, number, number],
            "lq_learned_backward": [*[pointer] * 7, *[size] * 3, *[number] * 5],
        }
        for name, signature in signatures.items():
            function = getattr(compiled, name)
            function.argtypes, function.restype = signature, None
        self._fake_quantize = compiled.lq_fake_quantize
        self._observed = compiled.lq_fake_quantize_observed
        self._rows = compiled.lq_fake_quantize_rows
        self._blocks = compiled.lq_fake_quantize_blocks
        self._lookup = compiled.lq_fake_quantize_lookup
        self._lookup.restype = number
        self._row_extremes = compiled.lq_row_extremes
        self._mask_gradient = compiled.lq_mask_gradient
        self._learned_backward = compiled.lq_learned_backward

    def fake_quantize(
        self,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        bounds: tuple[int, int],
        layout: Layout,
        masked: bool,
        learned: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        y, mask = torch.empty_like(x), new_mask(x, layout, masked)
        self._fake_quantize(
            x.data_ptr(), y.data_ptr(), _address(mask), scale.data_ptr(), zero_point.data_ptr(), *layout, *bounds,
            learned,
            self._number, torch.get_num_threads(),
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
    ) -> tuple[Tensor, Tensor | None]:
        y, mask = torch.empty_like(x), new_mask(x, Layout(1, 1, x.numel(), 1), masked)
        self._observed(
            x.data_ptr(), y.data_ptr(), _address(mask), scale.data_ptr(), zero_point.data_ptr(), x.numel(), *bounds,
            low.data_ptr(), high.data_ptr(), self._number, torch.get_num_threads(),
        )  # fmt: skip
        return y, mask

    def fake_quantize_rows(
        self, x: Tensor, rows: int, bounds: tuple[int, int], affine: bool, masked: bool
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        y, mask = torch.empty_like(x), None
        scale, zero_point = x.new_empty(rows), x.new_empty(rows)
        if masked:
            mask = new_mask(x, Layout(1, rows, x.numel() // rows, 1), masked)
        self._rows(
            x.data_ptr(), y.data_ptr(), None if mask is None else mask.data_ptr(), scale.data_ptr(),
            zero_point.data_ptr(), rows, x.numel() // rows, *bounds, affine, self._number, torch.get_num_threads(),
        )  # fmt: skip
        return y, mask, scale, zero_point

    def fake_quantize_blocks(
        self, x: Tensor, layout: BlockLayout, rule: BlockRule, masked: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Returns quantized `x` and, if `masked`, the bits of the elements that were not clipped, as `layout.mask`.

        Args:
            x: that `accepts` holds for.
            layout: of its channels.
            rule: of the format.
            masked: return the mask; else it is None.
        """
        y, mask = torch.empty_like(x), new_mask(x, layout.mask, masked)
        self._blocks(x.data_ptr(), y.data_ptr(), _address(mask), *layout, rule, self._number, torch.get_num_threads())
        return y, mask

    def fake_quantize_lookup(
        self, table: Tensor, index: Tensor, qparams: tuple[Tensor, Tensor] | None, bounds: tuple[int, int],
        affine: bool, parts: int, masked: bool, learned: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Returns rows of a quantized table and, if `masked`, the bits of what was not clipped, in `[n · parts]` runs.

        Args:
            table: `[rows, length]`, contiguous, that `accepts` holds for.
            index: int64, contiguous.
            qparams: of the parts, contiguous float32 of `rows · parts` elements, or of one; None: the extremes of each
                part.
            parts: into which each row is divided, of equal length.
            learned: as in `fake_quantize`.

        Raises:
            IndexError: an index is outside the table.
        """
        rows, length = table.shape
        y = torch.empty(*index.shape, length)
        mask = new_mask(y, Layout(1, index.numel() * parts, length // parts, 1), masked)
        scale, zero_point = qparams or (None, None)
        ranges = 2 if scale is None else int(scale.numel() > 1)
        found = self._lookup(
            table.data_ptr(), index.data_ptr(), y.data_ptr(), _address(mask), _address(scale), _address(zero_point),
            rows, index.numel(), parts, length // parts, ranges, *bounds, affine, learned, self._number,
            torch.get_num_threads(),
        )  # fmt: skip
        if not found:
            raise IndexError(f"index out of range: the table has {rows} rows, got {index.min()}..{index.max()}")
        return y, mask

    def row_extremes(self, x: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Returns the extremes `[rows]` of each of the `rows` equal parts of a contiguous `x`; a NaN stays."""
        low, high = x.new_empty(rows), x.new_empty(rows)
        self._row_extremes(
            x.data_ptr(), low.data_ptr(), high.data_ptr(), rows, x.numel() // rows, self._number,
            torch.get_num_threads()
        )  # fmt: skip
        return low, high

    def mask_gradient(self, gradient: Tensor, mask: Tensor, layout: Layout) -> Tensor:
        result = torch.empty_like(gradient)
        self._mask_gradient(
            gradient.data_ptr(), result.data_ptr(), mask.data_ptr(), *layout.rows, self._number, torch.get_num_threads()
        )  # fmt: skip
        return result

    def learned_backward(
        self, x: Tensor, gradient: Tensor, scale: Tensor, zero_point: Tensor, bounds: tuple[int, int], rounded: bool,
        layout: Layout,
        needs_x: bool, needs_zero_point: bool,
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:  # fmt: skip
        result = torch.empty_like(x) if needs_x else None
        slope = torch.empty(layout.outer, dtype=torch.float64)
        shift = torch.empty_like(slope) if needs_zero_point else None
        self._learned_backward(
            x.data_ptr(), gradient.data_ptr(), _address(result), scale.data_ptr(), zero_point.data_ptr(),
            slope.data_ptr(),
            _address(shift), *layout[:3], *bounds, rounded, self._number, torch.get_num_threads(),
        )  # fmt: skip
        return result, slope, shift


def new_mask(x: Tensor, layout: Layout, wanted: bool) -> Tensor | None:
    """Returns an empty mask, one bit per element, or None if none is wanted.

    Args:
        x: the tensor, for its device.
        layout: of the mask.
        wanted: whether there is to be one.
    """
    return torch.empty(layout.words, dtype=torch.int16, device=x.device) if wanted else None


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
