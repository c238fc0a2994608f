"""Gradients of a recurrence in fewer passes: of a step's elementwise part, and of the weight that reads the state.

torch's autograd would have a node for each of the products, sums and functions in a step, and one product and one sum
of the whole weight a step for its gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class LSTMStep(torch.autograd.Function):
    """Hidden and cell state `[N, hidden]` of summed gates `[N, 4 · hidden]` (i, f, g, o) and the cell state before."""

    @staticmethod
    def forward(ctx: Any, gates: Tensor, c: Tensor) -> Any:
        active = torch.sigmoid(gates)
        i, f, g, o = active.chunk(4, -1)
        g.copy_(torch.tanh(gates.chunk(4, -1)[2]))
        new = torch.addcmul(f * c, i, g)
        tanh = torch.tanh(new)
        ctx.save_for_backward(active, c, tanh)
        return o * tanh, new

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_hidden: Tensor, of_cell: Tensor) -> Any:
        active, c, tanh = ctx.saved_tensors
        i, f, g, o = active.chunk(4, -1)
        # Of the new cell state, by way of both outputs.
        d = of_cell + torch.ops.aten.tanh_backward(of_hidden * o, tanh)
        grad = torch.empty_like(active)
        for part, one, other in zip(grad.chunk(4, -1), (d, d, d, of_hidden), (g, c, i, tanh), strict=True):
            torch.mul(one, other, out=part)
        of_gates = torch.ops.aten.sigmoid_backward(grad, active)
        of_gates.chunk(4, -1)[2].copy_(torch.ops.aten.tanh_backward(grad.chunk(4, -1)[2], g))
        return of_gates, d * f


class StateWeightGradient(torch.autograd.Function):
    """The shares of the inputs in all steps' gates, unchanged; on the way back the gradient of the state's weight.

    A step adds the product of the state and the weight to its share, so both have one gradient. The steps use the
    weight without a gradient, and note the states that it multiplies.

    Args of `apply`:
        shares: `[..., gates · hidden]`, step after step.
        weight: `[gates · hidden, features]`.
        states: `[N_t, features]` for each step, in the order in which they run; filled after this call.
        reverse: they run from the last to the first.
    """

    @staticmethod
    def forward(ctx: Any, shares: Tensor, weight: Tensor, states: list[Tensor], reverse: bool) -> Any:
        ctx.states, ctx.reverse, ctx.dtype = states, reverse, weight.dtype
        return shares.view_as(shares)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        weight = None
        if ctx.needs_input_grad[1]:
            states = torch.cat(ctx.states[::-1] if ctx.reverse else ctx.states).to(grad.dtype)
            weight = (grad.reshape(-1, grad.shape[-1]).t() @ states).to(ctx.dtype)
        return grad, weight, None, None


def needs_gradient(x: Tensor) -> bool:
    """Returns whether autograd follows a tensor now, and code may be computed in its place: not in a graph's trace."""
    return torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_compiling()
