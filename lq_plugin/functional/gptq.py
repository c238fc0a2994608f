"""GPTQ: rounds a weight column by column, and moves the remaining columns so that they compensate the error.

With H = 2 X Xᵀ over the inputs X `[columns, samples]`, λ = dampening · mean(diag H) and the upper Cholesky factor U of
the inverse, (H + λ I)⁻¹ = Uᵀ U, for j = 0, 1, ...::

    ŵ_j = quantize(w_j),  e = (w_j - ŵ_j) / U_jj,  w_k ← w_k - e · U_jk  for k > j       (eqs. 2, 3 and algorithm 1)

This minimises ‖W X - Ŵ X‖² greedily, for each row apart. The same without the inverse: R = U⁻¹ is upper triangular
with H + λ I = R Rᵀ, and of the columns d_k = w_k - ŵ_k that are done, with w as it was::

    y_j = Σ d_k R_kj  over k < j,   ŵ_j = quantize(w_j + y_j / R_jj),   e_j = y_j + d_j R_jj

R is the factor that a Cholesky decomposition gives where columns and rows are taken the last first. Of a block of
columns the sums over the columns before it are one product. One factor serves every weight that reads the inputs, and
any part of its rows.

`act_order` takes the columns in the order of falling diag H: those with large inputs are rounded while many others
can still make up for it. It is no part of the paper but of the authors' code, as is the handling of dead columns, whose
input is always 0: their weights become 0.

References: Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", ICLR 2023 (arXiv 2210.17323), section 3 and algorithm 1; Chen et al., "The Geometry of LLM Quantization:
GPTQ as Babai's Nearest Plane Algorithm" (arXiv 2507.18553), for the form without the inverse.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lq_plugin.errors import CalibrationError
from lq_plugin.functional.fixed_levels import FixedLevels, IntegerLevels
from lq_plugin.intent.spec import IntegerGrid
from lq_plugin.native.gptq import GPTQKernels, gptq_kernels

#: Columns of a symmetric matrix that are taken whole; of more, one half and the diagonal.
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

    With D = W - Ŵ and the errors e of the columns, e = D R, so that D (H + λ I) Dᵀ = D R Rᵀ Dᵀ = e eᵀ.

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
        added: what the diagonal has besides the Hessian's own, the last column first, float64 `[problems, columns]`.
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
    """R of a dampened Hessian, and the order of its columns.

    Args:
        turned: Rᵀ with rows and columns in reverse, which is upper triangular, float64 `[problems, columns, columns]`.
        order, added, dead: see `OrderedHessian`.
    """

    turned: Tensor
    order: Tensor
    added: Tensor
    dead: Tensor


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
    # Not `empty_like`: the kernels read the rows of the factor, however those of the Hessian lie in memory.
    reversed_ = torch.empty(hessian.shape, dtype=torch.float64, device=hessian.device)
    for part in column_parts(columns):
        some = _in_order(hessian, last_first[:, part])
        reversed_[:, part] = some.gather(-1, last_first.unsqueeze(-2).expand_as(some))
    reversed_.diagonal(dim1=-2, dim2=-1).copy_(damped.gather(-1, last_first))
    return OrderedHessian(reversed_, order, added.gather(-1, last_first), diagonal == 0, dampening)


@torch.no_grad()
def factorize(ordered: OrderedHessian) -> Factor:
    """Returns the factor that any weight of these inputs is rounded with, in the memory of the ordered Hessian.

    Raises:
        CalibrationError: a Hessian that is not positive definite, dampened as asked.
    """
    lower = cholesky_factor(ordered.reversed_, ordered.dampening)
    return Factor(lower.mT, ordered.order, ordered.added, ordered.dead)


@torch.no_grad()
def round_rows(weight: Tensor, factor: Factor, levels: FixedLevels, block_columns: int = 128) -> tuple[Tensor, Tensor]:
    """Returns what `gptq_round_measured` gives for some rows of a weight.

    Args:
        weight: `[..., rows, columns]`.
        factor: of the inputs' Hessian.
        levels: of these rows, their tensors broadcastable to the weight.
        block_columns: how many columns are done before the others are updated; it changes the speed alone.
    """
    shape, last_first = weight.shape, factor.order.flip(-1)
    problems = (-1, *shape[-2:])
    # [columns, rows]: a column is contiguous.
    w = _in_order(weight.reshape(problems).mT, last_first).double()
    if bool(factor.dead.any()):
        w.masked_fill_(factor.dead.take_along_dim(last_first, -1).unsqueeze(-1), 0.0)
    levels = levels.mapped(lambda t: _in_order(t.to(weight.device).expand(shape).reshape(problems).mT, last_first))
    done, errors = _solve(w, factor, levels, block_columns)
    # What was added to the diagonal is no error.
    errors -= (w.square_().mul_(factor.added.unsqueeze(-1))).sum(-2)
    done = _in_order(done, last_first.argsort(dim=-1))
    return done.mT.reshape(shape).contiguous(), errors.clamp_(min=0.0).reshape(shape[:-1])


def refuse_non_finite(hessian: Tensor, *weights: Tensor) -> None:
    """Raises `CalibrationError` where a Hessian or one of its weights holds NaN or Inf.

    An input that is NaN or Inf is in the square on the diagonal also.
    """
    for tensor in (hessian.diagonal(dim1=-2, dim2=-1), *weights):
        if tensor.numel() and not all(bool(bound.isfinite()) for bound in tensor.aminmax()):
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
        here, mine = d[..., part], hessian[..., : part.stop, part].to(dtype, copy=True)
        mine[..., : part.start, :] *= 2.0
        with float32_products():
            total += (d[..., : part.stop] @ mine).mul_(here).sum(-1, dtype=torch.float64)
    return total.clamp_(min=0.0)


@contextmanager
def float32_products() -> Iterator[None]:
    """Keeps autocast and oneDNN's bfloat16 (`torch.set_float32_matmul_precision`) off float32 products on CPUs."""
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    try:
        with torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.backends.mkldnn.enabled = before


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


