"""Integer arithmetic of each type of device."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from lq_plugin.intent.spec import IntegerGrid
from lq_plugin.layers.integer.function import Levels, Operands, onednn_product
from lq_plugin.layers.integer.kernels import LARGEST_EXACT, IntegerKernels, integer_kernels, sums_exactly
from lq_plugin.layers.product import Convolution
from lq_plugin.native.layouts import DTYPES

if TYPE_CHECKING:
    from lq_plugin.layers.integer.triton_arithmetic import TritonArithmetic

#: Arithmetic on some device. That of GPUs has the methods of `OneDnnArithmetic`, with the same arguments.
Arithmetic: TypeAlias = "OneDnnArithmetic | TritonArithmetic"
#: Of a GPU with the tensor cores that Triton's int8 products are made for (Ampere).
CAPABILITY = (8, 0)


class OneDnnArithmetic:
    """Operands, their product, and its backward pass, on CPUs.

    Callers ask `refusal` first, and `kernels_for` x and weight.
    """

    #: Whether it takes convolutions of several groups.
    grouped = True

    def __init__(self, kernels: IntegerKernels) -> None:
        self._kernels = kernels

    def why_inexact(self, weight: IntegerGrid, inputs: IntegerGrid) -> str | None:
        """Returns why sums of products of these levels may be inexact; None: they are exact within 32 bits."""
        largest = max(-weight.quant_min, weight.quant_max)
        if (inputs.levels - 1) * largest <= 255 * LARGEST_EXACT or sums_exactly(127):
            return None
        return (
            "its products can saturate, for the processor has no VNNI instructions: weights of 7 bits are exact there"
        )

    def refusal(self, x: Tensor, weight: Tensor, bias: Tensor | None, convolution: Convolution | None) -> str | None:
        """Returns why these tensors cannot be computed here; None: they can.

        Args:
            x, weight, bias: the layer's input and parameters.
            convolution: its options; None: a product of matrices.
        """
        dtypes = {value.dtype for value in (x, weight, *(() if bias is None else (bias,)))}
        if not dtypes <= set(DTYPES) or (len(dtypes) > 1 and not torch.is_autocast_enabled("cpu")):
            return f"it is in {', '.join(sorted(map(str, dtypes)))}"
        return None if weight.is_contiguous() else "its weight is not contiguous"

    def levels(
        self,
        x: Tensor,
        qparams: tuple[Tensor, Tensor, IntegerGrid],
        masked: bool,
        extremes: tuple[Tensor, Tensor] | None,
    ) -> Levels | None:
        """The input as integers.

        Args:
            x: dense.
            qparams: scale and zero point, float32 `[1]`, and grid.
            masked: whether a gradient is wanted.
            extremes: float32 `[1]` each, which take in the smallest and the largest element, in place.

        Returns:
            None where it holds a NaN. On a GPU, where to know it would wait, the product is NaN.
        """
        scale, zero_point, grid = qparams[0].item(), qparams[1].item(), qparams[2]
        found = self._kernels.quantize(x.detach(), scale, zero_point, grid, masked, extremes)
        return None if found is None else Levels(*found, scale, int(zero_point) - grid.quant_min)

    def operands(
        self, levels: Levels, weight: Tensor, qparams: tuple[Tensor, IntegerGrid, bool, bool]
    ) -> Operands | None:
        """Returns the operands of a product: these levels and the weight's.

        Args:
            levels: of the input.
            weight: dense.
            qparams: scale, float32 `[C_out]` or `[1]`, and grid, whether the scale is to be found from its extremes
                instead, and whether elements can lie outside of the grid.

        Returns:
            None where it holds a NaN, as of the input.
        """
        scale, grid, live, clips = qparams
        scale = torch.empty_like(scale) if live else scale.clone()
        q = self._kernels.quantize_weight(weight.detach(), scale, grid, live)
        return None if q is None else Operands(levels, q, scale, grid if clips else None)

    def product(
        self, operands: Operands, bias: Tensor | None, convolution: Convolution | None, dtype: torch.dtype
    ) -> Tensor:
        """The layer's output; images are channels-last.

        Args:
            operands: integers of input and weight, with their scales.
            bias: `[C_out]`, or None.
            convolution: its options; None: a product of matrices.
            dtype: of the output.
        """
        return onednn_product(operands, bias, convolution, dtype)

    def dequantize(self, q: Tensor, scale: float | Tensor, zero_point: float | Tensor, dtype: torch.dtype) -> Tensor:
        """(q - zero_point) · scale, laid out as `q`.

        Args:
            q: int8.
            scale, zero_point: of the tensor.
            dtype: of the result.
        """
        assert not isinstance(scale, Tensor)
        assert not isinstance(zero_point, Tensor)
        return self._kernels.dequantize(q, scale, zero_point, dtype)

    def keep(self, gradient: Tensor, mask: Tensor) -> None:
        """Puts 0 where the bit is 0, in place; `gradient` lies in memory as what was quantized."""
        self._kernels.keep(gradient, mask)


@functools.cache
def arithmetic_on(device: torch.device) -> Arithmetic | str:
    """Returns the arithmetic of a device, or why there is none: tried once in a process."""
    if device.type == "cpu":
        kernels = integer_kernels()
        return kernels if isinstance(kernels, str) else OneDnnArithmetic(kernels)
    if device.type != "cuda":
        return f"it is on {device.type}"
    if torch.version.hip is not None:
        return "its kernels for GPUs are made for those of NVIDIA"
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        return f"its GPU has compute capability {_dotted(capability)}, and 8-bit products ask for {_dotted(CAPABILITY)}"
    try:
        # It takes a second to import, and only GPUs want it.
        from lq_plugin.layers.integer.triton_arithmetic import TritonArithmetic
    except ImportError as error:
        return f"integer products on a GPU need the package triton (pip install triton): {error}"
    return TritonArithmetic()


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
