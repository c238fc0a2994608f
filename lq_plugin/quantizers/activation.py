"""Uniform integer quantizer of inputs, outputs and operands whose range is found by statistics."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

from lq_plugin.errors import CalibrationError, QuantizationError
from lq_plugin.functional.affine import (
    fake_quantize,
    fake_quantize_observed,
    observe,
)
from lq_plugin.intent.ranges import range_kind
from lq_plugin.intent.spec import PerChannel, QuantSpec
from lq_plugin.quantizers.base import Levels, Quantizer, float32
from lq_plugin.quantizers.shared_input import SharedInput
from lq_plugin.ranges import Histogram, Sample, estimate_range
from lq_plugin.ranges.histogram import MAX_SAMPLES

DEFAULT_MOMENTUM = 0.99
#: Batches that a calibration stands for in the ramp of an average: the next one then has a weight of 0.09.
CALIBRATED = 90
#: Hooks on every module of the process; torch 2.6 has no function that asks for them.
_GLOBAL_HOOKS = tuple(
    getattr(torch_module, f"_global_{kind}_hooks") for kind in ("backward_pre", "backward", "forward_pre", "forward")
)


class ActivationQuantizer(Quantizer):
    """Quantizer of an activation whose range is fixed before the forward pass.

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

    running_min: Tensor
    running_max: Tensor
    batches: Tensor
    batch_min: Tensor
    batch_max: Tensor
    takes_kernels = True

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
        self.make_qparams()

    def make_qparams(self) -> None:
        self.register_buffer("scale", float32(1.0, (self.channels,)))
        self.register_buffer("zero_point", float32(0.0, (self.channels,)))
        if self.moving:
            self.register_buffer("running_min", float32(0.0, (self.channels,)))
            self.register_buffer("running_max", float32(0.0, (self.channels,)))
            self.register_buffer("batches", torch.zeros(1, dtype=torch.int64))
            self.register_buffer("batch_min", float32(torch.inf, (self.channels,)), persistent=False)
            self.register_buffer("batch_max", float32(-torch.inf, (self.channels,)), persistent=False)

    @property
    def scales_output(self) -> bool:
        """True if the layer's output is multiplied by a scale of its input, see `QuantizedLayer.output_scale`."""
        return self.spec.kind.scales_output

    def broadcastable(self, per_channel: Tensor, x: Tensor) -> Tensor:
        """Returns values `[C]` in the shape that broadcasts against an activation."""
        if not self.per_channel:
            return per_channel
        shape = [1] * x.ndim
        shape[self._axis_of(x)] = -1
        return per_channel.view(shape)

    def _rows(self, x: Tensor) -> Tensor:
        return x.transpose(0, self._axis_of(x)).reshape(self.channels, -1) if self.per_channel else x.reshape(1, -1)

    def _axis_of(self, x: Tensor) -> int:
        """The axis that carries the channels.

        Raises:
            QuantizationError: `x` has no such axis, or another number of channels on it.
        """
        if -x.ndim <= self.axis < x.ndim and x.shape[self.axis] == self.channels:
            return self.axis
        raise QuantizationError(
            f"{self.name}: '{self.spec}' has a scale for each of {self.channels} channels on axis {self.axis}, got a "
            f"tensor of shape {list(x.shape)}; per_channel without a number means the layer's own channel axis"
        )

    def qparams(self, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.scale, self.zero_point

    def quantize_values(self, x: Tensor) -> Tensor:
        scale, zero_point = self.qparams()
        if self.per_channel:
            scale, zero_point = self.broadcastable(scale, x), self.broadcastable(zero_point, x)
        return self.rounded(x, scale, zero_point)

    def levels(self, x: Tensor | None = None) -> Levels | None:
        found = super().levels()
        return found if x is None or found is None else Levels(*(self.broadcastable(value, x) for value in found))

    def draw_key(self, x: Tensor) -> str:
        # Of the rank, and of the values: another call gets other numbers, the same one again, as gradient checkpointing
        # makes it, the same.
        ranked = torch.distributed.is_available() and torch.distributed.is_initialized()
        return f":{torch.distributed.get_rank() if ranked else 0}:{x.detach().sum(dtype=torch.float32).item()}"

    def new_collector(self) -> Histogram:
        """Returns empty statistics for one calibration."""
        at_most = None if range_kind(self.spec.range_name).count_all else MAX_SAMPLES
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
        minimum, maximum = estimate_range(self.spec.range, sample, self.range_grid())
        if self.moving:
            with torch.no_grad():
                self.running_min.copy_(minimum)
                self.running_max.copy_(maximum)
                self.batches.fill_(CALIBRATED)
        self.store_bounds(minimum, maximum)
        self.set_calibrated()

    def store_bounds(self, minimum: Tensor, maximum: Tensor) -> None:
        """Keeps clipping bounds `[C]`, in place."""
        self.store_qparams(*self.bounds_to_qparams(minimum, maximum))

    def observe(self, x: Tensor) -> None:
        if not self.moving:
            return
        with torch.no_grad():
            if not self.per_channel:
                observe(x, self.batch_min, self.batch_max)
                return
            rows = self._rows(x)
            self.take_in(rows.amin(1).float(), rows.amax(1).float())

    def quantize_observed(self, x: Tensor) -> Tensor:
        if not (self.moving and self._is_plain):
            return super().quantize_observed(x)
        # Observing and quantizing with what was observed before take one pass over the data together.
        return fake_quantize_observed(
            x, self.scale, self.zero_point, self.spec.grid, self.batch_min, self.batch_max, self.result_dtype(x)
        )

    def forward_shared(self, x: Tensor, shared: SharedInput) -> Tensor:
        """Returns `forward(x)`, or what another quantizer with the same qparams made of the same tensor."""
        if not self.rounds_plainly(x):
            y: Tensor = self(x)
            return y
        watches, grid, dtype = self._watches, self.spec.grid, self.result_dtype(x)

        def make() -> tuple[Tensor, Tensor, Tensor]:
            low, high = float32(torch.inf, (1,)), float32(-torch.inf, (1,))
            if not watches:
                return fake_quantize(x, self.scale, self.zero_point, grid, dtype), low, high
            return fake_quantize_observed(x, self.scale, self.zero_point, grid, low, high, dtype), low, high

        y, low, high = shared.once(x, (grid, self.scale.item(), self.zero_point.item(), watches, dtype), make)
        if watches:
            self.take_in(low, high)
        return y

    def rounds_plainly(self, x: Tensor) -> bool:
        """Returns True where a call is `fake_quantize` with one scale and nobody watches it."""
        self.follow_buffers()
        if not (self._calibrated and self._enabled and x.numel()) or "forward" in vars(self):
            return False
        if not self._is_plain or self.collector is not None or self.is_suspended:
            return False
        hooks = self._forward_hooks, self._forward_pre_hooks, self._backward_hooks, self._backward_pre_hooks
        return not any(hooks) and not any(_GLOBAL_HOOKS)

    def watched_extremes(self) -> tuple[Tensor, Tensor] | None:
        """Returns the batch's extremes, to be widened in place by what this call sees; None where it notes none."""
        return (self.batch_min, self.batch_max) if self._watches else None

    def take_in(self, low: Tensor, high: Tensor) -> None:
        """Extends the extremes `[C]` of the batch so far by others."""
        with torch.no_grad():
            self.batch_min.copy_(torch.minimum(self.batch_min, low))
            self.batch_max.copy_(torch.maximum(self.batch_max, high))

    @property
    def _watches(self) -> bool:
        """True where this call notes the batch's extremes."""
        return self.moving and self.observing and self.training

    @property
    def _is_plain(self) -> bool:
        """True where quantizing is `fake_quantize` with one scale, and what is noted is outside of no transform."""
        # As `is_transformed`, without another call on the way of every input.
        if not torch.compiler.is_compiling() and (
            torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
        ):
            return False
        return self.takes_kernels and self.rounds_to_nearest and not self.per_channel

    def commit(self, batch_min: Tensor, batch_max: Tensor) -> None:
        """Folds one batch's extremes `[C]` (over all ranks) into the moving range and empties the batch buffers.

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
                kept = ramp.clamp(max=self.momentum) if self.ramps else torch.full_like(ramp, self.momentum)
                share = (1.0 - kept).float()  # counts are integers, and the default dtype may be float64
                self.running_min.lerp_(batch_min, share)
                self.running_max.lerp_(batch_max, share)
                self.batches.add_(1)
            else:
                self.running_min.copy_(batch_min)
                self.running_max.copy_(batch_max)
            self.store_bounds(self.running_min, self.running_max)
            self.batch_min.fill_(torch.inf)
            self.batch_max.fill_(-torch.inf)
        self.set_calibrated()
