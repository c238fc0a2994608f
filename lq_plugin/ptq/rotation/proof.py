"""Tensors of a pass that a right rotation leaves as they are, compared before and after it.

What the run returns alone proves little: a validation step returns nothing, or a loss that wrong heads barely move. So
the layers are compared also that read what is rotated, where the rotation has to be undone: the readers of a
stream's norms, the output projection of heads, and the last linear layer of the pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lq_plugin.model.graph.record import Recording
from lq_plugin.model.graph.tensor_identity import tensors_of
from lq_plugin.ptq.rotation.heads import HeadPair
from lq_plugin.ptq.rotation.streams import Stream, is_linear
from lq_plugin.utilities import hooks

#: How far, relative to their norm, tensors may move by rounding; a wrong rotation moves them by about 1.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
_HALF_TOLERANCE = 5e-2


@dataclass(frozen=True)
class Seen:
    """Floating-point tensors of one pass, copied.

    Args:
        returned: what the run returned.
        layers: outputs of the layers that were watched, by qualified name, in the order of their calls.
    """

    returned: list[Tensor]
    layers: dict[str, list[Tensor]]

    def holds_proof(self, part: Stream | HeadPair) -> bool:
        """Returns whether it shows a wrong rotation of a part: by layers that undo it, or by more than scalars."""
        return any(tensor.numel() > 1 for tensor in self.returned) or any(
            self.layers.get(name) for name in _undoing(part)
        )

    def change(self, after: Seen) -> float:
        """Returns the largest relative distance ‖y' - y‖ / ‖y‖ of a tensor; Inf where NaN and Inf are others.

        Raises:
            ValueError: a pass returned or computed more tensors than the other.
        """
        return max((_distance(a, b) for a, b in zip(self._tensors(), after._tensors(), strict=True)), default=0.0)

    def tolerance(self) -> float:
        """Returns the change that rounding may make in the narrowest dtype among the tensors."""
        return max((_TOLERANCE.get(tensor.dtype, _HALF_TOLERANCE) for tensor in self._tensors()), default=0.0)

    def _tensors(self) -> list[Tensor]:
        return [*self.returned, *(tensor for tensors in self.layers.values() for tensor in tensors)]


def watched_layers(model: nn.Module, recording: Recording, parts: Iterable[Stream | HeadPair]) -> list[str]:
    """Returns the layers whose output stays if the rotations of all parts are right.

    Args:
        model: that was recorded.
        recording: of one float pass.
        parts: that are going to be rotated.
    """
    parts = list(parts)
    modules = dict(model.named_modules())
    linear = [call.name for call in recording.calls if call.kind == "module" and is_linear(modules.get(call.name))]
    names = [*(name for part in parts for name in _undoing(part)), *linear[-1:]]
    turned = {name for part in parts for name in (part.writers if isinstance(part, Stream) else (part.value,))}
    return [name for name in dict.fromkeys(names) if name not in turned]


def watch(model: nn.Module, names: Iterable[str], run: Callable[[], Any]) -> Seen:
    """Runs the model and returns what it returned and what the layers returned.

    Args:
        model: whose layers are watched.
        names: of the layers.
        run: runs the model on the batch.
    """
    layers: dict[str, list[Tensor]] = {name: [] for name in names}

    def see(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        layers[name] += _copies(output)

    handles = []
    try:
        for name in layers:
            handles.append(hooks.after(model.get_submodule(name), partial(see, name)))
        return Seen(_copies(run()), layers)
    finally:
        for handle in handles:
            handle.remove()


def _distance(before: Tensor, after: Tensor) -> float:
    finite = before.isfinite()
    if before.shape != after.shape or not torch.equal(finite, after.isfinite()):
        return float("inf")
    if not torch.equal(before[~finite].nan_to_num(nan=0.0), after[~finite].nan_to_num(nan=0.0)):
        return float("inf")
    a, b = before[finite].double(), after[finite].double()
    size, distance = float(a.norm()), float((a - b).norm())
    return distance / size if size else distance


def _undoing(part: Stream | HeadPair) -> list[str]:
    """Returns the layers whose weights undo the rotation of their input."""
    if isinstance(part, HeadPair):
        return [part.output]
    return [name for _, readers in part.norms for name in readers if name not in part.writers]


def _copies(value: Any) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors_of(value) if tensor.is_floating_point()]
