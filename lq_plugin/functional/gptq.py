"""GPTQ: rounds a weight column by column, and moves the remaining columns so that they compensate the error.

With H = 2 X Xᵀ over the inputs X `[columns, samples]`, λ = dampening · mean(diag H) and the upper Cholesky factor U of
the inverse, (H + λ I)⁻¹ = Uᵀ U, for j = 0, 1, ...::

    ŵ_j = quantize(w_j),  e = (w_j - ŵ_j) / U_jj,  w_k ← w_k - e · U_jk  for k > j       (eqs. 2, 3 and algorithm 1)

This minimises ‖W X - Ŵ X‖² greedily, for each row apart. Row j of U holds what eliminating columns 0..j-1 from the
inverse leaves of its row j, so nothing is updated in place of the inverse. Within a block of columns the updates are
applied at once, to all later columns when the block is done. One factor serves every weight that reads the inputs, and
any part of its rows.

`act_order` takes the columns in the order of falling diag H: those with large inputs are rounded while many others
can still make up for it. It is no part of the paper but of the authors' code, as is the handling of dead columns, whose
input is always 0: their weights become 0.

Reference: Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", ICLR 2023 (arXiv 2210.17323), section 3 and algorithm 1.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lq_plugin.errors import CalibrationError
from lq_plugin.functional.fixed_levels import FixedLevels, IntegerLevels
from lq_plugin.intent.spec import IntegerGrid
from lq_plugin.native.gptq import GPTQKernels, gptq_kernels

#: Columns of triangular and symmetric matrices that are taken whole; of more, most of the work are products of parts.
_AT_ONCE = 256


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
    refuse_non_finite(hessian, weight)
    return round_rows(weight, factorize(in_order(hessian, dampening, act_order)), levels, block_columns)


@dataclass(frozen=True, eq=False)
class OrderedHessian:
    """A dampened Hessian, its columns and rows in the order of the columns to be rounded, the last first.

    Args:
        reversed_: H + λ I, float64 `[problems, columns, columns]`.
        order: columns as they are rounded, int64 `[problems, columns]`.
        added: what the diagonal has besides the Hessian's own, in this order, float64 `[problems, columns]`.
        dead: columns of the weight whose input is always 0, bool `[problems, columns]`.
        dampening: λ as a share of the mean of diag H over live columns.
    """

    reversed_: Tensor
    order: Tensor
    added: Tensor
    dead: Tensor
    dampening: float


@dataclass(frozen=True, eq=False)
class Factor:
    """U of a dampened Hessian, and the order of its columns.

    Args:
        lower: U with rows and columns in reverse, which is lower triangular, float64 `[problems, columns, columns]`.
        order, added, dead: see `OrderedHessian`.
    """

    lower: Tensor
    order: Tensor
    added: Tensor
    dead: Tensor

    def rows(self, start: int, end: int) -> Tensor:
        """Returns rows `start` to `end` of U from column `start` on, contiguous."""
        last = self.lower.shape[-1]
        return self.lower[:, last - end : last - start, : last - start].flip(-1, -2)


@torch.no_grad()
def in_order(hessian: Tensor, dampening: float, act_order: bool) -> OrderedHessian:
    """Returns a copy of a Hessian as `factorize` takes it.

    Args:
        hessian: 2 X Xᵀ or any multiple of it, `[..., columns, columns]`, undamped.
        dampening: λ as a share of the mean of diag H over live columns.
        act_order: columns with larger diag H first; else in the order they have.
    """
    columns = hessian.shape[-1]
    hessian = hessian.reshape(-1, columns, columns)
    diagonal = hessian.diagonal(dim1=-2, dim2=-1).double()
    added, damped = _added(diagonal, dampening), diagonal + _added(diagonal, dampening)
    order = torch.arange(columns, device=hessian.device).expand(len(hessian), columns)
    if act_order:
        order = damped.argsort(dim=-1, descending=True, stable=True)
    last_first = order.flip(-1)
    problems = torch.arange(len(hessian), device=hessian.device).view(-1, 1, 1)
    reversed_ = hessian[problems, last_first.unsqueeze(-1), last_first.unsqueeze(-2)].double()
    reversed_.diagonal(dim1=-2, dim2=-1).copy_(damped.gather(-1, last_first))
    return OrderedHessian(reversed_, order, added.gather(-1, order), diagonal == 0, dampening)


@torch.no_grad()
def factorize(ordered: OrderedHessian) -> Factor:
    """Returns the factor that any weight of these inputs is rounded with, in the memory of the ordered Hessian.

    Raises:
        CalibrationError: a Hessian that is not positive definite, dampened as asked.
    """
    lower = _inverse_lower(ordered.reversed_, ordered.dampening)
    return Factor(lower, ordered.order, ordered.added, ordered.dead)


@torch.no_grad()
def round_rows(weight: Tensor, factor: Factor, levels: FixedLevels, block_columns: int = 128) -> tuple[Tensor, Tensor]:
    """Returns what `gptq_round_measured` gives for some rows of a weight.

    Args:
        weight: `[..., rows, columns]`.
        factor: of the inputs' Hessian.
        levels: of these rows, their tensors broadcastable to the weight.
        block_columns: how many columns are done before the others are updated; it changes the speed alone.
    """
    shape = weight.shape
    problems = (-1, *shape[-2:])
    # [columns, rows]: a column is contiguous.
    w = _in_order(weight.reshape(problems).mT, factor.order).double()
    if bool(factor.dead.any()):
        w.masked_fill_(factor.dead.take_along_dim(factor.order, -1).unsqueeze(-1), 0.0)
    levels = levels.mapped(lambda t: _in_order(t.to(weight.device).expand(shape).reshape(problems).mT, factor.order))
    done, errors = _solve(w.clone(), factor, levels, block_columns)
    # What was added to the diagonal is no error.
    errors -= (w.sub_(done).square_() * factor.added.unsqueeze(-1)).sum(-2)
    done = _in_order(done, factor.order.argsort(dim=-1))
    return done.mT.reshape(shape).contiguous(), errors.clamp_(min=0.0).reshape(shape[:-1])


def refuse_non_finite(hessian: Tensor, *weights: Tensor) -> None:
    """Raises `CalibrationError` where a Hessian or one of its weights holds NaN or Inf."""
    if not all(bool(tensor.isfinite().all()) for tensor in (hessian, *weights)):
        raise CalibrationError("its weight or the products of its inputs hold NaN or Inf")


def output_errors(difference: Tensor, hessian: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Returns 2 ‖d X‖² for each row d of W - Ŵ, float64 `[..., rows]`.

    Args:
        difference: `[..., rows, columns]`.
        hessian: 2 X Xᵀ, `[..., columns, columns]`.
        dtype: of the products; in float32, in half the time, some 1e-5 of a result are rounding.

    >>> output_errors(torch.tensor([[1.0, -1.0]]), 2 * torch.ones(2, 2))
    tensor([0.], dtype=torch.float64)
    """
    d = difference.to(dtype)
    total = torch.zeros(d.shape[:-1], dtype=torch.float64, device=d.device)
    for part in column_parts(d.shape[-1]):
        # Of a symmetric matrix one half and the diagonal are enough.
        here, mine = d[..., part], hessian[..., : part.stop, part].to(dtype)
        product = here @ mine[..., part.start :, :] + 2.0 * d[..., : part.start] @ mine[..., : part.start, :]
        total += (product * here).sum(-1, dtype=torch.float64)
    return total.clamp_(min=0.0)


