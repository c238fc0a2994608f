"""The contract of every quantizer: a module that maps a tensor to its quantized values.

A quantizer has one `spec`, belongs to one tensor of one layer (`name`, for messages), and is in one of
these states, all of which live in its `state_dict`:

* not calibrated: it has no range yet. In training it passes its input on and gathers what the first
  range comes from, once the batch is over; in evaluation it raises: a network is never silently float;
* calibrated: it quantizes while `enabled`;
* disabled: it passes its input on unchanged, bit for bit.

Two attributes steer it in one process only: `collector` (calibration in progress: gather statistics,
pass on) and `observing` (training: keep a running range, committed once a batch).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lq_plugin.errors import CalibrationError
from lq_plugin.ranges import Histogram, Sample
from lq_plugin.spec import QuantSpec


class Quantizer(nn.Module):
    """Base class. A subclass gives `quantize_values`, `qparams` and `load_sample`.

    Args:
        spec: how to quantize.
        name: `"layer1.0.conv1.weight"`, for messages and reports.
    """

    enabled: Tensor
    calibrated: Tensor
    #: Whether it must be calibrated before it can quantize.
    needs_calibration = True
    #: Parameters that weight decay would pull to zero for no good.
    no_weight_decay: tuple[str, ...] = ()

    def __init__(self, spec: QuantSpec, name: str) -> None:
        super().__init__()
        self.spec = spec
        self.name = name
        self.observing = False
        self.allow_uncalibrated = False
        self.collector: Histogram | None = None
        # Tensors of shape [1], not Python flags: they travel with the state_dict, and sharding refuses 0-dim.
        self.register_buffer("enabled", torch.ones(1, dtype=torch.bool))
        self.register_buffer("calibrated", torch.zeros(1, dtype=torch.bool))
        # Python copies: reading a tensor would synchronize the device at every call.
        self._enabled = True
        self._calibrated = False

    def quantize_values(self, x: Tensor) -> Tensor:
        """Fake-quantized `x`: same shape and dtype."""
        raise NotImplementedError

    def qparams(self, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scale and zero point now in force, of the shape that broadcasts against the blocks of the tensor."""
        raise NotImplementedError

    def load_sample(self, sample: Sample) -> None:
        """Set the range from statistics, in place; the quantizer is calibrated afterwards."""
        raise NotImplementedError

    def set_enabled(self, enabled: bool) -> None:
        """Switch quantization on or off."""
        if enabled != self._enabled:
            self.enabled.fill_(enabled)
            self._enabled = enabled

    def set_calibrated(self, calibrated: bool = True) -> None:
        """Mark the range as found (or as lost)."""
        if calibrated != self._calibrated:
            self.calibrated.fill_(calibrated)
            self._calibrated = calibrated

    @property
    def is_enabled(self) -> bool:
        """Whether it quantizes, once calibrated."""
        return self._enabled

    @property
    def is_calibrated(self) -> bool:
        """Whether it has a range."""
        return self._calibrated

    def forward(self, x: Tensor) -> Tensor:
        if self.collector is not None:
            self.collect(x)
            return x
        if self.training and self.observing:
            self.observe(x)
        if not self._enabled:
            return self.pass_on(x)
        if self.needs_calibration and not self._calibrated:
            if self.training:
                self.collect_first(x)
                return self.pass_on(x)
            if self.allow_uncalibrated:
                return x
            raise CalibrationError(
                f"{self.name} ({self.spec}) has no range yet: calibrate first (PTQ(...) with trainer.validate, or "
                "lq_plugin.calibrate), train with QAT(...), or load a quantized checkpoint"
            )
        return self.quantize_values(x)

    def pass_on(self, x: Tensor) -> Tensor:
        """`x` as it is. While gradients flow, learned ranges are touched with weight 0: DDP refuses parameters without gradient."""
        if self.training and torch.is_grad_enabled():
            for parameter in self.parameters():
                if parameter.requires_grad:
                    x = x + 0.0 * parameter.sum().to(x.dtype)
        return x

    def collect(self, x: Tensor) -> None:
        """Add a batch to the collector (calibration)."""
        raise NotImplementedError

    def collect_first(self, x: Tensor) -> None:
        """Gather what the first range comes from, in training; no effect on quantizers that need no data."""

    def observe(self, x: Tensor) -> None:
        """Watch a training batch; no effect on quantizers without a moving range."""

    def _apply(self, fn: Any, recurse: bool = True) -> Quantizer:
        # `model.bfloat16()` and precision="bf16-true" must not round statistics and scales: an EMA of 2.0
        # stalls at 1.96 in bfloat16. Moves between devices go through.
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs):
        if not any(key.startswith(prefix) for key in state_dict):
            # A float checkpoint: its weights load, and the range has to be found anew.
            self.set_calibrated(False)
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        self._enabled = bool(self.enabled)
        self._calibrated = bool(self.calibrated)

    def extra_repr(self) -> str:
        return f"{self.spec}{'' if self._calibrated else ', not calibrated'}{'' if self._enabled else ', disabled'}"


def float32(value: float, shape: tuple[int, ...]) -> Tensor:
    """A new tensor of statistics: float32 although the Trainer's precision may have set another default dtype."""
    return torch.full(shape, value, dtype=torch.float32)
