"""Part of a report about one tensor: distribution, criteria, channels, errors by place, roundings."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Mark:
    """The clipping bounds of one estimator on a tensor.

    Args:
        label: the estimator, or `"in force"`.
        low, high: its bounds.
        sqnr_db, clipped: measured on the tensor with these bounds.
        wins: no other has a smaller error.
    """

    label: str
    low: float
    high: float
    sqnr_db: float | None = None
    clipped: float | None = None
    wins: bool = False


@dataclass(frozen=True)
class Curve:
    """An error over the upper clipping bound."""

    threshold: list[float]
    error: list[float]


@dataclass(frozen=True)
class TensorView:
    """The distribution of the values of a tensor, or of one channel of it, over its quantization levels.

    Args:
        slot: `weight`, `input` or `output`.
        spec: how it is quantized.
        what: which part of the tensor is shown.
        low, high: the histogram's outer edges.
        counts: elements in bins of equal width.
        zeros: share of exact zeros that are not in `counts`, 0 where they are.
        levels: values of the quantization levels, ascending; empty where there are more than 256, or where they follow
            the data.
        marks: clipping bounds of each estimator.
        mse, kl: the criteria over the threshold.
        distribution: that fits better, `gauss` or `laplace`.
    """

    slot: str
    spec: str
    what: str
    low: float
    high: float
    counts: list[float]
    zeros: float = 0.0
    levels: list[float] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    mse: Curve | None = None
    kl: Curve | None = None
    distribution: str = ""


@dataclass(frozen=True)
class Boxes:
    """Values of a weight by output channel; adjacent channels share a column where there are many.

    Args:
        channels: how many there are.
        quantiles: 7 lists, one number a column: minimum, 5 %, 25 %, 50 %, 75 %, 95 %, maximum.
        low, high: outermost values of the levels, one a column; empty without a range.
        per_tensor: step between levels with one scale for the whole tensor, where the plan has more.
        sqnr_db: by granularity, of the same bit-width and range; as it is now for the plan's own.
    """

    channels: int
    quantiles: list[list[float]]
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    per_tensor: float | None = None
    sqnr_db: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ErrorMap:
    """Mean squared error of a weight over its mean square, in dB (less is better), in cells of channels.

    Args:
        rows, columns: output and input channels of the weight.
        cells: one list a row of cells, None where nothing is lost.
    """

    rows: int
    columns: int
    cells: list[list[float | None]]


@dataclass(frozen=True)
class Rounding:
    """Learned rounding compared with rounding to nearest.

    Args:
        same, up, down: weights rounded as nearest would, to a higher level, to a lower one.
        up_share: of the weights whose place between two levels is in this tenth, the share that took the upper one.
        unit: what was reconstructed together, with its error before and after, and whether learned rounding was kept.
    """

    same: int
    up: int
    down: int
    up_share: list[float | None] = field(default_factory=list)
    unit: str = ""
    before: float | None = None
    after: float | None = None
    kept: bool = True
