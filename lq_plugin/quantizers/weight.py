"""Uniform integer quantizer of weights whose range is found by statistics."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from lq_plugin.functional.affine import (
    extremes,
    fake_quantize_to_extremes,
    qparams_from_bounds,
    qparams_of,
    zero_point_from,
)
from lq_plugin.functional.block_kernel import fake_quantize_blocks, vector_rule
from lq_plugin.functional.fixed_levels import FixedLevels, IntegerLevels
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
from lq_plugin.intent.spec import IntegerGrid, PerBlock, PerGroup, PerMatrix, PerTensor, QuantSpec
from lq_plugin.native.kernels import BlockRule
from lq_plugin.quantizers.base import Quantizer, float32
from lq_plugin.quantizers.sparse_rows import RowExtremes
from lq_plugin.ranges import Sample, estimate_range, summarize
from lq_plugin.ranges.estimators.mse import best_multiples

#: Weight ranges cheap enough to be found anew at every forward pass: they follow the weights exactly.
LIVE_WEIGHT_RANGES = frozenset({"minmax"})


class WeightQuantizer(Quantizer):
    """Quantizer of a weight `[C_out, C_in, *kernel]`.

    A `minmax` range is taken from the weight at every call. Other ranges are estimated by
    `calibrate(weight)` and stay until the next call; `QAT` calls it at the start of each epoch.
    `fix(scale, zero_point)` ends both: from then on the qparams are those, whatever the weight becomes.

    Args:
        spec: how to quantize.
        name: for messages.
        shape: shape of the weight.
    """

    fixed: Tensor
    switches = (*Quantizer.switches, "fixed")
    #: The weight itself is kept in ±this while it is trained, where a format asks for it.
    latent_bound: float | None = None
    takes_kernels = True
    #: Buffers that are in the state_dict once the scales are fixed.
    fixed_buffers: ClassVar[tuple[str, ...]] = ("scale", "zero_point")

    def __init__(self, spec: QuantSpec, name: str, shape: tuple[int, ...]) -> None:
        super().__init__(spec, name)
        # In the state_dict once it is True: what follows the weight is nobody's to load.
        self.register_buffer("fixed", torch.zeros(1, dtype=torch.bool), persistent=False)
        self._fixed = False
        self._last: tuple[tuple[int, int], tuple[Tensor, Tensor]] | None = None
        self._rows: RowExtremes | None = None
        self.shape = tuple(shape)
        self.live = spec.range_name in LIVE_WEIGHT_RANGES
        self._from_extremes = self.takes_kernels and self.live and self._rounds_to_nearest and spec.has_grid
        self._in_blocks = isinstance(spec.granularity, (PerGroup, PerBlock, PerMatrix))
        self._by_rows = self.takes_kernels and has_row_scales(spec.granularity)
        self._grid = cast(IntegerGrid, spec.grid if spec.has_grid else None)
        self.scale_shape = scale_shape(self.shape, spec.granularity)
        self.needs_calibration = not self.live
        self.make_qparams()

    def make_qparams(self) -> None:
        self.register_buffer("scale", float32(1.0, self.scale_shape), persistent=not self.live)
        self.register_buffer("zero_point", float32(0.0, self.scale_shape), persistent=not self.live)

    @property
    def is_fixed(self) -> bool:
        """True where `fix` has set the qparams."""
        self.follow_buffers()
        return self._fixed

    def fix(self, scale: Tensor, zero_point: Tensor) -> None:
        """Sets the qparams, shaped like `self.scale`, for good: `calibrate` no longer changes them."""
        self.store_qparams(scale, zero_point)
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
        keys = {"fixed", *(self.fixed_buffers if self.live else ())}
        hidden = self._non_persistent_buffers_set
        self._non_persistent_buffers_set = hidden - keys if fixed else hidden | keys

    def _load_from_state_dict(self, state_dict: Any, prefix: Any, *others: Any) -> Any:
        if any(key.startswith(prefix) for key in state_dict):
            self._set_fixed(prefix + "fixed" in state_dict)
        self._last = None
        super()._load_from_state_dict(state_dict, prefix, *others)

    def qparams(self, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns scale and zero point; those that follow the weight need `x`, its blocks."""
        if self._fixed or not self.live:
            return self.scale, self.zero_point
        if x is None:
            raise ValueError(f"{self.name}: the scales of {self.spec} follow the weight; pass its blocks to qparams")
        return self.live_qparams(x)

    def live_qparams(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns scale and zero point as they follow from the blocks of the weight."""
        # Zero padding of a ragged group does no harm here: every range includes zero.
        return self._from_bounds(*extremes(x, self.scale_shape))

    def _from_bounds(self, minimum: Tensor, maximum: Tensor, sample: Sample | None = None) -> tuple[Tensor, Tensor]:
        """Returns scale and zero point of bounds shaped like the scales; `mse` measures integer scales on `sample`."""
        scale, zero_point = self.bounds_to_qparams(minimum, maximum)
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

    @property
    def has_fixed_levels(self) -> bool:
        """True where `fixed_levels` and `keep_levels` serve the spec: rounding can be learned or chosen by GPTQ."""
        return self.spec.is_uniform

    def fixed_levels(self, w: Tensor) -> FixedLevels:
        """Returns the levels that a weight may be rounded to under the scales that it has now, where there are some.

        Args:
            w: its blocks, float32.
        """
        scale, zero_point = self.qparams(w)
        group = self.spec.granularity
        integer_scales = isinstance(group, PerGroup) and group.scale_bits is not None
        trainable = self.spec.has_free_scales and not integer_scales
        return IntegerLevels(scale.detach().clone(), zero_point.detach().clone(), trainable, self.spec.grid)

    def keep_levels(self, levels: FixedLevels) -> None:
        """Has weights on some of these levels returned unchanged from now on: their scales stay, whatever the weight.

        Args:
            levels: of `fixed_levels`, their scales trained where they are trainable.
        """
        self.fix(levels.scale, levels.zero_point)

    def quantize_values(self, x: Tensor) -> Tensor:
        group = self.spec.granularity
        from_extremes = self._from_extremes and not self._fixed and not (self._rounds_at_random and self.training)
        if from_extremes and isinstance(group, PerGroup) and group.scale_bits is not None:
            from_extremes = False
            if group.coarse == "tensor" and not self._grid.affine:
                done = fake_quantize_blocks(x, 1, lambda: self._vector_rule(x, group), self.result_dtype(x))
                if done is not None:
                    return done
        w = blocks(x, group) if self._in_blocks else x
        if from_extremes:
            y = fake_quantize_to_extremes(w, self.scale_shape, self._grid, self.result_dtype(x))
        else:
            y = self.rounded(w, *self.qparams(w))
        return unblocks(y, x.shape, group) if self._in_blocks else y

    def takes_rows(self, reading: Reading) -> bool:
        """Returns True where `quantize_rows` may replace a call: each row depends on itself and known qparams only."""
        self.follow_buffers()
        if not self._enabled or self.collector is not None or (self.suspension is not None and self.is_suspended):
            return False
        if self._forward_hooks or self._forward_pre_hooks or (self.needs_calibration and not self._calibrated):
            return False
        # What trains a scale is what trains its rows, before it is divided by how often they are read.
        return self._rows_are_independent() and not (reading.scale_grad_by_freq and self.spec.learned)

    def _rows_are_independent(self) -> bool:
        return self._by_rows and not (self._rounds_at_random and self.training)

    def quantize_rows(self, weight: Tensor, index: Tensor, reading: Reading) -> Tensor:
        """Returns `quantize_values(weight)[index]` from the rows that are read alone, where `takes_rows` is True.

        Args:
            weight: `[rows, columns]`.
            index: integers of any shape.
            reading: how gradients come back.
        """
        group, qparams = self.spec.granularity, None
        covered = self.live and not self._fixed
        if not covered:
            held = cast("dict[str, Tensor]", self._buffers)  # attributes of a module take longer
            qparams = (held["scale"], held["zero_point"]) if "scale" in held else (self.scale, self.zero_point)
        elif isinstance(group, PerTensor):
            qparams = self._qparams_of(weight, index, reading)
        if self.takes_kernels and self._rounds_to_nearest and not (self._rounds_at_random and self.training):
            done = fake_quantize_rows(weight, index, qparams, self._grid, group, reading, covered=covered)
            if done is not None:
                return done
        rows = read_rows(weight, index.reshape(-1), reading)
        w = blocks(rows, group)
        if qparams is None:
            scale, zero_point = self._from_bounds(*extremes(w, scale_shape(tuple(rows.shape), group)))
        else:
            scale, zero_point = (scales_of_rows(value, index) for value in qparams)
        return unblocks(self.rounded(w, scale, zero_point), rows.shape, group).view(*index.shape, -1)

    def _qparams_of(self, weight: Tensor, index: Tensor, reading: Reading) -> tuple[Tensor, Tensor]:
        """Returns the one scale of a live range; in evaluation, kept while nothing writes to the table."""
        # In compiled code nothing can be remembered from call to call.
        if torch.compiler.is_compiling() or weight.is_inference():
            return self.qparams(weight)
        if self.training:
            if not self.takes_kernels:
                return self.qparams(weight)
            if not (weight.is_leaf and torch.is_grad_enabled()):
                return qparams_of(weight, self._grid)
            if self._rows is None or not self._rows.is_of(weight):
                self._rows = RowExtremes(weight, reading.sparse, self._grid)
            return self._rows.qparams(weight, index)
        state = weight.data_ptr(), weight._version
        if self._last is None or self._last[0] != state:
            with torch.inference_mode(False):  # of use outside of it also
                self._last = state, self.qparams(weight)
        return self._last[1]

    def forget_switches(self) -> None:
        super().forget_switches()
        self._last = self._rows = None

    def train(self, mode: bool = True) -> WeightQuantizer:
        self._last = self._rows = None
        super().train(mode)
        return self

    def _vector_rule(self, x: Tensor, group: PerGroup) -> BlockRule:
        """Returns two-level scales as a rule for the kernels, with γ from the weight's extremes."""
        largest, _ = qparams_from_bounds(*extremes(x, (1,) * x.ndim), self._grid)
        bits = cast(int, group.scale_bits)
        return vector_rule(group.group_size, self._grid, bits, coarse_scale(largest, bits).item())

    def sample(self, weight: Tensor) -> Sample:
        """Returns the weight's values without padding, one row for each scale."""
        rows = to_rows(blocks(weight.detach().float(), self.spec.granularity), self.scale_shape)
        mask = block_mask(self.shape, self.spec.granularity)
        return summarize(
            rows, None if mask is None else to_rows(mask.to(weight.device), self.scale_shape), name=self.name
        )

    def counts(self, device: torch.device) -> Tensor | None:
        """Returns the number of elements of each scale, shaped like the scales; None where all are equal."""
        mask = block_mask(self.shape, self.spec.granularity)
        return None if mask is None else mask.to(device).sum(reduced_dims(self.scale_shape), keepdim=True)

    def calibrate(self, weight: Tensor) -> None:
        """Finds the range from the weight.

        Raises:
            CalibrationError: naming the layer when the weight has NaN or Inf.
        """
        self.load_sample(self.sample(weight))

    def new_epoch(self, weight: Tensor) -> None:
        """Follows the weight once an epoch: finds an estimated range again, unless it is learned."""
        if self.needs_calibration and not self.spec.learned:
            self.calibrate(weight)

    def load_sample(self, sample: Sample) -> None:
        if not self.live and not self._fixed:
            minimum, maximum = estimate_range(self.spec.range, sample, self.range_grid())
            shape = self.scale_shape
            self.store_qparams(*self._from_bounds(minimum.reshape(shape), maximum.reshape(shape), sample))
        self.set_calibrated()
