"""Rungs of fidelity: ways to evaluate a plan, from cheap to expensive.

    fidelity: [{batches: 4}, {}, {reconstruct: {iterations: 100}}, {qat: {max_epochs: 1}}]

PTQ on the first batches of the validation data, PTQ on all of it, PTQ with learned rounding, and a short QAT.
"""

from __future__ import annotations

import copy
import inspect
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lq_plugin.callbacks import QAT
from lq_plugin.callbacks.trainer.data import seeded
from lq_plugin.errors import QuantizationError, did_you_mean, is_integer, name_faults, raise_all
from lq_plugin.intent.plan import LayerPlan, QuantPlan
from lq_plugin.ptq.phases import check_phases, names_and_options, run_phase
from lq_plugin.search.evaluation.calibration import OnCalibrationData
from lq_plugin.search.evaluation.evaluator import QUIET, Evaluator
from lq_plugin.search.evaluation.setup_once import without_memory
from lq_plugin.search.shared.interrupt import interrupts_kept
from lq_plugin.search.space.model_space import as_plan
from lq_plugin.utilities.lightning_packages import LOGGERS, any_package, either, logged, package_of
from lq_plugin.utilities.moved import former_names

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

#: Options of a `qat` rung that `QAT` takes; those of the Trainer are all others.
_QAT = ("schedule", "init_batches", "distill", "forward")
#: Where a module keeps its learning rate, as Lightning's own tuner looks for it.
_RATES = ("lr", "learning_rate")
#: Options of the Trainer that a rung may not set.
_OURS = (
    "self",
    "callbacks",
    "logger",
    "enable_progress_bar",
    "enable_checkpointing",
    "enable_model_summary",
    "limit_val_batches",
)

__getattr__ = former_names(__name__)


@dataclass(frozen=True)
class Rung:
    """One way to score a plan.

    Args:
        batches: of the validation data, the first ones of each loader; None: all.
        reconstruct: options of the phase of that name, which learns how weights are rounded; None: they are rounded to
            nearest.
        qat: the plan is trained: options of `Trainer` (`max_epochs` or `max_steps` at least), of `QAT` (`schedule`,
            `init_batches`, `distill`, `forward`), and `lr`, which the module's attribute of that name (or
            `learning_rate`) gets.
        promote_within: by how much, in the metric's unit, a trial may be worse here and still climb; None: as the
            search says.

    Raises:
        QuantizationError: listing everything that cannot be.

    >>> print(Rung(batches=4, qat={"max_epochs": 1}))
    batches=4, qat={'max_epochs': 1}
    """

    batches: int | None = None
    reconstruct: Mapping[str, Any] | None = None
    qat: Mapping[str, Any] | None = None
    promote_within: float | None = None

    def __post_init__(self) -> None:
        faults = []
        if self.batches is not None and not is_integer(self.batches, 1):
            faults.append(f"batches is an integer from 1, got {self.batches!r}")
        for name in ("reconstruct", "qat"):
            if not isinstance(getattr(self, name), Mapping | None):
                faults.append(f"{name} is a mapping of options, got {getattr(self, name)!r}")
        if self.reconstruct is not None and self.qat is not None:
            faults.append("reconstruct and qat are two rungs: QAT trains the float weights")
        faults += margin_faults(self.promote_within)
        if isinstance(self.qat, Mapping):
            options = inspect.signature(any_package().Trainer.__init__).parameters
            valid = (*(name for name in options if name not in _OURS), *_QAT, "lr")
            faults += [
                f"unknown option {key!r} of qat.{did_you_mean(str(key), valid)}" for key in self.qat if key not in valid
            ]
            if not {"max_epochs", "max_steps"} & set(self.qat):
                faults.append("qat needs max_epochs or max_steps, which say how short it is")
        raise_all(QuantizationError, "rung", faults)

    @classmethod
    def parse(cls, value: Rung | Mapping[str, Any]) -> Rung:
        """Reads a mapping with the fields of a rung; a `Rung` is returned unchanged.

        Raises:
            QuantizationError: see `Rung`; or unknown keys.
        """
        if isinstance(value, Rung):
            return value
        names = [field.name for field in fields(cls)]
        if not isinstance(value, Mapping):
            raise QuantizationError(f"a rung is a mapping of {', '.join(names)}, got {value!r}")
        raise_all(QuantizationError, "rung", name_faults("key", value, names))
        return cls(**{str(key): item for key, item in value.items()})

    def measures(self) -> dict[str, Any]:
        """Returns everything that the metrics depend on as plain values; scores of equal ones can be compared."""
        found = {
            name: getattr(self, name) for name in ("batches", "reconstruct", "qat") if getattr(self, name) is not None
        }
        return dict(json.loads(json.dumps(found, default=str)))

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.measures().items()) or "PTQ"


