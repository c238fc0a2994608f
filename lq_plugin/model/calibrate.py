"""Find the ranges of a prepared model from data: one float pass that serves every estimator."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from lq_plugin.errors import CalibrationError, raise_all
from lq_plugin.functional.grouping import blocks
from lq_plugin.layers import weight_of
from lq_plugin.model.graph.record import without_compile
from lq_plugin.model.prepare import quantized_layers, quantizers
from lq_plugin.model.raw_reads import noting_raw_reads
from lq_plugin.model.unreached import settle, unreached
from lq_plugin.quantizers import ActivationQuantizer, Quantizer, WeightQuantizer
from lq_plugin.ranges import Histogram, Sample
from lq_plugin.ranges.grid_error import side_without_levels

log = logging.getLogger(__name__)

#: Share of the values on a side without levels that is worth a warning.
MISSED_SHARE = 0.01
#: Statistics of each activation, by the name of its quantizer.
Statistics = dict[str, Histogram]


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    run: Callable[[Any], Any] | None = None,
    merge: Callable[[Statistics], None] | None = None,
) -> Statistics:
    """Finds the range of every weight and activation of a prepared model.

    The model runs float and in evaluation mode; its training flags are as before afterwards.

    Args:
        model: prepared by `lq_plugin.prepare`.
        batches: calibration data, read once.
        run: runs the model on one batch; `model(batch)` when None.
        merge: joins the statistics of several processes, in place.

    Returns:
        The statistics, for `lq_plugin.ranges.compare_ranges` or another plan's `load_statistics`.

    Raises:
        CalibrationError: no batches where activations need ranges, NaN or Inf in weights or activations (with the
            layer's name), or a model that is not prepared.

    >>> import lq_plugin
    >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> _ = lq_plugin.prepare(net, "w8a8")
    >>> statistics = calibrate(net, [torch.randn(16, 8)])
    >>> sorted(statistics)
    ['0.input', '2.input']
    """
    statistics = collect_statistics(model, batches, run, merge)
    load_statistics(model, statistics)
    if missed := never_reached(model, statistics):
        log.warning("calibrate: no batch reached %s; what has no range stays float", ", ".join(missed))
    if clipped := without_levels(model, statistics):
        log.warning("calibrate: %s", "; ".join(clipped))
    return statistics


def collect_statistics(
    model: nn.Module,
    batches: Iterable[Any],
    run: Callable[[Any], Any] | None = None,
    merge: Callable[[Statistics], None] | None = None,
) -> Statistics:
    """The first half of `calibrate`: gather statistics, change nothing.

    Args:
        model, batches, run, merge: as in `calibrate`.
    """
    if not quantizers(model):
        raise CalibrationError("the model has no quantized layers: prepare it first (lq_plugin.prepare)")
    # Before the pass, which would name the first activation that they spoil.
    weights = {name: weight_of(layer) for name, layer in quantized_layers(model)}
    raise_all(CalibrationError, "ranges need finite values", [
        f"{name}.weight: NaN or Inf in {int((~torch.isfinite(weight)).sum())} of {weight.numel()} weights"
        for name, weight in weights.items() if not torch.isfinite(weight).all()
    ])  # fmt: skip
    watched = [q for q in quantizers(model) if isinstance(q, ActivationQuantizer)]
    if not watched:
        return {}  # ranges of weights come from the weights
    count = 0
    with evaluating(model), float_forward(model), torch.no_grad():
        for quantizer in watched:
            quantizer.collector = quantizer.new_collector()
        try:
            # A compiled model would be compiled anew, in pieces, for the collectors.
            with without_compile():
                for batch in batches:
                    with nullcontext() if count else noting_raw_reads(model):
                        (run or model)(batch)
                    count += 1
            statistics = {q.name: q.collector for q in watched if q.collector is not None}
        finally:
            for quantizer in watched:
                quantizer.collector = None
    if not count and needs_data(model):
        raise CalibrationError("no calibration data: the loader gave 0 batches")
    if merge is not None:
        merge(statistics)
    return statistics


def needs_data(model: nn.Module) -> bool:
    """Returns whether ranges come from data: true of activations unless the format finds scales at run time."""
    return any(isinstance(q, ActivationQuantizer) and q.needs_calibration for q in quantizers(model))


def load_statistics(model: nn.Module, statistics: Statistics, missing_only: bool = False) -> None:
    """The second half of `calibrate`: set each range (or only those that are not there yet) by its spec's estimator.

    A layer or operation that no batch reached stays float, see `lq_plugin.model.unreached`.

    Args:
        model: prepared.
        statistics: by the names of its activation quantizers.
        missing_only: leave the ranges that are there.
    """
    before = unreached(model)
    for _, layer in quantized_layers(model):
        layer.calibrate_weight(missing_only)
    for quantizer in quantizers(model):
        if missing_only and quantizer.is_calibrated:
            continue
        histogram = statistics.get(quantizer.name)
        if isinstance(quantizer, ActivationQuantizer) and histogram is not None and histogram.total.any():
            quantizer.load_sample(histogram.sample())
    settle(before, model)


def never_reached(model: nn.Module, statistics: Statistics) -> list[str]:
    """Names of activations that no calibration batch reached, and which have no range for it."""
    # Formats that find their scales at run time miss nothing.
    waiting = {q.name for q in quantizers(model) if q.lacks_range}
    return [name for name, histogram in statistics.items() if name in waiting and not histogram.total.any()]


def without_levels(model: nn.Module, statistics: Statistics) -> list[str]:
    """Returns a sentence for each tensor with values on the side of zero where its spec has no level.

    From a share of `MISSED_SHARE` on.
    """
    samples: list[tuple[Quantizer, Sample, torch.Tensor]] = []
    for _, layer in quantized_layers(model):
        for q in () if layer.weight_quantizer is None else layer.weight_quantizer.stages():
            if isinstance(q, WeightQuantizer) and q.spec.lacks_a_side:
                weight = type(layer).canonical(layer, weight_of(layer)).detach()
                samples.append((q, q.sample(weight), q.qparams(blocks(weight.float(), q.spec.granularity))[0]))
    for q in quantizers(model):
        histogram = statistics.get(q.name)
        if (
            isinstance(q, ActivationQuantizer)
            and q.spec.lacks_a_side
            and histogram is not None
            and histogram.total.any()
        ):
            sample = histogram.sample()
            known = q.qparams() if q.needs_calibration else q.bounds_to_qparams(sample.minimum, sample.maximum)
            samples.append((q, sample, known[0]))
    found = []
    for q, sample, scale in samples:
        share = side_without_levels(sample, scale.reshape(-1), q.spec.grid)
        if share > MISSED_SHARE:
            side = "negative" if q.spec.grid.quant_min >= 0 else "positive"
            found.append(
                f"{q.name}: {share:.1%} of its values are {side} and become 0, {str(q.spec)!r} has no levels there; "
                "write 'affine', for a zero point, or a format with levels on both sides"
            )
    return found


def weight_samples(model: nn.Module) -> dict[str, Sample]:
    """The values of each quantized weight, one row for each scale, by the name of its quantizer."""
    layers = (layer for _, layer in quantized_layers(model))
    return {
        q.name: q.stages()[-1].sample(type(layer).canonical(layer, weight_of(layer)))
        for layer in layers
        if (q := layer.weight_quantizer) is not None
    }


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; every module's own training flag afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def float_forward(model: nn.Module) -> Iterator[None]:
    """The model computes float inside, bit for bit as without quantizers."""
    with switched(quantizers(model), False):
        yield


@contextmanager
def switched(chosen: list[Quantizer], enabled: bool) -> Iterator[None]:
    """Switches quantizers on (or off) inside; afterwards they are as before."""
    before = [(quantizer, quantizer.is_enabled) for quantizer in chosen]
    for quantizer in chosen:
        quantizer.set_enabled(enabled)
    try:
        yield
    finally:
        for quantizer, was in before:
            quantizer.set_enabled(was)


def refuse_ranges(model: nn.Module, verb: str, past: str) -> None:
    """Refuses a model whose quantizers have found ranges already, which new weights would make wrong.

    Those that find their range at run time have none to keep.

    Args:
        model: prepared, or float.
        verb: what is about to be done to the weights, for the message: "smooth".
        past: the same of the weights after it: "smoothed".

    Raises:
        CalibrationError: naming the first of them.
    """
    found = [
        quantizer.name for quantizer in quantizers(model) if quantizer.is_calibrated and not quantizer.spec.dynamic
    ]
    if found:
        raise CalibrationError(
            f"cannot {verb}: {len(found)} quantizers have ranges already ({', '.join(found[:3])}, ...), which would "
            f"not be those of the {past} weights and activations; {verb} before calibrating"
        )
