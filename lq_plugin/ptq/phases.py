"""The built-in PTQ phases, and `run_phases`, which runs them on a plain model.

A phase is a function of a `PhaseContext`, added by `register_phase`. README.md in this folder is the map of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lq_plugin.errors import CalibrationError
from lq_plugin.intent.plan import QuantPlan
from lq_plugin.model.calibrate import Statistics, float_forward
from lq_plugin.model.operations.rules import needs_recording
from lq_plugin.model.prepare import prepare, quantizers
from lq_plugin.ptq.batch_norm.correct import correct_batch_norm
from lq_plugin.ptq.batch_norm.fold import FoldedBatchNorms, find_batch_norm_pairs, fold_batch_norm
from lq_plugin.ptq.batch_norm.reestimate import ReestimatedBatchNorms, reestimate_batch_norm
from lq_plugin.ptq.bias_correction.correct import BiasCorrection, bias_correct
from lq_plugin.ptq.context import PhaseContext as PhaseContext
from lq_plugin.ptq.equalization.equalize import Equalization, check_iterations, equalize
from lq_plugin.ptq.gptq.quantize import GPTQResult, check_options, gptq
from lq_plugin.ptq.integer_biases.round import RoundedBiases, round_biases
from lq_plugin.ptq.reconstruction.options import ReconstructOptions
from lq_plugin.ptq.reconstruction.reconstruct import Reconstruction, reconstruct
from lq_plugin.ptq.registry import (
    PHASES as PHASES,
    Phase as Phase,
    check_phases as check_phases,
    names_and_options as names_and_options,
    register_phase as register_phase,
    run_phase as run_phase,
)
from lq_plugin.ptq.rotation.rotate import Rotation, check_rotation, rotate
from lq_plugin.ptq.shared_grids.share import SharedGrids, share_grids
from lq_plugin.ptq.smooth_quant.smooth import Smoothing, check_alpha, smooth_quant

_RANGES = {"calibrate": "it starts from the ranges"}
_NO_RANGES = {"calibrate": "ranges belong to the weights and activations that they were found for"}
_FLOAT_MODEL = "both measure against the float model, which the first one changes"


def run_phases(
    model: nn.Module,
    plan: QuantPlan | str | Path | Mapping[str, Any] | None,
    batches: Iterable[Any],
    phases: Sequence[str | Mapping[str, Any]] = ("fold_batch_norm", "calibrate"),
    run: Callable[[Any], Any] | None = None,
) -> PhaseContext:
    """Quantizes a plain model after training, in place.

    Args:
        model: trained.
        plan: anything `QuantPlan.parse` reads; None: the model is prepared already.
        batches: calibration data. Each phase iterates them anew; they are held in a list if they are an iterator.
        phases: names, or `{name: options}`, in the order in which they run; see `lq_plugin.PTQ`.
        run: runs the model on one batch; `model(batch)` when None.

    Returns:
        The context, with the ledger, the recorded pass, and the result of each phase by its name.

    Raises:
        PlanError: impossible phases, or a plan that does not fit. The model is unchanged then.
        CalibrationError: no batches, or a model that is not prepared where `plan` is None.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3)).eval()
    >>> context = run_phases(net, "w4a8", [torch.randn(16, 4)], ["calibrate", "correct_batch_norm"])
    >>> context.ledger.summary(), context.results["correct_batch_norm"].batches
    ('1 quantized, 1 float; coverage 100.0% of weights, 100.0% of MACs', 1)
    """
    names, options = names_and_options(phases)
    check_phases(names, options)
    context = PhaseContext(model, batches, run)
    if plan is not None:
        plan = QuantPlan.parse(plan)
        context.ledger = prepare(model, plan, context.record() if needs_recording(model, plan) else None)
    elif not quantizers(model):
        raise CalibrationError("the model has no quantized layers: give a plan, or prepare it first")
    for name in names:
        run_phase(context, name, options.get(name))
    return context


@register_phase("fold_batch_norm")
def _fold_batch_norm(context: PhaseContext) -> FoldedBatchNorms:
    pairs, refused = find_batch_norm_pairs(context.model, context.recording)
    for refusal in refused:
        context.say(f"batch norm not folded: {refusal}")
    folded = fold_batch_norm(context.model, pairs)
    for pair in pairs:
        context.note(pair.batch_norm, f"folded into {pair.producer}")
    return folded


@register_phase(
    "equalize",
    check_iterations,
    before=_NO_RANGES,
    after={"fold_batch_norm": "it goes through folded batch norms, not through others"},
)
def _equalize(context: PhaseContext) -> Equalization:
    result = equalize(context.model, context.recording, **context.options)
    context.say(
        f"equalized {len(result.pairs)} pairs of layers, {result.iterations} iterations, last change "
        f"{result.change:.2g}"
    )
    for refusal in result.refused:
        context.say(f"not equalized: {refusal}")
    return result


@register_phase(
    "smooth_quant",
    check_alpha,
    before=_NO_RANGES,
    after=dict.fromkeys(("fold_batch_norm", "equalize"), "it changes the norms that they go through"),
)
def _smooth_quant(context: PhaseContext) -> Smoothing:
    recording = context.recording
    with context.passes():
        result = smooth_quant(context.model, context.batches, recording, context.run, **context.options)
    context.say(f"smoothed the outputs of {len(result.pairs)} layers")
    for refusal in result.refused:
        context.say(f"not smoothed: {refusal}")
    return result


@register_phase(
    "rotate",
    check_rotation,
    before={
        **_NO_RANGES,
        "smooth_quant": "it puts the weights of norms into the layers after, smoothing's factors also",
    },
)
def _rotate(context: PhaseContext) -> Rotation:
    batch = context.first_batch()
    with context.passes():
        result = rotate(context.model, batch, context.run, **context.options)
    context.say(
        f"rotated {len(result.streams)} residual streams and the heads of {len(result.heads)} attentions; outputs of "
        f"the first batch moved by {result.change:.2g}"
    )
    for refusal in result.refused:
        context.say(f"not rotated: {refusal}")
    return result


@register_phase("calibrate")
def _calibrate(context: PhaseContext) -> Statistics:
    return context.calibrate()


@dataclass(frozen=True)
class _ReconstructPhase(ReconstructOptions):
    """The options of the phase: those of reconstruction, and `by`, the kind of unit."""

    by: Any = "block"


@register_phase(
    "reconstruct",
    _ReconstructPhase,
    after=_RANGES,
    without={"correct_batch_norm": "reconstruct corrects batch norms itself, from the float ones"},
)
def _reconstruct(context: PhaseContext) -> Reconstruction:
    options = dict(context.options)
    by = options.pop("by", "block")
    chosen = ReconstructOptions(**options)

    def on_step(unit: str, iteration: int) -> None:
        context.show(f"reconstruct {unit}", iteration, chosen.iterations)

    context.keep_float_weights()
    with context.passes():
        result = reconstruct(context.model, context.batches, context.run, by, chosen, on_step=on_step)
    _warn_of_nearest(context, result.skipped)
    alone = sum(len(layers) == 1 for layers in result.layers.values())
    if by != "layer":
        context.say(f"reconstruct by {by}: {len(result.layers) - alone} units of several layers, {alone} of one layer")
    for unit, learned in result.units.items():
        context.say(
            f"reconstructed {unit}: error {learned.before:.3g} -> {learned.after:.3g} of the variation, "
            f"{learned.iterations} iterations, {learned.undecided:.1%} undecided"
            f"{'' if learned.kept else '; nearest rounding was better and stays'}"
        )
    return result


@register_phase(
    "gptq",
    check_options,
    after=_RANGES,
    without=dict.fromkeys(("correct_batch_norm", "bias_correct", "reconstruct"), _FLOAT_MODEL),
)
def _gptq(context: PhaseContext) -> GPTQResult:
    context.keep_float_weights()
    with context.passes():
        result = gptq(context.model, context.batches, context.run, **context.options)
    _warn_of_nearest(context, result.skipped)
    return result


def _warn_of_nearest(context: PhaseContext, skipped: Mapping[str, str]) -> None:
    for layer, reason in skipped.items():
        context.warn(f"{layer} keeps nearest rounding: {reason}")


@register_phase(
    "bias_correct", after=_RANGES, without=dict.fromkeys(("correct_batch_norm", "reconstruct"), _FLOAT_MODEL)
)
def _bias_correct(context: PhaseContext) -> BiasCorrection:
    with context.passes():
        result = bias_correct(context.model, context.batches, context.run)
    for layer, reason in result.skipped.items():
        context.say(f"bias not corrected: {layer}: {reason}")
    return result


@register_phase("correct_batch_norm", after=_RANGES)
def _correct_batch_norm(context: PhaseContext) -> ReestimatedBatchNorms:
    with context.passes():
        return correct_batch_norm(context.model, context.batches, context.run)


@register_phase("reestimate_batch_norm", before={"fold_batch_norm": "a folded one has no statistics left"})
def _reestimate_batch_norm(context: PhaseContext) -> ReestimatedBatchNorms:
    # Before ranges are found there is only the float model to follow.
    waiting = any(q.lacks_range for q in quantizers(context.model))
    with context.passes(), float_forward(context.model) if waiting else nullcontext():
        return reestimate_batch_norm(context.model, context.batches, context.run)


@register_phase(
    "share_grids", after=_RANGES, before=dict.fromkeys(("round_biases",), "their steps are those of the inputs")
)
def _share_grids(context: PhaseContext) -> SharedGrids:
    result = share_grids(context.model, context.recording)
    context.say(f"{len(result.changed)} quantizers have the range of another one that reads the same tensor")
    return result


@register_phase("round_biases", after=_RANGES)
def _round_biases(context: PhaseContext) -> RoundedBiases:
    result = round_biases(context.model, context.recording)
    context.say(f"rounded the biases of {len(result.changed)} layers to steps of their integer sums")
    return result
