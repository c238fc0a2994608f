"""What a study found: its front, the best plan of a size, and the files that show them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from optuna import Study
from optuna.trial import FrozenTrial, TrialState
from rich.table import Table
from rich.text import Text

from lq_plugin import plots
from lq_plugin.errors import QuantizationError
from lq_plugin.intent.plan import QuantPlan
from lq_plugin.plots.style import short
from lq_plugin.report import render
from lq_plugin.search.evaluation.costs import COSTS, LABELS, LATENCY
from lq_plugin.search.study.objective import METRICS, ORIGIN, PLAN, SECONDS, held_back
from lq_plugin.search.study.promotion import reached_by
from lq_plugin.search.study.report import study_report
from lq_plugin.utilities.csv_text import to_csv
from lq_plugin.utilities.files import make_folder, write_file

#: User attribute of a study: the table of latencies that all its workers predict with.
TABLE = "latency_table"
#: User attribute of a study: milliseconds of whole models, by the number of the trial.
MEASURED = "measured_latency"


@dataclass(frozen=True)
class Candidate:
    """One complete trial.

    Args:
        number: of the trial.
        plan: that it evaluated.
        metric: its first objective.
        cost: its size: the second objective, or the effective bits where there is none.
        values: all objectives.
        metrics: everything its validation logged, and all costs.
        origin: `"uniform 4 bits"`, or `"sampled"`.
        seconds: that it took.
        lower: what it scored at each level of fidelity below the top; empty where there is one level.
    """

    number: int
    plan: QuantPlan
    metric: float
    cost: float
    metrics: Mapping[str, float]
    origin: str
    seconds: float
    values: tuple[float, ...]
    lower: tuple[Mapping[str, float], ...] = ()

    @property
    def effective_bits(self) -> float:
        """Mean bits of a parameter of the model, scales and zero points included."""
        return self.metrics["effective_bits"]

    @property
    def file_name(self) -> str:
        """Name of its plan file."""
        return f"plan_{self.number:03d}_{self.effective_bits:.2f}bits.yaml"

    @classmethod
    def of(cls, trial: FrozenTrial, cost: str) -> Candidate:
        """Read a complete trial; `cost` names its size."""
        attrs, values = trial.user_attrs, tuple(trial.values)
        plan, metrics, origin = QuantPlan.from_dict(attrs[PLAN]), attrs[METRICS], attrs.get(ORIGIN, "sampled")
        lower = tuple(reached_by(trial)[:-1])
        return cls(
            trial.number, plan, values[0], metrics[cost], metrics, origin, attrs.get(SECONDS, 0.0), values, lower
        )


class SearchResult:
    """The complete trials of a study, of all workers and earlier runs, as they are now.

    Args:
        study: the metric is its first objective, costs are the others.
        metric, costs: their names.
        maximize: whether more of the metric is better.
        float_metrics: what the float model scores.
        float_bytes: size of the float model.

    Attributes:
        candidates: every complete trial that keeps the constraints, by number; with several levels of fidelity those of
            the top.
        held_back: number of trials that stopped below the top level.
    """

    def __init__(
        self,
        study: Study,
        metric: str,
        costs: Sequence[str],
        maximize: bool,
        float_metrics: Mapping[str, float],
        float_bytes: int | None = None,
    ) -> None:
        self.study, self.metric, self.maximize = study, metric, maximize
        #: What sizes are compared by.
        self.cost = costs[0] if costs else "effective_bits"
        self.float_metrics, self.float_bytes = dict(float_metrics), float_bytes
        complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        self.held_back = len(held_back(study.get_trials(deepcopy=False, states=(TrialState.PRUNED,))))
        self.candidates = [
            Candidate.of(trial, self.cost)
            for trial in complete
            if all(excess <= 0 for excess in trial.constraints.values())
        ]

    @cached_property
    def front(self) -> list[Candidate]:
        """The candidates that no other beats in every objective, by cost; of equal ones the first."""
        if len(self.study.directions) < 3:
            found = plots.pareto_front([(c.cost, c.metric) for c in self.candidates], self.maximize)
            return [self.candidates[index] for index in found]
        signs = [-1.0 if self.maximize else 1.0] + [1.0] * (len(self.study.directions) - 1)
        losses = np.array(
            [[sign * value for sign, value in zip(signs, c.values, strict=True)] for c in self.candidates]
        )
        distinct = [
            c
            for i, c in enumerate(self.candidates)
            if not any(_beats(losses[j], losses[i], j < i) for j in range(len(losses)))
        ]
        return sorted(distinct, key=lambda c: (c.cost, c.metric))

    def best(self, cost: float | None = None) -> Candidate:
        """The candidate with the best metric whose cost is at most `cost`.

        Raises:
            QuantizationError: when there is none.
        """
        allowed = sorted(
            (c for c in self.front if cost is None or c.cost <= cost), key=lambda c: c.metric, reverse=not self.maximize
        )
        if not allowed:
            least = f"the smallest has {self.front[0].cost:.4g}" if self.front else "no trial is complete"
            raise QuantizationError(f"no plan with {self.cost} <= {cost}: {least}")
        return allowed[-1]

    def figure(self) -> Any:
        """Metric over cost of every trial, the front, the uniform plans and the float model."""
        size = LABELS[self.cost]
        return plots.pareto(
            [(c.cost, c.metric) for c in self.candidates],
            references={c.origin: (c.cost, c.metric) for c in self.candidates if c.origin.startswith("uniform")},
            seeds=[(c.cost, c.metric) for c in self.candidates if c.origin.startswith(("ilp", "greedy"))],
            float_metric=self.float_metrics.get(self.metric),
            metric=short(self.metric, 60),
            maximize=self.maximize,
            size=size,
            title=f"{short(self.study.study_name, 60)}: {short(self.metric, 40)} over {size}",
        )

    def table(self) -> Table:
        """The float model and the front, for a terminal."""
        stopped = f", {self.held_back} more stopped below the top level" if self.held_back else ""
        # As Text: brackets in a name are no markup.
        table = Table(title=Text(f"{self.study.study_name}: front of {len(self.candidates)} trials{stopped}"))
        timed = any(LATENCY in c.metrics for c in self.front)
        # Predicted from the table of layers, and measured with the whole model.
        latencies = ("latency ms/sample", "measured ms/sample") if timed else ()
        for column in ("trial", self.metric, "effective bits", "bytes", *latencies, "plan from"):
            table.add_column(Text(column), justify="left" if column == "plan from" else "right")
        float_bytes = "" if self.float_bytes is None else f"{self.float_bytes:,}"
        timing = self.study.user_attrs.get(TABLE)
        float_ms = None if timing is None else timing["float_model"] / timing["options"]["batch"]
        row = ["float", f"{self.float_metrics.get(self.metric, float('nan')):.4f}", "32.00", float_bytes]
        # The float model's time is a measured one.
        table.add_row(*map(Text, [*row, *(["", _milliseconds(float_ms)] if timed else []), ""]), end_section=True)
        measured = self.study.user_attrs.get(MEASURED, {})
        for c in reversed(self.front):
            row = [str(c.number), f"{c.metric:.4f}", f"{c.effective_bits:.2f}", f"{int(c.metrics['bytes']):,}"]
            times = [c.metrics.get(LATENCY), measured.get(str(c.number))] if timed else []
            table.add_row(*map(Text, [*row, *map(_milliseconds, times), c.origin]))
        return table

    def rows(self) -> list[dict[str, Any]]:
        """The front as plain rows; `plan` is the name of its file, `level0/val/acc` what the lowest of several levels
        logged."""
        measured = self.study.user_attrs.get(MEASURED, {})
        found = []
        for c in self.front:
            latency = {"measured_latency": measured[str(c.number)]} if str(c.number) in measured else {}
            rest = {"origin": c.origin, "seconds": round(c.seconds, 4), "plan": c.file_name}
            found.append({"trial": c.number, **c.metrics, **latency, **_levels(c), **rest})
        return found

    def to_csv(self) -> str:
        """The rows as CSV text with a header."""
        rows = self.rows()
        # Trials of one study log the same; should one not, its place is empty.
        return to_csv(rows, list(dict.fromkeys(name for row in rows for name in row)) or ["trial"])

    def write(self, folder: str | Path) -> Path:
        """Write `front.csv`, `plans/`, `pareto.png` and `report.html` with its data; nothing but `front.csv` when no
        trial is complete.

        Other workers may write the same files: each appears whole, and plans that left the front go.
        """
        folder = Path(folder)
        plans = make_folder(folder / "plans")
        wanted = {c.file_name: c for c in self.front}
        for name, c in wanted.items():
            scores = f"{self.metric} {c.metric:.6g}, {c.effective_bits:.4f} effective bits"
            comment = f"# Trial {c.number} of {self.study.study_name}: {scores}\n"
            write_file(plans / name, comment + c.plan.to_yaml())
        for path in plans.glob("plan_*bits.yaml"):
            if path.name not in wanted:
                path.unlink(missing_ok=True)
        write_file(folder / "front.csv", self.to_csv())
        if self.candidates:
            write_file(folder / "pareto.png", plots.to_png(self.figure()))
            report = study_report(self)
            write_file(folder / "report.json", report.to_json())
            write_file(folder / "report.html", render(report))
        return folder


def _milliseconds(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _levels(candidate: Candidate) -> dict[str, float]:
    if not candidate.lower:
        return {}
    lower = enumerate(candidate.lower)
    found = {
        f"level{number}/{name}": value
        for number, metrics in lower
        for name, value in metrics.items()
        if name not in COSTS
    }
    return {"level": len(candidate.lower), **found}


def _beats(mine: np.ndarray, other: np.ndarray, earlier: bool) -> bool:
    """No worse anywhere, and better somewhere or equal and earlier."""
    return bool((mine <= other).all() and ((mine < other).any() or earlier))
