"""A quantized model in a few lines of a terminal: the specs of each layer, and what was lost."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence

from rich.text import Text

from lq_plugin.model.ledger import Ledger
from lq_plugin.model.measure.cost import Cost
from lq_plugin.model.measure.fidelity import FidelityRow
from lq_plugin.utilities.shown import as_text, new_table, short_number

#: Rows of a table; of more layers, the largest are shown.
MAX_ROWS = 24


def summary(
    priced: Cost,
    rows: Sequence[FidelityRow],
    ledger: Ledger,
    title: str,
    metrics: Mapping[str, float] | None = None,
    width: int | None = None,
) -> str:
    """Returns table and totals as plain text.

    Args:
        priced: cost of the model as it is.
        rows: of its tensors.
        ledger: what is quantized.
        title: above the table.
        metrics: what the model scores.
        width: characters of a line; the terminal's, or 100.

    >>> import torch, lq_plugin
    >>> from lq_plugin.model.measure.cost import cost
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 4))
    >>> ledger = lq_plugin.prepare(net, "w4a8")
    >>> print(summary(cost(net), [], ledger, "before", width=80).splitlines()[0].strip())
    before
    """
    specs = {(row.layer, row.slot): row.spec for row in rows}
    errors = {(row.layer, row.slot): row.sqnr_db for row in rows if row.sqnr_db is not None}
    chosen = {row.name for row in sorted(priced, key=lambda row: -row.elements)[:MAX_ROWS]}
    table = new_table(title, footer=True)
    table.add_column("layer", "whole model", overflow="fold")
    table.add_column("weight", overflow="fold")
    table.add_column("input", overflow="fold")
    table.add_column("bits", f"{priced.effective_bits:.2f}", justify="right")
    table.add_column("bytes", f"{priced.bytes:,}", justify="right")
    if priced.bops is not None:
        table.add_column("BOPs/sample", short_number(priced.bops), justify="right")
    for slot in ("weight", "input") * bool(errors):
        table.add_column(f"SQNR {slot}", justify="right")
    for row in priced:
        if row.name not in chosen:
            continue
        bits = f"of {row.tied_to}" if row.effective_bits is None else f"{row.effective_bits:.2f}"
        cells = [
            row.name or row.kind,
            *(specs.get((row.name, slot), "float") for slot in ("weight", "input")),
            bits,
            f"{row.bytes:,}",
        ]
        cells += [short_number(row.bops)] * (priced.bops is not None)
        cells += [_decibel(errors.get((row.name, slot))) for slot in ("weight", "input") * bool(errors)]
        # Text, not str: a layer may be named like rich's markup.
        table.add_row(*map(Text, cells))
    lines = [f"{len(priced) - len(chosen)} smaller layers are not shown"] * (len(priced) > len(chosen))
    lines.append(f"{ledger.summary()}; {priced.compression:.1f} times smaller than float")
    if metrics:
        lines.append(", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
    return "\n".join([as_text(table, width or shutil.get_terminal_size((100, 24)).columns), *lines])


def _decibel(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} dB"
