"""Files of integer programs that their runtimes are timed with. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lq_plugin.export.timing import Timing


class ProgramTiming(Timing):
    """Files of a target of integer programs: weights of fewer than 8 bits are bytes, unless `smallest_of` says less.

    Args:
        target: its name.
    """

    smallest = 8

    def __init__(self, target: str) -> None:
        self.target = target

    def write(self, model: Any, inputs: Sequence[Any], path: Path, shared: Callable[[], Any]) -> None:
        from lq_plugin.export.quiet import quiet
        from lq_plugin.export.target import export_model

        # Results that the plan leaves float are rounded as well, as a log says: any range is as fast as another.
        with quiet("lq_plugin.export.integer_program"):
            export_model(model, path, inputs, [tuple(inputs)], self.target, batch=0)
