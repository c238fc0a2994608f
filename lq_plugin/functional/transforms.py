"""Gradients of our own under the transforms of torch.func (`jvp`, `grad`, `vmap`) and forward-mode derivatives.

An `autograd.Function` says what its backward pass is, and nothing of a tangent or of a batch within a batch. All of
ours are functions of single elements: with the derivative c of an element by itself, and of it by the scale that it
has, as the backward pass defines them,

    y = f(x, s) + c_x · (x - [x]) + c_s · (s - [s]),        [·]: a constant

has the values of f, since what was added is 0, and those derivatives in every mode, by operations of torch alone.
Second derivatives are 0, where LSQ's scales have some in an ordinary backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lq_plugin.native.ops import is_batched, is_transformed


def applied(function: type[torch.autograd.Function], x: Tensor, *args: Any, learned: tuple[int, ...] = ()) -> Any:
    """Returns `function.apply(x, *args)`, with its derivatives under transforms also.

    Args:
        function: of single elements of `x`.
        x: float tensor.
        args: what else it takes; tensors among them broadcast to `x`.
        learned: which of `args` have gradients.
    """
    # As `is_transformed`, without another call on the way of every weight and input.
    transformed = not torch.compiler.is_compiling() and (
        torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    )
    if not transformed:
        return function.apply(x, *args)
    # Each element has a scale of its own, so that the backward pass has nothing to sum up.
    given = [x, *(arg.expand(x.shape) if index in learned else arg for index, arg in enumerate(args))]
    variables = [0, *(index + 1 for index in learned)]
    constants = [arg.detach() if isinstance(arg, Tensor) else arg for arg in given]
    context = SimpleNamespace(needs_input_grad=[index in variables for index in range(len(given))])
    context.save_for_backward = lambda *tensors: setattr(context, "saved_tensors", tensors)
    y = function.forward(context, *constants)
    slopes = function.backward(context, torch.ones_like(y))
    for index in variables:
        change = (given[index] - constants[index]).nan_to_num()  # infinity minus infinity
        y = y + (slopes[index] * change).to(y.dtype)
    return y


def outside(function: Callable[[Tensor], None], x: Tensor) -> None:
    """Calls a function that notes something of `x`, outside of all transforms: with the samples of a vmap at once.

    Args:
        function: may write to what was made outside of the transforms.
        x: any tensor.
    """
    if torch.compiler.is_compiling() or not is_transformed():
        function(x)
        return
    x = x.detach()
    while is_batched(x):
        x = torch._C._functorch.get_unwrapped(x)
    with torch._C._DisableFuncTorch():
        function(x.detach())
