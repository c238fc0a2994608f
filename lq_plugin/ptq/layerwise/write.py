"""Rounded weights written into layers, so that the ordinary quantizer returns them unchanged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lq_plugin.errors import QuantizationError
from lq_plugin.functional.fixed_levels import FixedLevels
from lq_plugin.layers import COMPUTED, QuantizedLayer, current_weight_quantizer, weight_is_computed
from lq_plugin.ptq.layerwise.activation_cache import ActivationCache


def rounding_fault(layer: QuantizedLayer) -> str | None:
    """Returns why no rounding of a layer's weight can be chosen; None when one can."""
    if weight_is_computed(layer):
        return COMPUTED
    quantizer = current_weight_quantizer(layer)
    if quantizer is None:
        return "its weight is float at this stage of its plan"
    return None if quantizer.has_fixed_levels else f"{quantizer.spec} has no levels under fixed scales to choose from"


def write_rounded(layer: QuantizedLayer, values: Tensor, levels: FixedLevels) -> None:
    """Writes values on some levels into a layer's weight, and has its quantizer keep these levels.

    Args:
        layer: with a weight quantizer that is switched on.
        values: canonical, `[C_out, C_in, *kernel]`, each a level times its step.
        levels: of the quantizer's `fixed_levels`.

    Raises:
        QuantizationError: the quantizer does not return the written weight unchanged.
    """
    quantizer = current_weight_quantizer(layer)
    assert quantizer is not None
    with torch.no_grad():
        layer.weight.copy_(type(layer).from_canonical(layer, values))
        quantizer.keep_levels(levels)
        if not torch.equal(layer.quantized_weight(), layer.weight):
            raise QuantizationError(
                f"{quantizer.name}: {quantizer.spec} does not reproduce its own levels in {layer.weight.dtype}"
            )


def writable_weights(layers: Iterable[QuantizedLayer]) -> list[Tensor]:
    """Returns the weights of layers, without those that are computed."""
    return [layer.weight for layer in layers if not weight_is_computed(layer)]


class Snapshot:
    """A copy of the weights, biases and quantizers of some layers, to be put back.

    Args:
        layers: by name.
        biases: further tensors.
        cache: keeps weights and biases on disk, so that a large model is not held twice; None: they stay in memory.
    """

    def __init__(
        self, layers: Mapping[str, QuantizedLayer], biases: Sequence[Tensor] = (), cache: ActivationCache | None = None
    ) -> None:
        self.layers, self._cache = layers, cache
        self.tensors = [*writable_weights(layers.values()), *biases]
        self._copies = [] if cache is not None else [t.detach().clone() for t in self.tensors]
        if cache is not None:
            cache.put(self._key, self.tensors, on_disk=True)
        self.states = [
            (quantizer, {key: value.clone() for key, value in quantizer.state_dict().items()})
            for layer in layers.values()
            for quantizer in (layer.weight_quantizer, layer.input_quantizer, layer.output_quantizer)
            if quantizer is not None
        ]

    @property
    def _key(self) -> tuple[str, ...]:
        return ("before", *self.layers)

    def restore(self) -> None:
        """Puts everything back; the cache is still open."""
        copies = self._copies if self._cache is None else self._cache.get(self._key)
        with torch.no_grad():
            for tensor, value in zip(self.tensors, copies, strict=True):
                tensor.copy_(value)
            for quantizer, state in self.states:
                quantizer.load_state_dict(state)
