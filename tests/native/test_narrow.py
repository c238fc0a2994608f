"""Operands and results of 16 bits: the levels of the float32 path, rounded once, in every variant that runs here."""

from __future__ import annotations

import importlib
from typing import get_args

import numpy as np
import pytest
import torch
from torch import nn

from lq_plugin import QuantPlan, Rule, calibrate, prepare
from lq_plugin.functional.affine import extremes, fake_quantize, fake_quantize_observed, fake_quantize_to_extremes
from lq_plugin.functional.block_kernel import fake_quantize_blocks, mx_rule, ocp_rule
from lq_plugin.functional.lookup import Reading, fake_quantize_rows
from lq_plugin.functional.lsq import Band, fake_quantize_learned
from lq_plugin.functional.minifloat import E2M1
from lq_plugin.intent.spec import IntegerGrid, PerChannel
from lq_plugin.native import available, switch as switch_module, use_native
from lq_plugin.native.kernels import Kernels
from lq_plugin.native.layouts import Layout, new_mask

if not available():
    pytest.skip("no C++ compiler", allow_module_level=True)

SINGLE, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16
PAIRS = [(BRAIN, BRAIN), (HALF, HALF), (SINGLE, BRAIN), (SINGLE, HALF)]
SPECIAL = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-40, 3e38, -3e38, 6e-8, 65504.0, 7e4]


@pytest.fixture(params=Kernels().variants)
def variant(request, monkeypatch):
    kernels = Kernels(request.param)
    monkeypatch.setattr(switch_module, "_compiled", lambda: kernels)
    return request.param


@pytest.fixture(params=PAIRS, ids=lambda pair: "-to-".join(str(dtype).removeprefix("torch.") for dtype in pair))
def pair(request):
    return request.param


def numbers(shape, dtype, special=True):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))) * 3
    x.view(-1)[::7] = (x.view(-1)[::7] * 4).round() / 8  # halves of a step
    if special:
        x.view(-1)[: len(SPECIAL)] = torch.tensor(SPECIAL)
    return x.to(dtype)


def same(mine, theirs):
    """Equal in dtype and in bits, but for the payload of a NaN."""
    kind = torch.int32 if theirs.dtype == SINGLE else torch.int16
    nan = theirs.isnan()
    return (
        mine.dtype == theirs.dtype
        and torch.equal(mine.isnan(), nan)
        and torch.equal(mine.masked_fill(nan, 0).view(kind), theirs.masked_fill(nan, 0).view(kind))
    )


def by_hand(x, scale, zero_point, grid):
    """Values and what is not clipped, by numpy in float32."""
    ratio = np.rint(x.float().numpy() * (np.float32(1.0) / scale))
    low, high = np.float32(grid.quant_min) - zero_point, np.float32(grid.quant_max) - zero_point
    return np.clip(ratio, low, high) * scale, ~((ratio < low) | (ratio > high))


@pytest.mark.parametrize("grid", [IntegerGrid(-128, 127), IntegerGrid(0, 255, True), IntegerGrid(-7, 7)], ids=str)
@pytest.mark.parametrize("step", [0.05, 0.5, 300.0])
def test_levels_and_gradient_against_numpy(variant, pair, grid, step):
    scale, zero_point = np.array([step], np.float32), np.array([1.0 if grid.affine else 0.0], np.float32)
    x = numbers((40_003,), pair[0]).requires_grad_()
    with np.errstate(over="ignore", invalid="ignore"):
        values, inside = by_hand(x.detach(), scale, zero_point, grid)
    low, high = torch.tensor([-0.5]), torch.tensor([0.5])
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(pair[1])
    qparams = torch.from_numpy(scale), torch.from_numpy(zero_point)
    with use_native(True):
        for y in (
            fake_quantize(x, *qparams, grid, pair[1]),
            fake_quantize_observed(x, *qparams, grid, low, high, pair[1]),
        ):
            assert same(y.detach(), torch.from_numpy(values).to(pair[1]))
            (slope,) = torch.autograd.grad(y, x, upstream)
            known = torch.from_numpy(inside) & ~x.isnan()
            assert same(slope.masked_fill(x.isnan(), 0), torch.where(known, upstream.to(pair[0]), 0.0))
    assert low.isnan().all()  # as x.min()
    assert high.isnan().all()


def test_extremes_in_float32(variant, pair):
    x, low, high = numbers((5000,), pair[0], special=False), torch.tensor([-0.5]), torch.tensor([0.5])
    with use_native(True):
        fake_quantize_observed(x, torch.tensor([0.1]), torch.tensor([0.0]), IntegerGrid(-8, 7), low, high, pair[1])
        assert (low.dtype, high.dtype) == (SINGLE, SINGLE)
        assert (low, high) == (x.float().min(), x.float().max())
        rows = x.view(50, 100)
        for mine, theirs in zip(extremes(rows, (50, 1)), (rows.amin(1), rows.amax(1)), strict=True):
            assert same(mine.flatten(), theirs)


