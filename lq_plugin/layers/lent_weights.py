"""Layers that lend their weight to modules whose code multiplies it itself: `F.linear(x, self.qkv.weight, bias)`.

While the forward of such a module runs, `layer.weight` is the quantized weight, with its gradient, and the layer's
input goes through the layer's quantizer where a product of it reads the weight (`WeightInUse`). Before and after, and
within the layer's own forward, it is the parameter. Keys of state dicts, quantizers and their names are those of any
other layer.

Which modules these are is seen in their code (`reads_in_code`), so a model that is prepared without data knows it too.
Not lent are weights that are computed, those that the code also writes to, and those that a forward reads which
recomputes a part of itself in the backward pass, where nothing is lent any more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from lq_plugin.errors import QuantizationError
from lq_plugin.layers.base import QuantizedLayer
from lq_plugin.layers.compound.base import computes_inside
from lq_plugin.layers.compound.weight_in_use import LentBy, WeightInUse
from lq_plugin.layers.embedding import QuantizedEmbedding
from lq_plugin.layers.parametrized import weight_is_computed
from lq_plugin.layers.reads_in_code import code_reads, own_code, owner_read, recomputes
from lq_plugin.layers.registry import quantized_class
from lq_plugin.layers.swapped_class import swapped_class

_LENDING: dict[type[nn.Module], type[nn.Module]] = {}


class Reader:
    """Knows when the forward of a module runs that reads weights of layers."""

    def __init__(self) -> None:
        self.depth = 0

    def enter(self, module: nn.Module, args: Any) -> None:
        """Forward pre-hook."""
        self.depth += 1

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook, which is called after errors too.

        Args:
            module, args, output: as torch gives them.
        """
        # Another hook may have raised before ours was called.
        self.depth = max(self.depth - 1, 0)


class WeightLender(nn.Module):
    """Mixin before the class of a quantized layer."""

    #: The class of the layer before.
    lending_for: ClassVar[type[nn.Module]]
    _readers: tuple[Reader, ...] = ()
    #: How many calls of its own forward are running.
    _inside: int = 0
    #: Told of each product of the layer's input.
    _lent_by: LentBy | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.__dict__["_inside"] = self._inside + 1
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.__dict__["_inside"] = self._inside - 1

    @property
    def weight(self) -> Tensor:
        """The parameter; to code that reads it past the layer the quantized weight."""
        stored = self._stored()
        return self._lent(stored) if not self._inside and any(reader.depth for reader in self._readers) else stored

    @weight.setter
    def weight(self, value: Tensor) -> None:
        self.__dict__["weight"] = value

    @weight.deleter
    def weight(self) -> None:
        del self.__dict__["weight"]

    def quantized_weight(self, weight: Tensor | None = None) -> Tensor:
        return cast(Any, super()).quantized_weight(self._stored() if weight is None else weight)  # type: ignore[no-any-return]

    def _stored(self) -> Tensor:
        # Something may stand in for the parameter in the instance's `__dict__`.
        kept = self.__dict__.get("weight")
        return cast(Tensor, self._parameters["weight"]) if kept is None else kept

    def _lent(self, stored: Tensor) -> Tensor:
        layer, lender = cast(QuantizedLayer, self), cast(LentBy, self._lent_by)
        if layer._scales_output:
            raise QuantizationError(
                f"{cast(Any, layer.input_quantizer).name}: its format scales the layer's output, and other code than "
                "the layer's multiplies its weight: choose another format, or leave the input float"
            )
        if not torch.compiler.is_compiling():
            lender.reads += 1
        return WeightInUse.lent(layer.quantized_weight(stored), lender, layer.quantized_input)


def readers_of_weights(model: nn.Module) -> dict[nn.Module, dict[nn.Module, str]]:
    """Returns the layers whose weight can be lent, float or quantized, with their readers and the names of functions.

    >>> class Tied(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.encoder = nn.Linear(8, 4)
    ...     def forward(self, x):
    ...         return self.encoder(x) @ self.encoder.weight
    >>> Tied.forward.__module__ = Tied.__module__ = "my_project"  # the code of libraries is not looked at
    >>> net = Tied()
    >>> readers_of_weights(net) == {net.encoder: {net: "Tied.forward"}}
    True
    """
    found: dict[nn.Module, dict[nn.Module, str]] = {}
    written: set[nn.Module] = set()
    for module in model.modules():
        scripted = isinstance(module, (QuantizedLayer, torch.jit.ScriptModule))
        if scripted or quantized_class(module) is not None or computes_inside(module):
            continue
        for layer, where, writes in _reads_below(module):
            if writes:
                written.add(layer)
            else:
                found.setdefault(layer, {}).setdefault(module, where)
    again = {module for readers in found.values() for module in readers if recomputes(module)}
    return {layer: readers for layer, readers in found.items() if layer not in written and not again & readers.keys()}


