"""PTQ: quantize a trained LightningModule with a few batches, then evaluate it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from rich.progress import Progress, TaskID

from lq_plugin.callbacks.base import CalibrationStep, QuantizationCallback
from lq_plugin.callbacks.data import calibration_batches, step_runner, with_progress, without_traces
from lq_plugin.errors import PlanError, did_you_mean
from lq_plugin.model.batch_norm import reestimate_batch_norm
from lq_plugin.model.correct_batch_norm import correct_batch_norm
from lq_plugin.model.fold_batch_norm import FoldedBatchNorms, find_batch_norm_pairs, fold_batch_norm
from lq_plugin.model.prepare import quantizers
from lq_plugin.model.reconstruct import Reconstruction, reconstruct
from lq_plugin.model.reconstruct_options import ReconstructOptions
from lq_plugin.plan import QuantPlan

PhaseFunction = Callable[["PTQ", Trainer, LightningModule], None]
#: What PTQ can do with a model, by name; `register_phase` adds to it.
PHASES: dict[str, PhaseFunction] = {}
_CHECKS: dict[str, Callable[..., Any]] = {}


def register_phase(name: str, options: Callable[..., Any] | None = None) -> Callable[[PhaseFunction], PhaseFunction]:
    """Decorator: make a function of `(ptq, trainer, pl_module)` usable in `PTQ(phases=[...])`.

    Args:
        name: of the phase.
        options: called with the options that a user gives (`{name: {...}}`), to refuse impossible ones at once; the
            function finds them in `ptq.phase_options[name]`. None: it has none.
    """

    def decorate(function: PhaseFunction) -> PhaseFunction:
        PHASES[name] = function
        if options is not None:
            _CHECKS[name] = options
        return function

    return decorate


class PTQ(QuantizationCallback):
    """Calibrates at the start of `trainer.validate`, `test` or `predict`; the loop then reports the quantized model.

    A model that is calibrated already, by an earlier call or from a checkpoint, is used as it is.

    Args:
        plan: a short string (`"w4a8"`), a YAML path, a mapping or a `QuantPlan`.
        calibration_batches: how many batches the ranges come from.
        phases: what to do, in this order: `fold_batch_norm`, `calibrate` (always), `correct_batch_norm` (repairs what
            quantization did to means and variances, worth points below 8 bits), `reestimate_batch_norm` (before folding),
            `reconstruct` (learned rounding, last). One with options is a mapping: `{"reconstruct": {"iterations": 1000}}`.
        recalibrate: run the phases although the model is calibrated.
        min_coverage, dataloader, calibration_step: see `QuantizationCallback`.
    """

    def __init__(
        self,
        plan: QuantPlan | str | Path | Mapping[str, Any],
        calibration_batches: int = 8,
        phases: Sequence[str | Mapping[str, Any]] = ("fold_batch_norm", "calibrate"),
        recalibrate: bool = False,
        min_coverage: float | None = None,
        dataloader: Iterable[Any] | None = None,
        calibration_step: CalibrationStep | None = None,
    ) -> None:
        super().__init__(plan, min_coverage, dataloader, calibration_step)
        if not isinstance(calibration_batches, int) or calibration_batches < 1:
            raise PlanError(f"calibration_batches is a number of batches, 1 or more, got {calibration_batches!r}")
        phases, self.phase_options = _names_and_options(phases)
        unknown = [phase for phase in phases if phase not in PHASES]
        if unknown or not phases:
            raise PlanError(f"unknown phases {unknown}; valid: {', '.join(PHASES)}.{did_you_mean(str((unknown or [''])[0]), PHASES)}")
        if "calibrate" not in phases:
            raise PlanError(f"phases {list(phases)} lack 'calibrate': without it there are no ranges")
        for name, options in self.phase_options.items():
            if name not in _CHECKS:
                raise PlanError(f"phase {name!r} has no options, got {options}")
            try:
                _CHECKS[name](**options)
            except (TypeError, ValueError) as error:
                raise PlanError(f"phase {name!r}: {error}") from error
        if "reconstruct" in phases[: phases.index("calibrate")]:
            raise PlanError(f"phases {list(phases)}: put reconstruct after calibrate, it starts from the ranges")
        if "reconstruct" in phases and "correct_batch_norm" in phases[: phases.index("reconstruct")]:
            raise PlanError(
                f"phases {list(phases)}: reconstruct corrects batch norms itself, from the float ones; leave correct_batch_norm out"
            )
        folded = phases.index("fold_batch_norm") if "fold_batch_norm" in phases else len(phases)
        if "reestimate_batch_norm" in phases[folded:]:
            raise PlanError(f"phases {list(phases)}: put reestimate_batch_norm before fold_batch_norm; a folded one has no statistics left")
        self.calibration_batches = calibration_batches
        self.phases = phases
        self.recalibrate = recalibrate
        self.folded: FoldedBatchNorms | None = None
        self.reconstruction: Reconstruction | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            raise PlanError("PTQ quantizes a trained model: use it with trainer.validate, test or predict; for trainer.fit there is QAT")
        super().setup(trainer, pl_module, stage)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.quantize(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.quantize(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.quantize(trainer, pl_module)

    def quantize(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run the phases, unless the model is calibrated already."""
        if not self.recalibrate and all(quantizer.is_calibrated for quantizer in quantizers(pl_module)):
            return
        for phase in self.phases:
            PHASES[phase](self, trainer, pl_module)


