"""The ledger of a run: each layer and functional call with its spec, or the reason why it stayed float."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table
from rich.text import Text

from lq_plugin.errors import CoverageError, PlanError, name_faults, raise_all
from lq_plugin.intent.formats import SLOTS
from lq_plugin.intent.plan import LayerPlan
from lq_plugin.model.graph.record import Recording
from lq_plugin.utilities.csv_text import to_csv
from lq_plugin.utilities.shown import Shown, new_table


@dataclass
class Entry:
    """One layer or functional call.

    Args:
        name: qualified name; a functional call is named after its module: `layer1.0.add_0`.
        kind: `"Conv2d"`, `"matmul"`, ...
        plan: the specs in force.
        reason: why (a part of) it stays float; None when nothing does.
        parameters: all numbers that it owns.
        weights: those of its parameters that have two dims or more, which are multiplied; biases and factors of norms
            have one.
        macs: multiply-accumulates for one input sample; None before a recording.
        calls: how often it ran in the recorded batch; None before a recording.
        functional: a functional call, not a module.
        reached: False where data that should have reached it did not: it stays float then.
        all_quantized: whether its plan leaves no operand of its products float.
        read_past: its weight is read by something else than the layer, which never ran, and so in float.
    """

    name: str
    kind: str
    plan: LayerPlan = field(default_factory=LayerPlan)
    reason: str | None = None
    parameters: int = 0
    weights: int = 0
    macs: int | None = None
    calls: int | None = None
    functional: bool = False
    reached: bool = True
    all_quantized: bool = False
    read_past: bool = False

    @property
    def quantized(self) -> bool:
        """True if it computes with quantized weights or inputs wherever it is called.

        No recorded batch may have called it.
        """
        return bool(self.plan) and self.reached and not self.read_past and not (self.functional and self.calls == 0)


@dataclass
class Ledger(Shown):
    """All entries, in the model's order; prints as a table."""

    entries: list[Entry] = field(default_factory=list)
    #: Of entries that no batch has reached, the other reasons.
    _other_reasons: dict[str, str | None] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, name: str) -> Entry:
        for entry in self.entries:
            if entry.name == name:
                return entry
        raise KeyError(name)

    @property
    def quantized(self) -> list[Entry]:
        """Entries that compute quantized."""
        return [entry for entry in self.entries if entry.quantized]

    @property
    def left_float(self) -> list[Entry]:
        """Entries that stay float, each with its reason."""
        return [entry for entry in self.entries if not entry.quantized]

    @property
    def recorded(self) -> bool:
        """True once a batch has been recorded, so that functional calls and MACs are known."""
        return any(entry.macs is not None for entry in self.entries)

    @property
    def weight_coverage(self) -> float:
        """Share of the model's weights that are quantized, 0..1; 1 without any.

        Weights are the parameters of two dims or more: those of layers, embedding tables, experts.
        """
        return _share((entry.weights, entry.quantized and entry.plan.weight is not None) for entry in self.entries)

    @property
    def compute_coverage(self) -> float | None:
        """Share of the recorded MACs whose operands are all quantized, 0..1.

        1 where there are no MACs, None before a recording.

        A product of a quantized weight and a float input does not count; nor do functional products that no rule asks
        for.
        """
        return (
            _share((entry.macs or 0, entry.quantized and entry.all_quantized) for entry in self.entries)
            if self.recorded
            else None
        )

    def coverages(self) -> dict[str, float | None]:
        """Both shares by name."""
        return {"weight_coverage": self.weight_coverage, "compute_coverage": self.compute_coverage}

    def same_layers(self, other: Ledger) -> bool:
        """Returns whether both name the same layers and quantized operations with the same specs, recorded or not."""
        mine, theirs = ([(e.name, e.plan) for e in ledger if e.plan or not e.functional] for ledger in (self, other))
        return mine == theirs

    def add_recording(self, recording: Recording) -> None:
        """Takes in one batch: calls, MACs, and functional calls, which are float unless the plan names them."""
        plans = {entry.name: entry.plan for entry in self.entries if entry.functional and entry.plan}
        kinds = {entry.name: entry.kind for entry in self.entries if entry.functional}
        self.entries = [entry for entry in self.entries if not entry.functional]
        for entry in self.entries:
            entry.macs = recording.sample_macs.get(entry.name, 0)
            entry.calls = len(recording.calls_of(entry.name))
            if entry.calls == 0 and entry.plan:
                reader = recording.reader_of(entry.name)
                entry.read_past = reader is not None
                entry.reason = "never called in the recorded batch" + (
                    f": {reader} reads its weight, in float" if reader else ""
                )
        named = {call.name: (call.op, call) for call in recording.functional_calls}
        named |= {name: found for name, found in recording.unary_calls.items() if name in plans}
        kernels = {name: found for name, found in recording.attention_calls.items() if name in plans}
        named |= kernels
        quantizable = {call.name for part, call in kernels.values() if part == "probabilities"}
        for name, (op, call) in named.items():
            plan = plans.pop(name, LayerPlan())
            reason = None if plan else _unasked(op, call.macs > 0 and len(call.operands) > 1)
            complete = call.fully_quantizable or name in quantizable
            macs = recording.sample_macs.get(name, 0)
            if plan and macs and not complete:
                reason = f"functional {op}: a parameter, or what it computes inside, stays float"
            calls = len(recording.calls_of(call.name))
            whole = bool(plan) and complete
            self.entries.append(
                Entry(name, op, plan, reason, macs=macs, calls=calls, functional=True, all_quantized=whole)
            )
        # What an LSTM or an attention computes inside is called as often as the module, and has a share of its MACs.
        known = {entry.name for entry in self.entries}
        shares = [name for call in recording.module_calls for name in call.weight_names if name not in known]
        for name in dict.fromkeys((*plans, *shares)):
            owner, _, label = name.rpartition(".")
            calls = sum(call.kind == "module" for call in recording.calls_of(owner))
            kind, plan = kinds.get(name) or label.rpartition("_")[0], plans.get(name, LayerPlan())
            reason = None if calls else "never called in the recorded batch"
            if not plan:
                reason = _unasked(kind, kind == "matmul")
            macs = recording.sample_macs.get(name, 0)
            self.entries.append(
                Entry(name, kind, plan, reason, macs=macs, calls=calls, functional=True, all_quantized=bool(plan))
            )

    def note_unreached(self, names: Collection[str], reason: str) -> None:
        """Marks the layers and operations that are float because no batch has reached them, and unmarks all others."""
        for entry in self.entries:
            if entry.name in names and entry.reached:
                self._other_reasons[entry.name] = entry.reason
                entry.reached, entry.reason = False, reason
            elif entry.name not in names and not entry.reached:
                entry.reached, entry.reason = True, self._other_reasons.pop(entry.name, None)

    def require(self, min_coverage: float | Mapping[str, float] | None) -> None:
        """Refuses a model of which too little is quantized; a limit on compute needs a recording.

        Args:
            min_coverage: see `least_coverage`.

        Raises:
            CoverageError: naming each share that is below its limit, with the largest float parts.
        """
        faults = []
        for what, least in least_coverage(min_coverage).items():
            weights = what == "weights"
            share = self.weight_coverage if weights else self.compute_coverage
            if share is None:
                faults.append(
                    f"{what} coverage is not known before a batch is recorded, min_coverage asks for {least:.1%}"
                )
            elif share < least:
                float_parts = [
                    entry for entry in self.entries
                    if not (entry.quantized and (entry.plan.weight is not None if weights else entry.all_quantized))
                ]  # fmt: skip
                size = (lambda entry: entry.weights) if weights else (lambda entry: entry.macs or 0)
                largest = sorted((entry for entry in float_parts if size(entry)), key=size, reverse=True)[:10]
                lines = "\n".join(f"  - {entry.name} ({entry.kind}): {entry.reason}" for entry in largest)
                faults.append(
                    f"{what} coverage is {share:.1%}, min_coverage asks for {least:.1%}. Largest float parts:\n{lines}"
                )
        if faults and not isinstance(min_coverage, Mapping):
            faults.append(
                'a number sets both shares; for one of them write min_coverage={"weights": 0.9} or {"compute": 0.9}'
            )
        if faults:
            raise CoverageError("\n".join(faults))

    def rows(self) -> list[dict[str, Any]]:
        """Plain rows for tables, CSV and loggers."""
        return [
            {"name": entry.name, "kind": entry.kind}
            | {slot: str(getattr(entry.plan, slot) or "float") for slot in SLOTS}
            | {"parameters": entry.parameters, "macs": entry.macs, "calls": entry.calls, "reason": entry.reason}
            for entry in self.entries
        ]

    def to_csv(self) -> str:
        """The rows as CSV text with a header."""
        rows = self.rows()
        return to_csv(rows, list(rows[0]) if rows else ["name"])

    def table(self) -> Table:
        """Returns the rows as a table, the summary above them; slots and numbers that no entry has are left out."""
        rows = self.rows()
        slots = [slot for slot in SLOTS if any(row[slot] != "float" for row in rows)]
        numbers = ["parameters", *["macs"] * self.recorded]
        table = new_table(self.summary())
        for column in ("name", "kind", *slots):
            table.add_column(column, overflow="fold")
        for column in numbers:
            table.add_column({"macs": "MACs/sample"}.get(column, column), justify="right")
        table.add_column("why it, or a part of it, is float", overflow="fold")
        for row in rows:
            cells = [row["name"] or row["kind"], row["kind"], *(row[slot] for slot in slots)]
            table.add_row(*map(Text, [*cells, *(f"{row[n] or 0:,}" for n in numbers), row["reason"] or ""]))
        return table

    def summary(self) -> str:
        """One line for a log."""
        # A recording finds operations that no layer owns, and the parameters count none of them.
        operations = sum(entry.functional for entry in self.left_float)
        float_ = f"{len(self.left_float)} float" + (f" ({operations} of them operations)" if operations else "")
        compute = "" if self.compute_coverage is None else f", {self.compute_coverage:.1%} of MACs"
        return f"{len(self.quantized)} quantized, {float_}; coverage {self.weight_coverage:.1%} of weights{compute}"


