"""Contract of every quantizer: a module that maps a tensor to its quantized values.

A quantizer has one `spec`, belongs to one tensor of one layer (`name`, for messages), and is in one of
these states, all of which live in its `state_dict`:

* not calibrated: it has no range yet. In training it passes its input on and gathers what the first
  range comes from, once the batch is over; in evaluation it raises: a network is never silently float;
* calibrated: it quantizes while `enabled`;
* disabled: it passes its input on unchanged, bit for bit.

Four attributes steer it in one process only: `collector` (calibration in progress: gather statistics,
pass on), `observing` (training: keep a running range, committed once a batch), `waiting` (training: gather a first
range although disabled, for a layer that no batch has reached) and `suspension` (a run has not found the ranges yet).

Where a plan lowers the precision step by step, a `StagedQuantizer` stands in its place and holds one for each stage.
"""

from __future__ import annotations

import hashlib
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lq_plugin.errors import CalibrationError, QuantizationError
from lq_plugin.functional.affine import (
    bounds_from_qparams,
    fake_quantize,
    fake_quantize_identity,
    qparams_from_bounds,
)
from lq_plugin.functional.mad import fake_quantize_mad
from lq_plugin.functional.stochastic import fake_quantize_stochastic
from lq_plugin.functional.transforms import outside
from lq_plugin.intent.spec import IntegerGrid, QuantSpec
from lq_plugin.quantizers.slot import SlotQuantizer
from lq_plugin.ranges import Histogram, Sample

#: Rounding to nearest, by the spec's gradient where that is not `clipped`.
_WITH_GRADIENT = {"mad": fake_quantize_mad, "identity": fake_quantize_identity}


class Levels(NamedTuple):
    """Outermost values of the levels, and the step between levels there."""

    low: Tensor
    high: Tensor
    step: Tensor


class Suspension:
    """Switch shared by all quantizers of a model that waits for its ranges: until then it evaluates float.

    Copies of the model share it: they are quantized from the same moment.
    """

    def __init__(self) -> None:
        self.active = True

    def __deepcopy__(self, memo: Any) -> Suspension:
        return self


