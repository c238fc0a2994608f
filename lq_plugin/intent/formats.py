"""What kinds of levels there are, and how their words are written: the vocabulary of `QuantSpec`.

Each entry of `FORMATS` is one format: its element bits, what shares a scale, what side information it stores,
which tensors it is for. Nothing here imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from lq_plugin.errors import did_you_mean
from lq_plugin.intent.granularity import Granularity, PerChannel, PerGroup, PerTensor

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
        """Whether negative values can be represented without a zero point."""
        return self.quant_min < 0


@dataclass(frozen=True)
class Format:
    """A kind of levels.

    Args:
        summary: a line for docs and error messages.
        bit_widths: bits an element may take; one number where the format fixes it.
        granularity: what shares a scale unless the spec says otherwise.
        fixed: the spec may not say otherwise.
        scale_bits: bits stored for each unit of the granularity; None: those of an integer format's scale and zero
            point.
        codebook: a table of float numbers, one for each level, is stored for each unit.
        groups: group-wise granularity is possible.
        tensor_bits: bits stored once a tensor.
        slots: the tensors it is for.
        options: words that may follow a colon, in groups of alternatives.
        number: the name of a number that may follow a colon, with its bounds.
        roundings, gradients: what else the spec may choose.
        sign_magnitude: integer levels without the most negative one.
    """

    summary: str
    bit_widths: tuple[int, ...]
    granularity: Granularity = field(default_factory=PerTensor)
    fixed: bool = False
    scale_bits: int | None = 0
    codebook: bool = False
    groups: bool = True
    tensor_bits: int = 0
    slots: tuple[str, ...] = SLOTS
    options: tuple[tuple[str, ...], ...] = ()
    number: tuple[str, float, float] | None = None
    roundings: tuple[str, ...] = ("nearest",)
    gradients: tuple[str, ...] = ("clipped",)
    sign_magnitude: bool = False

    def option_fault(self, name: str, text: str | None) -> str | None:
        """What is wrong with the options behind the colon, or None.

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
            if word in valid or self._is_number(word):
                continue
            if self.number is not None and (not valid or word[:1].isdigit()):
                what, low, high = self.number
                return f"format '{name}:{text}': the {what} must be a number in {low:g}..{high:g}"
            return (
                f"format '{name}:{text}': {word!r} is no option; valid: {', '.join(valid)}.{did_you_mean(word, valid)}"
            )
        chosen = [next((index for index, group in enumerate(self.options) if word in group), -1) for word in words]
        return f"format '{name}:{text}' chooses the same thing twice" if len(set(chosen)) < len(chosen) else None

    def _is_number(self, word: str) -> bool:
        try:
            return self.number is not None and self.number[1] <= float(word) <= self.number[2]
        except ValueError:
            return False


def _mx(bits: int, elements: int) -> Format:
    return Format(
        f"{bits} bits with an exponent for 16 elements and a microexponent for 2",
        (elements,),
        PerGroup(16, ragged=True),
        fixed=True,
        scale_bits=8 + 16 // 2,
        sign_magnitude=True,
    )


#: How the exponent of an OCP MX block is found (`lq_plugin.functional.ocp_mx`).
MX_SCALE_MODES = ("floor", "rceil", "ceil", "even")


def _ocp(bits: int, element: str) -> Format:
    summary = (
        f"OCP MX: {element} elements, a power-of-two scale for 32 of them; mxfp4:rceil sets how the scale is rounded"
    )
    return Format(summary, (bits,), PerGroup(32, ragged=True), fixed=True, scale_bits=8, options=(MX_SCALE_MODES,))


#: How the codebook of a tensor is found (`lq_plugin.functional.codebook`).
CODEBOOK_METHODS = ("exact", "linear", "quantile", "kmeans++")
_WEIGHT = ("weight",)

FORMATS: dict[str, Format] = {
    "int": Format(
        "uniform integer levels",
        tuple(range(1, MAX_BIT_WIDTH + 1)),
        scale_bits=None,
        roundings=("nearest", "stochastic"),
        gradients=("clipped", "mad", "identity"),
    ),
    "mx9": _mx(9, 8),
    "mx6": _mx(6, 5),
    "mx4": _mx(4, 3),
    "mxfp8_e4m3": _ocp(8, "E4M3"),
    "mxfp8_e5m2": _ocp(8, "E5M2"),
    "mxfp6_e3m2": _ocp(6, "E3M2"),
    "mxfp6_e2m3": _ocp(6, "E2M3"),
    "mxfp4": _ocp(4, "E2M1"),
    "mxint8": _ocp(8, "8-bit integer"),
    "nvfp4": Format(
        "E2M1 elements, an E4M3 scale for 16 of them, one float scale above",
        (4,),
        PerGroup(16, True),
        True,
        scale_bits=8,
        tensor_bits=32,
    ),
    "sign": Format(
        "-1 and +1 (BinaryConnect, BNN); sign:0.1 sets the threshold, sign:float_eval evaluates with the real-valued "
        "weights",
        (1,),
        fixed=True,
        options=(("float_eval",),),
        number=("threshold", -1.0, 1.0),
        roundings=("nearest", "stochastic"),
        gradients=("clipped", "identity"),
    ),
    "xnor": Format(
        "sign of an input, its windows' mean magnitudes K multiplied to the output", (1,), fixed=True, slots=("input",)
    ),
    "bwn": Format(
        "sign times the mean magnitude of a filter; bwn:paper takes the paper's gradient",
        (1,),
        PerChannel(),
        scale_bits=32,
        slots=_WEIGHT,
        options=(("plain", "paper"),),
    ),
    "twn": Format(
        "-a, 0, +a with the threshold 0.7 E|w|; twn:0.75 sets the factor, twn:exact finds the optimum",
        (2,),
        scale_bits=32,
        slots=_WEIGHT,
        options=(("exact",),),
        number=("threshold", 0.0, 2.0),
    ),
    "ttq": Format(
        "-Wn, 0, +Wp with learned scales and the threshold 0.05 max|w|; ttq:0.1 sets the factor",
        (2,),
        scale_bits=64,
        slots=_WEIGHT,
        number=("threshold", 0.0, 0.95),
    ),
    "kmeans": Format(
        "a codebook whose centroids are trained: kmeans2:linear, kmeans4:exact:reassign; sum takes the paper's "
        "gradient of a centroid",
        tuple(range(1, 9)),
        codebook=True,
        groups=False,
        slots=_WEIGHT,
        options=(CODEBOOK_METHODS, ("mean", "sum"), ("fixed", "reassign")),
    ),
}
#: Other words for a format.
ALIASES = {"mxfp8": "mxfp8_e4m3", "mxfp6": "mxfp6_e2m3"}
#: Formats whose scales are trained by the optimizer.
LEARNED_FORMATS = frozenset({"ttq", "kmeans"})
#: MX formats: integer mantissas under shared exponents.
MX_FORMATS = tuple(name for name, kind in FORMATS.items() if kind.sign_magnitude)

