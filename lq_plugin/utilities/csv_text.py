"""Tables as CSV text in which a spreadsheet finds text and numbers, but no formulas."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

#: Where a text starts with one of these, a spreadsheet reads it as a formula, unless an apostrophe stands before it.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def to_csv(rows: Iterable[Mapping[str, Any]], columns: Sequence[str], lineterminator: str = "\r\n") -> str:
    """Returns rows as CSV text with a header; cells without a value are empty.

    Args:
        rows: mappings of columns to values.
        columns: in this order.
        lineterminator: after each row.

    >>> print(to_csv([{"layer": "=1+1", "sqnr": -3.5}, {"layer": "conv"}], ["layer", "sqnr"], "\\n"), end="")
    layer,sqnr
    '=1+1,-3.5
    conv,
    """
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator=lineterminator)
    writer.writerow(map(_cell, columns))
    writer.writerows([_cell(row.get(column, "")) for column in columns] for row in rows)
    return stream.getvalue()


def _cell(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and len(value) > 1 and value.startswith(_FORMULA) else value
