"""Quantizer of weights that were read from a packed file."""

from __future__ import annotations

from torch import Tensor

from lq_plugin.errors import QuantizationError
from lq_plugin.quantizers.base import Levels
from lq_plugin.quantizers.weight import WeightQuantizer


class PackedWeightQuantizer(WeightQuantizer):
    """Quantizer of a weight whose values lie on the levels already and pass unchanged.

    The file holds no latent weight, so that there is nothing to train.
    """

    needs_calibration = False
    values: Tensor

    def make_qparams(self) -> None:
        self.needs_calibration = False
        self.set_calibrated()

    def hold(self, weight: Tensor) -> None:
        """Keeps the values themselves, where the parameter is tied and holds another layer's."""
        self.register_buffer("values", weight)

    def qparams(self, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        raise QuantizationError(
            f"{self.name} was read from a packed file, which holds its values; its scales are in the file"
        )

    def levels(self, x: Tensor | None = None) -> Levels | None:
        return None

    def quantize_values(self, x: Tensor) -> Tensor:
        if self.training and x.requires_grad:
            raise QuantizationError(
                f"{self.name} was read from a packed file, which holds no latent weight to train; train from a "
                "checkpoint"
            )
        return self.values.to(x.dtype) if "values" in self._buffers else x

    def calibrate(self, weight: Tensor) -> None:
        raise QuantizationError(f"{self.name} was read from a packed file: it has no range to find")
