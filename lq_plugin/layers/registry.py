"""Registry of quantized layers: the quantized class of each float class.

A quantized class inherits its float class, so that `isinstance`, parameters, hooks and the key `weight`
stay; swapping `module.__class__` in place turns one into the other, and back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from lq_plugin.intent.formats import SLOTS
from lq_plugin.layers.base import Operation, QuantizedLayer, ShadowedForward
from lq_plugin.layers.parametrized import (
    class_before,
    parametrized_class,
    parametrized_names,
    shadowable,
    weight_of,
    weight_sources,
)
from lq_plugin.layers.swapped_class import swapped_class
from lq_plugin.quantizers import StagedQuantizer

_REGISTRY: dict[type[nn.Module], type[QuantizedLayer]] = {}
_BY_NAME: dict[str, type[QuantizedLayer]] = {}
_SHADOWED: dict[type[nn.Module], type[nn.Module]] = {}

L = TypeVar("L", bound=type[QuantizedLayer])


def register_layer(float_type: type[nn.Module]) -> Callable[[L], L]:
    """Class decorator: the class quantizes layers of exactly `float_type`.

    It inherits `QuantizedLayer` and `float_type`, in this order. From then on plans, calibration, training, search,
    files and reports take such layers. What its `operation` is says which PTQ passes can work on them.

    Args:
        float_type: the class of the float layers.

    >>> class Scores(nn.Linear):
    ...     def forward(self, x):
    ...         return super().forward(x).softmax(-1)
    >>> @register_layer(Scores)
    ... class QuantizedScores(QuantizedLayer, Scores):
    ...     float_class = Scores
    ...     def channels(self):
    ...         return self.in_features, self.out_features
    ...     def forward(self, x):
    ...         y = nn.functional.linear(self.quantized_input(x), self.quantized_weight(), self.bias)
    ...         return self.quantized_output(y.softmax(-1))
    """

    def decorate(quantized: L) -> L:
        _REGISTRY[float_type] = quantized
        return quantized

    return decorate


def register_layer_name(type_name: str) -> Callable[[L], L]:
    """Class decorator: `register_layer` for a class of a library that need not be installed.

    The decorated class inherits `QuantizedLayer` only; it is combined with the float class when one is met.

    Args:
        type_name: the module and name of the class: `"transformers.pytorch_utils.Conv1D"`.
    """

    def decorate(quantized: L) -> L:
        _BY_NAME[type_name] = quantized
        return quantized

    return decorate


def quantized_class(module: nn.Module) -> type[nn.Module] | None:
    """The class to swap `module` to, or None when its type holds no quantizers.

    A registered type has its own class. A subclass with a forward of its own (a weight-standardised
    convolution, say) gets one that runs that very forward on the quantized weight. A parametrized layer has a
    class of its own each time this is called.
    """
    kind = type(module)
    if issubclass(kind, QuantizedLayer):
        return kind
    if parametrized_names(module):
        base = _class_for(class_before(module))
        return None if base is None else _parametrized(base, module)
    return _class_for(kind)


def weight_shape(layer: nn.Module) -> tuple[int, ...]:
    """Returns the shape `[C_out, C_in / groups, *kernel]` of the weight of a layer, float or quantized."""
    quantizer = getattr(layer, "weight_quantizer", None)
    if quantizer is not None:  # a strategy may hold the weight in shards
        return tuple(cast(Any, quantizer.last if isinstance(quantizer, StagedQuantizer) else quantizer).shape)
    return tuple(canonical_of(layer, weight_of(layer)).shape)


def operation_of(module: nn.Module) -> Operation | None:
    """Returns what a layer, float or prepared, is declared to compute; None for all other modules.

    A subclass with a forward of its own counts as what its parent computes, see `known_operation`.
    """
    kind = type(module) if isinstance(module, QuantizedLayer) else quantized_class(module)
    return getattr(kind, "operation", None)


def known_operation(module: nn.Module) -> Operation | None:
    """Returns `operation_of` a layer that does nothing else; None where its forward is one of its own."""
    kind = getattr(class_before(module), "float_class", class_before(module))
    if "forward" in module.__dict__:
        return None
    parent = next((parent for parent in kind.__mro__ if parent in _REGISTRY), kind)
    inherited = parent in _REGISTRY and kind.forward is parent.forward
    return operation_of(module) if inherited or _name(kind) in _BY_NAME else None


def layer_channels(layer: nn.Module) -> tuple[int, int]:
    """Returns the channels of the input and of the output of a layer, float or prepared."""
    found: tuple[int, int] = _declared(layer).channels(layer)
    return found


def channel_axis(layer: nn.Module) -> int:
    """Returns the axis of the channels in what a layer, float or prepared, reads and makes, from the end."""
    axis: int = _declared(layer).input_axis
    return axis


def canonical_of(layer: nn.Module, weight: Tensor) -> Tensor:
    """Returns the weight of a layer, or what is shaped like it, as `[C_out, C_in / groups, *kernel]`."""
    found: Tensor = _declared(layer).canonical(layer, weight)
    return found


def from_canonical_of(layer: nn.Module, weight: Tensor) -> Tensor:
    """Returns the inverse of `canonical_of`: a weight in the layout of its layer."""
    found: Tensor = _declared(layer).from_canonical(layer, weight)
    return found


def _declared(layer: nn.Module) -> Any:
    """Returns the class that says these; on a float layer also, of which they read attributes of the float class."""
    kind = quantized_class(layer)
    assert kind is not None, f"{type(layer).__name__} is no known layer"
    return kind


def _name(kind: type[nn.Module]) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _parametrized(base: type[nn.Module], module: nn.Module) -> type[nn.Module]:
    kind = type(module)
    content: dict[str, Any] = {"float_class": kind, "is_plain_product": cast(Any, base).is_plain_product}
    if "weight" in parametrized_names(module) and issubclass(base, ShadowedForward):
        content["weight"] = shadowable(kind.__dict__["weight"])
    return parametrized_class(base, module, **content)


def _class_for(kind: type[nn.Module]) -> type[nn.Module] | None:
    if kind in _REGISTRY:
        return _REGISTRY[kind]
    if kind in _SHADOWED:
        return _SHADOWED[kind]
    named = _BY_NAME.get(_name(kind))
    base = named or next((_REGISTRY[parent] for parent in kind.__mro__ if parent in _REGISTRY), None)
    if base is None:
        return None
    mixins = (base,) if issubclass(base, ShadowedForward) else (ShadowedForward, base)
    shadowed = swapped_class(mixins, kind, {"float_class": kind, "__module__": __name__, "__reduce_ex__": _reduce})
    return _SHADOWED.setdefault(kind, shadowed)


def _reduce(layer: Any, protocol: Any) -> Any:
    """`__reduce_ex__` of classes made at run time, which pickle cannot find by name: made anew from the float class."""
    state = layer.__getstate__() if hasattr(layer, "__getstate__") else layer.__dict__
    return _rebuild, (type(layer).float_class,), state


def _rebuild(float_class: type[nn.Module]) -> nn.Module:
    plain = float_class.__new__(float_class)
    swapped = quantized_class(plain)
    assert swapped is not None
    plain.__class__ = swapped
    return plain


#: What is read from the class of a quantized layer, never from the layer: an instance may have these names for itself.
READ_FROM_CLASS = frozenset({"channels", "slots", "canonical", "from_canonical", "float_class", "input_axis"})
#: What a quantized class replaces on purpose, or adds to by calling what it replaces.
_REPLACED = frozenset({"forward", "weight", "extra_repr", "_load_from_state_dict"})
#: What Python's ABCMeta keeps in each of its classes.
_OF_PYTHON = frozenset({"_abc_impl"})


def names_taken(module: nn.Module, swapped: type[nn.Module] | None = None) -> list[str]:
    """Attributes of a float module that its quantized class has under the same name for something else.

    Args:
        module: a layer, or a module of several weights.
        swapped: the class it is to be swapped to; None: that of a layer.
    """
    swapped, kind = swapped or quantized_class(module), class_before(module)
    if swapped is None or isinstance(module, QuantizedLayer):
        return []
    known = [base for base in swapped.__mro__ if base not in type(module).__mro__]
    ours = {name for base in known for name in vars(base) if not name.startswith("__")} - _REPLACED - _OF_PYTHON
    ours |= {f"{slot}_quantizer" for slot in SLOTS}
    # torch's own classes and ours are known to go together.
    others = [
        base for base in kind.__mro__ if base.__module__.partition(".")[0] not in ("torch", "builtins", "lq_plugin")
    ]
    in_class = {name for base in others for name in vars(base)}
    in_instance = {*module.__dict__, *module._parameters, *module._buffers, *module._modules} - READ_FROM_CLASS
    return sorted(ours & (in_class | in_instance))


def why_unsupported(module: nn.Module) -> str | None:
    """Returns why this layer, although of a known type, cannot hold quantizers; None when it can."""
    if "forward" in vars(module) and not isinstance(module, QuantizedLayer):
        # It may call the float one, which it was made from: hooks of accelerate do.
        return "its forward is replaced on the instance, and would pass by the quantizers: override it in a class"
    if any(is_lazy(parameter) for parameter in module.parameters(recurse=False)):
        return "lazy module without shape yet: run one batch through the model before the Trainer"
    if not all(source.numel() for source in weight_sources(module)):
        return "its weight has no elements"
    if any(source.is_complex() for source in weight_sources(module)):
        return "its weight is complex, levels are real numbers"
    if not is_parametrized(module, "weight"):
        return None
    if "weight" not in parametrized_names(module) and not isinstance(module, QuantizedLayer):
        return f"its weight is parametrized, and {type(module).__name__} is not the class that torch made for that"
    if any(hasattr(source, "device_mesh") for source in weight_sources(module)):
        return "its weight is parametrized, and split over processes"
    return None
