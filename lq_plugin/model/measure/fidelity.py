"""Fidelity of each quantized tensor: SQNR, share clipped, range and scale, layer by layer.

Weights are measured as they are. Activations are measured on a batch (`layer_fidelity(model, run)`,
or `watching(model)` around a forward pass that takes place anyway), or on the statistics of a calibration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lq_plugin.functional.error import clipped_count, decibel, energy
from lq_plugin.functional.grouping import blocks, unblocks
from lq_plugin.intent.formats import SLOTS
from lq_plugin.layers import QuantizedLayer, weight_of
from lq_plugin.model.calibrate import Statistics, evaluating
from lq_plugin.model.prepare import quantized_layers, quantizers
from lq_plugin.quantizers import ActivationQuantizer, Quantizer, SlotQuantizer, StagedQuantizer, WeightQuantizer
from lq_plugin.quantizers.base import Levels
from lq_plugin.ranges.grid_error import clipped_share, mean_squared_error
from lq_plugin.utilities import hooks


@dataclass
class Errors:
    """Energies of a tensor and of its quantization error, and its clipped elements, summed over calls."""

    signal: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    noise: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    clipped: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    elements: int = 0

    def add(self, signal: Tensor, noise: Tensor, clipped: Tensor, elements: int) -> None:
        """Adds one call. The sums stay on the tensors' device: nothing waits for it.

        Args:
            signal, noise: sums of squares of the values and of their errors, `[]`.
            clipped: number of clipped values, `[]`.
            elements: number of values.
        """
        self.signal = self.signal.to(signal.device) + signal
        self.noise = self.noise.to(noise.device) + noise
        self.clipped = self.clipped.to(clipped.device) + clipped
        self.elements += elements

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization noise ratio in dB; inf where nothing is lost."""
        return float(decibel(self.signal, self.noise))

    @property
    def clipping_share(self) -> float:
        """Share of the elements that rounded to a level outside the grid, 0..1."""
        return float(self.clipped) / self.elements


#: Errors of activations, by the name of their quantizer (`"conv1.input"`).
Measurements = dict[str, Errors]


@dataclass(frozen=True)
class FidelityRow:
    """One quantized tensor.

    Args:
        layer, slot: `"conv1"`, `"weight"` (or `"input"`, `"output"`).
        spec: how it is quantized.
        sqnr_db: signal to quantization noise ratio; None while it has no range or nothing was measured.
        clipping_share: share of the elements that round to a level outside the grid, 0..1.
        minimum, maximum: outermost values the levels stand for, over all channels and groups; None without a range.
        scale_min, scale_max: smallest and largest scale, or step between levels where they are no multiples of one.
    """

    layer: str
    slot: str
    spec: str
    sqnr_db: float | None = None
    clipping_share: float | None = None
    minimum: float | None = None
    maximum: float | None = None
    scale_min: float | None = None
    scale_max: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def layer_fidelity(
    model: nn.Module, run: Callable[[], Any] | None = None, measured: Mapping[str, Errors] | None = None
) -> list[FidelityRow]:
    """One row for each quantized tensor, in the model's order.

    Args:
        model: prepared, and calibrated where numbers are wanted.
        run: runs the model on a batch; it runs in evaluation mode, without gradients.
        measured: activation errors that are known already, from `watching` or `errors_on_statistics`.

    >>> import lq_plugin
    >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> _ = lq_plugin.prepare(net, "w8a8")
    >>> x = torch.randn(64, 8)
    >>> _ = lq_plugin.calibrate(net, [x])
    >>> [(row.layer, row.slot, row.sqnr_db > 35) for row in layer_fidelity(net, lambda: net(x))]
    [('0', 'weight', True), ('0', 'input', True), ('2', 'weight', True), ('2', 'input', True)]
    """
    known: dict[str, Errors] = dict(measured or {})
    if run is not None:
        with evaluating(model), watching(model) as fresh, torch.no_grad():
            run()
        known |= {name: errors for name, errors in fresh.items() if errors.elements}
    rows = []
    for name, layer in quantized_layers(model):
        for slot in SLOTS:
            if isinstance(layer, QuantizedLayer) and (quantizer := getattr(layer, f"{slot}_quantizer")) is not None:
                current = quantizer.current or quantizer
                errors = weight_errors(layer) if slot == "weight" else known.get(current.name)
                rows.append(_row(name, slot, quantizer, layer, errors))
    return rows


@contextmanager
def watching(model: nn.Module) -> Iterator[Measurements]:
    """Measures every calibrated activation in the forward passes inside, without changing them.

    Quantizers that are switched off are measured as if they were on. No graph is built and no random
    number is drawn.
    """
    measured: Measurements = {}
    handles = []

    def watch(quantizer: ActivationQuantizer) -> None:
        measured[quantizer.name] = Errors()

        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if quantizer.collector is None and (current := _in_force(quantizer)) is not None:
                _measure(current, args[0], measured.setdefault(current.name, Errors()))

        handles.append(hooks.before(quantizer, hook))

    try:
        for quantizer in quantizers(model):
            if isinstance(quantizer, ActivationQuantizer):
                watch(quantizer)
        yield measured
    finally:
        for handle in handles:
            handle.remove()


