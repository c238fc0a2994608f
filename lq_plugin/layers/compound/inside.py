"""Quantizers inside of a module of several weights: whether they act, and who is shown what goes through them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lq_plugin.quantizers import Quantizer, SlotQuantizer

#: Gets the number of a matrix, and rows `[rows, in]` that it multiplies.
See = Callable[[int, Tensor], None]


def unchanged(x: Tensor) -> Tensor:
    """Returns `x`: what goes through no quantizer."""
    return x


def acts(quantizer: nn.Module) -> bool:
    """Returns whether a quantizer would do anything with the tensor that it is given now, or somebody would see it."""
    if not isinstance(quantizer, SlotQuantizer):
        return True
    seen = (quantizer, *(stage for stage in quantizer.stages() if isinstance(stage, Quantizer)))
    return changes(quantizer) or any(each._forward_hooks or each._forward_pre_hooks for each in seen)


def changes(quantizer: nn.Module) -> bool:
    """Returns whether a quantizer, or what stands in for one, would do anything with the tensor that it gets now."""
    return not isinstance(quantizer, SlotQuantizer) or any(
        stage.collector is not None
        or (stage.training and (stage.observing or stage.waiting))
        or (stage.is_enabled and not stage.is_suspended)
        for stage in quantizer.stages()
        if isinstance(stage, Quantizer)
    )


def pass_on(quantizers: list[nn.Module], x: Any) -> Any:
    """Returns `x` unchanged; learned ranges of quantizers that are switched off take part with weight 0."""
    data = x.data if isinstance(x, PackedSequence) else x
    for quantizer in quantizers:
        for stage in cast(SlotQuantizer, quantizer).stages():
            data = stage.pass_on(data)
    return PackedSequence(data, *x[1:]) if isinstance(x, PackedSequence) else data


def shown(read: Callable[[Tensor], Tensor], see: See) -> Callable[[Tensor], Tensor]:
    """Returns what a state goes through, and who is shown it."""

    def through(x: Tensor) -> Tensor:
        y = read(x)
        see(0, y.reshape(-1, y.shape[-1]))
        return y

    return through


def show_inputs(
    module: Any, key: str, matrices: int, see: See, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """Shows the inputs of a module that go into one of its weights.

    Args:
        module: quantized.
        key: of the weight.
        matrices: of the weight; the first input goes into the first, ...
        see: is shown them.
        args, kwargs: of the module's call.
    """
    names = [name for name in module.input_positions if module.key_of(module, name) == key]
    for index, name in enumerate(names[:matrices]):
        position = module.input_positions[name]
        x = args[position] if position < len(args) else kwargs.get(name)
        if x is not None:
            data = x.data if isinstance(x, PackedSequence) else x
            see(index, data.reshape(-1, data.shape[-1]))