#: Every way to find a clipping range, with the line that error messages and docs show.
#: `lq_plugin.ranges.register_range` adds to it.
RANGES: dict[str, str] = {
    "minmax": "smallest and largest value",
    "ema": "moving average of each batch's min and max; ema:0.99 sets the momentum it grows to, ema:0.99:constant has "
    "it at once",
    "percentile": "quantiles of the values; percentile:99.9 keeps the middle 99.9 %",
    "mse": "smallest mean squared error, by search on the real grid",
    "kl": "smallest KL divergence of the histograms (TensorRT)",
    "aciq": "analytic, the paper's constants for Gauss or Laplace, whichever errs less on the data; aciq:gauss or "
    "aciq:laplace forces one",
    "aciq_exact": "the same for the grid that is really used",
    "octav": "Newton iteration on the clipping MSE",
    "lsq": "learned step size; lsq:rounded lets the gradient pass where the rounded value is on the grid",
    "pact": "learned upper bound of a non-negative activation",
}
#: Ranges whose bounds are parameters trained by the optimizer.
LEARNED_RANGES = frozenset({"lsq", "pact"})
ROUNDINGS: dict[str, str] = {
    "nearest": "round half to even",
    "stochastic": "up with the probability of the fraction, in training; stochastic:7 sets the seed",
}
GRADIENTS: dict[str, str] = {
    "clipped": "straight through inside the range, 0 outside",
    "identity": "straight through everywhere",
    "mad": "straight through inside, bound / |x| outside (OCTAV's magnitude-aware derivative)",
}


def range_fault(text: str) -> str | None:
    """What is wrong with a range, its option included, or None.

    >>> range_fault("percentile:20")
    "range 'percentile:20': the option must be a number in 50..100"
    """
    name, _, rest = text.partition(":")
    option = rest or None
    if name not in RANGES:
        return name_fault("range", text, RANGES)
    if name == "ema" and option is not None:
        option = option.removesuffix(":constant")
    if name in ("ema", "percentile") and option is not None:
        low, high = (0.0, 1.0) if name == "ema" else (50.0, 100.0)
        try:
            ok = low <= float(option) <= high
        except ValueError:
            ok = False
        return None if ok else f"range {text!r}: the option must be a number in {low:g}..{high:g}"
    if name in ("aciq", "aciq_exact") and option not in (None, "gauss", "laplace"):
        return f"range {text!r}: the option must be gauss or laplace"
    if name == "lsq" and option not in (None, "rounded"):
        return f"range {text!r}: the option must be rounded"
    if name in ("minmax", "mse", "kl", "octav", "pact") and option is not None:
        return f"range {name!r} takes no option, got {option!r}"
    return None


def rounding_fault(text: str, kind: Format, name: str) -> str | None:
    """What is wrong with the rounding of a format called `name`, or None."""
    rounding, _, seed = text.partition(":")
    if rounding not in ROUNDINGS:
        return name_fault("rounding", text, ROUNDINGS)
    if rounding not in kind.roundings:
        return f"{name} is rounded to nearest, got {text!r}"
    if seed and (rounding != "stochastic" or not re.fullmatch(r"\d{1,18}", seed)):
        return f"rounding {text!r}: only stochastic takes a seed, a whole number"
    return None


def gradient_fault(text: str, kind: Format, name: str) -> str | None:
    """What is wrong with the gradient of a format called `name`, or None."""
    if text not in GRADIENTS:
        return name_fault("gradient", text, GRADIENTS)
    return None if text in kind.gradients else f"{name} has a gradient of its own, got {text!r}"


def name_fault(what: str, got: str, valid: Iterable[str]) -> str:
    """An unknown name, with the valid ones.

    >>> name_fault("range", "mxe", ["mse", "kl"])
    "unknown range 'mxe'; valid: mse, kl. Did you mean 'mse'?"
    """
    names = list(valid)
    return f"unknown {what} {got!r}; valid: {', '.join(names)}.{did_you_mean(got, names)}"
