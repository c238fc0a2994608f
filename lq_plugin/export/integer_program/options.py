"""Options of integer programs, and the specs that they hold. Nothing here imports torch."""

from __future__ import annotations

from typing import Any

from lq_plugin.errors import is_integer
from lq_plugin.export.request import Option


def _batch_fault(batch: Any) -> str | None:
    if is_integer(batch, 0):
        return None
    return f"batch is the number of samples that a file takes at a time, or 0 for the example's, got {batch!r}"


#: Samples that a file takes at a time.
BATCH = Option("batch", 1, _batch_fault)

#: Specs of each tensor, the usual one first.
TAKES = {
    "weight": ("int8 per_channel narrow", "int4 per_channel", "int3 per_channel", "int2 per_channel"),
    "input": ("uint8 affine", "int8"),
    "output": ("uint8 affine", "int8"),
}
