"""Base of the classes of compiled kernels: signatures of C functions, and the choice of a variant (`variants.h`)."""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from lq_plugin.native.build import FOLDER, NativeError, library

#: Variants of the kernels, by the number that the C++ side gives them.
VARIANTS = ("portable", "avx2", "avx512")
#: Types of the C functions' arguments.
POINTER, SIZE, NUMBER, REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float


class CompiledKernels:
    """A compiled library, of which one variant is used. The numbers are the same in each.

    Args:
        variant: one of `VARIANTS`; None: the fastest that the processor runs.

    Raises:
        NativeError: it cannot be compiled, or the processor does not run the variant.
    """

    #: The source, without its suffix, and the folder that it is in.
    source: ClassVar[str]
    folder: ClassVar[Path] = FOLDER
    #: Types of each function's arguments, by its name.
    functions: ClassVar[Mapping[str, Sequence[Any]]]
    #: Functions that return an integer; the others return nothing.
    returning: ClassVar[Collection[str]] = ()

    def __init__(self, variant: str | None = None) -> None:
        compiled = library(self.source, self.folder)
        for name, arguments in self.functions.items():
            function = getattr(compiled, name)
            function.argtypes, function.restype = arguments, NUMBER if name in self.returning else None
        self.variants = VARIANTS[: compiled.lq_best_variant() + 1]
        self.variant = self.variants[-1] if variant is None else variant
        if self.variant not in self.variants:
            raise NativeError(f"variant {variant!r}: this processor runs {', '.join(self.variants)}")
        self._library, self._number = compiled, VARIANTS.index(self.variant)


def address(x: Tensor | None) -> int | None:
    """Returns the address of a tensor's first element; None of None, C's null pointer."""
    return None if x is None else x.data_ptr()
