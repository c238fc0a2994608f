"""Modules that hold several weights: LSTM, GRU, RNN and their cells, multi-head attention.

To the plan, each weight of such a module is a layer: `lstm.weight_ih_l0`, `attention.in_proj_weight`. The module keeps
its parameters under their keys; it gains one submodule, `quantized_weights`, with the quantizers of each weight.

Its forward is the float class's own, run while the quantized weights stand in for the parameters, as long as nothing
that torch's kernel computes inside is quantized. The input of a `StateWeight` is: `lstm.weight_hh_l0` reads the hidden
state, `attention.out_proj` the output of the attention. Then the family computes the module itself (`run_inside`), with
torch's float results to rounding. So it does where what else is computed inside is quantized (`inner_operations`): the
cell state, the gates, the products of an attention, which a plan names as it names operations.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lq_plugin.layers.base import QuantizedLayer
from lq_plugin.layers.compound.inside import See, acts, pass_on, show_inputs, shown, unchanged
from lq_plugin.layers.registry import names_taken, quantized_class, register_layer
from lq_plugin.layers.swapped_class import swapped_class

#: The submodule that holds the quantizers of each weight.
CONTAINER = "quantized_weights"
#: The submodule that holds the quantizers of operations, of those inside of such a module and of others.
OPERATIONS_CONTAINER = "quantized_operations"

_COMPOUND: dict[type[nn.Module], type[QuantizedCompound]] = {}
_SWAPPED: dict[type[nn.Module], type[QuantizedCompound]] = {}
#: Families of modules of any type that have such weights.
_OF_ANY_TYPE: list[type[QuantizedCompound]] = []


class CompoundWeight(nn.Module):
    """One weight `[C_out, C_in]` of a module that holds several; it refers to the parameter and does not own it.

    Args:
        owner: the module.
        key: what the plan calls the weight, after the module's name.
        path: the parameter in the owner, where that is something else: `"out_proj.weight"`.
        input_of: key of the weight that shares this input.
        remark: why its input stays float, where it does.
    """

    owner: nn.Module
    key: str
    path: str
    input_of: str | None
    remark: str | None
    #: Matrices below each other that may multiply different rows.
    matrices: int = 1

    def __init__(
        self,
        owner: nn.Module,
        key: str,
        path: str | None = None,
        *,
        input_of: str | None = None,
        remark: str | None = None,
    ) -> None:
        super().__init__()
        # Past nn.Module, which would make the owner a submodule of its own part.
        self.__dict__["owner"] = owner
        self.key, self.path, self.input_of, self.remark = key, path or key, input_of, remark
        self.training = owner.training

    @property
    def weight(self) -> Tensor:
        """The parameter itself, also while a quantized weight stands in for it."""
        holder, name = self.place()
        return cast(Tensor, holder._parameters[name])

    def place(self) -> tuple[nn.Module, str]:
        """The module that has the parameter, and its name there."""
        inner, _, name = self.path.rpartition(".")
        return self.owner.get_submodule(inner), name

    @property
    def shows_input(self) -> bool:
        """True if `watching` can show what it multiplies; the weight has quantizers."""
        weights = cast(Any, type(self.owner)).weights(self.owner)
        return next((weight for weight in weights if weight.key == self.input_of), self).remark is None

    @contextmanager
    def watching(self, see: See) -> Iterator[None]:
        """Shows what it multiplies while its module runs; `shows_input`.

        Args:
            see: gets the number of one of its `matrices`, and rows `[rows, in]` as the input quantizer gives them.
        """
        owner, key = cast(Any, self.owner), self.input_of or self.key
        owner.__dict__["_watched"] = key, self.matrices, see
        # What is no input of the module comes up while its family computes it.
        owner.__dict__["_shows_steps"] = all(owner.key_of(owner, name) != key for name in owner.input_positions)
        try:
            yield
        finally:
            del owner.__dict__["_watched"], owner.__dict__["_shows_steps"]

    def enter_owner(self) -> None:
        """Makes the owner compute with this weight's quantizers."""
        compound_container(self.owner, CONTAINER)[self.key] = self

    def leave_owner(self) -> None:
        """Undoes `enter_owner`; the owner is of its float class again once the last weight has left."""
        leave_compound(self.owner, CONTAINER, self.key)


