"""Comparison of an exported file with the model it was made from."""

from __future__ import annotations

import inspect
import itertools
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lq_plugin.errors import ExportError
from lq_plugin.export.target import TARGETS, target_of
from lq_plugin.model.calibrate import evaluating
from lq_plugin.model.prepare import quantized_layers
from lq_plugin.utilities import hooks


@dataclass(frozen=True)
class Verification:
    """Result of comparing a file's outputs with the model's.

    Args:
        samples: classifications compared; a sequence has one for each token, a segmented image one for each pixel.
        bit_equal: every number is the same.
        agreement: share of samples with the same largest logit, 0..1; a sample with NaN agrees with nothing.
        largest_difference: of any output, relative to that output's largest finite number; NaN where one of the two is
            NaN.
        largest_steps: largest difference of the first output in steps: those of the quantizer that made it, where the
            plan quantizes it with one scale, else steps of 8 bits over its range in a batch, (max - min) / 255; NaN
            where one of the two is NaN.
        within_one_step: share of elements of the first output that differ by at most one such step, 0..1.
    """

    samples: int
    bit_equal: bool
    agreement: float
    largest_difference: float
    largest_steps: float = 0.0
    within_one_step: float = 1.0


def verify(
    model: nn.Module,
    path: str | Path,
    inputs: Iterable[Any],
    fresh: Callable[[], nn.Module] | None = None,
    runtime: str | None = None,
    classes: int | None = None,
    n_inputs: int | None = None,
    target: str | None = None,
) -> Verification:
    """Compares an exported file with the fake-quantized model on some inputs.

    Args:
        model: the exported one. Its output is a tensor, or a tuple, list or dict of them: all are compared, and
            `agreement` is that of the first.
        path: of the file; its suffix says which target wrote it, any other suffix is that of a packed file.
        inputs: batches, each a tensor or a tuple or list that begins with the positional inputs, which may be nested
            (keys in the order of the example that the file was exported with).
        fresh: makes a float model, into which a packed file is read.
        runtime: of an ONNX file: "onnxruntime" or "openvino"; None: the target's first.
        classes: dim of the logits in the first output. None: 1 where it has four dims or more (`[N, C, H, W]`), else
            the last one (`[N, C]`, `[N, L, C]`).
        n_inputs: number of elements of a tuple or list that are inputs; the rest, such as the targets of a DataLoader's
            `(x, y)`, is ignored. None: those with as many tensors as the file has inputs; all where the file is packed.
        target: name of the target that wrote the file; None: by its suffix.

    Raises:
        ExportError: no inputs, an unknown runtime, no way to read the file, or batches or outputs that cannot be
            compared.
    """
    path = Path(path)
    # A packed file may have any name.
    known = target is not None or path.suffix in [each.suffix for each in TARGETS.values() if each.suffix]
    chosen = target_of(path, target) if known else TARGETS["packed"]
    run, taken, outputs = chosen.open(path, chosen.runtime_of(runtime), fresh)
    if n_inputs is not None and taken is not None and n_inputs > taken:
        raise ExportError(f"n_inputs={n_inputs}, but {path} has {taken} inputs")
    found = _Comparison(classes)
    with evaluating(model), torch.no_grad():
        for index, batch in enumerate(inputs):
            args = arguments(model, batch, n_inputs, taken, f"batch {index}")
            with _OutputSteps(model) as steps:
                mine = outputs(model(*args))
            found.add(list(tensors(mine)), list(tensors(run(*args))), steps.of(mine))
    return found.result()


def arguments(model: nn.Module, batch: Any, count: int | None, tensors: int | None, where: str) -> list[Any]:
    """Returns the positional inputs that a batch begins with: `count` of them, those with so many `tensors`, or all.

    Args:
        model: that takes them.
        batch: of a loader.
        count: number of inputs; None: see `tensors`.
        tensors: number of tensors in the inputs; None: all inputs are taken.
        where: the batch's place, for messages.

    Raises:
        ExportError: they are no tensors, not enough, or not what the model takes.
    """
    args = (list(batch) if isinstance(batch, (tuple, list)) else [batch])[:count]
    if tensors is not None:
        sizes = itertools.accumulate(len(tree_leaves(arg)) for arg in args)
        args = args[: next((index for index, size in enumerate(sizes, 1) if size >= tensors), None)]
    leaves = [batch] if isinstance(batch, Mapping) else tree_leaves(args)
    if wrong := [type(x).__name__ for x in leaves if not isinstance(x, Tensor)]:
        raise ExportError(
            f"{where} is a tensor, or a tuple or list that begins with the positional inputs (a mapping that is one "
            f"stands in a tuple); got {', '.join(wrong)}"
        )
    if tensors is not None and len(leaves) != tensors:
        raise ExportError(f"{where} has {len(leaves)} inputs, the file has {tensors}")
    try:
        inspect.signature(model.forward).bind(*args)
    except TypeError as error:
        advice = (
            "; say n_inputs=1 where the batches are (x, y)"
            if len(args) > 1 and count is None and tensors is None
            else ""
        )
        raise ExportError(
            f"{where} gives {type(model).__name__}.forward {len(args)} inputs: {error}{advice}"
        ) from error
    return args