#: What `min_coverage` can limit.
COVERAGES = ("weights", "compute")


def least_coverage(min_coverage: float | Mapping[str, float] | None) -> dict[str, float]:
    """The least shares that `min_coverage` sets, by `COVERAGES`.

    Args:
        min_coverage: shares in 0..1, `{"weights": 0.9, "compute": 0.5}` or one of the two; a number is both.

    Raises:
        PlanError: anything else.

    >>> least_coverage(0.9), least_coverage({"weights": 1}), least_coverage(None)
    ({'weights': 0.9, 'compute': 0.9}, {'weights': 1}, {})
    """
    if min_coverage is None:
        return {}
    least = dict(min_coverage) if isinstance(min_coverage, Mapping) else dict.fromkeys(COVERAGES, min_coverage)
    faults = name_faults("share", least, COVERAGES)
    faults += [
        f"{key} is a share in 0..1, got {value!r}" for key, value in least.items()
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1
    ]  # fmt: skip
    raise_all(PlanError, "min_coverage", faults)
    return least


def _unasked(op: str, is_product: bool) -> str:
    """Returns why an operation is float for which a plan has no rule."""
    remedy = "; 'w8a8 products', or a rule of type:product, asks for all of them" if is_product else ""
    return f"functional {op}: no rule asks for it by name{remedy}"


def _share(parts: Iterable[tuple[int, bool]]) -> float:
    known = list(parts)
    total = sum(size for size, _ in known)
    return sum(size for size, counts in known if counts) / total if total else 1.0
