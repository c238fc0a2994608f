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
    total = sum(int(r.free.sum()) for r in soft.softened)
    for iteration in range(options.iterations):
        progress = (iteration - warm_up) / max(options.iterations - warm_up, 1)
        forward, targets = draw()
        loss = output_error(forward(), targets, norms)
        if options.regularization and iteration >= warm_up and total:
            beta = beta_at(progress, *options.beta)
            # Saturated weights have a span of 0.
            drawn = torch.stack([(regularizer(r.h(), beta) * r.free).sum() for r in soft.softened]).sum()
            loss = loss + options.regularization * drawn / total
        optimizer.zero_grad()
        loss.backward()
        loss = loss.detach()
        average([loss, *(p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters)])
        require_finite(loss, where, iteration)
        optimizer.step()
        if on_step is not None:
            on_step(iteration + 1)
        if iteration >= warm_up and iteration % 20 == 19 and soft.undecided_share() == 0.0:
            return iteration + 1
    return options.iterations


def tune_rounding(
    soft: SoftUnit,
    draw: Callable[[], tuple[Callable[[], list[Tensor]], list[Tensor]]],
    norms: list[float],
    options: ReconstructOptions,
    where: str = "",
    on_step: Callable[[int], None] | None = None,
) -> int:
    """Minimises the error over the samples of all processes by SignRound's steps; returns the iterations it took.

    Args:
        soft: what is tuned by signed steps, and trained beside by Adam.
        draw, norms, options, where, on_step: see `learn_rounding`.

    Raises:
        CalibrationError: the error is NaN or Inf.
    """
    signed, groups = soft.signed(), soft.groups()
    optimizer = torch.optim.Adam(groups) if groups else None
    parameters = [p for p, _ in signed] + [p for group in groups for p in group["params"]]
    least, best = float("inf"), [p.detach().clone() for p in parameters]
    for iteration in range(options.iterations if parameters else 0):
        forward, targets = draw()
        loss = output_error(forward(), targets, norms)
        for parameter in parameters:
            parameter.grad = None
        loss.backward()
        loss = loss.detach()
        average([loss, *(p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters)])
        require_finite(loss, where, iteration)
        if float(loss) < least:
            least, best = float(loss), [p.detach().clone() for p in parameters]
        rate = (1 - iteration / options.iterations) / options.iterations
        with torch.no_grad():
            for parameter, bounds in signed:
                if parameter.grad is not None:
                    parameter.sub_(rate * parameter.grad.sign()).clamp_(*bounds)
        if optimizer is not None:
            optimizer.step()
        if on_step is not None:
            on_step(iteration + 1)
    with torch.no_grad():
        for parameter, value in zip(parameters, best, strict=True):
            parameter.copy_(value)
    return options.iterations if parameters else 0


def output_error(outputs: list[Tensor], targets: list[Tensor], norms: list[float]) -> Tensor:
    """Returns the mean of the squared errors of some outputs, each over the error that counts as 1.

    Args:
        outputs, targets: of the quantized and of the float unit.
        norms: error that counts as 1, of each output.
    """
    pairs = zip(outputs, targets, norms, strict=True)
    return torch.stack([(y - t).float().square().mean() / norm for y, t, norm in pairs]).mean()


def require_finite(loss: Tensor, where: str, iteration: int) -> None:
    """Refuses an error that is NaN or Inf.

    Args:
        loss: the error.
        where, iteration: for the message.

    Raises:
        CalibrationError: it is.
    """
    if not bool(loss.isfinite()):
        raise CalibrationError(
            f"reconstruction of {where} met NaN or Inf in iteration {iteration}: lower the learning rate, or look "
            "at its inputs"
        )
