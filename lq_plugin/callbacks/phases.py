"""What PTQ can do with a model, phase by phase, and the order that phases need."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from rich.progress import Progress, TaskID

from lq_plugin.callbacks.trainer.data import calibration_batches, with_progress
from lq_plugin.callbacks.trainer.steps import step_runner
from lq_plugin.callbacks.trainer.traces import without_traces
from lq_plugin.errors import PlanError, did_you_mean, raise_all
from lq_plugin.model.calibrate import float_forward
from lq_plugin.model.prepare import quantizers
from lq_plugin.ptq.batch_norm.correct import correct_batch_norm
from lq_plugin.ptq.batch_norm.fold import find_batch_norm_pairs, fold_batch_norm
from lq_plugin.ptq.batch_norm.reestimate import reestimate_batch_norm
from lq_plugin.ptq.bias_correction.correct import bias_correct
from lq_plugin.ptq.equalization.equalize import equalize
from lq_plugin.ptq.gptq.quantize import check_options, gptq
from lq_plugin.ptq.reconstruction.options import ReconstructOptions
from lq_plugin.ptq.reconstruction.reconstruct import reconstruct
from lq_plugin.ptq.smooth_quant.smooth import smooth_quant

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lq_plugin.callbacks.ptq import PTQ

PhaseFunction: TypeAlias = "Callable[[PTQ, Trainer, LightningModule], None]"


@dataclass(frozen=True)
class Phase:
    """One step of PTQ.

    Args:
        run: does it.
        options: called with the options that a user gives (`{name: {...}}`), to refuse impossible ones at once; its
            parameters are all that there are. The function finds them in `ptq.phase_options[name]`. None: it has none.
        after, before: phases that must stand before or behind it where they are used, each with the reason.
        without: phases that cannot be used beside it, each with the reason.
    """

    run: PhaseFunction
    options: Callable[..., Any] | None = None
    after: Mapping[str, str] = field(default_factory=dict)
    before: Mapping[str, str] = field(default_factory=dict)
    without: Mapping[str, str] = field(default_factory=dict)


#: By name; `register_phase` adds to it.
PHASES: dict[str, Phase] = {}


def register_phase(
    name: str,
    options: Callable[..., Any] | None = None,
    *,
    after: Mapping[str, str] | None = None,
    before: Mapping[str, str] | None = None,
    without: Mapping[str, str] | None = None,
) -> Callable[[PhaseFunction], PhaseFunction]:
    """Decorator: make a function of `(ptq, trainer, pl_module)` usable in `PTQ(phases=[...])`; see `Phase`."""

    def decorate(function: PhaseFunction) -> PhaseFunction:
        PHASES[name] = Phase(function, options, after or {}, before or {}, without or {})
        return function

    return decorate


def names_and_options(phases: Sequence[str | Mapping[str, Any]]) -> tuple[tuple[str, ...], dict[str, dict[str, Any]]]:
    """Names of the phases in their order, and the options of those that are written as `{name: {...}}`.

    Raises:
        PlanError: no list, an entry that is neither a name nor a mapping, or a mapping that does not have one key with
            a mapping of options.
    """
    if isinstance(phases, str | Mapping) or not isinstance(phases, Iterable):
        raise PlanError(f"phases are a list, got {phases!r}: write [{phases!r}]; valid: {', '.join(PHASES)}")
    names: list[str] = []
    options: dict[str, dict[str, Any]] = {}
    for phase in phases:
        if isinstance(phase, Mapping):
            if len(phase) != 1:
                raise PlanError(f"a phase with options is a mapping of its name to them, got {dict(phase)!r}")
            ((name, value),) = phase.items()
            if not isinstance(value, Mapping | None):
                raise PlanError(f"phase {name!r}: its options are a mapping of names to values, got {value!r}")
            options[str(name)] = {str(key): item for key, item in (value or {}).items()}
            names.append(str(name))
        elif isinstance(phase, str):
            names.append(phase)
        else:
            raise PlanError(
                f"a phase is a name or a mapping of its name to options, got {phase!r}; valid: {', '.join(PHASES)}"
            )
    return tuple(names), options


def check_phases(phases: Sequence[str], options: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse phases that do not exist, in an order that cannot be, or with options that they do not have.

    Raises:
        PlanError: naming every fault.
    """
    unknown = [phase for phase in phases if phase not in PHASES]
    if unknown or not phases:
        raise PlanError(
            f"unknown phases {unknown}; valid: {', '.join(PHASES)}.{did_you_mean(str((unknown or [''])[0]), PHASES)}"
        )
    faults = [] if "calibrate" in phases else ["they lack 'calibrate': without it there are no ranges"]
    faults += [f"{name} stands there twice" for name in dict.fromkeys(phases) if phases.count(name) > 1]
    for name in dict.fromkeys(phases):
        mine, phase = phases.index(name), PHASES[name]
        faults += [
            f"put {name} after {other}: {why}" for other, why in phase.after.items() if other in phases[mine + 1 :]
        ]
        faults += [f"put {name} before {other}: {why}" for other, why in phase.before.items() if other in phases[:mine]]
        faults += [f"use {name} or {other}, not both: {why}" for other, why in phase.without.items() if other in phases]
    raise_all(PlanError, f"phases {list(phases)}", faults)
    for name, given in options.items():
        checker = PHASES[name].options
        if checker is None:
            raise PlanError(f"phase {name!r} has no options, got {dict(given)}")
        valid = list(inspect.signature(checker).parameters)
        unknown = [option for option in given if option not in valid]
        if unknown:
            near = did_you_mean(unknown[0], valid)
            raise PlanError(
                f"phase {name!r} has no options {', '.join(map(repr, unknown))}; valid: {', '.join(valid)}.{near}"
            )
        try:
            checker(**given)
        except (TypeError, ValueError) as error:
            raise PlanError(f"phase {name!r}: {error}") from error


