"""Layers of binary weights and inputs for inference: 1 bit a weight, XNOR and popcount instead of products.

    linear   y = (sign(x) · sign(W)ᵀ) · α · K + b
    conv     the same on windows: the bits of each pixel's channels are gathered, window by window

α is the weight's scale (BWN; 1 for `sign`), K the mean magnitude that XNOR-Net multiplies to the output (1 for `sign`
inputs). The product of the signs is an exact integer; a quantized layer sums float32 numbers ±α instead, so the two are
bit-equal where α is 1 and there is no bias, and equal to float32 rounding elsewhere.

Padding of a convolution is 0, which is no sign: it counts as -1, and that contribution is subtracted again.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lq_plugin.errors import ExportError, raise_all
from lq_plugin.export.codes import encode
from lq_plugin.export.faults import layers_with_kernel
from lq_plugin.export.xnor.kernel import Kernel, interleave, kernel, pack_signs, unpack_signs
from lq_plugin.intent.formats import SLOTS
from lq_plugin.intent.spec import PerGroup, QuantSpec
from lq_plugin.layers import QuantizedLayer, current_weight_quantizer
from lq_plugin.layers.registry import canonical_of, known_operation, operation_of

_CONVOLVE: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def use_xnor(model: nn.Module, native: bool | None = None) -> list[str]:
    """Replaces, in place, every layer of binary weights and binary inputs.

    Args:
        model: prepared, on the CPU. Afterwards it is for inference only.
        native: True: the compiled kernel; False: torch alone, slower and with exactly the same results; None: the
            kernel where it can be compiled, else torch, with a warning.

    Returns:
        Names of the replaced layers.

    Raises:
        ExportError: no layer can be replaced, with the reason for each; or `native=True` without a compiler.

    >>> import lq_plugin
    >>> net = nn.Sequential(nn.Linear(70, 8, bias=False), nn.Linear(8, 3))
    >>> _ = lq_plugin.prepare(net, lq_plugin.QuantPlan([lq_plugin.Rule("0", weight="sign", input="sign")]))
    >>> x = torch.randn(2, 70)
    >>> y = net.eval()(x)
    >>> use_xnor(net, native=False), torch.equal(net(x), y)
    (['0'], True)
    """
    counter = _counter(native)
    reasons, faults = layers_with_kernel(model, why_not)
    raise_all(ExportError, f"no layer of {type(model).__name__} is binary × binary", faults)
    replaced = [name for name, reason in reasons.items() if reason is None]
    for name in replaced:
        if not name:
            raise ExportError("the model is a single layer and cannot replace itself: use xnor_layer(model)")
        layer = cast(QuantizedLayer, model.get_submodule(name))
        model.set_submodule(name, _made(layer, counter))
    return replaced


def xnor_layer(layer: QuantizedLayer, native: bool | None = None) -> XNORLinear | XNORConv:
    """Returns the inference layer of one quantized layer; see `use_xnor`.

    Raises:
        ExportError: when it has none.
    """
    reason = why_not(layer)
    if reason is not None:
        raise ExportError(f"{type(layer).__name__}: {reason}")
    return _made(layer, _counter(native))


def why_not(layer: QuantizedLayer) -> str | None:
    """Returns the reason why a layer cannot count bits, or None."""
    specs = {}
    for slot in SLOTS:
        quantizer = getattr(layer, f"{slot}_quantizer")
        current = None if quantizer is None else quantizer.current
        if current is not None:
            specs[slot] = current.spec
    reasons = list(filter(None, (spec_fault(slot, spec, layer) for slot, spec in specs.items())))
    reasons += [f"its {slot} is float" for slot in ("weight", "input") if slot not in specs]
    if not reasons and layer.weight.is_cuda:
        return "it is on a GPU"
    return reasons[0] if reasons else None


def spec_fault(slot: str, spec: QuantSpec, layer: Any) -> str | None:
    """Returns why bits of a tensor under a spec cannot be counted; see `Target.spec_fault`.

    Args:
        slot: `"weight"`, `"input"` or `"output"`.
        spec: of the tensor.
        layer: float or quantized.
    """
    operation = known_operation(layer)
    if operation not in ("product", "convolution"):
        return f"{type(layer).__name__} has no kernel, linear layers and convolutions do"
    if slot == "output":
        return "its output is quantized"
    if not spec.kind.signs:
        return f"its {slot} is '{spec}', not one bit"
    if "float_eval" in spec.format_options:
        return "it is evaluated with float numbers"
    if spec.threshold:
        return "its signs have a threshold other than 0"
    if isinstance(spec.granularity, PerGroup):
        return f"its weight is '{spec}': bits are counted over whole rows"
    if operation == "convolution" and (layer.groups != 1 or layer.padding_mode != "zeros"):
        return f"groups={layer.groups}, padding_mode={layer.padding_mode!r}: only 1 and 'zeros'"
    return None


def _counter(native: bool | None) -> Kernel | None:
    if native is False:
        return None
    try:
        return kernel()
    except ExportError as error:
        if native:
            raise
        warnings.warn(f"{error}; binary layers are computed by torch, slower", RuntimeWarning, stacklevel=3)
        return None


def _made(layer: QuantizedLayer, counter: Kernel | None) -> XNORLinear | XNORConv:
    made = XNORLinear(layer, counter) if operation_of(layer) == "product" else XNORConv(layer, counter)
    return made.train(layer.training)


class _XNORLayer(nn.Module):
    """Base of both layers: bits of the weight `[C_out, words]`, scale α and bias `[C_out]`.

    Args:
        layer: quantized.
        counter: the compiled kernel; None: torch.
    """

    changed_by = "use_xnor"
    words: Tensor
    scale: Tensor | None
    bias: Tensor | None

    def __init__(self, layer: QuantizedLayer, counter: Kernel | None) -> None:
        super().__init__()
        self.counter = counter
        parts = encode(current_weight_quantizer(layer), canonical_of(layer, layer.weight))
        signs = parts["codes"].values * 2.0 - 1.0
        self.shape = tuple(signs.shape)
        self.scales_output = cast(Any, layer.input_quantizer).current.spec.kind.scales_output
        words = pack_signs(signs.movedim(1, -1)).flatten(1)
        self.register_buffer("words", words if counter is None else interleave(words))
        scale = parts["scale"].values.reshape(-1).expand(self.shape[0]).contiguous() if "scale" in parts else None
        self.register_buffer("scale", scale)
        bias = cast("Tensor | None", layer.bias)
        self.register_buffer("bias", None if bias is None else bias.detach().float().clone())

    @property
    def elements(self) -> int:
        """Number of -1s and +1s that an output is the sum of."""
        return math.prod(self.shape[1:])

    def signs(self) -> Tensor:
        """Returns sign(W) `[C_out, C_in, *kernel]`, unpacked."""
        words = self.words if self.counter is None else self.words.transpose(1, 2).flatten(0, 1)[: self.shape[0]]
        c_out, c_in, *size = self.shape
        return unpack_signs(words.reshape(c_out, *size, -1), c_in).movedim(-1, 1).contiguous()

    def scaled(self, y: Tensor, factor: Tensor | None, channels_last: bool) -> Tensor:
        """Returns y · α · K + b, rounded after each.

        Args:
            y: sums of signs.
            factor: K, broadcastable to `y`; None: 1.
            channels_last: channels are the last dim, else dim 1.
        """
        shape = (-1,) if channels_last else (-1, *[1] * (y.ndim - 2))
        if self.scale is not None:
            y = y * self.scale.view(shape)
        if factor is not None:
            y = y * factor
        return y if self.bias is None else y + self.bias.view(shape)


class XNORLinear(_XNORLayer):
    """Binary linear layer: input `[..., C_in]`, output `[..., C_out]`."""

    def forward(self, x: Tensor) -> Tensor:
        # A row takes tens of microseconds, a sixth of which were Module.__getattr__ and conversions without effect.
        buffers: dict[str, Any] = self._buffers
        floats = x if x.dtype == torch.float32 else x.float()
        factor = x.abs().mean(-1, keepdim=True) if self.scales_output else None
        if self.counter is None:
            y = self.scaled(F.linear(_signs_of(x), self.signs()), factor, True)
        elif factor is None:
            y = self.counter.linear(floats, buffers["words"], self.shape[0], buffers["scale"], buffers["bias"])
        else:
            y = self.scaled(self.counter.linear(floats, buffers["words"], self.shape[0]), factor, True)
        return y if y.dtype == x.dtype else y.to(x.dtype)


class XNORConv(_XNORLayer):
    """Binary convolution: input `[N, C_in, *spatial]`, output `[N, C_out, *spatial]`."""

    def __init__(self, layer: QuantizedLayer, counter: Kernel | None) -> None:
        super().__init__(layer, counter)
        conv = cast(Any, layer)
        self.stride, self.dilation, self.padding = conv.stride, conv.dilation, conv.padding
        #: Before and after each dim, the last dim first, as `F.pad` takes it.
        self.margins: list[int] = list(conv._reversed_padding_repeated_twice)
        self._padded: tuple[tuple[int, ...], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == len(self.shape) - 1:
            return cast(Tensor, self(x.unsqueeze(0))).squeeze(0)
        convolve = _CONVOLVE[x.ndim - 2]
        factor = None
        if self.scales_output:
            size = self.shape[2:]
            box = torch.full((1, 1, *size), 1.0 / math.prod(size), dtype=x.dtype)
            factor = convolve(x.abs().mean(1, keepdim=True), box, None, self.stride, self.padding, self.dilation)
        if self.counter is None:
            y = convolve(_signs_of(x), self.signs(), None, self.stride, self.padding, self.dilation)
        else:
            y = self._counted(x, self.counter)
        return self.scaled(y, factor, False).to(x.dtype)

    def _counted(self, x: Tensor, counter: Kernel) -> Tensor:
        bits = counter.pack(x.float().movedim(1, -1))
        if any(self.margins):
            bits = F.pad(bits, [0, 0, *self.margins])
        windows, out = self._windows(bits)
        y = counter.matmul(windows, self.words, self.shape[0], self.elements)
        y = y.view(len(x), *out, -1).movedim(-1, 1).contiguous()
        return y.add_(self._padding_share(tuple(x.shape[2:]))) if any(self.margins) else y

    def _windows(self, bits: Tensor) -> tuple[Tensor, list[int]]:
        """Returns `[N · outputs, kernel · words]` of bits `[N, *spatial, words]`, and the output's spatial size."""
        size = self.shape[2:]
        spatial = bits.shape[1:-1]
        out = [
            (n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(spatial, size, self.stride, self.dilation, strict=True)
        ]
        strides = bits.stride()
        steps = [strides[i + 1] * s for i, s in enumerate(self.stride)]
        taps = [strides[i + 1] * d for i, d in enumerate(self.dilation)]
        view = bits.as_strided((len(bits), *out, *size, bits.shape[-1]), (strides[0], *steps, *taps, strides[-1]))
        return view.reshape(len(bits) * math.prod(out), -1), out

    def _padding_share(self, spatial: tuple[int, ...]) -> Tensor:
        """Returns the correction `[1, C_out, *out]` for padding that counts as -1: signs of the weights on it."""
        if self._padded is None or self._padded[0] != spatial:
            outside = F.pad(torch.zeros(1, self.shape[1], *spatial), self.margins, value=1.0)
            share = _CONVOLVE[len(spatial)](outside, self.signs(), None, self.stride, 0, self.dilation)
            self._padded = (spatial, share)
        return self._padded[1]


def _signs_of(x: Tensor) -> Tensor:
    return torch.where(x >= 0, 1.0, -1.0)
