"""Formats whose scales follow from the values: the compiled kernels against the torch operations, bit for bit, in every
variant."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp

from lq_plugin import QuantSpec
from lq_plugin.native import available, use_native
from lq_plugin.native.kernels import Kernels
from lq_plugin.native.layouts import BlockLayout, block_layout
from lq_plugin.quantizers import make_activation_quantizer, make_weight_quantizer

if not available():
    pytest.skip("no C++ compiler", allow_module_level=True)

from tests.native.test_kernels import arranged, both, check, hows, same, values, variant  # noqa: F401

OCP = [
    f"{name}{mode}"
    for name in ("mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e3m2", "mxfp6_e2m3", "mxfp4", "mxint8")
    for mode in ("", ":rceil", ":mse")
]
FORMATS = ["mx4", "mx6", "mx9", *OCP, "mxfp4:ceil", "mxint8:even", "mxfp8:even", "nvfp4", "nvfp4:four_six"]
VECTORS = ["int4 group16:4 ragged", "uint4 group16:6 ragged", "int8 narrow group32:8 ragged", "int3 group5:4 ragged"]
arrays = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=4, max_side=20), elements=values)


def quantizer_of_inputs(spec: str, channels: int, axis: int = 1, top: float = 2.0):
    """Calibrated: γ, or the tensor's scale, is that of a range up to `top`."""
    quantizer = make_activation_quantizer(QuantSpec.parse(spec), "input", channels, axis)
    if quantizer.needs_calibration:
        quantizer.store_bounds(torch.tensor([-top]), torch.tensor([top]))
    quantizer.set_calibrated()
    return quantizer


@settings(deadline=None, max_examples=60)
@given(arrays, hows, st.sampled_from([*FORMATS, *VECTORS]), st.integers(0, 3), st.sampled_from([0.1, 2.0, 1e4]))
def test_inputs(array, how, spec, axis, top):
    x = arranged(array, how)
    axis %= x.ndim
    check(both(quantizer_of_inputs(spec, x.shape[axis], axis, top), x), x)


@settings(deadline=None, max_examples=40)
@given(
    arrays, hows, st.sampled_from([*FORMATS, *VECTORS, "int4 group16:4:channel ragged", "int4 affine group16:4 ragged"])
)
def test_weights(array, how, spec):
    x = arranged(array, how)
    check(both(make_weight_quantizer(QuantSpec.parse(spec), "weight", tuple(x.shape)), x), x)


SHAPES = [(2, 40, 5, 5), (3, 33, 8, 8), (4, 70, 3, 3), (2, 16, 1, 15), (1, 20, 200), (60, 300), (7, 5), (2, 3, 70, 70)]


