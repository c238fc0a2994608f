"""What is wanted of one tensor: `QuantSpec`, a frozen and validated value.

A spec is one line to write and reads back from it::

    int4 per_channel mse          signed 4 bit, one scale per output channel, MSE clipping
    uint8 affine ema:0.99         unsigned 8 bit with a zero point, ranges by EMA while training
    int4 group16 octav            one scale per 16 elements along the reduction dim
    int4 group16:4                the same with 4-bit integer scales under one float scale: 4.25 bits
    int3 per_channel lsq narrow   learned step size on the levels -3..3
    mx6                           shared exponents and microexponents, nothing to calibrate

Nothing here imports torch.
"""

from __future__ import annotations

import re
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, ClassVar

from lq_plugin.errors import SpecError, did_you_mean, raise_all
from lq_plugin.granularity import Granularity, PerChannel, PerGroup, PerTensor

__all__ = ["Granularity", "IntegerGrid", "PerChannel", "PerGroup", "PerTensor", "QuantSpec"]

MAX_BIT_WIDTH = 16


@dataclass(frozen=True)
class IntegerGrid:
    """The integer levels `quant_min..quant_max` that a tensor is rounded to.

    `affine=True` lets a zero point shift them; otherwise integer 0 stands for real 0.
    """

    quant_min: int
    quant_max: int
    affine: bool = False

    @property
    def levels(self) -> int:
        """Number of levels.

        >>> IntegerGrid(-7, 7).levels
        15
        """
        return self.quant_max - self.quant_min + 1

    @property
    def signed(self) -> bool:
        """Whether negative values can be represented without a zero point."""
        return self.quant_min < 0


#: Every way to find a clipping range, with the line that error messages and docs show.
#: `lq_plugin.ranges.register_range` adds to it.
RANGES: dict[str, str] = {
    "minmax": "smallest and largest value",
    "ema": "exponential moving average of each batch's min and max; ema:0.99 sets the momentum it grows to",
    "percentile": "quantiles of the values; percentile:99.9 keeps the middle 99.9 %",
    "mse": "smallest mean squared error, by search on the real grid",
    "kl": "smallest KL divergence of the histograms (TensorRT)",
    "aciq": "analytic, Gauss or Laplace, the paper's constants; aciq:gauss or aciq:laplace forces one",
    "aciq_exact": "the same for the grid that is really used",
    "octav": "Newton iteration on the clipping MSE",
    "lsq": "learned step size",
    "pact": "learned upper bound of a non-negative activation",
}
#: Ranges whose bounds are parameters trained by the optimizer.
LEARNED_RANGES = frozenset({"lsq", "pact"})
ROUNDINGS: dict[str, str] = {"nearest": "round half to even"}
#: Shared microexponents: the format, and the bits of its elements (sign and mantissa).
MX_FORMATS = {"mx9": 8, "mx6": 5, "mx4": 3}
FORMATS: dict[str, str] = {"int": "uniform integer levels"} | {
    name: f"{name[2:]} bits with an exponent for 16 elements and a microexponent for 2" for name in MX_FORMATS
}

_FORMAT_TOKEN = re.compile(r"(?P<unsigned>u?)int(?P<bits>\d+)$")
_GROUP_TOKEN = re.compile(r"group(?P<size>-?\d+)(:(?P<scale_bits>\d+)(:(?P<coarse>\w+))?)?$")
_CHANNEL_TOKEN = re.compile(r"per_channel(:(?P<axis>-?\d+))?$")


