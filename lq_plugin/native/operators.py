"""The kernels as operators of torch (`torch.ops.lq_plugin.*`), with fake kernels for graphs of torch.compile.

They are registered when this module is imported, which the first graph does; a program of torch.export that was saved
with them wants it imported before it is loaded.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor

from lq_plugin.native.kernels import Kernels
from lq_plugin.native.layouts import Layout, is_dense, laid_out, layout_of
from lq_plugin.native.switch import FakeQuantizeKernels, active


def _kernels() -> FakeQuantizeKernels:
    found = active()
    # The graph was traced with kernels; it runs with them, whatever the switch says now: the numbers are the same.
    return Kernels() if found is None else found


# The compiler may choose how tensors lie in memory (channels last, for convolutions): kept to the layout of the trace,
# it would copy each operand there and back. Older versions of torch take no tags, and do that.
_takes_tags = "tags" in inspect.signature(torch.library.custom_op).parameters
_tags = {"tags": (torch.Tag.flexible_layout,)} if _takes_tags else {}
_operator = functools.partial(torch.library.custom_op, mutates_args=(), **_tags)


@_operator("lq_plugin::fake_quantize")
def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    learned: bool,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Returns `Kernels.fake_quantize` of `x` with one scale.

    Args:
        x: dense, in any layout.
        scale, zero_point: float32 `[1]`.
        quant_min, quant_max: outermost levels.
        learned: the scale is a parameter, and no mask is kept.
        dtype: of the result; None: that of `x`.
    """
    x = _dense(x)
    layout = layout_of(x, scale.shape)
    assert layout is not None
    return _kernels().fake_quantize(
        x, scale, zero_point, (quant_min, quant_max), layout, masked=False, learned=learned, dtype=dtype
    )[0]


@fake_quantize.register_fake
def _(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: Any, quant_max: Any, learned: Any, dtype: Any = None
) -> Any:
    return torch.empty_like(x, dtype=dtype)


@_operator("lq_plugin::fake_quantize_observed")
def fake_quantize_observed(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns `fake_quantize` of `x` without a mask, and its smallest and its largest value, float32 `[1]` each.

    Args:
        x: dense, in any layout.
        scale, zero_point: float32 `[1]`.
        quant_min, quant_max: outermost levels.
        dtype: of the result; None: that of `x`.
    """
    x, bounds = _dense(x), (quant_min, quant_max)
    low, high = scale.new_full((1,), torch.inf), scale.new_full((1,), -torch.inf)
    y, _ = _kernels().fake_quantize_observed(x, scale, zero_point, bounds, low, high, masked=False, dtype=dtype)
    return y, low, high


@fake_quantize_observed.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: Any, quant_max: Any, dtype: Any = None) -> Any:
    return torch.empty_like(x, dtype=dtype), scale.new_empty(1), scale.new_empty(1)


@_operator("lq_plugin::passed_gradient")
def passed_gradient(
    gradient: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int
) -> Tensor:
    """Returns the gradient where x was not clipped, with one scale, else 0.

    Args:
        gradient: of the result.
        x: that was quantized.
        scale, zero_point: float32 `[1]`.
        quant_min, quant_max: outermost levels.
    """
    x, bounds, kernels = _dense(x), (quant_min, quant_max), _kernels()
    assert isinstance(kernels, Kernels)
    return kernels.passed_gradient(x, laid_out(gradient, x.stride()), scale, zero_point, bounds)


@passed_gradient.register_fake
def _(gradient: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: Any, quant_max: Any) -> Any:
    return torch.empty_like(x)


@_operator("lq_plugin::learned_backward")
def learned_backward(
    x: Tensor, gradient: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, rounded: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns `Kernels.learned_backward` with one scale.

    Args:
        x: that was quantized.
        gradient: of the result.
        scale, zero_point: float32 `[1]`.
        quant_min, quant_max: outermost levels.
        rounded: see `Kernels.learned_backward`.
    """
    x = _dense(x)
    layout = Layout(1, 1, x.numel(), 1)
    gradient = laid_out(gradient, x.stride())
    bounds = quant_min, quant_max
    inside, slope, shift = _kernels().learned_backward(
        x, gradient, scale, zero_point, bounds, rounded, layout, True, True
    )
    assert inside is not None
    assert shift is not None
    return inside, slope, shift


@learned_backward.register_fake
def _(
    x: Tensor, gradient: Tensor, scale: Tensor, zero_point: Tensor, quant_min: Any, quant_max: Any, rounded: Any
) -> Any:
    return torch.empty_like(x), x.new_empty(1, dtype=torch.float64), x.new_empty(1, dtype=torch.float64)


def _dense(x: Tensor) -> Tensor:
    return x if is_dense(x) else torch.empty_like(x).copy_(x)
