"""Snapshots of Python state, restored after other people's code has run: lists, counters, caches, metrics.

`state_kept(module)` looks at what can be reached from the module before the code runs, and puts it back afterwards:

* attributes of modules (torchmetrics' among them), of the objects they hold, with `__dict__` or `__slots__`, and of
  their classes;
* lists, dicts, sets, deques and what is in them; registered buffers, tensors and arrays, those written to in place
  included;
* generators of torch, numpy and `random`; positions of files that are read; iterators, which give what they gave once
  more.

Everything keeps its identity, and what has not changed is not touched. Parameters, statistics of batch norms,
quantizers and submodules stay as the code left them: calibration changes these on purpose. So do objects that hold more
than values: those of the standard library, of torch and Lightning (Trainers, loggers, optimizers, loader processes), of
experiment trackers, and global variables. Not entered are the elements of containers with more than 10,000; beyond
`MOST` objects, those nearest to the module first, a warning says that the others stay as they are left. Writes through
`.data` go unseen.
"""

from __future__ import annotations

import functools
import operator
import sys
import types
import warnings
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lq_plugin.model.graph.tensor_identity import storage_of, version_of
from lq_plugin.model.rewind import Recorded, Restore, is_read_once, rewinder
from lq_plugin.quantizers import SlotQuantizer

#: Elements of containers with more are data.
LARGE = 10_000
#: So many objects are looked at: a second or so.
MOST = 200_000

_NOTHING: Any = object()
_LEAVES = frozenset(
    (int, float, complex, bool, str, bytes, type(None), type, torch.dtype, torch.device, torch.Size, slice, range)
)
_CONTAINERS = (dict, list, set, tuple, frozenset, deque)
#: What `nn.Module` keeps of its own.
_STRUCTURE = frozenset(vars(nn.Module()))
#: What a class may keep for all its objects.
_CLASS_VALUES = (int, float, str, tuple, list, dict, set, deque, Tensor, type(None))

_VALUES_OF_STDLIB = frozenset(("builtins", "abc", "typing", "collections", "argparse", "types"))
_OPAQUE = (sys.stdlib_module_names - _VALUES_OF_STDLIB) | {
    "torch", "lightning", "lightning_fabric", "pytorch_lightning", "lq_plugin", "optuna",
    "aim", "clearml", "comet_ml", "dvclive", "mlflow", "neptune", "swanlab", "tensorboard", "tensorboardX", "trackio",
    "wandb",
}  # fmt: skip
_DATA_OF_TORCH = tuple(
    f"torch.utils.data.{name}" for name in ("dataset.", "sampler.", "distributed.", "dataloader.DataLoader")
)


