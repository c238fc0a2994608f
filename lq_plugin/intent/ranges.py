"""Names of range estimators, and the options that may follow them: the vocabulary of a spec's `range`.

`declare_range` adds a name. The estimators themselves are in `lq_plugin.ranges`, whose `register_range` declares and
implements in one call. Nothing here imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lq_plugin.errors import SpecError, name_fault

#: Checks the text after a range's colon: None if it is valid, else a phrase for what it must be ("a number in 0..1").
OptionCheck = Callable[[str], str | None]


@dataclass(frozen=True)
class RangeKind:
    """The declared properties of a range.

    Args:
        option: checks the text after the colon; None: the range takes no option.
        compared: `compare_ranges` and the report show it next to the other estimators.
        count_all: calibration counts every element and not a sample, because few values far out decide.
        slots: the tensors it is for.
        learned: its bounds are parameters, which the optimizer trains.
        non_negative: it is of values from 0 on, under `uint` without `affine`.
        check: returns the faults of a spec with this range that the other arguments do not cover.
    """

    option: OptionCheck | None = None
    compared: bool = True
    count_all: bool = False
    slots: tuple[str, ...] = ("weight", "input", "output")
    learned: bool = False
    non_negative: bool = False
    check: Callable[[Any], list[str]] | None = None


#: Every way to find a clipping range, with the line that error messages and docs show. `declare_range` adds to it.
RANGES: dict[str, str] = {}
_KINDS: dict[str, RangeKind] = {}


def number_in(low: float, high: float) -> OptionCheck:
    """Returns a check that accepts numbers from `low` to `high`, both included.

    >>> number_in(50, 100)("99.9"), number_in(50, 100)("20")
    (None, 'a number in 50..100')
    """

    def check(text: str) -> str | None:
        try:
            valid = low <= float(text) <= high
        except ValueError:
            valid = False
        return None if valid else f"a number in {low:g}..{high:g}"

    return check


def one_of(*words: str) -> OptionCheck:
    """Returns a check that accepts these words.

    >>> one_of("gauss", "laplace")("cauchy")
    'gauss or laplace'
    """
    return lambda text: None if text in words else " or ".join(words)


def declare_range(name: str, summary: str, kind: RangeKind | None = None) -> None:
    """Makes `name` a valid range of specs; with the summary it has already, only a `kind` changes anything.

    Args:
        name: a word of lower-case letters, digits and underscores.
        summary: the line that error messages and docs show.
        kind: its properties; None: no option, compared, counted on a sample.

    Raises:
        SpecError: the name is not such a word, or is declared with another summary.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise SpecError(f"a range is named by a lower-case word of letters, digits and underscores, got {name!r}")
    if RANGES.get(name, summary) != summary:
        raise SpecError(f"range {name!r} is already registered: {RANGES[name]}")
    RANGES[name] = summary
    _KINDS[name] = kind or _KINDS.get(name) or RangeKind()


def range_kind(name: str) -> RangeKind:
    """Returns the declared properties of a range, named without its option.

    Raises:
        KeyError: no such range.
    """
    return _KINDS[name]


def is_learned(name: str) -> bool:
    """Returns True if the optimizer trains a range, named without its option."""
    return name in _KINDS and _KINDS[name].learned


def range_fault(text: str) -> str | None:
    """Returns the fault of a range and its option, or None.

    >>> range_fault("percentile:20")
    "range 'percentile:20': the option must be a number in 50..100"
    """
    name, _, option = text.partition(":")
    if name not in RANGES:
        return name_fault("range", text, RANGES)
    check = _KINDS[name].option
    if not option:
        return None
    if check is None:
        return f"range {name!r} takes no option, got {option!r}"
    wanted = check(option)
    return None if wanted is None else f"range {text!r}: the option must be {wanted}"


def _lsq_faults(spec: Any) -> list[str]:
    if spec.bit_width == 1 and spec.signed:
        return ["range 'lsq' needs a positive level: int1 has none, use uint1 or at least int2"]
    return []


def _momentum(text: str) -> str | None:
    return number_in(0.0, 1.0)(text.removesuffix(":constant"))


_ACTIVATIONS = ("input", "output")
declare_range("minmax", "smallest and largest value")
declare_range(
    "ema",
    "moving average of each batch's min and max; ema:0.99 sets the momentum it grows to, ema:0.99:constant has it at "
    "once",
    RangeKind(_momentum, compared=False, slots=_ACTIVATIONS),  # equal to minmax on one sample
)
declare_range(
    "dynamic",
    "smallest and largest value of the present tensor, found at run time",
    RangeKind(compared=False, slots=_ACTIVATIONS),  # equal to minmax on one sample
)
declare_range(
    "percentile",
    "quantiles of the values; percentile:99.9 keeps the middle 99.9 %",
    RangeKind(number_in(50.0, 100.0)),
)
declare_range("mse", "smallest mean squared error, by search on the real grid")
declare_range("kl", "smallest KL divergence of the histograms (TensorRT)", RangeKind(count_all=True))
declare_range(
    "aciq",
    "analytic, the paper's constants for Gauss or Laplace, whichever errs less on the data; aciq:gauss or aciq:laplace "
    "forces one",
    RangeKind(one_of("gauss", "laplace")),
)
declare_range(
    "aciq_exact",
    "analytic like aciq, with the constants of the grid that is really used",
    RangeKind(one_of("gauss", "laplace")),
)
declare_range("octav", "Newton iteration on the clipping MSE")
declare_range(
    "lsq",
    "learned step size; lsq:rounded lets the gradient pass where the rounded value is on the grid",
    RangeKind(one_of("rounded"), compared=False, learned=True, check=_lsq_faults),
)
declare_range(
    "pact",
    "learned upper bound of a non-negative activation",
    RangeKind(compared=False, slots=_ACTIVATIONS, learned=True, non_negative=True),
)
