"""GPTQ's solver against the explicit-inverse updates of OBQ in numpy, and against nearest rounding."""

import itertools

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lq_plugin import CalibrationError
from lq_plugin.functional.affine import fake_quantize, qparams_from_bounds
from lq_plugin.functional.fixed_levels import IntegerLevels
from lq_plugin.functional.gptq import gptq_quantize, gptq_round_measured, output_errors
from lq_plugin.functional.unfold import unfold_columns
from lq_plugin.intent.spec import IntegerGrid
from lq_plugin.native import available, gptq as gptq_module, use_native
from lq_plugin.native.gptq import GPTQKernels

GRID = IntegerGrid(-4, 3)
AFFINE = IntegerGrid(0, 7, affine=True)


def problem(rows=6, columns=24, samples=64, seed=0):
    """Weight and correlated inputs `[samples, columns]`."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns // 3, columns, generator=generator)
    x = torch.randn(samples, columns // 3, generator=generator) @ mixing + 0.3 * torch.randn(
        samples, columns, generator=generator
    )
    return torch.randn(rows, columns, generator=generator), x


def qparams(weight, grid, kind="channel"):
    """Scale and zero point for each element, from the extremes of what shares them."""
    rows, columns = weight.shape
    parts = {
        "tensor": weight.reshape(1, 1, -1),
        "channel": weight.reshape(rows, 1, columns),
        "group": weight.reshape(rows, -1, 4),
    }[kind]
    scale, zero_point = qparams_from_bounds(0.8 * parts.amin(-1), 0.8 * parts.amax(-1), grid)
    return tuple(t.repeat_interleave(columns // t.shape[1], dim=1).expand(rows, columns) for t in (scale, zero_point))


def explicit(weight, hessian, scale, zero_point, grid, dampening, order):
    """Optimal brain quantization with a given order of columns: each is taken out of the explicit inverse (numpy,
    float64)."""
    w, h = weight.double().numpy().copy(), hessian.double().numpy().copy()
    s, z = scale.double().numpy(), zero_point.double().numpy()
    for j in range(len(h)):
        if h[j, j] == 0:
            w[:, j], h[j, j] = 0, 1
    h += dampening * np.mean(np.diag(h)) * np.eye(len(h))
    inverse, out = np.linalg.inv(h), np.zeros_like(w)
    for j in order:
        out[:, j] = (np.clip(np.round(w[:, j] / s[:, j]), grid.quant_min - z[:, j], grid.quant_max - z[:, j])) * s[:, j]
        w -= np.outer((w[:, j] - out[:, j]) / inverse[j, j], inverse[j])
        inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        # Exactly zero in exact arithmetic: it must not come back by rounding.
        inverse[j], inverse[:, j] = 0, 0
        w[:, j] = out[:, j]
    return out


@pytest.mark.parametrize("grid", [GRID, AFFINE], ids=["symmetric", "affine"])
@pytest.mark.parametrize("kind", ["tensor", "channel", "group"])
@pytest.mark.parametrize("act_order", [False, True])
def test_it_equals_the_explicit_inverse(grid, kind, act_order):
    weight, x = problem()
    hessian = 2.0 * x.T @ x
    scale, zero_point = qparams(weight, grid, kind)
    order = np.argsort(-np.diag(hessian.numpy()), kind="stable") if act_order else range(24)
    want = explicit(weight, hessian, scale, zero_point, grid, 0.01, order)
    for block in (1, 7, 24, 128):
        got = gptq_quantize(weight, hessian, scale, zero_point, grid, act_order=act_order, block_columns=block)
        np.testing.assert_allclose(got.numpy(), want, atol=1e-5)
    assert not np.allclose(want, fake_quantize(weight, scale, zero_point, grid).numpy(), atol=1e-3), (
        "not what rounding to nearest gives"
    )


@pytest.mark.parametrize("kind", ["tensor", "channel", "group"])
@pytest.mark.parametrize("block", [1, 7, 24, 128])
def test_kernels_give_what_torch_gives(kind, block, monkeypatch):
    """Bit for bit, in every variant that runs here, for numbers of rows that no register divides."""
    if not available():
        pytest.skip("no C++ compiler")
    for rows, grid in ((1, GRID), (16, GRID), (37, AFFINE)):
        weight, x = problem(rows=rows)
        hessian, levels = 2.0 * x.T @ x, qparams(weight, grid, kind)
        with use_native(False):
            want = gptq_quantize(weight, hessian, *levels, grid, block_columns=block)
        for variant in GPTQKernels().variants:
            monkeypatch.setattr(gptq_module, "_compiled", lambda variant=variant: GPTQKernels(variant))
            with use_native(True):
                assert torch.equal(gptq_quantize(weight, hessian, *levels, grid, block_columns=block), want)


def test_how_the_hessian_lies_in_memory_does_not_matter():
    """Transposed, or with the problems as its last dimension in memory."""
    (weight, x), (other_weight, other_x) = problem(), problem(seed=1)
    hessians = torch.stack([2.0 * x.T @ x, 2.0 * other_x.T @ other_x])
    levels, other_levels = qparams(weight, GRID), qparams(other_weight, GRID)
    want = torch.stack(
        [
            gptq_quantize(weight, hessians[0], *levels, GRID),
            gptq_quantize(other_weight, hessians[1], *other_levels, GRID),
        ]
    )
    weights = torch.stack([weight, other_weight])
    both = [torch.stack(pair) for pair in zip(levels, other_levels, strict=True)]
    for strided in (hessians.mT, hessians.permute(1, 2, 0).contiguous().permute(2, 0, 1)):
        assert torch.equal(gptq_quantize(weights, strided, *both, GRID), want)
    assert torch.equal(gptq_quantize(weight, hessians[0].T, *levels, GRID), want[0])


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("dampening", [1e-6, 0.01, 1.0])
@pytest.mark.parametrize("act_order", [False, True])
def test_the_solver_knows_its_error(dampening, act_order, native):
    """Its error is that of the products with the inputs, with columns that are always zero also."""
    if native and not available():
        pytest.skip("no C++ compiler")
    weight, x = problem(rows=9)
    x[:, [3, 11]] = 0.0
    scale, zero_point = qparams(weight, GRID)
    levels = IntegerLevels(scale, zero_point, False, GRID)
    options = {"dampening": dampening, "act_order": act_order, "block_columns": 7}
    with use_native(native):
        got, errors = gptq_round_measured(weight, 2.0 * x.T @ x, levels, **options)
    want = 2.0 * ((weight.double() - got.double()).numpy() @ x.double().numpy().T) ** 2
    np.testing.assert_allclose(errors.numpy(), want.sum(1), rtol=1e-4)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("act_order", [False, True])
def test_the_error_is_never_that_of_nearest_rounding(seed, act_order):
    weight, x = problem(rows=8, seed=seed)
    hessian = 2.0 * x.T @ x
    scale, zero_point = qparams(weight, GRID)
    got = gptq_quantize(weight, hessian, scale, zero_point, GRID, act_order=act_order)
    nearest = fake_quantize(weight, scale, zero_point, GRID)
    errors = [float(((weight - w).double() @ x.double().T).square().sum()) for w in (got, nearest)]
    assert errors[0] < 0.8 * errors[1]
    np.testing.assert_allclose(2 * errors[0], float(output_errors(weight - got, hessian).sum()), rtol=1e-4)


def test_it_is_near_the_best_of_all_roundings():
    """All 2^8 ways to round eight weights up or down."""
    weight, x = problem(rows=10, columns=8)
    scale = torch.full_like(weight, 0.6)
    grid, zero = IntegerGrid(-100, 100), torch.zeros(())
    floor = (weight / scale).floor()
    every = [
        output_errors(weight - (floor + torch.tensor(ups)) * scale, x.T @ x)
        for ups in itertools.product([0, 1], repeat=8)
    ]
    best, nearest = (
        torch.stack(every).amin(0),
        output_errors(weight - fake_quantize(weight, scale, zero, grid), x.T @ x),
    )
    found = output_errors(weight - gptq_quantize(weight, x.T @ x, scale, zero, grid), x.T @ x)
    assert found.sum() < best.sum() + 0.25 * (nearest.sum() - best.sum())


def test_uncorrelated_inputs_leave_nothing_to_make_up_for():
    weight, _ = problem()
    scale, zero_point = qparams(weight, GRID)
    hessian = torch.diag(torch.rand(24, generator=torch.Generator().manual_seed(0)) + 0.1)
    nearest = fake_quantize(weight, scale, zero_point, GRID)
    for act_order in (False, True):
        assert torch.equal(gptq_quantize(weight, hessian, scale, zero_point, GRID, act_order=act_order), nearest)


def test_values_are_on_the_grid_and_the_hessians_scale_does_not_matter():
    weight, x = problem()
    scale, zero_point = qparams(weight, AFFINE, "group")
    got = gptq_quantize(weight, x.T @ x, scale, zero_point, AFFINE)
    assert torch.equal(fake_quantize(got, scale, zero_point, AFFINE), got)
    assert torch.equal(gptq_quantize(weight, 1e-6 * (x.T @ x).double(), scale, zero_point, AFFINE), got)


def test_leading_dims_are_problems_of_their_own():
    weights, inputs = zip(*(problem(seed=seed) for seed in range(3)), strict=True)
    weight, hessian = torch.stack(weights), torch.stack([x.T @ x for x in inputs])
    pairs = [qparams(w, GRID) for w in weights]
    scale, zero_point = (torch.stack(t) for t in zip(*pairs, strict=True))
    got = gptq_quantize(weight, hessian, scale, zero_point, GRID, block_columns=10)
    for index in range(3):
        alone = gptq_quantize(weight[index], hessian[index], *pairs[index], GRID)
        np.testing.assert_allclose(got[index].numpy(), alone.numpy(), atol=1e-6)


def test_dead_columns_become_zero_and_change_nothing_else():
    weight, x = problem()
    x[:, [3, 11]] = 0.0
    scale, zero_point = qparams(weight, GRID)
    got = gptq_quantize(weight, x.T @ x, scale, zero_point, GRID)
    live = [j for j in range(24) if j not in (3, 11)]
    assert not got[:, [3, 11]].any()
    alone = gptq_quantize(weight[:, live], x[:, live].T @ x[:, live], scale[:, live], zero_point[:, live], GRID)
    assert torch.equal(got[:, live], alone)
    assert not gptq_quantize(weight, torch.zeros(24, 24), scale, zero_point, GRID).any()


def test_a_hessian_that_is_not_positive_definite():
    weight, x = problem(samples=5)
    scale, zero_point = qparams(weight, GRID)
    with pytest.raises(
        CalibrationError, match="not positive definite, with a dampening of 0: raise the dampening or bring more inputs"
    ):
        gptq_quantize(weight, x.T @ x, scale, zero_point, GRID, dampening=0.0)
    with pytest.raises(CalibrationError, match="not positive definite"):
        gptq_quantize(weight, -torch.eye(24), scale, zero_point, GRID)
    assert gptq_quantize(weight, x.T @ x, scale, zero_point, GRID, dampening=0.01).isfinite().all()
    for seed in range(20):
        # Singular, but for rounding, which makes some of them factorizable.
        dependent = problem(seed=seed)[1].double()
        dependent[:, 5] = 0.3 * dependent[:, 4] + 0.7 * dependent[:, 3]
        with pytest.raises(CalibrationError, match="not positive definite"):
            gptq_quantize(weight, dependent.T @ dependent, scale, zero_point, GRID, dampening=0.0)
    for broken in (float("nan"), float("inf")):
        with pytest.raises(CalibrationError, match="NaN or Inf"):
            gptq_quantize(weight, torch.full((24, 24), broken), scale, zero_point, GRID)


CONVOLUTIONS = [
    (F.conv1d, (3, 6, 11), (8, 6, 3), {"stride": 2, "dilation": 2, "groups": 1}),
    (F.conv2d, (2, 4, 7, 6), (6, 2, 3, 2), {"stride": 1, "dilation": 1, "groups": 2}),
    (F.conv2d, (2, 6, 8, 8), (6, 1, 3, 3), {"stride": 2, "dilation": 2, "groups": 6}),
    (F.conv3d, (2, 4, 5, 4, 6), (4, 2, 2, 3, 1), {"stride": 2, "dilation": 1, "groups": 2}),
]


@pytest.mark.parametrize(("convolve", "inputs", "shape", "options"), CONVOLUTIONS)
def test_unfolded_columns_times_the_weight_are_the_convolution(convolve, inputs, shape, options):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(s, generator=generator, dtype=torch.float64) for s in (inputs, shape))
    want = convolve(x, weight, **options)
    dims, groups = len(shape) - 2, options["groups"]
    columns = unfold_columns(x, shape[2:], [options["stride"]] * dims, [options["dilation"]] * dims, groups)
    got = weight.reshape(groups, shape[0] // groups, -1) @ columns
    torch.testing.assert_close(got.reshape(shape[0], inputs[0], -1).transpose(0, 1).reshape(want.shape), want)