def parse_rungs(value: Sequence[Rung | Mapping[str, Any]]) -> tuple[Rung, ...]:
    """Reads the rungs of a search, the cheapest first.

    Raises:
        QuantizationError: listing everything that is wrong in them.

    >>> [str(rung) for rung in parse_rungs([{"batches": 2}, {}])]
    ['batches=2', 'PTQ']
    """
    if isinstance(value, str | Mapping) or not isinstance(value, Sequence) or not value:
        raise QuantizationError(f"fidelity is a list of rungs, as in [{{batches: 4}}, {{}}], got {value!r}")
    rungs: list[Rung] = []
    faults: list[str] = []
    for number, entry in enumerate(value):
        try:
            rung = Rung.parse(entry)
        except QuantizationError as error:
            faults.append(f"rung {number}: {str(error).removeprefix('rung: ')}")
            continue
        if rung.measures() in [other.measures() for other in rungs]:
            faults.append(f"rung {number}: '{rung}' is there twice")
        rungs.append(rung)
    raise_all(QuantizationError, "fidelity", faults)
    return tuple(rungs)


def rung_faults(
    rungs: Sequence[Rung], model: LightningModule, phases: Sequence[Any], trainer: Callable[..., Trainer] | None
) -> list[str]:
    """Returns what in the rungs does not fit a project: its PTQ phases, its Trainer or its module.

    Args:
        rungs: of the search.
        model: of the project; nothing but its class and attributes are read.
        phases: of the calibration.
        trainer: makes the Trainer; None: that of the model's package.
    """
    faults = []
    for number, rung in enumerate(rungs):
        try:
            if rung.reconstruct is not None:
                check_phases(*names_and_options([*phases, {"reconstruct": rung.reconstruct}]))
            if rung.qat is not None:
                options = _Training.of(rung.qat)
                QAT("int8", **options.qat)
                with _silent():
                    launcher = (trainer or package_of(model).Trainer)(**QUIET, **options.trainer).strategy.launcher
                if isinstance(launcher, either("strategies.launchers._SubprocessScriptLauncher")):
                    faults.append(
                        f"rung {number}: its strategy would start this search anew for each device; "
                        "use ddp_spawn, ddp_fork or ddp_notebook"
                    )
                if options.rate is not None and not _rates_of(model):
                    faults.append(
                        f"rung {number}: {type(model).__name__} has no attribute {' or '.join(_RATES)} that lr could "
                        "set"
                    )
        # Whatever a Trainer, or a config that makes one, finds wrong is a fault of the setting.
        except Exception as error:
            faults.append(f"rung {number}: {error}")
    return faults


def margin_faults(margin: Any) -> list[str]:
    """Returns what is wrong with a `promote_within`."""
    number = isinstance(margin, int | float) and not isinstance(margin, bool)
    return [] if margin is None or (number and margin >= 0) else [f"promote_within is a number from 0, got {margin!r}"]


def evaluate_at(evaluator: Evaluator, plan: QuantPlan | str | Path | Mapping[str, Any], rung: Rung) -> dict[str, float]:
    """Returns everything that a plan logs at one rung. The evaluator's module is unchanged afterwards, bit for bit.

    Args:
        evaluator: calibrated.
        plan: anything `QuantPlan.parse` reads.
        rung: how it is scored.

    Raises:
        QuantizationError: a plan that does not fit, or that needs statistics the space did not ask for.
    """
    return evaluate_layers_at(evaluator, evaluator.layer_plans(plan), rung)


