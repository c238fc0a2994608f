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
from lq_plugin.report.tensor_data import (
    Boxes as Boxes,
    Curve as Curve,
    ErrorMap as ErrorMap,
    Mark as Mark,
    Rounding as Rounding,
    TensorView as TensorView,
)
from lq_plugin.report.versions import from_version_1
from lq_plugin.utilities.files import make_folder, write_file
from lq_plugin.utilities.moved import former_names

__getattr__ = former_names(__name__)

FORMAT, VERSION = "lq_plugin.report", 3


def digits(value: Any, count: int = 4) -> float:
    """Returns a number with so many significant digits; inf and NaN are unchanged.

    >>> digits(3.14159), digits(float("inf"))
    (3.142, inf)
    """
    number = float(value)
    return float(f"{number:.{count}g}") if isfinite(number) else number


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
    """One layer; its numbers are those of `CostRow` and `FidelityRow`, MACs and BOPs for one input sample.

    `output_db` is the SQNR of its output, `alone` with the float model's input and `along` the quantized network.
    """

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
    output_db: dict[str, float] = field(default_factory=dict)
    sensitivity: float | None = None
    latency_ms: float | None = None
    boxes: Boxes | None = None
    views: list[TensorView] = field(default_factory=list)
    error: ErrorMap | None = None
    rounding: Rounding | None = None
    flow: Flow | None = None


@dataclass(frozen=True)
class ScheduledChange:
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
class Score:
    """Metrics of a variant of the model (`float`, `PTQ`, `QAT`).

    Args:
        variant: its name.
        metric: its name.
        value: the score.
        samples: that it was computed on; None: not known.
        low, high: bounds of its interval of 95 %; None where it is no share of samples.
    """

    variant: str
    metric: str
    value: float
    samples: int | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Sensitivity:
    """Harm of each choice of each tensor, as `lq-sensitivity` or a search measured it.

    Args:
        measure: see `lq_plugin.search.sensitivity.measure`; empty where it is not known.
        values: by tensor (`conv1.weight`) and choice (a spec, or `float`); more is worse.
    """

    measure: str
    values: dict[str, dict[str, float]]


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
        scores: of the model as it is, and of its other variants.
        stored: bytes by part of the file, see `lq_plugin.model.measure.stored`.
    """

    name: str
    plan: str
    totals: dict[str, float | None]
    layers: list[LayerReport]
    weight_coverage: float | None = None
    compute_coverage: float | None = None
    ledger: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    schedule: list[ScheduledChange] = field(default_factory=list)
    training: list[Series] = field(default_factory=list)
    epoch_steps: int | None = None
    scores: list[Score] = field(default_factory=list)
    stored: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class TrialReport:
    """A complete trial; the front is made of `cost` and `bound`, or `metric` where no plan was scored again.

    Args:
        number: of the trial.
        metric, cost: that it has.
        origin: where its plan comes from.
        seconds: that it took.
        numbers: all that it logged, and its costs.
        front: whether it is on the front.
        mean, low, high, looks: of its scores after it was chosen, and their number; None where there are none.
        bound: what its metric is at least (or at most), as far as is known.
    """

    number: int
    metric: float
    cost: float
    origin: str
    seconds: float
    numbers: dict[str, float]
    front: bool = False
    mean: float | None = None
    low: float | None = None
    high: float | None = None
    looks: int | None = None
    bound: float | None = None


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
        confidence: level of the trials' intervals; None where no plan was scored again.
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
    confidence: float | None = None


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
    """Everything a page shows: a model, a study, or both, and the files that were exported.

    Args:
        title: of the page.
        model, study: what there is.
        notes: sentences under the title.
        files: that were exported.
        sensitivity: where it was measured.
        trained: number of the study's trial whose plan the model has.
        provenance: when, where from and with what the values were made, by name.
    """

    title: str
    model: ModelReport | None = None
    study: StudyReport | None = None
    notes: list[str] = field(default_factory=list)
    files: list[FileReport] = field(default_factory=list)
    sensitivity: Sensitivity | None = None
    trained: int | None = None
    provenance: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """Returns one line of JSON."""
        content = {"format": FORMAT, "version": VERSION, **encode(self)}
        return json.dumps(content, separators=(",", ":"), ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str, where: str = "report") -> ReportData:
        """Reads the output of `to_json`.

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
        if isinstance(version, bool) or version not in range(1, VERSION + 1):
            raise QuantizationError(f"{where} has version {version!r}, this lq_plugin reads 1 to {VERSION}")
        content = {key: value for key, value in content.items() if key not in ("format", "version")}
        return decode(cls, from_version_1(content) if version == 1 else content, where)

    def save(self, path: str | Path) -> Path:
        """Writes JSON; folders are made."""
        path = Path(path)
        make_folder(path.parent)
        write_file(path, self.to_json())
        return path

    @classmethod
    def load(cls, path: str | Path) -> ReportData:
        """Reads a JSON file.

        Raises:
            QuantizationError: no such file, or no report.
        """
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise QuantizationError(f"cannot read {path}: {error}") from error


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")
