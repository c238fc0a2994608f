"""GPTQ: rounds a weight column by column, and moves the remaining columns so that they compensate the error.

With H = 2 X Xᵀ over the inputs X `[columns, samples]`, λ = dampening · mean(diag H) and the upper Cholesky factor U of
the inverse, (H + λ I)⁻¹ = Uᵀ U, for j = 0, 1, ...::

    ŵ_j = quantize(w_j),  e = (w_j - ŵ_j) / U_jj,  w_k ← w_k - e · U_jk  for k > j       (eqs. 2, 3 and algorithm 1)

This minimises ‖W X - Ŵ X‖² greedily, for each row apart. Row j of U holds what eliminating columns 0..j-1 from the
inverse leaves of its row j, so nothing is updated in place of the inverse. Within a block of columns the updates are
applied at once, to all later columns when the block is done.

`act_order` takes the columns in the order of falling diag H: those with large inputs are rounded while many others
can still make up for it. It is no part of the paper but of the authors' code, as is the handling of dead columns, whose
input is always 0: their weights become 0.

Reference: Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", ICLR 2023 (arXiv 2210.17323), section 3 and algorithm 1.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import Tensor

from lq_plugin.errors import CalibrationError
from lq_plugin.functional.fixed_levels import FixedLevels, IntegerLevels
from lq_plugin.intent.spec import IntegerGrid
from lq_plugin.native.gptq import GPTQKernels, gptq_kernels


@torch.no_grad()
def gptq_quantize(
    weight: Tensor,
    hessian: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    grid: IntegerGrid,
    *,
    dampening: float = 0.01,
    act_order: bool = True,
    block_columns: int = 128,
) -> Tensor:
    """Returns the values of a weight on integer levels: `gptq_round` for scales and zero points.

    Args:
        weight, hessian: see `gptq_round`.
        scale, zero_point: float32, broadcastable to the weight.
        grid: the integer levels.
        dampening, act_order, block_columns: see `gptq_round`.

    Returns:
        (q - zero_point) · scale, float32, shaped like the weight.

    Raises:
        CalibrationError: see `gptq_round`.

    >>> weight, inputs = torch.tensor([[0.4, 0.4]]), torch.tensor([[1.0, 1.0], [1.0, 0.9]])
    >>> hessian = 2.0 * inputs.T @ inputs
    >>> gptq_quantize(weight, hessian, torch.tensor(1.0), torch.tensor(0.0), IntegerGrid(-2, 1))
    tensor([[0., 1.]])
    """
    levels = IntegerLevels(scale, zero_point, False, grid)
    return gptq_round(weight, hessian, levels, dampening=dampening, act_order=act_order, block_columns=block_columns)


@torch.no_grad()
def gptq_round(
    weight: Tensor,
    hessian: Tensor,
    levels: FixedLevels,
    *,
    dampening: float = 0.01,
    act_order: bool = True,
    block_columns: int = 128,
) -> Tensor:
    """Returns the values of a weight on levels of any format under fixed scales; the arithmetic is float64.

    Args:
        weight: `[..., rows, columns]`; leading dims are separate problems (the groups of a convolution).
        hessian: 2 X Xᵀ or any multiple of it, `[..., columns, columns]`, undamped.
        levels: their tensors broadcastable to the weight.
        dampening: λ as a share of the mean of diag H over live columns.
        act_order: columns with larger diag H first; else in the order they have.
        block_columns: how many columns are done before the others are updated; it changes the speed alone.

    Returns:
        Levels times steps, float32, shaped like the weight.

    Raises:
        CalibrationError: NaN or Inf, or a Hessian that is not positive definite, dampened as asked.
    """
    return gptq_round_measured(
        weight, hessian, levels, dampening=dampening, act_order=act_order, block_columns=block_columns
    )[0]


@torch.no_grad()
def gptq_round_measured(
    weight: Tensor,
    hessian: Tensor,
    levels: FixedLevels,
    *,
    dampening: float = 0.01,
    act_order: bool = True,
    block_columns: int = 128,
) -> tuple[Tensor, Tensor]:
    """Returns what `gptq_round` gives, and the `output_errors` of it, which the solver knows.

    With D = W - Ŵ and the errors e of the columns, D = e U, so that D (H + λ I) Dᵀ = e U (UᵀU)⁻¹ Uᵀ eᵀ = e eᵀ.

    Args:
        weight, hessian, levels, dampening, act_order, block_columns: see `gptq_round`.

    Raises:
        CalibrationError: see `gptq_round`.

    >>> weight, inputs = torch.tensor([[0.4, 0.4]]), torch.tensor([[1.0, 1.0], [1.0, 0.9]])
    >>> hessian = 2.0 * inputs.T @ inputs
    >>> levels = IntegerLevels(torch.tensor(1.0), torch.tensor(0.0), False, IntegerGrid(-2, 1))
    >>> rounded, errors = gptq_round_measured(weight, hessian, levels)
    >>> torch.allclose(errors, output_errors(weight - rounded, hessian))
    True
    """
    if not bool(hessian.isfinite().all() & weight.isfinite().all()):
        raise CalibrationError("its weight or the products of its inputs hold NaN or Inf")
    shape = weight.shape
    dead = hessian.diagonal(dim1=-2, dim2=-1) == 0
    damped = damped_hessian(hessian, dampening)
    # [columns, rows]: a column is contiguous.
    w = weight.double().masked_fill(dead.unsqueeze(-2), 0.0).mT
    levels = levels.mapped(lambda t: t.to(weight.device).expand(shape).mT)
    order = None
    if act_order:
        order = damped.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True)
        damped = damped.take_along_dim(order.unsqueeze(-1), -2).take_along_dim(order.unsqueeze(-2), -1)
        w, levels = w.take_along_dim(order.unsqueeze(-1), -2), _in_order(levels, order)
    added = damped.diagonal(dim1=-2, dim2=-1).clone()
    diagonal = hessian.diagonal(dim1=-2, dim2=-1).double()
    added -= diagonal if order is None else diagonal.take_along_dim(order, -1)
    factor = inverse_factor(damped, dampening)
    del damped
    done, errors = _solve(w.clone(), factor, levels, block_columns)
    # What was added to the diagonal is no error.
    errors -= (w.sub_(done).square_() * added.unsqueeze(-1)).sum(-2)
    if order is not None:
        done = done.take_along_dim(order.argsort(dim=-1).unsqueeze(-1), -2)
    return done.mT.contiguous(), errors.clamp_(min=0.0)


def output_errors(difference: Tensor, hessian: Tensor) -> Tensor:
    """Returns 2 ‖d X‖² for each row d of W - Ŵ, float64 `[..., rows]`.

    Args:
        difference: `[..., rows, columns]`.
        hessian: 2 X Xᵀ, `[..., columns, columns]`.

    >>> output_errors(torch.tensor([[1.0, -1.0]]), 2 * torch.ones(2, 2))
    tensor([0.], dtype=torch.float64)
    """
    d = difference.double()
    return ((d @ hessian.double()) * d).sum(-1).clamp(min=0.0)


def damped_hessian(hessian: Tensor, dampening: float) -> Tensor:
    """Returns H + λ I, float64, λ a share of the mean over live columns, which is the diagonal of the dead ones.

    Args:
        hessian: `[..., columns, columns]`.
        dampening: the share.
    """
    damped = hessian.to(torch.float64, copy=True)
    diagonal = damped.diagonal(dim1=-2, dim2=-1)
    dead = diagonal == 0
    mean = diagonal.sum(-1, keepdim=True) / (~dead).sum(-1, keepdim=True).clamp(min=1)
    mean = torch.where(mean > 0, mean, 1.0)
    diagonal += torch.where(dead, mean, 0.0) + dampening * mean
    return damped


def inverse_factor(damped: Tensor, dampening: float) -> Tensor:
    """Returns the upper triangular U with H⁻¹ = Uᵀ U, without the inverse.

    With rows and columns reversed, H = L Lᵀ, and U is L⁻¹ reversed.

    Args:
        damped: H.
        dampening: that is in it, for the message.

    Raises:
        CalibrationError: H is not positive definite.
    """
    reversed_ = damped.flip(-1, -2)
    lower, info = torch.linalg.cholesky_ex(reversed_)
    diagonal, pivots = (t.diagonal(dim1=-2, dim2=-1) for t in (reversed_, lower))
    # A singular matrix may pass by rounding, with a pivot that is nothing but rounding.
    noise = damped.shape[-1] * torch.finfo(torch.float64).eps
    bad = (info != 0) | ~(pivots.square() > noise * diagonal).all(-1)
    if bool(bad.any()):
        some = f" ({int(bad.sum())} of {bad.numel()} groups)" if bad.numel() > 1 else ""
        raise CalibrationError(
            f"its Hessian is not positive definite{some}, with a dampening of {dampening:g}: raise the dampening or "
            "bring more inputs"
        )
    identity = torch.eye(damped.shape[-1], dtype=damped.dtype, device=damped.device)
    y: Tensor = torch.linalg.solve_triangular(lower, identity, upper=False).flip(-1, -2)
    return y


def _in_order(levels: FixedLevels, order: Tensor) -> FixedLevels:
    return levels.mapped(lambda t: t.take_along_dim(order.unsqueeze(-1), -2))


def _columns(levels: FixedLevels, at: int | slice) -> FixedLevels:
    return levels.mapped(lambda t: t[..., at, :])


def _solve(w: Tensor, factor: Tensor, levels: FixedLevels, block_columns: int) -> tuple[Tensor, Tensor]:
    """Returns quantized columns, float32, and the sums of squared errors of each row, float64 `[..., rows]`.

    All but the factor are `[..., columns, rows]`; `w` is overwritten.
    """
    columns = w.shape[-2]
    done = torch.empty(w.shape, dtype=torch.float32, device=w.device)
    kernels = gptq_kernels(w) if type(levels) is IntegerLevels else None
    total = torch.zeros(w[..., 0, :].shape, dtype=torch.float64, device=w.device)
    block = _block if kernels is None else functools.partial(_compiled_block, kernels)
    for start in range(0, columns, block_columns):
        end = min(start + block_columns, columns)
        here = slice(start, end)
        errors = block(w[..., here, :], done[..., here, :], factor[..., here, here], _columns(levels, here))
        w[..., end:, :] -= factor[..., here, end:].mT @ errors
        total += errors.square().sum(-2)
    return done, total


def _block(w: Tensor, done: Tensor, factor: Tensor, levels: FixedLevels) -> Tensor:
    """Writes the rounded columns of a block into `done`, overwrites `w`, and returns the columns' errors."""
    errors = torch.empty_like(w)
    for j in range(w.shape[-2]):
        column = w[..., j, :]
        done[..., j, :] = _columns(levels, j).nearest(column.float())
        error = (column - done[..., j, :]) / factor[..., j, j, None]
        errors[..., j, :] = error
        w[..., j + 1 :, :] -= factor[..., j, j + 1 :, None] * error.unsqueeze(-2)
    return errors


def _compiled_block(kernels: GPTQKernels, w: Tensor, done: Tensor, factor: Tensor, levels: FixedLevels) -> Tensor:
    """Rounds a block by the kernels; `w` stays as it is."""
    if w.ndim > 2:  # groups of a convolution
        each = [replace(levels, scale=s, zero_point=z) for s, z in zip(levels.scale, levels.zero_point, strict=True)]
        parts = zip(w, done, factor, each, strict=True)
        return torch.stack([_compiled_block(kernels, *part) for part in parts])
    assert isinstance(levels, IntegerLevels)
    bounds = levels.grid.quant_min, levels.grid.quant_max
    scale, zero_point = (t.float().contiguous() for t in (levels.scale, levels.zero_point))
    factor = factor if factor.stride(1) == 1 else factor.contiguous()
    return kernels.block(w.contiguous(), done, factor, scale, zero_point, bounds)