_RANGES = {"calibrate": "it starts from the ranges"}
_NO_RANGES = {"calibrate": "ranges belong to the weights and activations that they were found for"}
_FLOAT_MODEL = "both measure against the float model, which the first one changes"


@register_phase("fold_batch_norm")
def _fold_batch_norm(ptq: PTQ, trainer: Trainer, pl_module: LightningModule) -> None:
    pairs, refused = find_batch_norm_pairs(pl_module, ptq.record(trainer, pl_module))
    for refusal in refused:
        rank_zero_info(f"PTQ: batch norm not folded: {refusal}")
    ptq.folded = fold_batch_norm(pl_module, pairs)
    for pair in pairs:
        ptq.ledger[pair.batch_norm].reason = f"folded into {pair.producer}"


def _equalize_options(iterations: int = 20) -> None:
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"iterations is a whole number from 1, got {iterations!r}")


@register_phase(
    "equalize",
    _equalize_options,
    before=_NO_RANGES,
    after={"fold_batch_norm": "it goes through folded batch norms, not through others"},
)
def _equalize(ptq: PTQ, trainer: Trainer, pl_module: LightningModule) -> None:
    result = equalize(pl_module, ptq.record(trainer, pl_module), **ptq.phase_options.get("equalize", {}))
    rank_zero_info(
        f"PTQ: equalized {len(result.pairs)} pairs of layers, {result.iterations} iterations, last change "
        f"{result.change:.2g}"
    )
    for refusal in result.refused:
        rank_zero_info(f"PTQ: not equalized: {refusal}")


def _smooth_quant_options(alpha: float = 0.5) -> None:
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 <= alpha <= 1:
        raise ValueError(f"alpha is a share in 0..1, got {alpha!r}")


@register_phase(
    "smooth_quant",
    _smooth_quant_options,
    before=_NO_RANGES,
    after=dict.fromkeys(("fold_batch_norm", "equalize"), "it changes the norms that they go through"),
)
def _smooth_quant(ptq: PTQ, trainer: Trainer, pl_module: LightningModule) -> None:
    options = {"recording": ptq.record(trainer, pl_module)} | ptq.phase_options.get("smooth_quant", {})
    batches = calibration_batches(trainer, pl_module, ptq.dataloader, ptq.calibration_batches)
    batches = with_progress(trainer, "SmoothQuant", batches, ptq.calibration_batches)
    with without_traces(pl_module):
        result = smooth_quant(pl_module, batches, run=step_runner(trainer, pl_module, ptq.calibration_step), **options)
    rank_zero_info(f"PTQ: smoothed the inputs behind {len(result.pairs)} layers")
    for refusal in result.refused:
        rank_zero_info(f"PTQ: not smoothed: {refusal}")


@register_phase("calibrate")
def _calibrate(ptq: PTQ, trainer: Trainer, pl_module: LightningModule) -> None:
    ptq.calibrate(trainer, pl_module, ptq.calibration_batches)


