"""Error of each layer's output: of the layer alone, and with everything before it quantized also.

The layer alone gets the float model's input; in the whole model it gets what the layers before it made of theirs. Where
the second number falls below the first, error has accumulated on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lq_plugin.functional.error import energy
from lq_plugin.layers import QuantizedLayer, weight_of
from lq_plugin.model.calibrate import evaluating, float_forward
from lq_plugin.model.graph.record import without_compile
from lq_plugin.model.measure.fidelity import Errors
from lq_plugin.model.prepare import quantized_layers, quantizers
from lq_plugin.utilities import hooks

#: Elements of one output that are compared, drawn at random: float outputs of all layers are kept for one pass.
MAX_ELEMENTS = 2**20

#: What a hook is told of a call: name and layer, arguments and keywords, output.
_Seen = Callable[[str, QuantizedLayer, tuple[Any, Any], Any], None]


@dataclass
class OutputErrors:
    """Errors of one layer's output on a batch: of the layer `alone`, and `along` the quantized network."""

    alone: Errors = field(default_factory=Errors)
    along: Errors = field(default_factory=Errors)


@torch.no_grad()
def output_errors(
    model: nn.Module, run: Callable[[], Any], float_weights: Mapping[str, Tensor] | None = None
) -> dict[str, OutputErrors]:
    """Returns the errors of each quantized layer's output, in the order of their first calls.

    The model runs twice in evaluation mode, once float and once as it is. Layers that the two passes call differently,
    and those that are not called as modules (the weights inside an LSTM), are left out.

    Args:
        model: prepared and calibrated; it is as before afterwards.
        run: runs the model on a batch, the same one each time.
        float_weights: weights before a reconstruction moved them, by layer name; the float pass has these.

    >>> import lq_plugin
    >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    >>> _ = lq_plugin.prepare(net, "w4a8")
    >>> x = torch.randn(64, 8)
    >>> _ = lq_plugin.calibrate(net, [x])
    >>> first, last = output_errors(net, lambda: net(x)).values()
    >>> first.alone.sqnr_db == first.along.sqnr_db, last.alone.sqnr_db > last.along.sqnr_db
    (True, True)
    """
    layers = dict(quantized_layers(model))
    before = {name: value for name, value in (float_weights or {}).items() if name in layers}
    now = {name: weight_of(layers[name]).detach().clone() for name in before}
    enabled = {id(quantizer): quantizer.is_enabled for quantizer in quantizers(model)}
    found: dict[str, OutputErrors] = {}
    expected: dict[str, list[Tensor]] = {}

    def keep(name: str, layer: QuantizedLayer, inputs: tuple[Any, Any], output: Any) -> None:
        wanted = _values(output)
        with _as_it_is(layer, enabled), _weights(layers, now, before, [name]):
            got = _values(layer.forward(*inputs[0], **inputs[1]))
        expected.setdefault(name, []).append(wanted)
        _add(found.setdefault(name, OutputErrors()).alone, wanted, got)

    def compare(name: str, layer: QuantizedLayer, inputs: tuple[Any, Any], output: Any) -> None:
        kept, got = expected.get(name), _values(output)
        if kept and kept[0].shape == got.shape:
            _add(found[name].along, kept.pop(0), got)
        else:
            found.pop(name, None)

    with evaluating(model), without_compile():
        with float_forward(model), _weights(layers, before, now, list(before)), _watching(layers, keep):
            run()
        with _watching(layers, compare):
            run()
    return {name: errors for name, errors in found.items() if not expected[name] and errors.along.elements}


@contextmanager
def _watching(layers: Mapping[str, QuantizedLayer], seen: _Seen) -> Iterator[None]:
    """Calls `seen` after each call of a layer; not after those that `seen` itself makes."""
    busy = False

    def hook_of(name: str) -> Callable[..., None]:
        def hook(layer: Any, args: Any, keywords: Any, output: Any) -> None:
            nonlocal busy
            if not busy:
                busy = True
                try:
                    seen(name, layer, (args, keywords), output)
                finally:
                    busy = False

        return hook

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(hooks.after(layer, hook_of(name), with_kwargs=True).remove)
        yield


@contextmanager
def _as_it_is(layer: nn.Module, enabled: Mapping[int, bool]) -> Iterator[None]:
    """The quantizers of one layer as they were before the float pass, inside."""
    own = quantizers(layer)
    for quantizer in own:
        quantizer.set_enabled(enabled[id(quantizer)])
    try:
        yield
    finally:
        for quantizer in own:
            quantizer.set_enabled(False)


@contextmanager
def _weights(
    layers: Mapping[str, QuantizedLayer], inside: Mapping[str, Tensor], after: Mapping[str, Tensor], names: list[str]
) -> Iterator[None]:
    """Weights of these layers inside, where there are others than afterwards."""
    chosen = [name for name in names if name in inside]
    for name in chosen:
        weight_of(layers[name]).copy_(inside[name])
    try:
        yield
    finally:
        for name in chosen:
            weight_of(layers[name]).copy_(after[name])


def _values(output: Any) -> Tensor:
    """Returns the numbers of an output, `[elements]`, as a copy: the next layer may work in place.

    Of a large output those at `MAX_ELEMENTS` random positions, the same ones for every output of that size.
    """
    parts = [
        leaf.detach().flatten() for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]
    if not parts:
        return torch.zeros(0)
    values = torch.cat(parts)
    if len(values) <= MAX_ELEMENTS:
        return values.float().clone()
    # Not every k-th element: where k and the number of channels share a factor, those are of some channels alone.
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(values), (MAX_ELEMENTS,), generator=generator, device="cpu")
    return values[chosen.to(values.device)].float()


def _add(errors: Errors, wanted: Tensor, got: Tensor) -> None:
    if wanted.shape == got.shape:
        errors.add(energy(wanted), energy(wanted - got), wanted.new_zeros(()), wanted.numel())
