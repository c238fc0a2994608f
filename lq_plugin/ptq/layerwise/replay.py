"""Inputs of one part of a model, with everything before it computed once.

The parts of a model that are done keep their outputs in a cache; when the model runs again, they hand these out
instead of computing. What lies between them (additions, activation functions) is computed anew, so any forward of
any model works. A module whose parts are all done is itself one that is done, and its output replaces theirs. Outputs
that only modules read which are done themselves, in the recorded pass, wait on disk and are not fetched for nothing:
what is held does not grow with the number of layers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from lq_plugin.model.graph.recording import Recording
from lq_plugin.ptq.layerwise.activation_cache import ActivationCache
from lq_plugin.ptq.layerwise.unread import Unread, outer_names, unread_modules, values_of
from lq_plugin.ptq.reconstruction.samples import copied
from lq_plugin.utilities.hooks import StandIn

#: One call of a module: positional and keyword arguments.
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
#: Kind of the replay, name of the module, numbers of the batch and of the call.
_Key = tuple[str, str, int, int]


class Replay:
    """Runs a model up to one module, skipping what is done.

    Args:
        model: the model that `run` runs.
        run: one forward pass on a batch.
        cache: where outputs and batches are kept; shared by several replays.
        kind: `"float"` or `"quantized"`, the part of the cache that is this replay's own.
        layers: names of the layers that get done one after another.
        recording: of a pass of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        run: Callable[[Any], Any],
        cache: ActivationCache,
        kind: str,
        layers: Collection[str],
        recording: Recording,
    ) -> None:
        self.model, self.run, self.cache, self.kind, self.recording = model, run, cache, kind, recording
        self.modules = dict(model.named_modules())
        #: Layers in each module that has any.
        self.inside = {
            name: {layer for layer in layers if _is_within(layer, name)}
            for name, module in self.modules.items()
            if name and type(module).forward is not nn.Module.forward  # a list of modules has no output
        }
        self.inside = {name: found for name, found in self.inside.items() if found}
        self.done: set[str] = set()
        self._finished: set[str] = set()
        self._outermost: set[str] = set()
        #: Keys of the outputs in the cache, by batch.
        self._kept: dict[int, set[_Key]] = {}
        #: What stands for those that nothing is expected to read any more.
        self._unread: dict[_Key, Any] = {}

    def finish(self, layers: Collection[str]) -> None:
        """Marks layers that will not change any more."""
        self.done |= set(layers)
        self._finished = {name for name, found in self.inside.items() if found <= self.done}
        self._outermost = {
            name for name in self._finished if not any(outer in self._finished for outer in outer_names(name)[:-1])
        }
        keys = {key for keys in self._kept.values() for key in keys}
        # One that has just been finished runs once more, and reads what is in front of it.
        unread = unread_modules(self.recording, self._outermost & {key[1] for key in keys})
        for key in keys - self._unread.keys():
            if key[1] in unread:
                self._put_away(key)

    def _put_away(self, key: _Key) -> None:
        """Moves an output to disk."""
        output = self.cache.get(key)
        self.cache.put(key, output, on_disk=True)
        leaves, structure = tree_flatten(output)

        def fetch(index: int) -> Callable[[], Any]:
            return lambda: tree_leaves(self.cache.get(key))[index]

        self._unread[key] = tree_unflatten(
            [
                Unread(leaf, leaf.device, fetch(index)) if isinstance(leaf, Tensor) else leaf
                for index, leaf in enumerate(leaves)
            ],
            structure,
        )

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
        self._keep((self.kind, name, batch, call), output)

    def _keep(self, key: _Key, output: Any) -> None:
        self.cache.put(key, output)
        self._kept.setdefault(key[2], set()).add(key)

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
                    given = values_of((args, kwargs))
                    captured.append(given if calls == 1 else tree_map(copied, given))
                    if len(captured) == calls:
                        raise _ReachedError
                    return original(*args, **kwargs)
                key = (self.kind, name, batch, call)
                if key in self._unread:
                    return tree_map(lambda leaf: leaf.again() if isinstance(leaf, Unread) else leaf, self._unread[key])
                if key in self.cache:
                    return self.cache.get(key)
                output = original(*args, **kwargs)
                if name in self._outermost:
                    self._keep(key, output)
                return output

            replaced.append((module, module.__dict__.get("forward")))
            module.__dict__["forward"] = StandIn(original, forward)

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
        mine = self._kept.setdefault(batch, set())
        held = {key[1] for key in mine}
        for key in [key for key in mine if any(outer in held for outer in outer_names(key[1])[:-1])]:
            self.cache.drop(key)
            self._unread.pop(key, None)
            mine.remove(key)


class _ReachedError(BaseException):
    """Ends a forward pass at the wanted module; no `Exception`, which the model might catch."""


def _is_within(name: str, outer: str) -> bool:
    return name == outer or name.startswith(f"{outer}.")
