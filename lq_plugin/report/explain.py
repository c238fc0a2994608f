"""A dry run: the specs that each layer of a model would get from a plan, and their cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text
from torch import nn

from lq_plugin.intent.formats import SLOTS
from lq_plugin.intent.plan import LayerPlan, QuantPlan
from lq_plugin.model.aside import quantizing
from lq_plugin.model.graph.record import Recording, record
from lq_plugin.model.ledger import Ledger
from lq_plugin.model.measure.cost import Cost, plan_cost
from lq_plugin.model.operations.quantized import inner_operations, operations_of
from lq_plugin.model.operations.rules import resolve_operations, split
from lq_plugin.model.prepare import ledger_of, resolve_layers
from lq_plugin.model.survey import Survey
from lq_plugin.report.data import ScheduledChange
from lq_plugin.report.model import moments
from lq_plugin.utilities.shown import Shown, as_html, as_text, new_table, short_number

_WIDTH = 40


@dataclass(frozen=True)
class Explanation(Shown):
    """The effect of a plan on one model; prints as its table and its totals.

    Args:
        plan: as it was read.
        layers: specs by layer.
        cost: of the model under it.
        ledger: what would be quantized, and why the rest stays float.
        schedule: moments at which something changes, see `ScheduledChange`.
        recording: of the model on one batch; None: it was not run.
    """

    plan: QuantPlan
    layers: dict[str, LayerPlan]
    cost: Cost
    ledger: Ledger
    schedule: list[ScheduledChange]
    recording: Recording | None = field(default=None, repr=False)

    def rows(self) -> list[dict[str, Any]]:
        """Returns one row a layer: specs, effective bits, bytes, MACs and BOPs of a sample, and why a part is float."""
        reasons = {entry.name: entry.reason for entry in self.ledger}
        found = []
        for row in self.cost:
            plan = self.layers[row.name]
            reason = f"shares the weight of {row.tied_to}" if row.tied_to else reasons[row.name]
            found.append(
                {"layer": row.name, "kind": row.kind, "elements": row.elements}
                | {slot: _stages(plan, slot) for slot in SLOTS}
                | {"effective_bits": row.effective_bits, "bytes": row.bytes, "float_bytes": row.float_bytes}
                | {"macs": row.macs, "bops": row.bops, "reason": reason}
            )
        return found

    def others(self) -> list[dict[str, Any]]:
        """The modules that cannot hold quantizers, and why they stay float."""
        inside = {row.name for row in self.cost}
        entries = [entry for entry in self.ledger if entry.name not in inside and not entry.plan]
        return [{"layer": e.name, "kind": e.kind, "parameters": e.parameters, "reason": e.reason} for e in entries]

    def operations(self) -> list[dict[str, Any]]:
        """Operations that no layer owns and that the plan quantizes: all of their operands by one spec."""
        return [
            {"operation": e.name, "kind": e.kind, "input": _stages(e.plan, "input")}
            for e in self.ledger
            if e.functional and e.plan
        ]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values."""
        return {
            "plan": self.plan.to_dict(),
            "layers": self.rows(),
            "operations": self.operations(),
            "float": self.others(),
            "totals": self.cost.totals() | self.ledger.coverages(),
            "schedule": [vars(phase) for phase in self.schedule],
        }

    def table(self) -> Table:
        """Returns the rows as a table for a terminal, with the totals below."""
        rows, totals = self.rows(), self.cost.totals()
        shown = [slot for slot in SLOTS if slot != "output" or any(row["output"] != "float" for row in rows)]
        table = new_table(f"What the plan comes to: {len(rows)} layers", footer=True)
        table.add_column("layer", "all layers", overflow="fold")
        for slot in shown:
            table.add_column(slot, overflow="fold")
        table.add_column("eff. bits", f"{self.cost.quantizable_effective_bits:.2f}", justify="right")
        table.add_column("bytes", f"{sum(row['bytes'] for row in rows):,}", justify="right")
        recorded = totals["bops"] is not None
        if recorded:
            table.add_column("BOPs/sample", short_number(sum(row["bops"] or 0 for row in rows)), justify="right")
        for row in rows:
            bits = "" if row["effective_bits"] is None else f"{row['effective_bits']:.2f}"
            cells = [row["layer"] or row["kind"], *(row[slot] for slot in shown), bits, f"{row['bytes']:,}"]
            # Text, not str: a layer may be named like rich's markup.
            table.add_row(*map(Text, cells + [short_number(row["bops"])] * recorded))
        return table

    def summary(self) -> Text:
        """Returns the totals of the whole model, and the reasons of what stays float."""
        priced = self.cost
        size = f"model: {priced.effective_bits:.2f} effective bits a parameter, {priced.bytes:,} bytes, "
        size += f"{priced.compression:.2f} times smaller than {priced.float_bytes:,}"
        bops = "" if priced.bops is None else f"; {short_number(priced.bops)} BOPs a sample, the float parts included"
        lines = [self.ledger.summary(), size + bops]
        lines += [f"operation {row['operation']} ({row['kind']}): operands {row['input']}" for row in self.operations()]
        reasons: dict[str, list[str]] = {}
        for row in [*self.rows(), *self.others()]:
            if row["reason"]:
                reasons.setdefault(row["reason"], []).append(row["layer"] or row["kind"])
        for reason, names in reasons.items():
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            lines.append(f"float: {reason}: {', '.join(names[:4])}{more}")
        return Text("\n".join(lines))

    def __str__(self) -> str:
        return f"{as_text(self.table())}\n{self.summary().plain}"

    def _repr_html_(self) -> str:
        return f"{as_html(self.table())}<pre>{escape(self.summary().plain)}</pre>"

    def timeline(self) -> Text:
        """Returns the schedule, a line for each moment; epochs and optimizer steps have axes of their own."""
        moments = [change for change in self.schedule if change.count]
        at_once = [change for change in self.schedule if not change.count]
        lines = [f"from the start: {', '.join(dict.fromkeys(change.label for change in at_once)) or 'float'}"]
        for unit in ("epoch", "step"):
            own = [change for change in moments if change.unit == unit]
            last = max((change.count for change in own), default=0)
            for change in own:
                place = round(_WIDTH * 0.8 * change.count / last)
                lines.append(f"{'─' * place}●{'═' * (_WIDTH - place)}▶  {unit} {change.count}: {change.label}")
        return Text("\n".join(lines), no_wrap=True)


