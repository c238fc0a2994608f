"""Inputs of the layers in the float model, taken before any weight is rounded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from lq_plugin.errors import CalibrationError
from lq_plugin.ptq.layerwise.activation_cache import ActivationCache
from lq_plugin.utilities import hooks

_KIND = "float input"


class FloatInputs:
    """The first argument of each call of some layers, by batch, in a cache.

    Args:
        model: that the layers are in.
        layers: names of them.
        cache: keeps the inputs, on disk what is beyond its budget.
    """

    def __init__(self, model: nn.Module, layers: Collection[str], cache: ActivationCache) -> None:
        self.model, self.layers, self.cache = model, layers, cache

    @contextmanager
    def watching(self, batch: int) -> Iterator[None]:
        """Keeps what the layers are called with inside, as of this batch."""
        calls: Counter[str] = Counter()

        def keep(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                self.cache.put((_KIND, name, batch, calls[name]), args[0] if args else next(iter(kwargs.values())))
                calls[name] += 1

            return hook

        with ExitStack() as stack:
            for name in self.layers:
                layer = self.model.get_submodule(name)
                stack.callback(hooks.before(layer, keep(name), with_kwargs=True).remove)
            yield

    def take(self, name: str, batch: int, call: int, like: Tensor) -> Tensor:
        """Returns an input and drops it from the cache.

        Args:
            name: of the layer.
            batch, call: numbers of the batch and of the layer's call on it.
            like: the quantized model's input of the same call.

        Raises:
            CalibrationError: the float model did not make this call, or gave the layer an input of another shape.
        """
        key = (_KIND, name, batch, call)
        x: Tensor | None = self.cache.get(key) if key in self.cache else None
        if x is None or x.shape != like.shape:
            was = "makes no such call" if x is None else f"gives it {list(x.shape)}"
            raise CalibrationError(
                f"asymmetric GPTQ of {name!r}: in call {call} on batch {batch} its input is {list(like.shape)}, the "
                f"float model {was}; the way through the model depends on its values, leave asymmetric away"
            )
        self.cache.drop(key)
        return x
