"""Conditions under which kernels may stand for torch operations, and what their callers need of gradients and masks."""

from __future__ import annotations

import torch
from torch import Tensor

from lq_plugin.native.kernels import TYPES, FakeQuantizeKernels
from lq_plugin.native.layouts import Layout, accepts, laid_out as laid_out
from lq_plugin.native.switch import active


def kernels_for(x: Tensor, dtype: torch.dtype | None = None) -> FakeQuantizeKernels | None:
    """Returns the kernels that may replace torch operations on `x`; None if they may not.

    They may not where operations on it are watched, on an empty tensor, where `accepts` says no, and where they do not
    write results of this dtype (None: that of `x`).
    """
    if dtype is not None and (x.dtype, dtype) not in TYPES:
        return None
    if is_watched(x) or not x.numel() or (found := active(x.device.type)) is None:
        return None
    return found if accepts(x) else None


def is_watched(x: Tensor) -> bool:
    """Returns whether something watches or rewrites operations on `x`: a subclass, tracing, a dispatch mode."""
    if type(x) not in (Tensor, torch.nn.Parameter):
        return True
    return bool(torch._C._len_torch_dispatch_stack() or torch._C._is_tracing())


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _compiled_here() -> bool:
    if active() is None:
        return False
    # Graphs alone want the operators; to register them takes longer than to import any other module of this package.
    from lq_plugin.native import operators  # noqa: F401

    return True


def traceable(x: Tensor, scale: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Returns True if, under torch.compile, the operators may give `x` quantized in a dtype (None: its own).

    Args:
        x: that is quantized.
        scale: of the quantization.
        dtype: of the result; None: that of `x`.
    """
    if (x.dtype, dtype or x.dtype) not in TYPES or x.device.type != "cpu" or scale.numel() != 1 or not x.numel():
        return False
    return (
        x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))
    ) and _compiled_here()


def unpacked(mask: Tensor, layout: Layout, shape: torch.Size, strides: tuple[int, ...]) -> Tensor:
    """Returns a mask as booleans, by torch operations.

    Args:
        mask: from the kernels.
        layout: of the mask.
        shape, strides: of the masked tensor.
    """
    rows, length = layout.rows
    bits = (mask.view(rows, -1, 1) >> torch.arange(16, dtype=torch.int16, device=mask.device)) & 1
    flat = bits.reshape(rows, -1)[:, :length].reshape(-1).bool()
    return flat.as_strided(shape, strides)
