"""SmoothQuant: outliers of activations moved into the weights that read them, the float function kept.

A few channels of a norm's output are much larger than all others, and with one scale a tensor leave them no levels.
With X_j the channel j and W_j the weights that read it, of all readers together::

    s_j = max|X_j|^α / max|W_j|^(1 - α),   (X / s) · (s · W)ᵀ = X · Wᵀ                (eqs. 3 and 4)

1 / s goes into the norm's weight and bias, or into the rows of a linear layer before; s into the readers' columns. α
= 0.5 shares the difficulty alike; larger ones put more of it into the weights.

Lifecycle: one recorded pass shows the groups, the batches give max|X|, and all parameters are written at once. Smooth
before ranges are found: they are those of the weights and activations before.

Reference: Xiao, Lin, Seznec, Wu, Demouth, Han, "SmoothQuant: Accurate and Efficient Post-Training Quantization for
Large Language Models", ICML 2023 (arXiv 2211.10438), section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lq_plugin.errors import CalibrationError, QuantizationError, raise_all
from lq_plugin.model.calibrate import evaluating, float_forward, refuse_ranges
from lq_plugin.model.graph.record import Recording, without_compile
from lq_plugin.model.ranks import gathered, require_batches
from lq_plugin.ptq.own_parameters import Refused, write_all
from lq_plugin.ptq.smooth_quant.groups import SmoothingGroup, find_smoothing_groups, input_dim, input_weight
from lq_plugin.utilities import hooks
from lq_plugin.utilities.moved import former_names

__all__ = ["Smoothing", "SmoothingGroup", "find_smoothing_groups", "smooth_quant"]
__getattr__ = former_names(__name__)


@dataclass(frozen=True, eq=False)
class Smoothing:
    """The result of `smooth_quant`.

    Args:
        pairs: what was smoothed: a producer with its readers each.
        factors: s `[C]`, float64, that the output channels of each producer were divided by.
        refused: the other norms and linear layers, with the reason.
    """

    pairs: tuple[SmoothingGroup, ...]
    factors: dict[str, Tensor]
    refused: tuple[Refused, ...]


def smooth_quant(
    model: nn.Module,
    batches: Iterable[Any],
    recording: Recording,
    run: Callable[[Any], Any] | None = None,
    alpha: float = 0.5,
) -> Smoothing:
    """Moves outliers of activations into weights, in place. Values change, objects and keys do not.

    Computed in float64 and rounded once to each tensor's dtype. The model runs float and in evaluation mode. With
    several processes the largest values of all count.

    Args:
        model: float or prepared, without ranges.
        batches: calibration data, read once, for max|X|.
        recording: of one float forward pass (`lq_plugin.model.graph.record.record`).
        run: runs the model on one batch; `model(batch)` when None.
        alpha: α in 0..1, how much of the difficulty goes into the weights.

    Raises:
        CalibrationError: quantizers have ranges already, which would be those of other weights; no batches; NaN or Inf
            in a producer's output. Nothing is changed then.
        QuantizationError: an alpha outside of 0..1, or weights that overflow their dtype. Nothing is changed then.

    >>> from lq_plugin.model.graph.record import record
    >>> net, x = nn.Sequential(nn.LayerNorm(2), nn.Linear(2, 1, bias=False)).eval(), torch.tensor([[1.0, -1.0]])
    >>> with torch.no_grad():
    ...     _ = net[0].weight.copy_(torch.tensor([16.0, 1.0])), net[1].weight.copy_(torch.tensor([[1.0, 1.0]]))
    ...     result = smooth_quant(net, [x], record(net, lambda: net(x)))
    >>> result.pairs[0].readers, net[0].weight.round(decimals=3).tolist(), net[1].weight.round(decimals=3).tolist()
    (('1',), [4.0, 1.0], [[4.0, 1.0]])
    """
    check_alpha(alpha)
    refuse_ranges(model, "smooth", "smoothed")
    groups, refused = find_smoothing_groups(model, recording)
    largest = _largest_activations(model, [group.producer for group in groups], batches, run or model)
    values = _Values(model)
    factors = {group.producer: values.smooth(group, largest[group.producer], alpha) for group in groups}
    write_all(((name, *change) for name, change in values.new.items()), "smooth")
    return Smoothing(tuple(groups), factors, tuple(refused))


def check_alpha(alpha: float = 0.5) -> None:
    """Refuses an impossible alpha.

    Raises:
        QuantizationError: no number, or one outside of 0..1.
    """
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 <= alpha <= 1:
        raise QuantizationError(f"alpha is a share in 0..1, got {alpha!r}")


def _largest_activations(
    model: nn.Module, producers: list[str], batches: Iterable[Any], run: Callable[[Any], Any]
) -> dict[str, Tensor]:
    """Returns max|X_j| `[C]`, float64, of each producer's output over all batches of all processes."""
    largest: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, args: Any, y: Tensor) -> None:
            rows = y.detach().reshape(-1, y.shape[-1]).abs()
            # An expert without tokens is not smoothed, as channels that are 0 are not.
            found = (rows.amax(0) if len(rows) else rows.new_zeros(rows.shape[1])).cpu().double()
            largest[name] = torch.maximum(largest[name], found) if name in largest else found

        return hook

    count = 0
    with evaluating(model), float_forward(model), torch.no_grad(), without_compile(), ExitStack() as stack:
        for name in producers:
            stack.callback(hooks.after(model.get_submodule(name), watch(name)).remove)
        for batch in batches:
            run(batch)
            count += 1
    require_batches(count)
    ranks = gathered(largest)
    seen = {
        name: torch.stack([rank[name] for rank in ranks if name in rank]).amax(0)
        for name in producers
        if any(name in r for r in ranks)
    }
    faults = [f"no batch reached {name!r}" for name in producers if name not in seen]
    faults += [f"{name!r} makes NaN or Inf" for name, values in seen.items() if not values.isfinite().all()]
    raise_all(CalibrationError, "cannot smooth", faults)
    return seen


