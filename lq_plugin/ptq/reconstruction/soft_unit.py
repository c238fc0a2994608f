"""A unit whose layers have soft quantizers for the time being."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from lq_plugin.errors import QuantizationError
from lq_plugin.layers import QuantizedLayer, weight_is_computed
from lq_plugin.ptq.reconstruction.options import ReconstructOptions
from lq_plugin.ptq.reconstruction.soft_rounding import SoftInput, SoftRounding
from lq_plugin.quantizers import ActivationQuantizer


class SoftUnit:
    """Layers that are trained together. As a context manager it puts the soft quantizers in and takes them out again.

    Args:
        layers: quantized layers, by name.
        biases: parameters that are trained beside the roundings.
        options: what is trained, and how fast.
        generator: of the random choice in QDrop.
        spread: standard deviation of the unit's output, the unit of the biases' learning rate.
    """

    def __init__(
        self,
        layers: Mapping[str, QuantizedLayer],
        biases: list[nn.Parameter],
        options: ReconstructOptions,
        generator: torch.Generator,
        spread: float = 1.0,
    ) -> None:
        self.layers, self.biases, self.options, self.spread = layers, biases, options, spread
        self.roundings: dict[str, SoftRounding] = {}
        self.inputs: dict[tuple[str, str], SoftInput] = {}
        for name, layer in layers.items():
            quantizer = layer.weight_quantizer
            if (
                quantizer is not None
                and quantizer.spec.is_uniform
                and quantizer.is_enabled
                and not weight_is_computed(layer)
            ):
                self.roundings[name] = SoftRounding(
                    quantizer, type(layer).canonical(layer, layer.weight), options.scale_learning_rate > 0
                )
            for slot in ("input", "output"):
                held = getattr(layer, f"{slot}_quantizer")
                if isinstance(held, ActivationQuantizer) and held.is_enabled:
                    learn = options.input_learning_rate > 0 and held.spec.has_free_scales and held.spec.bit_width < 8
                    self.inputs[name, slot] = SoftInput(held, learn, options.drop, generator)
        self._before = Snapshot(layers, biases)
        self._held: list[tuple[QuantizedLayer, str, Any]] = []

    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups for the optimizer."""
        options = self.options
        chosen: list[tuple[list[nn.Parameter], float]] = [
            ([r.v for r in self.roundings.values()], options.learning_rate),
            ([r.gain for r in self.roundings.values() if r.gain is not None], options.scale_learning_rate),
            ([i.gain for i in self.inputs.values() if i.gain is not None], options.input_learning_rate),
            (self.biases, options.bias_learning_rate * self.spread),
        ]
        return [{"params": parameters, "lr": rate} for parameters, rate in chosen if parameters and rate]

    def undecided_share(self) -> float:
        """Share of undecided roundings, in the layer with most of them."""
        return max((rounding.undecided_share() for rounding in self.roundings.values()), default=0.0)

    def harden(self) -> Snapshot:
        """Give each layer the weights its roundings stand for; what they were before comes back.

        Raises:
            QuantizationError: the quantizer does not return these weights unchanged.
        """
        for name, rounding in self.roundings.items():
            layer = self.layers[name]
            quantizer = layer.weight_quantizer
            assert quantizer is not None
            weight, scale, zero_point = rounding.rounded()
            with torch.no_grad():
                layer.weight.copy_(type(layer).from_canonical(layer, weight))
                quantizer.fix(scale, zero_point)
                if not torch.equal(layer.quantized_weight(), layer.weight):
                    raise QuantizationError(
                        f"{quantizer.name}: {quantizer.spec} does not reproduce its own levels in {layer.weight.dtype}"
                    )
        for soft in self.inputs.values():
            soft.write_back()
        return self._before

    def __enter__(self) -> SoftUnit:
        for name, rounding in self.roundings.items():
            self._put(self.layers[name], "weight", rounding)
        for (name, slot), soft in self.inputs.items():
            self._put(self.layers[name], slot, soft)
        for bias in self.biases:
            bias.requires_grad_(True)
        return self

    def _put(self, layer: QuantizedLayer, slot: str, soft: nn.Module) -> None:
        self._held.append((layer, f"{slot}_quantizer", getattr(layer, f"{slot}_quantizer")))
        setattr(layer, f"{slot}_quantizer", soft)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for layer, slot, quantizer in self._held:
            setattr(layer, slot, quantizer)
        self._held.clear()
        for bias in self.biases:
            bias.requires_grad_(False)


def writable_weights(layers: Iterable[QuantizedLayer]) -> list[Tensor]:
    """The weights of these layers, without those that are computed."""
    return [layer.weight for layer in layers if not weight_is_computed(layer)]


class Snapshot:
    """Weights, biases and quantizers of some layers, as they are now."""

    def __init__(self, layers: Mapping[str, QuantizedLayer], biases: list[nn.Parameter]) -> None:
        self.layers = layers
        self.tensors: list[tuple[Tensor, Tensor]] = [
            (t, t.detach().clone()) for t in (*writable_weights(layers.values()), *biases)
        ]
        self.states = [
            (quantizer, {key: value.clone() for key, value in quantizer.state_dict().items()})
            for layer in layers.values()
            for quantizer in (layer.weight_quantizer, layer.input_quantizer, layer.output_quantizer)
            if quantizer is not None
        ]

    def restore(self) -> None:
        """Put everything back."""
        with torch.no_grad():
            for tensor, value in self.tensors:
                tensor.copy_(value)
            for quantizer, state in self.states:
                quantizer.load_state_dict(state)