def explain(
    plan: QuantPlan | str | Path | Mapping[str, Any], model: nn.Module, run: Callable[[], Any] | None = None
) -> Explanation:
    """Returns the effect of `plan` on `model`, without changing the model.

    Args:
        plan: anything `QuantPlan.parse` reads.
        model: float.
        run: runs the model on a batch, for functional calls and the MACs and BOPs of a sample; a plan that names
            operations needs it.

    Raises:
        PlanError: a plan that cannot be read, or that does not fit the model.

    >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    >>> found = explain("w4 group16 a8", net)
    >>> found.cost.quantizable_effective_bits, [row["input"] for row in found.rows()]
    (6.0, ['uint8 affine ema', 'uint8 affine ema'])
    """
    chosen = QuantPlan.parse(plan)
    survey = Survey.of(model, quantizing(chosen))
    recording = None if run is None else record(model, run)
    for_layers, operation_rules = split(chosen, survey.infos(), survey.aside)
    layers = resolve_layers(for_layers, survey, survey.infos())
    known = inner_operations(model) | ({} if recording is None else operations_of(recording))
    resolved = resolve_operations(operation_rules, known, chosen, recording is not None)
    operations = {name: operation_plan for name, (_, operation_plan) in resolved.items()}
    ledger = ledger_of(model, survey, layers, resolved)
    if recording is not None:
        ledger.add_recording(recording)
    priced = plan_cost(model, layers | operations, recording)
    return Explanation(chosen, layers, priced, ledger, moments(chosen), recording)


def _stages(plan: LayerPlan, slot: str) -> str:
    stages = plan.stages_of(slot)
    if len(stages) == 1:
        return str(stages[0][1] or "float")
    return ", ".join(f"{'from ' + str(start) + ': ' if start else ''}{spec or 'float'}" for start, spec in stages)
