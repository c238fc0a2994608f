"""Layers whose weight is computed, by `torch.nn.utils.parametrize` (weight_norm, spectral_norm, ...) or by a hook.

To parametrize a layer, torch derives a class for it alone, `ParametrizedLinear(nn.Linear)`, whose `weight` is a
property. The quantized class is what torch would have made of the quantized layer: derived from `QuantizedLinear`, with
the same property. So the weight is computed once in each forward pass and then quantized, gradients reach what it is
computed from, and torch's `remove_parametrizations` works on the float and on the quantized layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

#: What torch puts into a parametrized layer's class, next to one property for each parametrized tensor.
_TORCH_METHODS = ("__getstate__", "__deepcopy__")
#: Why nothing can be written into a weight.
COMPUTED = (
    "its weight is computed (weight_norm, pruning, ...) and cannot be written; "
    "torch.nn.utils.parametrize.remove_parametrizations, or what undoes the hook, makes it a plain one"
)


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a layer, float or quantized, as its next forward pass begins with; looking leaves no trace.

    A plain `module.weight` computes a parametrized weight as the forward pass does: in training, spectral_norm takes
    another step of its power iteration then, and inside `torch.nn.utils.parametrize.cached()` the value stays.
    """
    if not is_parametrized(module, "weight"):
        return cast(Tensor, module.weight)
    computation = cast(Any, module).parametrizations["weight"]
    modes = [(part, part.training) for part in computation.modules()]
    computation.eval()
    try:
        y: Tensor = computation()
        return y
    finally:
        for part, training in modes:
            part.training = training


def weight_is_computed(module: nn.Module) -> bool:
    """Returns whether a layer's weight is computed from other tensors, so that nothing can be written into it."""
    by_hook = "weight" in module.__dict__ and "weight" not in module._parameters
    return by_hook or is_parametrized(module, "weight")


def computed_faults(layers: Iterable[tuple[str, Any]]) -> list[str]:
    """Names and reasons of the layers whose weight cannot be written, of `(name, layer)`."""
    return [f"{name}: {COMPUTED}" for name, layer in layers if weight_is_computed(layer)]


def weight_sources(module: nn.Module) -> list[Tensor]:
    """The parameters that a layer's weight is, or is computed from."""
    if is_parametrized(module, "weight"):
        return list(cast(Any, module).parametrizations["weight"].parameters())
    if weight_is_computed(module):
        return [p for name, p in module._parameters.items() if name.startswith("weight_") and p is not None]
    return [cast(Tensor, module.weight)]


def weight_parts(module: nn.Module) -> list[Tensor]:
    """Returns `weight_sources` and the buffers that are used with them."""
    if is_parametrized(module, "weight"):
        return [*weight_sources(module), *cast(Any, module).parametrizations["weight"].buffers()]
    buffers = module._buffers.items() if weight_is_computed(module) else ()
    return [*weight_sources(module), *(b for name, b in buffers if name.startswith("weight_") and b is not None)]


def parametrized_names(module: nn.Module) -> list[str]:
    """Returns the names of a module's parametrized tensors; none where its class is not the one torch made for them."""
    names = list(cast(nn.ModuleDict, module.parametrizations)) if is_parametrized(module) else []
    return names if all(isinstance(type(module).__dict__.get(name), property) for name in names) else []


def parametrized_class(base: type[nn.Module], module: nn.Module, **content: Any) -> type[nn.Module]:
    """A class like that of `module`, which is parametrized, but derived from `base`."""
    kind = type(module)
    copied = {
        name: kind.__dict__[name] for name in (*parametrized_names(module), *_TORCH_METHODS) if name in kind.__dict__
    }
    return type(f"Parametrized{base.__name__}", (base,), copied | content | {"__module__": __name__})


def shadowable(computed: property) -> property:
    """Returns a weight's property that gives way to the instance's `__dict__`, as a plain parameter does."""

    def weight(self: nn.Module) -> Tensor:
        standing_in = self.__dict__.get("weight")
        y: Tensor = cast(Any, computed.fget)(self) if standing_in is None else standing_in
        return y

    return property(weight, computed.fset)


def class_before(module: nn.Module) -> type[nn.Module]:
    """The type of a module before torch parametrized it."""
    kind = type(module)
    return cast("type[nn.Module]", kind.__bases__[0]) if parametrized_names(module) else kind
