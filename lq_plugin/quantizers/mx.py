"""MX formats as quantizers: the scales follow from the values, so nothing is calibrated or stored."""

from __future__ import annotations

import torch
from torch import Tensor

from lq_plugin.functional.affine import quantize
from lq_plugin.functional.block_kernel import fake_quantize_blocks, mx_rule
from lq_plugin.functional.fixed_levels import FixedLevels, IntegerLevels
from lq_plugin.functional.lookup import Reading, read_rows
from lq_plugin.functional.mx import mx_exponents, mx_step, step_of
from lq_plugin.intent.formats import FORMATS
from lq_plugin.intent.spec import MX_FORMATS, QuantSpec
from lq_plugin.native.kernels import BlockRule
from lq_plugin.quantizers.registry import Container, Part, Parts, Storage, Values, register_format
from lq_plugin.quantizers.vector import VectorActivationQuantizer
from lq_plugin.quantizers.weight import WeightQuantizer


class MXWeightQuantizer(WeightQuantizer):
    """Weights in MX4, MX6 or MX9 (see `lq_plugin.functional.mx`)."""

    def qparams(self, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns the step of each element of the blocks `x`; there is no zero point."""
        if x is None:
            raise ValueError(f"{self.name}: the steps of {self.spec} follow the weight; pass its blocks to qparams")
        step = mx_step(x.detach(), self.spec.bit_width - 1)
        return step, torch.zeros_like(step)

    @property
    def has_fixed_levels(self) -> bool:
        return True

    def fixed_levels(self, w: Tensor) -> FixedLevels:
        return IntegerLevels(*self.qparams(w), False, self.spec.grid)

    def keep_levels(self, levels: FixedLevels) -> None:
        # Nothing to keep: the steps of a weight on these levels are these or, where its magnitudes have become smaller,
        # finer ones by powers of two, which have the same levels among theirs.
        self.set_calibrated()

    def quantize_values(self, x: Tensor) -> Tensor:
        done = fake_quantize_blocks(x, 1, lambda: mx_rule(self.spec.bit_width - 1), self.result_dtype(x))
        return super().quantize_values(x) if done is None else done

    def _rows_are_independent(self) -> bool:
        return True

    def quantize_rows(self, weight: Tensor, index: Tensor, reading: Reading) -> Tensor:
        return self.quantize_values(read_rows(weight, index.reshape(-1), reading)).view(*index.shape, -1)


class MXActivationQuantizer(VectorActivationQuantizer):
    """Activations in MX4, MX6 or MX9, blocks along the channels."""

    needs_calibration = False

    def block_rule(self) -> BlockRule:
        return mx_rule(self.spec.bit_width - 1)

    def vector_scale(self, vectors: Tensor) -> Tensor:
        return mx_step(vectors, self.spec.bit_width - 1)

    def levels(self, x: Tensor | None = None) -> None:
        return None


def _encode(quantizer: WeightQuantizer, w: Tensor) -> Parts:
    m = quantizer.spec.bit_width - 1
    exponent, shift = mx_exponents(w)
    codes = quantize(w, step_of(exponent, shift, m), torch.zeros(()), quantizer.spec.grid) + 2**m - 1
    return {"codes": Part(codes, m + 1), "exponent": Part(exponent + 127, 8), "shift": Part(shift, 1)}


def _decode(spec: QuantSpec, parts: Values) -> Tensor:
    m = spec.bit_width - 1
    y: Tensor = (parts["codes"] - 2**m + 1) * step_of(parts["exponent"] - 127, parts["shift"], m)
    return y


def _container(spec: QuantSpec, values: Values) -> Container:
    """Returns the levels as INT4 or INT8 in blocks of 2, the elements that share a microexponent."""
    m, codes = spec.bit_width - 1, values["codes"]
    steps = step_of(values["exponent"] - 127, values["shift"], m)[:, :, ::2].flatten(1, 2)
    pairs = -(-codes.shape[1] // 2)
    return Container(codes - 2**m + 1, 4 if m < 4 else 8, True, steps[:, :pairs], block=2)


for _name in MX_FORMATS:
    register_format(
        _name,
        FORMATS[_name],
        weight=MXWeightQuantizer,
        activation=MXActivationQuantizer,
        storage=Storage(_encode, _decode),
        onnx=_container,
    )
