"""Batch norms folded into the layers before them, where a recorded pass shows that this is safe.

In eval mode y = γ · (W x + b - μ) / √(σ² + ε) + β. With s = γ / √(σ² + ε) the layer before takes
W' = s · W and b' = s · b along its output channels, and the batch norm keeps the shift β - μ · s
alone: weight 1, running mean 0, running variance 1 - ε. No key, module or parameter object
changes, so the folded `state_dict` loads into the plain model and computes the same there.

Fold what `find_batch_norm_pairs` returns, before quantizing, and keep those batch norms in eval
mode afterwards (`FoldedBatchNorms.freeze`): in training mode they would normalize again.

Reference: Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", CVPR 2018 (arXiv 1712.05877), section 3.2, equation 14.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lq_plugin.errors import QuantizationError, did_you_mean, raise_all
from lq_plugin.layers import COMPUTED, weight_is_computed
from lq_plugin.layers.registry import canonical_of, channel_axis, from_canonical_of, layer_channels, operation_of
from lq_plugin.model.graph.record import Call, Recording
from lq_plugin.model.survey import float_class
from lq_plugin.ptq.batch_norm.reestimate import FrozenBatchNorms, freeze_batch_norm
from lq_plugin.ptq.own_parameters import Refused, call_fault, sharing_fault, write_all


@dataclass(frozen=True)
class Pair:
    """A layer and the batch norm that alone reads it, by qualified name."""

    producer: str
    batch_norm: str


def find_batch_norm_pairs(model: nn.Module, recording: Recording) -> tuple[list[Pair], list[Refused]]:
    """Returns the batch norms that can be folded into the layer before, and all others with the reason.

    Safe means: a layer that computes a product, convolution or transposed convolution
    (`QuantizedLayer.operation`), called once; its output, as it is,
    read by the batch norm and by nothing else; the batch norm called once, with affine parameters
    and finite running statistics; the channels are the same ones; neither's parameters are shared
    or read elsewhere. Types with a forward of their own are compared on random data.

    Args:
        model: the model that was recorded.
        recording: of one forward pass (`lq_plugin.model.graph.record.record`).

    Returns:
        `(pairs, refused)`; together every batch norm of the model, in model order.
    """
    pairs: list[Pair] = []
    refused: list[Refused] = []
    modules = dict(model.named_modules())
    for name, bn in modules.items():
        if not isinstance(bn, _BatchNorm):
            continue
        found = _statistics_fault(bn) or _find_producer(name, bn, modules, recording)
        if isinstance(found, Pair):
            parameters = [f"{found.producer}.weight", f"{found.producer}.bias", f"{name}.weight", f"{name}.bias"]
            call = recording.calls_of(found.producer)[0]
            found = (
                sharing_fault(model, parameters, recording.parameter_readers)
                or _behaviour_fault(modules[found.producer], bn, call)
                or found
            )
        if isinstance(found, Pair):
            pairs.append(found)
        else:
            refused.append(Refused(name, found))
    return pairs, refused


def _statistics_fault(bn: _BatchNorm) -> str | None:
    if not bn.affine:
        return "it has no weight and bias (affine=False), so it cannot hold the shift"
    if bn.running_mean is None or bn.running_var is None:
        return "it has no running statistics (track_running_stats=False)"
    if not all(isinstance(bn._parameters.get(key), nn.Parameter) for key in ("weight", "bias")):
        return "its weight or bias is computed, not a plain parameter"
    if not all(bool(t.isfinite().all()) for t in (bn.weight, bn.bias, bn.running_mean, bn.running_var)):
        return "its parameters or statistics hold NaN or Inf"
    if bool((bn.running_var.double() + bn.eps <= 0).any()):
        return "its running variance plus eps is not positive"
    return None


def _find_producer(name: str, bn: _BatchNorm, modules: dict[str, nn.Module], recording: Recording) -> Pair | str:
    if (fault := call_fault(recording, name)) is not None:
        return fault
    call = recording.calls_of(name)[0]
    producer_call = recording.producer_of(call) if call.inputs else None
    if producer_call is None:
        return "its input is not made by a layer"
    producer = modules.get(producer_call.name) if producer_call.kind == "module" else None
    if producer is None or operation_of(producer) is None:
        return f"its input is made by {producer_call.name!r} ({producer_call.op}), not by a linear or convolution"
    title = f"{producer_call.name!r} ({producer_call.op})"
    if (times := len(recording.calls_of(producer_call.name))) != 1:
        return f"{title} was called {times} times"
    consumers = recording.consumers_of(producer_call)
    if len(consumers) != 1:
        return f"the output of {title} has {len(consumers)} consumers: {', '.join(repr(c.name) for c in consumers)}"
    if not call.inputs[0].direct:
        return f"the output of {title} is reshaped, cast or sliced in between"
    channels = layer_channels(producer)[1]
    if channels != bn.num_features:
        return f"{title} has {channels} output channels, it has {bn.num_features}"
    # Batch norm's channels are dim 1. Those of a linear layer are the last dim, of an unbatched
    # convolution dim 0: equal sizes alone would pair the wrong axes.
    if len(producer_call.output_shapes[0]) + channel_axis(producer) != 1:
        return f"the channels of {title} are not dim 1 of its output {list(producer_call.output_shapes[0])}"
    own = producer._parameters.get("weight")
    if not isinstance(own, nn.Parameter) or not own.is_floating_point():
        return f"the weight of {title} is computed or not floating point, not a plain parameter"
    bias_is_plain = producer.__dict__.get("bias") is None and isinstance(
        producer._parameters.get("bias"), (nn.Parameter, type(None))
    )
    return (
        Pair(producer_call.name, name) if bias_is_plain else f"the bias of {title} is computed, not a plain parameter"
    )


def _behaviour_fault(producer: nn.Module, bn: _BatchNorm, call: Call) -> str | None:
    """Tries folding on double copies where a forward is not torch's own."""
    suspects = [m for m in (producer, bn) if not has_torchs_forward(m)]
    if not suspects:
        return None
    names = ", ".join(dict.fromkeys(float_class(m).__name__ for m in suspects))
    generator = torch.Generator().manual_seed(0)
    try:
        plain = [copy.deepcopy(m).double().eval() for m in (producer, bn)]
        for module in plain:
            module.__class__ = float_class(module)
        folded = [copy.deepcopy(m) for m in plain]
        with torch.no_grad():
            for tensor, value in _folded_values(folded[0], folded[1]):
                tensor.copy_(value)
            shape = (min(2, call.input_shapes[0][0]), *call.input_shapes[0][1:])
            x = torch.randn(shape, generator=generator, dtype=torch.float64).to(_weight(producer).device)
            before, after = plain[1](plain[0](x)), folded[1](folded[0](x))
            same = bool(torch.allclose(before, after, rtol=1e-8, atol=1e-8 * float(before.abs().max())))
    except Exception as error:  # the reason goes to the caller, with whatever a foreign forward raised
        return f"folding could not be tried out: the forward of {names} raised {error!r}"
    return None if same else f"the forward of {names} computes something else after folding"


