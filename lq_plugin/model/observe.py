"""Commit what the observers saw during one training batch: one bucketed all-reduce for the whole model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lq_plugin.quantizers import InputQuantizer, Quantizer


def commit_observers(chosen: Sequence[Quantizer], all_reduce_max: Callable[[Tensor], Tensor] | None = None) -> None:
    """Fold the batch's extremes of every observing quantizer into its moving range.

    Args:
        chosen: the model's quantizers.
        all_reduce_max: elementwise maximum over all ranks; None in a single process.

    Raises:
        CalibrationError: naming the layer that saw NaN or Inf.
    """
    moving = [q for q in chosen if isinstance(q, InputQuantizer) and q.moving and q.observing]
    if not moving:
        return
    # Minima are negated, so that one maximum serves both.
    bucket = torch.cat([part for q in moving for part in (q.batch_max, -q.batch_min)])
    if all_reduce_max is not None:
        bucket = all_reduce_max(bucket)
    sizes = [q.channels for q in moving for _ in range(2)]
    parts = iter(bucket.split(sizes))
    for quantizer in moving:
        batch_max, batch_min = next(parts), -next(parts)
        # -Inf stands where no rank called the layer in this batch; a NaN must get through to the check.
        if not torch.isneginf(batch_max).all():
            quantizer.commit(batch_min, batch_max)