def tensors(value: Any) -> Iterator[Tensor]:
    """Yields every tensor of an output in the order of the exported graph, which has no place for None.

    Raises:
        ExportError: for anything else.
    """
    if isinstance(value, Tensor):
        yield value.detach().cpu()
    elif isinstance(value, (Mapping, tuple, list)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors(item)
    elif value is not None and not type(value).__module__.startswith("transformers.cache"):  # a text generation's
        raise ExportError(
            f"the model's output is a tensor, or a tuple, list or dict of them, got {type(value).__name__}"
        )


class _OutputSteps:
    """Context that remembers what the quantizers of layers' outputs return in it.

    Args:
        model: prepared, or any other.
    """

    def __init__(self, model: nn.Module) -> None:
        quantizers = [layer.output_quantizer for _, layer in quantized_layers(model)]
        self.quantizers = [each for each in quantizers if each is not None]
        self.made: list[tuple[weakref.ref[Tensor], float]] = []

    def __enter__(self) -> _OutputSteps:
        self.handles = [hooks.after(each, self._note) for each in self.quantizers]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _note(self, quantizer: Any, _: Any, y: Tensor) -> None:
        now = quantizer.current
        if now.spec.is_uniform and not now.spec.dynamic and now.scale.numel() == 1:
            self.made.append((weakref.ref(y), float(now.scale.detach())))

    def of(self, output: Any) -> float | None:
        """Returns the step of the first tensor of an output; None: no quantizer returned it, or what it is a view of.

        Args:
            output: of the model, nested.
        """
        first = next((x for x in tree_leaves(output) if isinstance(x, Tensor)), None)
        if first is None:
            return None
        found = [step for made, step in self.made if (y := made()) is first or (y is not None and y is first._base)]
        return found[-1] if found else None


@dataclass
class _Comparison:
    """Running result of a comparison."""

    classes: int | None
    samples: int = 0
    agreed: int = 0
    equal: bool = True
    #: Of each output.
    difference: list[float] = field(default_factory=list)
    largest: list[float] = field(default_factory=list)
    #: Of the first output.
    steps: float = 0.0
    elements: int = 0
    near: int = 0

    def add(self, mine: list[Tensor], theirs: list[Tensor], step: float | None) -> None:
        shapes, others = ([list(x.shape) for x in outputs] for outputs in (mine, theirs))
        if shapes != others or not mine:
            raise ExportError(f"the model gives outputs of shapes {shapes}, the file {others}")
        self.equal &= all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
        self.difference = self.difference or [0.0] * len(mine)
        self.largest = self.largest or [0.0] * len(mine)
        for index, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            self._measure(index, a.double(), b.double())
        self._count_steps(mine[0].double(), theirs[0].double(), step)
        self._classify(mine[0], theirs[0])

    def _measure(self, index: int, mine: Tensor, theirs: Tensor) -> None:
        finite = mine[mine.isfinite()]
        self.largest[index] = max(self.largest[index], float(finite.abs().max()) if finite.numel() else 0.0)
        # Equal infinities, of a mask, are no difference; inf - inf would be NaN.
        difference = torch.where(mine == theirs, 0.0, (mine - theirs).abs())
        if difference.numel():
            self.difference[index] = _largest(self.difference[index], float(difference.max()))

    def _count_steps(self, mine: Tensor, theirs: Tensor, step: float | None) -> None:
        if step is None:
            finite = mine[mine.isfinite()]
            step = float(finite.max() - finite.min()) / 255 if finite.numel() else 0.0
        # Where the model gives one number, any difference is more than a step.
        steps = torch.where(mine == theirs, 0.0, (mine - theirs).abs() / step)
        self.elements += steps.numel()
        # Levels next to each other are a step apart but for float32's rounding.
        self.near += int((steps <= 1 + 2.0**-10).sum())
        if steps.numel():
            self.steps = _largest(self.steps, float(steps.max()))

    def _classify(self, mine: Tensor, theirs: Tensor) -> None:
        dim = self.classes if self.classes is not None else 1 if mine.ndim >= 4 else -1
        if not -mine.ndim <= dim < mine.ndim:
            raise ExportError(f"classes={dim} is no dim of the first output, which has shape {list(mine.shape)}")
        comparable = ~(mine.isnan() | theirs.isnan()).any(dim)
        self.agreed += int(((mine.argmax(dim) == theirs.argmax(dim)) & comparable).sum())
        self.samples += comparable.numel()

    def result(self) -> Verification:
        if not self.samples:
            raise ExportError("nothing to verify with: there were no inputs")
        relative = [d / largest if largest else d for d, largest in zip(self.difference, self.largest, strict=True)]
        largest = math.nan if any(map(math.isnan, relative)) else max(relative)
        near = self.near / max(self.elements, 1)
        return Verification(self.samples, self.equal, self.agreed / self.samples, largest, self.steps, near)


def _largest(before: float, found: float) -> float:
    """Returns the larger number, NaN if one is: Python's max forgets it."""
    return found if math.isnan(found) or found > before else before