class Quantizer(SlotQuantizer):
    """Base class of quantizers; a subclass defines `quantize_values`, `qparams` and `load_sample`.

    Args:
        spec: how to quantize.
        name: `"layer1.0.conv1.weight"`, for messages and reports.
    """

    enabled: Tensor
    calibrated: Tensor
    draws: Tensor
    scale: Tensor
    zero_point: Tensor
    switches: ClassVar[tuple[str, ...]] = ("enabled", "calibrated", "draws")
    #: Whether it must be calibrated before it can quantize.
    needs_calibration = True
    #: Whether kernels that do several of its steps in one pass may stand for its methods. Of this very class: its
    #: subclasses are computed by their methods, unless they say so of themselves.
    takes_kernels: ClassVar[bool] = False
    #: Whether in training nothing reads its result but an operation that autocast casts, see `result_dtype`.
    casts = False
    #: Parameters that weight decay would pull to zero for no good.
    no_weight_decay: tuple[str, ...] = ()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.takes_kernels = vars(cls).get("takes_kernels", False)

    def __init__(self, spec: QuantSpec, name: str) -> None:
        super().__init__()
        self.spec = spec
        self.name = name
        # Read at every call: plain attributes cost less than properties of the spec.
        self._rounds_at_random = spec.stochastic
        self._rounds_to_nearest = spec.gradient == "clipped"
        self.observing = False
        self.suspension: Suspension | None = None
        self.waiting = False
        self.collector: Histogram | None = None
        if spec.stochastic:
            self.register_buffer("draws", torch.zeros(1, dtype=torch.int64))
        self._draws = 0
        # Tensors of shape [1], not Python flags: they travel with the state_dict, and sharding refuses 0-dim.
        self.register_buffer("enabled", torch.ones(1, dtype=torch.bool))
        self.register_buffer("calibrated", torch.zeros(1, dtype=torch.bool))
        self._enabled = True
        self._calibrated = False

    def quantize_values(self, x: Tensor) -> Tensor:
        """Returns fake-quantized `x`, of the same shape and dtype."""
        raise NotImplementedError

    def quantize_observed(self, x: Tensor) -> Tensor:
        """Returns `quantize_values(x)`, after `observe(x)`."""
        outside(self.observe, x)
        return self.quantize_values(x)

    def qparams(self, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns the scale and zero point in force, broadcastable against the blocks of the tensor."""
        raise NotImplementedError

    def make_qparams(self) -> None:
        """Makes the buffers or parameters that the range is kept in; a learned range has parameters of its own."""
        raise NotImplementedError

    def store_qparams(self, scale: Tensor, zero_point: Tensor) -> None:
        """Keeps a scale and zero point, in place.

        Args:
            scale, zero_point: float32, shaped like those of `qparams`.
        """
        with torch.no_grad():
            self.scale.copy_(scale)
            self.zero_point.copy_(zero_point)

    def bounds_to_qparams(self, minimum: Tensor, maximum: Tensor) -> tuple[Tensor, Tensor]:
        """Returns scale and zero point of clipping bounds; a format with scales of its own overrides this."""
        return qparams_from_bounds(minimum, maximum, self.spec.grid)

    def range_grid(self) -> IntegerGrid:
        """Returns the levels that range estimators look at; of formats without a grid they see both signs alone."""
        return self.spec.grid if self.spec.has_grid else IntegerGrid(-1, 1)

    def levels(self, x: Tensor | None = None) -> Levels | None:
        """Returns the outermost levels and their step, broadcastable to the blocks `x`; None where vectors differ."""
        scale, zero_point = self.qparams(x)
        return Levels(*bounds_from_qparams(scale, zero_point, self.spec.grid), scale)

    def load_sample(self, sample: Sample) -> None:
        """Sets the range from statistics, in place; the quantizer is calibrated afterwards."""
        raise NotImplementedError

    def set_enabled(self, enabled: bool) -> None:
        """Switches quantization on or off."""
        if enabled != self.is_enabled:
            self._enabled = enabled
            self._write("enabled", enabled)

    def set_calibrated(self, calibrated: bool = True) -> None:
        """Marks the range as found (or as lost)."""
        if calibrated != self.is_calibrated:
            self._calibrated = calibrated
            self._write("calibrated", calibrated)

    def _read_switches(self) -> None:
        self._enabled = bool(self.enabled)
        self._calibrated = bool(self.calibrated)
        self._draws = int(self.draws) if self._rounds_at_random else 0

    def __getstate__(self) -> dict[str, Any]:
        # A copy is in no calibration: nobody would take its statistics, and it would stay float for ever.
        return self.__dict__ | {"collector": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state.get("starts"):
            raise QuantizationError(
                f"{state['name']} was pickled with its stages by an earlier version: keep its state_dict instead"
            )
        super().__setstate__(state)

    @property
    def is_enabled(self) -> bool:
        """True where it quantizes, once calibrated."""
        self.follow_buffers()
        return self._enabled

    @property
    def is_calibrated(self) -> bool:
        """True where it has a range."""
        self.follow_buffers()
        return self._calibrated

    @property
    def lacks_range(self) -> bool:
        """True where it must be calibrated before it can quantize, and is not."""
        return self.needs_calibration and not self.is_calibrated

    @property
    def is_suspended(self) -> bool:
        """True where the model evaluates float because it waits for its first ranges."""
        return self.suspension is not None and self.suspension.active and not self.training

    def forward(self, x: Tensor) -> Tensor:
        if not x.numel():  # an expert without tokens, an image without proposals: nothing to see, nothing to round
            return self.pass_on(x)
        self.follow_buffers()
        if (
            self._enabled
            and (self._calibrated or not self.needs_calibration)
            and self.collector is None
            and not (self.suspension is not None and self.suspension.active)
        ):
            return self.quantize_observed(x) if self.observing and self.training else self.quantize_values(x)
        self.watch(x)
        return self.apply_to(x)

    def watch(self, x: Tensor) -> None:
        """Gathers statistics for ranges: always in a calibration, in training where that is switched on."""
        self.follow_buffers()
        outside(self._watch, x)

    def _watch(self, x: Tensor) -> None:
        if self.collector is not None:
            self.collect(x)
        elif self.training:
            if self.observing:
                self.observe(x)
            if (self._enabled or self.waiting) and self.lacks_range:
                self.collect_first(x)

    def apply_to(self, x: Tensor) -> Tensor:
        """Returns `x` as this quantizer's state wants it: quantized or unchanged."""
        if self.collector is not None or self.is_suspended:
            return x
        if not self._enabled:
            return self.pass_on(x)
        if self.lacks_range:
            if self.training:
                return self.pass_on(x)
            raise CalibrationError(
                f"{self.name} ({self.spec}) has no range yet: calibrate first (PTQ(...) with trainer.validate, or "
                "lq_plugin.calibrate), train with QAT(...), or load a quantized checkpoint"
            )
        return self.quantize_values(x)

    def pass_on(self, x: Tensor) -> Tensor:
        """Returns `x` unchanged; with gradients, learned ranges take part with weight 0, as DDP demands."""
        if self.training and torch.is_grad_enabled():
            for parameter in self.parameters(recurse=False):
                if parameter.requires_grad:
                    x = x + 0.0 * parameter.sum().to(x.dtype)
        return x

    def rounded(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Returns `x` on the spec's integer grid, with the spec's rounding and gradient.

        Args:
            x: float.
            scale, zero_point: broadcastable to `x`.
        """
        if self.spec.stochastic and self.training:
            return fake_quantize_stochastic(x, scale, zero_point, self.spec.grid, self.noise(x))
        if self._rounds_to_nearest:
            return fake_quantize(x, scale, zero_point, self.spec.grid, self.result_dtype(x))
        return _WITH_GRADIENT[self.spec.gradient](x, scale, zero_point, self.spec.grid)

    def result_dtype(self, x: Tensor) -> torch.dtype:
        """Returns the dtype that quantized `x` is wanted in: its own or, in training under autocast, that one's.

        A result that is written in autocast's dtype has the values of a float32 one that autocast casts. What is asked
        for without gradients may be stored or measured, and keeps its own.
        """
        device = x.device.type
        if not (self.casts and self.training and x.dtype == torch.float32 and torch.is_grad_enabled()):
            return x.dtype
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype

    @property
    def rounds_to_nearest(self) -> bool:
        """True where `rounded` is `fake_quantize` now."""
        return self._rounds_to_nearest and not (self._rounds_at_random and self.training)

    def noise(self, x: Tensor) -> Tensor:
        """Returns uniform numbers in [0, 1) shaped like `x`, from the seed, the tensor's name and the batches so far.

        Gradient checkpointing repeats them, a resumed run continues them, and all ranks draw the same for a weight.
        """
        words = f"{self.spec.seed}:{self.name}:{self._draws}{self.draw_key(x)}"
        digest = hashlib.blake2b(words.encode(), digest_size=7).digest()
        generator = torch.Generator(device=x.device).manual_seed(int.from_bytes(digest, "big"))
        return torch.rand(x.shape, generator=generator, device=x.device, dtype=torch.float32)

    def draw_key(self, x: Tensor) -> str:
        """Returns what else its random numbers depend on."""
        return ""

    def next_draw(self) -> None:
        """Ends a training batch: stochastic rounding draws new numbers."""
        if self.spec.stochastic:
            self.follow_buffers()
            self._draws += 1
            self._write("draws", self._draws)

    def stages(self) -> tuple[Any, ...]:
        return (self,)

    @property
    def current(self) -> Any:
        return self

    def collect(self, x: Tensor) -> None:
        """Adds a batch to the collector (calibration)."""
        raise NotImplementedError

    def collect_first(self, x: Tensor) -> None:
        """Gathers statistics for the first range, in training; no effect on quantizers that need no data."""

    def observe(self, x: Tensor) -> None:
        """Notes a training batch; no effect on quantizers without a moving range."""

    def _apply(self, fn: Any, recurse: bool = True) -> Quantizer:
        # `model.bfloat16()` and precision="bf16-true" must not round statistics and scales: an EMA of 2.0
        # stalls at 1.96 in bfloat16. Moves between devices go through.
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        found: Quantizer = super()._apply(keep_dtype, recurse)
        return found

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: Any,
        local_metadata: Any,
        strict: Any,
        missing_keys: Any,
        unexpected_keys: Any,
        error_msgs: Any,
    ) -> Any:
        if not any(key.startswith(prefix) for key in state_dict):
            # A float checkpoint: its weights load, and the range has to be found anew.
            self.set_calibrated(False)
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._read_switches()
        learned = [prefix + name for name, _ in self.named_parameters(recurse=False)]
        if learned and prefix + "calibrated" not in state_dict and all(key in state_dict for key in learned):
            self.set_calibrated()  # a checkpoint of what is trained alone
        self.suspension = None

    def extra_repr(self) -> str:
        return f"{self.spec}{'' if self._calibrated else ', not calibrated'}{'' if self._enabled else ', disabled'}"


def float32(value: float, shape: tuple[int, ...]) -> Tensor:
    """Returns a new tensor of statistics: float32, whatever default dtype the Trainer's precision has set."""
    return torch.full(shape, value, dtype=torch.float32)
