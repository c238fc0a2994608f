"""`QuantSpec`, the quantization of one tensor: a frozen and validated value.

A spec is written as one line and is read back from it::

    int4 per_channel mse          signed 4 bit, one scale per output channel, MSE clipping
    uint8 affine ema:0.99         unsigned 8 bit with a zero point, ranges by EMA while training
    int4 group16 octav            one scale per 16 elements along the reduction dim
    int4 group16:4                4-bit integer scales per 16 elements under one float scale: 4.25 bits
    int3 per_channel lsq narrow   learned step size on the levels -3..3
    uint8 mse stochastic          rounded up or down at random in training
    int8 per_token dynamic        one scale for each row of the present input, found at run time
    fp8 block128, fp8:e5m2        8-bit floats, one scale for 128 x 128 weights, or for the tensor
    mx6, mxfp4:rceil, nvfp4       shared exponents or scales found from the values, nothing to calibrate
    bwn, twn, ttq, kmeans2        binary, ternary and codebook weights

Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, cast

from lq_plugin.errors import SpecError, is_integer, name_fault, name_faults, raise_all
from lq_plugin.intent.builtin_formats import MX_ELEMENTS
from lq_plugin.intent.formats import (
    FLAGS,
    FORMATS,
    GRADIENTS,
    MAX_BIT_WIDTH,
    ROUNDINGS,
    Format,
    IntegerGrid,
    format_spellings,
    gradient_fault,
    rounding_fault,
    spelled_format,
)
from lq_plugin.intent.granularity import (
    Granularity,
    PerBlock,
    PerChannel,
    PerGroup,
    PerMatrix,
    PerTensor,
    PerToken,
    spelled_granularity,
)
from lq_plugin.intent.ranges import RANGES, is_learned, range_fault, range_kind

__all__ = [
    "MX_FORMATS",
    "RANGES",
    "Granularity",
    "IntegerGrid",
    "PerBlock",
    "PerChannel",
    "PerGroup",
    "PerMatrix",
    "PerTensor",
    "PerToken",
    "QuantSpec",
]

#: MX formats: integer mantissas under shared exponents.
MX_FORMATS = tuple(MX_ELEMENTS)
#: Granularities, as messages list the valid words.
_GRANULARITIES = ("per_tensor", "per_channel", "per_token", "group16", "block128")


@dataclass(frozen=True)
class QuantSpec:
    """The quantization of one tensor: immutable, hashable, checked on construction.

    Args:
        format: kind of levels, a name in `lq_plugin.intent.formats.FORMATS`, with options after colons where it takes
            some (`"twn:exact"`). Most formats other than `int` fix the fields below.
        bit_width: bits an element takes, 1..16; 8 unless the format fixes it.
        signed: levels on both sides of zero (`int4`) or from zero up (`uint4`).
        affine: a zero point is allowed (asymmetric quantization).
        narrow_range: drop the most negative level, so that the levels are symmetric.
        granularity: what shares a scale: `PerTensor()`, `PerChannel(axis)`, `PerGroup(size)`, `PerToken()`,
            `PerBlock(size)`, `PerMatrix(rows)`; None is the format's own.
        range: how the clipping range is found, a name in `RANGES`, with an option after a colon
            where it takes one (`"percentile:99.9"`).
        rounding: a name in `ROUNDINGS`, with a seed after a colon where it takes one.
        gradient: what passes back through the rounding, a name in `GRADIENTS`.

    Raises:
        SpecError: listing everything that contradicts itself.

    >>> QuantSpec.parse("int4 per_channel mse")
    QuantSpec('int4 per_channel mse')
    >>> QuantSpec(bit_width=4, granularity=PerGroup(16)).grid
    IntegerGrid(quant_min=-8, quant_max=7, affine=False)
    """

    format: str = "int"
    bit_width: int = cast(int, None)
    signed: bool = True
    affine: bool = False
    narrow_range: bool = False
    granularity: Granularity = cast(Granularity, None)  # noqa: RUF009  (None, typed as what it becomes)
    range: str = "minmax"
    rounding: str = "nearest"
    gradient: str = "clipped"

    def __post_init__(self) -> None:
        if not isinstance(self.format, str) or self.format_name not in FORMATS:
            raise_all(SpecError, "impossible QuantSpec", [name_fault("format", str(self.format), FORMATS)])
        kind = self.kind
        switches = [(name, getattr(self, name)) for name in ("signed", "affine", "narrow_range")]
        faults = [
            f"{name} must be true or false, got {value!r}" for name, value in switches if not isinstance(value, bool)
        ]
        faults += self._fill_in(kind)
        _, colon, options = self.format.partition(":")
        if fault := kind.option_fault(self.format_name, options if colon else None):
            faults.append(fault)
        if not is_integer(self.bit_width):
            faults.append(f"bit_width must be an int, got {self.bit_width!r}")
        elif self.bit_width not in kind.bit_widths:
            faults.append(f"bit_width must be {_listed(kind.bit_widths)}, got {self.bit_width}")
        elif self.bit_width == 1 and self.signed and self.narrow_range:
            faults.append("int1 with narrow_range has the single level 0; use int1, uint1 or at least int2 narrow")
        if self.narrow_range and not self.signed:
            faults.append("narrow_range drops the most negative level, an unsigned format has none")
        faults += self._range_faults() + self._rounding_faults(kind)
        if isinstance(self.granularity, PerGroup):
            size = self.granularity.group_size
            if not is_integer(size, 1):
                faults.append(f"group_size must be a positive int, got {size!r}")
            faults += self._scale_faults(self.granularity)
        elif isinstance(self.granularity, PerBlock):
            faults += self._block_faults(self.granularity, kind)
        elif isinstance(self.granularity, PerMatrix):
            rows = self.granularity.rows
            if not is_integer(rows, 1):
                faults.append(f"the rows of a matrix must be a positive int, got {rows!r}")
        elif not isinstance(self.granularity, (PerTensor, PerChannel, PerToken)):
            names = "PerTensor, PerChannel, PerGroup, PerToken, PerBlock or PerMatrix"
            faults.append(f"granularity must be {names}, got {self.granularity!r}")
        raise_all(SpecError, "impossible QuantSpec", faults)

    def _fill_in(self, kind: Format) -> list[str]:
        """Sets the fields that the format decides; returns a fault for each that it leaves no choice of."""
        faults = []
        width = 8 if 8 in kind.bit_widths else kind.bit_widths[-1]
        fixed: dict[str, Any] = {"bit_width": width, "granularity": kind.granularity}
        for name, value in fixed.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        object.__setattr__(self, "narrow_range", self.narrow_range or kind.sign_magnitude)
        fixed |= {"signed": True, "affine": False, "range": "minmax", "narrow_range": kind.sign_magnitude}
        free = {*kind.choices, *(["bit_width"] if kind.spells_bits else [])}
        wrong = [name for name in fixed if name not in free and getattr(self, name) != fixed[name]]
        faults += [f"{self.format} has no choice of {name}, got {getattr(self, name)}" for name in wrong]
        group = self.granularity
        if isinstance(group, PerGroup) and "granularity" in kind.choices:
            if group.scale_bits is not None and self.dynamic:
                faults.append(f"range 'dynamic' has float scales, got integer ones: {group}")
            elif group.scale_bits is not None and not self.has_free_scales:
                faults.append(f"{self.format} has scales of its own, got integer ones: {group}")
        return faults

    def _rounding_faults(self, kind: Format) -> list[str]:
        faults = []
        learned = isinstance(self.range, str) and is_learned(self.range_name)
        if fault := rounding_fault(str(self.rounding), kind, self.format) or gradient_fault(
            str(self.gradient), kind, self.format
        ):
            faults.append(fault)
        elif self.stochastic and self.gradient != "clipped" and self.is_uniform:
            faults.append(f"stochastic rounding has the clipped gradient, got {self.gradient!r}")
        elif learned and (self.gradient != "clipped" or self.stochastic):
            faults.append(f"range {self.range!r} learns its step with the nearest rounding and the clipped gradient")
        return faults + (kind.check(self) if kind.check is not None else [])

    def _block_faults(self, block: PerBlock, kind: Format) -> list[str]:
        if not is_integer(block.size, 2):
            return [f"the size of a block must be an int of at least 2, got {block.size!r}"]
        if kind.blocks or "granularity" not in kind.choices:
            return []
        with_blocks = " and ".join(name for name, other in FORMATS.items() if other.blocks)
        return [f"{self.format} has no scales for squares of a weight, {with_blocks} has, got {block}"]

    def _scale_faults(self, group: PerGroup) -> list[str]:
        faults = []
        bits = group.scale_bits
        if bits is not None and not (is_integer(bits, 1) and bits <= MAX_BIT_WIDTH):
            faults.append(f"scale_bits of a group must be 1..{MAX_BIT_WIDTH}, got {bits!r}")
        if group.coarse not in ("tensor", "channel"):
            faults.append(
                f"the float scale above a group's integer scales is per 'tensor' or 'channel', got {group.coarse!r}"
            )
        if bits is None and group.coarse != "tensor":
            faults.append("coarse='channel' belongs to integer scales: group16:4:channel")
        if bits is not None and isinstance(self.range, str) and self.learned:
            faults.append(f"range {self.range!r} learns float scales, group{group.group_size}:{bits} has integer ones")
        return faults

    def _range_faults(self) -> list[str]:
        if fault := range_fault(str(self.range)):
            return [fault]
        faults = []
        name = self.range_name
        learnable = self.has_free_scales or self.kind.learns_range
        if is_learned(name) and "range" in self.kind.choices and not learnable:
            faults.append(f"range {self.range!r} learns float scales, {self.format} has scales of its own")
        if self.dynamic and "range" in self.kind.choices:
            if not self.kind.dynamic:
                with_it = " and ".join(name for name, kind in FORMATS.items() if kind.dynamic)
                faults.append(f"range 'dynamic' is of {with_it}, {self.format} has ranges that are fixed")
            if self.gradient != "clipped":
                faults.append(f"range 'dynamic' covers all values and has the clipped gradient, got {self.gradient!r}")
        elif isinstance(self.granularity, PerToken):
            faults.append(
                f"per_token has a scale for each row of a tensor, found at run time: write 'per_token dynamic', got "
                f"{self.range!r}"
            )
        kind = range_kind(name)
        if kind.non_negative and (self.signed or self.affine):
            faults.append(f"range {name!r} is of non-negative values: use it with uint, without affine")
        return faults + (kind.check(self) if kind.check is not None else [])

    @property
    def format_name(self) -> str:
        """The format without its options."""
        return self.format.partition(":")[0]

    @property
    def format_options(self) -> tuple[str, ...]:
        """The words after the format's colon."""
        return tuple(filter(None, self.format.split(":")[1:]))

    @property
    def kind(self) -> Format:
        """The declaration of the format."""
        return FORMATS[self.format_name]

    @property
    def is_uniform(self) -> bool:
        """True if values are `(level - zero_point) · scale` on the levels of `grid`, with an estimated range."""
        return self.kind.uniform

    @property
    def has_free_scales(self) -> bool:
        """True if any float number may be a scale, and it is kept, so that the optimizer may train it."""
        return self.kind.uniform and self.kind.scale_bits is None and not self.dynamic

    @property
    def dynamic(self) -> bool:
        """True if the range is found anew from each tensor, at run time."""
        return str(self.range).partition(":")[0] == "dynamic"

    @property
    def has_grid(self) -> bool:
        """True if the levels are those of an `IntegerGrid`, times a scale."""
        return self.kind.uniform or self.kind.sign_magnitude

    @property
    def threshold(self) -> float:
        """The smallest value that is binarized to +1: the number among the format's options, else 0."""
        return next((float(word) for word in self.format_options if word not in sum(self.kind.options, ())), 0.0)

    @property
    def lacks_a_side(self) -> bool:
        """True if all levels are on one side of zero (`uint8`, `int1`), with no zero point to move them."""
        return self.has_grid and not self.affine and (not self.signed or self.grid.quant_max <= 0)

    @cached_property
    def stochastic(self) -> bool:
        """True if values are rounded at random in training."""
        return self.rounding.startswith("stochastic")

    @property
    def seed(self) -> int:
        """The seed of stochastic rounding, 0 unless the spec has one."""
        return int(self.rounding.partition(":")[2] or 0)

    @property
    def range_name(self) -> str:
        """The range without its option."""
        return self.range.partition(":")[0]

    @property
    def range_option(self) -> str | None:
        """The text after the range's colon, or None."""
        return self.range.partition(":")[2] or None

    @property
    def learned(self) -> bool:
        """True if the optimizer trains the range or the levels."""
        return is_learned(self.range_name) or self.kind.learned

    @cached_property
    def grid(self) -> IntegerGrid:
        """The integer levels of this spec.

        Raises:
            SpecError: for a format whose levels are not integers times a scale.

        >>> QuantSpec.parse("uint4").grid.quant_max
        15
        """
        if not self.has_grid:
            raise SpecError(f"{self} has no integer grid")
        if self.kind.grid is not None:
            return self.kind.grid(self)
        if not self.signed:
            return IntegerGrid(0, 2**self.bit_width - 1, self.affine)
        half = 2 ** (self.bit_width - 1)
        return IntegerGrid(-half + self.narrow_range, half - 1, self.affine)

    def replace(self, **changes: Any) -> QuantSpec:
        """Returns a copy with some fields changed, checked again."""
        return replace(self, **changes)

    @classmethod
    def parse(cls, value: QuantSpec | str | dict[str, Any], written: str | None = None) -> QuantSpec:
        """Reads a spec from its short string, a mapping of its fields, or a spec.

        Args:
            value: the string, mapping or spec.
            written: the user's words for it, which errors quote; None: `value` itself.

        Raises:
            SpecError: naming every unknown word.

        >>> QuantSpec.parse("uint8 affine ema:0.99").affine
        True
        >>> QuantSpec.parse({"bit_width": 4, "granularity": "group16"})
        QuantSpec('int4 group16')
        """
        if isinstance(value, QuantSpec):
            return value
        if isinstance(value, str):
            return cls._from_words(value, written or value)
        if isinstance(value, dict):
            return cls._from_fields(value)
        raise SpecError(
            f"a QuantSpec is written as a string, a mapping or a QuantSpec, got {type(value).__name__}: {value!r}"
        )

    @classmethod
    def _from_words(cls, text: str, written: str) -> QuantSpec:
        words = text.split()
        chosen: dict[str, Any] = {}
        faults: list[str] = []
        for word in words:
            found = _fields_of(word)
            key = next(iter(found), None)
            if key is None and word != "ragged":
                known = [*format_spellings(), *_GRANULARITIES, *FLAGS, *RANGES, *ROUNDINGS, *GRADIENTS]
                faults.append(name_fault("word", word, known))
            elif key in chosen:
                faults.append(f"{word!r} sets {key} a second time")
            chosen |= found
        if "format" not in chosen and not faults:
            faults.append("no format; start with int4, uint8, ...")
        if "ragged" in words:
            if isinstance(group := chosen.get("granularity"), PerGroup):
                chosen["granularity"] = replace(group, ragged=True)
            else:
                faults.append("'ragged' belongs to a group size: group16 ragged")
        raise_all(SpecError, f"cannot read the spec {written!r}", faults)
        try:
            return cls(**chosen)
        except SpecError as error:
            raise SpecError(f"spec {written!r}: {error}") from None

    @classmethod
    def _from_fields(cls, mapping: dict[str, Any]) -> QuantSpec:
        names = [f.name for f in fields(cls)]
        raise_all(SpecError, "cannot read the spec", name_faults("field", mapping, names))
        chosen = dict(mapping)
        if isinstance(word := chosen.get("granularity"), str):
            chosen["granularity"] = cls._from_words(f"int8 {word}", word).granularity
        return cls(**chosen)

    def __str__(self) -> str:
        return self._text

    @cached_property
    def _text(self) -> str:
        """The plan's words. Searches look specs up by it, thousands of times."""
        unsigned, bits = "" if self.signed else "u", str(self.bit_width) if self.kind.spells_bits else ""
        words = [":".join([unsigned + self.format_name + bits, *self.format_options])]
        if self.granularity != self.kind.granularity:
            words.append(str(self.granularity))
        words += ["affine"] * self.affine + ["narrow"] * (self.narrow_range and not self.kind.sign_magnitude)
        plain = {"range": "minmax", "rounding": "nearest", "gradient": "clipped"}
        words += [getattr(self, name) for name, value in plain.items() if getattr(self, name) != value]
        return " ".join(words)

    def __repr__(self) -> str:
        return f"QuantSpec({str(self)!r})"


def _fields_of(word: str) -> dict[str, Any]:
    """Returns the fields of a spec that a word sets, of which the first is set once; none where it is unknown."""
    head, colon, options = word.partition(":")
    if spelled := spelled_format(head):
        return {"format": spelled[0] + colon + options, **spelled[1]}
    if (granularity := spelled_granularity(word)) is not None:
        return {"granularity": granularity}
    if word in (flags := {"affine": "affine", "narrow": "narrow_range"}):
        return {flags[word]: True}
    for name, given, known in (("range", head, RANGES), ("rounding", head, ROUNDINGS), ("gradient", word, GRADIENTS)):
        if given in known:
            return {name: word}
    return {}


def _listed(widths: tuple[int, ...]) -> str:
    """Returns bit-widths for a message: `4`, `1..16`, or `one of 2, 4, 8`."""
    low, high = widths[0], widths[-1]
    if widths == tuple(range(low, high + 1)):
        return str(low) if low == high else f"{low}..{high}"
    return f"one of {', '.join(map(str, widths))}"
