"""Target `mlx`: weights in the layouts of Apple's MLX, and the `config.json` that mlx-lm reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from lq_plugin.export.request import Request
from lq_plugin.export.target import Reader, Target, register_target
from lq_plugin.intent.spec import QuantSpec

#: Formats besides uniform integers that are integers times a scale.
_SMALL = ("sign", "bwn", "twn", "mxint8")


@register_target
class MLX(Target):
    """Files for MLX; see `lq_plugin.export.mlx_file`. Activations stay float: MLX computes products of float inputs."""

    name, suffix, by_suffix = "mlx", ".safetensors", False
    summary = "weights for MLX and mlx-lm: integers of 2 to 8 bits in groups, MXFP4, MXFP8, NVFP4; with a config.json"
    runtimes = ("mlx",)

    takes: ClassVar = {
        "weight": (
            *(f"int{bits} group{size}" for bits in (8, 4, 6, 5, 3, 2) for size in (64, 32, 128)),
            "mxfp4", "nvfp4:unit", "mxfp8",
        ),
    }  # fmt: skip

    def model_faults(self, request: Request) -> list[str]:
        from lq_plugin.export.mlx_file.write import folder_faults, tied_faults

        return super().model_faults(request) + tied_faults(request.model) + folder_faults(request.path)

    def spec_fault(self, slot: str, spec: QuantSpec, layer: Any) -> str | None:
        from lq_plugin.export.mlx_file.words import FLOATS, GROUPS, group_of
        from lq_plugin.quantizers.registry import format_code

        if slot != "weight":
            return "MLX computes products of float inputs: leave them float"
        kind, shape = str(getattr(type(layer), "float_class", type(layer)).__name__), layer.weight.shape
        if kind not in ("Linear", "Embedding"):
            return f"MLX has packed weights of linear layers and embeddings, here is {kind}"
        name, columns = spec.format_name, shape[-1]
        if name == "nvfp4" and "unit" not in spec.format_options:
            return "layers of MLX have no scale above those of the blocks"
        if name in FLOATS:
            # A row has whole words also.
            return None if columns % 32 == 0 else f"rows of {columns} elements are no multiple of 32"
        held = (spec.is_uniform and format_code(spec).onnx is not None) or name in _SMALL
        if not held:
            return f"MLX has integers times a scale, {', '.join(FLOATS)}"
        if spec.bit_width > 8:
            return "MLX has integers of at most 8 bits"
        if group_of(spec, columns) is None:
            return (
                f"rows of {columns} elements under '{spec.granularity}' are no groups of {', '.join(map(str, GROUPS))}"
            )
        return None

    def write(self, request: Request) -> int:
        from lq_plugin.export.mlx_file.write import write_mlx

        assert request.path is not None
        return write_mlx(request.model, request.path)

    def files(self, path: Path) -> list[Path]:
        from lq_plugin.export.mlx_file.write import config_path

        return [path, config_path(path)]

    def open(self, path: Path, runtime: str | None, fresh: Callable[[], Any] | None) -> Reader:
        from lq_plugin.export.mlx_file.read import load_mlx

        model = self.float_model(path, fresh).eval()
        load_mlx(model, path)
        return Reader(model)
