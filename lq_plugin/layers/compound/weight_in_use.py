"""A weight while the code of its module reads it, which knows when a product does.

It goes through the module's own code in the place of the parameter: through views, casts and selections of experts it
stays what it is, and where it is multiplied, the other factor goes through the quantizer of the weight's input first.
All other functions get and return plain tensors. So the code may multiply as it likes: with `F.linear` for one expert
after another, with `torch.bmm`, `torch.einsum`, `F.grouped_mm`, or kernels of transformers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from types import GetSetDescriptorType
from typing import Any, cast

import torch
from torch import Tensor

from lq_plugin.layers.compound.products_in_code import FACTORS, SAME, TURNED
from lq_plugin.layers.compound.routed_inputs import Experts, selected

Read = Callable[[Tensor], Tensor]
#: Told of each product: the input as it is read, `[..., in]`, the experts that it meets, and where grouped rows end.
Seen = Callable[[Tensor, Experts, "Tensor | None"], None]
_MOE = "transformers.integrations.moe"
#: Other names of the same operations.
_SYNONYMS = {"grouped_mm_fallback": "grouped_mm", "linalg_matmul": "matmul"}
_KEEPS = SAME | TURNED | {"view", "reshape", "flatten", "unflatten", "movedim", "moveaxis", "view_as", "reshape_as"}
#: What the first and the second factor of a product are called.
_KEYWORDS = (("input", "self", "mat1", "mat_a", "batch1", "mat"), ("weight", "other", "mat2", "mat_b", "batch2", "vec"))


class WeightInUse(Tensor):
    """Alias of a weight, `[experts, out, in]`, `[out, in]`, ... as the module keeps it.

    Attributes:
        weight_name: of the weight in its module.
        read: what the other factor of its products goes through.
        seen: what is told of each product; None: nothing.
        experts: those that it holds.
    """

    weight_name: str = ""
    read: Read
    seen: Seen | None = None
    experts: Experts = None

    @classmethod
    def of(cls, weight: Tensor, name: str, read: Read, seen: Seen | None = None, experts: Experts = None) -> Tensor:
        """Returns a weight as its module's code may read it.

        Args:
            weight: as the forward pass uses it.
            name: of the weight in its module.
            read: what the other factor of its products goes through.
            seen: what is told of each product.
            experts: those that it holds, of the whole stack.
        """
        marked = weight.as_subclass(cls)
        marked.weight_name, marked.read = name, read
        if seen is not None:
            marked.seen, marked.experts = seen, experts
        return marked

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = _OPERATIONS.get(func, "")
        if name == "" and not torch.compiler.is_compiling():
            name = _OPERATIONS[func] = _name_of(func)
        if name == "rmatmul":
            func, args, name = torch.matmul, (args[1], args[0]), "matmul"
        weight = next(_weights((args, kwargs)), None)
        if weight is not None and name == "einsum":
            args = _einsum(args)
        elif weight is not None and name in FACTORS:
            args, kwargs = _product(name, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        if weight is None or name not in _KEEPS:
            return result
        return _marked(result, weight, name, args)


def _name_of(func: Any) -> str:
    """Returns the name of a function: that of `Tensor.__matmul__` is `"matmul"`, that of `Tensor.mT.__get__` `"mT"`."""
    name = getattr(func, "__name__", "").partition(".")[0].strip("_")
    if name == "get":
        name = getattr(getattr(func, "__self__", None), "__name__", "")
    return _SYNONYMS.get(name, name) or "unknown"


#: Names of functions; those that compiled code may call first are known from the beginning.
_OPERATIONS: dict[Any, str] = {
    func: _name_of(func)
    for name in {*FACTORS, *_KEEPS, "einsum", "__getitem__", "__matmul__", "__rmatmul__"}
    for holder in (torch, Tensor, torch.nn.functional, torch.linalg)
    if (found := getattr(holder, name, None)) is not None
    and callable(func := getattr(found, "__get__", found) if isinstance(found, GetSetDescriptorType) else found)
}


def know_kernels() -> None:
    """Learns the kernels of transformers, where it is loaded: compiled code cannot ask a function for its name."""
    packet = getattr(torch.ops.transformers, "grouped_mm_fallback", None) if _MOE in sys.modules else None
    if packet is not None:
        _OPERATIONS.update({packet: "grouped_mm", packet.default: "grouped_mm"})


def weight_in_use(value: Any) -> str | None:
    """Returns the name of the weight that a tensor is, or is a view or selection of; None for other tensors."""
    return (value.weight_name or None) if isinstance(value, WeightInUse) else None


def _weights(value: Any) -> Iterator[WeightInUse]:
    if weight_in_use(value) is not None:
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _weights(item)
    elif isinstance(value, dict):
        yield from _weights(list(value.values()))


def _watcher(weight: WeightInUse) -> Seen | None:
    """Returns what is told of products of a weight; in compiled code nothing is."""
    return None if torch.compiler.is_compiling() else weight.seen


def _marked(result: Any, weight: WeightInUse, name: str, args: tuple[Any, ...]) -> Any:
    """Returns a view or selection of a weight, or several, each as the weight itself."""
    seen = _watcher(weight)
    if isinstance(result, Tensor):
        experts = None if seen is None else selected(weight.experts, name, args)
        return WeightInUse.of(result, weight.weight_name, weight.read, seen, experts)
    if isinstance(result, (list, tuple)):
        # `for w in stack` is `stack.unbind(0)`.
        before = None if seen is None else selected(weight.experts, name, args)
        each = seen is not None and name == "unbind" and before is None
        held = range(len(result)) if each else [before] * len(result)
        parts = zip(result, held, strict=True)
        return type(result)([
            WeightInUse.of(item, weight.weight_name, weight.read, seen, experts) for item, experts in parts
        ])  # fmt: skip
    return result


def _product(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the arguments of a product of two factors, that which is no weight read."""
    given, named = list(args), dict(kwargs)
    places: list[tuple[Any, Any]] = []
    for index, names in zip(FACTORS[name], _KEYWORDS, strict=True):
        key = next((key for key in names if key in named), None)
        places.append((named, key) if index >= len(given) else (given, index))
    factors: list[Any] = [None if key is None else holder[key] for holder, key in places]
    for index, (factor, other) in enumerate(zip(factors, reversed(factors), strict=True)):
        if _is_activation(factor) and weight_in_use(other) is not None:
            holder, key = places[index]
            # A matrix on the right is summed over its rows.
            axis = -2 if index == 1 and factor.dim() > 1 else -1
            weight = cast(WeightInUse, other)
            holder[key] = _along(factor, axis, weight.read)
            if (seen := _watcher(weight)) is not None:
                offs = named.get("offs", given[2] if name == "grouped_mm" and len(given) > 2 else None)
                seen(holder[key].movedim(axis, -1), weight.experts, offs)
    return tuple(given), named


