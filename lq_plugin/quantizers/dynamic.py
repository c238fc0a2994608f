"""Activations whose range is found from the tensor at hand, at run time."""

from __future__ import annotations

from torch import Tensor

from lq_plugin.functional.affine import bounds_from_qparams, extremes
from lq_plugin.functional.dynamic import dynamic_qparams, fake_quantize_dynamic
from lq_plugin.functional.grouping import blocks, scale_shape, unblocks
from lq_plugin.intent.spec import PerGroup
from lq_plugin.quantizers.activation import ActivationQuantizer
from lq_plugin.quantizers.base import Levels


class DynamicActivationQuantizer(ActivationQuantizer):
    """Integers with a range of the present tensor (see `lq_plugin.functional.dynamic`).

    One scale for the tensor, for each row along the last dim (`per_token`), for each channel, or for each group of
    channels. Nothing is calibrated and nothing kept.
    """

    needs_calibration = False

    def make_qparams(self) -> None:
        self.set_calibrated()

    def bounds_to_qparams(self, minimum: Tensor, maximum: Tensor) -> tuple[Tensor, Tensor]:
        return dynamic_qparams(minimum, maximum, self.spec.grid)

    def qparams(self, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns scale and zero point of `x`, broadcastable to it; for groups `x` is as `blocks` views it."""
        if x is None:
            raise ValueError(f"{self.name}: the range of '{self.spec}' follows the values; pass them to qparams")
        granularity = self.spec.granularity
        if isinstance(granularity, PerGroup):  # blocks of rows: [rows, groups, size]
            shape: tuple[int, ...] = (*x.shape[:2], 1)
        else:
            shape = scale_shape(tuple(x.shape), granularity, self._axis_of(x) if self.per_channel else 0)
        return self.bounds_to_qparams(*extremes(x, shape))

    def levels(self, x: Tensor | None = None) -> Levels | None:
        if x is None or isinstance(self.spec.granularity, PerGroup):
            return None
        scale, zero_point = self.qparams(x)
        return Levels(*bounds_from_qparams(scale, zero_point, self.spec.grid), scale)

    def quantize_values(self, x: Tensor) -> Tensor:
        group = self.spec.granularity
        if not isinstance(group, PerGroup):
            return self.rounded(x, *self.qparams(x))
        channels_last = x.movedim(self.axis, -1)
        rows = channels_last.reshape(-1, channels_last.shape[-1])
        grouped = blocks(rows, group)
        y = unblocks(self.rounded(grouped, *self.qparams(grouped)), tuple(rows.shape), group)
        return y.reshape(channels_last.shape).movedim(-1, self.axis)

    def rounded(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        if self.spec.stochastic and self.training:
            return super().rounded(x, scale, zero_point)
        return fake_quantize_dynamic(x, scale, zero_point, self.spec.grid)
