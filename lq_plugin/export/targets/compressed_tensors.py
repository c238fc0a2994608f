"""Target `compressed-tensors`: a folder that transformers and vLLM load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from lq_plugin.export.request import Option, Request
from lq_plugin.export.target import Reader, Target, nearest_spec, register_target
from lq_plugin.intent.ranges import range_kind
from lq_plugin.intent.spec import QuantSpec


def _adapters_fault(value: Any) -> str | None:
    return None if value in ("merged", "beside") else f"adapters is 'merged' or 'beside', got {value!r}"


@register_target
class CompressedTensors(Target):
    """Folders of compressed-tensors; see `lq_plugin.export.compressed_tensors`.

    The model is a transformers model, or a module that holds one. A module's other parts are not in the folder. vLLM
    runs q, k and v, and gate and up, as one layer each: give them one spec.
    """

    name, suffix, by_suffix, writes_folder = "compressed-tensors", "", False, True
    summary = "a transformers model for transformers and vLLM: INT4, INT8, W8A8, FP8, NVFP4, MXFP4, or several"
    packages = ("compressed_tensors", "transformers")

    options = (Option("adapters", "merged", _adapters_fault),)
    takes: ClassVar = {
        "weight": ("int4 group32", "int8 per_channel", "int4 per_channel", "fp8 per_channel", "nvfp4", "mxfp4"),
        "input": ("int8", "uint8 affine", "int8 per_token narrow dynamic", "fp8", "fp8 per_token dynamic"),
    }
    takes_dynamic = True

    def model_faults(self, request: Request) -> list[str]:
        from lq_plugin.export.compressed_tensors.source import decompression_faults, source_faults

        faults = source_faults(request.model, self.settings(request)["adapters"]) + super().model_faults(request)
        return faults or decompression_faults(request.model)

    def spec_fault(self, slot: str, spec: QuantSpec, layer: Any) -> str | None:
        from lq_plugin.export.compressed_tensors.experts import is_stack, stack_fault
        from lq_plugin.export.compressed_tensors.schemes import input_fault, weight_fault

        if slot == "weight" and is_stack(layer):
            return stack_fault(spec, layer)
        if slot == "weight":
            return weight_fault(spec, layer)
        return input_fault(spec, layer) if slot == "input" else "outputs stay float, the next layer's input is held"

    def nearest(self, slot: str, spec: QuantSpec, layer: Any) -> QuantSpec | None:
        # Of equally near ones the first: another one of the same format, where there is one.
        known = sorted(self.takes.get(slot, ()), key=lambda text: QuantSpec.parse(text).format_name != spec.format_name)
        return nearest_spec(known, spec, lambda other: self.refusal(slot, other, layer))

    def own_spec(self, slot: str, spec: QuantSpec) -> QuantSpec:
        # vLLM has not tested zero points of inputs. PACT clips at 0, where it has no use for half of the signed levels.
        if slot != "input" or not spec.is_uniform or range_kind(spec.range_name).non_negative:
            return spec
        # What vLLM finds at run time is max|x| / 127 of a token.
        return spec.replace(signed=True, affine=False, narrow_range=spec.dynamic)

    def write(self, request: Request) -> int:
        from lq_plugin.export.compressed_tensors.adapters import taken_apart
        from lq_plugin.export.compressed_tensors.folder import write_folder
        from lq_plugin.export.compressed_tensors.source import source_of

        assert request.path is not None
        if self.settings(request)["adapters"] == "beside":
            base, adapted = taken_apart(request.model)
            return write_folder(base, request.path, adapted)
        return write_folder(source_of(request.model)[1], request.path)

    def open(self, path: Path, runtime: str | None, fresh: Callable[[], Any] | None) -> Reader:
        from lq_plugin.export.compressed_tensors.folder import open_folder
        from lq_plugin.export.compressed_tensors.source import put_source

        loaded = open_folder(path)
        return Reader(loaded if fresh is None else put_source(fresh(), loaded))
