"""The values of a report: made once, kept as JSON, drawn as a page or as pictures.

    report = model_report(model, plan, statistics=...)    after a run
    report = study_report(result)                         of a search
    report.save("report.json"); ReportData.load("report.json")

Numbers carry four digits, which is more than a picture shows.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from lq_plugin.errors import QuantizationError
from lq_plugin.report.codec import decode, encode
from lq_plugin.report.versions import from_version_1
from lq_plugin.utilities.files import make_folder, write_file

FORMAT, VERSION = "lq_plugin.report", 2


def digits(value: Any, count: int = 4) -> float:
    """Returns a number with so many significant digits; inf and NaN are unchanged.

    >>> digits(3.14159), digits(float("inf"))
    (3.142, inf)
    """
    number = float(value)
    return float(f"{number:.{count}g}") if isfinite(number) else number


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


@dataclass(frozen=True)
class Node:
    """A box of the flow graph: `kind` is float, quantizer, operation or note."""

    id: str
    label: str
    kind: str
    detail: str = ""
    column: int = 0
    row: int = 0


@dataclass(frozen=True)
class Flow:
    """The path of the tensors through one layer; edges are pairs of node ids."""

    nodes: list[Node]
    edges: list[list[str]]


@dataclass(frozen=True)
class LayerReport:
    """One layer; its numbers are those of `CostRow` and `FidelityRow`, MACs and BOPs for one input sample."""

    name: str
    kind: str
    shape: list[int]
    specs: dict[str, str]
    weight_bits: int
    input_bits: int
    elements: int
    bytes: int
    float_bytes: int
    effective_bits: float | None = None
    macs: int | None = None
    bops: int | None = None
    tied_to: str | None = None
    reason: str | None = None
    sqnr_db: dict[str, float] = field(default_factory=dict)
    clipped: dict[str, float] = field(default_factory=dict)
    bounds: dict[str, list[float]] = field(default_factory=dict)
    sensitivity: float | None = None
    latency_ms: float | None = None
    boxes: Boxes | None = None
    views: list[TensorView] = field(default_factory=list)
    error: ErrorMap | None = None
    rounding: Rounding | None = None
    flow: Flow | None = None


@dataclass(frozen=True)
class Phase:
    """A moment of the schedule: `unit` is epoch or step."""

    label: str
    unit: str
    count: int


@dataclass(frozen=True)
class Series:
    """A logged number over optimizer steps."""

    name: str
    steps: list[int]
    values: list[float]


@dataclass(frozen=True)
class ModelReport:
    """A quantized model.

    Args:
        name: its class.
        plan: YAML.
        totals: of the cost.
        weight_coverage, compute_coverage: quantized shares of the weights, and of the MACs with all operands, 0..1;
            None: not known.
        layers: in the model's order.
        ledger: rows of the coverage ledger.
        metrics: what it scores.
        schedule: moments at which something changes.
        training: what was logged.
        epoch_steps: optimizer steps an epoch, to draw epochs over steps.
    """

    name: str
    plan: str
    totals: dict[str, float | None]
    layers: list[LayerReport]
    weight_coverage: float | None = None
    compute_coverage: float | None = None
    ledger: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    schedule: list[Phase] = field(default_factory=list)
    training: list[Series] = field(default_factory=list)
    epoch_steps: int | None = None


@dataclass(frozen=True)
class TrialReport:
    """A complete trial; the front is made of `cost` and `metric`."""

    number: int
    metric: float
    cost: float
    origin: str
    seconds: float
    numbers: dict[str, float]
    front: bool = False


@dataclass(frozen=True)
class BestPlan:
    """A plan of the front: bits by layer (None: float) in the order of `StudyReport.layers`."""

    number: int
    weight_bits: list[int | None]
    input_bits: list[int | None]
    plan: str


@dataclass(frozen=True)
class StudyReport:
    """A search.

    Args:
        metric, cost: names of the two axes of the front.
        costs: of all objectives but the metric.
        trials: complete ones, by number.
        layers: that any plan names.
        best: plans of the front, the best metric first.
        importance: of each parameter for the metric, largest first.
        hypervolume: of the trials so far, 0..1 of the box between the worst and the best values; one number a trial.
        parameters: value of the most important parameters, by name, one a trial.
    """

    name: str
    metric: str
    cost: str
    costs: list[str]
    maximize: bool
    trials: list[TrialReport]
    float_metric: float | None = None
    float_bytes: int | None = None
    layers: list[str] = field(default_factory=list)
    best: list[BestPlan] = field(default_factory=list)
    importance: dict[str, float] = field(default_factory=dict)
    hypervolume: list[float] = field(default_factory=list)
    parameters: dict[str, list[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class FileReport:
    """An exported file in its runtime, as its certificate says (`lq_plugin.export.certificate`).

    Args:
        file, bytes: its name and size.
        target, runtime: that wrote and ran it.
        samples, agreement: classifications compared, and the share that is the model's, 0..1.
        within_one_step, largest_steps: of the outputs, in steps of 8 bits; None: not a number.
        integer, products: products that the runtime computes with integers, and all; None: it does not say.
        metrics: of "model" and "file", by name.
        first_difference: first layer whose input differs by more than a step.
        created, processor, versions: when, where and with what it ran.
    """

    file: str
    target: str
    runtime: str
    bytes: int
    samples: int
    agreement: float
    within_one_step: float | None = None
    largest_steps: float | None = None
    integer: int | None = None
    products: int | None = None
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    first_difference: str | None = None
    created: str = ""
    processor: str = ""
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ReportData:
    """Everything a page shows: a model, a study, or both, and the files that were exported."""

    title: str
    model: ModelReport | None = None
    study: StudyReport | None = None
    notes: list[str] = field(default_factory=list)
    files: list[FileReport] = field(default_factory=list)

    def to_json(self) -> str:
        """Returns one line of JSON."""
        content = {"format": FORMAT, "version": VERSION, **encode(self)}
        return json.dumps(content, separators=(",", ":"), ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str, where: str = "report") -> ReportData:
        """Read the output of `to_json`.

        Raises:
            QuantizationError: another kind of JSON, or a version this library does not read.
        """
        try:
            content = json.loads(text, parse_constant=_no_number)
        except (ValueError, RecursionError) as error:
            raise QuantizationError(f"{where} is no JSON: {error}") from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise QuantizationError(f"{where} is no report of lq_plugin")
        version = content.get("version")
        if version not in (1, VERSION):
            raise QuantizationError(f"{where} has version {version!r}, this lq_plugin reads 1 and {VERSION}")
        content = {key: value for key, value in content.items() if key not in ("format", "version")}
        return decode(cls, from_version_1(content) if version == 1 else content, where)

    def save(self, path: str | Path) -> Path:
        """Write JSON; folders are made."""
        path = Path(path)
        make_folder(path.parent)
        write_file(path, self.to_json())
        return path

    @classmethod
    def load(cls, path: str | Path) -> ReportData:
        """Read a JSON file.

        Raises:
            QuantizationError: no such file, or no report.
        """
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise QuantizationError(f"cannot read {path}: {error}") from error


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")
