"""Survey of a model: the layers that can hold quantizers, and why others cannot."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from lq_plugin.intent.plan import LayerInfo
from lq_plugin.layers import (
    CONTAINER,
    OPERATIONS_CONTAINER,
    CompoundWeight,
    OwnWeight,
    class_before,
    compound_family,
    compound_weights,
    quantized_class,
    weight_of,
    why_unsupported,
    why_unsupported_compound,
)
from lq_plugin.layers.base import ShadowedForward
from lq_plugin.model.aside import set_aside
from lq_plugin.model.operations.quantized import OperationQuantizers
from lq_plugin.quantizers import SlotQuantizer

#: Modules that compute with their children's parameters without calling the children.
OPAQUE = (nn.MultiheadAttention,)
_NORMALIZATION = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass(frozen=True)
class Survey:
    """Layers of a model that can hold quantizers, and the reasons of others.

    Args:
        candidates: layers that can hold quantizers, by name; a module with several weights is one layer for each.
        reasons: other modules with parameters, and why they (or what is left of them) stay float.
        kinds: float types of all modules and layers.
        aside: modules that are no part of the model, see `lq_plugin.model.aside`; what is inside of them is in none of
            the others.
    """

    candidates: dict[str, nn.Module]
    reasons: dict[str, str]
    kinds: dict[str, str]
    aside: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, patterns: Iterable[str] = ()) -> Survey:
        """Looks at every module of `model`; quantizers in it are passed over.

        Args:
            model: any module.
            patterns: of a plan's rules, which may name what is no part of the model otherwise.
        """
        candidates: dict[str, nn.Module] = {}
        reasons: dict[str, str] = {}
        kinds: dict[str, str] = {}
        inside: tuple[str, ...] = ()
        aside = set_aside(model, patterns)
        for name, module in model.named_modules():
            if f"{name}.".startswith(inside):
                continue
            if isinstance(module, (SlotQuantizer, OperationQuantizers)):
                inside += (f"{name}.",)
                continue
            kinds[name] = float_class(module).__name__
            if name in aside:
                inside += (f"{name}.",)
                if next(module.parameters(), None) is not None:
                    reasons[name] = (
                        f"{aside[name]}, no part of the model; a rule that names it quantizes it: '{name}.*'"
                    )
                continue
            if (family := compound_family(module)) is not None:
                held = ("",) if isinstance(module, OPAQUE) else (f"{CONTAINER}.", f"{OPERATIONS_CONTAINER}.")
                inside += tuple(_join(name, part) for part in held)
                if reason := why_unsupported_compound(module):
                    reasons[name] = reason
                    continue
                weights = {_join(name, key): weight for key, weight in compound_weights(module).items()}
                candidates |= weights
                kinds |= dict.fromkeys(weights, kinds[name])
                shown = {id(weight.weight) for weight in weights.values()}
                if family.computes_inside or any(id(p) not in shown for p in module.parameters(recurse=False)):
                    reasons[name] = family.remark
                continue
            if quantized_class(module) is not None:
                if reason := why_unsupported(module):
                    reasons[name] = reason
                else:
                    candidates[name] = module
                    # What computes a weight is a part of the layer.
                    inside += (_join(name, "parametrizations.weight."),)
                continue
            if any(True for _ in module.parameters(recurse=False)):
                reasons[name] = (
                    "normalization" if isinstance(module, _NORMALIZATION) else "no quantized form of this layer type"
                )
        return cls(candidates, reasons, kinds, aside)

    def infos(self) -> list[LayerInfo]:
        """Facts that a plan must know of the candidates."""
        return [_info(name, module) for name, module in self.candidates.items()]

    def others(self) -> dict[str, str]:
        """Names and types of the modules that hold no quantizers."""
        return {name: kind for name, kind in self.kinds.items() if name not in self.candidates}


def _info(name: str, module: nn.Module) -> LayerInfo:
    types = tuple(
        kind.__name__ for kind in float_class(module).__mro__ if issubclass(kind, nn.Module) and kind is not nn.Module
    )
    quantized: Any = quantized_class(module)
    # Called on the float module: `canonical` uses nothing but attributes of the float class.
    plain = quantized.has_output_scale and getattr(module, "groups", 1) == 1
    plain = plain and not issubclass(quantized, ShadowedForward)
    reduction = quantized.canonical(module, weight_of(module)).shape[1]
    rows = module.matrix_rows() if isinstance(module, OwnWeight) else None
    return LayerInfo(name, types, reduction, quantized.slots, plain, quantized.input_axis, rows)


def float_class(module: nn.Module) -> type[nn.Module]:
    """Returns the type the user gave a module, quantized or parametrized or not; for a weight that of its module."""
    if isinstance(module, CompoundWeight):
        module = module.owner
    kind = class_before(module)
    return getattr(kind, "float_class", kind)


def input_owner(name: str, module: nn.Module) -> str:
    """The layer whose input quantizer this layer's input goes through: itself, or another weight of the same module."""
    if isinstance(module, CompoundWeight) and module.input_of is not None:
        return name.removesuffix(module.key) + module.input_of
    return name


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key
