"""Batch norm while quantizing: frozen statistics in training, exact statistics after it.

Batch norm means `nn.BatchNorm1d/2d/3d`, `nn.SyncBatchNorm` and their subclasses. Instance norm
normalizes by its own instance in training mode, so freezing would change what it computes and
there is nothing to pool: both functions leave it alone.

Reference: Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference"
(arXiv 1806.08342), section 3.2.2, freezes the statistics late in training; Wu and Johnson,
"Rethinking Batch in BatchNorm" (arXiv 2105.07576), section 3, re-estimates them ("PreciseBN");
Nagel et al., "Overcoming Oscillations in Quantization-Aware Training" (ICML 2022, arXiv
2203.11086), section 3.3, why low bit-widths need it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lq_plugin.errors import CalibrationError, QuantizationError, did_you_mean, raise_all
from lq_plugin.model.graph.record import without_compile
from lq_plugin.model.ranks import gathered, world_size
from lq_plugin.utilities import hooks

Batch = TypeVar("Batch")


def batch_norms(model: nn.Module, layers: Collection[str] | None = None) -> dict[str, _BatchNorm]:
    """Returns the batch norms of a model by qualified name, a shared one once; `layers` picks some by name.

    Raises:
        QuantizationError: names in `layers` that are no batch norm.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    if layers is None:
        return found
    unknown = [name for name in layers if name not in found]
    raise_all(QuantizationError, "no such batch norm", [f"{name!r}.{did_you_mean(name, found)}" for name in unknown])
    return {name: found[name] for name in layers}


class FrozenBatchNorms:
    """Batch norms held in eval mode while the model trains. Made by `freeze_batch_norm`.

    `model.train()` switches them back, so a training loop calls `apply()` before every batch; it
    is idempotent. Weight and bias still get gradients. As a context manager it releases on exit.
    """

    def __init__(self, model: nn.Module, layers: Collection[str] | None = None) -> None:
        modules = dict(model.named_modules())
        self._layers = [
            (bn, modules[name.rpartition(".")[0]] if name else None) for name, bn in batch_norms(model, layers).items()
        ]
        self._before = {bn: bn.training for bn, _ in self._layers}
        # In eval mode inside a training parent: frozen by someone else, and to stay so.
        self._foreign = {
            bn for bn, parent in self._layers if parent is not None and parent.training and not bn.training
        }
        self.apply()

    def __len__(self) -> int:
        return len(self._layers)

    def apply(self) -> None:
        """Puts the layers in eval mode; may be called any number of times."""
        for bn, _ in self._layers:
            bn.training = False

    def release(self) -> None:
        """Lets the layers follow the mode of their parent module again.

        Not the mode they had: freezing may begin while the model is in eval mode and end while
        it trains. Layers that were frozen before stay frozen.
        """
        for bn, parent in self._layers:
            bn.training = self._before[bn] if parent is None else parent.training and bn not in self._foreign

    def __enter__(self) -> FrozenBatchNorms:
        self.apply()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def freeze_batch_norm(model: nn.Module, layers: Collection[str] | None = None) -> FrozenBatchNorms:
    """Freezes the statistics of every batch norm (or of `layers`): they normalize by their running ones.

    Raises:
        QuantizationError: names in `layers` that are no batch norm.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    >>> frozen = freeze_batch_norm(model)
    >>> _ = model.train()      # someone calls it again
    >>> frozen.apply()         # before each batch
    >>> model.training, model[1].training
    (True, False)
    >>> frozen.release()
    >>> model[1].training
    True
    """
    return FrozenBatchNorms(model, layers)


@dataclass(frozen=True)
class BatchNormShift:
    """The change in one layer's running statistics.

    Args:
        elements: values per channel that were pooled.
        mean_shift: largest |new mean - old mean| of a channel, in old standard deviations.
        variance_ratio: smallest and largest new variance / old variance of a channel (with eps).
    """

    elements: int
    mean_shift: float
    variance_ratio: tuple[float, float]


@dataclass(frozen=True)
class ReestimatedBatchNorms:
    """The result of `reestimate_batch_norm`.

    Args:
        batches: number of batches that ran (on this rank).
        shifts: layers with new statistics.
        never_called: layers that no batch reached; they keep their statistics.
        without_statistics: layers with `track_running_stats=False`; nothing to estimate.
    """

    batches: int
    shifts: dict[str, BatchNormShift]
    never_called: tuple[str, ...] = ()
    without_statistics: tuple[str, ...] = ()


