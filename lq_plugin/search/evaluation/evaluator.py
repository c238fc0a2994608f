"""Scores many plans on one loaded model, which is calibrated once; between plans only its quantizers are exchanged.

    with Evaluator(model, datamodule) as evaluator:
        evaluator.calibrate(space)
        evaluator.evaluate("plan.yaml").metrics["val/acc"]

What `evaluate` reports is what `Trainer.validate` reports with `PTQ(plan)` and the same calibration
data, exactly: it is the Trainer's own validation loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from lq_plugin.callbacks import PTQ
from lq_plugin.callbacks.trainer.traces import KeepState, SilentLogger
from lq_plugin.errors import CalibrationError, PlanError
from lq_plugin.intent.formats import SLOTS
from lq_plugin.intent.plan import LayerPlan, QuantPlan
from lq_plugin.intent.spec import Granularity, PerChannel, PerTensor, QuantSpec
from lq_plugin.layers import QuantizedLayer, attach_quantizers
from lq_plugin.model.copies import copy_model
from lq_plugin.model.digest import digest
from lq_plugin.model.graph.record import Recording
from lq_plugin.model.measure.activation_memory import ActivationMemory
from lq_plugin.model.measure.cost import Cost, plan_cost
from lq_plugin.model.prepare import quantized_layers, remove
from lq_plugin.model.survey import Survey
from lq_plugin.ptq.phases import PhaseContext, check_phases, names_and_options
from lq_plugin.quantizers import ActivationQuantizer, Quantizer
from lq_plugin.ranges import Sample
from lq_plugin.search.evaluation.calibration import Calibration, OnCalibrationData
from lq_plugin.search.evaluation.costs import ACTIVATION_MEMORY, LATENCY, cost_totals
from lq_plugin.search.evaluation.setup_once import SetUpOnce
from lq_plugin.search.shared.interrupt import interrupts_kept
from lq_plugin.search.space.model_space import ModelSpace, as_plan
from lq_plugin.search.space.space import Space
from lq_plugin.utilities.lightning_packages import logged, package_of

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

#: Options of a Trainer that shows, logs and keeps nothing.
QUIET: dict[str, Any] = {
    "logger": False,
    "callbacks": None,
    "enable_progress_bar": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
}


@dataclass(frozen=True)
class Evaluation:
    """The score of one plan.

    Args:
        metrics: everything the validation logged.
        cost: of the plan.
        seconds: that the evaluation took.
    """

    metrics: dict[str, float]
    cost: Cost
    seconds: float


class Evaluator:
    """Evaluates plans on a LightningModule that is loaded and calibrated once.

    `close` (or leaving the `with` block) takes the quantizers out and undoes batch norm folding: the
    float weights are back, bit for bit.

    Args:
        model: trained; nothing of it is changed in the end.
        datamodule: gives validation and calibration data; None where the module has its own loaders.
        trainer: makes the Trainer: a class or function that takes `Trainer`'s keywords; None: that of the model's
            package. One device.
        calibration_batches, phases, dataloader: of the calibration, see `PTQ`.
        seed: of the calibration data's order: every process that asks for the same gets the same statistics.
        target: name of the export target that plans are for; spaces have the choices that its files can hold.
    """

    def __init__(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        *,
        trainer: Callable[..., Trainer] | None = None,
        calibration_batches: int = 8,
        phases: Sequence[str | Mapping[str, Any]] = ("fold_batch_norm", "calibrate"),
        dataloader: Iterable[Any] | None = None,
        seed: int = 0,
        target: str | None = None,
    ) -> None:
        self.model = model
        self.target = target
        self.datamodule = datamodule
        self.calibration_batches = calibration_batches
        check_phases(*names_and_options(phases))
        self.phases = tuple(phases)
        self.dataloader = dataloader
        self.seed = seed
        self._make_trainer = trainer or package_of(model).Trainer
        self.trainer = self.make_trainer()
        if self.trainer.world_size > 1:
            raise PlanError(
                f"a search evaluates on one device, this Trainer has {self.trainer.world_size}: run several workers "
                "instead"
            )
        self.float_metrics: dict[str, float] = {}
        self.weights = ""
        self.space: ModelSpace | None = None
        self.recording: Recording | None = None
        #: Milliseconds of a plan, see `lq_plugin.search.study.latency`.
        self.latency: Callable[[Mapping[str, LayerPlan]], float] | None = None
        #: Batches of a validation, of the longest loader.
        self.batches: float = 0
        #: The same of each loader.
        self.loader_batches: tuple[float, ...] = ()
        self._float_state: dict[str, torch.Tensor] = {}
        self._samples: dict[tuple[str, Granularity], Sample] = {}
        self._quantizers: dict[tuple[str, str, QuantSpec], Quantizer] = {}
        self._layers: dict[str, QuantizedLayer] = {}
        self._survey: Survey | None = None
        #: Of activations, of one pass through the model.
        self.memory: ActivationMemory | None = None
        #: A trial's plan is priced when it is proposed; until it is evaluated few others are.
        self._price = lru_cache(maxsize=64)(self._plan_cost)
        self._data = SetUpOnce(datamodule)

    def __enter__(self) -> Evaluator:
        self._data.open()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def make_trainer(self, **options: Any) -> Trainer:
        """Returns a Trainer that shows, logs and keeps nothing."""
        trainer = self._make_trainer(**QUIET, **options)
        trainer.logger = SilentLogger()  # a step that calls its logger finds one
        return trainer

    def float_copy(self) -> LightningModule:
        """Returns a copy of the module with its float weights and batch norms, without quantizers and Trainer."""
        self._calibrated()
        copied = copy_model(self.model)
        remove(copied)
        with torch.no_grad():
            self._make_float(copied)
        return copied

    def _make_float(self, model: LightningModule) -> None:
        for name, tensor in model.state_dict().items():
            if name in self._float_state:
                tensor.copy_(self._float_state[name])

    def close(self) -> None:
        """Restores the float model."""
        remove(self.model)
        with torch.inference_mode(False), torch.no_grad():
            self._make_float(self.model)
        self._float_state.clear()
        self._quantizers.clear()
        self._layers.clear()
        self._survey = None
        self._price.cache_clear()
        self._data.close()

    def calibrate(self, space: Space | Mapping[str, Any]) -> ModelSpace:
        """Validates the float model, folds what can be folded, and gathers the statistics that `space` may need.

        One pass over the calibration data; a second one only for activations that may be quantized
        both per tensor and per channel.

        Raises:
            QuantizationError: a space that does not fit the model, or no calibration data.
        """
        self.float_metrics = self.validate()
        loop: Any = self.trainer.validate_loop
        self.loader_batches = tuple(loop.max_batches)
        self.batches = max(self.loader_batches, default=0)
        self._float_state = {
            name: tensor.clone() for name, tensor in self.model.state_dict().items() if isinstance(tensor, torch.Tensor)
        }
        self.weights = digest(self._float_state.items())
        # After a validation: only now has `configure_model` built every layer.
        survey = Survey.of(self.model)
        space = Space.parse(space)
        recording = self._recorded() if space.ties_residuals else None
        modules = dict(self.model.named_modules())
        self.space = space.bind(survey.infos(), survey.others(), recording, self.target, modules)
        for plan in _statistics_plans(self.space):
            remove(self.model)
            first = self.recording is None
            ptq = Calibration(
                plan,
                self.calibration_batches,
                self.phases if first else ("calibrate",),
                dataloader=self.dataloader,
                seed=self.seed,
            )
            self.run(ptq)
            self.recording = self.recording or ptq.recording
            self.memory = None if self.recording is None else ActivationMemory(self.recording)
            self._keep_samples(ptq)
        self._layers = dict(quantized_layers(self.model))
        self._survey = Survey.of(self.model)
        self._price.cache_clear()
        return self.space

    def _recorded(self) -> Recording:
        """Returns what the float model does with one batch."""
        recorder = OnCalibrationData(PhaseContext.record, 1, self.dataloader, self.seed)
        with self.limited(1):
            self.run(recorder)
        return cast(Recording, recorder.result)

    def run(self, callback: Callback) -> dict[str, float]:
        """Validates with one more callback, and returns what was logged."""
        callbacks: list[Any] = vars(self.trainer)["callbacks"]
        callbacks.append(callback)
        try:
            return self.validate()
        finally:
            callbacks.remove(callback)

    @contextmanager
    def limited(self, batches: int | None) -> Iterator[None]:
        """A context in which a validation reads at most `batches` batches of each loader; None: as many as outside."""
        before = vars(self.trainer)["limit_val_batches"]
        if batches is not None:
            vars(self.trainer)["limit_val_batches"] = min(batches, self.batches)
        try:
            yield
        finally:
            vars(self.trainer)["limit_val_batches"] = before

    @property
    def layers(self) -> dict[str, QuantizedLayer]:
        """The layers that can hold quantizers, by name."""
        self._calibrated()
        return self._layers

    def _keep_samples(self, ptq: PTQ) -> None:
        for quantizer in (module for module in self.model.modules() if isinstance(module, ActivationQuantizer)):
            histogram = ptq.statistics.get(quantizer.name)
            if histogram is not None and histogram.total.any():
                self._samples.setdefault((quantizer.name, quantizer.spec.granularity), histogram.sample())

    def layer_plans(self, plan: QuantPlan | str | Path | Mapping[str, Any]) -> dict[str, LayerPlan]:
        """Returns the specs that a plan gives to every layer, by its name.

        Raises:
            PlanError: when it does not fit the model.
        """
        space = self._calibrated()
        return QuantPlan.parse(plan).resolve(space.layers, space.others)

    def cost(self, layer_plans: Mapping[str, LayerPlan]) -> Cost:
        """Returns the cost of a plan without evaluating it."""
        self._calibrated()
        return self._price(frozenset(layer_plans.items()))

    def _plan_cost(self, layer_plans: frozenset[tuple[str, LayerPlan]]) -> Cost:
        return plan_cost(self.model, dict(layer_plans), self.recording, self._survey)

    def costs(self, layer_plans: Mapping[str, LayerPlan]) -> dict[str, float]:
        """Returns the totals of a plan by name without evaluating it, with its latency once latency is measured."""
        totals = cost_totals(self.cost(layer_plans))
        if self.memory is not None:
            totals[ACTIVATION_MEMORY] = self.memory.bytes(layer_plans)
        return totals if self.latency is None else totals | {LATENCY: self.latency(layer_plans)}

    def evaluate(self, plan: QuantPlan | str | Path | Mapping[str, Any]) -> Evaluation:
        """Validates the model under a plan.

        Raises:
            QuantizationError: a plan that does not fit, or that needs statistics the space did not ask for.
        """
        return self.evaluate_layers(self.layer_plans(plan))

    def evaluate_layers(self, layer_plans: Mapping[str, LayerPlan]) -> Evaluation:
        """Validates the model under specs that are given by layer name."""
        started = time.perf_counter()
        self.apply(layer_plans)
        metrics = self.validate()
        now = dict(quantized_layers(self.model))
        rebuilt = [name for name, layer in self._layers.items() if now.get(name) is not layer]
        if rebuilt:
            raise PlanError(
                f"{type(self.model).__name__} built {len(rebuilt)} layers anew while validating (first: {rebuilt[0]}), "
                "so they ran float: "
                "build layers in __init__, or only once in setup or configure_model"
            )
        return Evaluation(metrics, self.cost(layer_plans), time.perf_counter() - started)

    def apply(self, layer_plans: Mapping[str, LayerPlan]) -> None:
        """Gives every layer the calibrated quantizers of its specs."""
        self._calibrated()
        outside = [name for name, plan in layer_plans.items() if plan and name not in self._layers]
        if outside:
            raise PlanError(f"layers that the search space keeps float: {', '.join(outside)}")
        for name, layer in self._layers.items():
            plan = layer_plans.get(name, LayerPlan())
            chosen = {
                slot: self._quantizer(name, slot, spec) for slot in SLOTS if (spec := getattr(plan, slot)) is not None
            }
            for slot in SLOTS:
                setattr(layer, f"{slot}_quantizer", chosen.get(slot))

    def _quantizer(self, name: str, slot: str, spec: QuantSpec) -> Quantizer:
        """Returns the calibrated quantizer of one tensor; each (tensor, spec) is estimated once."""
        key = (name, slot, spec)
        layer = self._layers[name]
        if key not in self._quantizers:
            only: dict[str, Any] = {slot: spec}
            attach_quantizers(layer, LayerPlan(**only), name)
            quantizer: Quantizer = getattr(layer, f"{slot}_quantizer")
            if slot == "weight":
                layer.calibrate_weight()
            else:
                sample = self._samples.get((quantizer.name, _statistics_of(spec)))
                if sample is not None:
                    quantizer.load_sample(sample)
                elif quantizer.needs_calibration:
                    raise CalibrationError(
                        f"{quantizer.name}: no statistics for '{spec}': no batch reached it, or it is not in the space"
                    )
            self._quantizers[key] = quantizer
        # A Trainer on a GPU brings the model back to the CPU after each validation, with what it holds then.
        return self._quantizers[key].to(layer.weight.device)

    def _calibrated(self) -> ModelSpace:
        if self.space is None:
            raise CalibrationError("the evaluator is not calibrated: call calibrate(space) first")
        return self.space

    def validate(self) -> dict[str, float]:
        """Validates the model as it is, and returns what was logged; the module's own state is as before."""
        # One trial finds the module as the other did, with all that its steps have counted, kept and cached.
        callbacks, keeper = vars(self.trainer)["callbacks"], KeepState()
        callbacks.insert(0, keeper)
        try:
            with interrupts_kept():
                self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)
        finally:
            callbacks.remove(keeper)
            keeper.close()
        return logged(self.trainer)