def _added(diagonal: Tensor, dampening: float) -> Tensor:
    """Returns what dampening adds to a diagonal: λ, and the mean of the live ones in place of a dead one."""
    dead = diagonal == 0
    mean = diagonal.sum(-1, keepdim=True) / (~dead).sum(-1, keepdim=True).clamp(min=1)
    mean = torch.where(mean > 0, mean, 1.0)
    return torch.where(dead, mean, 0.0) + dampening * mean


def cholesky_factor(damped: Tensor, dampening: float) -> Tensor:
    """Returns the lower triangular L with H = L Lᵀ, in the memory of H.

    Args:
        damped: H, float64, `[..., columns, columns]`.
        dampening: that is in it, for the message.

    Raises:
        CalibrationError: H is not positive definite.
    """
    diagonal = damped.diagonal(dim1=-2, dim2=-1).clone()
    # LAPACK's matrices are laid out by columns; H is symmetric.
    lower = damped.mT
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
    return lower


def _in_order(matrices: Tensor, order: Tensor) -> Tensor:
    """Returns `[problems, columns, rows]` with the columns in an order, `[problems, columns]`; contiguous."""
    if len(matrices) > 1:
        return matrices.take_along_dim(order.unsqueeze(-1), -2)
    return matrices[0].contiguous().index_select(0, order[0]).unsqueeze(0)  # whole columns are copied


def _columns(levels: FixedLevels, at: int | slice) -> FixedLevels:
    return levels.mapped(lambda t: t[..., at, :])


def _solve(w: Tensor, factor: Factor, levels: FixedLevels, block_columns: int) -> tuple[Tensor, Tensor]:
    """Returns quantized columns, float32, and the sums of squared errors of each row, float64 `[problems, rows]`.

    Weights and levels are `[problems, columns, rows]`, the last column first; `w` becomes what rounding takes off it.
    """
    columns, turned = w.shape[-2], factor.turned
    done = torch.empty(w.shape, dtype=torch.float32, device=w.device)
    kernels = gptq_kernels(w) if type(levels) is IntegerLevels else None
    total = torch.zeros(w[:, 0].shape, dtype=torch.float64, device=w.device)
    block = _block if kernels is None else functools.partial(_compiled_block, kernels)
    for end in range(columns, 0, -block_columns):
        here = slice(max(end - block_columns, 0), end)
        before = turned[:, here, end:] @ w[:, end:]
        block(w[:, here], before, done[:, here], total, turned[:, here, here], _columns(levels, here))
    return done, total


def _block(w: Tensor, y: Tensor, done: Tensor, total: Tensor, turned: Tensor, levels: FixedLevels) -> None:
    """Rounds a block of columns from the last to the first.

    Args:
        w: the weights, `[problems, columns, rows]`; becomes what rounding takes off them.
        y: sums over the columns that are done; is overwritten.
        done: takes the rounded weights.
        total: squared errors are added to it, `[problems, rows]`.
        turned: the block of the factor.
        levels: of these columns.
    """
    for j in reversed(range(w.shape[-2])):
        pivot, column = turned[..., j, j, None], w[..., j, :]
        done[..., j, :] = _columns(levels, j).nearest((column + y[..., j, :] / pivot).float())
        column -= done[..., j, :]
        total += (y[..., j, :] + column * pivot).square()
        y[..., :j, :] += turned[..., :j, j, None] * column.unsqueeze(-2)


def _compiled_block(
    kernels: GPTQKernels, w: Tensor, y: Tensor, done: Tensor, total: Tensor, turned: Tensor, levels: FixedLevels
) -> None:
    """Does what `_block` does by the kernels; `y` stays as it is."""
    assert isinstance(levels, IntegerLevels)
    bounds = levels.grid.quant_min, levels.grid.quant_max
    tensors = (w, y, done, total, turned, levels.scale.float(), levels.zero_point.float())
    for each in zip(*tensors, strict=True):
        kernels.block(bounds, *each)