def _einsum(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns the arguments of an einsum, with the operands that are summed with a weight read along that dim."""
    if not isinstance(args[0], str):
        return args
    listed = len(args) == 2 and isinstance(args[1], (list, tuple))
    operands = list(args[1] if listed else args[1:])
    terms, _, output = args[0].replace(" ", "").partition("->")
    labels = [term.split("...") for term in terms.split(",")]
    for place, weight in enumerate(list(operands)):
        if weight_in_use(weight) is None:
            continue
        for index, factor in enumerate(operands):
            summed = [
                label for label in "".join(labels[index]) if label in "".join(labels[place]) and label not in output
            ]
            if index != place and summed and _is_activation(factor):
                operands[index] = _along(factor, _axis(labels[index], summed[-1]), weight.read)
                if (seen := _watcher(weight)) is not None:
                    _tell(seen, weight, operands[index], labels[index], labels[place], summed)
    return (args[0], operands) if listed else (args[0], *operands)


def _tell(seen: Seen, weight: WeightInUse, x: Tensor, mine: list[str], others: list[str], summed: list[str]) -> None:
    """Tells of an einsum whose labels are all written, and in which one is summed over."""
    known = len(mine) == len(others) == len(summed) == 1
    stacked = known and len(others[0]) == 3 and others[0][0] in mine[0]
    outer = [label for label in mine[0] if label not in summed and not (stacked and label == others[0][0])]
    order = [*([others[0][0]] if stacked else []), *outer, *summed] if known else []
    rows = x.permute([mine[0].index(label) for label in order]) if known else x
    if known:
        rows = rows.reshape(rows.shape[0], -1, rows.shape[-1]) if stacked else rows.reshape(-1, rows.shape[-1])
    seen(rows, weight.experts if known else "part", None)


def _axis(parts: list[str], label: str) -> int:
    """Returns the axis of a label, counted from the end, or from the start where it is left of an ellipsis."""
    return parts[-1].index(label) - len(parts[-1]) if label in parts[-1] else parts[0].index(label)


def _is_activation(value: Any) -> bool:
    return isinstance(value, Tensor) and weight_in_use(value) is None and value.is_floating_point()


def _along(x: Tensor, axis: int, read: Read) -> Tensor:
    """Returns `x` read with the axis that is summed over as its last."""
    return read(x) if axis % x.dim() == x.dim() - 1 else read(x.movedim(axis, -1)).movedim(-1, axis)
