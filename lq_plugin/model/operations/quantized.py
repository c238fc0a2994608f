"""Quantizers for operands of operations that no layer owns: `x + y`, `q @ k.T`, `torch.cat`, attention, hard-swish.

A module whose forward has such operations gains one submodule, `quantized_operations`, with the quantizers of each. It
stands in for the module's `forward` and runs it under a `TorchFunctionMode`, which counts the operations
as a recording does (`lq_plugin.model.graph.numbering`) and sends their operands through the quantizers. Calls
inside its submodules are not its own; hooks on them say when one begins and ends. Modules without quantized operations,
and their submodules, are not touched. An LSTM or an attention looks itself for the quantizers of what it computes
inside (`lq_plugin.layers.compound.base`).

`torch.compile` leaves such a module, with all that is in it, to Python: a graph that breaks inside would count anew
after the break, and quantize other operands than the plan says.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lq_plugin.intent.plan import LayerPlan
from lq_plugin.intent.spec import PerChannel
from lq_plugin.layers import (
    OPERATIONS_CONTAINER,
    QuantizedCompound,
    attention_with,
    changes,
    compound_container,
    compound_family,
    computes_inside,
    leave_compound,
    pass_on,
    why_unsupported_compound,
)
from lq_plugin.model.graph.macs import PRODUCTS
from lq_plugin.model.graph.numbering import ATTENTION, CACHED, OPERATIONS, Numbering, channel_axis, part_of
from lq_plugin.model.graph.op_names import METADATA, normalize
from lq_plugin.model.graph.recording import Recording
from lq_plugin.model.graph.tensor_identity import tensors_of
from lq_plugin.quantizers import ActivationQuantizer, StagedQuantizer, in_stages, make_activation_quantizer
from lq_plugin.utilities import hooks

#: Operations that are inside of others: of modules with several weights, next to products, and of torch's attention.
INNER_OPERATIONS = frozenset({"hidden", "cell", "gates", "softmax", "probabilities", *CACHED})
_QUANTIZER = re.compile(r"input_(\d+)_quantizer")


@dataclass(frozen=True)
class Operation:
    """One operation of a model.

    Args:
        name: as a recording names it: `layer1.0.add_0`.
        op: `"add"`, `"matmul"`, `"scaled_dot_product_attention"`, ...
        operands: which of the tensors that it gets can be quantized; a parameter or a mask can not.
        channels: of keys and values, those of all their heads; of others 1.
    """

    name: str
    op: str
    operands: tuple[int, ...]
    channels: int = 1

    @property
    def is_product(self) -> bool:
        """True if it multiplies activations by each other, or is the part of an attention kernel that does."""
        return (self.op in PRODUCTS and len(self.operands) > 1) or self.op == "probabilities"

    @property
    def place(self) -> tuple[str, str]:
        """The module it runs in, and its name there."""
        owner, _, label = self.name.rpartition(".")
        return owner, label


def operations_of(recording: Recording) -> dict[str, Operation]:
    """The functional calls of a recorded pass, its activation functions and its means, by name.

    Those of torch's attention kernel are four, see `Recording.attention_calls`.
    """
    found = {call.name: Operation(call.name, call.op, call.operands) for call in recording.functional_calls}
    for name, (part, call) in recording.attention_calls.items():
        channels = _heads_and_channels(call.inputs[CACHED[part]].shape) if part in CACHED else 1
        found[name] = Operation(name, part, (0,), channels)
    return found | {name: Operation(name, op, (0,)) for name, (op, _) in recording.unary_calls.items()}


def inner_operations(model: nn.Module) -> dict[str, Operation]:
    """The operations inside of a model's LSTMs, attentions, ..., which need no recorded pass to be known."""
    return {
        f"{name}.{key}" if name else key: Operation(f"{name}.{key}" if name else key, op, operands)
        for name, module in model.named_modules()
        if (family := compound_family(module)) is not None and why_unsupported_compound(module) is None
        for key, (op, operands) in family.inner_operations(module).items()
    }