@dataclass(frozen=True)
class _ReconstructPhase(ReconstructOptions):
    """The options of the phase: those of reconstruction, and what is reconstructed together."""

    by: Any = "block"


@register_phase(
    "reconstruct",
    _ReconstructPhase,
    after=_RANGES,
    without={"correct_batch_norm": "reconstruct corrects batch norms itself, from the float ones"},
)
def _reconstruct(ptq: PTQ, trainer: Trainer, pl_module: LightningModule) -> None:
    options = dict(ptq.phase_options.get("reconstruct", {}))
    by = options.pop("by", "block")
    chosen = ReconstructOptions(**options)
    shown = trainer.progress_bar_callback is not None and trainer.is_global_zero
    with without_traces(pl_module), Progress(disable=not shown, transient=True) as progress:
        tasks: dict[str, TaskID] = {}

        def on_step(unit: str, iteration: int) -> None:
            if unit not in tasks:
                tasks[unit] = progress.add_task(f"reconstruct {unit}", total=chosen.iterations)
            progress.update(tasks[unit], completed=iteration)

        ptq.keep_float_weights(pl_module)
        batches = list(calibration_batches(trainer, pl_module, ptq.dataloader, ptq.calibration_batches))
        run = step_runner(trainer, pl_module, ptq.calibration_step)
        ptq.reconstruction = reconstruct(pl_module, batches, run, by, chosen, on_step=on_step)
    for layer, reason in ptq.reconstruction.skipped.items():
        rank_zero_warn(f"PTQ: {layer} keeps nearest rounding: {reason}")
    for unit, fit in ptq.reconstruction.units.items():
        rank_zero_info(
            f"PTQ: reconstructed {unit}: error {fit.before:.3g} -> {fit.after:.3g} of the variation, {fit.iterations} "
            "iterations, "
            f"{fit.undecided:.1%} undecided{'' if fit.kept else '; nearest rounding was better and stays'}"
        )


def _with_batches(
    ptq: PTQ, trainer: Trainer, pl_module: LightningModule, title: str, function: Callable[..., Any], **options: Any
) -> Any:
    """Call `function(module, batches, run, **options)` with a progress bar and without traces."""
    batches = calibration_batches(trainer, pl_module, ptq.dataloader, ptq.calibration_batches)
    batches = with_progress(trainer, title, batches, ptq.calibration_batches)
    with without_traces(pl_module):
        return function(pl_module, batches, step_runner(trainer, pl_module, ptq.calibration_step), **options)


@register_phase(
    "gptq",
    check_options,
    after=_RANGES,
    without=dict.fromkeys(("correct_batch_norm", "bias_correct", "reconstruct"), _FLOAT_MODEL),
)
def _gptq(ptq: PTQ, trainer: Trainer, pl_module: LightningModule) -> None:
    ptq.keep_float_weights(pl_module)
    result = _with_batches(ptq, trainer, pl_module, "GPTQ", gptq, **ptq.phase_options.get("gptq", {}))
    for layer, reason in result.skipped.items():
        rank_zero_warn(f"PTQ: {layer} keeps nearest rounding: {reason}")


@register_phase(
    "bias_correct", after=_RANGES, without=dict.fromkeys(("correct_batch_norm", "reconstruct"), _FLOAT_MODEL)
)
def _bias_correct(ptq: PTQ, trainer: Trainer, pl_module: LightningModule) -> None:
    result = _with_batches(ptq, trainer, pl_module, "correct biases", bias_correct)
    for layer, reason in result.skipped.items():
        rank_zero_info(f"PTQ: bias not corrected: {layer}: {reason}")


@register_phase("correct_batch_norm", after=_RANGES)
def _correct_batch_norm(ptq: PTQ, trainer: Trainer, pl_module: LightningModule) -> None:
    _with_batches(ptq, trainer, pl_module, "correct batch norm", correct_batch_norm)


@register_phase("reestimate_batch_norm", before={"fold_batch_norm": "a folded one has no statistics left"})
def _reestimate_batch_norm(ptq: PTQ, trainer: Trainer, pl_module: LightningModule) -> None:
    # Before ranges are found there is only the float model to follow.
    waiting = any(q.needs_calibration and not q.is_calibrated for q in quantizers(pl_module))
    with float_forward(pl_module) if waiting else nullcontext():
        _with_batches(ptq, trainer, pl_module, "re-estimate batch norm", reestimate_batch_norm)
