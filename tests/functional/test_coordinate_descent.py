"""Coordinate descent against the definition of what it minimises, one number at a time in numpy."""

import numpy as np
import pytest
import torch

from lq_plugin.functional.coordinate_descent import descend
from lq_plugin.functional.fixed_levels import FixedLevels, IntegerLevels, TableLevels
from lq_plugin.functional.minifloat import E2M1, signed_values
from lq_plugin.intent.spec import IntegerGrid

ROWS, COLUMNS = 6, 24


def error(w: np.ndarray, values: np.ndarray, hessian: np.ndarray) -> float:
    return float(np.einsum("ij,jk,ik->", w - values, hessian, w - values))


def problem(trainable: bool, affine: bool) -> tuple[torch.Tensor, torch.Tensor, FixedLevels]:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(ROWS, COLUMNS, generator=generator)
    x = torch.randn(100, COLUMNS, generator=generator) @ torch.randn(COLUMNS, COLUMNS, generator=generator)
    hessian = 2.0 * (x.T @ x).double()
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(COLUMNS, dtype=torch.float64)
    grouped = w.view(ROWS, 2, -1)
    if affine:
        low, high = grouped.amin(2, keepdim=True), grouped.amax(2, keepdim=True)
        scale, zero = (high - low) / 7, (-low / (high - low) * 7).round()
        grid = IntegerGrid(0, 7, affine=True)
    else:
        scale = grouped.abs().amax(2, keepdim=True) / 3
        zero, grid = torch.zeros_like(scale), IntegerGrid(-4, 3)
    scale, zero = (t.expand_as(grouped).reshape(ROWS, COLUMNS) for t in (scale, zero))
    return w, hessian, IntegerLevels(scale, zero, trainable, grid)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("trainable", [False, True])
def test_no_code_and_no_scale_can_be_better(trainable: bool, affine: bool) -> None:
    w, hessian, levels = problem(trainable, affine)
    sets = list(torch.arange(COLUMNS).split(COLUMNS // 2))
    start = levels.nearest(w)
    values, scale = descend(w, start, hessian, levels, sets, 100)
    wanted, found, h, s = (t.double().numpy() for t in (w, values, hessian, scale))
    least = error(wanted, found, h)
    assert least < (0.7 if trainable else 0.8) * error(wanted, start.double().numpy(), h)
    codes = np.round(found / s) + levels.zero_point.numpy()
    np.testing.assert_allclose((codes - levels.zero_point.numpy()) * s, found, rtol=1e-5)
    for row in range(ROWS):
        for column in range(COLUMNS):
            for code in range(levels.grid.quant_min, levels.grid.quant_max + 1):
                other = found.copy()
                other[row, column] = (code - float(levels.zero_point[row, column])) * s[row, column]
                assert error(wanted, other, h) > least * (1 - 1e-6)
        for some in sets if trainable else []:
            for factor in (0.999, 1.001):
                other = found.copy()
                other[row, some.numpy()] *= factor
                assert error(wanted, other, h) > least * (1 - 1e-6)
    if not trainable:
        assert torch.equal(scale, levels.scale)


def test_levels_of_a_table_and_columns_in_any_order() -> None:
    w, hessian, _ = problem(False, False)
    scale = torch.full((ROWS, COLUMNS), 0.25)
    levels = TableLevels(scale, torch.zeros_like(scale), False, signed_values(E2M1))
    start, order = levels.nearest(w), torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(1))
    values, kept = descend(w, start, hessian, levels, [order], 50)
    assert torch.equal(kept, scale)
    assert torch.isin(values / scale, levels.table).all()
    wanted, found, h = (t.double().numpy() for t in (w, values, hessian))
    assert error(wanted, found, h) < 0.8 * error(wanted, start.double().numpy(), h)
    for row, column in np.ndindex(found.shape):
        for level in levels.table.tolist():
            other = found.copy()
            other[row, column] = 0.25 * level
            assert error(wanted, other, h) > error(wanted, found, h) * (1 - 1e-9)