def operations_in(state: Mapping[str, Sequence[int]]) -> dict[str, Operation]:
    """The operations whose quantizers a state dict has keys of.

    Args:
        state: shapes by key.
    """
    operands: dict[str, set[int]] = {}
    channels: dict[str, int] = {}
    for key, shape in state.items():
        owner, _, rest = f".{key}".rpartition(f".{OPERATIONS_CONTAINER}.")
        label, _, inner = rest.partition(".")
        if (found := _QUANTIZER.match(inner)) and _op_of(label) in OPERATIONS | INNER_OPERATIONS:
            name = ".".join(filter(None, (owner.strip("."), label)))
            operands.setdefault(name, set()).add(int(found[1]))
            if _op_of(label) in CACHED:
                channels[name] = max(channels.get(name, 1), math.prod(shape))
    return {
        name: Operation(name, _op_of(name), tuple(sorted(found)), channels.get(name, 1))
        for name, found in operands.items()
    }


def _heads_and_channels(shape: Sequence[int]) -> int:
    """Returns the channels of all heads of `[..., heads, tokens, channels]`; without a batch dim there are no heads."""
    return shape[-1] * (shape[-3] if len(shape) > 3 else 1)


def _op_of(name: str) -> str:
    label = name.rpartition(".")[2]
    first = label.partition("_")[0]
    return first if first in INNER_OPERATIONS else label.rpartition("_")[0]


