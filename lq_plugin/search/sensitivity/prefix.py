"""Computes the part of a network before the first changed layer once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lq_plugin.errors import QuantizationError
from lq_plugin.ptq.layerwise.activation_cache import tree_bytes
from lq_plugin.utilities.hooks import StandIn

#: Bytes of layer outputs that are kept.
BUDGET = 2**30


class PrefixCache:
    """Keeps the outputs of each layer for one batch, and replays them until the first layer that has changed.

    Every call before that one is bit-identical, so nothing is approximated. What lies between the layers (activations,
    normalization, sums) is computed again. Layers that are not called as modules, such as the weights of an LSTM, have
    no prefix: a pass with one of them changed is computed whole.

    Args:
        layers: by name; evaluation mode.
        budget: bytes that may be kept; calls after that have to be computed.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    >>> cache = PrefixCache({"0": net[0], "2": net[2]})
    >>> with torch.no_grad(), cache.recording():
    ...     y = net(torch.ones(1, 4))
    >>> with torch.no_grad(), cache.replaying(["2"]):  # the recorded batch goes on from layer 0, whatever the input
    ...     torch.equal(net(torch.zeros(1, 4)), y)
    True
    """

    def __init__(self, layers: Mapping[str, nn.Module], budget: int = BUDGET) -> None:
        self.layers, self.budget = dict(layers), budget
        self._names: list[str] = []
        self._outputs: list[Any] = []
        self._bytes = 0

    @contextmanager
    def recording(self) -> Iterator[None]:
        """A context that forgets the last batch and keeps the layers' outputs for the one that runs inside."""
        self._names, self._outputs, self._bytes = [], [], 0

        def record(name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            # Without a gap: a pass is replayed from its beginning on.
            if len(self._outputs) == len(self._names) and self._bytes + tree_bytes(output) <= self.budget:
                self._outputs.append(_copy(output))
                self._bytes += tree_bytes(output)
            self._names.append(name)
            return output

        with self._in_place_of_forward(record):
            yield

    @contextmanager
    def replaying(self, changed: Iterable[str]) -> Iterator[None]:
        """A context to run the recorded batch again; layers called before the first of `changed` are not computed.

        Raises:
            QuantizationError: when the layers are called in another order than before.
        """
        changed = set(changed)
        known = changed <= set(self._names)
        first = next((i for i, name in enumerate(self._names) if name in changed), 0) if known else 0
        stop, position = min(first, len(self._outputs)), 0

        def replay(name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            nonlocal position
            here, position = position, position + 1
            if here >= stop:
                return forward(*args, **kwargs)
            if name != self._names[here]:
                raise QuantizationError(
                    f"call {here} is of {name}, it was of {self._names[here]}: the model is not deterministic"
                )
            return _copy(self._outputs[here])

        with self._in_place_of_forward(replay):
            yield

    @contextmanager
    def _in_place_of_forward(self, stand_in: Callable[..., Any]) -> Iterator[None]:
        before = {name: layer.__dict__.get("forward") for name, layer in self.layers.items()}
        for name, layer in self.layers.items():
            layer.__dict__["forward"] = StandIn(layer.forward, partial(stand_in, name, layer.forward))
        try:
            yield
        finally:
            for name, layer in self.layers.items():
                del layer.__dict__["forward"]
                if before[name] is not None:
                    layer.__dict__["forward"] = before[name]


def _copy(output: Any) -> Any:
    """Returns a copy, because models write into the outputs of layers (`ReLU(inplace=True)`)."""
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, output)
