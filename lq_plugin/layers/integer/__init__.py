"""Integer forward pass of quantized layers in training.

Products of 8-bit integers stand in for float ones: by oneDNN on CPUs, by int8 tensor cores through Triton on NVIDIA
GPUs (compute capability 8.0 and later).

Tensors may be float32, float16 or bfloat16, under autocast or not; all arithmetic but the sums is float32, and the
output is rounded once, to autocast's dtype under autocast. The backward pass is in the output's dtype. On GPUs a NaN in
the input makes all of the layer's output NaN, one in a row of the weight that row's channel: to look for it would wait
for the device.

Without a Trainer, on a prepared and calibrated model:

    enable_integer_forward(model)      # the next training step of each layer is a trial
    ...                                # one step
    settle_integer_forward(model)      # from now on each layer takes the faster way

or at once, without measuring, `enable_integer_forward(model, choices=True)`. `lq_plugin.remove` also takes it away.
"""

from typing import TYPE_CHECKING

from lq_plugin.utilities.lazy import attributes

if TYPE_CHECKING:
    from lq_plugin.layers.integer.forward import integer_forward as integer_forward
    from lq_plugin.layers.integer.state import IntegerForward as IntegerForward
    from lq_plugin.layers.integer.switch import (
        disable_integer_forward as disable_integer_forward,
        enable_integer_forward as enable_integer_forward,
        integer_choices as integer_choices,
        integer_report as integer_report,
        settle_integer_forward as settle_integer_forward,
    )

__getattr__, __dir__, __all__ = attributes(__name__, __file__)