@dataclass(frozen=True)
class QuantSpec:
    """How one tensor is quantized. Immutable, hashable, checked on construction.

    Args:
        format: kind of levels, a name in `FORMATS`. The MX formats fix every other field.
        bit_width: bits an element takes, 1..16.
        signed: levels on both sides of zero (`int4`) or from zero up (`uint4`).
        affine: a zero point is allowed (asymmetric quantization).
        narrow_range: drop the most negative level, so that the levels are symmetric.
        granularity: what shares a scale: `PerTensor()`, `PerChannel(axis)`, `PerGroup(size)`.
        range: how the clipping range is found, a name in `RANGES`, with an option after a colon
            where it takes one (`"percentile:99.9"`).
        rounding: a name in `ROUNDINGS`.

    Raises:
        SpecError: listing everything that is impossible about it.

    >>> QuantSpec.parse("int4 per_channel mse")
    QuantSpec('int4 per_channel mse')
    >>> QuantSpec(bit_width=4, granularity=PerGroup(16)).grid
    IntegerGrid(quant_min=-8, quant_max=7, affine=False)
    """

    format: str = "int"
    bit_width: int = 8
    signed: bool = True
    affine: bool = False
    narrow_range: bool = False
    granularity: Granularity = field(default_factory=PerTensor)
    range: str = "minmax"
    rounding: str = "nearest"

    _FLAGS: ClassVar[dict[str, str]] = {
        "affine": "a zero point",
        "narrow": "symmetric levels",
        "ragged": "a shorter last group",
    }

    def __post_init__(self) -> None:
        faults: list[str] = []
        if self.format in MX_FORMATS:
            fixed = {"bit_width": MX_FORMATS[self.format], "narrow_range": True, "granularity": PerGroup(16, ragged=True)}
            for f in fields(self):
                value, wanted = getattr(self, f.name), fixed.get(f.name, f.default)
                plain = f.default_factory() if f.default_factory is not MISSING else f.default
                if f.name != "format" and value != wanted and value != plain:
                    faults.append(f"{self.format} has no choice of {f.name}, got {value}")
                if f.name in fixed:
                    object.__setattr__(self, f.name, wanted)
        if self.format not in FORMATS:
            faults.append(f"unknown format {self.format!r}; valid: {', '.join(FORMATS)}.{did_you_mean(self.format, FORMATS)}")
        if isinstance(self.bit_width, bool) or not isinstance(self.bit_width, int):
            faults.append(f"bit_width must be an int, got {self.bit_width!r}")
        elif not 1 <= self.bit_width <= MAX_BIT_WIDTH:
            faults.append(f"bit_width must be 1..{MAX_BIT_WIDTH}, got {self.bit_width}")
        elif self.bit_width == 1 and self.signed and self.narrow_range:
            faults.append("int1 with narrow_range has the single level 0; use int1, uint1 or at least int2 narrow")
        if self.narrow_range and not self.signed:
            faults.append("narrow_range drops the most negative level, an unsigned format has none")
        faults += self._range_faults()
        if self.rounding not in ROUNDINGS:
            faults.append(f"unknown rounding {self.rounding!r}; valid: {', '.join(ROUNDINGS)}.{did_you_mean(self.rounding, ROUNDINGS)}")
        if isinstance(self.granularity, PerGroup):
            size = self.granularity.group_size
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                faults.append(f"group_size must be a positive int, got {size!r}")
            faults += self._scale_faults(self.granularity)
        elif not isinstance(self.granularity, (PerTensor, PerChannel)):
            faults.append(f"granularity must be PerTensor, PerChannel or PerGroup, got {self.granularity!r}")
        raise_all(SpecError, "impossible QuantSpec", faults)

    def _scale_faults(self, group: PerGroup) -> list[str]:
        faults = []
        bits = group.scale_bits
        if bits is not None and (isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= MAX_BIT_WIDTH):
            faults.append(f"scale_bits of a group must be 1..{MAX_BIT_WIDTH}, got {bits!r}")
        if group.coarse not in ("tensor", "channel"):
            faults.append(f"the float scale above a group's integer scales is per 'tensor' or 'channel', got {group.coarse!r}")
        if bits is None and group.coarse != "tensor":
            faults.append("coarse='channel' belongs to integer scales: group16:4:channel")
        if bits is not None and isinstance(self.range, str) and self.learned:
            faults.append(f"range {self.range!r} learns float scales, group{group.group_size}:{bits} has integer ones")
        return faults

    def _range_faults(self) -> list[str]:
        if not isinstance(self.range, str) or self.range_name not in RANGES:
            got = str(self.range)
            return [f"unknown range {got!r}; valid: {', '.join(RANGES)}.{did_you_mean(got, RANGES)}"]
        faults = []
        name, option = self.range_name, self.range_option
        if name in ("ema", "percentile") and option is not None:
            low, high = (0.0, 1.0) if name == "ema" else (50.0, 100.0)
            try:
                ok = low <= float(option) <= high
            except ValueError:
                ok = False
            if not ok:
                faults.append(f"range {self.range!r}: the option must be a number in {low:g}..{high:g}")
        elif name in ("aciq", "aciq_exact") and option not in (None, "gauss", "laplace"):
            faults.append(f"range {self.range!r}: the option must be gauss or laplace")
        elif name in ("minmax", "mse", "kl", "octav", "lsq", "pact") and option is not None:
            faults.append(f"range {name!r} takes no option, got {option!r}")
        if name == "pact" and (self.signed or self.affine):
            faults.append("range 'pact' learns the upper bound of a non-negative activation: use it with uint, without affine")
        if name == "lsq" and isinstance(self.bit_width, int) and self.bit_width >= 1 and self.grid.quant_max == 0:
            faults.append("range 'lsq' needs a positive level: int1 has none, use uint1 or at least int2")
        return faults

    @property
    def range_name(self) -> str:
        """The range without its option."""
        return self.range.partition(":")[0]

    @property
    def range_option(self) -> str | None:
        """What stands behind the colon, or None."""
        return self.range.partition(":")[2] or None

    @property
    def learned(self) -> bool:
        """Whether the optimizer trains the range."""
        return self.range_name in LEARNED_RANGES

    @property
    def grid(self) -> IntegerGrid:
        """The integer levels of this spec.

        >>> QuantSpec.parse("uint4").grid.quant_max
        15
        """
        if not self.signed:
            return IntegerGrid(0, 2**self.bit_width - 1, self.affine)
        half = 2 ** (self.bit_width - 1)
        return IntegerGrid(-half + self.narrow_range, half - 1, self.affine)

    def replace(self, **changes: Any) -> QuantSpec:
        """A copy with some fields changed, checked again."""
        return replace(self, **changes)

    @classmethod
    def parse(cls, value: QuantSpec | str | dict[str, Any]) -> QuantSpec:
        """Read a spec from its short string, a mapping of its fields, or a spec.

        Raises:
            SpecError: naming every word that is not understood.

        >>> QuantSpec.parse("uint8 affine ema:0.99").affine
        True
        >>> QuantSpec.parse({"bit_width": 4, "granularity": "group16"})
        QuantSpec('int4 group16')
        """
        if isinstance(value, QuantSpec):
            return value
        if isinstance(value, str):
            return cls._from_words(value)
        if isinstance(value, dict):
            return cls._from_fields(value)
        raise SpecError(f"a QuantSpec is written as a string, a mapping or a QuantSpec, got {type(value).__name__}: {value!r}")

    @classmethod
    def _from_words(cls, text: str) -> QuantSpec:
        words = text.split()
        chosen: dict[str, Any] = {}
        faults: list[str] = []
        ragged = False

        def choose(key: str, value: Any, word: str) -> None:
            if key in chosen:
                faults.append(f"{word!r} sets {key} a second time")
            chosen[key] = value

        for word in words:
            if match := _FORMAT_TOKEN.match(word):
                choose("bit_width", int(match["bits"]), word)
                chosen["signed"] = not match["unsigned"]
            elif match := _GROUP_TOKEN.match(word):
                scale_bits = int(match["scale_bits"]) if match["scale_bits"] else None
                choose("granularity", PerGroup(int(match["size"]), False, scale_bits, match["coarse"] or "tensor"), word)
            elif match := _CHANNEL_TOKEN.match(word):
                choose("granularity", PerChannel(int(match["axis"]) if match["axis"] else None), word)
            elif word in MX_FORMATS:
                choose("format", word, word)
                chosen["bit_width"] = MX_FORMATS[word]
            elif word == "per_tensor":
                choose("granularity", PerTensor(), word)
            elif word == "affine":
                choose("affine", True, word)
            elif word == "narrow":
                choose("narrow_range", True, word)
            elif word == "ragged":
                ragged = True
            elif word.partition(":")[0] in RANGES:
                choose("range", word, word)
            elif word in ROUNDINGS:
                choose("rounding", word, word)
            else:
                known = ["int8", "uint8", *MX_FORMATS, "per_tensor", "per_channel", "group16", *cls._FLAGS, *RANGES, *ROUNDINGS]
                faults.append(f"unknown word {word!r}; valid: {', '.join(known)}.{did_you_mean(word, known)}")
        if "bit_width" not in chosen and not faults:
            faults.append("no format; start with int4, uint8, ...")
        if ragged:
            if isinstance(group := chosen.get("granularity"), PerGroup):
                chosen["granularity"] = replace(group, ragged=True)
            else:
                faults.append("'ragged' belongs to a group size: group16 ragged")
        raise_all(SpecError, f"cannot read the spec {text!r}", faults)
        try:
            return cls(**chosen)
        except SpecError as error:
            raise SpecError(f"spec {text!r}: {error}") from None

    @classmethod
    def _from_fields(cls, mapping: dict[str, Any]) -> QuantSpec:
        names = [f.name for f in fields(cls)]
        faults = [
            f"unknown field {key!r}; valid: {', '.join(names)}.{did_you_mean(str(key), names)}" for key in mapping if key not in names
        ]
        raise_all(SpecError, "cannot read the spec", faults)
        chosen = dict(mapping)
        if isinstance(word := chosen.get("granularity"), str):
            chosen["granularity"] = cls._from_words(f"int8 {word}").granularity
        return cls(**chosen)

    def __str__(self) -> str:
        if self.format in MX_FORMATS:
            return self.format
        words = [f"{'' if self.signed else 'u'}{self.format}{self.bit_width}"]
        if self.granularity != PerTensor():
            words.append(str(self.granularity))
        words += ["affine"] * self.affine + ["narrow"] * self.narrow_range
        if self.range != "minmax":
            words.append(self.range)
        if self.rounding != "nearest":
            words.append(self.rounding)
        return " ".join(words)

    def __repr__(self) -> str:
        return f"QuantSpec({str(self)!r})"