@pytest.mark.parametrize(
    "spec",
    ["mx4", "mx9", "mxfp4", "mxfp4:mse", "mxfp8:rceil", "nvfp4", "nvfp4:four_six", "int4 group16:4 ragged"],
)
@pytest.mark.parametrize("threads", [1, 2])
def test_variants_and_threads(variant, spec, threads):  # noqa: F811
    """Tiles and lines that are full, and that are not; magnitudes from subnormal to infinite, halves of steps."""
    generator = torch.Generator().manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for shape in SHAPES:
            x = torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).mul(2).exp()
            flat = x.view(-1)
            flat[::7] = torch.round(flat[::7] * 4) / 8
            flat[: flat.numel() // 5] *= 1e-39
            flat[5::97], flat[6::89], flat[: min(40, flat.numel() // 9)] = torch.inf, -3e38, 0.0
            for tensor in (
                x,
                x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x.t() if x.ndim == 2 else x,
            ):
                check(both(quantizer_of_inputs(spec, shape[1], top=20.0), tensor), tensor)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("spec", [*FORMATS, VECTORS[0]])
def test_the_kernels_run_and_keep_a_bit_for_each_element(spec):
    x = torch.randn(4, 32, 4, 4, requires_grad=True)
    kept = []
    quantizer = quantizer_of_inputs(spec, 32)
    with use_native(True), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        y = quantizer(x)
    assert kept == [x.numel() // 8]
    assert y.stride() == x.stride()


@pytest.mark.parametrize("how", ["stochastic", "mad"])
def test_other_roundings_and_gradients_take_torch_operations(how):
    x = torch.randn(4, 32) * 3
    quantizer = quantizer_of_inputs(f"int4 group16:4 {how}", 32)
    plain = quantizer_of_inputs("int4 group16:4", 32)
    results = list(both(quantizer, x))
    assert all(same(*pair) for pair in results)
    (y, _), (slope, _) = results
    (other, _), (other_slope, _) = both(plain, x)
    assert not same(y, other) if how == "stochastic" else not same(slope, other_slope)


def test_second_derivatives():
    outcomes = []
    quantizer = quantizer_of_inputs("mx4", 32)
    for on in (True, False):
        with use_native(on):
            x = torch.linspace(-3, 3, 64).reshape(2, 32).requires_grad_()
            (first,) = torch.autograd.grad((quantizer(x) ** 3).sum(), x, create_graph=True)
            first.pow(2).sum().backward()
            outcomes.append((first.detach(), x.grad))
    assert all(torch.equal(*pair) for pair in zip(*outcomes, strict=True))
    assert (outcomes[0][1] != 0).any()


def test_layouts():
    image = torch.zeros(2, 3, 4, 5)
    assert block_layout(image, 1, 16) == block_layout(image, -3, 16) == BlockLayout(2, 3, 20)
    assert block_layout(image.contiguous(memory_format=torch.channels_last), 1, 32) == BlockLayout(40, 3, 1)
    assert block_layout(torch.zeros(7, 48), 1, 16).mask.rows == (7, 48)
    assert block_layout(torch.zeros(7, 48).t(), 1, 16) == BlockLayout(1, 7, 48)
    # A word of a mask belongs to one block, a line holds a whole one.
    assert block_layout(torch.zeros(7, 48), 1, 8) is block_layout(torch.zeros(7, 480), 1, 320) is None
    assert block_layout(torch.zeros(7, 48, 2), 1, 8) == BlockLayout(7, 48, 2)


@pytest.mark.parametrize("variant", Kernels().variants)
def test_a_block_of_each_family_against_its_definition(variant):  # noqa: F811
    """By hand: 1.5 is the largest of its block, 0.3 of its pair."""
    x = torch.tensor([[1.5, -0.7, 0.3, 0.1, *[0.0] * 28]])
    expected = {
        # E = 0; steps 1/2 of the first pair, 1/4 of the others; -0.7 / 0.5 = -1.4
        "mx4": [1.5, -0.5, 0.25, 0.0],
        # X = 2^(0 - 2), elements up to 6: 1.5 / X = 6, -2.8 to -3, 1.2 to 1, 0.4 to 0.5
        "mxfp4": [1.5, -0.75, 0.25, 0.125],
        # s = E4M3(1.5 / 6) = 0.25 where g = 1
        "nvfp4": [1.5, -0.75, 0.25, 0.125],
        # γ = 0.1, s = 1.5 / 7 = 0.214 → 2 γ = 0.2
        "int4 narrow group16:4": [1.4, -0.8, 0.4, 0.0],
    }
    kernels = Kernels(variant)
    for spec, want in expected.items():
        quantizer = make_activation_quantizer(QuantSpec.parse(spec), "input", 32, 1)
        quantizer.scale.fill_(1.5 if "group" in spec else 1.0)
        y, mask = kernels.fake_quantize_blocks(x, BlockLayout(1, 32, 1), quantizer.block_rule(), True)
        np.testing.assert_allclose(y[0, :4].numpy(), want, rtol=1e-6)
        # -0.7 / 0.2 = -3.5 is no tie in float32, and 1.5 / 0.2 = 7.5 is clipped to 7.
        assert mask.tolist()[0] == (-2 if "group" in spec else -1)
