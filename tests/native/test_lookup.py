"""Kernels that read tables against torch operations, in every variant, dtype and number of threads."""

import pytest
import torch
from torch.nn import functional as F

from lq_plugin.functional.affine import fake_quantize, qparams_from_bounds
from lq_plugin.functional.lsq import lsq_gradients
from lq_plugin.intent.spec import IntegerGrid
from lq_plugin.native import available
from lq_plugin.native.kernels import Kernels
from lq_plugin.native.lookup import LookupKernels

pytestmark = pytest.mark.skipif(not available(), reason="needs a C++ compiler")
ROWS = 40
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VARIANTS = Kernels().variants if available() else ()


@pytest.fixture(params=VARIANTS)
def kernels(request):
    return LookupKernels(request.param)


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def made(columns, dtype, count=70):
    g = torch.Generator().manual_seed(columns)
    table = torch.randn(ROWS, columns, generator=g).to(dtype)
    return table, torch.randint(0, ROWS, (count // 2, 2), generator=g), g


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("columns", "parts"), [(32, 1), (20, 1), (96, 6), (1, 1)])
@pytest.mark.parametrize("grid", [IntegerGrid(-7, 7), IntegerGrid(0, 15, affine=True), IntegerGrid(-8, 0)], ids=str)
def test_rows_are_those_of_the_quantized_table(kernels, columns, parts, dtype, grid):
    table, index, g = made(columns, dtype)
    blocks = table.view(ROWS, parts, -1)
    own = qparams_from_bounds(blocks.amin(2, keepdim=True), blocks.amax(2, keepdim=True), grid)
    given = torch.rand(ROWS, parts, 1, generator=g) * 0.2 + 0.01, own[1]
    one = given[0][:1, :1], own[1][:1, :1]
    bounds = grid.quant_min, grid.quant_max
    for qparams, passed in ((own, None), (given, given), (one, one)):
        y, mask, taken = kernels.look_up(table, index, passed, bounds, grid.affine, parts, masked=True, taken=True)
        assert torch.equal(y, fake_quantize(blocks, *qparams, grid).view(table.shape)[index])
        assert torch.equal(taken.rows, table[index.flatten()])
        for mine, theirs in zip((taken.scale, taken.zero_point), qparams, strict=True):
            assert torch.equal(mine.view(-1, parts), theirs.expand(ROWS, parts, 1)[index.flatten()].squeeze(2))
        gradient = torch.randn(y.shape, generator=g).to(dtype)
        leaf = blocks.clone().requires_grad_()
        F.embedding(index, fake_quantize(leaf, *qparams, grid).view(table.shape), 3).backward(gradient)
        assert torch.equal(kernels.add_rows(gradient, index, mask, table.shape, parts, 3), leaf.grad.view(table.shape))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("one", [False, True])
@pytest.mark.parametrize("rounded", [False, True])
def test_learned_gradients_are_the_formulas(kernels, threads, one, rounded, dtype):
    """Gradients of a row that is read twice add up, the padding has none, and results of threads are bit-equal."""
    table, index, g = made(640, dtype, 120)  # more than one thread takes
    scale = torch.randn(1 if one else ROWS, 1 if one else 4, 1, generator=g) * 0.2  # some below 0
    zero_point = torch.randn(scale.shape, generator=g)
    constants, needs, parts = (-7, 7, 0.3, rounded), (True, True, True), scale.shape[1]
    y, _, taken = kernels.look_up(
        table, index, (scale, zero_point), (-7, 7), False, parts, masked=False, learned=True, taken=True
    )
    gradient = torch.randn(y.shape, generator=g).to(dtype)
    shown = gradient.masked_fill((index == 5).unsqueeze(-1), 0.0).view(index.numel(), parts, -1)
    rows = table.view(ROWS, parts, -1)[index.flatten()]
    qparams = [value if one else value[index.flatten()] for value in (scale, zero_point)]
    wanted = lsq_gradients(rows, *qparams, shown, constants, needs)
    shapes = table.shape, scale.shape
    dense = kernels.learned_gradients(gradient, index, taken, constants, shapes, parts, (False, False), needs, 5)
    as_read = kernels.learned_gradients(gradient, index, taken, constants, shapes, parts, (True, True), needs, 5)
    assert torch.equal(as_read[0].view(rows.shape), wanted[0])
    close = {"rtol": 1e-5, "atol": 1e-5}
    for mine, read, part, tensor in zip(dense[1:], as_read[1:], wanted[1:], (scale, zero_point), strict=True):
        torch.testing.assert_close(read, part, **close)
        summed = part if one else torch.zeros_like(tensor).index_add_(0, index.flatten(), part)
        torch.testing.assert_close(mine, summed, **close)
    table_gradient = torch.ops.aten.embedding_backward(wanted[0].view(y.shape), index, ROWS, 5, False, False)
    assert torch.equal(dense[0], table_gradient)
    torch.set_num_threads(3 - threads)
    again = kernels.learned_gradients(gradient, index, taken, constants, shapes, parts, (False, False), needs, 5)
    assert all(torch.equal(*pair) for pair in zip(dense, again, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extremes_of_rows_are_followed(kernels, dtype):
    table, index, _ = made(20, dtype)
    low, high = (part.float() for part in (table.amin(1), table.amax(1)))
    bounds = torch.stack((low.amin(), high.amax()))
    assert kernels.knows_rows(table, index, low, high, 999)
    largest, other = int(high.argmax()), int(high.argmin())
    for row, value in ((largest, 0.0), (2, 90.0), (3, float("nan")), (3, 1.0), (2, -90.0), (other, None)):
        if value is not None:
            table[row] = value
        rows, before = torch.tensor([[row, row, other]]), bounds.clone()
        assert kernels.knows_rows(table, rows.flip(1), low, high, 1)
        assert kernels.knows_rows(table, rows, low, high, 999) == (value is None)
        changed = kernels.follow_rows(table, rows, low, high, bounds)
        assert changed or torch.equal(before, bounds)
        assert torch.equal(low.nan_to_num(8e8), table.amin(1).float().nan_to_num(8e8))
        wanted = torch.stack((table.amin(), table.amax())).float()
        assert torch.equal(bounds.nan_to_num(8e8), wanted.nan_to_num(8e8))
    assert not changed
    assert kernels.knows_rows(table, rows, low, high, 999)
    for outside in (ROWS, -1, 10**12):
        with pytest.raises(IndexError, match=f"rows of the table are 0 to {ROWS - 1}"):
            kernels.follow_rows(table, torch.tensor([1, outside]), low, high, bounds)
