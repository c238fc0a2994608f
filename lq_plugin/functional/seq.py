"""SEQ, stretched elastic quantization: levels spread evenly over -α..α, none of them at its ends.

With k levels (4: two bits; 3: ternary) and the step s = 2α / k:

    ŵ = s · q(w / s),    q(r) = clip(round(r - 1/2) + 1/2, -3/2, 3/2)  for 4,    clip(round(r), -1, 1)  for 3 levels

| k | levels | thresholds |
|---|---|---|
| 4 | -3/4 α, -1/4 α, 1/4 α, 3/4 α | -α/2, 0, α/2 |
| 3 | -2/3 α, 0, 2/3 α | -α/3, α/3 |

Four levels lie evenly around zero, none at zero: `int2` has -2, -1, 0 and 1, and so only three where weights are
symmetric. A channel of zeros becomes ±2^-102 (with three levels zeros): α is at least 2^-100.

    ∂ŵ/∂w = 1 where |w| < α, else 0
    ∂ŵ/∂α = (2 / k) · (q(w / s) - w / s)   where |w| < α,    (2 / k) · q(w / s)   elsewhere

and the gradient of a learned α is multiplied by 1 / sqrt(N), N the number of weights that share it (LSQ's factor, with
Q_p = 1). Their sums are taken in float64.

By statistics, α is max|w|, or the one with the least squared error: with the magnitudes in order, the first j of them
on the inner level a·α and the others on the outer one b·α (a, b = 1/4, 3/4 or 0, 2/3),

    α_j = P / Q,    P = a · Σ_inner + b · Σ_outer,    Q = a² · j + b² · (n - j),    the j that maximises P² / Q

which is exact, since with the best α each magnitude is on the nearer level.

Reference: Liu et al., "ParetoQ: Improving Scaling Laws in Extremely Low-bit LLM Quantization" (arXiv 2502.02631),
section 3. The authors' code clips at 0.99 α, for the sake of rounding, and gives ∂ŵ/∂α = ±1 to clipped ternary
weights, whose level is 2/3 α.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lq_plugin.functional.transforms import applied

#: Numbers of levels.
FOUR, THREE = 4, 3
#: Inner and outer level over α, by their number.
_LEVELS = {FOUR: (0.25, 0.75), THREE: (0.0, 2.0 / 3.0)}


def seq_levels(x: Tensor, scale: Tensor, count: int) -> Tensor:
    """Returns q(x / s), float32: -3/2, -1/2, 1/2 or 3/2 of four levels, -1, 0 or 1 of three, without a gradient.

    Args:
        x: float tensor of any shape.
        scale: α, float32, broadcastable to `x`.
        count: of the levels, 3 or 4.

    >>> seq_levels(torch.tensor([-9.0, -0.1, 0.0, 0.6, 1.0]), torch.tensor(1.0), 4)
    tensor([-1.5000, -0.5000,  0.5000,  1.5000,  1.5000])
    """
    shift, top = (0.5, 1.5) if count == FOUR else (0.0, 1.0)
    return (x.detach().float() / seq_step(scale, count)).sub_(shift).round_().add_(shift).clamp_(-top, top)


def seq_step(scale: Tensor, count: int) -> Tensor:
    """Returns s = 2α / k, the distance between levels."""
    return scale * 2.0 / count


def fake_quantize_seq(x: Tensor, scale: Tensor, count: int, gradient_factor: float = 1.0) -> Tensor:
    """Returns s · q(x / s), with gradients of `x` and of `scale`.

    Args:
        x: float tensor of any shape.
        scale: α > 0, float32, broadcastable to `x`.
        count: of the levels, 3 or 4.
        gradient_factor: of the gradient of α.

    Returns:
        Tensor like `x`, in its dtype.

    >>> w, scale = torch.tensor([0.1, -0.9, 2.0], requires_grad=True), torch.tensor(1.0, requires_grad=True)
    >>> y = fake_quantize_seq(w, scale, 4)
    >>> y.sum().backward()
    >>> y.detach(), w.grad, round(scale.grad.item(), 4)
    (tensor([ 0.2500, -0.7500,  0.7500]), tensor([1., 1., 0.]), 1.05)
    """
    y: Tensor = applied(_FakeQuantizeSEQ, x, scale, count, gradient_factor, learned=(0,))
    return y


class _FakeQuantizeSEQ(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, count: Any, factor: Any) -> Any:
        ctx.save_for_backward(x, scale)
        ctx.count, ctx.factor = count, factor
        return seq_levels(x, scale, count).mul_(seq_step(scale, count)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, scale = ctx.saved_tensors
        outside = x.abs() >= scale
        slope = None
        if ctx.needs_input_grad[1]:
            level, ratio = seq_levels(x, scale, ctx.count), x.float() / seq_step(scale, ctx.count)
            term = (torch.where(outside, level, level - ratio) * grad).double()
            slope = (term.sum_to_size(scale.shape) * (2.0 / ctx.count * ctx.factor)).to(scale.dtype)
        return grad.masked_fill(outside, 0.0), slope, None, None


def best_scale(rows: Tensor, count: int, number: Tensor | None = None) -> Tensor:
    """Returns the α of each row with the least squared error, 0 for a row of zeros; exact up to rounding.

    Args:
        rows: `[rows, n]`.
        count: of the levels, 3 or 4.
        number: weights of each row, `[rows]`, the others being zeros that pad it; None: n.

    Returns:
        Float32 `[rows]`.

    >>> best_scale(torch.tensor([[1.0, -1.0, 3.0, -3.0], [0.0, 0.1, 2.0, -2.0]]), 4)
    tensor([4.0000, 2.4200])
    >>> best_scale(torch.tensor([[0.1, -0.1, 2.0, -2.0]]), 3)
    tensor([3.])
    """
    inner, outer = _LEVELS[count]
    length = rows.shape[1]
    sums = torch.zeros(len(rows), length + 1, dtype=torch.float64, device=rows.device)
    torch.cumsum(rows.detach().double().abs().sort(1).values, 1, out=sums[:, 1:])
    # Zeros come first: those that pad are left out of what is counted.
    padding = 0 if number is None else (length - number).to(rows.device).unsqueeze(1)
    first = torch.arange(length + 1, dtype=torch.float64, device=rows.device) - padding
    product = inner * sums + outer * (sums[:, -1:] - sums)
    square = inner**2 * first.clamp(min=0) + outer**2 * (length - padding - first.clamp(min=0))
    square = square.expand_as(product).clamp(min=1e-300)  # 0 where no weight is on a level that is not 0, nor in P
    best = (product.square() / square).argmax(1, keepdim=True)
    return (product.gather(1, best) / square.gather(1, best)).squeeze(1).float()
