"""Batch norm corrected for what quantization did to its input, without the noise of re-estimating it.

Quantized weights shift the mean and change the variance of every channel they produce. Re-estimating
the running statistics repairs that, but replaces statistics of a whole training by those of a few
images: a model that hardly changed gets worse. Here only the difference between the float and the
quantized model on the same images goes in. With mean m and variance v of a channel at the input of the
batch norm, f float and q quantized, a² = (v_f + ε) / (v_q + ε)::

    BN'(x) = BN(a · (x - m_q) + m_f)   <=>   μ' = m_q - (m_f - μ) / a,   σ'² + ε = (σ² + ε) / a²

so equal statistics change nothing, and folded batch norms (`fold_batch_norm`) are corrected like any other. Lifecycle:
each batch runs twice, float and quantized. While the quantized pass runs, the batch is corrected in this way by its own
statistics, so that a layer sees inputs whose producers are corrected already; the running statistics are moved once,
after the last batch. It needs ranges, and changes nothing but running means and variances.

References: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019
(arXiv 1906.04721), section 4.2, and Finkelstein, Almog, Grobman, "Fighting Quantization Bias With Bias" (arXiv
1906.03193) correct the mean in this way. Correcting the variance as well, batch by batch, is this project's extension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lq_plugin.errors import CalibrationError
from lq_plugin.model.calibrate import evaluating
from lq_plugin.model.prepare import quantized_layers
from lq_plugin.ptq.batch_norm.reestimate import (
    BatchNormShift,
    MomentPool,
    ReestimatedBatchNorms,
    batch_norms,
    merge_ranks,
)
from lq_plugin.ptq.layerwise.watch import CallWatch, run_both
from lq_plugin.utilities import hooks


def correct_batch_norm(
    model: nn.Module,
    batches: Iterable[Any],
    run: Callable[[Any], Any] | None = None,
    *,
    layers: Iterable[str] | None = None,
) -> ReestimatedBatchNorms:
    """Corrects running means and variances so that each channel's output keeps the float model's mean and variance.

    Every batch runs twice, float and quantized, in evaluation mode and without gradients. With several
    processes the statistics of all ranks are merged.

    Args:
        model: prepared and calibrated.
        batches: calibration data, read once.
        run: runs the model on one batch; `model(batch)` when None.
        layers: names of the batch norms to correct; None: all.

    Returns:
        How far the statistics of each layer moved, and the layers that have none or were not reached.

    Raises:
        CalibrationError: no batches, NaN or Inf at the input of a batch norm, or a model that is not prepared or
            calibrated. Nothing is changed then.
        QuantizationError: names in `layers` that are no batch norm.

    >>> import lq_plugin
    >>> model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3)).eval()
    >>> batches = [torch.randn(64, 4, generator=torch.Generator().manual_seed(0))]
    >>> mean = model(batches[0]).mean(0)
    >>> _ = lq_plugin.prepare(model, "w2a8")
    >>> _ = lq_plugin.calibrate(model, batches)
    >>> bool((model(batches[0]).mean(0) - mean).abs().max() < 1e-5)
    False
    >>> _ = correct_batch_norm(model, batches)
    >>> bool((model(batches[0]).mean(0) - mean).abs().max() < 1e-5)
    True
    """
    if not quantized_layers(model):
        raise CalibrationError("the model has no quantized layers: prepare it first (lq_plugin.prepare)")
    chosen = batch_norms(model, None if layers is None else list(layers))
    watches = {
        name: OutputWatch(name, bn)
        for name, bn in chosen.items()
        if bn.running_mean is not None and bn.running_var is not None
    }
    count = 0
    with evaluating(model), torch.no_grad(), ExitStack() as stack:
        for watch in watches.values():
            stack.callback(hooks.before(watch.bn, watch, with_kwargs=True).remove)
        for batch in batches:
            run_both(model, run or model, batch, watches.values())
            count += 1
    if not count:
        raise CalibrationError("no calibration data: the loader gave 0 batches")
    shifts = apply_correction(watches)
    without = tuple(name for name in chosen if name not in watches)
    return ReestimatedBatchNorms(count, shifts, tuple(name for name in watches if name not in shifts), without)


class OutputWatch(CallWatch[tuple[Tensor, Tensor]]):
    """Forward pre-hook of a batch norm that takes its quantized input back to the float input's mean and variance.

    Args:
        name: of the batch norm.
        bn: one with running statistics.
    """

    def __init__(self, name: str, bn: _BatchNorm) -> None:
        super().__init__(f"batch norm {name!r}")
        self.bn = bn
        self.float_pool, self.quantized_pool = MomentPool(), MomentPool()

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x = self.see(args[0] if args else kwargs["input"])
        return ((x, *args[1:]), kwargs) if args else (args, kwargs | {"input": x})

    def measure(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, variance, count = self._statistics(x)
        pool = self.quantized_pool if self.correcting else self.float_pool
        pool.merge(count, mean, variance * count)
        return mean, variance

    def corrected(self, x: Tensor, was: tuple[Tensor, Tensor], now: tuple[Tensor, Tensor]) -> Tensor:
        a = _gain(was[1], now[1], self.bn.eps)
        shape = (1, -1) + (1,) * (x.ndim - 2)
        return torch.addcmul((was[0] - now[0] * a).to(x).view(shape), x, a.to(x).view(shape))

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor, int]:
        """Returns mean and variance of each channel of `x [N, C, ...]`, float64 on the CPU, and a channel's elements.

        E[x²] - E[x]² of each image, ten times faster than `torch.var_mean`: what is subtracted first, the
        running mean, is near the mean, so that little cancels; the images are joined in float64.
        """
        assert self.bn.running_mean is not None
        pivot = self.bn.running_mean.to(x)
        images = (x - pivot.view((1, -1) + (1,) * (x.ndim - 2))).reshape(*x.shape[:2], -1)
        pixels = images.shape[2]
        mean = images.mean(2).cpu().double().mean(0)
        square = torch.linalg.vector_norm(images, dim=2).cpu().double().square().mean(0) / pixels
        return mean + pivot.cpu().double(), (square - mean.square()).clamp(min=0.0), x.shape[0] * pixels


def _gain(float_variance: Tensor, quantized_variance: Tensor, eps: float) -> Tensor:
    """a = sqrt((v_f + ε) / (v_q + ε)); 1 where a batch norm without ε sees a constant."""
    ratio = (float_variance + eps) / (quantized_variance + eps)
    return torch.where(ratio.isfinite() & (ratio > 0), ratio, 1.0).sqrt()


def apply_correction(watches: dict[str, OutputWatch]) -> dict[str, BatchNormShift]:
    """Moves running means and variances by what all batches of all processes have shown.

    Args:
        watches: by name of the batch norm, after the last batch.

    Returns:
        The change of each batch norm that a batch has reached.

    Raises:
        CalibrationError: NaN or Inf at the input of a batch norm. Nothing is changed then.
    """
    floats = {name: watch.float_pool for name, watch in watches.items()}
    quantized = {name: watch.quantized_pool for name, watch in watches.items()}
    merge_ranks(floats)
    merge_ranks(quantized)
    reached = [name for name, pool in floats.items() if pool.count]
    broken = [
        name
        for name in reached
        for pool in (floats[name], quantized[name])
        if not (pool.mean + pool.squares).isfinite().all()
    ]
    if broken:
        raise CalibrationError(
            f"cannot correct batch norm: NaN or Inf at the input of {', '.join(map(repr, dict.fromkeys(broken)))}"
        )
    shifts = {}
    for name in reached:
        bn = watches[name].bn
        assert bn.running_mean is not None
        assert bn.running_var is not None
        before, before_square = bn.running_mean.cpu().double(), bn.running_var.cpu().double() + bn.eps
        a = _gain(floats[name].squares / floats[name].count, quantized[name].squares / quantized[name].count, bn.eps)
        mean = quantized[name].mean - (floats[name].mean - before) / a
        # A gain above sqrt(1 + σ² / ε) cannot be stored: a variance is not negative.
        variance = (before_square / a.square() - bn.eps).clamp(min=0.0)
        with torch.no_grad():
            bn.running_mean.copy_(mean)
            bn.running_var.copy_(variance)
        ratio = (variance + bn.eps) / before_square
        shift = float(((mean - before).abs() / before_square.sqrt()).max())
        shifts[name] = BatchNormShift(floats[name].count, shift, (float(ratio.min()), float(ratio.max())))
    return shifts
