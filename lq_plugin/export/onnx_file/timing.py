"""ONNX files of single models that a runtime is timed with. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lq_plugin.export.timing import Timing


class ONNXTiming(Timing):
    """ONNX files whose float graph, which takes seconds to make, is the same under all specs.

    Args:
        session: opens `(path, fastest, threads)`; called like an `onnxruntime.InferenceSession`.
        smallest: bits of the smallest integers that the runtime reads.
    """

    suffix = ".onnx"

    def __init__(self, session: Callable[[Path, bool, int | None], Any], smallest: int) -> None:
        self.session, self.smallest = session, smallest

    def shared(self, model: Any, inputs: Sequence[Any]) -> Any:
        from lq_plugin.export.onnx_file.float_model import float_copy, float_graph

        return float_graph(float_copy(model), tuple(inputs))

    def write(self, model: Any, inputs: Sequence[Any], path: Path, shared: Callable[[], Any]) -> None:
        from lq_plugin.export.onnx_file.write import export_onnx

        export_onnx(model, inputs, path, dynamic_batch=False, smallest=self.smallest, exported=shared())

    def write_float(self, model: Any, inputs: Sequence[Any], path: Path, shared: Callable[[], Any]) -> None:
        import onnx

        onnx.save(shared(), path)

    def open(self, path: Path, inputs: Sequence[Any], threads: int) -> Callable[[], Any]:
        session = self.session(path, True, threads)
        feed = {value.name: x.numpy() for value, x in zip(session.get_inputs(), inputs, strict=True)}
        return lambda: session.run(None, feed)
