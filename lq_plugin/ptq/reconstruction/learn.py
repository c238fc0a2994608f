"""The optimization of one unit: roundings, scales and biases, until every rounding is decided."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lq_plugin.errors import CalibrationError
from lq_plugin.functional.adaround import beta_at, regularizer
from lq_plugin.model.ranks import average
from lq_plugin.ptq.reconstruction.options import ReconstructOptions
from lq_plugin.ptq.reconstruction.soft_unit import SoftUnit
from lq_plugin.utilities.moved import former_names

__getattr__ = former_names(__name__)


@dataclass(frozen=True)
class UnitResult:
    """The result of one unit's optimization.

    Args:
        iterations: steps taken.
        before, after: mean squared error over that of the targets' variation, with nearest and with learned rounding.
        undecided: share of the roundings that were still between up and down when they were rounded.
        kept: False where nearest rounding was better and was put back.
    """

    iterations: int
    before: float
    after: float
    undecided: float
    kept: bool


def learn_rounding(
    soft: SoftUnit,
    draw: Callable[[], tuple[Callable[[], list[Tensor]], list[Tensor]]],
    norms: list[float],
    options: ReconstructOptions,
    where: str = "",
    on_step: Callable[[int], None] | None = None,
) -> int:
    """Minimises the error over the samples of all processes; returns the iterations it took.

    Args:
        soft: what is trained.
        draw: `(forward, targets)` of some samples; `forward()` runs the soft unit on them.
        norms: error that counts as 1, of each output.
        options: how.
        where: for messages.
        on_step: told the number of each iteration.

    Raises:
        CalibrationError: the error is NaN or Inf.
    """
    groups = soft.groups()
    if not groups or not options.iterations:
        return 0
    optimizer = torch.optim.Adam(groups)
    parameters = [p for group in groups for p in group["params"]]
    warm_up = int(options.warm_up * options.iterations)
    total = sum(int(r.free.sum()) for r in soft.roundings.values())
    for iteration in range(options.iterations):
        progress = (iteration - warm_up) / max(options.iterations - warm_up, 1)
        forward, targets = draw()
        loss = torch.stack(
            [(y - t).float().square().mean() / norm for y, t, norm in zip(forward(), targets, norms, strict=True)]
        ).mean()
        if options.regularization and iteration >= warm_up and total:
            beta = beta_at(progress, *options.beta)
            # Saturated weights have a span of 0.
            drawn = torch.stack([(regularizer(r.h(), beta) * r.free).sum() for r in soft.roundings.values()]).sum()
            loss = loss + options.regularization * drawn / total
        optimizer.zero_grad()
        loss.backward()
        loss = loss.detach()
        average([loss, *(p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters)])
        if not bool(loss.isfinite()):
            raise CalibrationError(
                f"reconstruction of {where} met NaN or Inf in iteration {iteration}: lower the learning rate, or look "
                "at its inputs"
            )
        optimizer.step()
        if on_step is not None:
            on_step(iteration + 1)
        if iteration >= warm_up and iteration % 20 == 19 and soft.undecided_share() == 0.0:
            return iteration + 1
    return options.iterations
