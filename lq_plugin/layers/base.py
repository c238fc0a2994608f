"""Base of all quantized layers: three slots for quantizers, and the way back to the float class."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from lq_plugin.errors import QuantizationError
from lq_plugin.intent.formats import SLOTS
from lq_plugin.intent.plan import LayerPlan, Stage
from lq_plugin.intent.spec import QuantSpec
from lq_plugin.layers.integer.state import IntegerForward
from lq_plugin.layers.parametrized import (
    class_before,
    parametrized_class,
    parametrized_names,
    weight_of,
    weight_sources,
)
from lq_plugin.quantizers import (
    ActivationQuantizer,
    Quantizer,
    SharedInput,
    SlotQuantizer,
    StagedQuantizer,
    WeightQuantizer,
    in_stages,
    make_activation_quantizer,
    make_weight_quantizer,
)

Operation = Literal["product", "convolution", "transposed convolution"]
_SPARSE = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


class QuantizedLayer(nn.Module):
    """Mixin before a float layer class: `class QuantizedLinear(QuantizedLayer, nn.Linear)`.

    What a layer says of itself is read from its class (`type(layer).channels(layer)`), for the instance may have
    attributes of these names of its own; a class that has them is refused (`names_taken`).

    A layer says which axis of its input and output carries the channels, and how its weight is brought
    into the order `[C_out, C_in / groups, *kernel]` and back, as views, so that gradients flow. With `operation` it
    says that its float class computes one of these and adds `bias`, if that is not None, along `input_axis`:

        product                   x · Wᵀ over the last dim, W the canonical weight
        convolution               that of torch, with the attributes of torch's classes
        transposed convolution    likewise
    """

    slots: ClassVar[tuple[str, ...]] = SLOTS
    float_class: ClassVar[type[nn.Module]]
    input_axis: ClassVar[int] = -1
    #: What the float class computes, for PTQ passes and MACs; None is none of these.
    operation: ClassVar[Operation | None] = None
    #: Whether it computes the product of its operands and nothing else of them. Then, under autocast, their quantizers
    #: write them in autocast's dtype, which saves a pass over each. Of this very class, not of its subclasses.
    is_plain_product: ClassVar[bool] = False
    #: Whether `output_scale` gives XNOR-Net's K, so that the input format `xnor` can be had.
    has_output_scale: ClassVar[bool] = False
    #: Whether `lq_plugin.layers.integer` computes its forward; of this very class, not of its subclasses.
    has_integer_kernel: ClassVar[bool] = False
    #: Slots that version 0.1 left float under every plan; its state dicts have no ranges of them.
    added_slots: ClassVar[tuple[str, ...]] = ()
    _is_canonical: ClassVar[bool] = True

    weight: Tensor
    weight_quantizer: WeightQuantizer | StagedQuantizer | None
    input_quantizer: ActivationQuantizer | StagedQuantizer | None
    output_quantizer: ActivationQuantizer | StagedQuantizer | None
    #: How its training forward pass is computed where not by fake quantization, see `lq_plugin.layers.integer`.
    _integer_state: IntegerForward | None = None
    #: Quantizers, by slot, that are out because the file it was loaded from is older than they are.
    _left_out: Mapping[str, Quantizer] = MappingProxyType({})
    #: With the layers next to it that may read the same tensor, see `share_inputs`.
    _shared_input: SharedInput | None = None
    #: Whether a stage of its input has a format that scales the output.
    _scales_output: bool = False
    #: The operation that was seen to read its weight past it, see `lq_plugin.model.raw_reads`.
    read_past_by: str | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._is_canonical = cls.canonical is QuantizedLayer.canonical
        cls.is_plain_product = vars(cls).get("is_plain_product", False)

    def canonical(self, weight: Tensor) -> Tensor:
        """The weight as `[C_out, C_in / groups, *kernel]`, a view."""
        return weight

    def from_canonical(self, weight: Tensor) -> Tensor:
        """Inverse of `canonical`."""
        return weight

    def channels(self) -> tuple[int, int]:
        """Channels of the input and of the output."""
        raise NotImplementedError

    def casts_operands(self) -> bool:
        """Returns True if under autocast its input and its weight are cast before anything reads them."""
        return type(self).is_plain_product

    def quantized_weight(self, weight: Tensor | None = None) -> Tensor:
        """Returns the weight as the forward pass uses it; `weight` is the layer's own, where it is at hand already."""
        weight = self.weight if weight is None else weight
        if self.weight_quantizer is None:
            return weight
        if type(self)._is_canonical:
            y: Tensor = self.weight_quantizer(weight)
            return y
        return type(self).from_canonical(self, self.weight_quantizer(type(self).canonical(self, weight)))

    #: The name of `quantized_weight` in layer classes written for version 0.1.
    quantize_weight = quantized_weight

    def quantized_input(self, x: Tensor) -> Tensor:
        """The input as the forward pass uses it.

        Raises:
            QuantizationError: a sparse input is to be quantized.
        """
        quantizer = self.input_quantizer
        if quantizer is None or not isinstance(x, Tensor):  # of what is no tensor, the float layer says what is wrong
            return x
        if x.layout in _SPARSE:
            raise QuantizationError(
                f"{quantizer.name}: the input is sparse ({x.layout}), which no format quantizes; pass x.to_dense(), "
                "or leave the input of this layer float and quantize its weight alone"
            )
        if x.layout is torch.jagged:  # a nested tensor: its values are `[sum of lengths, ...]`
            nested: Any = x
            return torch.nested.nested_tensor_from_jagged(quantizer(x.values()), nested.offsets(), nested.lengths())
        if (
            self._shared_input is not None
            and isinstance(quantizer, ActivationQuantizer)
            and self._shared_input.takes(x)
        ):
            return quantizer.forward_shared(x, self._shared_input)
        y: Tensor = quantizer(x)
        return y

    def output_scale(self, x: Tensor) -> Tensor | None:
        """Returns XNOR-Net's K for the output of input `x`, broadcastable to it; None while another format is in force.

        Called where a stage of the input has the format `xnor`, which needs `has_output_scale`.
        """
        raise NotImplementedError

    def quantized_output(self, y: Tensor) -> Tensor:
        """The output as the next layer sees it."""
        return y if self.output_quantizer is None else self.output_quantizer(y)

    def calibrate_weight(self, missing_only: bool = False) -> None:
        """Finds the weight's range from the weight, for every stage (that has none yet)."""
        if self.weight_quantizer is not None:
            weight = type(self).canonical(self, weight_of(self))
            for stage in self.weight_quantizer.stages():
                if isinstance(stage, WeightQuantizer) and not (missing_only and stage.is_calibrated):
                    stage.calibrate(weight)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # Torch looks for the submodules afterwards.
        put_back(self, [
            slot for slot in self._left_out if any(key.startswith(f"{prefix}{slot}_quantizer.") for key in state_dict)
        ])  # fmt: skip
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def layer_plan(self) -> LayerPlan:
        """The specs it was prepared with."""
        chosen = {slot: quantizer for slot in SLOTS if (quantizer := getattr(self, f"{slot}_quantizer")) is not None}
        stages = [
            Stage(slot, start, stage.spec if isinstance(stage, Quantizer) else None)
            for slot, quantizer in chosen.items()
            if isinstance(quantizer, StagedQuantizer)
            for start, stage in zip(quantizer.starts, quantizer.stages(), strict=True)
        ]
        return LayerPlan(**{slot: quantizer.spec for slot, quantizer in chosen.items()}, stages=tuple(stages))


