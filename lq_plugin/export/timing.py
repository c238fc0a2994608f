"""Files of single models that one runtime runs, to be timed. Nothing here imports torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from lq_plugin.intent.plan import LayerPlan


class Timing(ABC):
    """Base class of what `lq_plugin.export.latency` asks for files of a runtime, float and quantized ones."""

    #: Ends of the files' names.
    suffix: ClassVar[str]
    #: Bits of the smallest integers that its files hold: weights of fewer bits are as fast.
    smallest: int

    def smallest_of(self, plan: LayerPlan) -> int:
        """Returns the bits of the smallest integers that the weight of a layer may have in its files."""
        return self.smallest

    def shared(self, model: Any, inputs: Sequence[Any]) -> Any:
        """Returns what the files of a model under several plans have in common, which is made once; None: nothing.

        Args:
            model: float.
            inputs: positional arguments of its forward.
        """
        return None

    @abstractmethod
    def write(self, model: Any, inputs: Sequence[Any], path: Path, shared: Callable[[], Any]) -> None:
        """Writes a prepared and calibrated model.

        Args:
            model: with ranges.
            inputs: positional arguments of its forward; the file may take tensors of these shapes only.
            path: of the file.
            shared: returns what `shared` made.

        Raises:
            ExportError: a file cannot hold it.
        """

    @abstractmethod
    def write_float(self, model: Any, inputs: Sequence[Any], path: Path, shared: Callable[[], Any]) -> None:
        """Writes a float model.

        Args:
            model, inputs, path, shared: see `write`.
        """

    @abstractmethod
    def open(self, path: Path, inputs: Sequence[Any], threads: int) -> Callable[[], Any]:
        """Returns a function that runs a file once.

        Args:
            path: of the file.
            inputs: positional arguments of each run.
            threads: of the runtime.
        """