class InputWeight(CompoundWeight):
    """A weight that multiplies an input of the module, which can be quantized."""


class StateWeight(CompoundWeight):
    """A weight that multiplies what the module computes inside, which can be quantized: a hidden state, ..."""


class InnerWeight(CompoundWeight):
    """A weight without an input quantizer: that of another weight serves it (`input_of`), or its input stays float."""


class _QuantizedWeight(QuantizedLayer):
    def channels(self) -> tuple[int, int]:
        return self.weight.shape[1], self.weight.shape[0]

    def casts_operands(self) -> bool:
        owner = cast(CompoundWeight, self).owner
        family = compound_family(owner)
        return family is not None and family.casts_operands(owner)


@register_layer(InputWeight)
class QuantizedInputWeight(_QuantizedWeight, InputWeight):
    float_class = InputWeight
    slots = ("weight", "input")


@register_layer(StateWeight)
class QuantizedStateWeight(_QuantizedWeight, StateWeight):
    float_class = StateWeight
    slots = ("weight", "input")
    added_slots = ("input",)


@register_layer(InnerWeight)
class QuantizedInnerWeight(_QuantizedWeight, InnerWeight):
    float_class = InnerWeight
    slots = ("weight",)


class QuantizedCompound(nn.Module):
    """Mixin before a float class; a family says what its weights are and which of them see an input.

    Attributes:
        input_names: arguments of `forward` that are quantized, in their order.
        remark: what of the module stays float.
    """

    float_class: ClassVar[type[nn.Module]]
    input_names: ClassVar[tuple[str, ...]]
    input_positions: ClassVar[dict[str, int]]
    remark: ClassVar[str]
    #: Whether the module is one operation, whose inside the family computes where it is quantized.
    computes_inside: ClassVar[bool] = True
    #: Whether version 0.1 left such modules float; its state dicts have no ranges of them.
    is_new: ClassVar[bool] = False
    #: Whether the family computes the module itself although nothing inside is quantized: an export sees each step.
    _shows_steps: bool = False
    #: The key of the weight whose input is shown, see `CompoundWeight.watching`, its number of matrices, and to whom.
    _watched: tuple[str, int, See] | None = None

    @staticmethod
    def weights(module: nn.Module) -> list[CompoundWeight]:
        """All weights of a module of the float class."""
        raise NotImplementedError

    @staticmethod
    def key_of(module: nn.Module, name: str) -> str:
        """Key of the weight whose quantizer an input goes through."""
        raise NotImplementedError

    @staticmethod
    def inner_operations(module: nn.Module) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Returns what is computed inside and can be quantized: by name, the operation and its operands."""
        return {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        arguments = self._quantized_inputs(args, kwargs)
        if self._watched is not None:
            show_inputs(self, *self._watched, *arguments)
        shadowed: list[tuple[nn.Module, str]] = []
        try:
            for part in self._parts().values():
                if part.weight_quantizer is not None:
                    holder, name = cast(CompoundWeight, part).place()
                    # In the instance's `__dict__`, which Python looks at before `nn.Module.__getattr__`.
                    holder.__dict__[name] = part.quantized_weight()
                    shadowed.append((holder, name))
            if self._shows_steps or any(map(acts, inside := self._inner_quantizers())):
                return self.run_inside(*arguments[0], **arguments[1])
            given, named = arguments
            if inside and given:
                given = (pass_on(inside, given[0]), *given[1:])
            elif inside and (name := self.input_names[0]) in named:
                named = named | {name: pass_on(inside, named[name])}
            return self.run(*given, **named)
        finally:
            for holder, name in shadowed:
                del holder.__dict__[name]

    @staticmethod
    def casts_operands(module: nn.Module) -> bool:
        """Returns True if under autocast inputs and weights are cast before anything reads them."""
        return False

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The float class's forward; the parameters are the quantized ones now."""
        return type(self).float_class.forward(self, *args, **kwargs)

    def run_inside(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what `run` does, with the quantizers of what is computed inside."""
        raise NotImplementedError

    def _parts(self) -> dict[str, QuantizedLayer]:
        held = self._modules.get(CONTAINER)
        return {} if held is None else cast(Any, held._modules)

    def _inner_quantizers(self) -> list[nn.Module]:
        """The quantizers of what is computed inside."""
        found: list[nn.Module] = []
        for part in self._parts().values():
            if isinstance(part, StateWeight) and part.input_quantizer is not None:
                found.append(part.input_quantizer)
        operations = self._modules.get(OPERATIONS_CONTAINER)
        for operation in () if operations is None else operations.children():
            found += operation.children()
        return found

    def reader(self, key: str) -> Callable[[Tensor], Tensor]:
        """Returns the quantizer of a state on its way to the weight `key`."""
        part = self._parts().get(key)
        read = unchanged if part is None or part.input_quantizer is None else part.input_quantizer
        return read if self._watched is None or self._watched[0] != key else shown(read, self._watched[2])

    def operand(self, key: str, index: int = 0) -> Callable[[Tensor], Tensor] | None:
        """The quantizer of an operand of an inner operation, if it has one."""
        operations = self._modules.get(OPERATIONS_CONTAINER)
        operation = None if operations is None else operations._modules.get(key)
        return None if operation is None else cast(Any, operation._modules[f"input_{index}_quantizer"])

    def _quantized_inputs(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the arguments with quantized inputs.

        One tensor that is passed twice stays one: torch asks whether the query *is* the key.
        """
        positional = list(args)
        done: dict[tuple[int, int], Any] = {}
        waiting = {}
        for name, position in self.input_positions.items():
            part = self._parts().get(self.key_of(self, name))
            if part is None or part.input_quantizer is None:
                continue
            waiting[name] = part.input_quantizer.name
            given = position < len(positional)
            x = positional[position] if given else kwargs.get(name)
            if x is None:
                continue
            same = (id(x), id(part))
            if same not in done:
                done[same] = _quantized(part, x)
            if given:
                positional[position] = done[same]
            else:
                kwargs[name] = done[same]
        if waiting and not done:
            raise TypeError(f"{next(iter(waiting.values()))}: call the module with {' and '.join(waiting)}")
        return tuple(positional), kwargs

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class was made at run time, so pickle cannot find it by name: it is made again from the float class.
        return (
            _rebuild,
            (type(self).float_class,),
            self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__,
        )


def compound_container(owner: nn.Module, name: str) -> nn.ModuleDict:
    """The submodule of that name which holds quantizers of `owner`, whose class is swapped for it."""
    if not isinstance(owner, QuantizedCompound):
        owner.__class__ = swapped_compound(type(owner))
    if name not in owner._modules:
        owner.add_module(name, nn.ModuleDict().train(owner.training))
    return cast(nn.ModuleDict, owner._modules[name])


def leave_compound(owner: nn.Module, name: str, key: str) -> None:
    """Takes an entry out of such a submodule; the owner is of its float class again once nothing is left.

    Args:
        owner: the module.
        name: of the submodule.
        key: of the entry.
    """
    held = cast(nn.ModuleDict, owner._modules[name])
    del held[key]
    if not held:
        delattr(owner, name)
    family = type(cast(QuantizedCompound, owner))
    ours = {CONTAINER, OPERATIONS_CONTAINER} if family.computes_inside else {CONTAINER}
    if not ours & owner._modules.keys():
        owner.__class__ = family.float_class


def show_steps(module: nn.Module, marks: Mapping[str, nn.Module] | None = None) -> None:
    """Lets a float module of several weights compute step by step, so that an export sees what is inside.

    Args:
        module: changed.
        marks: what stands where the quantizers of inner operations would be, by the operation's name there.
    """
    if computes_inside(module) and not isinstance(module, QuantizedCompound):
        module.__class__ = swapped_compound(type(module))
        module.__dict__["_shows_steps"] = True
        for key, mark in (marks or {}).items():
            compound_container(module, OPERATIONS_CONTAINER)[key] = mark


def _quantized(part: QuantizedLayer, x: Any) -> Any:
    if isinstance(x, PackedSequence):
        return PackedSequence(part.quantized_input(x.data), x.batch_sizes, x.sorted_indices, x.unsorted_indices)
    return part.quantized_input(x)


C = TypeVar("C", bound=type[QuantizedCompound])


def register_compound(*float_types: type[nn.Module]) -> Callable[[C], C]:
    """Class decorator: the family quantizes modules of these types and of their subclasses."""

    def decorate(family: C) -> C:
        _COMPOUND.update(dict.fromkeys(float_types, family))
        return family

    return decorate


def register_family(family: C) -> C:
    """Class decorator: the family quantizes modules of any type of which it says that they have such weights."""
    _OF_ANY_TYPE.append(family)
    return family


def added_slots(layer: QuantizedLayer) -> tuple[str, ...]:
    """The tensors of a layer that version 0.1 left float under every plan."""
    owner = layer.owner if isinstance(layer, CompoundWeight) else None
    if isinstance(owner, QuantizedCompound) and owner.is_new:
        return type(layer).slots
    return type(layer).added_slots


def compound_family(module: nn.Module) -> type[QuantizedCompound] | None:
    """The family of a module that holds several weights, quantized or not; None for every other module."""
    if isinstance(module, QuantizedCompound):
        return type(module)
    found = next((_COMPOUND[kind] for kind in type(module).__mro__ if kind in _COMPOUND), None)
    if found is not None or isinstance(module, torch.jit.ScriptModule):
        return found
    if not module._parameters or quantized_class(module) is not None:
        return found
    return next((family for family in _OF_ANY_TYPE if family.weights(module)), None)


def computes_inside(module: nn.Module) -> bool:
    """Returns whether a module, quantized or not, is one operation whose inside its family can compute."""
    family = compound_family(module)
    return family is not None and family.computes_inside


def compound_weights(module: nn.Module) -> dict[str, nn.Module]:
    """The weights of a module that holds several, by key: those with quantizers, and handles of the others.

    Raises:
        KeyError: a weight is no plain parameter; see `why_unsupported`.
    """
    family = compound_family(module)
    assert family is not None
    held: dict[str, nn.Module] = module._parts() if isinstance(module, QuantizedCompound) else {}  # type: ignore[assignment]
    return {weight.key: held.get(weight.key, weight) for weight in family.weights(module)}


def weight_key(name: str, layer: nn.Module) -> str:
    """Key of a layer's weight in the state dict of the model in which the plan calls the layer `name`."""
    if isinstance(layer, CompoundWeight):
        return f"{name.removesuffix(layer.key)}{layer.path}"
    return f"{name}.weight" if name else "weight"


def why_unsupported_compound(module: nn.Module) -> str | None:
    """Returns why a module with several weights cannot hold quantizers; None when it can."""
    family = compound_family(module)
    of_any_type = family is not None and not family.computes_inside and not isinstance(module, QuantizedCompound)
    if of_any_type and (taken := names_taken(module, swapped_compound(type(module)))):
        return f"its attributes {', '.join(taken)} have names that quantized modules use: rename them"
    for weight in family.weights(module) if family is not None else ():
        try:
            holder, name = weight.place()
        except AttributeError:
            return f"it has no {weight.path}"
        if holder._parameters.get(name) is None:
            return f"its {weight.path} is no plain parameter (weight_norm, spectral_norm, pruning, ...)"
    return None


def swapped_compound(kind: type[nn.Module]) -> type[QuantizedCompound]:
    """The class that a module of several weights is swapped to."""
    if kind not in _SWAPPED:
        families = (_COMPOUND[parent] for parent in kind.__mro__ if parent in _COMPOUND)
        family = next(families, None) or _OF_ANY_TYPE[0]
        content = {"float_class": kind, "input_positions": _positions(family, kind), "__module__": __name__}
        _SWAPPED[kind] = swapped_class((family,), kind, content)
    return _SWAPPED[kind]


def _positions(family: type[QuantizedCompound], kind: type[nn.Module]) -> dict[str, int]:
    """Returns the positions of the inputs among the arguments; a subclass may have another signature."""
    parameters = list(inspect.signature(kind.forward).parameters.values())[1:]
    names = [parameter.name for parameter in parameters]
    found = {name: names.index(name) for name in family.input_names if name in names}
    if found:
        return found
    passed_on = bool(parameters) and parameters[0].kind is inspect.Parameter.VAR_POSITIONAL
    return {name: index for index, name in enumerate(family.input_names[: None if passed_on else 1])}


def _rebuild(float_class: type[nn.Module]) -> nn.Module:
    kind = swapped_compound(float_class)
    return kind.__new__(kind)