def evaluate_layers_at(evaluator: Evaluator, layer_plans: Mapping[str, LayerPlan], rung: Rung) -> dict[str, float]:
    """Returns everything that specs, given by layer name, log at one rung.

    Args:
        evaluator: calibrated.
        layer_plans: specs by layer name; layers that are left out stay float.
        rung: how they are scored.
    """
    if rung.qat is not None:
        return _trained(evaluator, layer_plans, rung)
    with evaluator.limited(rung.batches):
        if rung.reconstruct is None:
            return evaluator.evaluate_layers(layer_plans).metrics
        return _with_learned_rounding(evaluator, layer_plans, rung.reconstruct)


def _with_learned_rounding(
    evaluator: Evaluator, layer_plans: Mapping[str, LayerPlan], options: Mapping[str, Any]
) -> dict[str, float]:
    check_phases(*names_and_options(["calibrate", {"reconstruct": options}]))
    evaluator.apply({})
    before = {
        name: tensor.clone()
        for name, tensor in evaluator.model.state_dict().items()
        if isinstance(tensor, torch.Tensor)
    }
    try:
        evaluator.apply(layer_plans)
        # What is learned belongs to this trial: others get the quantizers as they were calibrated.
        for layer in evaluator.layers.values():
            for name, quantizer in list(layer.named_children()):
                if name.endswith("_quantizer"):
                    setattr(layer, name, copy.deepcopy(quantizer))
        reconstruct = OnCalibrationData(
            lambda context: run_phase(context, "reconstruct", options),
            evaluator.calibration_batches,
            evaluator.dataloader,
            evaluator.seed,
        )
        with _silent():
            return evaluator.run(reconstruct)
    finally:
        evaluator.apply({})
        with torch.no_grad():
            for name, tensor in evaluator.model.state_dict().items():
                if name in before:
                    tensor.copy_(before[name])


def _trained(evaluator: Evaluator, layer_plans: Mapping[str, LayerPlan], rung: Rung) -> dict[str, float]:
    """Trains a float copy of the module with the plan, and validates it.

    With several devices their processes end with the fit: what counts is its last validation.
    """
    assert rung.qat is not None
    options = _Training.of(rung.qat)
    module = evaluator.float_copy()
    if options.rate is not None:
        package_of(module).utilities.parsing.lightning_setattr(module, _rates_of(module)[0], options.rate)
    limit = {} if rung.batches is None else {"limit_val_batches": rung.batches}
    with _silent(), seeded(evaluator.seed), interrupts_kept():
        trainer = evaluator.make_trainer(**options.trainer, **limit)
        vars(trainer)["callbacks"].append(QAT(as_plan(layer_plans), dataloader=evaluator.dataloader, **options.qat))
        data = evaluator.datamodule
        if trainer.world_size > 1:
            trainer.fit(module, datamodule=without_memory(data))
        else:
            trainer.fit(module, datamodule=data)
            trainer.validate(module, datamodule=data, verbose=False)
    return logged(trainer)


@dataclass(frozen=True)
class _Training:
    """Options of a `qat` rung, by what takes them."""

    trainer: dict[str, Any]
    qat: dict[str, Any]
    rate: float | None

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> _Training:
        trainer = {str(key): value for key, value in options.items() if key not in (*_QAT, "lr")}
        return cls(trainer, {key: options[key] for key in _QAT if key in options}, options.get("lr"))


def _rates_of(model: LightningModule) -> list[str]:
    return [name for name in _RATES if package_of(model).utilities.parsing.lightning_hasattr(model, name)]


@contextmanager
def _silent() -> Iterator[None]:
    """A context without the messages of a Trainer about devices and layers; warnings are shown."""
    before = [(log, log.level) for log in map(logging.getLogger, LOGGERS)]
    for log, level in before:
        log.setLevel(max(level, logging.WARNING))
    try:
        yield
    finally:
        for log, level in before:
            log.setLevel(level)
