"""Inputs of one part of a model, with everything before it computed once.

The parts of a model that are done keep their outputs in a cache; when the model runs again, they hand these out
instead of computing. What lies between them (additions, activation functions) is computed anew, so any forward of
any model works. A module whose parts are all done is itself one that is done, and its output replaces theirs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from lq_plugin.ptq.layerwise.activation_cache import ActivationCache
from lq_plugin.ptq.reconstruction.samples import copied

#: One call of a module: positional and keyword arguments.
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Replay:
    """Runs a model up to one module, skipping what is done.

    Args:
        model: the model that `run` runs.
        run: one forward pass on a batch.
        cache: where outputs and batches are kept; shared by several replays.
        kind: `"float"` or `"quantized"`, the part of the cache that is this replay's own.
        layers: names of the layers that get done one after another.
    """

    def __init__(
        self, model: nn.Module, run: Callable[[Any], Any], cache: ActivationCache, kind: str, layers: Collection[str]
    ) -> None:
        self.model, self.run, self.cache, self.kind = model, run, cache, kind
        self.modules = dict(model.named_modules())
        #: Layers in each module that has any.
        self.inside = {name: {layer for layer in layers if _is_within(layer, name)} for name in self.modules if name}
        self.inside = {name: found for name, found in self.inside.items() if found}
        self.done: set[str] = set()
        self._finished: set[str] = set()
        self._outermost: set[str] = set()

    def finish(self, layers: Collection[str]) -> None:
        """Marks layers that will not change any more."""
        self.done |= set(layers)
        self._finished = {name for name, found in self.inside.items() if found <= self.done}
        self._outermost = {
            name for name in self._finished if not any(outer in self._finished for outer in _outer_names(name))
        }

    def inputs_of(self, name: str, batch: int, calls: int) -> list[Arguments]:
        """Returns the arguments of a module's first calls on one batch.

        Args:
            name: of the module.
            batch: number of the batch.
            calls: how many calls; fewer come back when the module is called less often.
        """
        captured: list[Arguments] = []
        with torch.no_grad(), self._skipping(name, batch, calls, captured), suppress(_ReachedError):
            self.run(self.cache.get(("batch", batch)))
        self._drop_inner(batch)
        return captured

    def run_through(self, batch: int) -> None:
        """Runs the model on one batch, skipping what is done.

        Args:
            batch: number of the batch.
        """
        with torch.no_grad(), self._skipping(None, batch, 0, []):
            self.run(self.cache.get(("batch", batch)))
        self._drop_inner(batch)

    def keep_output(self, name: str, batch: int, call: int, output: Any) -> None:
        """Keeps an output that was computed outside; it is used once the module is done.

        Args:
            name: of the module.
            batch, call: numbers of the batch and of the module's call on it.
            output: of the call.
        """
        self.cache.put((self.kind, name, batch, call), output)

    @contextmanager
    def _skipping(self, target: str | None, batch: int, calls: int, captured: list[Arguments]) -> Iterator[None]:
        counts: Counter[str] = Counter()
        replaced = []

        def intercept(name: str, module: nn.Module) -> None:
            original = module.forward

            def forward(*args: Any, **kwargs: Any) -> Any:
                call = counts[name]
                counts[name] += 1
                if name == target:
                    captured.append((args, kwargs) if calls == 1 else tree_map(copied, (args, kwargs)))
                    if len(captured) == calls:
                        raise _ReachedError
                    return original(*args, **kwargs)
                key = (self.kind, name, batch, call)
                if key in self.cache:
                    return self.cache.get(key)
                output = original(*args, **kwargs)
                if name in self._outermost:
                    self.cache.put(key, output)
                return output

            replaced.append((module, module.__dict__.get("forward")))
            module.__dict__["forward"] = forward

        for name in {*self._finished, *([] if target is None else [target])}:
            intercept(name, self.modules[name])
        try:
            yield
        finally:
            for module, before in replaced:
                if before is None:
                    del module.__dict__["forward"]
                else:
                    module.__dict__["forward"] = before

    def _drop_inner(self, batch: int) -> None:
        """Drops outputs of modules inside a module whose own output is cached."""
        mine = [key for key in self.cache if key[0] == self.kind and key[2] == batch]
        held = {key[1] for key in mine}
        for key in mine:
            if any(outer in held for outer in _outer_names(key[1])):
                self.cache.drop(key)


class _ReachedError(BaseException):
    """Ends a forward pass at the wanted module; no `Exception`, which the model might catch."""


def _is_within(name: str, outer: str) -> bool:
    return name == outer or name.startswith(f"{outer}.")


def _outer_names(name: str) -> list[str]:
    """`"a.b.c"` -> `["a", "a.b"]`."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]
