"""Conditions under which kernels may stand for torch operations, and what their callers need of gradients and masks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lq_plugin.native.kernels import TYPES
from lq_plugin.native.layouts import Layout, is_dense, laid_out as laid_out
from lq_plugin.native.switch import FakeQuantizeKernels, active

_PLAIN = (Tensor, torch.nn.Parameter)
_dispatch_modes, _is_tracing = torch._C._len_torch_dispatch_stack, torch._C._is_tracing
_transforms = torch._C._are_functorch_transforms_active


def kernels_for(
    x: Tensor, dtype: torch.dtype | None = None, qparams: tuple[Tensor, ...] = ()
) -> FakeQuantizeKernels | None:
    """Returns the kernels that may replace torch operations on `x`; None if they may not.

    They take addresses of tensors without more checks, so this makes them all. Operations on `x` must not be watched,
    `x` is neither empty nor negated lazily, and dense in memory, in any order of dims.

    Args:
        x: what is quantized.
        dtype: of the result; None: that of `x`.
        qparams: scale, zero point, ...: contiguous float32 tensors of one shape, on the device of `x`.
    """
    # As `is_watched`, without another call on the way of every weight and input.
    if type(x) not in _PLAIN or _dispatch_modes() or _is_tracing() or _transforms() or forward_ad._current_level >= 0:
        return None
    if (x.dtype, dtype or x.dtype) not in TYPES or not x.numel():
        return None
    found = active(x.device.type)
    if found is None or x.layout != torch.strided or x.is_neg() or not (x.is_contiguous() or is_dense(x)):
        return None
    for value in qparams:
        if value.dtype != torch.float32 or value.shape != qparams[0].shape:
            return None
        if value.device != x.device or not value.is_contiguous():
            return None
    return found


def is_watched(x: Tensor) -> bool:
    """Returns whether something watches or rewrites operations on `x`: a subclass, tracing, a mode, a transform."""
    return bool(type(x) not in _PLAIN or _dispatch_modes() or _is_tracing()) or is_transformed()


def is_transformed() -> bool:
    """Returns whether a transform of torch.func or a forward-mode derivative is at work."""
    return _transforms() or forward_ad._current_level >= 0


def is_batched(x: Tensor) -> bool:
    """Returns whether a transform of torch.func stands between a tensor and its values, as vmap does."""
    return torch._C._functorch.is_functorch_wrapped_tensor(x)


def takes_gradient(gradient: Tensor, x: Tensor) -> bool:
    """Returns False for a second derivative, and for a gradient that kernels cannot take by its address.

    Args:
        gradient: of the result.
        x: the operand.
    """
    watched = torch.is_grad_enabled() and (gradient.requires_grad or x.requires_grad)
    return not watched and type(gradient) is Tensor and (x.dtype, gradient.dtype) in TYPES


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
