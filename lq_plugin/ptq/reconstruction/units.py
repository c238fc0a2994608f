"""Units of reconstruction: a layer with what follows it, or a whole block.

The weights of an LSTM or of an attention have no output of their own and are learned together. Blocks are found by what
a recorded pass shows: the innermost modules that add two activations of their own (residual connections: ResNet blocks,
transformer layers) and hold at least two quantized layers. Where the sum is in a module of its own, or in one with the
last layer before it (BERT), a block is what holds the sum and the layers around which the connection leads, and all
such connections that follow each other in one module: attention and feed-forward. Layers outside of blocks stay units
by themselves.

Reference: Li et al., "BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction", ICLR 2021
(arXiv 2102.05426), section 3.2, where the residual or transformer block is the best unit.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from lq_plugin.errors import QuantizationError, did_you_mean, raise_all
from lq_plugin.layers import CompoundWeight
from lq_plugin.model.graph.recording import Call, Recording
from lq_plugin.model.prepare import quantized_layers

#: Activation functions that can follow a layer in its loss, by the name of the function.
_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu, "relu6": F.relu6, "gelu": F.gelu, "silu": F.silu, "mish": F.mish, "tanh": torch.tanh,
    "sigmoid": torch.sigmoid, "hardswish": F.hardswish, "hardsigmoid": F.hardsigmoid, "elu": F.elu, "selu": F.selu,
}  # fmt: skip


@dataclass(frozen=True)
class Unit:
    """One part of a model that is reconstructed as a whole.


    Args:
        name: of the module.
        layers: the quantized layers in it, by name.
        tail: what follows and belongs into the loss: names of modules, or of functions.
    """

    name: str
    layers: tuple[str, ...]
    tail: tuple[Call, ...] = ()

    def finish(self, model: nn.Module, output: Any) -> Any:
        """The unit's output with its tail."""
        for call in self.tail:
            output = model.get_submodule(call.name)(output) if call.kind == "module" else _FUNCTIONS[call.op](output)
        return output

    def __str__(self) -> str:
        return " + ".join([self.name, *(call.op for call in self.tail)])


def find_units(
    model: nn.Module, recording: Recording, by: str | Sequence[str] = "block"
) -> tuple[list[Unit], list[str]]:
    """The units of a prepared model in the order in which they run.

    Args:
        model: prepared and recorded.
        recording: of one forward pass.
        by: `"layer"`, `"block"`, or patterns of the names of modules that are a block each (`["encoder.layers.*"]`).

    Returns:
        `(units, layers that were never called)`.

    Raises:
        QuantizationError: patterns that match no module with quantized layers.
    """
    # By layer: the module that is called for it.
    owners = {
        name: name if (owner := owner_name(model, layer)) is None else owner
        for name, layer in quantized_layers(model)
        if layer.weight_quantizer is not None
    }
    first = {call.name: call.position for call in reversed(recording.calls) if call.kind == "module"}
    first |= {
        call.name.rpartition(".")[0]: call.position for call in reversed(recording.calls) if call.kind == "weight"
    }
    called = [name for name, owner in owners.items() if owner in first]
    if by == "layer":
        roots = []
    elif by == "block":
        roots = _residual_blocks(recording, called)
    elif isinstance(by, str):
        raise QuantizationError(f"units are found by 'layer', by 'block' or by a list of patterns, got {by!r}")
    else:
        roots = _matching(model, called, by)
    units = []
    for root in roots:
        units.append(Unit(root, tuple(name for name in called if _within(name, root))))
    inside = {name for unit in units for name in unit.layers}
    for owner in dict.fromkeys(owners[name] for name in called if name not in inside):
        together = tuple(name for name in called if owners[name] == owner)
        units.append(Unit(owner, together, _tail(model, recording, owner) if together == (owner,) else ()))
    units.sort(key=lambda unit: min(first[owners[name]] for name in unit.layers))
    return units, [name for name in owners if name not in called]


def owner_name(model: nn.Module, layer: nn.Module) -> str | None:
    """Name of the module that a weight belongs to, of an LSTM, say; None for a layer that is a module of its own."""
    owner = layer.owner if isinstance(layer, CompoundWeight) else None
    return (
        next((name for name, module in model.named_modules() if module is owner), None) if owner is not None else None
    )


