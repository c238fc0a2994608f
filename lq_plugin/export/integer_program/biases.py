"""Scales of weights that suit the integers next to them.

Runtimes hold a bias as int32 in steps of input scale times weight scale, and multiply sums by r, which is input scale
times weight scale over output scale.

Where a channel's weights are tiny, the bias does not fit and the integers wrap around, or r is below what a kernel
takes. Such a channel gets a coarser scale. Its weights then lose less than half a step in 2³⁰ of the bias, or in 2³¹ of
the result's step, each.

Where a channel's integers are small, as those of ternary or 4-bit weights are, the steps are so wide that rounding the
bias to them moves the result by a tenth of its step and more. A stored byte has room: 2ᵏ times the integers with the
scale over 2ᵏ are the same weight, bit for bit, and the bias has steps that are 2ᵏ times finer.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule

from lq_plugin.errors import ExportError
from lq_plugin.export.integer_program.graph import WEIGHT_HIGH, place
from lq_plugin.export.integer_program.product import Product, products

#: Half of int32: sums of products are added to the bias.
_LARGEST = 2.0**30
#: XNNPACK takes factors r from 2^-32 to below 256 (`xnn_create_convolution2d_nhwc_qs8_qc8w`).
_SMALLEST_FACTOR, _LARGEST_FACTOR = 2.0**-31, 2.0**8


def settle_weight_scales(module: GraphModule) -> None:
    """Makes the scales of weights as small as the byte allows, and as large as biases and factors want, in place.

    Raises:
        ExportError: a factor is too large.
    """
    for product in products(module):
        if product.reads_tokens:
            continue
        before, after = product.input_scale, product.output_scale
        factor = float(product.scale.max()) * before / after
        if factor >= _LARGEST_FACTOR:
            raise ExportError(
                f"{place(product.node)}: one step of its sums is {factor:g} steps of its result, runtimes take less "
                f"than {_LARGEST_FACTOR:g}: its ranges do not fit together, calibrate it again"
            )
        least = (product.bias.double().abs() / _LARGEST / before).clamp(min=_SMALLEST_FACTOR * after / before)
        # In float64, and a little more: a scale that is rounded down does not fit.
        wanted = torch.maximum(_finest(product), least * (1 + 2.0**-20)).float()
        if torch.equal(wanted, product.scale):
            continue
        codes = (product.codes * product.along_channels(product.scale.double() / wanted.double())).round()
        product.replace(codes.to(product.codes.dtype), wanted, product.bias)


def _finest(product: Product) -> Tensor:
    """Returns the scales over the largest power of two by which the integers can be multiplied, float64 `[C_out]`."""
    others = [dim for dim in range(product.codes.ndim) if dim != product.axis]
    largest = product.codes.abs().amax(others).clamp(min=1)
    return product.scale.double() / torch.exp2((WEIGHT_HIGH / largest.double()).log2().floor())
