"""The result of a search as a picture, a table and files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from lq_plugin import plots
from lq_plugin.report import render
from lq_plugin.report.origins import kind_of, told
from lq_plugin.report.provenance import provenance
from lq_plugin.search.evaluation.costs import COSTS, LABELS, LATENCY
from lq_plugin.search.study.candidates import Candidate, StudyCandidates
from lq_plugin.search.study.report import study_report
from lq_plugin.utilities.brief import short
from lq_plugin.utilities.csv_text import to_csv
from lq_plugin.utilities.files import make_folder, write_file
from lq_plugin.utilities.shown import Shown

#: User attribute of a study: the table of latencies that all its workers predict with.
TABLE = "latency_table"
#: User attribute of a study: milliseconds of whole models, by the number of the trial.
MEASURED = "measured_latency"
#: User attribute of a study: scores of exported files by name, by the number of the trial.
FILES = "scored_files"


class SearchResult(Shown, StudyCandidates):
    """The result of a search: `front`, `best(cost)`, `figure()`, `table()`; `write(folder)` writes it as files.

    It prints as its table.
    """

    def figure(self) -> Any:
        """Returns a figure of metric over cost with every trial, the front, the uniform plans and the float model."""
        size = LABELS[self.cost]
        return plots.pareto(
            [(c.cost, c.estimate) for c in self.candidates],
            references={c.origin: (c.cost, c.estimate) for c in self.candidates if kind_of(c.origin) == "uniform"},
            seeds=[(c.cost, c.estimate) for c in self.candidates if kind_of(c.origin) == "sensitivity"],
            bounds=[c.bound for c in self.candidates],
            intervals=[(c.cost, c.interval.low, c.interval.high) for c in self.candidates if c.interval is not None],
            float_metric=self.float_metrics.get(self.metric),
            metric=short(self.metric, 60),
            maximize=self.maximize,
            size=size,
            title=f"{short(self.study.study_name, 60)}: {short(self.metric, 40)} over {size}",
        )

    def table(self) -> Table:
        """Returns the float model and the front as a table for a terminal."""
        stopped = f", {self.held_back} more stopped below the top rung" if self.held_back else ""
        # As Text: brackets in a name are no markup.
        table = Table(title=Text(f"{self.study.study_name}: front of {len(self.candidates)} trials{stopped}"))
        timed = any(LATENCY in c.metrics for c in self.front)
        # Predicted from the table of layers, and measured with the whole model.
        latencies = ("latency ms/sample", "measured ms/sample") if timed else ()
        files = self.study.user_attrs.get(FILES, {})
        of_files = (f"file {self.metric}", "file bytes", "file ms/sample") if files else ()
        again = ("confirmed",) if any(c.interval is not None for c in self.candidates) else ()
        for column in ("trial", self.metric, *again, "effective bits", "bytes", *latencies, *of_files, "plan from"):
            table.add_column(Text(column), justify="left" if column == "plan from" else "right")
        float_bytes = "" if self.float_bytes is None else f"{self.float_bytes:,}"
        timing = self.study.user_attrs.get(TABLE)
        float_ms = None if timing is None else timing["float_model"] / timing["options"]["batch"]
        row = ["float", f"{self.float_metrics.get(self.metric, float('nan')):.4f}"]
        row += [*[""] * len(again), "32.00", float_bytes]
        # The float model's time is a measured one.
        table.add_row(
            *map(Text, [*row, *(["", _milliseconds(float_ms)] if timed else []), *[""] * len(of_files), ""]),
            end_section=True,
        )
        measured = self.study.user_attrs.get(MEASURED, {})
        for c in reversed(self.front):
            row = [str(c.number), f"{c.metric:.4f}", *[_interval(c)] * len(again)]
            row += [f"{c.effective_bits:.2f}", f"{int(c.metrics['bytes']):,}"]
            times = [c.metrics.get(LATENCY), measured.get(str(c.number))] if timed else []
            scores = _file_cells(files.get(str(c.number)), self.metric) if files else []
            table.add_row(*map(Text, [*row, *map(_milliseconds, times), *scores, told(c.origin)]))
        return table

    def rows(self) -> list[dict[str, Any]]:
        """Returns the front as plain rows; `plan` names its file, `level0/val/acc` a metric of the lowest rung."""
        measured, files = (self.study.user_attrs.get(key, {}) for key in (MEASURED, FILES))
        found = []
        for c in self.front:
            latency = {"measured_latency": measured[str(c.number)]} if str(c.number) in measured else {}
            rest = {"origin": c.origin, "seconds": round(c.seconds, 4), "plan": c.file_name}
            scores = {**c.metrics, **c.confirmed, **latency, **files.get(str(c.number), {}), **_levels(c)}
            found.append({"trial": c.number, **scores, **rest})
        return found

    def to_csv(self) -> str:
        """Returns the rows as CSV text with a header."""
        rows = self.rows()
        # Trials of one study log the same; should one not, its place is empty.
        return to_csv(rows, list(dict.fromkeys(name for row in rows for name in row)) or ["trial"])

    def write(self, folder: str | Path) -> Path:
        """Writes `front.csv`, `plans/`, `pareto.png` and the report; only `front.csv` when no trial is complete.

        Other workers may write the same files: each appears whole, and plans that left the front go.
        """
        folder = Path(folder)
        plans = make_folder(folder / "plans")
        wanted = {c.file_name: c for c in self.front}
        for name, c in wanted.items():
            sure = "" if c.interval is None else f", {_interval(c)} in {c.interval.looks} looks"
            scores = f"{self.metric} {c.metric:.6g}{sure}, {c.effective_bits:.4f} effective bits"
            comment = f"# Trial {c.number} of {self.study.study_name}: {scores}\n"
            write_file(plans / name, comment + c.plan.to_yaml())
        for path in plans.glob("plan_*bits.yaml"):
            if path.name not in wanted:
                path.unlink(missing_ok=True)
        write_file(folder / "front.csv", self.to_csv())
        if self.candidates:
            write_file(folder / "pareto.png", plots.to_png(self.figure()))
            report = replace(study_report(self), provenance=provenance())
            write_file(folder / "report.json", report.to_json())
            write_file(folder / "report.html", render(report))
        return folder


def _interval(candidate: Candidate) -> str:
    known = candidate.interval
    return "" if known is None else f"{known.mean:.4f} [{known.low:.4f}, {known.high:.4f}]"


def _milliseconds(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _file_cells(scores: dict[str, float] | None, metric: str) -> list[str]:
    """Returns the cells of an exported file; empty ones where it has no scores yet."""
    if scores is None:
        return ["", "", ""]
    score = scores.get(f"file/{metric}")
    return [
        "" if score is None else f"{score:.4f}",
        f"{int(scores['file_bytes']):,}",
        _milliseconds(scores["file_ms"]),
    ]


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