def errors_on_statistics(model: nn.Module, statistics: Statistics) -> Measurements:
    """Activation errors of the ranges now in force on the data of a calibration, without a forward pass."""
    measured: Measurements = {}
    for quantizer in quantizers(model):
        histogram = statistics.get(quantizer.name)
        if (
            not isinstance(quantizer, ActivationQuantizer)
            or histogram is None
            or not quantizer.is_calibrated
            or not histogram.total.all()
        ):
            continue
        if not quantizer.needs_calibration or not quantizer.spec.has_grid:
            continue  # its levels follow the values, which statistics do not hold
        sample, grid = histogram.sample(), quantizer.spec.grid
        scale, zero_point = (value.detach().float().reshape(-1) for value in quantizer.qparams())
        normal, factor = sample.normalized()
        square, total = factor.double().square(), sample.total()
        noise = (
            mean_squared_error(normal, (scale / factor).unsqueeze(1), zero_point.unsqueeze(1), grid)
            .squeeze(1)
            .clamp(min=0.0)
        )
        signal = normal.average(normal.values.double().square())
        clipped = clipped_share(normal, scale / factor, zero_point, grid)
        errors = measured[quantizer.name] = Errors()
        errors.add(
            (signal * square * total).sum(),
            (noise * square * total).sum(),
            (clipped * total).sum(),
            round(float(total.sum())),
        )
    return measured


@torch.no_grad()
def weight_errors(layer: QuantizedLayer) -> Errors | None:
    """Errors of a layer's weight; None while it has no range."""
    quantizer = _in_force(layer.weight_quantizer)
    if quantizer is None:
        return None
    weight = type(layer).canonical(layer, weight_of(layer)).detach()
    grouped = blocks(weight, quantizer.spec.granularity)
    errors = Errors()
    _add(errors, weight, quantizer.quantize_values(weight), grouped, quantizer.levels(grouped))
    return errors


@torch.no_grad()
def weight_bounds(layer: QuantizedLayer) -> tuple[Tensor, Tensor] | None:
    """Smallest and largest value the levels of a weight stand for, `[C_out]`, of a channel's widest group."""
    quantizer = _in_force(layer.weight_quantizer)
    if quantizer is None:
        return None
    weight = type(layer).canonical(layer, weight_of(layer)).detach()
    granularity = quantizer.spec.granularity
    grouped = blocks(weight, granularity)
    levels = quantizer.levels(grouped)
    low, high = (
        unblocks(bound.expand(grouped.shape), tuple(weight.shape), granularity).flatten(1)
        for bound in (levels.low, levels.high)
    )
    return low.amin(1), high.amax(1)


def _in_force(quantizer: SlotQuantizer | None) -> Any:
    """The quantizer of the current stage, once it has its range."""
    current = None if quantizer is None else quantizer.current
    return None if current is None or current.lacks_range else current


@torch.no_grad()
def _measure(quantizer: ActivationQuantizer, x: Tensor, errors: Errors) -> None:
    x = x.detach()
    _add(errors, x, quantizer.quantize_values(x), x, quantizer.levels(x))


def _add(errors: Errors, x: Tensor, x_hat: Tensor, grouped: Tensor, levels: Levels | None) -> None:
    """Adds a batch; `grouped` is `x` as the levels broadcast against it, maybe padded with zeros, which never clip."""
    # Half a step beyond the outermost level still rounds to it.
    clipped = (
        x.new_zeros(())
        if levels is None
        else clipped_count(grouped, levels.low - levels.step / 2, levels.high + levels.step / 2)
    )
    errors.add(energy(x), energy(x.float() - x_hat.float()), clipped, x.numel())


@torch.no_grad()
def _row(
    name: str, slot: str, quantizer: Quantizer | StagedQuantizer, layer: QuantizedLayer, errors: Errors | None
) -> FidelityRow:
    row: dict[str, Any] = {"layer": name, "slot": slot, "spec": str(quantizer.spec)}
    if (current := _in_force(quantizer)) is not None:
        row["spec"] = str(current.spec)
        weight = (
            type(layer).canonical(layer, weight_of(layer)).detach() if isinstance(current, WeightQuantizer) else None
        )
        if (levels := current.levels(None if weight is None else blocks(weight, current.spec.granularity))) is not None:
            low, high, step = levels
            row |= {
                "minimum": float(low.min()),
                "maximum": float(high.max()),
                "scale_min": float(step.min()),
                "scale_max": float(step.max()),
            }
        if errors is not None and errors.elements:
            row |= {"sqnr_db": errors.sqnr_db, "clipping_share": errors.clipping_share}
    return FidelityRow(**row)
