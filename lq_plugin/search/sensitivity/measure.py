"""Sensitivity of each tensor to each of its choices, with everything else float.

Measured on the output of the last layer (`kl`, `sqnr`), the output of the layer itself (`layer_sqnr`) or the loss
(`loss`); computed from gradients of the loss, for weights alone (`fisher`, `first_order`, `hessian`); or learned, all
tensors at once (`learned_step`)::

    kl           KL(softmax z || softmax ẑ), mean over samples: nats
    sqnr         Σ(z - ẑ)² / Σ z², the inverse of the signal to quantization noise ratio of the logits
    layer_sqnr   sqnr of the layer's own output
    loss         loss(ŵ) - loss(w), not below 0
    fisher       ½ Σ E[g²] ΔW², the diagonal of the empirical Fisher matrix: FIT, Zandonati et al., 2022
                 (arXiv 2210.08502)
    first_order  E[(gᵀΔW)²], the mean squared error of the loss by its first-order expansion, which adds up over layers
                 where their errors are uncorrelated: Markovich-Golan et al., 2025 (arXiv 2505.13060)
    hessian      Tr(H) / n · ‖ΔW‖² by Hutchinson's estimator: HAWQ-V2, Dong et al., NeurIPS 2020 (arXiv 1911.03852),
                 eq. 10
    learned_step the step size that a quantizer learns: LIMPQ, Tang et al., ECCV 2022 (arXiv 2203.08368)

z are logits, g is a sample's gradient. All are estimates of one kind: larger is worse, and the harm of a plan is taken
to be their sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lq_plugin.callbacks.trainer.data import calibration_batches
from lq_plugin.callbacks.trainer.steps import as_step, step_runner
from lq_plugin.callbacks.trainer.traces import without_traces
from lq_plugin.errors import CalibrationError, QuantizationError, name_faults, raise_all
from lq_plugin.intent.plan import FLOAT, LayerPlan
from lq_plugin.intent.spec import QuantSpec
from lq_plugin.layers import QuantizedLayer
from lq_plugin.model.calibrate import evaluating, switched
from lq_plugin.model.measure.cost import FLOAT_BITS
from lq_plugin.model.prepare import quantizers
from lq_plugin.search.evaluation.evaluator import Evaluator
from lq_plugin.search.sensitivity.curvature import Values, by_gradients, together
from lq_plugin.search.sensitivity.learned_steps import by_learned_steps
from lq_plugin.search.sensitivity.prefix import PrefixCache
from lq_plugin.search.sensitivity.split import split
from lq_plugin.search.space.model_space import Choice, Unit, bits_of, params_of
from lq_plugin.utilities import csv_text, hooks
from lq_plugin.utilities.lightning_packages import Callback, is_overridden

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

#: Measures from a forward pass for each choice.
FORWARD = ("kl", "sqnr", "layer_sqnr", "loss")
#: Measures from gradients of the float model, for weights.
GRADIENT = ("fisher", "first_order", "hessian")
#: What is learned with all tensors quantized.
LEARNED = "learned_step"
MEASURES = (*FORWARD, *GRADIENT, LEARNED)
#: Stands for the measure that fits the model.
AUTO = "auto"
#: What the other tensors may be meanwhile.
OTHERS = ("float", "widest")
#: Choices of some units, the other tensors being as they were asked to be.
Changes: TypeAlias = tuple[tuple[Unit, Choice], ...]
#: Samples of one forward pass on a CPU: their activations stay in its caches.
_AT_ONCE = 32


@dataclass(frozen=True)
class SensitivityTable:
    """The harm of each choice of each unit by one measure.

    Args:
        measure: its name.
        values: by name of the unit and choice as text; units with one choice are left out.
    """

    measure: str
    values: dict[str, dict[str, float]]

    def rows(self) -> list[dict[str, Any]]:
        """Returns a row for each unit and choice, the unit that suffers most from its worst choice first."""
        return [
            {"unit": name, "choice": choice, self.measure: value}
            for name in self.order
            for choice, value in self.values[name].items()
        ]

    @property
    def order(self) -> list[str]:
        """Returns the names of the units, the one that suffers most from its worst choice first."""
        return sorted(self.values, key=lambda name: -max(self.values[name].values()))

    def by_bits(self) -> dict[str, dict[int, float]]:
        """Returns the harm of the best choice of each bit-width (float: 32), the most sensitive unit first."""
        table: dict[str, dict[int, float]] = {name: {} for name in self.values}
        for name, row in table.items():
            for choice, value in self.values[name].items():
                bits = FLOAT_BITS if choice == FLOAT else QuantSpec.parse(choice).bit_width
                row[bits] = min(value, row.get(bits, value))
        return dict(sorted(table.items(), key=lambda item: -max(item[1].values())))


def to_csv(tables: Sequence[SensitivityTable]) -> str:
    """Returns tables of one space as CSV text: a row for each unit and choice, a column for each measure."""
    rows = [
        {"unit": name, "choice": choice, **{table.measure: table.values[name][choice] for table in tables}}
        for name in tables[0].order
        for choice in tables[0].values[name]
    ]
    return csv_text.to_csv(rows, ["unit", "choice", *(table.measure for table in tables)])


def measure_sensitivity(
    evaluator: Evaluator, measure: str = "auto", batches: int = 2, others: str = "float"
) -> SensitivityTable:
    """Measures every choice of every unit of a calibrated evaluator's space.

    Args:
        evaluator: calibrated.
        measure: one of `MEASURES`; or `"auto"`: kl, sqnr where the last layer has one output, loss where no layer is
            called as a module.
        batches: of calibration data.
        others: `"float"`, or `"widest"`: every other tensor has its choice of most bits, and the harm added to that is
            measured. Gradients are always those of the float model; steps are learned with all tensors quantized.

    Raises:
        QuantizationError: an unknown measure, one that does not fit the space or the module, or one that is not finite.
        CalibrationError: no data.
    """
    return measure_all(evaluator, (measure,), batches, others)[0]


def measure_all(
    evaluator: Evaluator, measures: Sequence[str] = ("auto",), batches: int = 2, others: str = "float"
) -> list[SensitivityTable]:
    """Measures every choice of every unit by several measures, which share forward passes and gradients.

    Args:
        evaluator: calibrated.
        measures: names, or `"auto"`; each is measured once.
        batches: of calibration data that are used.
        others: `"float"` or `"widest"`, see `measure_sensitivity`.
    """
    check_measures(measures, others)
    measures = list(dict.fromkeys(_fitting(evaluator) if name == AUTO else name for name in measures))
    worker = Measurement(evaluator, measures, batches, others)
    evaluator.run(worker)
    for measure, row in worker.harms.items():
        for ((unit, choice),), value in row.items():
            worker.values.setdefault(measure, {}).setdefault(unit.name, {})[str(choice)] = value
    for measure, found in worker.values.items():
        odd = [
            f"{unit}, {choice}" for unit, row in found.items() for choice, value in row.items() if not isfinite(value)
        ]
        if odd:
            raise QuantizationError(
                f"the sensitivity {measure} is not finite for {len(odd)} choices, first of {odd[0]}"
            )
    return [SensitivityTable(measure, worker.values[measure]) for measure in measures]


def check_measures(measures: Sequence[str], others: str) -> None:
    """Refuses measures and states of the other tensors that do not exist.

    Raises:
        QuantizationError: naming every fault.
    """
    faults = name_faults("sensitivity measure", measures, (AUTO, *MEASURES))
    faults += name_faults("others", [others], OTHERS)
    faults += [] if measures else [f"no sensitivity measure; valid: {', '.join(MEASURES)}"]
    raise_all(QuantizationError, "cannot measure", faults)


def _fitting(evaluator: Evaluator) -> str:
    """Returns the measure that `"auto"` selects."""
    assert evaluator.recording is not None
    called = [call.name for call in evaluator.recording.module_calls if call.name in evaluator.layers]
    if not called:
        return "loss"
    last = evaluator.layers[called[-1]]
    return "kl" if type(last).channels(last)[1] > 1 else "sqnr"


class Measurement(Callback):
    """Measures when a validation starts: the Trainer has put everything in its place.

    Args:
        evaluator: calibrated.
        measures: of `MEASURES`.
        batches: of calibration data.
        others: of `OTHERS`.
        changes: what forward passes measure; by default each choice of each unit.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        measures: Sequence[str],
        batches: int,
        others: str,
        changes: Sequence[Changes] | None = None,
    ) -> None:
        self.evaluator, self.batches, self.others = evaluator, batches, others
        self.forward = [name for name in measures if name in FORWARD]
        self.gradient = [name for name in measures if name in GRADIENT]
        self.learned = LEARNED in measures
        assert evaluator.space is not None
        self.space = evaluator.space
        self.units = [unit for unit in self.space.units if len(unit.choices) > 1]
        each: list[Changes] = [((unit, choice),) for unit in self.units for choice in unit.choices]
        self.changes = each if changes is None else changes
        #: Harm by the other measures, by unit and choice.
        self.values: Values = {}
        #: Harm of each change by the measures of forward passes.
        self.harms: dict[str, dict[Changes, float]] = {}

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._refuse()
        with torch.inference_mode(False), torch.no_grad(), evaluating(pl_module), without_traces(pl_module):
            data = list(calibration_batches(trainer, pl_module, self.evaluator.dataloader, self.batches))
            if not data:
                raise CalibrationError("no calibration data: the loader gave 0 batches")
            try:
                if self.gradient:
                    self.values |= by_gradients(
                        self.evaluator, self.units, data, self.gradient, _loss_step(trainer, pl_module)
                    )
                at_once = _AT_ONCE if pl_module.device.type == "cpu" else None
                parts = [part for batch in data for part in (split(batch, at_once) if at_once else [batch])]
                if self.learned:
                    step = _loss_step(trainer, pl_module)
                    self.values[LEARNED] = by_learned_steps(self.evaluator, self.units, pl_module, parts, step)
                if self.forward:
                    run = (
                        _loss_step(trainer, pl_module)
                        if "loss" in self.forward
                        else step_runner(trainer, pl_module, None)
                    )
                    self._by_forward(pl_module, parts, run)
            finally:
                self.evaluator.apply({})

    def _refuse(self) -> None:
        inputs = [unit.name for unit in self.units if unit.slot != "weight"]
        if self.gradient and inputs:
            kind = f"measure {self.gradient[0]!r} is for weights"
            raise QuantizationError(f"{kind}; {', '.join(inputs[:3])} are not: use {', '.join(FORWARD)}")
        called = self._called()
        inner = [name for unit in self.units for name in unit.layers if name not in called]
        if "layer_sqnr" in self.forward and inner:
            kind = "measure 'layer_sqnr' is for layers that are called as modules"
            raise QuantizationError(f"{kind}; {', '.join(inner[:3])} are not: use kl, sqnr or loss")

    def _called(self) -> list[str]:
        """Returns the layers that are called as modules, in the order of their calls."""
        assert self.evaluator.recording is not None
        return [call.name for call in self.evaluator.recording.module_calls if call.name in self.evaluator.layers]

    def _by_forward(self, module: LightningModule, data: list[Any], run: Callable[[Any], Any]) -> None:
        if not (called := self._called()):
            raise QuantizationError(
                f"measure {self.forward[0]!r} compares what the last layer makes; no layer is called as a module"
            )
        head = module.get_submodule(called[-1])
        layers: dict[str, Any] = dict(self.evaluator.layers)
        sums = {(name, changes): _Ratio() for name in self.forward for changes in self.changes}
        # Batch by batch, so that one prefix is held at a time.
        for batch in data:
            cache = PrefixCache(layers)
            self.evaluator.apply(self._plans(()))
            with cache.recording():
                expected = _outputs(head, run, batch)
            for changes in self.changes:
                self.evaluator.apply(self._plans(changes))
                own, changed = _Ratio(), [name for unit, _ in changes for name in unit.layers]
                with cache.replaying(changed), ExitStack() as stack:
                    for name in changed if "layer_sqnr" in self.forward else ():
                        stack.enter_context(_watching(layers[name], own))
                    got = _outputs(head, run, batch)
                for name in self.forward:
                    sums[name, changes].add(own if name == "layer_sqnr" else _FUNCTIONS[name](expected, got))
        for (measure, changes), ratio in sums.items():
            self.harms.setdefault(measure, {})[changes] = ratio.value

    def _plans(self, changes: Changes) -> dict[str, LayerPlan]:
        if self.others == "float":
            return together(changes)
        params = params_of(self.space.units, lambda unit: max(unit.choices, key=bits_of))
        for unit, choice in changes:
            params |= unit.params(choice)
        return self.space.layer_plans(params)


