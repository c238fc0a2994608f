"""Formats of levels, and how they are written: the vocabulary of `QuantSpec`.

Each entry of `FORMATS` declares one format: its bits, its levels, what shares a scale, what is stored, which tensors it
is for and how it is written. `declare_format` adds an entry; `lq_plugin.quantizers.register_format` does that and says
how the format is computed. Nothing here imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lq_plugin.errors import SpecError, did_you_mean, name_fault
from lq_plugin.intent.granularity import Granularity, PerTensor
from lq_plugin.intent.ranges import (
    RANGES as RANGES,
    range_fault as range_fault,
)

MAX_BIT_WIDTH = 16
#: Tensors of a layer that can be quantized.
SLOTS = ("weight", "input", "output")


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
        """True if negative values can be represented without a zero point."""
        return self.quant_min < 0


@dataclass(frozen=True)
class Format:
    """The declaration of a format.

    Args:
        summary: the line that docs and error messages show.
        bit_widths: bits an element may take. A format with several is written with them (`int4`).
        granularity: what shares a scale unless the spec says otherwise.
        choices: fields of a spec that a plan may set, next to the bit-width: `granularity`, `signed`, `affine`,
            `narrow_range`, `range`. The others have their default values.
        uniform: the values are `(level - zero_point) · scale` with the levels of `QuantSpec.grid`, and the range is
            estimated: what reports, exporters and PTQ passes do to integers they also do to this format.
        sign_magnitude: integer levels without the most negative one.
        grid: the integer levels of a spec; None: those of two's complement.
        scale_bits: bits stored for each scale of the granularity. None: any float scale, 32 bits, and the zero point;
            then groups may have integer scales, and the optimizer may train them.
        code_bits: bits stored for each element, where they are not those of its levels: 0 where the elements of a
            scale are stored together, and `scale_bits` counts them.
        codebook: a table of float numbers, one for each level, is stored in the place of each scale.
        blocks: a scale for each square of a weight is possible (`block128`).
        dynamic: ranges of activations may be found at run time (`dynamic`).
        tensor_bits: bits stored once a tensor.
        slots: the tensors it is for.
        options: words that may follow a colon, in groups of alternatives.
        number: the name of a number that may follow a colon, with its bounds.
        roundings, gradients: names in `ROUNDINGS` and `GRADIENTS` that the spec may choose.
        learned: the optimizer trains its scales or levels.
        learns_range: the range `lsq` is a choice, though its values are not those of integers.
        signs: values are -1 or +1 times a scale, by the sign alone, and stored weights have the code 1 for +1: products
            of two such tensors can be counted in bits.
        scales_output: a scale taken from the input is multiplied to the output, which plain linear operations allow.
        check: returns the faults of a spec in this format that the other arguments do not cover.
        examples: spellings that messages list; by default the name, with the widest bits where there are several.
        defaults: rows of `lq-explain --defaults`: spellings, those for inputs after `"/ "`; by default `examples`.
    """

    summary: str
    bit_widths: tuple[int, ...]
    granularity: Granularity = field(default_factory=PerTensor)
    choices: tuple[str, ...] = ("granularity",)
    uniform: bool = False
    sign_magnitude: bool = False
    grid: Callable[[Any], IntegerGrid] | None = None
    scale_bits: int | None = 0
    code_bits: int | None = None
    codebook: bool = False
    blocks: bool = False
    dynamic: bool = False
    tensor_bits: int = 0
    slots: tuple[str, ...] = SLOTS
    options: tuple[tuple[str, ...], ...] = ()
    number: tuple[str, float, float] | None = None
    roundings: tuple[str, ...] = ("nearest",)
    gradients: tuple[str, ...] = ("clipped",)
    learned: bool = False
    learns_range: bool = False
    signs: bool = False
    scales_output: bool = False
    check: Callable[[Any], list[str]] | None = None
    examples: tuple[str, ...] = ()
    defaults: tuple[str, ...] | None = None

    @property
    def spells_bits(self) -> bool:
        """True if the bit-width is a part of the word (`int4`)."""
        return len(self.bit_widths) > 1

    def spellings(self, name: str) -> tuple[str, ...]:
        """Returns examples of the format's word, as messages list them."""
        return self.examples or ((f"{name}{self.bit_widths[-1]}" if self.spells_bits else name),)

    def option_fault(self, name: str, text: str | None) -> str | None:
        """Returns the fault of the options after the colon, or None.

        >>> FORMATS["twn"].option_fault("twn", "exact"), FORMATS["twn"].option_fault("twn", "2.5")
        (None, "format 'twn:2.5': the threshold must be a number in 0..2")
        """
        if text is None:
            return None
        valid = [option for group in self.options for option in group]
        if not valid and self.number is None:
            return f"format {name!r} takes no option, got {text!r}"
        words = text.split(":")
        for word in words:
            if word in valid or self.is_number(word):
                continue
            if self.number is not None and (not valid or word[:1].isdigit()):
                what, low, high = self.number
                return f"format '{name}:{text}': the {what} must be a number in {low:g}..{high:g}"
            return (
                f"format '{name}:{text}': {word!r} is no option; valid: {', '.join(valid)}.{did_you_mean(word, valid)}"
            )
        chosen = [next((index for index, group in enumerate(self.options) if word in group), -1) for word in words]
        return f"format '{name}:{text}' chooses the same thing twice" if len(set(chosen)) < len(chosen) else None

    def is_number(self, word: str) -> bool:
        """Returns True if `word` is a valid number after the colon."""
        try:
            return self.number is not None and self.number[1] <= float(word) <= self.number[2]
        except ValueError:
            return False


