"""Quantized weights that the model's own code reads past their layers: `F.linear(x, self.embedding.weight)`.

Found in the code of the model without running it, so that a file can hold what the model computes with. What such code
only asks of a weight, its dtype, device or shape, is no read of its values. Where the code does not say of which layer
a weight is (`layers[i].weight`), it may be any one below. Names made at run time (`getattr(layer, name)`), weights kept
in lists and compiled code do not show there: `raw_reads` sees them while the model runs on a batch.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from lq_plugin.layers import CONTAINER, OwnWeights, QuantizedLayer, weight_key
from lq_plugin.model.prepare import quantized_layers
from lq_plugin.model.survey import float_class

#: Where an evaluation begins.
_ENTRIES = ("forward", "validation_step", "test_step", "predict_step")
#: Asked of a weight without reading its values.
_LOOKS = frozenset(
    (
        "dtype",
        "device",
        "shape",
        "size",
        "ndim",
        "dim",
        "numel",
        "requires_grad",
        "is_cuda",
        "grad",
        "__class__",
        "type",
    )
)
_LIBRARIES = ("torch.", "lightning.", "pytorch_lightning.", "lq_plugin.")


def weights_read_past_layers(model: nn.Module) -> dict[str, str]:
    """Returns keys (in the state dict) of quantized weights that are read past their layers, and where.

    Those that the model's code reads, and those that `raw_reads` has seen an operation read.

    >>> import lq_plugin
    >>> __name__ = "my_project"  # the code of libraries is not looked at
    >>> class Tied(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.encoder = nn.Linear(8, 4)
    ...     def forward(self, x):
    ...         return self.encoder(x) @ self.encoder.weight
    >>> net = Tied()
    >>> _ = lq_plugin.prepare(net, "w4")
    >>> weights_read_past_layers(net)
    {'encoder.weight': 'Tied.forward'}
    """
    owners: dict[tuple[int, str], str] = {}
    noted: dict[str, str] = {}
    for name, layer in quantized_layers(model):
        if layer.weight_quantizer is not None:
            key = weight_key(name, layer)
            holding, _, attribute = key.rpartition(".")
            owners[id(model.get_submodule(holding)), attribute] = key
            if layer.read_past_by is not None:
                noted[key] = layer.read_past_by
    attributes = {attribute for _, attribute in owners}
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if (
            isinstance(module, QuantizedLayer)
            or f".{CONTAINER}." in f".{name}."
            or f"{float_class(module).__module__}.".startswith(_LIBRARIES)
        ):
            continue
        below = {id(inner) for inner in module.modules()}
        for function in _functions(module):
            for path, attribute in _reads(function.__code__, attributes):
                if path == () and isinstance(module, OwnWeights):
                    continue  # its products are given the quantized weight
                owner = _resolved(module, path)
                for (holder, kept), key in owners.items():
                    if kept == attribute and (
                        holder == id(owner) if path is not None else holder in below and holder != id(module)
                    ):
                        found.setdefault(key, f"{float_class(module).__name__}.{function.__name__}")
    return noted | found


def _functions(module: nn.Module) -> Iterator[FunctionType]:
    """Functions of the model's own that an evaluation of a module may come to."""
    kind = float_class(module)
    entries = [module.__dict__.get(name, getattr(kind, name, None)) for name in _ENTRIES]
    waiting = [entry for entry in entries if entry is not None]
    seen: set[int] = set()
    while waiting:
        entry = waiting.pop()
        function = inspect.unwrap(getattr(entry, "__func__", entry))
        if (
            not isinstance(function, FunctionType)
            or id(function) in seen
            or f"{function.__module__}.".startswith(_LIBRARIES)
        ):
            continue
        seen.add(id(function))
        yield function
        for name in {name for code in _codes(function.__code__) for name in code.co_names}:
            method = inspect.getattr_static(kind, name, None)
            method = method.fget if isinstance(method, property) else getattr(method, "__func__", method)
            waiting += [value for value in (method, function.__globals__.get(name)) if isinstance(value, FunctionType)]


def _codes(code: CodeType) -> Iterator[CodeType]:
    """A function's code and that of the functions and comprehensions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _reads(function: CodeType, attributes: set[str]) -> Iterator[tuple[tuple[str, ...] | None, str]]:
    """Yields reads of such attributes: names from `self` to the owner (None: another's), and the attribute."""
    this = function.co_varnames[0] if function.co_argcount else ""
    for code in _codes(function):
        steps = list(dis.get_instructions(code))
        for index, step in enumerate(steps):
            if not _gets(step) or step.argval not in attributes:
                continue
            if index + 1 < len(steps) and _gets(steps[index + 1]) and steps[index + 1].argval in _LOOKS:
                continue
            start = index - 1
            while start >= 0 and _gets(steps[start]):
                start -= 1
            if start > 0 and steps[start - 1].argval in ("isinstance", "hasattr"):
                continue
            base = steps[start].argval if steps[start].opname.startswith(("LOAD_FAST", "LOAD_DEREF")) else None
            mine = (base[-1] if isinstance(base, tuple) else base) == this
            yield (tuple(str(inner.argval) for inner in steps[start + 1 : index]) if mine else None), str(step.argval)


def _gets(step: dis.Instruction) -> bool:
    return step.opname in ("LOAD_ATTR", "LOAD_METHOD")


def _resolved(module: nn.Module, path: tuple[str, ...] | None) -> Any:
    """Returns the object that a path of attributes leads to; None where it is missing."""
    value: Any = module
    for name in path or ():
        value = getattr(value, name, None)
    return value
