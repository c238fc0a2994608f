"""Values over the steps of a run: learned scales, zeros and flips of low-bit weights, float and quantized losses."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lq_plugin.callbacks.trainer.steps import step_runner
from lq_plugin.callbacks.trainer.traces import without_traces
from lq_plugin.layers import QuantizedLayer, weight_of
from lq_plugin.model.calibrate import evaluating, float_forward
from lq_plugin.report import Series
from lq_plugin.report.data import digits
from lq_plugin.utilities.lightning_packages import is_overridden, isolate_rng

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

#: Weights of at most so many bits: few enough levels for a flip of the sign to mean something.
LOW_BITS = 2
#: Layers whose numbers are kept for the report page, the largest first.
MAX_LAYERS = 24
#: Points of a curve; beyond them every second one goes.
MAX_POINTS = 200


class Flips:
    """Zeros and flips of the weights of at most two bits. Keeps one byte for each of these weights."""

    def __init__(self) -> None:
        self._signs: dict[str, Tensor] = {}

    @torch.no_grad()
    def measure(self, layers: Mapping[str, QuantizedLayer]) -> dict[str, float]:
        """Returns the shares of weights that are 0 and whose sign has flipped since the last call.

        By `<layer>/weight_zeros` and `<layer>/weight_flips`.

        A weight that goes from 0 to another level, or back, has flipped also.
        """
        found: dict[str, float] = {}
        for name, layer in layers.items():
            quantizer = None if layer.weight_quantizer is None else layer.weight_quantizer.current
            ready = quantizer is not None and quantizer.is_enabled and not quantizer.lacks_range
            if not ready or quantizer.spec.bit_width > LOW_BITS:  # type: ignore[union-attr]
                self._signs.pop(name, None)
                continue
            with evaluating(quantizer):  # type: ignore[arg-type]  # stochastic rounding draws nothing then
                levels = quantizer.quantize_values(type(layer).canonical(layer, weight_of(layer)).detach())  # type: ignore[union-attr]
            signs = levels.sign().to(torch.int8)
            found[f"{name}/weight_zeros"] = float((signs == 0).float().mean())
            if (before := self._signs.get(name)) is not None and before.shape == signs.shape:
                found[f"{name}/weight_flips"] = float((signs != before).float().mean())
            self._signs[name] = signs
        return found


class History:
    """Numbers over optimizer steps, thinned as they grow."""

    def __init__(self) -> None:
        self._points: dict[str, dict[int, float]] = {}

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Keeps finite numbers; a later one of the same step replaces an earlier one."""
        for name, value in values.items():
            if isfinite(value):
                points = self._points.setdefault(name, {})
                points[step] = digits(value)
                if len(points) > MAX_POINTS:
                    for old in list(points)[1:-1:2]:
                        del points[old]

    def series(self) -> list[Series]:
        """Curves of at least two points."""
        return [
            Series(name, list(points), list(points.values()))
            for name, points in self._points.items()
            if len(points) > 1
        ]


def losses(trainer: Trainer, pl_module: LightningModule, batch: Any) -> dict[str, float]:
    """Returns the loss of one batch, quantized and float, by the module's own validation step in evaluation mode.

    The loss is what the step returns, or what it logs under a name with `loss` in it. Without such a step, or such a
    name, there is none. Weights, running statistics, metrics and random states are as before afterwards.

    Args:
        trainer, pl_module: of the run.
        batch: on the module's device.
    """
    if not is_overridden("validation_step", pl_module):
        return {}
    run, found = step_runner(trainer, pl_module, None), {}
    with isolate_rng(), without_traces(pl_module), evaluating(pl_module), torch.no_grad():
        logged: dict[str, Any] = {}
        pl_module.__dict__["log"] = lambda name, value, *args, **kwargs: logged.setdefault(name, value)
        pl_module.__dict__["log_dict"] = lambda values, *args, **kwargs: [
            logged.setdefault(*item) for item in values.items()
        ]
        for name in ("quantized", "float"):
            logged.clear()
            if name == "float":
                with float_forward(pl_module):
                    result = run(batch)
            else:
                result = run(batch)
            value = _loss(result, logged)
            if value is None:
                return {}
            found[f"quant/{name}/loss"] = value
    return found


def _loss(result: Any, logged: Mapping[str, Any]) -> float | None:
    named = next((value for name, value in logged.items() if "loss" in name and not isinstance(value, Metric)), None)
    value = (
        result.get("loss", named) if isinstance(result, Mapping) else result if isinstance(result, Tensor) else named
    )
    if value is None or (isinstance(value, Tensor) and value.numel() != 1):
        return None
    return float(value)