def scales_output(quantizer: nn.Module | None) -> bool:
    """Returns whether an input is quantized now in a format that the output makes up for (XNOR-Net)."""
    # Something else may stand in for a quantizer while roundings are learned.
    current = quantizer.current if isinstance(quantizer, SlotQuantizer) else None
    return (
        isinstance(current, ActivationQuantizer)
        and current.scales_output
        and current.is_enabled
        and current.collector is None
        and not current.is_suspended
    )


def current_weight_quantizer(layer: QuantizedLayer) -> WeightQuantizer | None:
    """Returns the quantizer of a layer's weight that is in force; None where its weight is float."""
    quantizer = layer.weight_quantizer
    return None if quantizer is None else cast("WeightQuantizer | None", quantizer.current)


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
                raise TypeError(
                    f"{layer.input_quantizer.name}: call the layer with its input as first positional argument"
                )
            args = (layer.quantized_input(args[0]), *args[1:])
        # Pruning and the old weight_norm keep the weight they computed there.
        computed = self.__dict__.get("weight")
        weight = self.__dict__["weight"] = layer.quantized_weight()
        try:
            if layer.weight is not weight:
                raise QuantizationError(
                    f"a {type(self).float_class.__name__} was parametrized after its quantizers came in: prepare it "
                    "later"
                )
            y = type(self).float_class.forward(self, *args, **kwargs)
        finally:
            if computed is None:
                del self.__dict__["weight"]
            else:
                self.__dict__["weight"] = computed
        return layer.quantized_output(y)


