"""Cross-layer equalization: the spread of channels shared between neighbouring layers, the float function kept.

After a positively homogeneous function, f(s · x) = s · f(x) for s > 0, channel i of the first layer can be divided by
s_i while the second layer's weights that read it are multiplied by s_i. With r1_i and r2_i, the largest |weight| that
makes and that reads channel i (half the paper's ranges)::

    s_i = √(r1_i · r2_i) / r2_i    =>    r1_i / s_i = r2_i · s_i = √(r1_i · r2_i)

Both layers then use one scale a tensor best. Layers of a chain are in two pairs, so the pairs are visited in turn
until the factors settle. A folded batch norm in between (`fold_batch_norm`) is a shift, which is divided also.

Lifecycle: one recorded pass shows the pairs; factors come from the weights alone, and go into weights, biases and
folded batch norms at once. Equalize before ranges are found: they are those of the weights and activations before.
Activations get other ranges a channel; where a layer is quantized per channel already, little is left to win.

Reference: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019
(arXiv 1906.04721), sections 4.1.1 and 4.1.2, equation 11. Absorbing high biases (4.1.3) is not done.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from lq_plugin.errors import QuantizationError, is_integer
from lq_plugin.layers.registry import canonical_of, from_canonical_of, layer_channels
from lq_plugin.model.calibrate import refuse_ranges
from lq_plugin.model.graph.record import Recording
from lq_plugin.ptq.equalization.pairs import EqualizationPair, find_equalization_pairs
from lq_plugin.ptq.own_parameters import Refused, write_all
from lq_plugin.utilities.moved import former_names

__all__ = ["Equalization", "EqualizationPair", "equalize", "find_equalization_pairs"]
__getattr__ = former_names(__name__)

#: Factors that change less than this (ln s) are settled.
_SETTLED = 1e-4


@dataclass(frozen=True, eq=False)
class Equalization:
    """The result of `equalize`.

    Args:
        factors: s `[C]`, float64, that the output channels of each producer were divided by.
        pairs: what was equalized.
        refused: the other layers, with the reason.
        iterations: how often each pair was visited.
        change: largest |ln s| in the last iteration; below 1e-4 it is settled.
    """

    factors: dict[str, Tensor]
    pairs: tuple[EqualizationPair, ...]
    refused: tuple[Refused, ...]
    iterations: int
    change: float


def equalize(model: nn.Module, recording: Recording, iterations: int = 20) -> Equalization:
    """Equalizes the channels of neighbouring layers, in place. Values change, objects and keys do not.

    Computed in float64 and rounded once to each tensor's dtype. The function stays that of evaluation mode; keep folded
    batch norms frozen while training.

    Args:
        model: float or prepared, without ranges; batch norms folded.
        recording: of one float forward pass (`lq_plugin.model.graph.record.record`).
        iterations: how often each pair is visited at most.

    Raises:
        CalibrationError: quantizers have ranges already. They would be those of other weights.
        QuantizationError: fewer than 1 iteration, or weights that overflow their dtype. Nothing is changed then.

    >>> from lq_plugin.model.graph.record import record
    >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False)).eval()
    >>> with torch.no_grad():
    ...     _ = net[0].weight.copy_(torch.tensor([[8.0, 0.0], [0.0, 0.5]]))
    ...     _ = net[2].weight.copy_(torch.tensor([[2.0, 2.0]]))
    ...     result = equalize(net, record(net, lambda: net(torch.ones(1, 2))))
    >>> result.factors["0"].tolist(), net[0].weight.tolist(), net[2].weight.tolist()
    ([2.0, 0.5], [[4.0, 0.0], [0.0, 1.0]], [[4.0, 1.0]])
    >>> [str(refused) for refused in result.refused]
    ["'2': its output is what the model returns"]
    """
    check_iterations(iterations)
    refuse_ranges(model, "equalize", "equalized")
    pairs, refused = find_equalization_pairs(model, recording)
    layers = {name: model.get_submodule(name) for pair in pairs for name in (pair.producer, pair.consumer)}
    factors, visits, change = _factors(pairs, {name: _magnitudes(layer) for name, layer in layers.items()}, iterations)
    write_all(_changes(model, pairs, layers, factors), "equalize")
    return Equalization(factors, tuple(pairs), tuple(refused), visits, change)


def check_iterations(iterations: int = 20) -> None:
    """Refuses an impossible number of iterations.

    Raises:
        QuantizationError: no integer, or one below 1.
    """
    if not is_integer(iterations, 1):
        raise QuantizationError(f"iterations is an integer from 1, got {iterations!r}")


def _factors(
    pairs: Sequence[EqualizationPair], magnitudes: dict[str, Tensor], iterations: int
) -> tuple[dict[str, Tensor], int, float]:
    """Factors of each producer's output channels, iterations made, and the last change."""
    total = {pair.producer: torch.ones_like(_makes(magnitudes[pair.producer])) for pair in pairs}
    visits, change = 0, math.inf if pairs else 0.0
    while visits < iterations and change > _SETTLED:
        visits, change = visits + 1, 0.0
        for pair in pairs:
            first, second = magnitudes[pair.producer], magnitudes[pair.consumer]
            makes, reads = _makes(first), second.amax(1).reshape(-1, pair.repeat).amax(1)
            s = (makes / reads).sqrt()
            # A channel that nothing makes or nothing reads needs no levels.
            s = torch.where((makes > 0) & (reads > 0), s, 1.0)
            first /= s.reshape(first.shape[0], -1, 1)
            second *= s.repeat_interleave(pair.repeat).reshape(second.shape[0], 1, -1)
            total[pair.producer] *= s
            change = max(change, float(s.log().abs().max()))
    return total, visits, change


