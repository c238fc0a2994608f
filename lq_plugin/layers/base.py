"""What all quantized layers share: three slots for quantizers, and a way back."""

from __future__ import annotations

from typing import Any, ClassVar, cast

from torch import Tensor, nn

from lq_plugin.plan import SLOTS, LayerPlan
from lq_plugin.quantizers import InputQuantizer, WeightQuantizer, make_input_quantizer, make_weight_quantizer


class QuantizedLayer(nn.Module):
    """Mixin before a float layer class: `class QuantizedLinear(QuantizedLayer, nn.Linear)`.

    A layer says which axis of its input and output carries the channels, and how its weight is brought
    into the order `[C_out, C_in / groups, *kernel]` and back, as views, so that gradients flow.
    """

    slots: ClassVar[tuple[str, ...]] = SLOTS
    float_class: ClassVar[type[nn.Module]]
    input_axis: ClassVar[int] = -1

    weight: Tensor
    weight_quantizer: WeightQuantizer | None
    input_quantizer: InputQuantizer | None
    output_quantizer: InputQuantizer | None

    def canonical(self, weight: Tensor) -> Tensor:
        """The weight as `[C_out, C_in / groups, *kernel]`, a view."""
        return weight

    def from_canonical(self, weight: Tensor) -> Tensor:
        """Inverse of `canonical`."""
        return weight

    def channels(self) -> tuple[int, int]:
        """Channels of the input and of the output."""
        raise NotImplementedError

    def quantized_weight(self) -> Tensor:
        """The weight as the forward pass uses it."""
        if self.weight_quantizer is None:
            return self.weight
        return self.from_canonical(self.weight_quantizer(self.canonical(self.weight)))

    def quantized_input(self, x: Tensor) -> Tensor:
        """The input as the forward pass uses it."""
        return x if self.input_quantizer is None else self.input_quantizer(x)

    def quantized_output(self, y: Tensor) -> Tensor:
        """The output as the next layer sees it."""
        return y if self.output_quantizer is None else self.output_quantizer(y)

    def calibrate_weight(self) -> None:
        """Find the weight's range from the weight."""
        if self.weight_quantizer is not None:
            self.weight_quantizer.calibrate(self.canonical(self.weight))

    @property
    def layer_plan(self) -> LayerPlan:
        """The specs in force."""
        chosen = {slot: getattr(self, f"{slot}_quantizer") for slot in SLOTS}
        return LayerPlan(**{slot: quantizer.spec for slot, quantizer in chosen.items() if quantizer is not None})


class ShadowedForward(nn.Module):
    """Runs the float class's own forward while `self.weight` is the quantized weight.

    For layers whose forward does more than the plain operation. The quantized weight stands in the
    instance's `__dict__`, which Python looks at before `nn.Module.__getattr__`, and is gone afterwards.
    """

    float_class: ClassVar[type[nn.Module]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        layer: Any = self
        if layer.input_quantizer is not None:
            if not args:
                raise TypeError(f"{layer.input_quantizer.name}: call the layer with its input as first positional argument")
            args = (layer.quantized_input(args[0]), *args[1:])
        self.__dict__["weight"] = layer.quantized_weight()
        try:
            y = self.float_class.forward(self, *args, **kwargs)
        finally:
            del self.__dict__["weight"]
        return layer.quantized_output(y)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class was made at run time, so pickle cannot find it by name: it is made again from the float class.
        return _rebuild_shadowed, (self.float_class,), self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__


def _rebuild_shadowed(float_class: type[nn.Module]) -> nn.Module:
    from lq_plugin.layers.registry import quantized_class

    plain = float_class.__new__(float_class)
    swapped = quantized_class(plain)
    assert swapped is not None
    plain.__class__ = swapped
    return plain


def attach_quantizers(layer: QuantizedLayer, plan: LayerPlan, name: str) -> None:
    """Give a layer (whose class is swapped already) the quantizers its plan asks for."""
    layer.weight_quantizer = layer.input_quantizer = layer.output_quantizer = None
    c_in, c_out = layer.channels()
    if plan.weight is not None:
        layer.weight_quantizer = make_weight_quantizer(plan.weight, f"{name}.weight", tuple(layer.canonical(layer.weight).shape))
    if plan.input is not None:
        layer.input_quantizer = make_input_quantizer(plan.input, f"{name}.input", c_in, layer.input_axis)
    if plan.output is not None:
        layer.output_quantizer = make_input_quantizer(plan.output, f"{name}.output", c_out, layer.input_axis)
    for quantizer in (layer.weight_quantizer, layer.input_quantizer, layer.output_quantizer):
        if quantizer is None:
            continue
        quantizer.to(layer.weight.device)
        quantizer.train(layer.training)
        if not layer.weight.requires_grad:
            # A frozen layer gets no trainable scales.
            quantizer.requires_grad_(False)


def detach_quantizers(layer: QuantizedLayer) -> None:
    """Take the quantizers away and give the float class back."""
    for slot in SLOTS:
        delattr(layer, f"{slot}_quantizer")
    cast(nn.Module, layer).__class__ = layer.float_class