def _names_and_options(phases: Sequence[str | Mapping[str, Any]]) -> tuple[tuple[str, ...], dict[str, dict[str, Any]]]:
    names: list[str] = []
    options: dict[str, dict[str, Any]] = {}
    for phase in phases:
        if isinstance(phase, Mapping):
            if len(phase) != 1:
                raise PlanError(f"a phase with options is a mapping of its name to them, got {dict(phase)!r}")
            ((name, value),) = phase.items()
            options[str(name)] = {str(key): item for key, item in (value or {}).items()}
            names.append(str(name))
        else:
            names.append(phase)
    return tuple(names), options


def _reconstruct_options(by: Any = "block", **options: Any) -> ReconstructOptions:
    return ReconstructOptions(**options)


@register_phase("reconstruct", _reconstruct_options)
def _reconstruct(ptq: PTQ, trainer: Trainer, pl_module: LightningModule) -> None:
    options = dict(ptq.phase_options.get("reconstruct", {}))
    by = options.pop("by", "block")
    chosen = ReconstructOptions(**options)
    batches = list(calibration_batches(trainer, pl_module, ptq.dataloader, ptq.calibration_batches))
    shown = trainer.progress_bar_callback is not None and trainer.is_global_zero
    with without_traces(pl_module), Progress(disable=not shown, transient=True) as progress:
        tasks: dict[str, TaskID] = {}

        def on_step(unit: str, iteration: int) -> None:
            if unit not in tasks:
                tasks[unit] = progress.add_task(f"reconstruct {unit}", total=chosen.iterations)
            progress.update(tasks[unit], completed=iteration)

        run = step_runner(trainer, pl_module, ptq.calibration_step)
        ptq.reconstruction = reconstruct(pl_module, batches, run, by, chosen, on_step=on_step)
    for layer, reason in ptq.reconstruction.skipped.items():
        rank_zero_warn(f"PTQ: {layer} keeps nearest rounding: {reason}")
    for unit, fit in ptq.reconstruction.units.items():
        rank_zero_info(
            f"PTQ: reconstructed {unit}: error {fit.before:.3g} -> {fit.after:.3g} of the variation, {fit.iterations} iterations, "
            f"{fit.undecided:.1%} undecided{'' if fit.kept else '; nearest rounding was better and stays'}"
        )


@register_phase("calibrate")
def _calibrate(ptq: PTQ, trainer: Trainer, pl_module: LightningModule) -> None:
    ptq.calibrate(trainer, pl_module, ptq.calibration_batches)


@register_phase("fold_batch_norm")
def _fold_batch_norm(ptq: PTQ, trainer: Trainer, pl_module: LightningModule) -> None:
    pairs, refused = find_batch_norm_pairs(pl_module, ptq.record(trainer, pl_module))
    for refusal in refused:
        rank_zero_info(f"PTQ: batch norm not folded: {refusal}")
    ptq.folded = fold_batch_norm(pl_module, pairs)
    for pair in pairs:
        ptq.ledger[pair.batch_norm].reason = f"folded into {pair.producer}"


@register_phase("reestimate_batch_norm")
def _reestimate_batch_norm(ptq: PTQ, trainer: Trainer, pl_module: LightningModule) -> None:
    batches = calibration_batches(trainer, pl_module, ptq.dataloader, ptq.calibration_batches)
    batches = with_progress(trainer, "re-estimate batch norm", batches, ptq.calibration_batches)
    with without_traces(pl_module):
        reestimate_batch_norm(pl_module, batches, step_runner(trainer, pl_module, ptq.calibration_step))


@register_phase("correct_batch_norm")
def _correct_batch_norm(ptq: PTQ, trainer: Trainer, pl_module: LightningModule) -> None:
    batches = calibration_batches(trainer, pl_module, ptq.dataloader, ptq.calibration_batches)
    batches = with_progress(trainer, "correct batch norm", batches, ptq.calibration_batches)
    with without_traces(pl_module):
        correct_batch_norm(pl_module, batches, step_runner(trainer, pl_module, ptq.calibration_step))