class KeptState:
    """The Python state of some objects at this moment.

    Args:
        roots: modules, loaders, or whatever holds state.
        values: keep the values of tensors and arrays; without, only which ones there are.
    """

    def __init__(self, *roots: Any, values: bool = True) -> None:
        self.values = values
        self.iterators: dict[int, Recorded] = {}
        modules = [root for root in roots if isinstance(root, nn.Module)]
        # A view of a weight is the weight.
        self.weights = {storage_of(parameter)[0] for module in modules for parameter in module.parameters()}
        self._restores: list[Restore] = []
        self._unwraps: list[Restore] = []
        self._plain: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        seen: dict[int, Any] = {}
        waiting: deque[Any] = deque()
        for root in roots:
            # What is asked for is entered, whatever it is.
            waiting.extend(_attributes(root, self) if _is_opaque(root) and not isinstance(root, nn.Module) else [root])
        while waiting:
            value = waiting.popleft()
            kind: Any = type(value)
            if kind in _LEAVES or id(value) in seen or _is_plain_row(value):
                continue
            if len(seen) == MOST:
                _warn_of_others(seen.values())
                break
            seen[id(value)] = value
            waiting.extend(_attributes(value, self) if _is_plain_class(kind) else _keep(value, self))
            if isinstance(value, _CONTAINERS) and kind not in _CONTAINERS and not _is_opaque(value):
                waiting.extend(_attributes(value, self))

    def on_restore(self, restore: Restore) -> None:
        """Has `restore` call a function."""
        self._restores.append(restore)

    def on_restore_items(self, value: dict[Any, Any], before: dict[Any, Any]) -> None:
        """Has `restore` put the items of a dict back; data comes with one for each sample."""
        self._plain.append((value, before))

    def watch_iterators(self, items: Iterable[tuple[Any, Any]], put: Callable[[Any, Any], object]) -> dict[Any, Any]:
        """The items, with recorded iterators in the place of others; `put` writes an item where it came from."""
        kept = {}
        for key, item in items:
            if type(item) not in _LEAVES and type(item) not in _CONTAINERS and is_read_once(item):
                item = self.iterators.setdefault(id(item), Recorded(item))
                put(key, item)
                self._unwraps.append(functools.partial(_unwrap, put, key, item))
            kept[key] = item
        return kept

    def stand_in(self, value: Any) -> Any:
        """Returns the stand-in for an iterator until `close`; other values stand for themselves."""
        return self.iterators.get(id(value), value)

    def restore(self) -> None:
        """Puts everything back; may be called again and again."""
        with torch.no_grad():
            for restore in self._restores:
                restore()
        for value, before in self._plain:
            _restore_items(value, before)
        for iterator in self.iterators.values():
            iterator.rewind()

    def close(self) -> None:
        """Restores, and takes all stand-ins of iterators away."""
        self.restore()
        for unwrap in self._unwraps:
            unwrap()


@contextmanager
def state_kept(*roots: Any, values: bool = True) -> Iterator[None]:
    """The Python state of `roots` is as before after the block; see `KeptState`."""
    state = KeptState(*roots, values=values)
    try:
        yield
    finally:
        state.close()


def _unwrap(put: Callable[[Any, Any], object], key: Any, recorded: Recorded) -> None:
    put(key, recorded.unwrapped)


def _warn_of_others(seen: Iterable[Any]) -> None:
    (kind, count), *_ = Counter(map(type, seen)).most_common(1)
    warnings.warn(
        f"the module and its data hold more than {MOST:,} Python objects, {count:,} of the first of them of class "
        f"{kind.__module__}.{kind.__qualname__}: what calibration's steps change in the others stays changed. Hold "
        f"data in tensors, arrays or plain values; a container of more than {LARGE:,} elements is not entered",
        RuntimeWarning,
        stacklevel=3,
    )


def _restore_items(value: dict[Any, Any], before: dict[Any, Any]) -> None:
    if len(value) != len(before) or not (_is_same(value, before) and _is_same(value.values(), before.values())):
        base: Any = OrderedDict if isinstance(value, OrderedDict) else dict
        base.clear(value)
        base.update(value, before)


def _holds_leaves(items: Iterable[Any]) -> bool:
    """Returns whether nothing in `items` has a state of its own; all at once, for data comes by the million."""
    return _LEAVES.issuperset(map(type, items))


def _is_plain_row(value: Any) -> bool:
    """Returns whether a value and everything in it are immutable."""
    return type(value) in (tuple, frozenset) and _holds_leaves(value)


def _is_same(now: Iterable[Any], before: Iterable[Any]) -> bool:
    """Returns whether the elements are the same objects, in the same order."""
    return all(map(operator.is_, now, before))


def _is_opaque(value: Any) -> bool:
    """Returns whether a value holds more than values: handles, processes, connections."""
    kind: Any = type(value)
    return _is_opaque_class(kind)


@functools.lru_cache(maxsize=4096)
def _is_opaque_class(kind: type) -> bool:
    for base in kind.__mro__[:-1]:
        name = f"{base.__module__}.{base.__qualname__}"
        if base.__module__.partition(".")[0] in _OPAQUE and not name.startswith(_DATA_OF_TORCH):
            return True
    return False


