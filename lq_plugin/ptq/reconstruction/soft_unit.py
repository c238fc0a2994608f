"""Layers of one unit with soft quantizers while their rounding is learned."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import nn

from lq_plugin.layers import QuantizedLayer, current_weight_quantizer
from lq_plugin.ptq.layerwise.write import Snapshot, write_rounded
from lq_plugin.ptq.reconstruction.options import ReconstructOptions
from lq_plugin.ptq.reconstruction.sign_rounding import SignRounding
from lq_plugin.ptq.reconstruction.soft_rounding import SoftInput, SoftRounding
from lq_plugin.quantizers import ActivationQuantizer, SlotQuantizer

#: Stand-ins for weight quantizers, by method.
ROUNDINGS: dict[str, type[SoftRounding] | type[SignRounding]] = {"adaround": SoftRounding, "signround": SignRounding}


class SoftUnit:
    """Layers that are trained together. As a context manager it puts the soft quantizers in and takes them out again.

    Args:
        layers: quantized layers, by name.
        biases: parameters that are trained with the roundings.
        options: what is trained, and how fast.
        generator: of the random choice in QDrop.
        spread: standard deviation of the unit's output, the unit of the biases' learning rate.
        nearest: names of layers whose weights keep nearest rounding.
    """

    def __init__(
        self,
        layers: Mapping[str, QuantizedLayer],
        biases: list[nn.Parameter],
        options: ReconstructOptions,
        generator: torch.Generator,
        spread: float = 1.0,
        nearest: Collection[str] = (),
    ) -> None:
        self.layers, self.biases, self.options, self.spread = layers, biases, options, spread
        self.roundings: dict[str, SoftRounding | SignRounding] = {}
        kind = ROUNDINGS[options.method]
        self.inputs: dict[tuple[str, str], SoftInput] = {}
        for name, layer in layers.items():
            quantizer = current_weight_quantizer(layer)
            if quantizer is not None and quantizer.is_enabled and name not in nearest:
                self.roundings[name] = kind(
                    quantizer, type(layer).canonical(layer, layer.weight), options.scale_learning_rate > 0
                )
            for slot in ("input", "output"):
                held = getattr(layer, f"{slot}_quantizer")
                held = held.current if isinstance(held, SlotQuantizer) else None
                if isinstance(held, ActivationQuantizer) and held.is_enabled:
                    learn = options.input_learning_rate > 0 and held.spec.has_free_scales and held.spec.bit_width < 8
                    self.inputs[name, slot] = SoftInput(held, learn, options.drop, generator)
        self._before = Snapshot(layers, biases)
        self._held: list[tuple[QuantizedLayer, str, Any]] = []

    @property
    def softened(self) -> list[SoftRounding]:
        """The roundings that Adam trains."""
        return [rounding for rounding in self.roundings.values() if isinstance(rounding, SoftRounding)]

    def signed(self) -> list[tuple[nn.Parameter, tuple[float, float]]]:
        """Parameters that signed steps are made with, and their bounds."""
        tuned = [rounding for rounding in self.roundings.values() if isinstance(rounding, SignRounding)]
        return [pair for rounding in tuned for pair in rounding.signed()]

    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups for the optimizer."""
        options = self.options
        chosen: list[tuple[list[nn.Parameter], float]] = [
            ([r.v for r in self.softened], options.learning_rate),
            ([r.gain for r in self.softened if r.gain is not None], options.scale_learning_rate),
            ([i.gain for i in self.inputs.values() if i.gain is not None], options.input_learning_rate),
            (self.biases, options.bias_learning_rate * self.spread),
        ]
        return [{"params": parameters, "lr": rate} for parameters, rate in chosen if parameters and rate]

    def undecided_share(self) -> float:
        """Share of undecided roundings, in the layer with most of them."""
        return max((rounding.undecided_share() for rounding in self.softened), default=0.0)

    def harden(self) -> Snapshot:
        """Gives each layer the weights its roundings stand for; what they were before comes back.

        Raises:
            QuantizationError: the quantizer does not return these weights unchanged.
        """
        for name, rounding in self.roundings.items():
            write_rounded(self.layers[name], *rounding.rounded())
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
