"""Target `gguf`: language models for llama.cpp, in its own types."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from lq_plugin.export.gguf_file.types import FLOATS, TYPES
from lq_plugin.export.request import Option, Request
from lq_plugin.export.target import Reader, Target, register_target
from lq_plugin.intent.spec import QuantSpec


def _floats_fault(value: Any) -> str | None:
    return None if value in tuple(FLOATS) else f"floats is {', '.join(FLOATS)}, got {value!r}"


def _tokenizer_fault(value: Any) -> str | None:
    if value is None or (isinstance(value, (str, Path)) and (Path(value) / "tokenizer.json").is_file()):
        return None
    return f"tokenizer is a folder with a tokenizer.json, got {value!r}"


@register_target
class GGUF(Target):
    """GGUF files; see `lq_plugin.export.gguf_file`.

    Activations stay float in a plan: llama.cpp rounds them itself, to 8 bits in blocks of 32 or 256, next to each
    product with a quantized weight.
    """

    name, suffix = "gguf", ".gguf"
    summary = "language models for llama.cpp: Q4_0, Q8_0, TQ1_0, TQ2_0, MXFP4, NVFP4, F16; weights on these grids"
    packages, runtimes = ("gguf",), ("gguf", "xllamacpp")
    options = (Option("floats", "f16", _floats_fault), Option("tokenizer", None, _tokenizer_fault))

    takes: ClassVar = {"weight": tuple(TYPES)}

    def model_faults(self, request: Request) -> list[str]:
        from lq_plugin.export.gguf_file.architecture import architecture_faults

        return architecture_faults(request.model) + super().model_faults(request)

    def spec_fault(self, slot: str, spec: QuantSpec, layer: Any) -> str | None:
        if slot != "weight":
            return "llama.cpp rounds activations itself, to 8 bits: leave them float"
        if spec.format_name not in TYPES:
            return f"a GGUF file holds weights as {', '.join(TYPES)}"
        size = TYPES[spec.format_name].elements
        shape, kind = layer.weight.shape, getattr(layer, "float_class", type(layer)).__name__
        if kind not in ("Linear", "Embedding"):
            return f"a GGUF file holds weights of linear layers and embeddings, here is {kind}"
        if shape[-1] % size:
            return f"rows of {shape[-1]} elements are no whole blocks of {size}"
        if spec.format_name == "nvfp4" and "unit" not in spec.format_options and kind == "Embedding":
            return "llama.cpp knows no scale of the whole tensor for embeddings, which nvfp4 has and nvfp4:unit has not"
        return None

    def own_spec(self, slot: str, spec: QuantSpec) -> QuantSpec:
        # Plain symmetric integers, whose words ask for nothing that the types lack.
        own = {f"int{bits} {scales}": f"q{bits}_0" for bits in (4, 8) for scales in ("per_channel", "group32")}
        return QuantSpec.parse(own.get(str(spec), spec)) if slot == "weight" else spec

    def write(self, request: Request) -> int:
        from lq_plugin.export.gguf_file.write import write_gguf

        assert request.path is not None
        settings = self.settings(request)
        return write_gguf(request.model, request.path, settings["floats"], settings["tokenizer"])

    def open(self, path: Path, runtime: str | None, fresh: Callable[[], Any] | None) -> Reader:
        from lq_plugin.export.gguf_file.read import llama_log_probabilities, load_gguf, logits_of

        if runtime == "xllamacpp":

            def outputs(output: Any) -> Any:
                return logits_of(output).log_softmax(-1)

            return Reader(lambda tokens, *_: llama_log_probabilities(path, tokens), 1, outputs)
        model = self.float_model(path, fresh).eval()
        load_gguf(model, path)
        return Reader(lambda *args: logits_of(model(*args)), None, logits_of)