class QuantizedOperation(nn.Module):
    """The quantizers of one operation, one for each operand: `input_0_quantizer`, ...

    Args:
        operation: which one.
        plan: the specs of its input, the same for all operands.
    """

    def __init__(self, operation: Operation, plan: LayerPlan) -> None:
        super().__init__()
        self.operation, self.plan = operation, plan
        for index in operation.operands:
            axis = channel_axis(operation.op, index)
            make: Any = partial(make_activation_quantizer, channels=operation.channels, channel_axis=axis)
            quantizer = in_stages(make, f"{operation.name}.input_{index}", plan.stages_of("input"))
            self.add_module(f"input_{index}_quantizer", quantizer)

    def quantizers(self) -> list[ActivationQuantizer | StagedQuantizer]:
        """Returns its quantizers in the order of the operands."""
        return cast("list[ActivationQuantizer | StagedQuantizer]", list(self.children()))

    def quantized(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of the operation with quantized operands; not where results are written."""
        numbers = count()
        return self._map(args, numbers), {
            key: value if key == "out" else self._map(value, numbers) for key, value in kwargs.items()
        }

    def _map(self, value: Any, numbers: Iterator[int]) -> Any:
        if isinstance(value, Tensor):
            quantizer = self._modules.get(f"input_{next(numbers)}_quantizer")
            return value if quantizer is None else quantizer(value)
        if isinstance(value, (list, tuple)):
            return type(value)([self._map(item, numbers) for item in value])
        return value


class _Call:
    """One call of a module that has quantized operations."""

    def __init__(self, module: nn.Module) -> None:
        self.numbering = Numbering(module)
        #: How many submodules are running inside each other.
        self.depth = 0


class OperationQuantizers(nn.Module):
    """The quantized operations of one module, by their name there; it stands in for the module's `forward`.

    Args:
        owner: the module, which it looks at and does not own.
    """

    owner: nn.Module

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        _keep_out_of_graphs()
        # Past nn.Module, which would make the owner a submodule of its own part.
        self.__dict__["owner"] = owner
        self.calls: list[_Call] = []
        #: A `forward` that somebody else had put on the instance.
        self.replaced: Any = owner.__dict__.get("forward")
        self._watches = True
        self.train(owner.training)
        owner.add_module(OPERATIONS_CONTAINER, self)
        owner.__dict__["forward"] = self.run

    def __getstate__(self) -> dict[str, Any]:
        # A copy runs nothing yet, and has none of the hooks, which a part that is copied alone does without.
        return self.__dict__ | {"calls": [], "_watches": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _keep_out_of_graphs()

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The owner's forward."""
        if not self._watches:
            self.watch_submodules()
        call = _Call(self.owner)
        self.calls.append(call)
        try:
            with _QuantizedOperands(self, call):
                if self.replaced is not None:
                    return self.replaced(*args, **kwargs)
                return type(self.owner).forward(self.owner, *args, **kwargs)
        finally:
            self.calls.pop()

    def enter_submodule(self, module: nn.Module, args: Any) -> None:
        """Hook: what runs from here on is the submodule's."""
        if self.calls:
            self.calls[-1].depth += 1

    def leave_submodule(self, module: nn.Module, args: Any, output: Any) -> None:
        """Hook: the submodule has returned, or raised.

        Args:
            module, args, output: as torch gives them to a forward hook.
        """
        # One whose own hooks raised before ours has not been entered.
        if self.calls and self.calls[-1].depth:
            self.calls[-1].depth -= 1

    def watch_submodules(self) -> None:
        """Puts hooks on submodules that have none yet; those that come later are seen at the next `prepare`."""
        ours, self._watches = {self.owner, *self.modules()}, True
        for module in self.owner.modules():
            # Scripted code is out of a function mode's sight, and refuses hooks.
            if module not in ours and not isinstance(module, torch.jit.ScriptModule) and not self._hooks_on(module):
                # Innermost, as in a recording: what users' hooks compute is the owner's.
                hooks.before(module, self.enter_submodule)
                hooks.after(module, self.leave_submodule, prepend=True, always_call=True)

    def release(self) -> None:
        """Gives the owner its forward back, and takes the hooks away."""
        for module in self.owner.modules():
            for held, key in self._hooks_on(module):
                del held[key]
                for flags in (module._forward_hooks_always_called, module._forward_hooks_with_kwargs):
                    flags.pop(key, None)
        delattr(self.owner, OPERATIONS_CONTAINER)
        # Somebody may have put something else there in the meantime, which is not ours to remove.
        if self.owner.__dict__.get("forward") == self.run:
            del self.owner.__dict__["forward"]
            if self.replaced is not None:
                self.owner.__dict__["forward"] = self.replaced

    def _hooks_on(self, module: nn.Module) -> list[tuple[dict[int, Any], int]]:
        mine = (self.enter_submodule, self.leave_submodule)
        return [
            (held, key)
            for held in (module._forward_pre_hooks, module._forward_hooks)
            for key, hook in held.items()
            if isinstance(hook, hooks.OwnHook) and hook.function in mine
        ]


def _keep_out_of_graphs() -> None:
    # Not as a decorator: that would import torch._dynamo, which takes seconds, with this file.
    if not hasattr(OperationQuantizers.run, "_torchdynamo_disable"):
        reason = "modules with quantized operations run outside of compiled graphs"
        OperationQuantizers.run = torch.compiler.disable(OperationQuantizers.run, reason=reason)  # type: ignore[method-assign]


class _QuantizedOperands(TorchFunctionMode):
    def __init__(self, container: OperationQuantizers, call: _Call) -> None:
        super().__init__()
        self.container, self.call = container, call

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self.call.depth or self.container.calls[-1] is not self.call or name in METADATA:
            return func(*args, **kwargs)
        op, in_place = normalize(name.partition(".")[0])
        inputs = list(tensors_of((args, {key: value for key, value in kwargs.items() if key != "out"})))
        numbering = self.call.numbering
        label = numbering.label(op, inputs)
        held = self.container._modules
        operation = None if label is None else held.get(label[0])
        inside = None
        if label is not None and op == ATTENTION:
            inside = held.get(part_of(label[0], "probabilities"))
            for part, place in CACHED.items():
                if (cached := held.get(part_of(label[0], part))) is not None:
                    args, kwargs = _with_cached(cast(QuantizedOperation, cached), place, part, args, kwargs)
        if inside is not None:
            result = _attention(func, operation, cast(QuantizedOperation, inside), args, kwargs)
        elif operation is None:
            result = func(*args, **kwargs)
        elif in_place:
            result = _in_place(func, cast(QuantizedOperation, operation), args, kwargs)
        else:
            args, kwargs = cast(QuantizedOperation, operation).quantized(args, kwargs)
            result = func(*args, **kwargs)
        numbering.note(op, in_place or kwargs.get("out") is not None, inputs, list(tensors_of(result)))
        return result


def _with_cached(
    operation: QuantizedOperation, place: int, part: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the arguments of an attention with quantized keys or values, which are its argument `place`."""
    (quantizer,) = operation.quantizers()
    if place < len(args):
        return (*args[:place], _by_channel(quantizer, args[place]), *args[place + 1 :]), kwargs
    name = part.removesuffix("s")
    return args, {**kwargs, name: _by_channel(quantizer, kwargs[name])}


def _by_channel(quantizer: Any, x: Tensor) -> Tensor:
    """Quantizes keys or values; each head has scales of its own for its channels: `[..., tokens, heads · channels]`."""
    # An export may have put something else in its place.
    current = quantizer.current if isinstance(quantizer, (ActivationQuantizer, StagedQuantizer)) else None
    if current is None or not isinstance(current.spec.granularity, PerChannel) or x.ndim < 4:
        y: Tensor = quantizer(x)
        return y
    by_token = x.transpose(-3, -2)
    y = quantizer(by_token.flatten(-2)).unflatten(-1, by_token.shape[-2:])
    return y.transpose(-3, -2)


def _in_place(func: Any, operation: QuantizedOperation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Computes `x += y` with quantized operands; the result stands in `x` itself, which others may also hold."""
    # Quantizers keep what they were given for the backward pass, so it must not be what is written to.
    changed, kwargs = operation.quantized((args[0].clone(), *args[1:]), kwargs)
    first = changed[0].clone() if changed[0]._is_view() else changed[0]
    y: Tensor = args[0].copy_(func(first, *changed[1:], **kwargs))
    return y


def _attention(
    func: Any, operation: Any, inside: QuantizedOperation, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    """Computes an attention whose probabilities are quantized, and its operands where `operation` says so."""
    if operation is not None:
        args, kwargs = operation.quantized(args, kwargs)
    (probabilities,) = inside.quantizers()
    if changes(probabilities):
        return attention_with(probabilities, *args, **kwargs)
    # Nothing inside would be changed, whoever looks (a recording has hooks on all modules): torch's kernel.
    y: Tensor = func(*args, **kwargs)
    return cast(Tensor, pass_on([probabilities], y))


def attach_operations(model: nn.Module, plans: Mapping[str, tuple[Operation, LayerPlan]]) -> None:
    """Gives operations the quantizers that their plans ask for; those that have them keep them."""
    present = dict(quantized_operations(model))
    for name, (operation, plan) in plans.items():
        if name in present:
            continue
        path, label = operation.place
        owner = model.get_submodule(path)
        container: Any
        if computes_inside(owner):
            container = compound_container(owner, OPERATIONS_CONTAINER)
        else:
            container = getattr(owner, OPERATIONS_CONTAINER, None) or OperationQuantizers(owner)
        quantized = QuantizedOperation(operation, plan)
        near = next(owner.parameters(), next(model.parameters(), None))
        if near is not None:
            quantized.to(near.device)
        quantized.train(owner.training)
        parameters = list(owner.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            # A frozen module gets no trainable scales.
            quantized.requires_grad_(False)
        container.add_module(label, quantized)
    for module in model.modules():
        if isinstance(module, OperationQuantizers):
            module.watch_submodules()


def detach_operations(model: nn.Module) -> None:
    """Takes the quantizers of all operations out of `model`."""
    for module in list(model.modules()):
        if isinstance(module, OperationQuantizers):
            module.release()
        elif isinstance(module, QuantizedCompound) and module.computes_inside:
            for label in list(getattr(module, OPERATIONS_CONTAINER, ())):
                leave_compound(module, OPERATIONS_CONTAINER, label)


def quantized_operations(model: nn.Module) -> list[tuple[str, QuantizedOperation]]:
    """The operations of `model` that hold quantizers, by the names of the plan."""
    return [
        (name.replace(f"{OPERATIONS_CONTAINER}.", ""), module)
        for name, module in model.named_modules()
        if isinstance(module, QuantizedOperation)
    ]