@pytest.mark.parametrize("power", [-30, -24, -10, 0, 90])
@pytest.mark.parametrize("dtype", [BRAIN, HALF])
def test_every_place_of_a_float_is_rounded_to_the_nearest(variant, dtype, power):
    """Whole numbers of 22 bits under a scale of 2^p, on a grid that holds them all: only the result is rounded."""
    whole = torch.randint(-(2**22), 2**22, (20_000,), generator=torch.Generator().manual_seed(0))
    near = torch.arange(-(2**15), 2**15) * 64 + torch.tensor([[-1], [0], [1]])
    x = torch.cat([whole, near.flatten().clamp(-(2**22), 2**22)]).float()
    scale, grid = torch.tensor([2.0**power]), IntegerGrid(-(2**22), 2**22)
    with use_native(True):
        kept = Kernels(variant).fake_quantize(
            x * 2.0**power, scale, torch.zeros(1), (grid.quant_min, grid.quant_max),
            Layout(1, 1, x.numel(), 1), masked=False, dtype=dtype,
        )[0]  # fmt: skip
    assert same(kept, (x * 2.0**power).to(dtype))


@pytest.mark.parametrize("dtype", [BRAIN, HALF])
def test_every_number_of_16_bits_is_read(variant, dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    layout = Layout(1, 1, every.numel(), 1)
    mask = torch.full_like(new_mask(every, layout), -1)
    assert same(Kernels(variant).mask_gradient(every, mask, layout, SINGLE), every.float())
    assert same(Kernels(variant).mask_gradient(every, mask, layout), every)


@pytest.mark.parametrize("dtype", [SINGLE, BRAIN, HALF])
@pytest.mark.parametrize(("runs", "length"), [(1, 70_003), (5, 33), (3, 16), (2, 7)])
def test_gradients_are_masked_in_place(variant, dtype, runs, length):
    layout = Layout(runs, 1, length, 1)
    bits = (
        torch.rand(runs, length, generator=torch.Generator().manual_seed(0)) < torch.tensor([0.5, 1.0])[:, None, None]
    )
    for inside in bits:
        padded = torch.nn.functional.pad(inside.int(), (0, -length % 16)).view(runs, -1, 16)
        words = (padded << torch.arange(16)).sum(-1)
        mask = torch.where(words > 2**15 - 1, words - 2**16, words).to(torch.int16).flatten()
        gradient = numbers((runs, length), dtype, special=False)
        wanted = torch.where(inside, gradient, 0.0).to(dtype)
        assert same(Kernels(variant).mask_gradient(gradient, mask, layout), wanted)
        Kernels(variant).keep(gradient, mask, layout)
        assert same(gradient, wanted)


def both(function, x, pair, *others):
    """Value and gradients of each tensor, with kernels and without."""
    results = []
    for on in (True, False):
        with use_native(on):
            copies = [torch.empty_like(t).copy_(t).requires_grad_() for t in (x, *others)]
            y = function(*copies)
            y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(pair[1]))
            results.append([y.detach(), *(t.grad for t in copies)])
    return zip(*results, strict=True)


@pytest.mark.parametrize("shape", [(5, 1, 1, 1), (1, 7, 1, 1), (1, 1, 1, 19), (5, 1, 9, 1)])
def test_scales_along_dims(variant, pair, shape):
    x = numbers((5, 7, 9, 19), pair[0], special=False)
    scale = torch.rand(shape, generator=torch.Generator().manual_seed(1)) + 0.1
    for memory in (torch.contiguous_format, torch.channels_last):
        moved = x.contiguous(memory_format=memory)
        function = lambda v: fake_quantize(v, scale, torch.ones(shape), IntegerGrid(-8, 7, True), pair[1])  # noqa: E731
        for mine, theirs in both(function, moved, pair):
            assert same(mine.contiguous(), theirs.contiguous())
            assert mine.stride() == moved.stride()


@pytest.mark.parametrize("grid", [IntegerGrid(-127, 127), IntegerGrid(-8, 7, True)], ids=str)
def test_ranges_of_a_weight(variant, pair, grid):
    x = numbers((6, 333), pair[0], special=False)
    for mine, theirs in both(lambda v: fake_quantize_to_extremes(v, (6, 1), grid, pair[1]), x, pair):
        assert same(mine, theirs)


@pytest.mark.parametrize("band", get_args(Band))
def test_learned(variant, pair, band):
    x = numbers((3, 40_001), pair[0], special=False)
    function = lambda v, s, z: fake_quantize_learned(v, s, z, IntegerGrid(-8, 7, True), 0.3, band, pair[1])  # noqa: E731
    scale, zero_point = torch.tensor([[0.5], [-0.3], [0.0]]), torch.full((3, 1), 1.4)
    for mine, theirs in both(function, x, pair, scale, zero_point):
        assert torch.equal(mine, theirs)
        assert mine.dtype == theirs.dtype


