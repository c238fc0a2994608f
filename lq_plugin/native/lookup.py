"""`lookup.cpp` for tensors: rows of a table, quantized as they are read, and what training adds to them."""

from __future__ import annotations

import ctypes
import functools
import struct
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from lq_plugin.native.kernels import TYPES
from lq_plugin.native.layouts import Layout, new_mask
from lq_plugin.native.ops import is_watched
from lq_plugin.native.switch import active
from lq_plugin.native.variants import NUMBER, POINTER, SIZE, CompiledKernels, address

_ONE, _GIVEN, _OWN = range(3)
_NO_COPIES = (0, 0, 0)
#: Results are there, whatever the default device is.
_CPU = torch.device("cpu")
_TYPE_OF = {x: number for (x, y), number in TYPES.items() if x is y}
#: `Lookup` of lookup.cpp.
_LOOKUP = struct.Struct("21q")
#: `LearnedRows` of lookup.cpp.
_LEARNED = struct.Struct("9qd12q")


class Taken(NamedTuple):
    """Copies of what was read: `[count, length]` rows, and float32 `[count · parts, 1]` scales and zero points.

    No zero points: all are 0.
    """

    rows: Tensor
    scale: Tensor
    zero_point: Tensor | None


class LookupKernels(CompiledKernels):
    """The compiled library; addresses are taken without more checks, see `lookup_kernels`."""

    source = "lookup"
    functions: ClassVar = {
        "lq_lookup": [ctypes.c_char_p],
        "lq_learned_rows": [ctypes.c_char_p],
        "lq_add_rows": [NUMBER, *[POINTER] * 4, *[SIZE] * 4, NUMBER, NUMBER],
        "lq_rows_known": [NUMBER, POINTER, POINTER, *[SIZE] * 3, POINTER, POINTER, NUMBER],
        "lq_follow_rows": [NUMBER, POINTER, POINTER, *[SIZE] * 3, *[POINTER] * 3, NUMBER],
    }
    returning = ("lq_lookup", "lq_rows_known", "lq_follow_rows")

    def look_up(
        self, table: Tensor, index: Tensor, qparams: tuple[Tensor, Tensor | None] | None, bounds: tuple[int, int],
        affine: bool, parts: int, masked: bool, learned: bool = False, taken: bool = False, out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Taken | None]:  # fmt: skip
        """Returns rows of a quantized table; bits of what was not clipped, in runs of a part; copies of what was read.

        Args:
            table: `[rows, length]`.
            index: of the rows, of any shape.
            qparams: of the parts, contiguous float32 of `rows · parts` elements, or of one; no zero points: all are
                0. None: those of the extremes of each part.
            bounds: quant_min and quant_max.
            affine: the grid has a zero point.
            parts: into which each row is divided, of equal length.
            masked: return the mask; else it is None.
            learned: as in `Kernels.fake_quantize`.
            taken: return the copies; else they are None.
            out: takes the rows, contiguous; autograd is told nothing of it. None: new memory.

        Raises:
            IndexError: an index is outside the table.
        """
        rows, length = table.shape
        count, run = index.numel(), length // parts
        dtype = table.dtype
        y = torch.empty((*index.shape, length), dtype=dtype, device=_CPU) if out is None else out
        mask = new_mask(y, Layout(1, count * parts, run, 1)) if masked else None
        ranges, at_scale, at_zero_point = _OWN, 0, 0
        if qparams is not None:
            scale, zero_point = qparams
            ranges = _GIVEN if scale.numel() > 1 else _ONE
            at_scale, at_zero_point = scale.data_ptr(), 0 if zero_point is None else zero_point.data_ptr()
        copies, places = None, _NO_COPIES
        if taken:
            copies = Taken(
                torch.empty((count, length), dtype=dtype, device=_CPU),
                torch.empty((count * parts, 1), dtype=torch.float32, device=_CPU),
                torch.empty((count * parts, 1), dtype=torch.float32, device=_CPU)
                if at_zero_point or ranges == _OWN
                else None,
            )
            places = copies[0].data_ptr(), copies[1].data_ptr(), 0 if copies[2] is None else copies[2].data_ptr()
        found = self._library.lq_lookup(_LOOKUP.pack(
            _TYPE_OF[dtype],
            table.data_ptr(), index.data_ptr(), y.data_ptr(), 0 if mask is None else mask.data_ptr(),
            at_scale, at_zero_point, *places,
            rows, count, parts, run, ranges, *bounds, affine, learned, self._number, torch.get_num_threads(),
        ))  # fmt: skip
        if not found:
            raise IndexError(f"index out of range: the table has {rows} rows, got {index.min()}..{index.max()}")
        return y, mask, copies

    def add_rows(
        self, gradient: Tensor, index: Tensor, mask: Tensor | None, shape: tuple[int, ...], parts: int,
        padding_idx: int | None,
    ) -> Tensor:  # fmt: skip
        """Returns the dense gradient of a table by that of the rows that were read, whose sums are in order of reading.

        Args:
            gradient: contiguous, as many elements as `index` reads.
            index: of the rows.
            mask: of `look_up`; what was clipped has no gradient.
            shape: of the table, `[rows, ...]`.
            parts: of a row, as in `look_up`.
            padding_idx: the row that has none.
        """
        sums = torch.zeros(shape, dtype=gradient.dtype, device=_CPU)
        self._library.lq_add_rows(
            _TYPE_OF[gradient.dtype],
            gradient.data_ptr(), index.data_ptr(), address(mask), sums.data_ptr(),
            index.numel(), parts, sums.numel() // (shape[0] * parts), -1 if padding_idx is None else padding_idx,
            self._number, torch.get_num_threads(),
        )  # fmt: skip
        return sums

    def learned_gradients(
        self, gradient: Tensor, index: Tensor, taken: Taken, constants: tuple[int, int, float, bool],
        shapes: tuple[torch.Size, torch.Size], parts: int, sparse: tuple[bool, bool], needs: tuple[bool, bool, bool],
        padding_idx: int | None,
    ) -> list[Tensor | None]:  # fmt: skip
        """Returns the gradients of a table, its scales and its zero points (LSQ): dense, or of each row that was read.

        Args:
            gradient: of the rows, contiguous.
            index: of the rows.
            taken: of `look_up`.
            constants: quant_min, quant_max, gradient_factor, and whether the band is the rounded one.
            shapes: of the table and of the scales.
            parts: of a row, as in `look_up`.
            sparse: whether that of the table, and those of the ranges, are to be of each row that was read.
            needs: which of the three; the others are None, but for that of the scales.
            padding_idx: the row that has none.
        """
        (table, ranges), count = shapes, index.numel()
        one = ranges.numel() == 1
        result: list[Tensor | None] = [None, None, None]
        if needs[0]:
            dtype = gradient.dtype
            result[0] = (
                torch.empty(count, table[1], dtype=dtype, device=_CPU)
                if sparse[0]
                else torch.zeros(table, dtype=dtype, device=_CPU)
            )
        for part in (1, 2) if needs[2] else (1,):
            if one or sparse[1]:  # all are written
                shape = ranges if one else (count, *ranges[1:])
                result[part] = torch.empty(shape, dtype=torch.float32, device=_CPU)
            else:
                result[part] = torch.zeros(ranges, dtype=torch.float32, device=_CPU)
        quant_min, quant_max, factor, rounded = constants
        self._library.lq_learned_rows(_LEARNED.pack(
            _TYPE_OF[gradient.dtype],
            gradient.data_ptr(), taken.rows.data_ptr(), index.data_ptr(), taken.scale.data_ptr(),
            0 if taken.zero_point is None else taken.zero_point.data_ptr(),
            *(0 if part is None else part.data_ptr() for part in result),
            factor, count, parts, table[1] // parts, -1 if padding_idx is None else padding_idx, quant_min, quant_max,
            rounded, one, not sparse[0], not sparse[1], self._number, torch.get_num_threads(),
        ))  # fmt: skip
        return result

    def knows_rows(self, table: Tensor, index: Tensor, low: Tensor, high: Tensor, most: int) -> bool:
        """Returns whether these are the extremes of some rows; False where one has a NaN, or is outside the table.

        Args:
            table: `[rows, length]`.
            index: of rows of the table, of any shape.
            low, high: float32 `[rows]`.
            most: so many of the first of them are looked at.
        """
        rows, length = table.shape
        return bool(self._library.lq_rows_known(
            _TYPE_OF[table.dtype],
            table.data_ptr(), index.data_ptr(), rows, min(index.numel(), most), length, low.data_ptr(), high.data_ptr(),
            self._number,
        ))  # fmt: skip

    def follow_rows(self, table: Tensor, index: Tensor, low: Tensor, high: Tensor, bounds: Tensor) -> bool:
        """Looks at some rows again, and at all where one of them has let go of an extreme.

        Args:
            table: `[rows, length]`.
            index: of rows of the table, of any shape.
            low, high: float32 `[rows]`, extremes of each row, changed in place.
            bounds: float32 `[2]`, extremes of all, changed in place.

        Returns:
            Whether `bounds` has changed.

        Raises:
            IndexError: a row is none of the table's.
        """
        rows, length = table.shape
        changed = self._library.lq_follow_rows(
            _TYPE_OF[table.dtype],
            table.data_ptr(), index.data_ptr(), rows, index.numel(), length, low.data_ptr(), high.data_ptr(),
            bounds.data_ptr(), self._number,
        )  # fmt: skip
        if changed < 0:
            raise IndexError(f"rows of the table are 0 to {rows - 1}, got {index.min()} to {index.max()}")
        return bool(changed)


def lookup_kernels(table: Tensor, index: Tensor) -> LookupKernels | None:
    """Returns the kernels where they may stand in for torch operations that read a table; None elsewhere.

    Args:
        table: `[rows, length]`.
        index: of rows of the table, of any shape.
    """
    if torch.compiler.is_compiling() or type(index) is not Tensor or index.dtype is not torch.int64:
        return None
    if not (index.is_cpu and table.is_cpu and index.is_contiguous() and index.numel()):
        return None
    # `accepts` of a table whose rows are one after another, in fewer questions.
    if is_watched(table) or table.dtype not in _TYPE_OF or table.layout is not torch.strided:
        return None
    if table.is_neg() or not (table.is_contiguous() and table.numel()):
        return None
    return None if active() is None else _compiled()


_compiled = functools.cache(LookupKernels)
