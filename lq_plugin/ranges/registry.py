"""The door for range estimators: `register_range` gives a function a name in specs, `estimate_range` calls it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from lq_plugin.errors import SpecError, name_fault
from lq_plugin.intent.formats import has_meaning
from lq_plugin.intent.ranges import RANGES, OptionCheck, RangeKind, declare_range, range_fault
from lq_plugin.intent.spec import IntegerGrid
from lq_plugin.ranges.sample import Sample

#: `(sample, grid, option) -> (minimum [rows], maximum [rows])`. The sample is normalized: the largest magnitude of each
#: row lies in [0.5, 1), or is 0.
RangeFunction: TypeAlias = Callable[[Sample, IntegerGrid, str | None], tuple[Tensor, Tensor]]

_Registered = TypeVar("_Registered", bound=RangeFunction)
_BLOCK = 2**18

_ESTIMATORS: dict[str, RangeFunction] = {}


def register_range(
    name: str, summary: str, *, option: OptionCheck | None = None, compared: bool = True, count_all: bool = False
) -> Callable[[_Registered], _Registered]:
    """Decorator: makes a function a range estimator that specs can name.

    The function gets a `Sample` whose rows are scaled to magnitudes below 1, the `IntegerGrid` and the text after the
    colon of the spec (or None). It returns bounds `[rows]`, from which the quantizer makes scale and zero point.

    Args:
        name: a lower-case word, as it stands in a spec.
        summary: the line that error messages and docs show.
        option: checks the text after the colon, see `lq_plugin.intent.ranges.number_in` and `one_of`; None: the range
            takes no option.
        compared: `compare_ranges` and the report show it next to the other estimators.
        count_all: calibration counts every element and not a sample, because few values far out decide.

    Raises:
        SpecError: the name has another meaning in specs, or is taken by another function.

    >>> @register_range("half", "half of the largest magnitude", compared=False)
    ... def half(sample, grid, option):
    ...     return sample.minimum / 2, sample.maximum / 2
    >>> minimum, maximum = estimate_range("half", Sample.from_tensor(torch.tensor([[-1.0, 3.0]])), IntegerGrid(-8, 7))
    >>> float(minimum), float(maximum)
    (-0.5, 1.5)
    """

    def register(function: _Registered) -> _Registered:
        known = _ESTIMATORS.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (function.__module__, function.__qualname__):
            raise SpecError(f"range {name!r} is already registered by {known.__module__}.{known.__qualname__}")
        if name not in RANGES and has_meaning(name):
            raise SpecError(f"{name!r} cannot name a range: it has a meaning in specs already")
        kind = RangeKind(option, compared, count_all)
        declare_range(name, summary, None if kind == RangeKind() else kind)
        _ESTIMATORS[name] = function
        return function

    return register


def estimate_range(spec_range: str, sample: Sample, grid: IntegerGrid) -> tuple[Tensor, Tensor]:
    """Returns the clipping bounds of each row of a sample.

    Args:
        spec_range: the `range` of a `QuantSpec`: `"mse"`, `"percentile:99.9"`.
        sample: values with their weights.
        grid: the integer levels they will be rounded to.

    Returns:
        `(minimum [rows], maximum [rows])`, float32, minimum <= 0 <= maximum.

    Raises:
        SpecError: unknown estimator or option.

    >>> sample = Sample.from_tensor(torch.tensor([[-1.0, 0.5], [2.0, 4.0]]))
    >>> estimate_range("minmax", sample, IntegerGrid(-8, 7))
    (tensor([-1.,  0.]), tensor([0.5000, 4.0000]))
    """
    if (fault := range_fault(spec_range)) is not None:
        raise SpecError(fault)
    name, _, option = spec_range.partition(":")
    if name not in _ESTIMATORS:
        raise SpecError(name_fault("range", spec_range, _ESTIMATORS))
    # Rows are independent: blocks of them keep the temporaries in the cache and memory bounded.
    rows_at_once = max(_BLOCK // sample.values.shape[1], 1)
    low, high = [], []
    for first in range(0, sample.rows, rows_at_once):
        block = sample if rows_at_once >= sample.rows else sample.select(slice(first, first + rows_at_once))
        normalized, factor = block.normalized()
        minimum, maximum = _ESTIMATORS[name](normalized, grid, option or None)
        low.append(minimum.float().clamp(max=0.0) * factor)
        high.append(maximum.float().clamp(min=0.0) * factor)
    return torch.cat(low), torch.cat(high)


def range_function(name: str) -> RangeFunction:
    """Returns the estimator of a registered range, for `Sample`s whose rows are normalized."""
    return _ESTIMATORS[name]


def registered_ranges() -> list[str]:
    """Returns the names that `estimate_range` knows, in order of registration."""
    return list(_ESTIMATORS)


def as_bounds(minimum: Tensor, maximum: Tensor) -> tuple[Tensor, Tensor]:
    """Returns bounds as float32, clamped so that the minimum is <= 0 and the maximum >= 0."""
    return minimum.to(torch.float32).clamp(max=0.0), maximum.to(torch.float32).clamp(min=0.0)