@pytest.mark.parametrize("shape", [(3, 70), (2, 40, 5, 4), (2, 40, 9, 9), (2, 64, 2, 3)])
@pytest.mark.parametrize("rule", [mx_rule(4), ocp_rule(E2M1, "floor")], ids=["mx6", "mxfp4"])
def test_blocks(variant, pair, shape, rule):
    """In float32 they are torch's (test_blocks.py): here the same values, rounded."""
    x = numbers(shape, pair[0], special=False).requires_grad_()
    wide = x.detach().float().requires_grad_()
    with use_native(True):
        y, reference = fake_quantize_blocks(x, 1, lambda: rule, pair[1]), fake_quantize_blocks(wide, 1, lambda: rule)
        assert same(y.detach(), reference.detach().to(pair[1]))
        upstream = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(pair[1])
        y.backward(upstream)
        reference.backward(upstream.float())
    assert same(x.grad, wide.grad.to(pair[0]))


@pytest.mark.parametrize("dtype", [BRAIN, HALF])
def test_rows_of_a_table(variant, dtype):
    table, index = numbers((50, 33), dtype, special=False), torch.tensor([3, 3, 49, 0])
    grid, reading = IntegerGrid(-8, 7), Reading(None, False, False)
    with use_native(True):
        rows = fake_quantize_rows(table, index, None, grid, PerChannel(), reading)
    with use_native(False):
        assert same(rows, fake_quantize_to_extremes(table, (50, 1), grid)[index])


def test_results_that_no_kernel_writes():
    """Torch operations do it: of float64, of float16 in bfloat16."""
    with use_native(True):
        for dtype, wanted in ((torch.float64, torch.float64), (HALF, BRAIN), (BRAIN, SINGLE)):
            x = numbers((50,), dtype, special=False).requires_grad_()
            y = fake_quantize(x, torch.tensor([0.5]), torch.tensor([0.0]), IntegerGrid(-8, 7), wanted)
            y.sum().backward()
            assert (y.dtype, x.grad.dtype) == (wanted, dtype)


def test_operators_of_graphs(pair):
    importlib.import_module("lq_plugin.native.operators")
    x, upstream = numbers((3, 50), pair[0], special=False).requires_grad_(), torch.randn(3, 50).to(pair[1])
    qparams, grid = (torch.tensor([0.3]), torch.tensor([1.0])), IntegerGrid(-8, 7, True)
    with use_native(False):
        expected = fake_quantize(x, *qparams, grid, pair[1])
        expected.backward(upstream)
    found = torch.ops.lq_plugin
    assert same(found.fake_quantize(x.detach(), *qparams, -8, 7, False, pair[1]), expected.detach())
    y, low, high = found.fake_quantize_observed(x.detach(), *qparams, -8, 7, pair[1])
    assert same(y, expected.detach())
    assert (low, high, low.dtype) == (x.float().min(), x.float().max(), SINGLE)
    assert same(found.passed_gradient(upstream, x.detach(), *qparams, -8, 7), x.grad)
    calls = {
        found.fake_quantize: (x.detach(), *qparams, -8, 7, False, pair[1]),
        found.fake_quantize_observed: (x.detach(), *qparams, -8, 7, pair[1]),
        found.passed_gradient: (upstream, x.detach(), *qparams, -8, 7),
        found.learned_backward: (x.detach(), upstream, *qparams, -8, 7, False),
    }
    for operator, arguments in calls.items():
        torch.library.opcheck(operator.default, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.slow
# Dynamo makes what autograd warns of.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("learned", [False, True])
def test_compiled_under_autocast(learned):
    """One graph, with the numbers of the same layer that is not compiled; of float32 and of bfloat16 inputs."""
    torch.manual_seed(0)
    plan = Rule("*", weight="int8 per_channel", input="int4 lsq" if learned else "uint8 affine ema")
    net = nn.Sequential(nn.Linear(24, 32, bias=False), nn.Linear(32, 8, bias=False))
    x = torch.randn(16, 24)
    prepare(net, QuantPlan([plan]))
    calibrate(net, [x])
    net.train()
    outcomes = []
    for made in (net, torch.compile(net, fullgraph=True)):
        net.zero_grad()
        with use_native(True), torch.autocast("cpu", BRAIN):
            y = made(x)
        y.float().square().sum().backward()
        outcomes.append([y.detach(), *(p.grad for p in net.parameters())])
    assert outcomes[0][0].dtype == BRAIN
    for mine, theirs in zip(*outcomes, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0.02, atol=0.02 * float(theirs.abs().max()))