def column_parts(columns: int) -> list[slice]:
    """Returns slices of the columns of a symmetric matrix, with as much of which it is worked on at a time."""
    step = max(-(-columns // 8), _AT_ONCE)
    return [slice(start, min(start + step, columns)) for start in range(0, columns, step)]


def damped_hessian(hessian: Tensor, dampening: float) -> Tensor:
    """Returns H + λ I, float64, λ a share of the mean over live columns, which is the diagonal of the dead ones.

    Args:
        hessian: `[..., columns, columns]`.
        dampening: the share.
    """
    damped = hessian.to(torch.float64, copy=True)
    diagonal = damped.diagonal(dim1=-2, dim2=-1)
    diagonal += _added(diagonal, dampening)
    return damped


def inverse_factor(damped: Tensor, dampening: float) -> Tensor:
    """Returns the upper triangular U with H⁻¹ = Uᵀ U, without the inverse.

    Args:
        damped: H, float64.
        dampening: that is in it, for the message.

    Raises:
        CalibrationError: H is not positive definite.
    """
    return _inverse_lower(damped.flip(-1, -2), dampening).flip(-1, -2)


def _added(diagonal: Tensor, dampening: float) -> Tensor:
    """Returns what dampening adds to a diagonal: λ, and the mean of the live ones in place of a dead one."""
    dead = diagonal == 0
    mean = diagonal.sum(-1, keepdim=True) / (~dead).sum(-1, keepdim=True).clamp(min=1)
    mean = torch.where(mean > 0, mean, 1.0)
    return torch.where(dead, mean, 0.0) + dampening * mean


def _inverse_lower(reversed_: Tensor, dampening: float) -> Tensor:
    """Returns L⁻¹ with H = L Lᵀ, rows and columns of all in reverse: L⁻¹ is U. In the memory of `reversed_`, H.

    Raises:
        CalibrationError: H is not positive definite.
    """
    diagonal = reversed_.diagonal(dim1=-2, dim2=-1).clone()
    # LAPACK's matrices are laid out by columns; H is symmetric.
    lower = reversed_.mT
    info = torch.empty(lower.shape[:-2], dtype=torch.int32, device=lower.device)
    torch.linalg.cholesky_ex(lower, out=(lower, info))
    pivots = lower.diagonal(dim1=-2, dim2=-1)
    # A singular matrix may pass by rounding, with a pivot that is nothing but rounding.
    noise = lower.shape[-1] * torch.finfo(torch.float64).eps
    bad = (info != 0) | ~(pivots.square() > noise * diagonal).all(-1)
    if bool(bad.any()):
        some = f" ({int(bad.sum())} of {bad.numel()} groups)" if bad.numel() > 1 else ""
        raise CalibrationError(
            f"its Hessian is not positive definite{some}, with a dampening of {dampening:g}: raise the dampening or "
            "bring more inputs"
        )
    _invert(lower)
    return lower


def _invert(lower: Tensor) -> None:
    """Writes the inverse of a lower triangular matrix into it; that of [[A, 0], [C, B]] has -B⁻¹ C A⁻¹ in C's place."""
    columns = lower.shape[-1]
    if columns <= _AT_ONCE:
        identity = torch.eye(columns, dtype=lower.dtype, device=lower.device)
        lower.copy_(torch.linalg.solve_triangular(lower, identity, upper=False))
        return
    half = columns // 2
    first, second, below = lower[..., :half, :half], lower[..., half:, half:], lower[..., half:, :half]
    _invert(first)
    _invert(second)
    below.copy_(second @ (below @ first)).neg_()


def _in_order(matrices: Tensor, order: Tensor) -> Tensor:
    """Returns `[problems, columns, rows]` with the columns in an order, `[problems, columns]`; contiguous."""
    if len(matrices) > 1:
        return matrices.take_along_dim(order.unsqueeze(-1), -2)
    return matrices[0].contiguous().index_select(0, order[0]).unsqueeze(0)  # whole columns are copied


def _columns(levels: FixedLevels, at: int | slice) -> FixedLevels:
    return levels.mapped(lambda t: t[..., at, :])


def _solve(w: Tensor, factor: Factor, levels: FixedLevels, block_columns: int) -> tuple[Tensor, Tensor]:
    """Returns quantized columns, float32, and the sums of squared errors of each row, float64 `[problems, rows]`.

    Weights and levels are `[problems, columns, rows]`; `w` is overwritten.
    """
    columns = w.shape[-2]
    done = torch.empty(w.shape, dtype=torch.float32, device=w.device)
    kernels = gptq_kernels(w) if type(levels) is IntegerLevels else None
    total = torch.zeros(w[:, 0].shape, dtype=torch.float64, device=w.device)
    block = _block if kernels is None else functools.partial(_compiled_block, kernels)
    for start in range(0, columns, block_columns):
        end = min(start + block_columns, columns)
        here, upper = slice(start, end), factor.rows(start, end)
        errors = block(w[:, here], done[:, here], upper[..., : end - start], _columns(levels, here))
        w[:, end:].baddbmm_(upper[..., end - start :].mT, errors, alpha=-1.0)
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
    if w.ndim > 2 and len(w) == 1:
        levels = levels.mapped(lambda t: t[0])
        return _compiled_block(kernels, w[0], done[0], factor[0], levels).unsqueeze(0)
    if w.ndim > 2:
        each = [replace(levels, scale=s, zero_point=z) for s, z in zip(levels.scale, levels.zero_point, strict=True)]
        parts = zip(w, done, factor, each, strict=True)
        return torch.stack([_compiled_block(kernels, *part) for part in parts])
    assert isinstance(levels, IntegerLevels)
    bounds = levels.grid.quant_min, levels.grid.quant_max
    scale, zero_point = (t.float().contiguous() for t in (levels.scale, levels.zero_point))
    factor = factor if factor.stride(1) == 1 else factor.contiguous()
    return kernels.block(w.contiguous(), done, factor, scale, zero_point, bounds)
