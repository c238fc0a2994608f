"""The compiled kernels against the torch operations they stand for, bit for bit, in every variant that this processor
runs."""

from __future__ import annotations

import importlib
from functools import partial
from typing import ClassVar, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp

from lq_plugin.functional.affine import extremes, fake_quantize, fake_quantize_observed, fake_quantize_to_extremes
from lq_plugin.functional.lsq import Band, fake_quantize_learned
from lq_plugin.intent.spec import IntegerGrid
from lq_plugin.native import NativeError, available, switch as switch_module, use_native
from lq_plugin.native.kernels import Kernels
from lq_plugin.native.layouts import Layout, layout_of
from lq_plugin.native.ops import kernels_for
from lq_plugin.native.switch import active

if not available():
    pytest.skip("no C++ compiler", allow_module_level=True)
importlib.import_module("lq_plugin.native.operators")

VARIANTS = Kernels().variants
GRIDS = [
    IntegerGrid(-128, 127),
    IntegerGrid(-7, 7),
    IntegerGrid(0, 255, True),
    IntegerGrid(-8, 7, True),
    IntegerGrid(0, 15),
    IntegerGrid(0, 1),
]
special = st.sampled_from([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 0.25, -0.75, 1e-40, 3e38, -3e38])
finite = st.one_of(st.floats(-40, 40, width=32), st.sampled_from([0.0, -0.0, 1e-40, 3e38, -3e38]))
values = st.one_of(st.floats(-40, 40, width=32), special, st.integers(-60, 60).map(lambda n: n * 0.25))
arrays = hnp.arrays(np.float32, hnp.array_shapes(min_dims=1, max_dims=4, max_side=7), elements=values)
grids = st.sampled_from(GRIDS)
bands = st.sampled_from(get_args(Band))


@pytest.fixture(params=VARIANTS)
def variant(request, monkeypatch):
    """Makes `use_native(True)` take this variant."""
    kernels = Kernels(request.param)
    monkeypatch.setattr(switch_module, "_compiled", lambda: kernels)
    return request.param