def attach_quantizers(layer: QuantizedLayer, plan: LayerPlan, name: str) -> None:
    """Gives a layer (whose class is swapped already) the quantizers its plan asks for.

    Args:
        layer: whose class is a quantized one.
        plan: the specs of its tensors.
        name: of the layer, for messages.
    """
    layer.weight_quantizer = layer.input_quantizer = layer.output_quantizer = None
    c_in, c_out = type(layer).channels(layer)
    weight, trained = weight_of(layer), any(source.requires_grad for source in weight_sources(layer))
    shape = tuple(type(layer).canonical(layer, weight).shape)
    makers: dict[str, Callable[[QuantSpec, str], Quantizer]] = {
        "weight": lambda spec, name: make_weight_quantizer(spec, name, shape),
        "input": lambda spec, name: make_activation_quantizer(spec, name, c_in, type(layer).input_axis),
        "output": lambda spec, name: make_activation_quantizer(spec, name, c_out, type(layer).input_axis),
    }
    for slot in SLOTS:
        if getattr(plan, slot) is not None:
            setattr(layer, f"{slot}_quantizer", in_stages(makers[slot], f"{name}.{slot}", plan.stages_of(slot)))
    if layer.input_quantizer is not None:
        layer._scales_output = any(stage.scales_output for stage in layer.input_quantizer.stages())
    for quantizer in (layer.weight_quantizer, layer.input_quantizer, layer.output_quantizer):
        if quantizer is None:
            continue
        quantizer.to(weight.device)
        quantizer.train(layer.training)
        for stage in quantizer.stages() if type(layer).casts_operands(layer) else ():
            stage.casts = quantizer is not layer.output_quantizer
        if not trained:
            # A frozen layer gets no trainable scales.
            quantizer.requires_grad_(False)


def leave_out(layer: QuantizedLayer, slot: str) -> None:
    """Takes a quantizer out until a state dict comes that has keys for it, or `put_back`."""
    name = f"{slot}_quantizer"
    quantizer = getattr(layer, name)
    # Deleted first: torch takes keys below a submodule that is None for expected ones.
    delattr(layer, name)
    setattr(layer, name, None)
    layer._left_out = {**layer._left_out, slot: quantizer}


def put_back(layer: QuantizedLayer, slots: Iterable[str]) -> None:
    """Undoes `leave_out` for some slots."""
    for slot in slots:
        # The model may have moved without it.
        quantizer = layer._left_out[slot].to(weight_of(layer).device).train(layer.training)
        layer._left_out = {key: value for key, value in layer._left_out.items() if key != slot}
        setattr(layer, f"{slot}_quantizer", quantizer)
        for name in (f"{slot}_quantizer" for slot in SLOTS):
            if name in layer._modules:
                layer._modules[name] = layer._modules.pop(name)  # in the order of a layer that never lost one


def detach_quantizers(layer: QuantizedLayer) -> None:
    """Takes the quantizers away and gives the float class back."""
    for slot in SLOTS:
        delattr(layer, f"{slot}_quantizer")
    layer.__dict__.pop("_integer_state", None)
    layer.__dict__.pop("_shared_input", None)
    layer.__dict__.pop("_scales_output", None)
    layer.__dict__.pop("_left_out", None)
    layer.__dict__.pop("read_past_by", None)
    cast(nn.Module, layer).__class__ = _float_class(layer)


def _float_class(layer: QuantizedLayer) -> type[nn.Module]:
    """Returns the float class, with the parametrizations that the layer has now.

    They can have come and gone since the quantizers came in.
    """
    names, kind = parametrized_names(layer), type(layer).float_class
    known = [name for name, value in kind.__dict__.items() if isinstance(value, property)]
    if not names or ("float_class" in type(layer).__dict__ and set(known) == set(names)):
        return kind
    return parametrized_class(cast(Any, class_before(layer)).float_class, layer)
