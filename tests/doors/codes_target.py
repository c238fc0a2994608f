"""An export target as a project of its own adds it: integer codes and scales of linear layers, for numpy."""

from typing import ClassVar

import numpy as np
import torch

from lq_plugin.errors import ExportError
from lq_plugin.export import Option, Reader, Target, register_target
from lq_plugin.export.codes import encode
from lq_plugin.model import quantized_layers


def dtype_fault(dtype):
    return None if dtype in ("float32", "float64") else f"scale_dtype is float32 or float64, got {dtype!r}"


@register_target
class NPZ(Target):
    """Weights alone: float activations, a scale for each output channel."""

    name, suffix = "npz", ".npz"
    summary = "integer codes and scales of linear layers, for numpy"
    packages = ("numpy",)
    options = (Option("scale_dtype", "float32", dtype_fault),)

    takes: ClassVar = {"weight": ("int8 per_channel", "int4 per_channel")}

    def spec_fault(self, slot, spec, layer):
        if slot != "weight":
            return "an archive holds weights alone"
        fits = spec.format_name == "int" and not spec.grid.affine and layer.weight.ndim == 2
        return None if fits else "an archive holds symmetric integers of linear layers"

    def write(self, request):
        layers = quantized_layers(request.model)
        others = {f"{name}.weight" for name, _ in layers}
        state = request.model.state_dict()
        arrays = {k: v.numpy() for k, v in state.items() if k not in others and "_quantizer." not in k}
        for name, layer in layers:
            parts = encode(layer.weight_quantizer, layer.weight)
            arrays[f"{name}.q"] = (parts["codes"].values + layer.weight_quantizer.spec.grid.quant_min).numpy()
            arrays[f"{name}.scale"] = parts["scale"].values.numpy().astype(self.settings(request)["scale_dtype"])
        np.savez(request.path, **arrays)
        return request.path.stat().st_size

    def open(self, path, runtime, fresh):
        if fresh is None:
            raise ExportError(f"{path} has no graph: give verify(..., fresh=...)")
        model, arrays = fresh().eval(), dict(np.load(path))
        for name in [key.removesuffix(".q") for key in arrays if key.endswith(".q")]:
            arrays[f"{name}.weight"] = arrays.pop(f"{name}.q") * arrays.pop(f"{name}.scale").astype("float32")
        model.load_state_dict({key: torch.from_numpy(value) for key, value in arrays.items()})
        return Reader(model)
