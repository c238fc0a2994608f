"""LSQ and PACT against torch's learnable fake-quant op, the papers' formulas, and finite differences."""

import numpy as np
import pytest
import torch

from lq_plugin.functional.lsq import fake_quantize_learned, gradient_scale
from lq_plugin.functional.pact import fake_quantize_pact
from lq_plugin.spec import IntegerGrid


@pytest.mark.parametrize(("low", "high"), [(-8, 7), (0, 15), (-2, 1), (-128, 127)])
@pytest.mark.parametrize("zero", [0.0, 3.0])
def test_equals_torch_learnable_op(low, high, zero):
    if not low <= zero <= high:
        pytest.skip("the zero point must lie on the grid")
    torch.manual_seed(0)
    x = torch.randn(40, 50, dtype=torch.float32)
    upstream = torch.randn_like(x)
    grads = []
    for function in (
        lambda v, s, z: fake_quantize_learned(v, s, z, IntegerGrid(low, high, True), 0.25),
        lambda v, s, z: torch._fake_quantize_learnable_per_tensor_affine(v, s, z, low, high, 0.25),
    ):
        v, s, z = x.clone().requires_grad_(), torch.tensor([0.13], requires_grad=True), torch.tensor([zero], requires_grad=True)
        y = function(v, s, z)
        y.backward(upstream)
        grads.append((y.detach(), v.grad, s.grad, z.grad))
    mine, native = grads
    assert torch.equal(mine[0], native[0])
    assert torch.equal(mine[1], native[1])
    torch.testing.assert_close(mine[2], native[2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mine[3], native[3], rtol=1e-5, atol=1e-5)


def test_scale_gradient_is_the_papers_formula_per_channel():
    torch.manual_seed(1)
    v = torch.randn(6, 30)
    s = torch.rand(6, 1) * 0.5 + 0.05
    s.requires_grad_()
    grid = IntegerGrid(-4, 3)
    upstream = torch.randn(6, 30)
    fake_quantize_learned(v, s, torch.zeros(6, 1), grid, 0.5).backward(upstream)
    ratio = v.numpy().astype(np.float64) / s.detach().numpy()
    term = np.where(ratio <= -4, -4.0, np.where(ratio >= 3, 3.0, np.rint(ratio) - ratio))
    want = 0.5 * (upstream.numpy() * term).sum(1, keepdims=True)
    # Between 3 and 3.5 the value still rounds to 3: there rounding's slope, not the clipped level, applies.
    boundary = (np.abs(ratio) > 3) & (np.abs(ratio) < 4.5)
    term = np.where(boundary & (np.rint(ratio) >= -4) & (np.rint(ratio) <= 3), np.rint(ratio) - ratio, term)
    want = 0.5 * (upstream.numpy() * term).sum(1, keepdims=True)
    np.testing.assert_allclose(s.grad.numpy(), want, rtol=1e-4, atol=1e-4)


def test_clipped_elements_have_the_true_slope_in_the_scale():
    """Far outside, v̂ = level · s exactly: the analytic gradient is a finite difference."""
    grid = IntegerGrid(-4, 3)
    v = torch.tensor([-9.0, 8.0, 20.0], dtype=torch.float64)
    s = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([1.0, 2.0, -0.5], dtype=torch.float64)
    (fake_quantize_learned(v, s, torch.zeros(1), grid) * weights).sum().backward()
    eps = 1e-3
    f = lambda step: (torch.clamp(torch.round(v / step), -4, 3) * step * weights).sum()  # noqa: E731
    slope = (f(s.detach() + eps) - f(s.detach() - eps)) / (2 * eps)
    torch.testing.assert_close(s.grad, slope.reshape(1))


def test_negative_scale_acts_by_its_magnitude():
    x = torch.randn(20)
    grid = IntegerGrid(-4, 3)
    up, down = torch.tensor([0.3], requires_grad=True), torch.tensor([-0.3], requires_grad=True)
    a, b = (fake_quantize_learned(x, s, torch.zeros(1), grid) for s in (up, down))
    assert torch.equal(a, b)
    a.sum().backward()
    b.sum().backward()
    assert torch.equal(up.grad, -down.grad)


def test_gradient_scale():
    assert gradient_scale(1000, IntegerGrid(-8, 7)) == pytest.approx(1 / np.sqrt(7000))


def test_pact_formula_and_gradients():
    x = torch.linspace(-2, 8, 200, requires_grad=True)
    alpha = torch.tensor([5.0], requires_grad=True)
    y = fake_quantize_pact(x, alpha, 16)
    v = x.detach().numpy().astype(np.float64)
    clipped = 0.5 * (np.abs(v) - np.abs(v - 5.0) + 5.0)  # eq. 1 of the paper
    np.testing.assert_allclose(y.detach().numpy(), np.rint(clipped * 15 / 5.0) * 5.0 / 15, atol=1e-6)
    y.sum().backward()
    assert alpha.grad.item() == (v >= 5.0).sum()
    np.testing.assert_array_equal(x.grad.numpy(), (v >= 0) & (v < 5.0))