def _reads_below(module: nn.Module) -> Iterable[tuple[nn.Module, str, bool]]:
    """Yields layers whose weight a module's forward reads, the function, and whether it is written to."""
    for function in own_code(module, ("forward",)):
        for read in code_reads(function):
            if read.attribute != "weight":
                continue
            owners: Iterable[Any] = module.modules() if read.path is None else [owner_read(module, read.path)]
            for owner in owners:
                if owner is not module and isinstance(owner, nn.Module) and _can_lend(owner):
                    kind = getattr(type(module), "float_class", type(module))
                    yield owner, f"{kind.__name__}.{function.__name__}", read.writes


def _can_lend(layer: nn.Module) -> bool:
    kind: Any = quantized_class(layer)
    if kind is None or layer._parameters.get("weight") is None or weight_is_computed(layer):
        return False
    return kind.operation in ("product", "convolution") or issubclass(kind, QuantizedEmbedding)


def lend_weights(model: nn.Module) -> None:
    """Lets the quantized layers of a model lend their weights to the modules whose code reads them."""
    hooks = {module: reader for module in model.modules() for reader in _readers_on(module)}
    for layer, modules in readers_of_weights(model).items():
        if not isinstance(layer, QuantizedLayer) or isinstance(layer, WeightLender):
            continue
        for module in modules:
            if module not in hooks:
                hooks[module] = reader = Reader()
                module.register_forward_pre_hook(reader.enter)
                module.register_forward_hook(reader.leave, prepend=True, always_call=True)
        layer.__class__ = _lending_class(type(layer))
        layer.__dict__["_readers"] = tuple(hooks[module] for module in modules)
        layer.__dict__["_lent_by"] = LentBy(layer)
        for quantizer in (layer.weight_quantizer, layer.input_quantizer):
            for stage in quantizer.stages() if quantizer is not None else ():
                stage.casts = False  # other code may read it in float32


def return_weights(model: nn.Module) -> None:
    """Undoes `lend_weights`, of layers whose quantizers are still in."""
    for module in model.modules():
        for reader in _readers_on(module):
            for hooks, key in _hooks_of(module, reader):
                del hooks[key]
                module._forward_hooks_always_called.pop(key, None)
        if isinstance(module, WeightLender):
            stop_lending(module)


def stop_lending(layer: nn.Module) -> None:
    """Lets all code read a layer's float weight, but for the layer itself."""
    for name in ("_readers", "_inside", "_lent_by"):
        layer.__dict__.pop(name, None)
    layer.__class__ = cast(Any, type(layer)).lending_for


def _readers_on(module: nn.Module) -> list[Reader]:
    owners = [getattr(hook, "__self__", None) for hook in module._forward_pre_hooks.values()]
    return [owner for owner in owners if isinstance(owner, Reader)]


def _hooks_of(module: nn.Module, reader: Reader) -> list[tuple[dict[int, Callable[..., Any]], int]]:
    return [
        (hooks, key)
        for hooks in (module._forward_pre_hooks, module._forward_hooks)
        for key, hook in hooks.items()
        if getattr(hook, "__self__", None) is reader
    ]


def _lending_class(kind: type[nn.Module]) -> type[Any]:
    if kind not in _LENDING:
        content = {"__module__": __name__, "__reduce_ex__": _reduce, "has_integer_kernel": False, "lending_for": kind}
        made = swapped_class((WeightLender,), kind, content)
        made.__name__ = made.__qualname__ = kind.__name__
        _LENDING[kind] = made
    return _LENDING[kind]


def _reduce(layer: Any, protocol: Any) -> Any:
    """`__reduce_ex__` of classes made at run time, which pickle cannot find by name: made anew from the float class."""
    return _rebuild, (type(layer).float_class,), layer.__dict__


def _rebuild(float_class: type[nn.Module]) -> nn.Module:
    plain = float_class.__new__(float_class)
    quantized = quantized_class(plain)
    assert quantized is not None
    plain.__class__ = _lending_class(quantized)
    return plain