#: Every format by name, in the order of the table of defaults. `declare_format` adds to it.
FORMATS: dict[str, Format] = {}
#: Other words for a format.
ALIASES = {"mxfp8": "mxfp8_e4m3", "mxfp6": "mxfp6_e2m3"}
ROUNDINGS: dict[str, str] = {
    "nearest": "round half to even",
    "stochastic": "up with the probability of the fraction, in training; stochastic:7 sets the seed",
}
GRADIENTS: dict[str, str] = {
    "clipped": "straight through inside the range, 0 outside",
    "identity": "straight through everywhere",
    "mad": "straight through inside, bound / |x| outside (OCTAV's magnitude-aware derivative)",
}
#: Words of a spec that are names of nothing else.
FLAGS = {"affine": "a zero point", "narrow": "symmetric levels", "ragged": "a shorter last group"}


def declare_format(name: str, declared: Format) -> None:
    """Makes `name` a valid format of specs; declaring an equal format again has no effect.

    Args:
        name: a lower-case word of letters, digits and underscores; without a digit at the end where bits follow it.
        declared: its properties.

    Raises:
        SpecError: the name is no such word, stands for something else in a spec already, or `declared` has no bits.
    """
    if FORMATS.get(name) == declared:
        return
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or (declared.spells_bits and name[-1].isdigit()):
        raise SpecError(
            f"a format is named by a lower-case word of letters, digits and underscores, without a digit at the end "
            f"where bits follow it, got {name!r}"
        )
    if has_meaning(name):
        raise SpecError(f"{name!r} cannot name a format: it has a meaning in specs already")
    if not declared.bit_widths or not all(1 <= bits <= MAX_BIT_WIDTH for bits in declared.bit_widths):
        raise SpecError(f"format {name!r}: bit_widths must be 1..{MAX_BIT_WIDTH}, got {declared.bit_widths}")
    FORMATS[name] = declared


def has_meaning(word: str) -> bool:
    """Returns True if a plan reads `word` as something already: a format, a range, a granularity, ...

    >>> has_meaning("mse"), has_meaning("uint4"), has_meaning("group16"), has_meaning("log2")
    (True, True, True, False)
    """
    kinds = ("per_tensor", "per_channel", "per_token", "float")
    words = {*FORMATS, *ALIASES, *RANGES, *ROUNDINGS, *GRADIENTS, *FLAGS, *kinds}
    return word in words or spelled_format(word) is not None or re.match(r"group|block\d|[wa]\d", word) is not None


def spelled_format(head: str) -> tuple[str, dict[str, Any]] | None:
    """Returns the format that a word without options spells, and the fields of a spec it sets; None: no format.

    >>> spelled_format("uint4"), spelled_format("mx6"), spelled_format("kmeans2")
    (('int', {'bit_width': 4, 'signed': False}), ('mx6', {}), ('kmeans', {'bit_width': 2}))
    """
    name = ALIASES.get(head, head)
    if name in FORMATS and not FORMATS[name].spells_bits:
        return name, {}
    if (match := re.fullmatch(r"(\w*?)(\d{1,9})", head)) is None:
        return None
    name, bits = match[1], int(match[2])
    unsigned = name not in FORMATS and name.startswith("u")
    kind = FORMATS.get(name := name[1:] if unsigned else name)
    if kind is None or not kind.spells_bits or (unsigned and "signed" not in kind.choices):
        return None
    return name, {"bit_width": bits} | ({"signed": not unsigned} if "signed" in kind.choices else {})


def format_spellings() -> list[str]:
    """Returns the spellings of all formats, as messages list the valid words."""
    return [*(word for name, kind in FORMATS.items() for word in kind.spellings(name)), *ALIASES]


def rounding_fault(text: str, kind: Format, name: str) -> str | None:
    """Returns the fault of a rounding, or None.

    Args:
        text: the rounding, with its seed.
        kind: the format that it is for.
        name: of the format, for messages.
    """
    rounding, _, seed = text.partition(":")
    if rounding not in ROUNDINGS:
        return name_fault("rounding", text, ROUNDINGS)
    if rounding not in kind.roundings:
        return f"{name} is rounded to nearest, got {text!r}"
    if seed and (rounding != "stochastic" or not re.fullmatch(r"\d{1,18}", seed)):
        return f"rounding {text!r}: only stochastic takes a seed, an integer"
    return None


def gradient_fault(text: str, kind: Format, name: str) -> str | None:
    """Returns the fault of a gradient, or None.

    Args:
        text: the gradient.
        kind: the format that it is for.
        name: of the format, for messages.
    """
    if text not in GRADIENTS:
        return name_fault("gradient", text, GRADIENTS)
    return None if text in kind.gradients else f"{name} has a gradient of its own, got {text!r}"
