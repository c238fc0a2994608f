"""How a range estimator is found by name, and called."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from lq_plugin.errors import SpecError, did_you_mean
from lq_plugin.intent.spec import RANGES, IntegerGrid
from lq_plugin.ranges.sample import Sample

#: `(sample, grid, option) -> (minimum [rows], maximum [rows])`. The sample is normalised: the
#: largest magnitude of each row lies in [0.5, 1), or is 0.
RangeFunction: TypeAlias = Callable[[Sample, IntegerGrid, str | None], tuple[Tensor, Tensor]]

#: Ranges that follow from few values far out: their statistics count every element, so that they are the same in any
#: order of the data.
COUNT_ALL = frozenset({"kl"})

_Registered = TypeVar("_Registered", bound=RangeFunction)
_BLOCK = 2**18

_ESTIMATORS: dict[str, RangeFunction] = {}


def register_range(name: str, summary: str) -> Callable[[_Registered], _Registered]:
    """Decorator: make a function a range estimator that specs can name.

    The function gets a `Sample` whose rows are scaled to magnitudes below 1, the `IntegerGrid`
    and what stood behind the colon of the spec (or None). It returns bounds `[rows]` from which
    `lq_plugin.functional.affine.qparams_from_bounds` makes scale and zero point.

    Args:
        name: one word, as it stands in a spec.
        summary: the line that error messages and docs show.

    Raises:
        SpecError: the name is taken by another function.

    >>> @register_range("half", "half of the largest magnitude")
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
        _ESTIMATORS[name] = function
        RANGES.setdefault(name, summary)
        return function

    return register


def estimate_range(spec_range: str, sample: Sample, grid: IntegerGrid) -> tuple[Tensor, Tensor]:
    """Clipping bounds of each row of a sample.

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
    name, _, option = spec_range.partition(":")
    if name not in _ESTIMATORS:
        raise SpecError(
            f"unknown range {spec_range!r}; valid: {', '.join(_ESTIMATORS)}.{did_you_mean(name, _ESTIMATORS)}"
        )
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


def registered_ranges() -> list[str]:
    """Names that `estimate_range` knows, in order of registration."""
    return list(_ESTIMATORS)


def no_option(name: str, option: str | None) -> None:
    """Raise `SpecError` when an estimator that takes no option got one."""
    if option is not None:
        raise SpecError(f"range {name!r} takes no option, got {option!r}")


def as_bounds(minimum: Tensor, maximum: Tensor) -> tuple[Tensor, Tensor]:
    """Float32 bounds on both sides of zero."""
    return minimum.to(torch.float32).clamp(max=0.0), maximum.to(torch.float32).clamp(min=0.0)
