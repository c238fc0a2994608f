"""Finds the layers that meet in residual sums, from a recorded pass."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from lq_plugin.model.graph.recording import Call, Recording

#: The word in `Space.tie`.
RESIDUAL = "residual"
#: Operations that pass values on, one by one or averaged, by the beginning of their names without underscores:
#: `BatchNorm2d`, `batch_norm`.
_PASSING = (
    "batchnorm", "syncbatchnorm", "instancenorm", "layernorm", "groupnorm", "rmsnorm", "maxpool", "avgpool",
    "adaptivemaxpool",
    "adaptiveavgpool", "dropout", "alphadropout", "featuredropout", "identity", "flatten", "pad", "zeropad", "mean",
)  # fmt: skip
#: Operations that pass values on where the other operand is a parameter or a number: embeddings, layer scales.
_AFFINE = ("add", "sub", "mul", "div", "truediv")
#: Activations that mix their inputs.
_MIXING = ("softmax", "logsoftmax", "softmin", "glu")


@dataclass(frozen=True)
class ResidualTies:
    """Layers that belong together, by name; each is in at most one group.

    Args:
        weight: layers whose outputs meet in a sum, or in sums that are operands of one another.
        input: layers that read the same sum.
    """

    weight: tuple[tuple[str, ...], ...]
    input: tuple[tuple[str, ...], ...]

    def group_of(self, layer: str, slot: str) -> str | None:
        """Returns the name of the group that ties this tensor, or None."""
        groups = {"weight": self.weight, "input": self.input}.get(slot, ())
        return next((f"{RESIDUAL}:{group[0]}" for group in groups if layer in group), None)


def residual_ties(recording: Recording, layers: Collection[str]) -> ResidualTies:
    """Returns the layers that feed each sum of two activations, and the layers that read it.

    Between a layer and a sum there may be norms, pointwise activations, pooling, dropout, padding, views, and products
    and sums with parameters. A sum that is an operand of another one brings its own layers along: the blocks of a
    stage, with identity shortcuts, are one group.

    Args:
        recording: of one float forward pass.
        layers: names of those that can be tied.
    """
    search = _Search(recording, layers)
    sums = [call for call in recording.calls if _is_sum(call)]
    return ResidualTies(
        _united((search.feeding[call.position] for call in sums), layers),
        _united((search.reading(call) for call in sums), layers),
    )


class _Search:
    def __init__(self, recording: Recording, layers: Collection[str]) -> None:
        self.recording, self.layers = recording, layers
        #: Layers whose output the result of a call is, or a part of it, by the call's position.
        self.feeding: dict[int, frozenset[str]] = {}
        # In order: what a call reads is known when it comes.
        for call in recording.calls:
            self.feeding[call.position] = frozenset(self._outcome(call))

    def _outcome(self, call: Call) -> Iterator[str]:
        if own := [name for name in _writers(call) if name in self.layers]:
            yield from own
        elif _is_sum(call) or _passes(call):
            for source in call.inputs:
                if source.producer is not None:
                    yield from self.feeding[source.producer]

    def reading(self, call: Call) -> frozenset[str]:
        """Returns the layers that read the output of a call, up to the next sum."""
        found: set[str] = set()
        for reader in self.recording.consumers_of(call):
            if own := [name for name in _readers(reader) if name in self.layers]:
                found.update(own)
            elif _passes(reader):
                found |= self.reading(reader)
        return frozenset(found)


def _is_sum(call: Call) -> bool:
    """Returns whether two activations are added."""
    return call.kind in ("functional", "other") and call.op == "add" and _activations(call) == 2


def _activations(call: Call) -> int:
    return sum(not source.parameters for source in call.inputs)


def _passes(call: Call) -> bool:
    name = call.op.lower().replace("_", "")
    if call.kind != "module" and name in _AFFINE:
        return _activations(call) == 1
    return name.startswith(_PASSING) or (call.is_activation and name not in _MIXING)


def _writers(call: Call) -> list[str]:
    """Returns the layer whose output a call is; of attention also its last projection."""
    return (
        [call.name, *(name for name in call.weight_names if name.endswith("out_proj"))] if call.kind == "module" else []
    )


def _readers(call: Call) -> list[str]:
    """Returns the layers that read the input of a call; of attention also its first projections."""
    inner = (
        [name for name in call.weight_names if not name.endswith("out_proj")] if call.op == "MultiheadAttention" else []
    )
    return [call.name, *inner] if call.kind == "module" else []


def _united(groups: Iterable[frozenset[str]], order: Collection[str]) -> tuple[tuple[str, ...], ...]:
    """Returns the groups of two or more layers; groups with a member in common are joined."""
    found: list[frozenset[str]] = []
    for group in groups:
        meeting = [other for other in found if other & group]
        found = [other for other in found if not other & group] + [group.union(*meeting)]
    ranks = {name: rank for rank, name in enumerate(order)}
    return tuple(
        sorted(
            (tuple(sorted(group, key=ranks.__getitem__)) for group in found if len(group) > 1),
            key=lambda g: ranks[g[0]],
        )
    )