@dataclass
class _Ratio:
    """A quotient of sums over batches."""

    numerator: float = 0.0
    denominator: float = 0.0

    def add(self, other: _Ratio) -> None:
        self.numerator += other.numerator
        self.denominator += other.denominator

    @property
    def value(self) -> float:
        """Its value; below 0 (rounding errors, or a loss that became smaller) it is no harm, 0. NaN stays."""
        value = self.numerator / max(self.denominator, 1e-30)
        return 0.0 if value < 0 else value


@dataclass
class _Outputs:
    logits: list[Tensor]
    result: Any


def _outputs(head: nn.Module, run: Callable[[Any], Any], batch: Any) -> _Outputs:
    """Returns the logits of each call of the last layer, as rows `[samples, classes]`, and the result of the step."""
    found: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        rows = output.movedim(1, -1) if isinstance(module, nn.modules.conv._ConvNd) else output
        found.append(rows.float().reshape(-1, rows.shape[-1]))

    hook = hooks.after(head, keep)
    try:
        result = run(batch)
    finally:
        hook.remove()
    return _Outputs(found, result)


def _watching(layer: QuantizedLayer, into: _Ratio) -> Any:
    """A context in which each call of a layer adds its output's noise and signal, by a float call on its input."""

    def compare(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        with switched(quantizers(module), False):
            expected = module.forward(*args, **kwargs)
        into.add(_noise(_Outputs([expected.float()], None), _Outputs([output.float()], None)))

    stack = ExitStack()
    stack.callback(hooks.after(layer, compare, with_kwargs=True).remove)
    return stack


def _kl(expected: _Outputs, got: _Outputs) -> _Ratio:
    if min(z.shape[-1] for z in expected.logits) < 2:
        raise QuantizationError(
            "measure 'kl' compares probabilities of classes, and the last layer has one output: use sqnr or loss"
        )
    pairs = [(F.log_softmax(z, -1), F.log_softmax(q, -1)) for z, q in zip(expected.logits, got.logits, strict=True)]
    total = sum(float(F.kl_div(q, z, reduction="sum", log_target=True)) for z, q in pairs)
    return _Ratio(total, sum(len(z) for z, _ in pairs))


def _noise(expected: _Outputs, got: _Outputs) -> _Ratio:
    noise = sum(float((z - q).square().sum()) for z, q in zip(expected.logits, got.logits, strict=True))
    return _Ratio(noise, sum(float(z.square().sum()) for z in expected.logits))


def _increase(expected: _Outputs, got: _Outputs) -> _Ratio:
    count = sum(map(len, expected.logits))
    return _Ratio(float(got.result - expected.result) * count, count)


_FUNCTIONS: dict[str, Callable[[_Outputs, _Outputs], _Ratio]] = {"kl": _kl, "sqnr": _noise, "loss": _increase}


def _loss_step(trainer: Trainer, module: LightningModule) -> Callable[[Any], Tensor]:
    """Returns a function from a batch to the loss of `training_step`, in evaluation mode and the right precision."""
    if not is_overridden("training_step", module) or not module.automatic_optimization:
        raise QuantizationError(
            f"{type(module).__name__} has no training_step that returns a loss and leaves optimization to Lightning; "
            "use the measures kl or sqnr"
        )

    own = as_step(trainer, module, "training_step")

    def step(module: LightningModule, batch: Any) -> Tensor:
        given = own(module, batch)
        loss = given["loss"] if isinstance(given, dict) else given
        if not isinstance(loss, Tensor):
            raise QuantizationError(f"{type(module).__name__}.training_step returned {type(loss).__name__}, not a loss")
        return loss

    return step_runner(trainer, module, step)