@functools.lru_cache(maxsize=4096)
def _is_plain_class(kind: type) -> bool:
    """Returns whether an object of this class is its attributes alone; asked once a class."""
    known = (_keep, rewinder)
    return not _is_opaque_class(kind) and all(way.dispatch(kind) is way.dispatch(object) for way in known)


@functools.singledispatch
def _keep(value: Any, state: KeptState) -> Iterable[Any]:
    """Remembers how to put `value` back in place; returns what else to look at."""
    if (rewind := rewinder(value)) is not None:
        state.on_restore(rewind)
        return ()
    return () if _is_opaque(value) else _attributes(value, state)


def _attributes(value: Any, state: KeptState) -> list[Any]:
    """The attributes of an object, which are put back."""
    found: list[Any] = []
    try:
        attributes = object.__getattribute__(value, "__dict__")
    except AttributeError:
        attributes = None
    if isinstance(attributes, dict):
        found += _keep_items(attributes, state)
    kind: Any = type(value)
    for slot in _slots(kind):
        before = _slot(slot, value)
        state.on_restore(functools.partial(_restore_slot, slot, value, before))
        found.append(before)
    return found


@functools.lru_cache(maxsize=4096)
def _slots(kind: type) -> tuple[types.MemberDescriptorType, ...]:
    """Returns the slots of a class of Python's: those of C have members that nobody may write to."""
    kinds = [base for base in kind.__mro__ if "__slots__" in vars(base)]
    return tuple(
        member for base in kinds for member in vars(base).values() if isinstance(member, types.MemberDescriptorType)
    )


def _slot(slot: types.MemberDescriptorType, value: Any) -> Any:
    try:
        return slot.__get__(value)
    except AttributeError:
        return _NOTHING


def _restore_slot(slot: types.MemberDescriptorType, value: Any, before: Any) -> None:
    now = _slot(slot, value)
    if now is not before and before is not _NOTHING:
        slot.__set__(value, before)
    elif now is not before:
        slot.__delete__(value)


@_keep.register
def _(value: nn.Module, state: KeptState) -> Iterable[Any]:
    if isinstance(value, SlotQuantizer):
        return ()
    found: list[Any] = [module for module in value._modules.values() if module is not None]
    found += _keep_items(vars(value), state, taken=(value._modules, value._parameters, value._buffers))
    if not isinstance(value, _BatchNorm):
        # A scripted module has a view of them, which makes its tensors anew each time and cannot be written to.
        found += _keep_items(value._buffers, state) if isinstance(value._buffers, dict) else value._buffers.values()
    for kind in type(value).__mro__:
        if kind.__module__.partition(".")[0] not in _OPAQUE and kind is not object:
            found += _keep_class(kind, state)
    return found


def _keep_class(kind: type, state: KeptState) -> Iterable[Any]:
    held = {
        name: item for name, item in vars(kind).items() if not name.startswith("__") and isinstance(item, _CLASS_VALUES)
    }

    def restore() -> None:
        for name, before in held.items():
            if vars(kind).get(name, _NOTHING) is not before:
                type.__setattr__(kind, name, before)

    if held:
        state.on_restore(restore)
    return held.values()


def _keep_items(value: dict[Any, Any], state: KeptState, taken: tuple[Mapping[str, Any], ...] = ()) -> Iterable[Any]:
    """The items of a dict or of a `__dict__`.

    Args:
        value: the dict.
        state: what to add to.
        taken: of a module: names that may not come back, for they belong to a submodule, a parameter or a buffer by
            then.
    """
    hidden = _STRUCTURE if taken else frozenset()
    items = {key: item for key, item in value.items() if key not in hidden} if hidden else value
    plain = len(items) > LARGE or _holds_leaves(items.values())
    before = dict(items) if plain else state.watch_iterators(list(items.items()), value.__setitem__)

    def restore() -> None:
        for key in [key for key in value if key not in before and key not in hidden]:
            del value[key]
        for key, item in before.items():
            if value.get(key, _NOTHING) is not item and not any(key in others for others in taken):
                value[key] = item

    if hidden:
        state.on_restore(restore)
    else:
        state.on_restore_items(value, before)
    return () if plain else before.values()


