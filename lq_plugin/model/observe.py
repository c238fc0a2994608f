"""Commit what the quantizers saw during one training batch: one bucketed all-reduce for the whole model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lq_plugin.model.calibrate import Statistics
from lq_plugin.quantizers import InputQuantizer, Quantizer


def commit_observers(
    chosen: Sequence[Quantizer],
    all_reduce_max: Callable[[Tensor], Tensor] | None = None,
    merge: Callable[[Statistics], None] | None = None,
) -> None:
    """Fold the batch's extremes of every observing quantizer into its moving range, and give others their first range.

    Args:
        chosen: the model's quantizers.
        all_reduce_max: elementwise maximum over all ranks; None in a single process.
        merge: joins the statistics of all ranks, in place; None in a single process.

    Raises:
        CalibrationError: naming the layer that saw NaN or Inf.
    """
    inputs = [q for q in chosen if isinstance(q, InputQuantizer)]
    _commit_moving([q for q in inputs if q.moving and q.observing], all_reduce_max)
    _commit_first([q for q in inputs if not q.moving and not q.is_calibrated], merge)


def _commit_moving(moving: list[InputQuantizer], all_reduce_max: Callable[[Tensor], Tensor] | None) -> None:
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


def _commit_first(waiting: list[InputQuantizer], merge: Callable[[Statistics], None] | None) -> None:
    if not waiting:
        return
    # Every rank brings all of them, so that the ranks' buckets match even where one rank called a layer and another did not.
    statistics = {q.name: q.pending or q.new_collector() for q in waiting}
    if merge is not None:
        merge(statistics)
    for quantizer in waiting:
        quantizer.pending = None
        if statistics[quantizer.name].total.any():
            quantizer.load_sample(statistics[quantizer.name].sample())
