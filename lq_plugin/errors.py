"""Errors of lq_plugin. All are `ValueError`s, so one `except` catches every kind of bad input.

An error says what was got, what is valid and where, and lists every fault at once.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TypeGuard


class QuantizationError(ValueError):
    """Base of every error this library raises about its input."""


class SpecError(QuantizationError):
    """A `QuantSpec` that cannot exist: unknown format or range, impossible bit-width."""


class PlanError(QuantizationError):
    """A `QuantPlan` that does not fit: unknown pattern, spec that a layer cannot take."""


class CalibrationError(QuantizationError):
    """Ranges are missing, or the data they should come from is empty, NaN or Inf."""


class ExportError(QuantizationError):
    """A model that cannot be written to a file as it is, or a file that cannot be read."""


class MissingPackageError(ExportError, ImportError):
    """An optional package that is not installed, and what brings it."""


class CoverageError(QuantizationError):
    """Less of the model is quantized than `min_coverage` asks for."""


def is_integer(value: object, least: int | None = None) -> TypeGuard[int]:
    """Returns True for an integer of at least `least`; True and False are none.

    >>> is_integer(3, 1), is_integer(0, 1), is_integer(True), is_integer(3.0)
    (True, False, False, False)
    """
    return isinstance(value, int) and not isinstance(value, bool) and (least is None or value >= least)


def did_you_mean(got: object, valid: Iterable[str], limit: int = 3) -> str:
    """Returns `" Did you mean 'x', 'y'?"`, or an empty string when nothing is near.

    Args:
        got: the unknown name.
        valid: the known names.
        limit: how many are shown at most.

    >>> did_you_mean("minmx", ["minmax", "mse"])
    " Did you mean 'minmax'?"
    """
    near = difflib.get_close_matches(str(got), list(valid), n=limit, cutoff=0.6)
    return f" Did you mean {', '.join(map(repr, near))}?" if near else ""


def name_fault(what: str, got: object, valid: Iterable[str]) -> str:
    """Returns the message for an unknown name, with the valid ones.

    Args:
        what: the kind of name.
        got: the unknown name.
        valid: the known names.

    >>> name_fault("range", "mxe", ["mse", "kl"])
    "unknown range 'mxe'; valid: mse, kl. Did you mean 'mse'?"
    """
    names = list(valid)
    return f"unknown {what} {got!r}; valid: {', '.join(names)}.{did_you_mean(got, names)}"


def name_faults(what: str, given: Iterable[object], valid: Iterable[str]) -> list[str]:
    """Returns a message, see `name_fault`, for each name that is unknown.

    Args:
        what: the kind of name.
        given: names.
        valid: the known names.
    """
    names = list(valid)
    return [name_fault(what, name, names) for name in given if name not in names]


#: Faults that one message lists, and characters of each: what stands in a hostile file must not fill the terminal.
SHOWN_FAULTS, SHOWN_CHARACTERS = 50, 4000


def raise_all(kind: type[QuantizationError], title: str, faults: list[str]) -> None:
    """Raises one `kind` that lists every fault; does nothing when there is none.

    Of very many faults it shows the first ones and their number.

    Args:
        kind: class of the error.
        title: before the faults.
        faults: a sentence each.
    """
    half = SHOWN_CHARACTERS // 2
    shown = [
        fault if len(fault) <= SHOWN_CHARACTERS else f"{fault[:half]} ... {fault[-half:]}"
        for fault in faults[:SHOWN_FAULTS]
    ]
    if len(faults) == 1:
        raise kind(f"{title}: {shown[0]}")
    if faults:
        listing = "\n".join(f"  - {fault}" for fault in shown)
        more = f"\n  - ... and {len(faults) - len(shown)} more" if len(faults) > len(shown) else ""
        raise kind(f"{title}: {len(faults)} faults\n{listing}{more}")
