"""Quantized weights that operations read past their layers, seen while the model runs.

`past_reads` looks at the model's code, where a name made at run time (`getattr(layer, name)`), a weight kept in a list
or a closure, and a scripted or compiled function that takes one do not show. Each of them ends in an operation of torch
that is given the weight's memory, and a `TorchDispatchMode` sees every operation below all of these. A layer's own
operations, those of its quantizer and of the modules that hold the same parameter are no reads past it.

`copy.deepcopy` of a layer is none either. Unseen is what leaves torch (`weight.detach().numpy()`), and what the batch
does not come to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lq_plugin.layers import QuantizedLayer, weight_key
from lq_plugin.model.graph.tensor_identity import storage_of, tensors_of, within_deepcopy
from lq_plugin.model.prepare import quantized_layers
from lq_plugin.utilities import hooks


class _Weight(NamedTuple):
    """Layers that have one parameter, and the modules that may read it, by id."""

    layers: list[QuantizedLayer]
    readers: set[int]
    #: Keeps the memory from being given to another tensor, where modules are moved in between.
    memory: Any


@contextmanager
def noting_raw_reads(model: nn.Module) -> Iterator[None]:
    """Notes at each quantized layer (`read_past_by`) which operation read its weight past it, in what runs inside.

    Args:
        model: prepared; its quantizers may be on or off.
    """
    weights = _weights(model)
    # Before torch 2.7 a mode cannot stand aside for operators of a higher order (flex_attention).
    if not weights or not hasattr(TorchDispatchMode, "supports_higher_order_operators"):
        yield
        return
    watched = set().union(*(weight.readers for weight in weights.values()))
    mode = _RawReads(weights)
    with ExitStack() as stack:
        for module in model.modules():
            if id(module) in watched:
                stack.callback(hooks.before(module, mode.enter).remove)
                stack.callback(hooks.after(module, mode.leave, always_call=True).remove)
        stack.enter_context(mode)
        yield


def _weights(model: nn.Module) -> dict[Any, _Weight]:
    """Returns the weights that have quantizers, by their memory."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found: dict[Any, _Weight] = {}
    for name, layer in quantized_layers(model):
        parameter = parameters.get(weight_key(name, layer))
        if layer.weight_quantizer is None or parameter is None or not parameter.numel():
            continue  # of a computed weight nothing is stored, see `computed_faults`
        key, memory = storage_of(parameter)
        weight = found.setdefault(key, _Weight([], set(), memory))
        weight.layers.append(layer)
        # An LSTM computes with the quantizers of its weights.
        weight.readers.update(map(id, (layer, layer.weight_quantizer, getattr(layer, "owner", layer))))
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and (held := found.get(storage_of(parameter)[0])) is not None:
                held.readers.add(id(module))
    return found


class _RawReads(TorchDispatchMode):
    """Looks at the operands of each operation.

    Args:
        weights: by their memory.
    """

    supports_higher_order_operators = True

    def __init__(self, weights: Mapping[Any, _Weight]) -> None:
        super().__init__()
        self._weights = weights
        self._running: list[int] = []

    def enter(self, module: nn.Module, *_: Any) -> None:
        """Forward pre-hook of the modules that may read a weight."""
        self._running.append(id(module))

    def leave(self, module: nn.Module, *_: Any) -> None:
        """Forward hook of the same."""
        while self._running and self._running.pop() != id(module):
            pass

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # A view reads nothing; what reads the view has the same memory.
        if not getattr(func, "is_view", False):
            for tensor in tensors_of((args, kwargs)):
                weight = self._weights.get(storage_of(tensor)[0])
                if weight is not None and weight.readers.isdisjoint(self._running) and not within_deepcopy():
                    for layer in weight.layers:
                        layer.read_past_by = str(func)
        return func(*args, **kwargs)
