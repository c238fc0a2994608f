"""Empirical bias correction: the shift that quantization adds to a layer's mean output, taken off its bias.

Rounded weights and inputs shift the mean of every output channel by E[W̃ x̂] - E[W x], with W̃, x̂ quantized and the
expectation over the calibration data; the bias takes it back. Layers are corrected in the order in which they run:
x̂ comes from quantized layers that are corrected already, x from the float model.

Lifecycle: each batch runs twice, float and quantized, and nothing but means is kept. While the quantized pass runs,
each layer is corrected by the batch's own means; the biases get the mean over all batches in the end. For one batch the
mean output of every corrected layer then is that of the float model; for several it is so for the first layers, and
after nonlinear functions as far as the batches are alike.

A layer without a bias cannot get one, as the checkpoint's keys would no longer be those of the float model. Where a
batch norm alone reads it, the running mean is moved instead: BN(x - e) is the batch norm with μ + e.

Do this once, and not together with `correct_batch_norm` or `reconstruct`: all of them measure against the float model,
whose biases are other ones afterwards.

Reference: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019
(arXiv 1906.04721), section 4.2 and appendix D.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lq_plugin.errors import CalibrationError, raise_all
from lq_plugin.layers import CompoundWeight, OwnWeight, QuantizedLayer
from lq_plugin.layers.registry import known_operation, operation_of
from lq_plugin.model.calibrate import evaluating, float_forward
from lq_plugin.model.graph.record import Recording, record, without_compile
from lq_plugin.model.prepare import quantized_layers
from lq_plugin.model.ranks import gathered, require_batches
from lq_plugin.model.survey import float_class
from lq_plugin.ptq.layerwise.watch import CallWatch, run_both
from lq_plugin.ptq.own_parameters import sharing_fault
from lq_plugin.ptq.reconstruction.units import owner_name
from lq_plugin.utilities import hooks


@dataclass(frozen=True)
class CorrectedLayer:
    """The correction of one layer's mean output.

    Args:
        target: what was changed, by qualified name: its bias, or the running mean of the batch norm after it.
        elements: values a channel that the means are over, of all processes.
        mean: mean |E[W̃ x̂] - E[W x]| of the channels, in units of the layer's output.
        largest: the largest of a channel.
    """

    target: str
    elements: int
    mean: float
    largest: float


@dataclass(frozen=True)
class BiasCorrection:
    """The result of `bias_correct`.

    Args:
        batches: number of batches that ran (on this rank).
        layers: the corrected layers, by name.
        skipped: quantized layers that keep their mean shift, and why.
    """

    batches: int
    layers: dict[str, CorrectedLayer]
    skipped: dict[str, str]


def bias_correct(model: nn.Module, batches: Iterable[Any], run: Callable[[Any], Any] | None = None) -> BiasCorrection:
    """Takes the mean error of each quantized layer off its bias, in place.

    Everything runs in evaluation mode and without gradients. With several processes the means of all ranks are pooled.

    Args:
        model: prepared and calibrated.
        batches: calibration data, read once.
        run: runs the model on one batch; `model(batch)` when None. The first batch runs once more, to see who reads
            what.

    Raises:
        CalibrationError: no batches, NaN or Inf in what a layer makes, or a model that is not prepared or calibrated.
            Nothing is changed then.

    >>> import lq_plugin
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
    >>> batches = [torch.randn(64, 4, generator=torch.Generator().manual_seed(0))]
    >>> mean = model(batches[0]).mean(0)
    >>> _ = lq_plugin.prepare(model, "w2a8")
    >>> _ = lq_plugin.calibrate(model, batches)
    >>> bool((model(batches[0]).mean(0) - mean).abs().max() < 1e-5)
    False
    >>> sorted(bias_correct(model, batches).layers)
    ['0', '2']
    >>> bool((model(batches[0]).mean(0) - mean).abs().max() < 1e-5)
    True
    """
    layers = dict(quantized_layers(model))
    if not layers:
        raise CalibrationError("the model has no quantized layers: prepare it first (lq_plugin.prepare)")
    forward = run or model
    watches: dict[str, _Watch] = {}
    skipped: dict[str, str] = {}
    count = 0
    with evaluating(model), torch.no_grad(), without_compile(), ExitStack() as stack:
        for batch in batches:
            if not count:
                with float_forward(model):
                    recording = record(model, lambda: forward(batch))  # noqa: B023
                watches, skipped = _targets(model, layers, recording)
                for watch in watches.values():
                    stack.callback(watch.attach().remove)
            run_both(model, forward, batch, watches.values())
            count += 1
    require_batches(count)
    return BiasCorrection(count, _apply(watches, skipped), skipped)


class _Watch(CallWatch[tuple[Tensor, int]]):
    """Takes the mean of what a layer makes in the quantized pass back to that of the float pass.

    Args:
        name: of the layer.
        layer: what is watched, before its output quantizer.
        target_name: of the bias or running mean.
        target: the tensor itself.
        sign: that the error goes into the target with.
    """

    def __init__(self, name: str, layer: QuantizedLayer, target_name: str, target: Tensor, sign: float) -> None:
        super().__init__(f"the bias of {name!r}")
        self.layer, self.target_name, self.target, self.sign = layer, target_name, target, sign
        self.error, self.elements = torch.zeros_like(target, dtype=torch.float64, device="cpu"), 0

    def attach(self) -> Any:
        # Disabled quantizers are called also: in both passes the hook sees the sum and the bias.
        if self.layer.output_quantizer is not None:
            return hooks.before(self.layer.output_quantizer, lambda _, args: (self.see(args[0]), *args[1:]))
        return hooks.after(self.layer, lambda _, __, y: self.see(y), prepend=True)

    def measure(self, x: Tensor) -> tuple[Tensor, int]:
        axis = self._axis(x)
        others = [dim for dim in range(x.dim()) if dim != axis]
        return (x.mean(others) if others else x).cpu().double(), x.numel() // x.shape[axis]

    def corrected(self, x: Tensor, was: tuple[Tensor, int], now: tuple[Tensor, int]) -> Tensor:
        elements = now[1]
        if was[1] != elements:
            raise self.fault(f"made {elements} values a channel where the float pass made {was[1]}")
        error = now[0] - was[0]
        self.error += error * elements
        self.elements += elements
        return x - error.to(x).reshape([-1 if dim == self._axis(x) else 1 for dim in range(x.dim())])

    def _axis(self, x: Tensor) -> int:
        """Returns the dim of the channels."""
        return int(type(self.layer).input_axis) % x.dim()


def _apply(watches: dict[str, _Watch], skipped: dict[str, str]) -> dict[str, CorrectedLayer]:
    """Moves the errors of all ranks into the targets, all or none."""
    ranks = gathered({name: (watch.error, watch.elements) for name, watch in watches.items()})
    errors: dict[str, tuple[Tensor, int]] = {}
    for name in watches:
        seen = [rank[name] for rank in ranks if name in rank]
        elements = sum(count for _, count in seen)
        if elements:
            errors[name] = sum((error for error, _ in seen), torch.zeros(())) / elements, elements
        else:
            skipped[name] = "no batch reached it"
    raise_all(CalibrationError, "cannot correct biases", [
        f"{name!r} makes NaN or Inf, float or quantized" for name, (error,
        _) in errors.items() if not error.isfinite().all()
    ])  # fmt: skip
    corrected = {}
    for name, (error, elements) in errors.items():
        watch = watches[name]
        with torch.no_grad():
            watch.target.copy_(watch.target.cpu().double() + watch.sign * error)
        corrected[name] = CorrectedLayer(
            watch.target_name, elements, float(error.abs().mean()), float(error.abs().max())
        )
    return corrected


def _targets(
    model: nn.Module, layers: dict[str, QuantizedLayer], recording: Recording
) -> tuple[dict[str, _Watch], dict[str, str]]:
    """Returns a watch of each layer that can be corrected, in the order of first calls, and why the others cannot."""
    watches: dict[str, _Watch] = {}
    skipped: dict[str, str] = {}
    for name, layer in layers.items():
        found = _layer_fault(model, layer) or _target(model, name, layer, recording)
        if isinstance(found, _Watch):
            watches[name] = found
        else:
            skipped[name] = found
    return watches, skipped


def _layer_fault(model: nn.Module, layer: QuantizedLayer) -> str | None:
    if isinstance(layer, OwnWeight):
        return "its module's own code adds what biases there are"
    if isinstance(layer, CompoundWeight):
        return f"its sum is made inside the kernel of {owner_name(model, layer)!r} and not seen"
    kind = float_class(layer)
    if operation_of(layer) is None:
        return f"{kind.__name__} has no bias"
    if known_operation(layer) is None:
        return f"{kind.__name__} has a forward of its own, which may do more than add the bias"
    return None


def _target(model: nn.Module, name: str, layer: QuantizedLayer, recording: Recording) -> _Watch | str:
    """Returns a watch of the layer's bias, or of the running mean of the batch norm that alone reads it."""
    key = f"{name}.bias" if name else "bias"
    bias = layer._parameters.get("bias")
    if bias is not None and "bias" not in layer.__dict__:
        return sharing_fault(model, [key], recording.parameter_readers) or _Watch(name, layer, key, bias, -1.0)
    if getattr(layer, "bias", None) is not None:
        return "its bias is computed, not a plain parameter"
    return _batch_norm_after(model, name, layer, recording)


