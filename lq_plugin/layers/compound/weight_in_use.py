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
from torch import Tensor, nn

from lq_plugin.errors import QuantizationError
from lq_plugin.layers.compound.products_in_code import FACTORS, SAME, TURNED
from lq_plugin.layers.compound.routed_inputs import Experts, selected
from lq_plugin.layers.registry import canonical_of, layer_channels, operation_of

Read = Callable[[Tensor], Tensor]
#: Told of each product: the input as it is read, `[..., in]`, the experts that it meets, and where grouped rows end.
Seen = Callable[[Tensor, Experts, "Tensor | None"], None]
_MOE = "transformers.integrations.moe"
#: Other names of the same operations.
_SYNONYMS = {"grouped_mm_fallback": "grouped_mm", "linalg_matmul": "matmul"}
#: Products of a layer's input with the weight of a convolution.
_CONVOLUTIONS = frozenset(("conv1d", "conv2d", "conv3d"))
_KEEPS = SAME | TURNED | {"view", "reshape", "flatten", "unflatten", "movedim", "moveaxis", "view_as", "reshape_as"}
#: What the first and the second factor of a product are called.
_KEYWORDS = (("input", "self", "mat1", "mat_a", "batch1", "mat"), ("weight", "other", "mat2", "mat_b", "batch2", "vec"))


class LentBy:
    """The layer whose weight other code reads.

    Args:
        layer: float or quantized.

    Attributes:
        reads: how often the weight has been lent so far.
        products: how many have read the layer's input. Neither counts in compiled code.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer, self.reads, self.products = layer, 0, 0


class WeightInUse(Tensor):
    """Alias of a weight, `[experts, out, in]`, `[out, in]`, ... as the module keeps it.

    Attributes:
        weight_name: of the weight in its module.
        read: what the other factor of its products goes through.
        seen: what is told of each product; None: nothing.
        experts: those that it holds.
        is_lent: whether it is of a layer, and other code than the layer's reads it.
        lender: that layer.
        inputs: the axis, from the end, of the layer's inputs.
    """

    weight_name: str = ""
    read: Read
    seen: Seen | None = None
    experts: Experts = None
    is_lent: bool = False
    lender: LentBy
    inputs: int

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
        # All are set here: compiled code does not find them in the class.
        marked.weight_name, marked.read, marked.is_lent = name, read, False
        if seen is not None:
            marked.seen, marked.experts = seen, experts
        return marked

    @classmethod
    def lent(cls, weight: Tensor, lender: LentBy, read: Read) -> Tensor:
        """Returns the weight of a layer as other code may read it.

        Products of the layer's input go through `read`, and no others: `h @ weight` with a linear layer's weight
        `[out, in]` sums over its outputs.

        Args:
            weight: as the layer's forward pass uses it.
            lender: the layer.
            read: what the layer's input goes through.
        """
        marked = cast(WeightInUse, cls.of(weight, "weight", read))
        kept = weight.dim() != 2 or canonical_of(lender.layer, weight).stride() == weight.stride()
        marked.is_lent, marked.lender, marked.inputs = True, lender, -1 if kept else -2
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
        if weight is not None and weight.is_lent and not torch.compiler.is_compiling():
            _refuse_writing(func, args, kwargs)
        if weight is not None and name == "einsum":
            args = _einsum(args)
        elif weight is not None and (name in FACTORS or (weight.is_lent and name in _CONVOLUTIONS)):
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
    for name in {*FACTORS, *_CONVOLUTIONS, *_KEEPS, "einsum", "__getitem__", "__matmul__", "__rmatmul__"}
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


def lender_of(values: Any) -> LentBy | None:
    """Returns the layer that lends one of some tensors; None where all are others'."""
    return next((weight.lender for weight in _weights(values) if weight.is_lent), None)


def _refuse_writing(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuses what would write into a quantized copy and be lost.

    Raises:
        QuantizationError: of an operation in place, or one with `out=`.
    """
    name = getattr(func, "__name__", "")
    in_place = name in ("__setitem__", "set_data") or (name.endswith("_") and not name.endswith("__"))
    written = kwargs.get("out", args[0] if in_place and args else None)
    if weight_in_use(written) is not None and name != "requires_grad_":
        raise QuantizationError(
            f"{name} writes into the weight of a {type(cast(Any, written).lender.layer).__name__} while the forward "
            "pass of a module that reads it runs, which gets the quantized one: write it outside of `forward`, or "
            "leave the layer float"
        )


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
    if weight.is_lent:
        return _marked_lent(result, weight, name)
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


def _marked_lent(result: Any, weight: WeightInUse, name: str) -> Any:
    """Returns a view or copy of a layer's weight, or several, which know where its inputs are."""
    if isinstance(result, (list, tuple)):
        return type(result)([_marked_lent(item, weight, name) for item in result])
    if not isinstance(result, Tensor):
        return result
    marked = cast(WeightInUse, WeightInUse.of(result, weight.weight_name, weight.read))
    marked.is_lent, marked.lender, marked.inputs = True, weight.lender, weight.inputs
    if name in TURNED and result.stride() != weight.stride():
        two = result.dim() == weight.dim() == 2 and weight.inputs != 0
        marked.inputs = -3 - weight.inputs if two else 0
    return marked


def _reads_input(weight: WeightInUse, name: str, axis: int) -> bool:
    """Returns whether a product sums over the inputs of a weight.

    Args:
        weight: one of its factors.
        name: of the product.
        axis: of the weight that is summed over, from the end.
    """
    if not weight.is_lent:
        return True
    operation, layer = operation_of(weight.lender.layer), weight.lender.layer
    if name in _CONVOLUTIONS:
        reads = operation == "convolution" and weight.inputs == -1
    else:
        reads = operation == "product" and weight.dim() == 2 and axis == weight.inputs
        reads = reads and weight.shape[axis] == layer_channels(layer)[0]
    if reads and not torch.compiler.is_compiling():
        weight.lender.products += 1
    return reads


def _product(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the arguments of a product of two factors, that which is no weight read."""
    given, named = list(args), dict(kwargs)
    places: list[tuple[Any, Any]] = []
    for index, names in zip(FACTORS.get(name, (0, 1)), _KEYWORDS, strict=True):
        key = next((key for key in names if key in named), None)
        places.append((named, key) if index >= len(given) else (given, index))
    factors: list[Any] = [None if key is None else holder[key] for holder, key in places]
    for index, (factor, other) in enumerate(zip(factors, reversed(factors), strict=True)):
        if _is_activation(factor) and weight_in_use(other) is not None:
            holder, key = places[index]
            # A matrix on the right is summed over its rows.
            axis = -2 if index == 1 and factor.dim() > 1 else -1
            weight = cast(WeightInUse, other)
            summed = -1 if name == "linear" or index == 1 or weight.dim() == 1 else -2
            if not _reads_input(weight, name, summed):
                continue
            if name in _CONVOLUTIONS:  # a convolution's quantizer knows where its channels are
                holder[key] = weight.read(factor)
                continue
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
                if not _reads_input(weight, "einsum", _axis(labels[place], summed[-1])):
                    continue
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
