"""What one run really quantized: each layer and functional call, its spec, or why it stayed float."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from lq_plugin.errors import CoverageError
from lq_plugin.formats import SLOTS
from lq_plugin.model.record import Recording
from lq_plugin.plan import LayerPlan


@dataclass
class Entry:
    """One layer or functional call.

    Args:
        name: qualified name; a functional call is named after its module: `layer1.0.add_0`.
        kind: `"Conv2d"`, `"matmul"`, ...
        plan: the specs in force.
        reason: why (a part of) it stays float; None when nothing does.
        parameters: weights it owns.
        macs: multiply-accumulates in the recorded batch; None before a recording.
        calls: how often it ran in the recorded batch; None before a recording.
        functional: a functional call, not a module.
        reached: False where data that should have reached it did not: it stays float then.
    """

    name: str
    kind: str
    plan: LayerPlan = field(default_factory=LayerPlan)
    reason: str | None = None
    parameters: int = 0
    macs: int | None = None
    calls: int | None = None
    functional: bool = False
    reached: bool = True

    @property
    def quantized(self) -> bool:
        """Whether it computes with quantized weights or inputs, and was not seen idle."""
        return bool(self.plan) and self.calls != 0 and self.reached


@dataclass
class Ledger:
    """All entries, in the model's order."""

    entries: list[Entry] = field(default_factory=list)
    #: Of entries that no batch has reached, the reasons beside that.
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
        """Whether a batch has been recorded, so that functional calls and MACs are known."""
        return any(entry.macs is not None for entry in self.entries)

    @property
    def coverage(self) -> float:
        """Quantized share of the model's work, 0..1.

        Of all multiply-accumulates once a batch is recorded (functional matrix products included),
        of all parameters before. A model without either counts as covered.
        """

        def work(entry: Entry) -> int:
            return (entry.macs or 0) if self.recorded else entry.parameters

        total = sum(map(work, self.entries))
        return sum(map(work, self.quantized)) / total if total else 1.0

    def same_layers(self, other: Ledger) -> bool:
        """Whether both name the same layers and quantized operations with the same specs, recorded or not."""
        mine, theirs = ([(e.name, e.plan) for e in ledger if e.plan or not e.functional] for ledger in (self, other))
        return mine == theirs

    def add_recording(self, recording: Recording) -> None:
        """Take in what one batch did: calls, MACs, and the functional calls, which are float unless the plan names them."""
        plans = {entry.name: entry.plan for entry in self.entries if entry.functional and entry.plan}
        kinds = {entry.name: entry.kind for entry in self.entries if entry.functional}
        self.entries = [entry for entry in self.entries if not entry.functional]
        for entry in self.entries:
            entry.macs = recording.macs.get(entry.name, 0)
            entry.calls = len(recording.calls_of(entry.name))
            if entry.calls == 0 and entry.plan:
                entry.reason = "never called in the recorded batch"
        for call in {call.name: call for call in recording.functional_calls}.values():
            plan = plans.pop(call.name, LayerPlan())
            reason = None if plan else f"functional {call.op}: no rule asks for it by name"
            calls = len(recording.calls_of(call.name))
            self.entries.append(Entry(call.name, call.op, plan, reason, macs=recording.macs[call.name], calls=calls, functional=True))
        for name, plan in plans.items():
            reason = "never called in the recorded batch"
            self.entries.append(Entry(name, kinds[name], plan, reason, macs=0, calls=0, functional=True))

    def note_unreached(self, names: Collection[str], reason: str) -> None:
        """Take in which layers and operations are float because no batch has reached them; others that were are so no longer."""
        for entry in self.entries:
            if entry.name in names and entry.reached:
                self._other_reasons[entry.name] = entry.reason
                entry.reached, entry.reason = False, reason
            elif entry.name not in names and not entry.reached:
                entry.reached, entry.reason = True, self._other_reasons.pop(entry.name, None)

    def require(self, min_coverage: float | None) -> None:
        """Raise CoverageError, with the largest float entries, when coverage is below `min_coverage`."""
        if min_coverage is None or self.coverage >= min_coverage:
            return
        largest = sorted(self.left_float, key=lambda e: -((e.macs or 0) if self.recorded else e.parameters))[:10]
        lines = "\n".join(f"  - {entry.name} ({entry.kind}): {entry.reason}" for entry in largest)
        raise CoverageError(f"coverage is {self.coverage:.1%}, min_coverage asks for {min_coverage:.1%}. Largest float parts:\n{lines}")

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
        stream = io.StringIO()
        rows = self.rows()
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]) if rows else ["name"])
        writer.writeheader()
        writer.writerows(rows)
        return stream.getvalue()

    def summary(self) -> str:
        """One line for a log."""
        of = "MACs" if self.recorded else "parameters"
        # A recording finds operations that no layer owns, and the parameters count none of them.
        operations = sum(entry.functional for entry in self.left_float)
        float_ = f"{len(self.left_float)} float" + (f" ({operations} of them operations)" if operations else "")
        return f"{len(self.quantized)} quantized, {float_}; coverage {self.coverage:.1%} of {of}"