def has_torchs_forward(module: nn.Module) -> bool:
    """Returns True for a module of a class of `torch.nn`, float or prepared: its forward is known."""
    return float_class(module).__module__.startswith("torch.nn.") and "forward" not in module.__dict__


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _scaled_weight(producer: nn.Module, scale: Tensor) -> Tensor:
    """The weight of `producer`, float64, with each output channel multiplied by its element of `scale` `[C]`."""
    weight = canonical_of(producer, _weight(producer).detach().double())
    return from_canonical_of(producer, weight * scale.reshape(-1, *[1] * (weight.dim() - 1)))


def _scale_and_shift(bn: nn.Module) -> tuple[Tensor, Tensor]:
    """Batch norm in eval mode as y = scale · x + shift, `[C]` each, float64."""
    weight, bias, mean, variance = (
        getattr(bn, key).detach().double() for key in ("weight", "bias", "running_mean", "running_var")
    )
    scale = weight / (variance + bn.eps).sqrt()
    return scale, bias - mean * scale


def _effective(producer: nn.Module, bn: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias, float64, of the one linear map that both are in eval mode."""
    scale, shift = _scale_and_shift(bn)
    bias = producer.bias
    offset = shift + bias.detach().double() * scale if isinstance(bias, Tensor) else shift
    return _scaled_weight(producer, scale), offset


def _folded_values(producer: nn.Module, bn: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """`(tensor, new value)` of all that folding changes, the new value in the tensor's dtype."""
    scale, shift = _scale_and_shift(bn)
    weight = _weight(producer)
    changes = [(weight, _scaled_weight(producer, scale))]
    if isinstance(producer.bias, Tensor):
        changes.append((producer.bias, producer.bias.detach().double() * scale))
    ones = torch.ones_like(scale)
    changes += [(bn.weight, ones), (bn.bias, shift), (bn.running_mean, 0 * ones), (bn.running_var, ones - bn.eps)]  # type: ignore[operator, list-item]
    return [(tensor, value.to(tensor.dtype)) for tensor, value in changes]


class FoldedBatchNorms:
    """The result of `fold_batch_norm`, with the way back.

    Args:
        model: whose batch norms are folded.
        originals: each changed tensor with its value before.
        exact: weight and bias of each pair after folding, in float64.

    Attributes:
        pairs: the folded pairs.
    """

    def __init__(
        self, model: nn.Module, originals: list[tuple[Tensor, Tensor]], exact: dict[Pair, tuple[Tensor, Tensor]]
    ) -> None:
        self.pairs = tuple(exact)
        self._model, self._originals, self._exact = model, originals, exact

    def undo(self) -> None:
        """Writes every value from before folding back, bit for bit; training since then is lost."""
        with torch.no_grad():
            for tensor, original in self._originals:
                tensor.copy_(original)

    def freeze(self) -> FrozenBatchNorms:
        """Keeps the folded batch norms in eval mode; call the result's `apply()` before every training batch."""
        return freeze_batch_norm(self._model, [pair.batch_norm for pair in self.pairs])

    def relative_errors(self) -> dict[Pair, float]:
        """Returns each pair's relative distance from the linear map it was: rounding alone, 0 if exact.

        The largest difference of the effective weight and bias in float64, relative to the
        largest effective weight and bias. About 1e-7 in float32, 1e-3 in float16.
        """
        errors = {}
        modules = dict(self._model.named_modules())
        for pair in self.pairs:
            now = _effective(modules[pair.producer], modules[pair.batch_norm])
            parts = [_relative(a, b) for a, b in zip(now, self._exact[pair], strict=True)]
            errors[pair] = max(parts)
        return errors


def _relative(now: Tensor, exact: Tensor) -> float:
    exact = exact.to(now.device)
    largest = float(exact.abs().max())
    return float((now - exact).abs().max()) / largest if largest else float(now.abs().max())


def fold_batch_norm(model: nn.Module, pairs: Iterable[Pair]) -> FoldedBatchNorms:
    """Moves the scale of each batch norm into its producer, in place; the shift stays where it is.

    Computed in float64, cast to each tensor's dtype. Values change, objects do not; frozen
    parameters and `inference_mode` are fine. Folding a folded pair changes nothing.

    Args:
        model: any module.
        pairs: from `find_batch_norm_pairs`. Pairs of one's own making are checked for types and
            channels only, not for being safe.

    Raises:
        QuantizationError: pairs that do not fit the model, or whose folded values overflow their
            dtype. Nothing is changed then.
    """
    pairs = list(pairs)
    modules = dict(model.named_modules())
    faults = [fault for pair in pairs for fault in _pair_faults(pair, modules)]
    for role in ("producer", "batch_norm"):
        times = Counter(getattr(pair, role) for pair in pairs)
        faults += [f"{name!r} is the {role} of {n} pairs" for name, n in times.items() if n > 1]
    raise_all(QuantizationError, "cannot fold batch norm", faults)
    exact, changes = {}, []
    for pair in pairs:
        producer, bn = modules[pair.producer], modules[pair.batch_norm]
        exact[pair] = _effective(producer, bn)
        changes += [(f"{pair.producer} with {pair.batch_norm}", *change) for change in _folded_values(producer, bn)]
    originals = [(tensor, tensor.detach().clone()) for _, tensor, _ in changes]
    write_all(changes, "fold batch norm")
    return FoldedBatchNorms(model, originals, exact)


def _pair_faults(pair: Pair, modules: dict[str, nn.Module]) -> list[str]:
    missing = [name for name in (pair.producer, pair.batch_norm) if name not in modules]
    if missing:
        return [f"the model has no {name!r}.{did_you_mean(name, modules)}" for name in missing]
    producer, bn = modules[pair.producer], modules[pair.batch_norm]
    if operation_of(producer) is None:
        return [f"{pair.producer!r} is a {type(producer).__name__}, not a linear or convolution"]
    if not isinstance(bn, _BatchNorm):
        return [f"{pair.batch_norm!r} is a {type(bn).__name__}, not a batch norm"]
    if weight_is_computed(producer):
        return [f"{pair.producer!r}: {COMPUTED}"]
    fault = _statistics_fault(bn)
    channels = layer_channels(producer)[1]
    if fault is None and channels != bn.num_features:
        fault = f"{pair.producer!r} has {channels} output channels, it has {bn.num_features}"
    return [f"{pair.batch_norm!r}: {fault}"] if fault else []
