"""NVFP4 against torchao, the formula in numpy, and known signal to noise ratios."""

import numpy as np
import pytest
import torch

from lq_plugin.functional.error import sqnr_db
from lq_plugin.functional.minifloat import E2M1, E4M3
from lq_plugin.functional.nvfp4 import fake_quantize_nvfp4, nvfp4_scales, nvfp4_tensor_scale


def data(rows: int = 500, spread: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, 4, 16, generator=generator) * torch.exp2(
        spread * torch.randn(rows, 4, 1, generator=generator)
    )


def nearest(x: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Half to even code, saturating, by a search of all values."""
    distance = np.abs(np.minimum(np.abs(x), values[-1])[..., None] - values)
    tied = distance == distance.min(-1, keepdims=True)
    weight = tied * (2 - np.arange(len(values)) % 2)
    return np.copysign(values[weight.argmax(-1)], x)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_equals_torchao(factor):
    nvfp4_tensor = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    x = data(spread=4.0)
    flat = x.reshape(len(x), 64)
    g = nvfp4_tensor.per_tensor_amax_to_scale(x.abs().max()) * factor
    if factor == 1.0:
        assert torch.equal(g, nvfp4_tensor_scale(x.abs().max()))
    # Ties decide whether both round the same quotient: some in each block, below its largest magnitude.
    block, _ = nvfp4_scales(x, g)
    x[..., 0] = x.abs().amax(2)
    x[..., 1:7] = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5]) * (block * g)
    want = nvfp4_tensor.NVFP4Tensor.to_nvfp4(flat, per_tensor_scale=g).dequantize(torch.float32)
    block, _ = nvfp4_scales(x, g)
    # torchao does not go below 2^-6, the smallest normal E4M3: blocks with a subnormal scale differ, as documented
    # here.
    normal = (block >= 2.0**-6).expand_as(x).reshape(flat.shape)
    assert 0.3 < normal.float().mean() < 1
    got = fake_quantize_nvfp4(x, g).reshape(flat.shape)
    assert torch.equal(got[normal], want[normal])
    assert sqnr_db(x, got.reshape(x.shape)) >= sqnr_db(x, want.reshape(x.shape))


@pytest.mark.parametrize("spread", [0.0, 2.0, 6.0])
def test_equals_the_formula_in_numpy(spread):
    x = data(300, spread)
    array = x.numpy()
    g = np.abs(array).max() / np.float32(6 * 448)
    s = nearest(np.abs(array).max(2, keepdims=True) / np.float32(6) / g, E4M3.values().numpy())
    s = np.maximum(s, np.float32(2.0**-9))
    block, tensor = nvfp4_scales(x)
    assert tensor.item() == g
    np.testing.assert_array_equal(block.numpy(), s)
    want = nearest(array * (np.float32(1) / g / s), E2M1.values().numpy()) * (s * g)
    np.testing.assert_array_equal(fake_quantize_nvfp4(x).numpy(), want)


def test_tiny_blocks_keep_what_they_can():
    x = torch.zeros(1, 3, 16)
    x[0, 0, 0], x[0, 1, 0] = 2688.0, 2.0**-9  # wants s = 2^-9 / 6, which rounds to 0
    block, tensor = nvfp4_scales(x)
    assert tensor.item() == 1.0
    assert block.flatten().tolist() == [448.0, 2.0**-9, 2.0**-9]
    assert fake_quantize_nvfp4(x)[0, :, 0].tolist() == [2688.0, 2.0**-9, 0.0]


def test_zeros_and_the_ends_of_float32():
    assert torch.equal(fake_quantize_nvfp4(torch.zeros(2, 1, 16)), torch.zeros(2, 1, 16))
    for size in (1e-25, 1e30, 3.4e38):
        y = fake_quantize_nvfp4(torch.full((1, 1, 16), size))
        torch.testing.assert_close(y, torch.full((1, 1, 16), size), rtol=1e-5, atol=0.0)


def test_gradient_stops_where_the_tensor_scale_is_too_small():
    x = torch.randn(50, 2, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    # Block scales end at 448: beyond 6 · 448 · g elements saturate, at the 7 that would round to 8.
    g = nvfp4_tensor_scale(torch.tensor(1.5))
    upstream = torch.randn_like(x)
    fake_quantize_nvfp4(x, g).backward(upstream)
    block, _ = nvfp4_scales(x, g)
    inside = (x.detach() / (block * g)).abs() < 7
    assert 0 < (~inside).sum() < 400
    assert torch.equal(x.grad, upstream * inside)
    x.grad = None
    fake_quantize_nvfp4(x).backward(upstream)
    assert torch.equal(x.grad, upstream)


def test_a_given_tensor_scale_per_channel():
    x = data(4)
    g = nvfp4_tensor_scale(x.abs().amax((1, 2), keepdim=True))
    want = torch.cat([fake_quantize_nvfp4(row.unsqueeze(0)) for row in x])
    assert torch.equal(fake_quantize_nvfp4(x, g), want)


def test_not_a_number_is_not_hidden():
    x = torch.ones(1, 2, 16)
    x[0, 0, 3] = torch.nan
    assert fake_quantize_nvfp4(x, nvfp4_tensor_scale(torch.tensor(1.0)))[0, 0].isnan().all()


def test_known_signal_to_noise_ratios():
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(16384, 4, 16, generator=generator)
    double_exponential = torch.empty_like(normal).exponential_(generator=generator) * normal.sign()
    assert sqnr_db(normal, fake_quantize_nvfp4(normal)).item() == pytest.approx(20.4, abs=0.1)
    assert sqnr_db(double_exponential, fake_quantize_nvfp4(double_exponential)).item() == pytest.approx(20.7, abs=0.1)


@pytest.mark.parametrize("spread", [0.0, 2.0, 6.0])
def test_four_over_six_equals_the_formula_in_numpy(spread):
    x = data(300, spread)
    x[0, 1] = 0.0
    array = x.numpy()
    g = np.abs(array).max() / np.float32(6 * 256)
    found, errors = [], []
    for largest in (6, 4):
        s = nearest(np.abs(array).max(2, keepdims=True) / np.float32(largest) / g, E4M3.values().numpy())
        s = np.maximum(s, np.float32(2.0**-9))
        y = nearest(array * (np.float32(1) / g / s), E2M1.values().numpy()) * (s * g)
        found.append((s, y))
        errors.append(((y.astype(np.float64) - array) ** 2).sum(2, keepdims=True))
    # What float64 cannot tell apart may go either way in float32.
    clear = np.abs(errors[0] - errors[1]) > 1e-5 * errors[0]
    four = errors[1] < errors[0]
    assert 0.1 < four.mean() < 0.8
    block, tensor = nvfp4_scales(x, target="four_six")
    assert tensor.item() == g
    np.testing.assert_array_equal(block.numpy()[clear], np.where(four, found[1][0], found[0][0])[clear])
    got = fake_quantize_nvfp4(x, target="four_six").numpy()
    rows = np.broadcast_to(clear, got.shape)
    np.testing.assert_array_equal(got[rows], np.where(four, found[1][1], found[0][1])[rows])
    assert (got[0, 1] == 0).all()
    assert block.max() <= 384


def test_four_over_six_has_the_known_signal_to_noise_ratios():
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(16384, 4, 16, generator=generator)
    double_exponential = torch.empty_like(normal).exponential_(generator=generator) * normal.sign()
    assert sqnr_db(normal, fake_quantize_nvfp4(normal, target="four_six")).item() > 21.1
    assert sqnr_db(double_exponential, fake_quantize_nvfp4(double_exponential, target="four_six")).item() > 21.1


def test_four_over_six_of_zeros_and_of_the_ends_of_float32():
    for size in (0.0, 1e-25, 1e30, 3.4e38):
        x = torch.full((1, 1, 16), size)
        torch.testing.assert_close(fake_quantize_nvfp4(x, target="four_six"), x, rtol=1e-5, atol=0.0)
    x = torch.ones(1, 2, 16)
    x[0, 0, 3] = torch.nan
    assert fake_quantize_nvfp4(x, torch.tensor(1.0), "four_six")[0, 0].isnan().all()


def test_four_over_six_passes_gradients_where_nothing_saturates():
    x = data(20).requires_grad_()
    upstream = torch.randn_like(x)
    fake_quantize_nvfp4(x, target="four_six").backward(upstream)
    assert torch.equal(x.grad, upstream)