def _batch_norm_after(model: nn.Module, name: str, layer: QuantizedLayer, recording: Recording) -> _Watch | str:
    without = "it has no bias, and a new one would change the checkpoint's keys"
    calls = recording.calls_of(name)
    if not calls:
        return "it has no bias, and the first batch did not show what reads it"
    readers = {reader for call in calls for reader in recording.consumers_of(call)}
    modules = {reader.name for reader in readers if reader.kind == "module"}
    bn = model.get_submodule(next(iter(modules))) if len(modules) == 1 else None
    if (
        not isinstance(bn, _BatchNorm)
        or len(readers) != len(calls)
        or any(reader.kind != "module" for reader in readers)
    ):
        names = ", ".join(sorted({repr(reader.name) for reader in readers})) or "nothing"
        return f"{without}; it is read by {names}, not by a batch norm alone, whose running mean could be moved"
    (bn_name,) = modules
    if bn.running_mean is None:
        return f"it has no bias, and {bn_name!r} normalizes each batch by its own mean (track_running_stats=False)"
    if len(recording.calls_of(bn_name)) != len(calls):
        return f"{without}; {bn_name!r} after it reads other layers also"
    dims = {len(call.output_shapes[0]) for call in calls}
    direct = all(reader.inputs[0].direct for reader in readers)
    if (
        not direct
        or any(type(layer).input_axis % dim != 1 for dim in dims)
        or bn.num_features != type(layer).channels(layer)[1]
    ):
        return f"{without}; the channels of {bn_name!r} after it are not shown to be its own"
    key = f"{bn_name}.running_mean"
    return sharing_fault(model, [key], recording.parameter_readers) or _Watch(name, layer, key, bn.running_mean, 1.0)
