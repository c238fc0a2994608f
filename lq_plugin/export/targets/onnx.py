"""Target `onnx`: one file in the QDQ form, for ONNX Runtime and OpenVINO."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from lq_plugin.export.onnx_file.form import Form
from lq_plugin.export.onnx_file.options import OPTIONS, PACKAGES, TAKES
from lq_plugin.export.onnx_file.timing import ONNXTiming
from lq_plugin.export.request import Request
from lq_plugin.export.target import Products, Reader, Target, register_target
from lq_plugin.intent.spec import QuantSpec


class Runtime(NamedTuple):
    """Runtime of ONNX files.

    Args:
        session: opens `(path, fastest, threads)`; called like an `onnxruntime.InferenceSession`. The fastest one may
            round activations that the file leaves float.
        smallest: bits of the smallest integers that it reads.
    """

    session: Callable[[Path, bool, int | None], Any]
    smallest: int


def _onnxruntime(path: Path, fastest: bool, threads: int | None) -> Any:
    from lq_plugin.export.runtime import onnx_session

    # Level 4 is ONNX Runtime's own choice.
    return onnx_session(path, 4 if fastest else 1, threads)


def _openvino(path: Path, fastest: bool, threads: int | None) -> Any:
    from lq_plugin.export.openvino import OpenVINOSession

    return OpenVINOSession(path, threads)


RUNTIMES = {"onnxruntime": Runtime(_onnxruntime, 2), "openvino": Runtime(_openvino, 4)}


@register_target
class ONNX(Target):
    """ONNX files; see `lq_plugin.export.onnx_file.write`."""

    name, suffix = "onnx", ".onnx"
    summary = "standard QDQ graph with INT2 to INT16, FP8 and FP4, for ONNX Runtime and OpenVINO"
    packages, runtimes = PACKAGES, tuple(RUNTIMES)
    timings: ClassVar = {runtime: ONNXTiming(*parts) for runtime, parts in RUNTIMES.items()}
    options, takes = OPTIONS, TAKES
    takes_dynamic = True  # those that DynamicQuantizeLinear computes
    needs_inputs = integer_biases = True

    def form(self, settings: Mapping[str, Any]) -> Form:
        """Returns the choices that these values of the options make."""
        return Form(smallest=settings["smallest"], fp4=settings["fp4"], signed=settings["signed"])

    def model_faults(self, request: Request) -> list[str]:
        from lq_plugin.export.onnx_file.faults import onnx_faults

        return onnx_faults(request, form=self.form(self.settings(request)))

    def spec_fault(self, slot: str, spec: QuantSpec, layer: Any) -> str | None:
        from lq_plugin.export.onnx_file.faults import spec_fault

        return spec_fault(self.form(self.settings(Request())), slot, spec, layer)

    def needs_batches(self, options: Mapping[str, Any]) -> bool:
        return bool(options.get("round_sums"))

    def write(self, request: Request) -> int:
        assert request.path is not None
        return self.write_graph(request, request.path)

    def write_graph(self, request: Request, path: Path) -> int:
        """Writes the request's model as an ONNX file."""
        from lq_plugin.export.onnx_file.write import export_onnx

        settings = self.settings(request)
        assert request.inputs is not None
        return export_onnx(
            request.model, request.inputs, path,
            sums_from=request.batches if self.needs_batches(settings) else None,
            dynamic_dims=list(settings["dynamic_dims"]), form=self.form(settings),
        )  # fmt: skip

    def layer_inputs(self, path: Path, runtime: str | None) -> Callable[..., Mapping[str, Any]] | None:
        if runtime == "openvino":
            return None
        import onnx
        import torch
        from torch.utils._pytree import tree_leaves

        from lq_plugin.export.onnx_file.probe import layer_activations, with_activations
        from lq_plugin.export.runtime import onnx_session

        model = onnx.load(path)
        activations = layer_activations(model)
        session = onnx_session(with_activations(activations, model))
        names = [value.name for value in session.get_inputs()]
        wanted = list(dict.fromkeys(name for activation in activations.values() for name in activation.tensors))

        def run(*args: Any) -> dict[str, torch.Tensor]:
            feed = {name: x.detach().cpu().numpy() for name, x in zip(names, tree_leaves(args), strict=True)}
            found = dict(zip(wanted, session.run(wanted, feed), strict=True))
            return {name: torch.from_numpy(some.dequantize(found)) for name, some in activations.items()}

        return run if wanted else None

    def products(self, path: Path, runtime: str | None) -> Products | None:
        from lq_plugin.export.onnx_file.probe import onnxruntime_products, openvino_products

        if runtime == "openvino":
            return openvino_products(RUNTIMES[runtime].session(path, False, None).compiled)
        return onnxruntime_products(path)

    def open(self, path: Path, runtime: str | None, fresh: Callable[[], Any] | None) -> Reader:
        import torch
        from torch.utils._pytree import tree_leaves

        session = RUNTIMES[runtime or self.runtimes[0]].session(path, False, None)
        names = [value.name for value in session.get_inputs()]

        def run(*args: Any) -> list[torch.Tensor]:
            feed = {name: x.detach().cpu().numpy() for name, x in zip(names, tree_leaves(args), strict=True)}
            return [torch.from_numpy(value) for value in session.run(None, feed)]

        return Reader(run, len(names))