def _statistics_plans(space: ModelSpace) -> list[QuantPlan]:
    """Returns plans that together gather every statistic; those after the first cover what a tensor may also be."""
    wanted: dict[str, dict[str, list[QuantSpec]]] = {}
    for unit in space.units:
        kinds = {_statistics_of(spec): spec for spec in unit.choices if isinstance(spec, QuantSpec)}
        for name in unit.layers:
            # One weight spec is enough: weights need no data.
            wanted.setdefault(name, {})[unit.slot] = list(kinds.values())[: 1 if unit.slot == "weight" else None]
    passes = max(len(specs) for slots in wanted.values() for specs in slots.values())
    plans = []
    for index in range(passes):
        chosen = {
            name: {slot: specs[min(index, len(specs) - 1)] for slot, specs in slots.items()}
            for name, slots in wanted.items()
        }
        layers: dict[str, dict[str, Any]] = {
            name: {slot: _plain(spec) for slot, spec in slots.items()} for name, slots in chosen.items()
        }
        plans.append(as_plan({name: LayerPlan(**specs) for name, specs in layers.items()}))
    return plans


def _plain(spec: QuantSpec) -> QuantSpec:
    """Returns a spec that takes the same statistics and is quick to estimate."""
    return QuantSpec(bit_width=8, granularity=_statistics_of(spec))


def _statistics_of(spec: QuantSpec) -> PerChannel | PerTensor:
    """Returns the granularity of an activation's statistics; groups get their scales at run time, from one range."""
    return spec.granularity if isinstance(spec.granularity, PerChannel) else PerTensor()
