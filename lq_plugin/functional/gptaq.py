"""GPTAQ: a weight to be rounded towards, which makes up for what quantization has changed in the inputs.

GPTQ keeps W X for the inputs X that the quantized layers in front give. Asymmetric calibration keeps W X̃, with the
inputs X̃ of the float model:

    min over Ŵ of ‖Ŵ X - W X̃‖²

In real numbers, with H = 2 X Xᵀ, D = 2 (X̃ - X) Xᵀ and GPTQ's λ on the diagonal, the minimum is at

    W* = W + W D (H + λ I)⁻¹

and ‖Ŵ X - W X̃‖² = ‖(Ŵ - W*) X‖² + what no weight changes (λ = 0), so that GPTQ rounds W* instead of W. The authors
take the columns one by one: when column q is rounded, what changed in its input is made up for by the columns after
it, w_k ← w_k + α w_q P_qk with P = triu(D Uᵀ, 1) U, GPTQ's U, and α = 1/4 in their code. Here all columns take part at
once, which is the exact solution, and the order of the columns does not matter to it.

Reference: Li et al., "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration", ICML
2025 (arXiv 2504.02692), and its code, https://github.com/Intelligent-Computing-Lab-Yale/GPTAQ.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lq_plugin.functional.gptq import cholesky_factor, damped_hessian


@torch.no_grad()
def asymmetric_target(weight: Tensor, hessian: Tensor, difference: Tensor, dampening: float = 0.01) -> Tensor:
    """Returns W*, the weight that is rounded instead of W, float64.

    Args:
        weight: W, `[..., rows, columns]`.
        hessian: 2 X Xᵀ or a multiple of it, `[..., columns, columns]`, undamped.
        difference: 2 (X̃ - X) Xᵀ, or the same multiple of it.
        dampening: λ as a share of the mean of diag H over live columns.

    Raises:
        CalibrationError: a Hessian that is not positive definite, dampened as asked.

    >>> x, floats = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> asymmetric_target(torch.tensor([[1.0, 3.0]]), x @ x.T, (floats - x) @ x.T, dampening=0.0)
    tensor([[0.5000, 3.0000]], dtype=torch.float64)
    """
    w, lower = weight.double(), cholesky_factor(damped_hessian(hessian, dampening), dampening)
    y: Tensor = w + torch.cholesky_solve((w @ difference.double()).mT, lower).mT
    return y