def _changes(
    model: nn.Module, pairs: Sequence[EqualizationPair], layers: Mapping[str, nn.Module], factors: Mapping[str, Tensor]
) -> list[tuple[str, Tensor, Tensor]]:
    """Returns `(name, tensor, new value)` of all that equalization changes, the new value in float64."""
    inputs = {pair.consumer: factors[pair.producer].repeat_interleave(pair.repeat) for pair in pairs}
    changes: list[tuple[str, Tensor, Tensor]] = []
    for name, layer in layers.items():
        weight = _parts(layer)
        if name in inputs:
            weight = weight * inputs[name].reshape(weight.shape[0], 1, -1, 1)
        if name in factors:
            weight = weight / factors[name].reshape(weight.shape[0], -1, 1, 1)
        changes.append((f"{name}.weight", cast(Tensor, layer.weight), _whole(layer, weight)))
    for pair in pairs:
        for name in (pair.producer, *pair.batch_norms):
            bias = model.get_submodule(name).bias
            if isinstance(bias, Tensor):
                changes.append((f"{name}.bias", bias, bias.detach().double() / factors[pair.producer]))
    return changes


def _parts(layer: nn.Module) -> Tensor:
    """The weight, float64, as `[groups, C_out / groups, C_in / groups, kernel elements]`."""
    weight = canonical_of(layer, cast(Tensor, layer.weight).detach().double())
    c_out, per_group = weight.shape[:2]
    groups = layer_channels(layer)[0] // per_group
    return weight.reshape(groups, c_out // groups, per_group, -1)


def _whole(layer: nn.Module, parts: Tensor) -> Tensor:
    """Inverse of `_parts`."""
    shape = canonical_of(layer, cast(Tensor, layer.weight)).shape
    return from_canonical_of(layer, parts.reshape(shape))


def _magnitudes(layer: nn.Module) -> Tensor:
    """Returns the largest |weight| between each input and output channel, `[groups, C_out / groups, C_in / groups]`."""
    return _parts(layer).abs().amax(3)


def _makes(magnitudes: Tensor) -> Tensor:
    """Largest |weight| of each output channel, `[C_out]`."""
    return magnitudes.amax(2).flatten()
