"""One forward pass, written down: which module and which functional call ran, on what, feeding whom.

A `TorchFunctionMode` sees the functional calls (`x + y`, `q @ k`, `F.linear(x, w)`), forward hooks
the modules. Leaf modules are opaque: what happens inside `nn.Conv2d.forward` is the module's
call, not a functional one. The result is plain data without tensors, made from one batch::

    with torch.no_grad():
        recording = record(model.eval(), lambda: model(batch))
    recording.total_macs
    [call.name for call in recording.functional_calls]      # ['layer1.0.add_0', ...]

Tensors are followed by storage, not by `id`: views share their producer, an in-place write makes
a new one, and the storages' keys are kept, not their content, so nothing is mistaken for
something freed. Unseen are calls into scripted functions and C++ extensions, and what metrics and frozen
teachers compute (`lq_plugin.model.aside`), which are no part of the model.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode, resolve_name

from lq_plugin.errors import QuantizationError, raise_all
from lq_plugin.layers import (
    CONTAINER,
    OwnWeights,
    WeightInUse,
    own_weights,
    quantized_class,
    unchanged,
    weight_in_use,
    why_unsupported_compound,
)
from lq_plugin.model.aside import set_aside
from lq_plugin.model.graph.macs import PRODUCTS, Shape, functional_macs, module_macs, weight_macs
from lq_plugin.model.graph.numbering import OPERATIONS, Numbering
from lq_plugin.model.graph.op_names import COPIES, ELEMENTWISE, METADATA, UNARY, normalize
from lq_plugin.model.graph.recording import Call, Recording, Source
from lq_plugin.model.graph.tensor_identity import (
    geometry_of,
    identity_of,
    leading_size,
    storage_of,
    tensors_of,
    version_of,
    within_deepcopy,
)
from lq_plugin.quantizers import SlotQuantizer
from lq_plugin.utilities import hooks

__all__ = ["Call", "Recording", "Source", "default_is_leaf", "record", "without_compile"]

#: Opaque whatever children they carry: parametrizations, quantizers, `out_proj`.
_OPAQUE = (
    nn.Linear, nn.Bilinear, _ConvNd, nn.Embedding, nn.EmbeddingBag, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase,
    _NormBase, nn.LayerNorm, nn.GroupNorm, torch.jit.ScriptModule, SlotQuantizer,
)  # fmt: skip
#: Stands for the enclosing module where there is none: in a training step, say, around the model's own forward.
OUTSIDE = "outside"


def default_is_leaf(module: nn.Module) -> bool:
    """Returns whether a module is opaque to the recorder.

    Opaque are parametric and normalization types of torch and their subclasses, HF `Conv1D`, ScriptModules,
    quantizers, and childless modules that torch itself defines.

    A childless module defined elsewhere stays transparent: arithmetic written in its forward must
    show up as functional calls instead of disappearing.
    """
    if isinstance(module, _OPAQUE) or quantized_class(module) is not None:
        return True
    return type(module).__module__.startswith("torch.nn.") and next(module.children(), None) is None


def record(
    model: nn.Module,
    run: Callable[[], Any],
    *,
    is_leaf: Callable[[nn.Module], bool] = default_is_leaf,
    samples: int | None = None,
) -> Recording:
    """Records what `run()` does with `model`.

    The caller decides eval or train and whether gradients are on; in train mode batch norms move as
    they always do. During the pass compiled modules run eagerly, and transformer encoders take their
    ordinary path: the fused one, which bypasses the submodules, gives way to an active function mode
    and to hooks. All hooks are gone afterwards, also when `run` raises. Activations of the one batch
    stay alive until the end.

    Args:
        model: any module.
        run: performs one forward pass; what it returns counts as read by the outside.
        is_leaf: modules whose inside is not looked into.
        samples: how many `run` passes through the model; None: those of the first tensor that the first called module
            is given, in dim 0, or in dim 1 where the module says `batch_first=False`.

    Raises:
        QuantizationError: lazy modules that have no shape yet.
    """
    raise_all(QuantizationError, "cannot record", [
        f"{name!r} ({type(m).__name__}) is not initialized: run one forward pass before" for name,
        m in model.named_modules()
        if isinstance(m, nn.modules.lazy.LazyModuleMixin) and m.has_uninitialized_params()  # type: ignore[misc]
    ])  # fmt: skip
    recorder = _Recorder(model, is_leaf, samples)
    try:
        with recorder.attached(), without_compile(), recorder:
            result = run()
        recorder.add_outputs(result)
        return recorder.finish()
    finally:
        recorder.release()


@contextmanager
def without_compile() -> Iterator[None]:
    """Lets compiled modules run their own code inside: compiled ones skip hooks, or are compiled again for them."""
    if "torch._dynamo" not in sys.modules:  # nothing can be compiled, and importing it takes seconds
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


class _Value(NamedTuple):
    """The value that a storage holds now; `holder` keeps its key from being given to another."""

    holder: Any
    producer: int | None
    output: int
    geometry: tuple[Any, ...] | None
    activation: bool


class _Frame(NamedTuple):
    module: nn.Module | None
    name: str
    opaque: bool
    numbering: Numbering
    inputs: list[Tensor]
    sources: tuple[Source, ...]
    versions: list[int | None]


class _Recorder(TorchFunctionMode):
    def __init__(self, model: nn.Module, is_leaf: Callable[[nn.Module], bool], samples: int | None) -> None:
        super().__init__()
        self._samples = samples
        self._modules = {module: name for name, module in model.named_modules()}
        self._root, self._is_leaf = model, is_leaf
        self._calls: list[Call] = []
        self._repeats: Counter[str] = Counter()
        self._outputs: list[Source] = []
        self._values: dict[Any, _Value] = {}
        self._parameters: dict[Any, dict[str, Tensor]] = {}
        for name, tensor in (
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ):
            self._parameters.setdefault(storage_of(tensor)[0], {})[name] = tensor
        self._aside = [model.get_submodule(name) for name in set_aside(model)]
        # By id: the hash of a torchmetrics.Metric changes with its state.
        self._not_ours = {id(part) for module in self._aside for part in module.modules()}
        for module in self._modules:
            if isinstance(module, OwnWeights):  # its quantizers, as those of opaque modules
                self._not_ours |= {id(part) for part in module._modules[CONTAINER].modules()}  # type: ignore[union-attr]
        #: Modules whose parameters are followed to the products that read them.
        self._followed: dict[nn.Module, list[str]] = {}
        self._frames = [_Frame(None, OUTSIDE, False, Numbering(), [], (), [])]
        self._busy = False  # inside our own hooks, whose tensor reads are nobody's calls

    @contextmanager
    def attached(self) -> Iterator[None]:
        with ExitStack() as stack:
            for module in self._modules:
                if isinstance(module, torch.jit.ScriptModule):
                    continue
                # Innermost: users' hooks run outside, so what they compute is seen and attributed.
                stack.callback(hooks.before(module, self._enter, with_kwargs=True).remove)
                leave = hooks.after(module, self._leave, with_kwargs=True, prepend=True, always_call=True)
                stack.callback(leave.remove)
            for module in self._aside:
                # `metric.update(x)` in a step is no call of the metric itself.
                for name in ("update", "compute"):
                    if callable(original := module.__dict__.get(name)):
                        module.__dict__[name] = self._hidden(module, original)
                        stack.callback(module.__dict__.__setitem__, name, original)
            if any(isinstance(module, torch.jit.ScriptModule) for module in self._modules):
                # ScriptModules refuse hooks of their own.
                stack.callback(nn.modules.module.register_module_forward_pre_hook(self._enter_script).remove)
                leave = nn.modules.module.register_module_forward_hook(
                    self._leave_script, with_kwargs=True, always_call=True
                )
                stack.callback(leave.remove)
                # torch forgets this one, and from then on calls all modules as if there were global hooks.
                stack.callback(nn.modules.module._global_forward_hooks_with_kwargs.pop, leave.id, None)
            yield

    def _hidden(self, module: nn.Module, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            depth = len(self._frames)
            # Within a forward it has a number among that module's operations, as it has where they are quantized.
            if depth == 1:
                self._frames.append(_Frame(module, "", True, Numbering(), [], (), []))
            try:
                return function(*args, **kwargs)
            finally:
                del self._frames[depth:]

        return run

    def _enter_script(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if isinstance(module, torch.jit.ScriptModule) and module in self._modules:
            self._enter(module, args, {})

    def _leave_script(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if isinstance(module, torch.jit.ScriptModule) and module in self._modules:
            self._leave(module, args, kwargs, output)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._frames[-1].opaque or id(module) in self._not_ours:  # only its place on the stack matters
            self._frames.append(_Frame(module, "", True, Numbering(), [], (), []))
            return
        name, opaque = self._modules[module], self._is_leaf(module)
        self._busy = True
        if not opaque and module not in self._followed:
            self._follow(module)
        if self._samples is None:
            self._samples = leading_size((args, kwargs), 0 if getattr(module, "batch_first", True) else 1)
        inputs = list(tensors_of((args, kwargs))) if opaque else []
        sources = tuple(self._source(t) for t in inputs)
        self._frames.append(
            _Frame(module, name, opaque, Numbering(module), inputs, sources, [version_of(t) for t in inputs])
        )
        self._busy = False

    def _follow(self, module: nn.Module) -> None:
        """Has the code of a float module read weights that know when a product reads them."""
        handles = own_weights(module) if why_unsupported_compound(module) is None else []
        self._followed[module] = [handle.key for handle in handles]
        for handle in handles:
            module.__dict__[handle.key] = WeightInUse.of(handle.weight, handle.key, unchanged)

    def _unfollow(self, module: nn.Module) -> None:
        for key in self._followed.pop(module, ()):
            module.__dict__.pop(key, None)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not any(frame.module is module for frame in self._frames[1:]):
            return  # a hook before ours raised: it was never entered
        while (frame := self._frames.pop()).module is not module:
            pass
        if not any(frame.module is module for frame in self._frames):
            self._unfollow(module)
        if self._frames[-1].opaque or id(module) in self._not_ours:
            return
        self._busy = True
        if frame.opaque and frame.module is not None:
            self._add_module_call(frame, module, list(tensors_of(output)))
        if module is self._root:
            self._outputs += [self._source(t) for t in tensors_of(output)]
        self._busy = False

    def _add_module_call(self, frame: _Frame, module: nn.Module, outputs: list[Tensor]) -> None:
        keys = {storage_of(t)[0] for t in frame.inputs}
        noted = zip(frame.inputs, frame.versions, strict=True)
        mutated = [t for t, before in noted if before is not None and version_of(t) != before]
        if getattr(module, "inplace", False) is True:
            mutated += frame.inputs[:1]
        unchanged = not mutated and bool(outputs) and all(storage_of(t)[0] in keys for t in outputs)
        shapes = tuple(tuple(t.shape) for t in outputs)
        inputs = [source.shape for source in frame.sources]
        macs = module_macs(module, inputs, shapes)
        parts = tuple(weight_macs(module, inputs).items()) if macs and why_unsupported_compound(module) is None else ()
        self._add("module", frame.name, type(module).__name__, frame.sources, shapes, macs, unchanged, parts)
        if not unchanged:
            self._produce(outputs, mutated, activation=True)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self._busy or self._frames[-1].opaque or name in METADATA:
            return func(*args, **kwargs)
        if name == "clone" and within_deepcopy():
            # Of a part of the model: what the copy computes has nothing to do with the part.
            copied = func(*args, **kwargs)
            self._produce([copied], [], activation=False, constant=True)
            return copied
        if name in ("", "fn"):  # torch hides some functions in a dispatcher
            name = (resolve_name(func) or "call").rpartition(".")[2]
        written = list(tensors_of(kwargs.get("out")))
        inputs = list(tensors_of((args, {key: value for key, value in kwargs.items() if key != "out"})))
        sources = tuple(self._source(t) for t in inputs)
        op, in_place = normalize(name.partition(".")[0])
        if inputs and (in_place or kwargs.get("inplace") is True):
            written.append(inputs[0])
        activations = [self._values[storage_of(t)[0]].activation for t in inputs]
        numbering = self._frames[-1].numbering
        label = numbering.label(op, inputs)
        result = func(*args, **kwargs)
        outputs = list(tensors_of(result))
        numbering.note(op, bool(written), inputs, outputs)
        if name in ("__get__", "type") and not outputs:
            return result  # x.shape, x.device, ...
        if not inputs or op.startswith("new_") or op.endswith("_like"):
            self._produce(outputs, written, activation=False, constant=True)
            return result
        keys = {storage_of(t)[0] for t in inputs}
        if not written and outputs and all(storage_of(t)[0] in keys for t in outputs):
            return result  # a view: same storage, same producer
        if not written and op in COPIES and not sources[0].parameters:
            original = self._values[storage_of(inputs[0])[0]]
            for t in outputs:
                key, holder = identity_of(t)
                self._values[key] = original._replace(holder=holder, geometry=None)
            return result
        real = [active and t.is_floating_point() for t, active in zip(inputs, activations, strict=True)]
        self._add_function_call(op, args, kwargs, sources, real, outputs or written, label)
        self._produce(outputs, written, activation=any(activations))
        return result

    def _add_function_call(
        self,
        op: str,
        args: Any,
        kwargs: Any,
        sources: tuple[Source, ...],
        real: list[bool],
        outputs: list[Tensor],
        label: tuple[str, tuple[int, ...]] | None,
    ) -> None:
        """Adds a functional call; `real` marks its activations, `label` is the operation's name in its module."""
        if op in PRODUCTS:
            counts = any(real)
        elif op in ELEMENTWISE:
            counts = len(real) > 1 and all(real[:2]) and outputs[0].dim() > 0
        else:
            counts = op == "cat" and sum(real) > 1
        macs = functional_macs(op, args, kwargs, outputs[0]) if counts else 0
        if counts and op in PRODUCTS and (weight := self._weight_read(args, kwargs)) is not None:
            shapes = tuple(tuple(t.shape) for t in outputs)
            self._add("weight", weight, op, sources, shapes, macs, False)
            return
        frame = self._frames[-1]
        place, operands = label or (frame.numbering.next(f"other_{op}" if op in OPERATIONS else op), ())
        name = ".".join(filter(None, (frame.name, place)))
        shapes = tuple(tuple(t.shape) for t in outputs)
        operands = operands if counts or op in UNARY else ()
        zeros = op == "pad" and _pads_zeros(*args, **kwargs)
        kind = "functional" if counts else "other"
        self._add(kind, name, op, sources, shapes, macs, False, operands=operands, pads_zeros=zeros)

    def _weight_read(self, args: Any, kwargs: Any) -> str | None:
        """Returns the name of the weight that a product reads, of a module that is running."""
        keys = [key for tensor in tensors_of((args, kwargs)) if (key := weight_in_use(tensor)) is not None]
        running = (f for f in reversed(self._frames) if keys and f.module is not None)
        frame = next((f for f in running if keys[0] in f.module._parameters), None)  # type: ignore[union-attr]
        return None if frame is None else ".".join(filter(None, (frame.name, keys[0])))

    def _add(
        self,
        kind: Any,
        name: str,
        op: str,
        sources: tuple[Source, ...],
        shapes: tuple[Shape, ...],
        macs: int,
        passthrough: bool,
        parts: tuple[tuple[str, int], ...] = (),
        operands: tuple[int, ...] = (),
        pads_zeros: bool = False,
    ) -> None:
        call = Call(
            len(self._calls), kind, name, op, self._repeats[name], sources, shapes, macs, passthrough, parts, operands,
            pads_zeros,
        )  # fmt: skip
        self._calls.append(call)
        self._repeats[name] += 1

    def _produce(
        self, outputs: list[Tensor], written: list[Tensor], *, activation: bool, constant: bool = False
    ) -> None:
        """Notes that the latest call made these; a write goes to every view of the storage."""
        position = None if constant else len(self._calls) - 1
        seen = set()
        for number, t in enumerate((*outputs, *written)):
            key, holder = identity_of(t)
            if key not in seen:
                seen.add(key)
                output = number if number < len(outputs) else 0
                self._values[key] = _Value(holder, position, output, geometry_of(t), activation)

    def _source(self, tensor: Tensor) -> Source:
        key, holder = identity_of(tensor)
        names = self._parameters.get(key, {})
        value = self._values.setdefault(key, _Value(holder, None, 0, None, activation=not names))
        exact = tuple(name for name, parameter in names.items() if parameter is tensor)
        direct = value.geometry is not None and value.geometry == geometry_of(tensor)
        return Source(tuple(tensor.shape), value.producer, value.output, direct, exact or tuple(names))

    def add_outputs(self, result: Any) -> None:
        self._outputs += [self._source(t) for t in tensors_of(result)]
        self._add("output", "output", "output", tuple(self._outputs), (), 0, False)

    def finish(self) -> Recording:
        called = {call.name for call in self._calls if call.kind == "module"}
        inside: set[nn.Module] = set()
        uncalled = []
        for module, name in self._modules.items():  # parents come first
            if id(module) in self._not_ours or module in inside or not self._is_leaf(module):
                continue
            inside.update(module.modules())
            if name not in called and next(module.parameters(), None) is not None:
                uncalled.append(name)
        return Recording(tuple(self._calls), tuple(uncalled), self._samples or 1)

    def release(self) -> None:
        for module in list(self._followed):
            self._unfollow(module)
        self._values.clear()
        self._parameters.clear()
        self._aside.clear()
        self._not_ours.clear()
        del self._frames[:]


def _pads_zeros(input: Tensor, pad: Any, mode: str = "constant", value: float | None = None) -> bool:
    """Returns whether `F.pad` with these arguments adds zeros."""
    return mode == "constant" and not value
