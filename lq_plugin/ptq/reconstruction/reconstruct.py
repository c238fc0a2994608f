"""Learned rounding, unit by unit, so that each unit computes what the float unit does.

Lifecycle: batches go into a cache. For each unit in the order in which they run, its inputs come from the quantized
model before it, which is done already; its targets are the outputs of the float unit on float inputs. Roundings
(AdaRound), scales and biases of the unit are trained together, then every weight takes the level it was rounded to.
That level is written into `layer.weight`, and the weight quantizer keeps the scale for good: the ordinary quantizer
returns these weights unchanged.

`method="signround"` tunes offsets and ranges by signed gradients instead (`sign_rounding`).

References: Nagel et al., "Up or Down?", ICML 2020 (arXiv 2004.10568) by layer; Li et al., "BRECQ", ICLR 2021
(arXiv 2102.05426) by block; Wei et al., "QDrop", ICLR 2022 (arXiv 2203.05740) for `drop`; Hubara et al., "Accurate
Post Training Quantization With Small Calibration Sets", ICML 2021 (arXiv 2006.10518) for scales and biases.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map

from lq_plugin.errors import CalibrationError
from lq_plugin.layers import CompoundWeight, weight_key
from lq_plugin.model.calibrate import evaluating, float_forward
from lq_plugin.model.digest import digest
from lq_plugin.model.prepare import quantizers
from lq_plugin.model.ranks import averaged, gathered
from lq_plugin.ptq.batch_norm.correct import OutputWatch as Watch, apply_correction as apply_watches
from lq_plugin.ptq.layerwise.activation_cache import ActivationCache
from lq_plugin.ptq.layerwise.replay import Arguments, Replay
from lq_plugin.ptq.layerwise.walk import UnitWalk
from lq_plugin.ptq.layerwise.write import writable_weights
from lq_plugin.ptq.own_parameters import sharing_fault
from lq_plugin.ptq.reconstruction.learn import UnitResult, learn_rounding, tune_rounding
from lq_plugin.ptq.reconstruction.options import ReconstructOptions
from lq_plugin.ptq.reconstruction.samples import Record, Samples, copied, float_leaves, mixed, renewed
from lq_plugin.ptq.reconstruction.soft_unit import ROUNDINGS, SoftUnit
from lq_plugin.ptq.reconstruction.store import UnitStore
from lq_plugin.ptq.reconstruction.units import Unit, owner_name
from lq_plugin.utilities import hooks


@dataclass
class Reconstruction:
    """The result of `reconstruct`.

    Args:
        units: the result of each unit, by its name.
        skipped: layers that kept nearest rounding, and why.
        layers: those of each unit, by the unit's name.
    """

    units: dict[str, UnitResult] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    layers: dict[str, tuple[str, ...]] = field(default_factory=dict)


def reconstruct(
    model: nn.Module,
    batches: Iterable[Any],
    run: Callable[[Any], Any] | None = None,
    by: str | Sequence[str] = "block",
    options: ReconstructOptions | None = None,
    *,
    on_step: Callable[[str, int], None] | None = None,
    **changes: Any,
) -> Reconstruction:
    """Learns the roundings of a calibrated model, in place.

    With several processes (`torch.distributed`) each brings its own batches; gradients and statistics are averaged, and
    all end with the same model.

    Args:
        model: prepared and calibrated.
        batches: calibration data, read once and kept in the cache.
        run: runs the model on one batch; `model(batch)` when None.
        by: `"block"` (BRECQ), `"layer"` (AdaRound), or patterns of the names of blocks.
        options: of the rounding; `changes` replaces some of its fields.
        on_step: told the unit's name and the iteration after each.

    Returns:
        The error of each unit before and after, the undecided share, and the layers left out.

    Raises:
        CalibrationError: no batches, a model without ranges, NaN or Inf in a unit.
        QuantizationError: impossible options, or patterns that match nothing.
    """
    chosen = replace(options or ReconstructOptions(), **changes)
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        evaluating(model),
        _frozen(model),
        ActivationCache(chosen.cache_bytes) as cache,
    ):
        return _Reconstructor(UnitWalk(model, batches, run or model, cache, by), chosen, on_step).reconstruct()


class _Reconstructor:
    def __init__(self, walk: UnitWalk, options: ReconstructOptions, on_step: Callable[[str, int], None] | None) -> None:
        self.walk, self.options, self.on_step = walk, options, on_step
        self.model, self.layers, self.recording = walk.model, walk.layers, walk.recording
        #: Float values of the parameters and buffers that were changed.
        self.originals: dict[Tensor, Tensor] = {}
        names = [name for unit in walk.units for name in unit.layers]
        #: Why layers keep nearest rounding.
        self.faults = {name: reason for name in names if (reason := self._fault(name)) is not None}

    def reconstruct(self) -> Reconstruction:
        units = self.walk.units
        result = Reconstruction(skipped=dict(self.walk.skipped), layers={str(unit): unit.layers for unit in units})
        store = self._store(units) if self.options.folder is not None else None
        calls = self._count_calls({unit.name for unit in units})
        replays = [self.walk.replay(kind) for kind in ("float", "quantized")]
        for index, unit in enumerate(units):
            result.skipped |= {name: self.faults[name] for name in unit.layers if name in self.faults}
            result.units[str(unit)] = self._restored(unit, index, store) or self._learned(
                unit, index, store, replays, calls[unit.name]
            )
            for replay in replays:
                replay.finish(unit.layers)
        return result

    def _fault(self, name: str) -> str | None:
        """Returns why the rounding of a layer's weight cannot be learned; None when it can."""
        layer = self.layers[name]
        # The module of such a weight is what reads it.
        readers = {} if isinstance(layer, CompoundWeight) else self.recording.parameter_readers
        fault = ROUNDINGS[self.options.method].fault(layer)
        return fault or sharing_fault(self.model, [weight_key(name, layer)], readers)

    def _store(self, units: list[Unit]) -> UnitStore:
        """Returns the store of finished units, for this model, data and options."""
        options = {key: value for key, value in asdict(self.options).items() if key not in ("cache_bytes", "folder")}
        if options["method"] == "adaround":
            del options["method"]  # what earlier versions keep says nothing of it
        specs = {quantizer.name: str(quantizer.spec) for quantizer in quantizers(self.model)}
        leaves = (
            (f"{index}/{i}", t)
            for index in range(self.walk.count)
            for i, t in enumerate(tree_leaves(self.walk.batch(index)))
            if isinstance(t, Tensor)
        )
        run = {
            "options": json.dumps(options),
            "units": json.dumps([str(unit) for unit in units]),
            "specs": json.dumps(specs),
            "weights or ranges": digest(self.model.state_dict().items()),
            "data": " ".join(gathered(digest(leaves))),
        }
        return UnitStore(self.options.folder or "", run)

    def _learned(
        self, unit: Unit, index: int, store: UnitStore | None, replays: Sequence[Replay], calls: int
    ) -> UnitResult:
        """Learns a unit and keeps it in the store."""
        generator = torch.Generator().manual_seed(1_000_003 * self.options.seed + index)
        result = self._unit(unit, replays[0], replays[1], calls, generator)
        if store is not None:
            store.save(index, str(unit), self._changing(unit), result)
        return result

    def _restored(self, unit: Unit, index: int, store: UnitStore | None) -> UnitResult | None:
        """Takes a unit from the store, if it is there."""
        if store is None:
            return None
        self._keep_originals([*writable_weights(self.layers[name] for name in unit.layers), *self._biases(unit)])
        self._keep_originals(
            t for norm in self._batch_norms(unit).values() for t in (norm.running_mean, norm.running_var)
        )
        return store.load(index, str(unit), self._changing(unit))

    def _changing(self, unit: Unit) -> dict[str, nn.Module]:
        """Returns the modules that learning a unit may change."""
        biases = self._biases(unit)
        later = {
            name: m
            for name, m in self.model.named_modules()
            if any(getattr(m, "bias", None) is bias for bias in biases)
        }
        return (
            {name: self.model.get_submodule(name) for name in map(self._owner, unit.layers)}
            | later
            | self._batch_norms(unit)
        )

    def _owner(self, name: str) -> str:
        """Returns the module that holds a layer's weight: the layer, or the LSTM or attention it is part of."""
        return owner_name(self.model, self.layers[name]) or name

    @contextmanager
    def float_state(self) -> Iterator[None]:
        """Computes with the float model inside, with its original weights and biases."""
        now = {parameter: parameter.data for parameter in self.originals}
        for parameter, before in self.originals.items():
            parameter.data = before
        try:
            with float_forward(self.model):
                yield
        finally:
            for parameter, value in now.items():
                parameter.data = value

    def _count_calls(self, names: set[str]) -> dict[str, int]:
        counts = dict.fromkeys(names, 0)

        def count(name: str) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                counts[name] += 1

            return hook

        handles = [hooks.before(self.model.get_submodule(name), count(name)) for name in names]
        try:
            with self.float_state():
                self.walk.run(0)
        finally:
            for handle in handles:
                handle.remove()
        return counts

    def _unit(
        self, unit: Unit, float_replay: Replay, replay: Replay, calls: int, generator: torch.Generator
    ) -> UnitResult:
        module = self.model.get_submodule(unit.name)

        def forward(arguments: Arguments) -> list[Tensor]:
            return float_leaves(unit.finish(self.model, module(*arguments[0], **arguments[1])))

        samples = Samples(self.walk.cache, forward)
        norms = self._batch_norms(unit) if self.options.correct_batch_norm else {}
        watches = {name: Watch(name, norm) for name, norm in norms.items()}
        for batch in range(self.walk.count):
            records = self._records(unit, float_replay, replay, calls, batch, forward, watches)
            with self.float_state():
                # Not under the watches: the first record is tried out, which is no pass of the batch.
                for record in records:
                    samples.add(record)
        self._keep_originals([t for bn in norms.values() for t in (bn.running_mean, bn.running_var)])
        apply_watches(watches)
        samples.merge()
        try:
            return self._learn(unit, samples, forward, generator)
        finally:
            samples.clear()

    def _records(
        self,
        unit: Unit,
        float_replay: Replay,
        replay: Replay,
        calls: int,
        batch: int,
        forward: Callable[[Arguments], list[Tensor]],
        watches: Mapping[str, Watch],
    ) -> list[Record]:
        """Returns inputs and targets of each call of a unit on one batch; watches see it float and quantized."""
        module = self.model.get_submodule(unit.name)
        inputs = replay.inputs_of(unit.name, batch, calls)
        with self.float_state():
            float_inputs = float_replay.inputs_of(unit.name, batch, calls)
        records: list[Record] = []
        with ExitStack() as stack:
            for watch in watches.values():
                stack.callback(hooks.before(watch.bn, watch, with_kwargs=True).remove)
            with self.float_state():
                for call, arguments in enumerate(float_inputs):
                    # Its own copy: the module may write into them.
                    args, kwargs = tree_map(renewed, arguments)
                    output = module(*args, **kwargs)
                    float_replay.keep_output(unit.name, batch, call, output)
                    floats = arguments if self.options.drop else None
                    records.append((inputs[call], floats, float_leaves(unit.finish(self.model, output))))
            if watches:
                for watch in watches.values():
                    watch.correcting = True
                for arguments in inputs:
                    forward(tree_map(copied, arguments))
                for watch in watches.values():
                    watch.finish_batch()
        return records

    def _learn(
        self, unit: Unit, samples: Samples, forward: Callable[[Arguments], list[Tensor]], generator: torch.Generator
    ) -> UnitResult:
        options = self.options
        trial = samples.draw(8 * options.batch_size, generator)

        def error() -> list[float]:
            pairs = zip(forward(tree_map(copied, trial[0])), trial[2], strict=True)
            return averaged([float((y - t).float().square().mean()) for y, t in pairs])

        spread = [max(variance, 1e-20) for variance in averaged([float(t.float().var()) for t in trial[2]])]
        nearest = error()
        if not all(math.isfinite(e) for e in nearest):
            raise CalibrationError(f"reconstruction of {unit}: its quantized or float output holds NaN or Inf")
        norms = [max(e, 1e-9 * s) for e, s in zip(nearest, spread, strict=True)]
        layers = {name: self.layers[name] for name in unit.layers}
        biases = self._biases(unit) if options.bias_learning_rate else []
        self._keep_originals([*writable_weights(layers.values()), *biases])
        soft = SoftUnit(layers, biases, options, generator, spread[0] ** 0.5, self.faults)

        def draw() -> tuple[Callable[[], list[Tensor]], list[Tensor]]:
            inputs, floats, targets = samples.draw(options.batch_size, generator)
            if floats is not None:
                inputs = mixed(inputs, floats, options.drop, generator)
            return (lambda: forward(inputs)), targets

        def step(iteration: int) -> None:
            if self.on_step is not None:
                self.on_step(unit.name, iteration)

        with soft, torch.enable_grad():
            learn = tune_rounding if options.method == "signround" else learn_rounding
            iterations = learn(soft, draw, norms, options, str(unit), step)
        undecided = soft.undecided_share()
        before = soft.harden()
        learned = error()
        kept = sum(e / n for e, n in zip(learned, norms, strict=True)) <= len(norms)
        if not kept:
            before.restore()
        relative = [
            sum(e / s for e, s in zip(errors, spread, strict=True)) / len(spread) for errors in (nearest, learned)
        ]
        return UnitResult(iterations, relative[0], relative[1], undecided, kept)

    def _batch_norms(self, unit: Unit) -> dict[str, _BatchNorm]:
        """Batch norms with running statistics in the unit and its tail, by name."""
        roots = [unit.name, *(call.name for call in unit.tail if call.kind == "module")]
        found = {
            name: module for root in roots for name, module in self.model.get_submodule(root).named_modules(prefix=root)
        }
        return {name: m for name, m in found.items() if isinstance(m, _BatchNorm) and m.running_mean is not None}

    def _keep_originals(self, tensors: Iterable[Tensor | None]) -> None:
        for tensor in tensors:
            if tensor is not None:
                self.originals.setdefault(tensor, tensor.data.clone())

    def _biases(self, unit: Unit) -> list[nn.Parameter]:
        """Returns the bias after each layer's sum: its own, or that of the batch norm which alone reads it."""
        found = []
        for name in unit.layers:
            if isinstance(self.layers[name], CompoundWeight):
                continue
            bias = getattr(self.layers[name], "bias", None)
            readers = self.recording.consumers_of(self.recording.calls_of(name)[0])
            if bias is None and len(readers) == 1 and readers[0].kind == "module":
                norm = self.model.get_submodule(readers[0].name)
                alone = len(self.recording.calls_of(readers[0].name)) == len(self.recording.calls_of(name))
                bias = norm.bias if isinstance(norm, _BatchNorm) and alone else None
            if isinstance(bias, nn.Parameter):
                found.append(bias)
        return found


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Freezes all parameters inside; inference tensors, which cannot be trained through, are copied."""
    asked = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in asked:
        parameter.requires_grad_(False)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_inference():
                module._buffers[name] = buffer.clone()
    try:
        yield
    finally:
        for parameter, before in asked:
            parameter.requires_grad_(before)
