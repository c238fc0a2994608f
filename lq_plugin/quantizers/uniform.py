"""Uniform integer quantizers whose range is found by statistics."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from lq_plugin.errors import CalibrationError
from lq_plugin.functional.affine import (
    extremes,
    fake_quantize,
    fake_quantize_observed,
    fake_quantize_to_extremes,
    observe,
    qparams_from_bounds,
    zero_point_from,
)
from lq_plugin.functional.block_kernel import fake_quantize_blocks, vector_rule
from lq_plugin.functional.grouping import (
    block_mask,
    blocks,
    has_row_scales,
    reduced_dims,
    scale_shape,
    to_rows,
    unblocks,
)
from lq_plugin.functional.lookup import Reading, fake_quantize_rows, read_rows, scales_of_rows
from lq_plugin.functional.vs_quant import coarse_scale, integer_scale
from lq_plugin.native.kernels import BlockRule
from lq_plugin.quantizers.base import Levels, Quantizer, float32
from lq_plugin.quantizers.shared import SharedInput
from lq_plugin.ranges import Histogram, Sample, estimate_range
from lq_plugin.ranges.histogram import MAX_SAMPLES
from lq_plugin.ranges.mse import best_multiples
from lq_plugin.ranges.registry import COUNT_ALL
from lq_plugin.spec import IntegerGrid, PerChannel, PerGroup, PerTensor, QuantSpec

#: Weight ranges cheap enough to be found anew at every forward pass: they follow the weights exactly.
LIVE_WEIGHT_RANGES = frozenset({"minmax"})
DEFAULT_MOMENTUM = 0.99
#: Batches that a calibration stands for in the ramp of an average: the next one then has a weight of 0.09.
CALIBRATED = 90


class WeightQuantizer(Quantizer):
    """Quantizes a weight `[C_out, C_in, *kernel]`.

    A `minmax` range is taken from the weight at every call. Other ranges are estimated by
    `calibrate(weight)` and stay until the next call; `QAT` calls it at the start of each epoch.
    `fix(scale, zero_point)` ends both: from then on the qparams are those, whatever the weight becomes.

    Args:
        spec: how to quantize.
        name: for messages.
        shape: shape of the weight.
    """

    scale: Tensor
    zero_point: Tensor
    fixed: Tensor
    #: The weight itself is kept in ±this while it is trained, where a format asks for it.
    latent_bound: float | None = None

    def __init__(self, spec: QuantSpec, name: str, shape: tuple[int, ...]) -> None:
        super().__init__(spec, name)
        # In the state_dict once it is True: what follows the weight is nobody's to load.
        self.register_buffer("fixed", torch.zeros(1, dtype=torch.bool), persistent=False)
        self._fixed = False
        self._last: tuple[tuple[int, int], tuple[Tensor, Tensor]] | None = None
        self.shape = tuple(shape)
        self.live = spec.range_name in LIVE_WEIGHT_RANGES
        self.scale_shape = scale_shape(self.shape, spec.granularity)
        self.needs_calibration = not self.live
        self._make_qparams()

    def _make_qparams(self) -> None:
        self.register_buffer("scale", float32(1.0, self.scale_shape), persistent=not self.live)
        self.register_buffer("zero_point", float32(0.0, self.scale_shape), persistent=not self.live)

    @property
    def is_fixed(self) -> bool:
        """Whether the qparams were set by `fix`."""
        self.follow_buffers()
        return self._fixed

    def fix(self, scale: Tensor, zero_point: Tensor) -> None:
        """Set the qparams for good; `calibrate` no longer changes them. Shapes as `self.scale`."""
        with torch.no_grad():
            self.scale.copy_(scale)
            self.zero_point.copy_(zero_point)
        self._set_fixed(True)
        self.set_calibrated()

    def _set_fixed(self, fixed: bool) -> None:
        self.follow_buffers()
        self._write("fixed", fixed)
        self._note_fixed(fixed)

    def _read_switches(self) -> None:
        super()._read_switches()
        if (fixed := bool(self.fixed)) != self._fixed:
            self._note_fixed(fixed)

    def _note_fixed(self, fixed: bool) -> None:
        self._fixed = fixed
        keys = {"fixed", "scale", "zero_point"} if self.live else {"fixed"}
        hidden = self._non_persistent_buffers_set
        self._non_persistent_buffers_set = hidden - keys if fixed else hidden | keys

    def _load_from_state_dict(self, state_dict, prefix, *others):
        if any(key.startswith(prefix) for key in state_dict):
            self._set_fixed(prefix + "fixed" in state_dict)
        super()._load_from_state_dict(state_dict, prefix, *others)

    def qparams(self, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scale and zero point; a live range needs `x`, the blocks of the weight."""
        if self._fixed or not self.live:
            return self.scale, self.zero_point
        if x is None:
            raise ValueError(f"{self.name}: the range {self.spec.range!r} follows the weight; pass it to qparams")
        # Zero padding of a ragged group does no harm here: every range includes zero.
        return self._from_bounds(*extremes(x, self.scale_shape))

    def _from_bounds(self, minimum: Tensor, maximum: Tensor, sample: Sample | None = None) -> tuple[Tensor, Tensor]:
        """Scale and zero point for bounds shaped like the scales; with the `sample` they come from, `mse` measures
        integer scales."""
        scale, zero_point = qparams_from_bounds(minimum, maximum, self.spec.grid)
        group = self.spec.granularity
        if isinstance(group, PerGroup) and group.scale_bits is not None:
            coarse = coarse_scale(scale, group.scale_bits, group.coarse == "channel")
            if sample is not None and self.spec.range_name == "mse":
                low, own, shared = (of.expand_as(scale).flatten() for of in (minimum, scale, coarse))
                found = best_multiples(sample, low, own, shared, 2**group.scale_bits - 1, self.spec.grid)
                scale = found.view_as(scale) * coarse
            else:
                scale = integer_scale(scale, coarse, group.scale_bits) * coarse
            zero_point = zero_point_from(minimum.float().clamp(max=0.0), scale, self.spec.grid)
        return scale, zero_point

    def quantize_values(self, x: Tensor) -> Tensor:
        group = self.spec.granularity
        if self.live and not self._fixed and self.rounds_to_nearest and type(self).qparams is WeightQuantizer.qparams:
            if not isinstance(group, PerGroup) or group.scale_bits is None:
                return unblocks(
                    fake_quantize_to_extremes(blocks(x, group), self.scale_shape, self.spec.grid), x.shape, group
                )
            if group.coarse == "tensor" and not self.spec.grid.affine:
                done = fake_quantize_blocks(
                    x, 1, lambda: self._vector_rule(x, group.group_size, cast(int, group.scale_bits))
                )
                if done is not None:
                    return done
        w = blocks(x, group)
        scale, zero_point = self.qparams(w)
        return unblocks(self.rounded(w, scale, zero_point), x.shape, group)

    def takes_rows(self, reading: Reading) -> bool:
        """Whether `quantize_rows` may stand for a call, now: what a row becomes depends on it and on known qparams
        alone."""
        if (
            self.starts
            or self.collector is not None
            or not self._enabled
            or self._forward_hooks
            or self._forward_pre_hooks
        ):
            return False
        if self.needs_calibration and not self._calibrated:
            return False
        # What trains a scale is what trains its rows, before it is divided by how often they are read.
        return self._rows_are_independent() and not (reading.scale_grad_by_freq and self.spec.learned)

    def _rows_are_independent(self) -> bool:
        plain = (
            type(self).quantize_values is WeightQuantizer.quantize_values
            and type(self).qparams is WeightQuantizer.qparams
        )
        return plain and has_row_scales(self.spec.granularity) and not (self.spec.stochastic and self.training)

    def quantize_rows(self, weight: Tensor, index: Tensor, reading: Reading) -> Tensor:
        """`quantize_values(weight)[index]`, of the rows that are read alone; where `takes_rows` says so.

        Args:
            weight: `[rows, columns]`.
            index: integers of any shape.
            reading: how gradients come back.
        """
        group, qparams = self.spec.granularity, None
        if not self.live or self._fixed:
            qparams = self.scale, self.zero_point
        elif isinstance(group, PerTensor):
            qparams = self._qparams_of(weight)
        if self.rounds_to_nearest:
            done = fake_quantize_rows(weight, index, qparams, self.spec.grid, group, reading)
            if done is not None:
                return done
        rows = read_rows(weight, index.reshape(-1), reading)
        w = blocks(rows, group)
        if qparams is None:
            scale, zero_point = self._from_bounds(*extremes(w, scale_shape(tuple(rows.shape), group)))
        else:
            scale, zero_point = (scales_of_rows(value, index) for value in qparams)
        return unblocks(self.rounded(w, scale, zero_point), rows.shape, group).view(*index.shape, -1)

    def _qparams_of(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Those of a live range; in evaluation of the weight as it was at the last call, while nothing wrote to it."""
        # In compiled code nothing can be remembered from call to call.
        if self.training or torch.compiler.is_compiling() or weight.is_inference():
            return self.qparams(weight)
        state = weight.data_ptr(), weight._version
        if self._last is None or self._last[0] != state:
            self._last = state, self.qparams(weight)
        return self._last[1]

    def train(self, mode: bool = True) -> WeightQuantizer:
        self._last = None
        super().train(mode)
        return self

    def _vector_rule(self, x: Tensor, size: int, scale_bits: int) -> BlockRule:
        """Two-level scales, with γ of the weight as it is: the largest of all scales is that of the extremes."""
        largest, _ = qparams_from_bounds(*extremes(x, (1,) * x.ndim), self.spec.grid)
        return vector_rule(size, self.spec.grid, scale_bits, coarse_scale(largest, scale_bits).item())

    def sample(self, weight: Tensor) -> Sample:
        """The weight's values, one row for each scale; padding does not enter."""
        rows = to_rows(blocks(weight.detach().float(), self.spec.granularity), self.scale_shape)
        mask = block_mask(self.shape, self.spec.granularity)
        return Sample.from_tensor(
            rows, None if mask is None else to_rows(mask.to(weight.device), self.scale_shape), name=self.name
        )

    def counts(self, device: torch.device) -> Tensor | None:
        """How many elements share each scale, shaped like the scales; None where no ragged group makes them differ."""
        mask = block_mask(self.shape, self.spec.granularity)
        return None if mask is None else mask.to(device).sum(reduced_dims(self.scale_shape), keepdim=True)

    def calibrate(self, weight: Tensor) -> None:
        """Find the range from the weight.

        Raises:
            CalibrationError: naming the layer when the weight has NaN or Inf.
        """
        self.load_sample(self.sample(weight))

    def new_epoch(self, weight: Tensor) -> None:
        """Follow the weight once an epoch: a range that is estimated and not learned is found anew."""
        if self.needs_calibration and not self.spec.learned:
            self.calibrate(weight)

    def load_sample(self, sample: Sample) -> None:
        if not self.live and not self._fixed:
            minimum, maximum = estimate_range(self.spec.range, sample, self.spec.grid)
            self._store(minimum, maximum, sample)
        self.set_calibrated()

    def _store(self, minimum: Tensor, maximum: Tensor, sample: Sample) -> None:
        scale, zero_point = self._from_bounds(
            minimum.reshape(self.scale_shape), maximum.reshape(self.scale_shape), sample
        )
        with torch.no_grad():
            self.scale.copy_(scale)
            self.zero_point.copy_(zero_point)


class InputQuantizer(Quantizer):
    """Quantizes an activation with a range fixed before the forward pass.

    The range comes from calibration (`collector`, `load_sample`). With range `ema` it keeps moving
    in training: `observe` gathers the extremes of one batch, however often it runs over the same
    data (gradient checkpointing), and `commit` folds them into the average once the batch is over:
    r ← mₜ·r + (1 - mₜ)·batch with mₜ = min(m, (1 + t) / (10 + t)) after t batches. Without the ramp a
    network trained from scratch would outrun an average of the last hundred batches. A calibration counts as
    `CALIBRATED` of them, so that its range is not forgotten with the first batch; without one that batch is the
    first range. `ema:0.99:constant` has mₜ = m from the second batch on.

    Args:
        spec: how to quantize; per tensor or per channel.
        name: for messages.
        channels: size of the channel axis, for per-channel specs.
        channel_axis: the layer's channel axis of this activation.
    """

    scale: Tensor
    zero_point: Tensor
    running_min: Tensor
    running_max: Tensor
    batches: Tensor
    batch_min: Tensor
    batch_max: Tensor

    def __init__(self, spec: QuantSpec, name: str, channels: int, channel_axis: int) -> None:
        super().__init__(spec, name)
        granularity = spec.granularity
        self.per_channel = isinstance(granularity, PerChannel)
        self.axis = channel_axis
        if isinstance(granularity, PerChannel) and granularity.axis is not None:
            self.axis = granularity.axis
        self.channels = channels if self.per_channel else 1
        self.moving = spec.range_name == "ema"
        self.pending: Histogram | None = None
        momentum, _, constant = (spec.range_option or "").partition(":") if self.moving else ("", "", "")
        self.momentum, self.ramps = float(momentum or DEFAULT_MOMENTUM), not constant
        self._make_qparams()

    def _make_qparams(self) -> None:
        self.register_buffer("scale", float32(1.0, (self.channels,)))
        self.register_buffer("zero_point", float32(0.0, (self.channels,)))
        if self.moving:
            self.register_buffer("running_min", float32(0.0, (self.channels,)))
            self.register_buffer("running_max", float32(0.0, (self.channels,)))
            self.register_buffer("batches", torch.zeros(1, dtype=torch.int64))
            self.register_buffer("batch_min", float32(torch.inf, (self.channels,)), persistent=False)
            self.register_buffer("batch_max", float32(-torch.inf, (self.channels,)), persistent=False)

    def _view(self, per_channel: Tensor, ndim: int) -> Tensor:
        """`[C]` shaped to broadcast against an activation of `ndim` dims."""
        if not self.per_channel:
            return per_channel
        shape = [1] * ndim
        shape[self.axis] = -1
        return per_channel.view(shape)

    def _rows(self, x: Tensor) -> Tensor:
        return x.transpose(0, self.axis).reshape(self.channels, -1) if self.per_channel else x.reshape(1, -1)

    def qparams(self, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.scale, self.zero_point

    def quantize_values(self, x: Tensor) -> Tensor:
        scale, zero_point = self.qparams()
        return self.rounded(x, self._view(scale, x.ndim), self._view(zero_point, x.ndim))

    def levels(self, x: Tensor | None = None) -> Levels | None:
        found = super().levels()
        return found if x is None or found is None else Levels(*(self._view(value, x.ndim) for value in found))

    def draw_key(self, x: Tensor) -> str:
        # Of the rank, and of the values: another call gets other numbers, the same one again, as gradient checkpointing
        # makes it, the same.
        ranked = torch.distributed.is_available() and torch.distributed.is_initialized()
        return f":{torch.distributed.get_rank() if ranked else 0}:{x.detach().sum(dtype=torch.float32).item()}"

    def new_collector(self) -> Histogram:
        """Empty statistics for one calibration."""
        at_most = None if self.spec.range_name in COUNT_ALL else MAX_SAMPLES
        return Histogram(rows=self.channels, max_samples=at_most, device=self.calibrated.device, name=self.name)

    def collect(self, x: Tensor) -> None:
        assert self.collector is not None
        self.collector.update(self._rows(x) if self.per_channel else x)

    def collect_first(self, x: Tensor) -> None:
        if not self.moving:
            self.pending = self.pending or self.new_collector()
            self.pending.update(self._rows(x.detach()) if self.per_channel else x.detach())

    def load_sample(self, sample: Sample) -> None:
        if not self.needs_calibration:
            self.set_calibrated()
            return
        # Formats without a grid have the range minmax, which does not look at it.
        grid = self.spec.grid if self.spec.has_grid else IntegerGrid(-1, 1)
        minimum, maximum = estimate_range(self.spec.range, sample, grid)
        if self.moving:
            with torch.no_grad():
                self.running_min.copy_(minimum)
                self.running_max.copy_(maximum)
                self.batches.fill_(CALIBRATED)
        self._store(minimum, maximum)
        self.set_calibrated()

    def _store(self, minimum: Tensor, maximum: Tensor) -> None:
        scale, zero_point = qparams_from_bounds(minimum, maximum, self.spec.grid)
        with torch.no_grad():
            self.scale.copy_(scale)
            self.zero_point.copy_(zero_point)

    def observe(self, x: Tensor) -> None:
        if not self.moving:
            return
        with torch.no_grad():
            if not self.per_channel:
                observe(x, self.batch_min, self.batch_max)
                return
            rows = self._rows(x)
            self.take_in(rows.amin(1).float(), rows.amax(1).float())

    def forward(self, x: Tensor) -> Tensor:
        self.follow_buffers()
        # Observing and quantizing with what was observed before take one pass over the data together.
        if self._watches and self._calibrated and self._enabled and x.numel() and self._is_plain():
            return fake_quantize_observed(
                x, self.scale, self.zero_point, self.spec.grid, self.batch_min, self.batch_max
            )
        return super().forward(x)

    def forward_shared(self, x: Tensor, shared: SharedInput) -> Tensor:
        """The same, by what another quantizer with the same qparams made of the same tensor."""
        self.follow_buffers()
        if (
            not (self._calibrated and self._enabled and x.numel() and self._is_plain())
            or self._forward_hooks
            or self._forward_pre_hooks
        ):
            return self(x)
        watches, grid = self._watches, self.spec.grid

        def make() -> tuple[Tensor, Tensor, Tensor]:
            low, high = float32(torch.inf, (1,)), float32(-torch.inf, (1,))
            if not watches:
                return fake_quantize(x, self.scale, self.zero_point, grid), low, high
            return fake_quantize_observed(x, self.scale, self.zero_point, grid, low, high), low, high

        y, low, high = shared.once(x, (grid, self.scale.item(), self.zero_point.item(), watches), make)
        if watches:
            self.take_in(low, high)
        return y

    def take_in(self, low: Tensor, high: Tensor) -> None:
        """Let the extremes `[C]` of the batch so far take in others."""
        with torch.no_grad():
            self.batch_min.copy_(torch.minimum(self.batch_min, low))
            self.batch_max.copy_(torch.maximum(self.batch_max, high))

    @property
    def _watches(self) -> bool:
        """Whether the batch's extremes are wanted of this call."""
        return self.moving and self.observing and self.training

    def _is_plain(self) -> bool:
        """Whether a forward pass is `fake_quantize` with one scale and nothing else."""
        plain = type(self).quantize_values is InputQuantizer.quantize_values and not self.per_channel
        return plain and self.rounds_to_nearest and self.collector is None and not self.starts and not self.is_suspended

    def commit(self, batch_min: Tensor, batch_max: Tensor) -> None:
        """Fold one batch's extremes `[C]` (over all ranks) into the moving range and empty the batch buffers.

        Raises:
            CalibrationError: naming the layer when they are NaN or Inf.
        """
        if not (torch.isfinite(batch_min) & torch.isfinite(batch_max)).all():
            raise CalibrationError(
                f"{self.name}: the batch holds NaN or Inf (range {batch_min.min():g}..{batch_max.max():g})"
            )
        with torch.no_grad():
            if self._calibrated:
                ramp = (1.0 + self.batches) / (10.0 + self.batches)
                share = 1.0 - (ramp.clamp(max=self.momentum) if self.ramps else torch.full_like(ramp, self.momentum))
                self.running_min.lerp_(batch_min, share)
                self.running_max.lerp_(batch_max, share)
                self.batches.add_(1)
            else:
                self.running_min.copy_(batch_min)
                self.running_max.copy_(batch_max)
            self._store(self.running_min, self.running_max)
            self.batch_min.fill_(torch.inf)
            self.batch_max.fill_(-torch.inf)
        self.set_calibrated()