def _residual_blocks(recording: Recording, layers: list[str]) -> list[str]:
    """Returns the innermost modules that add, and those around sums whose own module has one layer or none."""
    adding: set[str] = set()
    #: Layers that each sum's connection leads around, by the module that holds them and the sum.
    around: dict[str, list[frozenset[str]]] = {}
    for owner, between in _sums(recording, layers):
        if sum(_within(name, owner) for name in layers) > 1:
            adding.add(owner)
        elif between:
            while owner and not all(_within(name, owner) for name in between):
                owner = owner.rpartition(".")[0]
            around.setdefault(owner, []).append(between)
    found = {owner for owner in adding if owner and not any(_is_inside(other, owner) for other in adding)}
    whole = set()
    for root, own in around.items():
        inner = [names for other in around if _is_inside(other, root) for names in around[other]]
        held = frozenset(name for name in layers if _within(name, root))
        if (
            root
            and len(held) > 1
            # A module with more than its connections is more than a block, as is one with a connection around others.
            and held == frozenset().union(*own, *inner)
            and not any(names < around_it for names in inner for around_it in own)
            and not any(_within(other, root) or _within(root, other) for other in found)
        ):
            whole.add(root)
    return sorted(found | {root for root in whole if not any(_is_inside(root, other) for other in whole)})


def _sums(recording: Recording, layers: list[str]) -> Iterator[tuple[str, frozenset[str]]]:
    """Yields the module of each sum of activations, and the layers on the ways to it from the last call before both.

    There are none where nothing is before both. What has no layer on these ways (rotary embeddings) is left out.
    """
    # Calls before each call, as bits.
    before: list[int] = []
    for call in recording.calls:
        known = [source.producer for source in call.inputs if source.producer is not None]
        before.append(functools.reduce(operator.or_, (before[producer] | 1 << producer for producer in known), 0))
    places = [(name, call.position) for name in layers for call in recording.calls_of(name)]
    for call in recording.functional_calls:
        if call.op not in ("add", "iadd"):
            continue
        operands = [0 if s.producer is None else before[s.producer] | 1 << s.producer for s in call.inputs]
        fork = functools.reduce(operator.and_, operands).bit_length() - 1
        between = frozenset(
            name for name, at in places if fork >= 0 and before[call.position] >> at & 1 and before[at] >> fork & 1
        )
        if between or fork < 0:
            yield call.name.rpartition(".")[0], between


def _matching(model: nn.Module, layers: list[str], patterns: Sequence[str]) -> list[str]:
    modules = [name for name, _ in model.named_modules() if name and any(_within(layer, name) for layer in layers)]
    faults = [
        f"{p!r}.{did_you_mean(p, modules)}" for p in patterns if not any(fnmatchcase(name, p) for name in modules)
    ]
    raise_all(QuantizationError, "no module with quantized layers matches", faults)
    found = [name for name in modules if any(fnmatchcase(name, pattern) for pattern in patterns)]
    return [name for name in found if not any(other != name and _within(name, other) for other in found)]


def _tail(model: nn.Module, recording: Recording, name: str) -> tuple[Call, ...]:
    """Returns the batch norm and activation function after a layer, where each alone reads what is before it."""
    if len(recording.calls_of(name)) != 1:
        return ()
    tail: list[Call] = []
    while len(tail) < 2:
        readers = recording.consumers_of(tail[-1] if tail else recording.calls_of(name)[0])
        if len(readers) != 1 or len(recording.calls_of(readers[0].name)) != 1:
            break
        (reader,) = readers
        module = model.get_submodule(reader.name) if reader.kind == "module" else None
        norm = isinstance(module, _BatchNorm) and not tail
        activation = reader.is_activation and (module is not None or reader.op in _FUNCTIONS)
        if not (norm or activation) or "softmax" in reader.op.lower():
            break
        tail.append(reader)
        if activation:
            break
    return tuple(tail)


def _within(name: str, outer: str) -> bool:
    return name == outer or _is_inside(name, outer)


def _is_inside(name: str, outer: str) -> bool:
    return name.startswith(f"{outer}.")