def same(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Equal bits, but for the payload of a NaN."""
    nan = torch.isnan(theirs)
    if mine.shape != theirs.shape or not torch.equal(torch.isnan(mine), nan):
        return False
    return torch.equal(
        mine.masked_fill(nan, 0).contiguous().view(torch.int32),
        theirs.masked_fill(nan, 0).contiguous().view(torch.int32),
    )


def both(function, *tensors):
    """Results of `function` on copies, with kernels and without: its value, then the gradient of each tensor that wants
    one."""
    results = []
    for on in (True, False):
        with use_native(on):
            # Strides stay as they are.
            copies = [torch.empty_like(t).copy_(t).requires_grad_() for t in tensors]
            y = function(*copies)
            torch.manual_seed(0)
            y.backward(torch.randn(y.shape))
            results.append([y.detach(), *(t.grad for t in copies)])
    return zip(*results, strict=True)


def arranged(array: np.ndarray, how: str) -> torch.Tensor:
    """The values in a tensor that lies in memory in another way."""
    x = torch.from_numpy(array)
    if how == "transposed":
        return x.transpose(0, -1)
    if how == "sliced":
        return torch.stack([x, -x], -1)[..., 0]
    if how == "channels_last" and x.ndim == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return x


hows = st.sampled_from(["contiguous", "transposed", "sliced", "channels_last"])


@settings(deadline=None, max_examples=25)
@given(arrays, hows, grids, st.sampled_from([0.5, 0.1, 3e-3, 1e30]), st.integers(0, 15))
def test_one_scale(array, how, grid, scale, zero_point):
    x = arranged(array, how)
    s, z = (
        torch.tensor([scale]),
        torch.tensor([float(zero_point) if grid.affine and zero_point <= grid.quant_max else 0.0]),
    )
    check(both(lambda v: fake_quantize(v, s, z, grid), x), x)


def check(results, x):
    """Value and gradient. That of a NaN, or of an infinity that becomes one, is torch's own whim: its kernels keep or
    clear it by the place in a register."""
    (mine, theirs), (mine_slope, theirs_slope) = results
    assert same(mine, theirs)
    broken = x.isnan() | theirs.isnan()
    assert same(mine_slope.masked_fill(broken, 0), theirs_slope.masked_fill(broken, 0))


@settings(deadline=None, max_examples=25)
@given(arrays, hows, grids, st.integers(0, 3), st.data())
def test_a_scale_for_each_channel(array, how, grid, axis, data):
    x = arranged(array, how)
    axis %= x.ndim
    shape = [x.shape[axis] if d == axis else 1 for d in range(x.ndim)]
    s = torch.from_numpy(data.draw(hnp.arrays(np.float32, shape, elements=st.sampled_from([0.5, 0.07, 2.0]))))
    z = torch.full(shape, 1.0 if grid.affine else 0.0)
    check(both(lambda v: fake_quantize(v, s, z, grid), x), x)


@settings(deadline=None, max_examples=25)
@given(arrays, hows, grids)
def test_observed(array, how, grid):
    x = arranged(array, how)
    s, z = torch.tensor([0.5]), torch.tensor([0.0])
    seen = []

    def observed(v):
        seen.append((torch.tensor([-0.5]), torch.tensor([torch.nan if array.size % 5 == 0 else 0.5])))
        return fake_quantize_observed(v, s, z, grid, *seen[-1])

    check(both(observed, x), x)
    for mine, theirs in zip(*seen, strict=True):
        # Of two zeros of different sign, either may be the smallest.
        assert torch.equal(mine.nan_to_num(nan=77.0), theirs.nan_to_num(nan=77.0))


@settings(deadline=None, max_examples=25)
@given(
    hnp.arrays(np.float32, hnp.array_shapes(min_dims=1, max_dims=4, max_side=7), elements=finite),
    grids,
    st.integers(-1, 3),
)
def test_to_extremes(array, grid, axis):
    x = torch.from_numpy(array)
    shape = tuple(size if d == axis else 1 for d, size in enumerate(x.shape))
    for mine, theirs in both(lambda v: fake_quantize_to_extremes(v, shape, grid), x):
        assert same(mine, theirs)


@pytest.mark.parametrize("size", [(3,), (16, 33), (3, 5000)])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_scale_for_each_element(variant, size, threads):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, generator=generator) * 3
    scale, zero_point = (
        torch.rand(size, generator=generator) + 0.1,
        torch.randint(-3, 4, size, generator=generator).float(),
    )
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        pairs = list(both(lambda x: fake_quantize(x, scale, zero_point, IntegerGrid(-8, 7, True)), x))
    finally:
        torch.set_num_threads(before)
    assert len(pairs) == 2
    assert all(same(*pair) for pair in pairs)


@given(arrays, st.data())
@settings(max_examples=60, deadline=None)
def test_extremes_of_what_shares_a_scale(array, data):
    """Against numpy, whatever dims share a scale; a NaN stays."""
    shape = tuple(data.draw(st.sampled_from([1, size])) for size in array.shape)
    axes = tuple(d for d, size in enumerate(shape) if size == 1)
    for name in VARIANTS:
        with pytest.MonkeyPatch.context() as patch:
            kernels = Kernels(name)
            patch.setattr(switch_module, "_compiled", lambda kernels=kernels: kernels)
            with use_native(True):
                low, high = extremes(torch.from_numpy(array), shape)
        np.testing.assert_array_equal(low.numpy(), array.min(axes, keepdims=True))
        np.testing.assert_array_equal(high.numpy(), array.max(axes, keepdims=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_to_extremes_of_a_weight_that_is_broken(bad):
    x = torch.linspace(-2, 2, 60).reshape(3, 20)
    x[1, 7] = bad
    for mine, theirs in both(lambda v: fake_quantize_to_extremes(v, (3, 1), IntegerGrid(-8, 7)), x):
        assert same(mine, theirs)


def test_memory_stays_in_its_order():
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    results = list(both(lambda v: fake_quantize(v, torch.tensor([0.3]), torch.tensor([0.0]), IntegerGrid(-2, 1)), x))
    assert all(mine.stride() == theirs.stride() == x.stride() for mine, theirs in results)


@settings(deadline=None, max_examples=25)
@given(
    hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=4, max_side=7), elements=st.floats(-9, 9, width=16)),
    hows, grids, st.integers(-1, 3), st.sampled_from([0.5, -0.3, 0.0]), st.sampled_from([0.0, 2.6]), bands,
)  # fmt: skip
def test_learned(array, how, grid, axis, scale, zero_point, band):
    x = arranged(array, how)
    shape = [size if d == axis else 1 for d, size in enumerate(x.shape)]
    names = ("y", "x", "scale", "zero point")
    function = partial(fake_quantize_learned, grid=grid, gradient_factor=0.3, band=band)
    results = both(function, x, torch.full(shape, scale), torch.full(shape, zero_point))
    for name, (mine, theirs) in zip(names, results, strict=True):
        assert torch.equal(mine, theirs), name


@pytest.mark.parametrize(("shape", "threads"), [((3, 40_001), 1), ((2, 5, 33, 17), 1), ((70_000,), 2)])
def test_variants_and_threads(variant, shape, threads):
    """Larger than a thread's share, with a rest that fills no register."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator) * 3
    x.view(-1)[::7] = torch.round(x.view(-1)[::7]) / 4  # halves of a step
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        sizes = [(1,) * len(shape), (*shape[:1], *(1,) * (len(shape) - 1)), (*(1,) * (len(shape) - 1), *shape[-1:])]
        for size in sizes:
            s, z = torch.rand(size, generator=generator) + 0.3, torch.ones(size)
            grid = IntegerGrid(-8, 7, True)
            with use_native(True):
                assert active().variant == variant
            for mine, theirs in both(lambda v, s=s, z=z, grid=grid: fake_quantize(v, s, z, grid), x):
                assert same(mine, theirs)
            for band in get_args(Band):
                for mine, theirs in both(
                    partial(fake_quantize_learned, grid=grid, gradient_factor=0.3, band=band), x, s, z
                ):
                    assert torch.equal(mine, theirs)
            for mine, theirs in both(lambda v, size=size, grid=grid: fake_quantize_to_extremes(v, size, grid), x):
                assert same(mine, theirs)
        low, high = torch.tensor([0.0]), torch.tensor([0.0])
        with use_native(True):
            fake_quantize_observed(x, torch.tensor([0.5]), torch.tensor([0.0]), IntegerGrid(-8, 7), low, high)
        assert (low, high) == (x.min(), x.max())
    finally:
        torch.set_num_threads(before)


def test_the_kernels_run_and_no_mask_tensor_of_bytes_is_kept():
    x = torch.randn(64, 100, requires_grad=True)
    kept = []
    with use_native(True), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        fake_quantize(x, torch.tensor([0.1]), torch.tensor([0.0]), IntegerGrid(-8, 7))
    assert kept == [x.numel() // 8]


def test_a_gradient_that_others_hold_is_left_as_it_is():
    x = torch.randn(4, 50, requires_grad=True)
    with use_native(True):
        y = fake_quantize(x, torch.tensor([0.01]), torch.tensor([0.0]), IntegerGrid(-8, 7))
    y.retain_grad()
    upstream = torch.randn(4, 50)
    untouched = upstream.clone()
    y.backward(upstream)
    assert torch.equal(upstream, untouched)
    assert torch.equal(y.grad, untouched)
    assert (x.grad == 0).any()


@pytest.mark.parametrize("learned", [False, True])
def test_second_derivatives_pass_the_same_elements(learned):
    outcomes = []
    for on in (True, False):
        with use_native(on):
            x = torch.linspace(-3, 3, 40).requires_grad_()
            s, z = torch.tensor([0.2]), torch.tensor([0.0])
            function = fake_quantize_learned if learned else fake_quantize
            (first,) = torch.autograd.grad((function(x, s, z, IntegerGrid(-8, 7)) ** 3).sum(), x, create_graph=True)
            first.pow(2).sum().backward()
            outcomes.append((first.detach(), x.grad))
    assert torch.equal(outcomes[0][0], outcomes[1][0])
    assert torch.equal(outcomes[0][1], outcomes[1][1])
    assert (outcomes[0][1] != 0).any()


def test_other_dtypes_and_odd_memory_take_torch_operations():
    one, x = torch.ones(1), torch.zeros(4, 6)
    with use_native(True):
        assert kernels_for(torch.zeros(3, dtype=torch.float64)) is None
        assert kernels_for(torch.zeros(4, 4)[:, ::2]) is None
        assert kernels_for(torch.zeros(1).expand(5)) is None
        assert kernels_for(torch.zeros(4, device="meta")) is None
        assert kernels_for(x, qparams=(one, one.double())) is None
        assert kernels_for(x, qparams=(one, torch.ones(2))) is None
        assert kernels_for(x, qparams=(torch.ones(4, 2)[:, :1], torch.ones(4, 1))) is None
        assert kernels_for(x.t(), qparams=(one, one)) is active()


def test_an_empty_tensor():
    with use_native(True):
        assert fake_quantize(torch.zeros(0, 3), torch.tensor([1.0]), torch.tensor([0.0]), IntegerGrid(-8, 7)).shape == (
            0,
            3,
        )
        with pytest.raises(RuntimeError):
            fake_quantize_observed(
                torch.zeros(0), torch.ones(1), torch.zeros(1), IntegerGrid(-8, 7), torch.zeros(1), torch.zeros(1)
            )


def test_scales_of_another_size_are_torchs_to_refuse():
    grid = IntegerGrid(-128, 127)
    assert layout_of(torch.zeros(4, 6), (3,)) is None
    assert layout_of(torch.zeros(4, 6), (3, 1)) is None
    assert layout_of(torch.zeros(4, 1), (4, 3)) is None
    with pytest.raises(RuntimeError, match="size of tensor"):
        fake_quantize(torch.ones(4, 6), torch.full((3,), 0.1), torch.zeros(3), grid)


@pytest.mark.parametrize("function", [fake_quantize, partial(fake_quantize_learned, gradient_factor=1.0)])
def test_gradients_that_are_negated_when_they_are_read(function):
    x = torch.full((4, 6), 0.3, requires_grad=True)
    y = function(x, torch.tensor([0.1]), torch.zeros(1), grid=IntegerGrid(-128, 127))
    y.backward(torch._neg_view(torch.ones(4, 6)))
    assert torch.equal(x.grad, torch.full((4, 6), -1.0))


def test_layouts():
    image, per_channel = torch.zeros(2, 3, 4, 5), (1, 3, 1, 1)
    assert layout_of(image, per_channel) == Layout(2, 3, 20, 1)
    assert layout_of(image.contiguous(memory_format=torch.channels_last), per_channel) == Layout(1, 1, 40, 3)
    assert layout_of(torch.zeros(8, 2, 16, 3, 3), (8, 2, 1, 3, 3)) == Layout(1, 16, 16, 9)
    assert layout_of(image, (2, 1, 4, 1)) is None
    assert layout_of(image.transpose(0, 1), (3, 2, 1, 1)) is None


def test_groups_of_a_convolution():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 2, 16, 3, 3, generator=generator)
    s = torch.rand(8, 2, 1, 3, 3, generator=generator) + 0.1
    for mine, theirs in both(lambda v: fake_quantize(v, s, torch.zeros_like(s), IntegerGrid(-8, 7)), x):
        assert same(mine, theirs)


def test_switches():
    with use_native(False):
        assert active() is None
        with use_native(True):
            assert isinstance(active(), Kernels)
        assert active() is None
    with pytest.raises(NativeError, match="this processor runs"):
        Kernels("neon")


@pytest.mark.parametrize(("value", "want"), [("0", False), ("1", True), ("", True)])
def test_environment(monkeypatch, value, want):
    monkeypatch.setenv("LQ_NATIVE", value)
    monkeypatch.setattr(switch_module, "_chosen", [])
    switch_module.active.cache_clear()
    assert (active() is not None) == want
    switch_module.active.cache_clear()


def test_environment_that_means_nothing(monkeypatch):
    monkeypatch.setenv("LQ_NATIVE", "yes")
    with pytest.raises(NativeError, match="it can be 0"):
        switch_module._from_environment()


def test_without_a_compiler(monkeypatch):
    def missing():
        raise NativeError("no compiler")

    monkeypatch.setattr(switch_module, "_compiled", missing)
    with use_native(None):
        assert active() is None
        assert not available()
    with pytest.raises(NativeError, match="no compiler"), use_native(True):
        pass


@pytest.mark.slow
# Dynamo makes what autograd warns of.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("learned", [None, *get_args(Band)])
def test_compiled_in_one_graph_with_the_same_numbers(learned):
    def function(v, s, z):
        grid = IntegerGrid(-8, 7)
        return fake_quantize_learned(v, s, z, grid, band=learned) if learned else fake_quantize(v, s, z, grid)

    generator = torch.Generator().manual_seed(0)
    x, upstream = torch.randn(6, 5, 8, 8, generator=generator), torch.randn(6, 5, 8, 8, generator=generator)
    outcomes = []
    for made in (function, torch.compile(function, fullgraph=True)):
        v, s = x.clone().requires_grad_(), torch.tensor([0.2], requires_grad=learned is not None)
        with use_native(True):
            y = made(v, s, torch.tensor([0.0]))
            y.backward(upstream)
        outcomes.append([y.detach(), v.grad, *([s.grad] if learned else [])])
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_convolutions_with_the_layout_that_the_compiler_chooses(monkeypatch):
    """Inductor lays images out with channels last: the gradient must still be that of the elements that were not
    clipped."""

    class Watched(Kernels):
        strides: ClassVar[list[tuple[int, ...]]] = []

        def fake_quantize(self, x, *rest, **more):
            self.strides.append(x.stride())
            return super().fake_quantize(x, *rest, **more)

    kernels = Watched()
    monkeypatch.setattr(switch_module, "_compiled", lambda: kernels)
    torch.manual_seed(0)
    convs = [torch.nn.Conv2d(c, 8, 3, padding=1) for c in (3, 8, 8)]
    s, z, grid = torch.tensor([0.03]), torch.tensor([0.0]), IntegerGrid(0, 15)

    def net(x):
        first = fake_quantize(torch.relu(convs[0](x)), s, z, grid)
        return convs[2](fake_quantize(torch.relu(convs[1](first) + first), s, z, grid))

    x, upstream = torch.randn(2, 3, 12, 12), torch.randn(2, 8, 12, 12)
    outcomes = []
    for made in (net, torch.compile(net, fullgraph=True)):
        kernels.strides.clear()
        with use_native(True):
            made(x).backward(upstream)
        outcomes.append([p.grad for conv in convs for p in conv.parameters()])
        for conv in convs:
            conv.zero_grad(set_to_none=True)
    assert kernels.strides == [(8 * 144, 1, 96, 8)] * 2
    for mine, theirs in zip(*outcomes, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_operators_compute_what_the_torch_operations_do(grid):
    """The operators that torch.compile calls, in any layout, also where the gradient lies otherwise than the input."""
    s, z = torch.tensor([0.3]), torch.tensor([1.0 if grid.affine else 0.0])
    bounds = (grid.quant_min, grid.quant_max)
    image = (torch.randn(2, 3, 4, 5) * 3).to(memory_format=torch.channels_last)
    for tensor in (image, image.contiguous(), image[:, :, ::2], image.transpose(1, 3)):
        x, gradient = tensor.detach().clone().requires_grad_(), torch.randn(tensor.shape)
        with use_native(False):
            expected = fake_quantize(x, s, z, grid)
            expected.backward(gradient)
        assert torch.equal(torch.ops.lq_plugin.fake_quantize(tensor, s, z, *bounds, False), expected)
        y, low, high = torch.ops.lq_plugin.fake_quantize_observed(tensor, s, z, *bounds)
        assert torch.equal(y, expected)
        assert (low, high) == (tensor.min(), tensor.max())
        passed = torch.ops.lq_plugin.passed_gradient(gradient, tensor, s, z, *bounds)
        assert torch.equal(passed, x.grad)
        assert 0 < (passed == 0).sum() < passed.numel() or grid.levels == 256


def test_operators_are_sound():
    x, s, z = torch.randn(3, 20), torch.tensor([0.2]), torch.tensor([0.0])
    tests = ("test_schema", "test_faketensor")
    for tensor in (x, x.t(), x[:, ::2], torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)):
        torch.library.opcheck(torch.ops.lq_plugin.fake_quantize.default, (tensor, s, z, -8, 7, False), test_utils=tests)
        torch.library.opcheck(
            torch.ops.lq_plugin.fake_quantize_observed.default, (tensor, s, z, -8, 7), test_utils=tests
        )
        for gradient in (tensor, tensor.contiguous()):
            torch.library.opcheck(
                torch.ops.lq_plugin.passed_gradient.default, (gradient, tensor, s, z, -8, 7), test_utils=tests
            )
            torch.library.opcheck(
                torch.ops.lq_plugin.learned_backward.default, (tensor, gradient, s, z, -8, 7, False), test_utils=tests
            )
