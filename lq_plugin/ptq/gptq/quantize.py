"""GPTQ over a model: layer after layer in the order in which they run, on inputs that the quantized layers in front
make.

Each layer needs its inputs' Hessian and nothing else, which is summed over the batches; the solver is in
`lq_plugin.functional.gptq`. The result is written like that of `reconstruct`: values on the grid into `layer.weight`,
with the calibrated scale for good. GPTQ is greedy: a row of a weight that comes out worse than by rounding to
nearest is rounded to nearest.

Batch norms are corrected for what quantization changed, as in `lq_plugin.ptq.batch_norm.correct`: the float model's
statistics are taken first, as its weights are gone afterwards; while Hessians are summed each batch is corrected by its
own; at last the running statistics get the difference over all batches.

Reference: Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", ICLR 2023 (arXiv 2210.17323).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lq_plugin.errors import CalibrationError, QuantizationError, raise_all
from lq_plugin.functional.gptq import gptq_quantize, output_errors
from lq_plugin.functional.grouping import blocks, unblocks
from lq_plugin.layers import COMPUTED, CompoundWeight, QuantizedLayer, weight_is_computed
from lq_plugin.model.calibrate import evaluating, float_forward
from lq_plugin.model.graph.record import Recording, record, without_compile
from lq_plugin.model.prepare import quantized_layers
from lq_plugin.model.ranks import gathered
from lq_plugin.ptq.batch_norm.correct import OutputWatch as Watch, apply_correction as apply_watches
from lq_plugin.ptq.batch_norm.fold import sharing_fault
from lq_plugin.ptq.batch_norm.reestimate import MomentPool, ReestimatedBatchNorms
from lq_plugin.ptq.gptq.hessian import InputHessian, why_no_hessian
from lq_plugin.ptq.layerwise.activation_cache import DEFAULT_CACHE_BYTES, ActivationCache
from lq_plugin.ptq.layerwise.replay import Replay
from lq_plugin.ptq.reconstruction.options import ReconstructOptions
from lq_plugin.ptq.reconstruction.soft_rounding import SoftRounding
from lq_plugin.ptq.reconstruction.soft_unit import Snapshot, SoftUnit
from lq_plugin.ptq.reconstruction.units import Unit, find_units, owner_name


@dataclass(frozen=True)
class GPTQFit:
    """How one layer went.

    Args:
        samples: columns of X that its Hessian was summed over, in this process.
        before, after: ‖(W - Ŵ) X‖² / ‖W X‖², with nearest rounding and now.
        nearest_rows: share of the rows where nearest rounding was better and stays.
        dead: share of the columns whose input was always 0; their weights are 0 now.
    """

    samples: int
    before: float
    after: float
    nearest_rows: float
    dead: float


@dataclass
class GPTQResult:
    """What `gptq` did.

    Args:
        layers: how each layer went, by name, in the order in which they run.
        skipped: quantized layers that kept nearest rounding, and why.
        batch_norms: how far statistics moved; None where they were not to be corrected.
    """

    layers: dict[str, GPTQFit] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    batch_norms: ReestimatedBatchNorms | None = None


def gptq(
    model: nn.Module,
    batches: Iterable[Any],
    run: Callable[[Any], Any] | None = None,
    *,
    dampening: float = 0.01,
    act_order: bool = True,
    block_columns: int = 128,
    correct_batch_norm: bool = True,
    cache_bytes: int = DEFAULT_CACHE_BYTES,
) -> GPTQResult:
    """Round the weights of linear layers and convolutions by GPTQ, in place.

    Everything runs in evaluation mode and without gradients. With several processes the Hessians of all are averaged.

    Args:
        model: prepared and calibrated.
        batches: calibration data, read once and kept in the cache.
        run: runs the model on one batch; `model(batch)` when None.
        dampening: what is added to the Hessian's diagonal, as a share of its mean.
        act_order: columns with larger inputs are rounded first.
        block_columns: columns that are done before the others are updated; it changes the speed alone.
        correct_batch_norm: correct the statistics of batch norms. Do not do it again: it compares with the float model,
            whose weights are gone.
        cache_bytes: memory for batches and activations; what is more goes to disk.

    Raises:
        CalibrationError: no batches, a model without ranges, NaN or Inf in a layer's inputs, or a Hessian that is not
            positive definite, by the layer's name. Nothing is changed then.
        QuantizationError: options that cannot be.

    >>> import lq_plugin
    >>> _ = torch.manual_seed(0)
    >>> net = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    >>> batches = [torch.randn(256, 32) @ torch.randn(32, 32)]
    >>> _ = lq_plugin.prepare(net, "w3 per_channel mse")
    >>> _ = lq_plugin.calibrate(net, batches)
    >>> result = gptq(net, batches)
    >>> [fit.after < fit.before for fit in result.layers.values()]
    [True, True]
    """
    check_options(dampening, act_order, block_columns, correct_batch_norm, cache_bytes)
    options = {"dampening": dampening, "act_order": act_order, "block_columns": block_columns}
    with torch.no_grad(), evaluating(model), without_compile(), ActivationCache(cache_bytes) as cache:
        return _GPTQ(model, run or model, cache, options).round(batches, correct_batch_norm)


def check_options(
    dampening: float = 0.01,
    act_order: bool = True,
    block_columns: int = 128,
    correct_batch_norm: bool = True,
    cache_bytes: int = DEFAULT_CACHE_BYTES,
) -> None:
    """Refuse options that cannot be.

    Raises:
        QuantizationError: naming each.
    """
    faults = [] if dampening >= 0 else [f"dampening must not be negative, got {dampening!r}"]
    faults += [
        f"{name} is an integer from {low}, got {value!r}"
        for name, value, low in (("block_columns", block_columns, 1), ("cache_bytes", cache_bytes, 0))
        if isinstance(value, bool) or not isinstance(value, int) or value < low
    ]
    flags = {"act_order": act_order, "correct_batch_norm": correct_batch_norm}
    faults += [
        f"{name} is true or false, got {value!r}" for name, value in flags.items() if not isinstance(value, bool)
    ]
    raise_all(QuantizationError, "GPTQ", faults)


class _GPTQ:
    def __init__(
        self, model: nn.Module, run: Callable[[Any], Any], cache: ActivationCache, options: dict[str, Any]
    ) -> None:
        self.model, self.run, self.cache, self.options = model, run, cache, options
        self.layers: dict[str, QuantizedLayer] = dict(quantized_layers(model))
        self.count = 0
        self.snapshots: list[Snapshot] = []

    def batch(self, index: int) -> Any:
        return self.cache.get(("batch", index))

    def round(self, batches: Iterable[Any], correct_batch_norm: bool) -> GPTQResult:
        if not self.layers:
            raise CalibrationError("the model has no quantized layers: prepare it first (lq_plugin.prepare)")
        for batch in batches:
            self.cache.put(("batch", self.count), batch)
            self.count += 1
        counts = gathered(self.count)
        if not all(counts):
            where = "" if len(counts) == 1 else f" in the process of rank {counts.index(0)}"
            raise CalibrationError(f"no calibration data: the loader gave 0 batches{where}")
        with float_forward(self.model):
            recording = record(self.model, lambda: self.run(self.batch(0)))
        units, uncalled = find_units(self.model, recording, "layer")
        self._refuse_uncalibrated([name for unit in units for name in unit.layers])
        norms = _BatchNorms(self.model if correct_batch_norm else nn.Identity())
        result = GPTQResult(skipped=dict.fromkeys(uncalled, "no batch reached it"))
        try:
            with norms.attached():
                self._see_float(norms)
                self._round_units(units, recording, norms, result)
                if correct_batch_norm:
                    result.batch_norms = self._correct(norms)
        except BaseException:
            for snapshot in reversed(self.snapshots):
                snapshot.restore()
            raise
        return result

    def _refuse_uncalibrated(self, names: list[str]) -> None:
        found = [
            q
            for name in names
            for q in (self.layers[name].weight_quantizer, self.layers[name].input_quantizer)
            if q is not None
        ]
        faults = [
            f"{q.name} ({q.spec}) has no range yet"
            for q in found
            if q.is_enabled and q.needs_calibration and not q.is_calibrated
        ]
        raise_all(CalibrationError, "GPTQ: calibrate first", faults)

    def _see_float(self, norms: _BatchNorms) -> None:
        for index in range(self.count if norms.watches else 0):
            with float_forward(self.model):
                self.run(self.batch(index))
            norms.end_float_batch()

    def _round_units(self, units: list[Unit], recording: Recording, norms: _BatchNorms, result: GPTQResult) -> None:
        readers = {name: call.name for call in recording.calls for source in call.inputs for name in source.parameters}
        replay = Replay(self.model, self.run, self.cache, "quantized", [name for unit in units for name in unit.layers])
        for unit in units:
            reasons = {name: reason for name in unit.layers if (reason := self._why_not(name, readers)) is not None}
            result.skipped |= reasons
            if not reasons:
                result.layers[unit.name] = self._round_layer(
                    unit.name, replay, norms, len(recording.calls_of(unit.name))
                )
            replay.finish(unit.layers)

    def _why_not(self, name: str, readers: dict[str, str]) -> str | None:
        layer = self.layers[name]
        quantizer = layer.weight_quantizer
        assert quantizer is not None
        if isinstance(layer, CompoundWeight):
            return f"its input is made inside the kernel of {owner_name(self.model, layer)!r} and is not seen"
        if weight_is_computed(layer):
            return COMPUTED
        if not quantizer.spec.is_uniform:
            return f"{quantizer.spec} has no integer levels to choose from"
        if not quantizer.is_enabled:
            return "its weight quantizer is switched off"
        return why_no_hessian(layer) or sharing_fault(self.model, [f"{name}.weight" if name else "weight"], readers)

    def _round_layer(self, name: str, replay: Replay, norms: _BatchNorms, calls: int) -> GPTQFit:
        layer = self.layers[name]
        inputs = InputHessian(layer)
        for index in range(self.count):
            norms.start_quantized_batch(index)
            for args, kwargs in replay.inputs_of(name, index, calls):
                inputs.add(args[0] if args else next(iter(kwargs.values())))
        hessian = inputs.mean_over_ranks()
        quantizer = layer.weight_quantizer
        assert quantizer is not None
        canonical = type(layer).canonical(layer, layer.weight)
        rounding = _Rounding(quantizer, canonical)
        weight, nearest = (
            inputs.to_matrix(canonical.to(hessian.device)),
            inputs.to_matrix(quantizer(canonical).to(hessian)),
        )
        scale, zero_point = (inputs.to_matrix(t.to(hessian.device)) for t in rounding.elementwise_qparams())
        try:
            solved = gptq_quantize(weight, hessian, scale, zero_point, quantizer.spec.grid, **self.options)
        except CalibrationError as error:
            raise CalibrationError(f"GPTQ of {name!r}: {error}") from error
        whole, before, after = (
            output_errors(difference, hessian) for difference in (weight, weight - nearest, weight - solved)
        )
        worse = before < after
        solved = torch.where(worse.unsqueeze(-1), nearest.float(), solved)
        self._write(name, rounding, solved.reshape(canonical.shape).to(canonical.device))
        norm = max(float(whole.sum()), 1e-300)
        dead = float((hessian.diagonal(dim1=-2, dim2=-1) == 0).double().mean())
        rows = float(worse.double().mean())
        return GPTQFit(
            inputs.count, float(before.sum()) / norm, float(torch.minimum(before, after).sum()) / norm, rows, dead
        )

    def _write(self, name: str, rounding: _Rounding, values: Tensor) -> None:
        """Through the unit that `reconstruct` writes with, which checks that the quantizer returns the weight
        unchanged."""
        unit = SoftUnit({name: self.layers[name]}, [], ReconstructOptions(), torch.Generator())
        rounding.values = values
        unit.roundings[name] = rounding
        unit.inputs.clear()
        self.snapshots.append(unit._before)
        unit.harden()

    def _correct(self, norms: _BatchNorms) -> ReestimatedBatchNorms:
        norms.forget_quantized()
        for index in range(self.count if norms.watches else 0):
            norms.start_quantized_batch(index, complete=True)
            self.run(self.batch(index))
        shifts = apply_watches(norms.watches)
        return ReestimatedBatchNorms(
            self.count, shifts, tuple(name for name in norms.watches if name not in shifts), norms.without
        )


class _Rounding(SoftRounding):
    """A rounding that is decided: the values come from the solver."""

    values: Tensor

    def elementwise_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point of each element of the canonical weight."""
        shape = blocks(torch.empty(self.shape, device="meta"), self.granularity).shape
        scale, zero_point = (
            unblocks(t.expand(shape), self.shape, self.granularity) for t in (self.scale, self.zero_point)
        )
        return scale, zero_point

    def rounded(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.values, self.scale.clone(), self.zero_point


class _BatchNorms:
    """Hooks on batch norms that take each quantized batch back to the statistics of the same batch in the float
    model."""

    def __init__(self, model: nn.Module) -> None:
        norms = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
        self.watches = {
            name: Watch(bn) for name, bn in norms.items() if bn.running_mean is not None and bn.running_var is not None
        }
        self.without = tuple(name for name in norms if name not in self.watches)
        #: Float mean and variance of each call, by batch and name.
        self.floats: list[dict[str, list[tuple[Tensor, Tensor]]]] = []
        self.active: set[str] = set(self.watches)

    @contextmanager
    def attached(self) -> Iterator[None]:
        with ExitStack() as hooks:
            for name, watch in self.watches.items():
                hooks.callback(watch.bn.register_forward_pre_hook(self._hook(name, watch), with_kwargs=True).remove)
            yield

    def _hook(self, name: str, watch: Watch) -> Callable[..., Any]:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return watch(module, args, kwargs) if name in self.active else (args, kwargs)

        return hook

    def end_float_batch(self) -> None:
        """What was seen since the last one is a batch of the float model."""
        self.floats.append({name: watch.calls for name, watch in self.watches.items()})
        for watch in self.watches.values():
            watch.calls = []

    def start_quantized_batch(self, index: int, complete: bool = False) -> None:
        """A run on batch number `index` comes; one that is not `complete` skips what is done."""
        for name, watch in self.watches.items():
            watch.calls, watch.correcting = list(self.floats[index][name]), True
        # Which of several calls are skipped is not known.
        self.active = {name for name in self.watches if complete or len(self.floats[index][name]) == 1}

    def forget_quantized(self) -> None:
        """Drop the statistics of quantized runs so far."""
        for watch in self.watches.values():
            watch.quantized_pool = MomentPool()
