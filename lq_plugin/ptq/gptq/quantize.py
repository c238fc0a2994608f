"""GPTQ and GPTAQ over a model, layer after layer, on inputs made by the quantized layers before.

Lifecycle: batches go into a cache; for each layer in the order in which they run, the Hessian of its inputs is summed
over the batches, the weight is solved for (`lq_plugin.functional.gptq`), and its values on the grid are written into
`layer.weight`, with the calibrated scale for good. Linear layers next to each other that read one tensor (queries, keys
and values) share the Hessian and its factor. The weights from before wait on disk: an error puts every weight back.
GPTQ is greedy: a row of a weight that comes out worse than by rounding to nearest is rounded to nearest. Beside the
model there are at most two Hessians at a time, float64, and the rows that are being solved for.

GPTAQ (`asymmetric`) takes the float model's inputs of every layer first, one pass that fills the cache, and rounds a
weight that makes up for what quantization has changed in the inputs (`lq_plugin.functional.gptaq`). With `sweeps` codes
and scales are then gone through again, each made the best one (`lq_plugin.functional.coordinate_descent`), with the
Hessian held twice more.

Batch norms are corrected for what quantization changed, as in `lq_plugin.ptq.batch_norm.correct`: the float model's
statistics are taken first, as its weights are gone afterwards; while Hessians are summed each batch is corrected by its
own; at last the running statistics get the difference over all batches.

Reference: Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", ICLR 2023 (arXiv 2210.17323).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lq_plugin.errors import CalibrationError, QuantizationError, raise_all
from lq_plugin.functional.gptaq import asymmetric_target
from lq_plugin.functional.gptq import damped_hessian, factorize, in_order, output_errors, refuse_non_finite, round_rows
from lq_plugin.layers import CompoundWeight, UnseenExpertsError, current_weight_quantizer, weight_key
from lq_plugin.model.calibrate import evaluating, float_forward
from lq_plugin.model.graph.record import without_compile
from lq_plugin.ptq.batch_norm.correct import OutputWatch as Watch, apply_correction as apply_watches
from lq_plugin.ptq.batch_norm.reestimate import MomentPool, ReestimatedBatchNorms
from lq_plugin.ptq.gptq.float_inputs import FloatInputs
from lq_plugin.ptq.gptq.hessian import InputHessian, why_no_hessian
from lq_plugin.ptq.gptq.problem import Problem
from lq_plugin.ptq.layerwise.activation_cache import DEFAULT_CACHE_BYTES, ActivationCache
from lq_plugin.ptq.layerwise.replay import Replay
from lq_plugin.ptq.layerwise.walk import UnitWalk
from lq_plugin.ptq.layerwise.write import Snapshot, rounding_fault
from lq_plugin.ptq.own_parameters import sharing_fault
from lq_plugin.ptq.reconstruction.units import Unit, owner_name
from lq_plugin.quantizers import WeightQuantizer
from lq_plugin.utilities import hooks
from lq_plugin.utilities.moved import former_names

__getattr__ = former_names(__name__)

#: Dampening from which on products of inputs may be rounded to float32.
_ROUNDED_FROM = 1e-3


@dataclass(frozen=True)
class RoundedLayer:
    """The error of one layer before and after.

    Args:
        samples: columns of X that its Hessian was summed over, in this process.
        before, after: ‖(W - Ŵ) X‖² / ‖W X‖², with nearest rounding and now; of GPTAQ's W* instead of W.
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
    """The result of `gptq`.

    Args:
        layers: how each layer went, by name, in the order in which they run.
        skipped: quantized layers that kept nearest rounding, and why.
        batch_norms: how far statistics moved; None where they were not to be corrected.
    """

    layers: dict[str, RoundedLayer] = field(default_factory=dict)
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
    asymmetric: bool = False,
    sweeps: int = 0,
) -> GPTQResult:
    """Rounds the weights of linear layers and convolutions by GPTQ, in place.

    Everything runs in evaluation mode and without gradients. With several processes the Hessians of all are averaged.

    Args:
        model: prepared and calibrated.
        batches: calibration data, read once and kept in the cache.
        run: runs the model on one batch; `model(batch)` when None.
        dampening: what is added to the Hessian's diagonal, as a share of its mean.
        act_order: columns with larger inputs are rounded first.
        block_columns: columns that are rounded before the others are updated; it changes the speed alone.
        correct_batch_norm: correct the statistics of batch norms. Do not do it again: it compares with the float model,
            whose weights are gone.
        cache_bytes: memory for batches and activations; what is more goes to disk. The former weights, which come back
            after an error, are on disk meanwhile, in the folder for temporary files (`TMPDIR`).
        asymmetric: keep what each layer computes in the float model, from the float model's inputs (GPTAQ), and not
            what its float weight makes of the inputs that the quantized layers in front give.
        sweeps: how often codes and scales are gone through again afterwards, each made the best one for the inputs.

    Raises:
        CalibrationError: no batches, a model without ranges, NaN or Inf in a layer's inputs, or a Hessian that is not
            positive definite, by the layer's name. Nothing is changed then.
        QuantizationError: impossible options.

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
    check_options(dampening, act_order, block_columns, correct_batch_norm, cache_bytes, asymmetric, sweeps)
    options = {"dampening": dampening, "act_order": act_order, "block_columns": block_columns, "sweeps": sweeps}
    with torch.no_grad(), evaluating(model), without_compile(), ActivationCache(cache_bytes) as cache:
        walk = UnitWalk(model, batches, run or model, cache, "layer")
        return _GPTQ(walk, options, asymmetric).round(correct_batch_norm)


def check_options(
    dampening: float = 0.01,
    act_order: bool = True,
    block_columns: int = 128,
    correct_batch_norm: bool = True,
    cache_bytes: int = DEFAULT_CACHE_BYTES,
    asymmetric: bool = False,
    sweeps: int = 0,
) -> None:
    """Refuses impossible options.

    Args:
        dampening, act_order, block_columns, correct_batch_norm, cache_bytes, asymmetric, sweeps: see `gptq`.

    Raises:
        QuantizationError: naming each.
    """
    faults = [] if dampening >= 0 else [f"dampening must not be negative, got {dampening!r}"]
    faults += [
        f"{name} is an integer from {low}, got {value!r}"
        for name, value, low in (
            ("block_columns", block_columns, 1),
            ("cache_bytes", cache_bytes, 0),
            ("sweeps", sweeps, 0),
        )
        if isinstance(value, bool) or not isinstance(value, int) or value < low
    ]
    flags = {"act_order": act_order, "correct_batch_norm": correct_batch_norm, "asymmetric": asymmetric}
    faults += [
        f"{name} is true or false, got {value!r}" for name, value in flags.items() if not isinstance(value, bool)
    ]
    raise_all(QuantizationError, "GPTQ", faults)


class _GPTQ:
    def __init__(self, walk: UnitWalk, options: dict[str, Any], asymmetric: bool) -> None:
        self.walk, self.options, self.asymmetric = walk, options, asymmetric
        self.model, self.layers = walk.model, walk.layers
        self.snapshots: list[Snapshot] = []
        #: Quantizers that would return the weights as they are, and need not be asked in each pass.
        self.settled: list[WeightQuantizer] = []

    def round(self, correct_batch_norm: bool) -> GPTQResult:
        self._refuse_uncalibrated()
        norms = _BatchNorms(self.model if correct_batch_norm else nn.Identity())
        result = GPTQResult(skipped=dict(self.walk.skipped) | self._refused())
        chosen = [name for unit in self.walk.units for name in unit.layers if name not in result.skipped]
        floats = FloatInputs(self.model, chosen, self.walk.cache) if self.asymmetric else None
        try:
            with norms.attached():
                self._see_float(norms, floats)
                self._round_units(norms, floats, result)
                if correct_batch_norm:
                    result.batch_norms = self._correct(norms)
        except BaseException:
            for snapshot in reversed(self.snapshots):
                snapshot.restore()
            raise
        finally:
            for quantizer in self.settled:
                quantizer.set_enabled(True)
        return result

    def _refuse_uncalibrated(self) -> None:
        layers = [self.layers[name] for unit in self.walk.units for name in unit.layers]
        held = [q for layer in layers for q in (layer.weight_quantizer, layer.input_quantizer) if q is not None]
        found = [q.current for q in held if q.current is not None]
        faults = [f"{q.name} ({q.spec}) has no range yet" for q in found if q.is_enabled and q.lacks_range]
        raise_all(CalibrationError, "GPTQ: calibrate first", faults)

    def _see_float(self, norms: _BatchNorms, floats: FloatInputs | None) -> None:
        for index in range(self.walk.count if norms.watches or floats is not None else 0):
            with float_forward(self.model), floats.watching(index) if floats is not None else nullcontext():
                self.walk.run(index)
            norms.end_float_batch()

    def _round_units(self, norms: _BatchNorms, floats: FloatInputs | None, result: GPTQResult) -> None:
        replay = self.walk.replay("quantized")
        keys = {unit.name: self._tensor_read(unit, result.skipped, floats) or (unit.name,) for unit in self.walk.units}
        for _, found in groupby(self.walk.units, key=lambda unit: keys[unit.name]):
            units = list(found)
            names = [name for unit in units for name in unit.layers if name not in result.skipped]
            for together in [names] if len(units) > 1 else [[name] for name in names]:
                try:
                    result.layers |= self._round_layers(together, replay, norms, floats)
                except UnseenExpertsError as error:
                    result.skipped[together[0]] = str(error)
            replay.finish([name for unit in units for name in unit.layers])

    def _tensor_read(self, unit: Unit, skipped: dict[str, str], floats: FloatInputs | None) -> tuple[int, int] | None:
        """Returns the tensor that a linear layer reads, as the recorded pass shows it: others may read the same.

        Layers next to each other that do (queries, keys and values; a gate and its partner) have one Hessian, which is
        summed and factorized once. None: the layer is rounded alone.
        """
        name, *others = unit.layers
        layer, calls = self.layers[name], self.walk.recording.calls_of(name)
        alone = bool(others) or floats is not None or name in skipped or layer.input_quantizer is not None
        if alone or not isinstance(layer, nn.Linear) or len(calls) != 1:
            return None
        source = calls[0].inputs[0]
        return None if source.producer is None or not source.direct else (source.producer, source.output)

    def _refused(self) -> dict[str, str]:
        """Returns the layers that keep nearest rounding, and why."""
        readers = self.walk.recording.parameter_readers
        names = [name for unit in self.walk.units for name in unit.layers]
        return {name: reason for name in names if (reason := self._why_not(name, readers)) is not None}

    def _why_not(self, name: str, readers: dict[str, str]) -> str | None:
        layer = self.layers[name]
        inside = isinstance(layer, CompoundWeight)
        if inside and self.asymmetric:
            return "GPTAQ would need the float model's inputs of each product in its module's code: use GPTQ"
        if isinstance(layer, CompoundWeight) and not layer.shows_input:
            return f"its input is made inside the kernel of {owner_name(self.model, layer)!r} and is not seen"
        if (fault := rounding_fault(layer)) is not None:
            return fault
        quantizer = current_weight_quantizer(layer)
        assert quantizer is not None
        if not quantizer.is_enabled:
            return "its weight quantizer is switched off"
        if inside:
            return sharing_fault(self.model, [weight_key(name, layer)], {})
        return why_no_hessian(layer) or sharing_fault(self.model, [weight_key(name, layer)], readers)

    def _inputs(self, name: str, replay: Replay, norms: _BatchNorms, floats: FloatInputs | None) -> InputHessian:
        # What rounding of a product changes is far below the dampening, unless that is small.
        exact = self.options["dampening"] < _ROUNDED_FROM
        inputs = InputHessian(self.layers[name], floats is not None, exact)
        calls = len(self.walk.recording.calls_of(name))
        if isinstance(layer := self.layers[name], CompoundWeight):
            with layer.watching(inputs.add_rows):
                for index in range(self.walk.count):
                    norms.start_quantized_batch(index)
                    replay.run_through(index)
            return inputs
        for index in range(self.walk.count):
            norms.start_quantized_batch(index)
            for call, (args, kwargs) in enumerate(replay.inputs_of(name, index, calls)):
                x = args[0] if args else next(iter(kwargs.values()))
                inputs.add(x, floats.take(name, index, call, x) if floats is not None else None)
        return inputs

    def _round_layers(
        self, names: list[str], replay: Replay, norms: _BatchNorms, floats: FloatInputs | None
    ) -> dict[str, RoundedLayer]:
        """Rounds layers that multiply one and the same input."""
        inputs = self._inputs(names[0], replay, norms, floats)
        hessian, difference = inputs.mean_over_ranks()
        count, groups = inputs.count, inputs.groups
        del inputs
        problems = [Problem(self.layers[name], groups, hessian.device) for name in names]
        before, whole, targets = [], [], []
        try:
            refuse_non_finite(hessian, *(problem.weight for problem in problems))
            for problem in problems:
                weight = problem.weight
                if difference is not None:
                    weight = asymmetric_target(weight, hessian, difference, self.options["dampening"])
                    targets.append(weight)
                off = weight - problem.nearest().to(weight)
                whole.append(float(output_errors(weight, hessian, torch.float32).sum()))
                before.append(output_errors(off, hessian, torch.float32))
            dead = hessian.diagonal(dim1=-2, dim2=-1) == 0
            unseen = dead.all(-1, keepdim=True)
            ordered = in_order(hessian, self.options["dampening"], self.options["act_order"])
            if not self.options["sweeps"]:
                del hessian  # the factor takes memory enough
            del difference
            factor = factorize(ordered)
        except CalibrationError as error:
            raise CalibrationError(f"GPTQ of {' and '.join(map(repr, names))}: {error}") from error
        fits = {}
        for index, (name, problem) in enumerate(zip(names, problems, strict=True)):
            weight = targets[index] if targets else problem.weight
            solved = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
            after = torch.empty_like(before[index])
            for rows, levels in problem.parts():
                solved[:, rows], after[:, rows] = round_rows(
                    weight[:, rows], factor, levels, self.options["block_columns"]
                )
            # An expert without tokens has no columns to choose by.
            worse = (before[index] < after) | unseen
            if bool(worse.any()):
                solved = torch.where(worse.unsqueeze(-1), problem.nearest().float(), solved)
            was, norm, after = before[index], max(whole[index], 1e-300), torch.minimum(before[index], after)
            if self.options["sweeps"]:
                target = weight.masked_fill((dead & ~unseen).unsqueeze(-2), 0.0)
                damped = damped_hessian(hessian, self.options["dampening"])
                found, scales = problem.descend(target, solved, damped, self.options["sweeps"])
                errors = output_errors(weight - found, hessian, torch.float32)
                # What descends is the dampened error; of inputs that were never seen it has nothing but the dampening.
                better = (errors < after) & ~unseen
                solved, after = torch.where(better.unsqueeze(-1), found, solved), torch.minimum(after, errors)
                worse &= ~better
                if scales is not None:
                    problem.take_scales(scales, better)
            self.snapshots.append(Snapshot({name: self.layers[name]}, cache=self.walk.cache))
            problem.write(solved)
            self._settle(name)
            fits[name] = RoundedLayer(
                count, float(was.sum()) / norm, float(after.sum()) / norm,
                float(worse.double().mean()), float(dead.double().mean()),
            )  # fmt: skip
        return fits

    def _settle(self, name: str) -> None:
        """Switches off the quantizer of a weight that is written on its levels, until the end."""
        quantizer = current_weight_quantizer(self.layers[name])
        assert quantizer is not None
        quantizer.set_enabled(False)
        self.settled.append(quantizer)

    def _correct(self, norms: _BatchNorms) -> ReestimatedBatchNorms:
        norms.forget_quantized()
        for index in range(self.walk.count if norms.watches else 0):
            norms.start_quantized_batch(index, complete=True)
            self.walk.run(index)
        shifts = apply_watches(norms.watches)
        return ReestimatedBatchNorms(
            self.walk.count, shifts, tuple(name for name in norms.watches if name not in shifts), norms.without
        )


class _BatchNorms:
    """Hooks on batch norms that correct each quantized batch by the same batch of the float model."""

    def __init__(self, model: nn.Module) -> None:
        norms = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
        self.watches = {
            name: Watch(name, bn)
            for name, bn in norms.items()
            if bn.running_mean is not None and bn.running_var is not None
        }
        self.without = tuple(name for name in norms if name not in self.watches)
        #: Float mean and variance of each call, by batch and name.
        self.floats: list[dict[str, list[tuple[Tensor, Tensor]]]] = []
        self.active: set[str] = set(self.watches)

    @contextmanager
    def attached(self) -> Iterator[None]:
        with ExitStack() as stack:
            for name, watch in self.watches.items():
                stack.callback(hooks.before(watch.bn, self._hook(name, watch), with_kwargs=True).remove)
            yield

    def _hook(self, name: str, watch: Watch) -> Callable[..., Any]:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return watch(module, args, kwargs) if name in self.active else (args, kwargs)

        return hook

    def end_float_batch(self) -> None:
        """Keeps what was measured since the last call as one batch of the float model."""
        self.floats.append({name: watch.calls for name, watch in self.watches.items()})
        for watch in self.watches.values():
            watch.calls = []

    def start_quantized_batch(self, index: int, complete: bool = False) -> None:
        """Gets ready for a quantized run on batch number `index`; one that is not `complete` skips finished layers."""
        for name, watch in self.watches.items():
            watch.calls, watch.correcting = list(self.floats[index][name]), True
        # Which of several calls are skipped is not known.
        self.active = {name for name in self.watches if complete or len(self.floats[index][name]) == 1}

    def forget_quantized(self) -> None:
        """Drops the statistics of quantized runs so far."""
        for watch in self.watches.values():
            watch.quantized_pool = MomentPool()
