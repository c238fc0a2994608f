"""Modules that hold several weights: LSTM, GRU, RNN, multi-head attention.

To the plan, each weight of such a module is a layer: `lstm.weight_ih_l0`, `attention.in_proj_weight`. The module keeps
its parameters under their keys; it gains one submodule, `quantized_weights`, with the quantizers of each weight. Its
forward is the float class's own, run while the quantized weights stand in for the parameters.

What happens inside torch's kernel stays float: the hidden state between time steps and between layers, the gates,
attention scores and probabilities, and biases.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar, cast

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lq_plugin.layers.base import QuantizedLayer
from lq_plugin.layers.registry import register_layer
from lq_plugin.layers.swapped_class import swapped_class

#: The submodule that holds the quantizers of each weight.
CONTAINER = "quantized_weights"

_COMPOUND: dict[type[nn.Module], type[QuantizedCompound]] = {}
_SWAPPED: dict[type[nn.Module], type[QuantizedCompound]] = {}


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

    def enter_owner(self) -> None:
        """Make the owner compute with this weight's quantizers."""
        owner = self.owner
        if not isinstance(owner, QuantizedCompound):
            owner.__class__ = swapped_compound(type(owner))
            owner.add_module(CONTAINER, nn.ModuleDict().train(owner.training))
        container = cast(nn.ModuleDict, getattr(owner, CONTAINER))
        container[self.key] = self

    def leave_owner(self) -> None:
        """Undo `enter_owner`; the owner is of its float class again once the last weight has left."""
        owner = cast(QuantizedCompound, self.owner)
        container = cast(nn.ModuleDict, getattr(owner, CONTAINER))
        del container[self.key]
        if not container:
            delattr(owner, CONTAINER)
            cast(nn.Module, owner).__class__ = type(owner).float_class


class InputWeight(CompoundWeight):
    """A weight that multiplies an input of the module, which can be quantized."""


class InnerWeight(CompoundWeight):
    """A weight that multiplies what the module computes inside, which stays float."""


class _QuantizedWeight(QuantizedLayer):
    def channels(self) -> tuple[int, int]:
        return self.weight.shape[1], self.weight.shape[0]


@register_layer(InputWeight)
class QuantizedInputWeight(_QuantizedWeight, InputWeight):
    float_class = InputWeight
    slots = ("weight", "input")


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

    @staticmethod
    def weights(module: nn.Module) -> list[CompoundWeight]:
        """All weights of a module of the float class."""
        raise NotImplementedError

    @staticmethod
    def key_of(module: nn.Module, name: str) -> str:
        """Key of the weight whose quantizer an input goes through."""
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        arguments = self._quantized_inputs(args, kwargs)
        shadowed: list[tuple[nn.Module, str]] = []
        try:
            for part in self._parts().values():
                if part.weight_quantizer is not None:
                    holder, name = cast(CompoundWeight, part).place()
                    # In the instance's `__dict__`, which Python looks at before `nn.Module.__getattr__`.
                    holder.__dict__[name] = part.quantized_weight()
                    shadowed.append((holder, name))
            return self.run(*arguments[0], **arguments[1])
        finally:
            for holder, name in shadowed:
                del holder.__dict__[name]

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The float class's forward; the parameters are the quantized ones now."""
        return type(self).float_class.forward(self, *args, **kwargs)

    def _parts(self) -> dict[str, QuantizedLayer]:
        found: dict[str, QuantizedLayer] = cast(Any, getattr(self, CONTAINER))._modules
        return found

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


def compound_family(module: nn.Module) -> type[QuantizedCompound] | None:
    """The family of a module that holds several weights, quantized or not; None for every other module."""
    if isinstance(module, QuantizedCompound):
        return type(module)
    return next((_COMPOUND[kind] for kind in type(module).__mro__ if kind in _COMPOUND), None)


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
        family = next(_COMPOUND[parent] for parent in kind.__mro__ if parent in _COMPOUND)
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
