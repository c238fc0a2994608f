"""Registry of formats: one call of `register_format` says how a format is written, computed and stored.

A new format whose values are integers times a scale is one file like this one, which a project imports before it parses
its plans::

    class PowerOfTwo:
        def bounds_to_qparams(self, minimum, maximum):
            scale, zero_point = super().bounds_to_qparams(minimum, maximum)
            return torch.exp2(torch.ceil(torch.log2(scale))), zero_point

    class PowerOfTwoWeight(PowerOfTwo, WeightQuantizer): ...
    class PowerOfTwoActivation(PowerOfTwo, ActivationQuantizer):
        takes_kernels = True  # it rounds as its base does; only the scale that is kept is another

    register_format(
        "pot",
        Format("integers under a power-of-two scale", (4, 8), choices=("granularity", "range"), uniform=True,
               scale_bits=32),
        weight=PowerOfTwoWeight, activation=PowerOfTwoActivation, storage=INTEGER_STORAGE, onnx=integer_container,
    )

From then on `pot4 per_channel mse` is a spec like any other: of plans, calibration, training, search spaces, the cost,
packed files, ONNX and reports. The library's own formats are registered in the same way, each in its file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lq_plugin.errors import SpecError, raise_all
from lq_plugin.functional.minifloat import Minifloat, minifloat_values
from lq_plugin.intent.formats import FORMATS, Format, declare_format
from lq_plugin.intent.spec import QuantSpec
from lq_plugin.quantizers.activation import ActivationQuantizer
from lq_plugin.quantizers.weight import WeightQuantizer


@dataclass(frozen=True)
class Part:
    """Tensor of a stored weight.

    Args:
        values: integers, or float32 numbers.
        bits: bits of each integer; 0: all are 0, and only the shape is kept; None: float.
    """

    values: Tensor
    bits: int | None = None


Parts = dict[str, Part]
Values = Mapping[str, Tensor]
#: What the parts of some rows take from the whole weight. Sliced along dim 0 where it is as long as the weight.
Statistics = tuple[Tensor, ...]


def no_statistics(quantizer: Any, w: Tensor) -> Statistics:
    """Returns nothing: each row is stored on its own."""
    return ()


@dataclass(frozen=True)
class Storage:
    """Encoder and decoder of a format's weights for packed files; decoding is bit-exact.

    Args:
        encode: `(quantizer, blocks of some rows, *statistics of these rows)` to parts; one is called `codes`, has a
            code for each element and the shape of the blocks. Where another one holds several elements together, the
            codes have 0 bits.
        decode: `(spec, values by the names of the parts)` to blocks, float32; integers come as int32.
        statistics: `(quantizer, blocks of the whole weight)` to what the rows share.
        fault: `(spec)` to the reason why such weights cannot be stored, or None.
        finite_codes: every code decodes to a finite value where the scales are finite.
    """

    encode: Callable[..., Parts]
    decode: Callable[[QuantSpec, Values], Tensor]
    statistics: Callable[[Any, Tensor], Statistics] = no_statistics
    fault: Callable[[QuantSpec], str | None] = lambda spec: None
    finite_codes: bool = False


@dataclass(frozen=True)
class Container:
    """Weight as ONNX holds it: integers, and what turns them into real numbers.

    `w = (q - zero_point) · scale` (DequantizeLinear with axis or block_size), or `w = table[q]` (Gather).

    Args:
        q: int32, `[C_out, C_in / groups, *kernel]`.
        bits, signed: of the smallest integer type that holds them: 2, 4, 8 or 16 bits.
        scale: float32 `[]`, `[C_out]`, or, with a block, `[C_out, blocks, *kernel]`; None with a table.
        zero_point: int32, shaped like the scale; None: 0.
        block: elements along dim 1 that share a scale; 0: all.
        table: float32, indexed by `q`.
    """

    q: Tensor
    bits: int
    signed: bool
    scale: Tensor | None = None
    zero_point: Tensor | None = None
    block: int = 0
    table: Tensor | None = None

    def in_blocks(self, size: int) -> Container:
        """Returns the same weight in smaller blocks, of a size that divides the present one.

        >>> import torch
        >>> whole = Container(torch.zeros(1, 6, dtype=torch.int32), 2, True, torch.tensor([[0.5, 2.0]]), block=4)
        >>> whole.in_blocks(2).scale
        tensor([[0.5000, 0.5000, 2.0000]])
        """
        count = -(-self.q.shape[1] // size)

        def repeated(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.repeat_interleave(self.block // size, 1)[:, :count]

        return replace(self, scale=repeated(self.scale), zero_point=repeated(self.zero_point), block=size)


@dataclass(frozen=True)
class FloatContainer:
    """Weight of small floating point numbers as ONNX holds it: `w = value(q) · scale · tensor_scale`.

    Args:
        q: int32, the bits of each number: sign, exponent, mantissa; `[C_out, C_in / groups, *kernel]`.
        element: format of the numbers.
        scale: float32, shaped as that of a `Container`.
        scale_type: format in which a file holds the scale: `"E8M0"` (powers of two), `"E4M3"` or `"float32"`.
        tensor_scale: float32 `[]`; None: 1.
        block: elements along dim 1 that share a scale; 0: all.
    """

    q: Tensor
    element: Minifloat
    scale: Tensor
    scale_type: str = "float32"
    tensor_scale: Tensor | None = None
    block: int = 0

    def as_integers(self) -> Container | None:
        """Returns the same weight in multiples of the smallest number, INT8; None: they are more than 8 bits.

        >>> import torch
        >>> from lq_plugin.functional.minifloat import E2M1
        >>> whole = FloatContainer(torch.tensor([[3, 15]]), E2M1, torch.tensor([[4.0]]), block=2).as_integers()
        >>> whole.q, whole.scale
        (tensor([[  3, -12]], dtype=torch.int32), tensor([[2.]]))
        """
        if self.element.max_value > 127 * self.element.smallest:
            return None
        q = (minifloat_values(self.q, self.element) / self.element.smallest).to(torch.int32)
        scale = self.scale if self.tensor_scale is None else self.scale * self.tensor_scale
        return Container(q, 8, True, scale * self.element.smallest, block=self.block)


@dataclass(frozen=True)
class FormatCode:
    """Code of a format; arguments as in `register_format`."""

    weight: Callable[[QuantSpec, str, tuple[int, ...]], WeightQuantizer] | None = None
    activation: Callable[[QuantSpec, str, int, int], ActivationQuantizer] | None = None
    storage: Storage | None = None
    onnx: Callable[[QuantSpec, Values], Container | FloatContainer] | None = None
    onnx_fault: Callable[[QuantSpec, int], str | None] = lambda spec, channels: None
    default_options: str = ""


_CODE: dict[str, FormatCode] = {}


def register_format(
    name: str,
    declared: Format,
    *,
    weight: Callable[[QuantSpec, str, tuple[int, ...]], WeightQuantizer] | None = None,
    activation: Callable[[QuantSpec, str, int, int], ActivationQuantizer] | None = None,
    storage: Storage | None = None,
    onnx: Callable[[QuantSpec, Values], Container | FloatContainer] | None = None,
    onnx_fault: Callable[[QuantSpec, int], str | None] = lambda spec, channels: None,
    default_options: str = "",
) -> None:
    """Makes a format usable by its name, everywhere. The module's docstring has an example.

    Args:
        name: its word in a spec, without the bits.
        declared: how it is written, what it costs, which tensors it is for.
        weight: makes the quantizer of a weight from `(spec, tensor's name, shape [C_out, C_in / groups, *kernel])`; a
            `WeightQuantizer` class does.
        activation: makes the quantizer of an input, output or operand from `(spec, tensor's name, channels, their
            axis)`; an `ActivationQuantizer` class does.
        storage: for packed files; None: they refuse such weights. `INTEGER_STORAGE` is the one of `int`.
        onnx: the container of a weight from its spec and the values of its parts; None: exports to ONNX refuse such
            weights. `integer_container` is the one of `int`.
        onnx_fault: the reason why ONNX has no container for a spec and a number of output channels, or None.
        default_options: the options that the format has when none is written, for `lq-explain --defaults`.

    Raises:
        SpecError: listing what does not fit together. Nothing is registered then.
    """
    code = FormatCode(weight, activation, storage, onnx, onnx_fault, default_options)
    faults = []
    if ("weight" in declared.slots) != (weight is not None):
        faults.append(f"its slots are {declared.slots}, weight is {weight}: a format for weights has a maker for them")
    if ({"input", "output"} & set(declared.slots) != set()) != (activation is not None):
        faults.append(
            f"its slots are {declared.slots}, activation is {activation}: a format for inputs or outputs has a maker "
            "for them"
        )
    if onnx is not None and storage is None:
        faults.append("the container of ONNX is made of the parts of a stored weight: give storage also")
    if name in _CODE and _names(_CODE[name]) != _names(code):
        faults.append(f"the name is taken by {_names(_CODE[name])}")
    raise_all(SpecError, f"cannot register format {name!r}", faults)
    known = FORMATS.pop(name) if name in _CODE else None  # a module that is loaded again
    built_in = name in FORMATS
    try:
        declare_format(name, declared)
        raise_all(SpecError, f"cannot register format {name!r}", [] if built_in else _spec_faults(name, declared))
    except SpecError:
        if not built_in:
            FORMATS.pop(name, None)
        if known is not None:
            FORMATS[name] = known
        raise
    _CODE[name] = code


def format_code(spec: QuantSpec) -> FormatCode:
    """Returns the code of a spec's format.

    Raises:
        SpecError: the format was declared and not registered.
    """
    if spec.format_name not in _CODE:
        raise SpecError(f"'{spec}': format {spec.format_name!r} is declared only, `register_format` gives it its code")
    return _CODE[spec.format_name]


def make_weight_quantizer(spec: QuantSpec, name: str, shape: tuple[int, ...]) -> WeightQuantizer:
    """Returns the quantizer of a weight.

    Args:
        spec: how it is quantized.
        name: of the tensor, for messages.
        shape: `[C_out, C_in / groups, *kernel]`.
    """
    make = format_code(spec).weight
    if make is None:
        raise SpecError(f"{name}: '{spec}' is for {' and '.join(spec.kind.slots)}, not for weights")
    return make(spec, name, shape)


def make_activation_quantizer(spec: QuantSpec, name: str, channels: int, channel_axis: int) -> ActivationQuantizer:
    """Returns the quantizer of an input, output or operand.

    Args:
        spec: how it is quantized.
        name: of the tensor, for messages.
        channels: size of the channel axis.
        channel_axis: where the channels are.
    """
    make = format_code(spec).activation
    if make is None:
        raise SpecError(f"{name}: '{spec}' is for {' and '.join(spec.kind.slots)}, not for activations")
    return make(spec, name, channels, channel_axis)


def _spec_faults(name: str, declared: Format) -> list[str]:
    """Returns what its specs contradict: strings that do not read back, levels that its bits cannot count."""
    faults = []
    for bits in declared.bit_widths:
        spec = QuantSpec(name, bits)
        if QuantSpec.parse(str(spec)) != spec:
            faults.append(f"{spec!r} is read back as {QuantSpec.parse(str(spec))!r}")
        if spec.has_grid and spec.grid.levels > 2**bits:
            faults.append(f"{spec.grid.levels} levels of {spec} do not fit in {bits} bits")
    return faults


def _names(code: FormatCode) -> list[str]:
    """Returns the makers by module and name: a module that is loaded again makes the same ones anew."""
    makers: list[Any] = [maker for maker in (code.weight, code.activation) if maker is not None]
    return [f"{maker.__module__}.{maker.__qualname__}" for maker in makers]
