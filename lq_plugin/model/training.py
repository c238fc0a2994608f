"""Quantizers between two training batches: one bucketed all-reduce commits what they observed in the last one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from lq_plugin.intent.formats import SLOTS
from lq_plugin.layers import QuantizedLayer, weight_of
from lq_plugin.model.calibrate import Statistics
from lq_plugin.model.operations.quantized import QuantizedOperation
from lq_plugin.quantizers import ActivationQuantizer, Quantizer, StagedQuantizer, WeightQuantizer


def commit_observers(
    chosen: Sequence[Quantizer],
    all_reduce_max: Callable[[Tensor], Tensor] | None = None,
    merge: Callable[[Statistics], None] | None = None,
) -> None:
    """Folds a batch's extremes of each observing quantizer into its moving range; gives others their first range.

    Stochastic rounding draws new numbers afterwards.

    Args:
        chosen: the model's quantizers.
        all_reduce_max: elementwise maximum over all ranks; None in a single process.
        merge: joins the statistics of all ranks, in place; None in a single process.

    Raises:
        CalibrationError: naming the layer that saw NaN or Inf.
    """
    for quantizer in chosen:
        quantizer.next_draw()
    inputs = [q for q in chosen if isinstance(q, ActivationQuantizer)]
    _commit_moving([q for q in inputs if q.moving and q.observing], all_reduce_max)
    _commit_first([q for q in inputs if not q.moving and not q.is_calibrated], merge)


def forget_batch(chosen: Iterable[Quantizer]) -> None:
    """Drops what was seen since the last commit: by the trial runs of a learning rate finder, say."""
    for quantizer in chosen:
        if isinstance(quantizer, ActivationQuantizer):
            quantizer.pending = None
            if quantizer.moving:
                quantizer.batch_min.fill_(torch.inf)
                quantizer.batch_max.fill_(-torch.inf)


def _commit_moving(moving: list[ActivationQuantizer], all_reduce_max: Callable[[Tensor], Tensor] | None) -> None:
    if not moving:
        return
    # Minima are negated, so that one maximum serves both.
    bucket = torch.cat([part for q in moving for part in (q.batch_max, -q.batch_min)])
    if all_reduce_max is not None:
        bucket = all_reduce_max(bucket)
    parts = iter(bucket.split([q.channels for q in moving for _ in range(2)]))
    for quantizer in moving:
        batch_max, batch_min = next(parts), -next(parts)
        # -Inf stands where no rank called the layer in this batch; a NaN must get through to the check.
        if not torch.isneginf(batch_max).all():
            quantizer.commit(batch_min, batch_max)


def _commit_first(waiting: list[ActivationQuantizer], merge: Callable[[Statistics], None] | None) -> None:
    if not waiting:
        return
    # Every rank brings all of them, so that the ranks' buckets match even where one rank called a layer and another did
    # not.
    statistics = {q.name: q.pending or q.new_collector() for q in waiting}
    if merge is not None:
        merge(statistics)
    for quantizer in waiting:
        quantizer.pending = None
        if statistics[quantizer.name].total.any():
            quantizer.load_sample(statistics[quantizer.name].sample())


@torch.no_grad()
def clip_latent_weights(layers: Iterable[QuantizedLayer]) -> None:
    """Clips weights to the interval of their format, outside of which they get no gradient.

    Source: BinaryConnect, section 2.4.

    Weights that are computed are not there to be clipped; `prepare` refuses such a format for them.
    """
    for layer in layers:
        current = None if layer.weight_quantizer is None else layer.weight_quantizer.current
        if current is not None and current.latent_bound is not None and current.is_enabled:
            layer.weight.clamp_(-current.latent_bound, current.latent_bound)


def enter_stage(
    layers: Iterable[QuantizedLayer],
    epoch: int,
    step: int,
    calibrate: bool,
    operations: Iterable[QuantizedOperation] = (),
    whole: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> list[str]:
    """Brings every quantizer to its stage at this moment.

    Args:
        layers: quantized layers.
        epoch, step: of the training run.
        calibrate: find the range of a weight whose stage begins; a resumed run has it already.
        operations: quantized operations.
        whole: entered while ranges are found from weights.

    Returns:
        Names of the tensors that changed.
    """
    changed = [
        quantizer.name
        for operation in operations
        for quantizer in operation.quantizers()
        if isinstance(quantizer, StagedQuantizer) and quantizer.set_stage(epoch, step)
    ]
    begun = []
    for layer in layers:
        for slot in SLOTS:
            quantizer = getattr(layer, f"{slot}_quantizer")
            if not isinstance(quantizer, StagedQuantizer) or not quantizer.set_stage(epoch, step):
                continue
            changed.append(quantizer.name)
            if isinstance(current := quantizer.current, WeightQuantizer):
                begun.append((layer, current))
    if calibrate and begun:
        with whole():
            for layer, current in begun:
                current.calibrate(type(layer).canonical(layer, weight_of(layer)))
    return changed
