"""Activations with a scale for each short vector, found at run time."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from lq_plugin.functional.affine import extremes, qparams_from_bounds
from lq_plugin.functional.block_kernel import fake_quantize_blocks, vector_rule
from lq_plugin.functional.grouping import blocks, unblocks
from lq_plugin.functional.vs_quant import integer_scale
from lq_plugin.intent.spec import PerGroup, QuantSpec
from lq_plugin.native.kernels import BlockRule
from lq_plugin.quantizers.activation import ActivationQuantizer


class VectorActivationQuantizer(ActivationQuantizer):
    """VS-Quant for activations, in vectors of `group_size` channels (see `lq_plugin.functional.vs_quant`).

    γ is fixed before the forward pass, by calibration or EMA, so that what a sample gets does not depend on the
    batch it is in; the integer scale of each vector is found from the vector itself. A range smaller than the data
    clips its largest vectors.

    Args:
        spec: `int` or `uint` without zero point, per group with `scale_bits`.
        name: for messages.
        channels: size of the channel axis.
        channel_axis: the layer's channel axis of this activation.
    """

    def __init__(self, spec: QuantSpec, name: str, channels: int, channel_axis: int) -> None:
        super().__init__(spec, name, channels, channel_axis)
        self.group = cast(PerGroup, spec.granularity)

    def quantize_values(self, x: Tensor) -> Tensor:
        if (
            self.rounds_to_nearest
            and (done := fake_quantize_blocks(x, self.axis, self.block_rule, self.result_dtype(x))) is not None
        ):
            return done
        # Channels to dim 1, as in a weight: [N, C, *spatial].
        rows = x.movedim(self.axis, -1).reshape(-1, x.shape[self.axis])
        vectors = blocks(rows, self.group)
        y = unblocks(self.rounded_vectors(vectors), rows.shape, self.group)
        return y.reshape(x.movedim(self.axis, -1).shape).movedim(-1, self.axis)

    def block_rule(self) -> BlockRule | None:
        """Returns the computation of `rounded_vectors` as a rule for the kernels; None where they do not have it."""
        bits = cast(int, self.group.scale_bits)
        return vector_rule(self.group.group_size, self.spec.grid, bits, (self.scale / (2**bits - 1)).item())

    def rounded_vectors(self, vectors: Tensor) -> Tensor:
        """Returns fake-quantized `[N, G, V, *spatial]`."""
        scale = self.vector_scale(vectors.detach())
        return self.rounded(vectors, scale, torch.zeros_like(scale))

    def vector_scale(self, vectors: Tensor) -> Tensor:
        """Returns scales for `[N, G, V, *spatial]`, broadcastable to it."""
        bits = cast(int, self.group.scale_bits)
        shape = (*vectors.shape[:2], 1, *vectors.shape[3:])
        scale, _ = qparams_from_bounds(*extremes(vectors, shape), self.spec.grid)
        coarse = self.scale / (2**bits - 1)
        y: Tensor = integer_scale(scale, coarse, bits) * coarse
        return y