class MomentPool:
    """Count, mean and sum of squared deviations per channel, merged by Chan's formula, in float64."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, torch.zeros(0), torch.zeros(0)

    def see(self, x: Tensor) -> None:
        # [N, C, ...]; half precision would overflow in the squares.
        x = x.detach().transpose(0, 1).flatten(1)
        x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        variance, mean = torch.var_mean(x, dim=1, correction=0)
        self.merge(x.shape[1], mean.cpu().double(), variance.cpu().double() * x.shape[1])

    def merge(self, count: int, mean: Tensor, squares: Tensor) -> None:
        if count == 0:
            return
        if self.count == 0:
            self.count, self.mean, self.squares = count, mean, squares
            return
        total = self.count + count
        delta = mean - self.mean
        self.squares = self.squares + squares + delta.square() * (self.count * count / total)
        self.mean = self.mean + delta * (count / total)
        self.count = total


def reestimate_batch_norm(
    model: nn.Module,
    batches: Iterable[Batch],
    run: Callable[[Batch], Any],
    *,
    layers: Collection[str] | None = None,
) -> ReestimatedBatchNorms:
    """Sets running mean and variance to the exact statistics of all values seen in `batches`.

    mean = Σx / n and variance = Σ(x - mean)² / (n - 1) per channel over all elements of all batches together, whatever
    the batch sizes. While it runs, the batch norms normalize by their batch, as in training, and every other module is
    in eval mode, without gradients. Training flags, momentum and `num_batches_tracked` are as before in the end; so are
    the statistics when anything raises. With several processes the pools of all ranks are merged.

    A folded batch norm (`fold_batch_norm`) is a pure shift: re-estimating it would normalize
    again. Re-estimate before folding, or leave those out by `layers`.

    Args:
        model: any module.
        batches: what `run` takes.
        run: one forward pass.
        layers: names of the batch norms to re-estimate; the others stay in eval mode. None: all.

    Raises:
        CalibrationError: no batch, or NaN or Inf in what a layer was given.
        QuantizationError: names in `layers` that are no batch norm.
    """
    chosen = batch_norms(model, layers)
    tracked = {name: bn for name, bn in chosen.items() if bn.running_mean is not None and bn.running_var is not None}
    without = tuple(name for name in chosen if name not in tracked)
    pools = {name: MomentPool() for name in tracked}
    if not tracked:
        return ReestimatedBatchNorms(0, {}, (), without)

    count = 0
    with torch.no_grad(), _restored(tracked.values()) as before:
        with _only_training(model, tracked.values()), _watched(tracked, pools), without_compile():
            for batch in batches:
                run(batch)
                count += 1
        merge_ranks(pools)
        if not any(pool.count for pool in pools.values()) and count == 0:
            raise CalibrationError("cannot re-estimate batch norm: got no batch, at least 1 is needed")
        _raise_on_unusable(pools)
        shifts = {}
        for name, bn in tracked.items():
            if pools[name].count:
                shifts[name] = _shift(pools[name], before[bn][0], before[bn][1], bn.eps)
        # Every layer is back at its old statistics now; the new ones go in last, all or none.
    with torch.no_grad():
        for name in shifts:
            mean, variance = tracked[name].running_mean, tracked[name].running_var
            assert mean is not None
            assert variance is not None
            mean.copy_(pools[name].mean)
            variance.copy_(pools[name].squares / (pools[name].count - 1))
    return ReestimatedBatchNorms(count, shifts, tuple(name for name in tracked if name not in shifts), without)


def _shift(pool: MomentPool, mean: Tensor, variance: Tensor, eps: float) -> BatchNormShift:
    old = variance.cpu().double() + eps
    ratio = (pool.squares / (pool.count - 1) + eps) / old
    moved = (pool.mean - mean.cpu().double()).abs() / old.sqrt()
    return BatchNormShift(pool.count, float(moved.max()), (float(ratio.min()), float(ratio.max())))


def _raise_on_unusable(pools: dict[str, MomentPool]) -> None:
    faults = []
    for name, pool in pools.items():
        bad = int((~(pool.mean.isfinite() & pool.squares.isfinite())).sum())
        if bad:
            faults.append(
                f"{name!r} was given NaN or Inf, or values whose squares overflow, in {bad} of {pool.mean.numel()} "
                "channels"
            )
        if pool.count == 1:
            faults.append(f"{name!r} was given 1 value per channel, a variance needs at least 2")
    raise_all(CalibrationError, "cannot re-estimate batch norm", faults)


@contextmanager
def _restored(layers: Iterable[_BatchNorm]) -> Iterator[dict[_BatchNorm, list[Tensor]]]:
    """Puts buffers back in place: running mean, running variance, number of batches."""
    buffers = {
        bn: [b for b in (bn.running_mean, bn.running_var, bn.num_batches_tracked) if b is not None] for bn in layers
    }
    before = {bn: [buffer.clone() for buffer in group] for bn, group in buffers.items()}
    try:
        yield before
    finally:
        for bn, group in buffers.items():
            for buffer, old in zip(group, before[bn], strict=True):
                buffer.copy_(old)


@contextmanager
def _only_training(model: nn.Module, layers: Iterable[nn.Module]) -> Iterator[None]:
    # Flags are set one by one: `eval()` and `train()` have side effects in some modules.
    flags = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in flags:
            module.training = False
        for bn in layers:
            bn.training = True
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def _watched(layers: dict[str, _BatchNorm], pools: dict[str, MomentPool]) -> Iterator[None]:
    def watch(pool: MomentPool) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        return lambda module, args, kwargs: pool.see(args[0] if args else kwargs["input"])

    with ExitStack() as stack:
        for name, bn in layers.items():
            stack.callback(hooks.before(bn, watch(pools[name]), with_kwargs=True).remove)
        yield


def merge_ranks(pools: dict[str, MomentPool]) -> None:
    """Joins the pools of all processes, in place; the names are the same in each."""
    if world_size() == 1:
        return
    everyone = gathered({name: (pool.count, pool.mean, pool.squares) for name, pool in pools.items()})
    # From empty, in rank order: every rank rounds alike.
    for name in pools:
        pools[name] = MomentPool()
        for ranks in everyone:
            pools[name].merge(*ranks[name])
