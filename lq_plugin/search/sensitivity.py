"""How much each tensor suffers from each of its choices, with everything else float.

Measured by what comes out of the last layer (`kl`, `sqnr`) or by the loss (`loss`); or computed from gradients of the
loss, for weights alone (`fisher`, `hessian`, `first_order`)::

    kl           KL(softmax z || softmax ẑ), mean over samples: nats
    sqnr         Σ(z - ẑ)² / Σ z², the inverse of the signal to quantization noise ratio of the logits
    loss         loss(ŵ) - loss(w), not below 0
    fisher       ½ Σ g² ΔW², the diagonal of the empirical Fisher matrix: FIT, Zandonati et al., 2022 (arXiv 2210.08502)
    hessian      Tr(H) / n · ‖ΔW‖² by Hutchinson's estimator: HAWQ-V2, Dong et al., NeurIPS 2020 (arXiv 1911.03852)
    first_order  |gᵀΔW| + ½ Σ g² ΔW², gradient and Fisher together (the additive loss error of arXiv 2505.13060)

All are estimates of one kind: larger is worse, and the harm of a plan is taken for the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.nn import functional as F

from lq_plugin.callbacks.data import calibration_batches, step_runner, without_traces
from lq_plugin.errors import CalibrationError, QuantizationError, did_you_mean
from lq_plugin.model.calibrate import evaluating, float_forward
from lq_plugin.plan import LayerPlan
from lq_plugin.search.bound import Unit
from lq_plugin.search.evaluator import Evaluator
from lq_plugin.spec import QuantSpec

#: Measures from a forward pass for each choice.
FORWARD = ("kl", "sqnr", "loss")
#: Measures from gradients of the float model, for weights.
GRADIENT = ("fisher", "hessian", "first_order")
MEASURES = (*FORWARD, *GRADIENT)
#: Random vectors of Hutchinson's estimator.
_PROBES = 16


@dataclass(frozen=True)
class SensitivityTable:
    """What was measured.

    Args:
        measure: its name.
        values: by name of the unit and choice as text; units with one choice are left out.
    """

    measure: str
    values: dict[str, dict[str, float]]

    def rows(self) -> list[dict[str, Any]]:
        """One row for each unit and choice, the most sensitive unit (by its worst choice) first."""
        order = sorted(self.values, key=lambda name: -max(self.values[name].values()))
        return [{"unit": name, "choice": choice, self.measure: value} for name in order for choice, value in self.values[name].items()]


def measure_sensitivity(evaluator: Evaluator, measure: str = "kl", batches: int = 2) -> SensitivityTable:
    """Measure every choice of every unit of a calibrated evaluator's space.

    Args:
        evaluator: calibrated.
        measure: one of `MEASURES`.
        batches: of calibration data.

    Raises:
        QuantizationError: an unknown measure, or one that does not fit the space or the module.
        CalibrationError: no data.
    """
    if measure not in MEASURES:
        raise QuantizationError(f"unknown sensitivity measure {measure!r}; valid: {', '.join(MEASURES)}.{did_you_mean(measure, MEASURES)}")
    worker = _Measurement(evaluator, measure, batches)
    evaluator.run(worker)
    return SensitivityTable(measure, worker.values)


class _Measurement(Callback):
    """Measures where a validation would start: the Trainer has put everything in its place."""

    def __init__(self, evaluator: Evaluator, measure: str, batches: int) -> None:
        self.evaluator, self.measure, self.batches = evaluator, measure, batches
        assert evaluator.space is not None
        self.units = [unit for unit in evaluator.space.units if len(unit.choices) > 1]
        self.values: dict[str, dict[str, float]] = {}

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with torch.inference_mode(False), torch.no_grad(), evaluating(pl_module), without_traces(pl_module):
            data = list(calibration_batches(trainer, pl_module, self.evaluator.dataloader, self.batches))
            if not data:
                raise CalibrationError("no calibration data: the loader gave 0 batches")
            self.evaluator.apply({})
            if self.measure in GRADIENT:
                self._by_gradient(pl_module, data)
            else:
                run = step_runner(trainer, pl_module, None) if self.measure != "loss" else _loss_step(pl_module)
                self._by_forward(pl_module, data, run)

    def _by_forward(self, module: LightningModule, data: list[Any], run: Callable[[Any], Any]) -> None:
        head = module.get_submodule(self._head())
        conv = isinstance(head, nn.modules.conv._ConvNd)

        def outputs() -> list[Tensor]:
            found: list[Tensor] = []
            hook = head.register_forward_hook(lambda m, a, out: found.append(out.float().movedim(1, -1) if conv else out.float()))
            try:
                results = [run(batch) for batch in data]
            finally:
                hook.remove()
            return [result.float() for result in results] if self.measure == "loss" else found

        expected = outputs()
        for unit in self.units:
            self.values[unit.name] = {}
            for choice in unit.choices:
                self.evaluator.apply(_alone(unit, choice))
                self.values[unit.name][str(choice)] = _FUNCTIONS[self.measure](expected, outputs())
        self.evaluator.apply({})

    def _head(self) -> str:
        """The layer that is called last."""
        recording, space = self.evaluator.recording, self.evaluator.space
        assert recording is not None
        assert space is not None
        names = {layer.name for layer in space.layers}
        called = [call.name for call in recording.module_calls if call.name in names]
        if not called:
            raise QuantizationError(f"measure {self.measure!r} compares what the last layer makes, and no layer is called as a module")
        return called[-1]

    def _by_gradient(self, module: LightningModule, data: list[Any]) -> None:
        inputs = [unit.name for unit in self.units if unit.slot != "weight"]
        if inputs:
            raise QuantizationError(f"measure {self.measure!r} is for weights; {', '.join(inputs[:3])} are not: use {', '.join(FORWARD)}")
        layers = self.evaluator.layers
        weights = {name: layers[name].weight for unit in self.units for name in unit.layers}
        loss = _loss_step(module)
        second = self.measure == "hessian"
        square = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        mean = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        trace = dict.fromkeys(weights, 0.0)
        generator = torch.Generator().manual_seed(0)
        with _asking(weights.values()), torch.enable_grad(), float_forward(module):
            for batch in data:
                gradients = torch.autograd.grad(loss(batch), list(weights.values()), create_graph=second)
                for name, gradient in zip(weights, gradients, strict=True):
                    mean[name] += gradient.detach() / len(data)
                    square[name] += gradient.detach().square() / len(data)
                for _ in range(_PROBES if second else 0):
                    signs = [torch.randint(0, 2, g.shape, generator=generator).to(g) * 2 - 1 for g in gradients]
                    products = torch.autograd.grad(gradients, list(weights.values()), signs, retain_graph=True)
                    for name, sign, product in zip(weights, signs, products, strict=True):
                        trace[name] += float((sign * product).sum()) / (_PROBES * len(data))
        for unit in self.units:
            self.values[unit.name] = {}
            for choice in unit.choices:
                self.evaluator.apply(_alone(unit, choice))
                total = 0.0
                for name in unit.layers:
                    layer = layers[name]
                    change = layer.quantized_weight() - layer.weight if isinstance(choice, QuantSpec) else torch.zeros_like(layer.weight)
                    fisher = 0.5 * float((square[name] * change.square()).sum())
                    total += {
                        "fisher": fisher,
                        "first_order": abs(float((mean[name] * change).sum())) + fisher,
                        "hessian": max(trace[name], 0.0) / change.numel() * float(change.square().sum()),
                    }[self.measure]
                self.values[unit.name][str(choice)] = total
        self.evaluator.apply({})


def _alone(unit: Unit, choice: Any) -> dict[str, LayerPlan]:
    specs: dict[str, Any] = {unit.slot: choice}
    return {name: LayerPlan(**specs) for name in unit.layers} if isinstance(choice, QuantSpec) else {}


def _kl(expected: list[Tensor], got: list[Tensor]) -> float:
    pairs = [(F.log_softmax(z, -1).flatten(0, -2), F.log_softmax(q, -1).flatten(0, -2)) for z, q in zip(expected, got, strict=True)]
    total = sum(float(F.kl_div(q, z, reduction="sum", log_target=True)) for z, q in pairs)
    return max(total, 0.0) / sum(len(z) for z, _ in pairs)


def _noise(expected: list[Tensor], got: list[Tensor]) -> float:
    noise = sum(float((z - q).square().sum()) for z, q in zip(expected, got, strict=True))
    return noise / max(sum(float(z.square().sum()) for z in expected), 1e-30)


def _increase(expected: list[Tensor], got: list[Tensor]) -> float:
    return max(sum(float(q - z) for z, q in zip(expected, got, strict=True)) / len(expected), 0.0)


_FUNCTIONS: dict[str, Callable[[list[Tensor], list[Tensor]], float]] = {"kl": _kl, "sqnr": _noise, "loss": _increase}


def _loss_step(module: LightningModule) -> Callable[[Any], Tensor]:
    """A function from a batch to the loss of `training_step`, in evaluation mode."""
    if not is_overridden("training_step", module) or not module.automatic_optimization:
        raise QuantizationError(
            f"{type(module).__name__} has no training_step that returns a loss and leaves optimization to Lightning; "
            "use the measures kl or sqnr"
        )

    def step(batch: Any) -> Tensor:
        given = module.training_step(batch, 0)
        loss = given["loss"] if isinstance(given, dict) else given
        if not isinstance(loss, Tensor):
            raise QuantizationError(f"{type(module).__name__}.training_step returned {type(loss).__name__}, not a loss")
        return loss

    return step


@contextmanager
def _asking(weights: Any) -> Iterator[None]:
    asked = [(weight, weight.requires_grad) for weight in weights]
    for weight, _ in asked:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for weight, before in asked:
            weight.requires_grad_(before)