_keep.register(dict, _keep_items)


@_keep.register(list)
def _(value: list[Any], state: KeptState) -> Iterable[Any]:
    before = list(value)
    plain = len(before) > LARGE or _holds_leaves(before)
    if not plain:
        before = list(state.watch_iterators(enumerate(before), value.__setitem__).values())

    def restore() -> None:
        if len(value) != len(before) or not _is_same(value, before):
            list.__setitem__(value, slice(None), before)

    state.on_restore(restore)
    return () if plain else before


@_keep.register(deque)
def _(value: deque[Any], state: KeptState) -> Iterable[Any]:
    before = list(value)

    def restore() -> None:
        if len(value) != len(before) or not _is_same(value, before):
            deque.clear(value)
            deque.extend(value, before)

    state.on_restore(restore)
    return before if len(before) <= LARGE else ()


@_keep.register(set)
def _(value: set[Any], state: KeptState) -> Iterable[Any]:
    before = set(value)

    def restore() -> None:
        if len(value) != len(before) or value != before:
            set.clear(value)
            set.update(value, before)

    state.on_restore(restore)
    return before if len(before) <= LARGE else ()


@_keep.register(tuple)
@_keep.register(frozenset)
def _(value: Iterable[Any], state: KeptState) -> Iterable[Any]:
    return value if len(value) <= LARGE else ()  # type: ignore[arg-type]


@_keep.register
def _(value: bytearray, state: KeptState) -> Iterable[Any]:
    before = bytes(value)
    state.on_restore(lambda: value.__setitem__(slice(None), before) if value != before else None)
    return ()


@_keep.register
def _(value: Tensor, state: KeptState) -> Iterable[Any]:
    if not state.values or value.is_meta or storage_of(value)[0] in state.weights:
        return ()
    if value.is_nested:  # what it is made of can be written to, it cannot
        return (value.values(),)
    # On the CPU: a GPU may have no room for a second one.
    before, version = value.detach().to("cpu", copy=True), version_of(value)

    def restore() -> None:
        nonlocal version
        if version is None or value._version != version:
            with torch.inference_mode(value.is_inference()):
                value.detach().copy_(before)
            version = version_of(value)

    state.on_restore(restore)
    return ()


@_keep.register
def _(value: nn.Parameter, state: KeptState) -> Iterable[Any]:
    return ()


@_keep.register
def _(value: np.ndarray, state: KeptState) -> Iterable[Any]:
    if state.values and value.flags.writeable and not isinstance(value, np.memmap):
        before = value.copy()
        state.on_restore(lambda: value.__setitem__(..., before))
    return ()


@_keep.register
def _(value: types.FunctionType, state: KeptState) -> Iterable[Any]:
    cells = [held for cell in value.__closure__ or () for held in _held(cell)]
    return cells + list(value.__defaults__ or ()) + list((value.__kwdefaults__ or {}).values())


def _held(cell: types.CellType) -> list[Any]:
    try:
        return [cell.cell_contents]
    except ValueError:
        return []  # not set yet


@_keep.register
def _(value: types.MethodType, state: KeptState) -> Iterable[Any]:
    return value.__self__, value.__func__


@_keep.register(functools.partial)
def _(value: functools.partial[Any], state: KeptState) -> Iterable[Any]:
    return value.func, *value.args, *value.keywords.values()


@_keep.register(types.ModuleType)
@_keep.register(type)
def _(value: Any, state: KeptState) -> Iterable[Any]:
    return ()