class _Values:
    """New values of parameters, float64, until all are known. A linear layer may be in two groups."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.new: dict[str, tuple[Tensor, Tensor]] = {}

    def smooth(self, group: SmoothingGroup, largest: Tensor, alpha: float) -> Tensor:
        """Scales the parameters of a group; returns the factors `[C]`."""
        readers = [self.model.get_submodule(name) for name in group.readers]
        keys = [f"{name}.{input_weight(module)}" for name, module in zip(group.readers, readers, strict=True)]
        dims = [input_dim(module) for module in readers]
        reading = torch.stack([self._get(key).abs().amax(1 - dim) for key, dim in zip(keys, dims, strict=True)]).amax(0)
        largest = largest.to(reading.device)
        s = largest.pow(alpha) / reading.pow(1.0 - alpha)
        # A channel that is always 0 or that nothing reads needs no levels.
        s = torch.where((largest > 0) & (reading > 0), s, 1.0)
        for key, dim in zip(keys, dims, strict=True):
            self._set(key, self._get(key) * (s if dim == 1 else s.unsqueeze(1)))
        producer = self.model.get_submodule(group.producer)
        prefix = f"{group.producer}." if group.producer else ""
        weight = self._get(f"{prefix}weight")
        rows = weight.dim() == 2 and input_dim(producer) == 1
        self._set(f"{prefix}weight", weight / (s.unsqueeze(1) if rows else s))
        if getattr(producer, "bias", None) is not None:
            self._set(f"{prefix}bias", self._get(f"{prefix}bias") / s)
        return s

    def _get(self, name: str) -> Tensor:
        return self.new[name][1] if name in self.new else self.model.get_parameter(name).detach().double()

    def _set(self, name: str, value: Tensor) -> None:
        self.new[name] = self.model.get_parameter(name), value
