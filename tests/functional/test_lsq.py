"""LSQ and PACT against torch's learnable fake-quant op, the papers' formulas, and finite differences."""

import numpy as np
import pytest
import torch

from lq_plugin.functional.lsq import fake_quantize_learned, gradient_scale
from lq_plugin.functional.pact import fake_quantize_pact
from lq_plugin.intent.spec import IntegerGrid, QuantSpec
from lq_plugin.native import use_native
from lq_plugin.quantizers import make_activation_quantizer, make_weight_quantizer


@pytest.mark.parametrize(("low", "high"), [(-8, 7), (0, 15), (-2, 1), (-128, 127)])
@pytest.mark.parametrize("zero", [0.0, 3.0])
def test_band_of_the_rounded_value_equals_torch_learnable_op(low, high, zero):
    if not low <= zero <= high:
        pytest.skip("the zero point must lie on the grid")
    torch.manual_seed(0)
    x = torch.randn(40, 50, dtype=torch.float32)
    upstream = torch.randn_like(x)
    grads = []
    for function in (
        lambda v, s, z: fake_quantize_learned(v, s, z, IntegerGrid(low, high, True), 0.25, "rounded"),
        lambda v, s, z: torch._fake_quantize_learnable_per_tensor_affine(v, s, z, low, high, 0.25),
    ):
        v, s, z = (
            x.clone().requires_grad_(),
            torch.tensor([0.13], requires_grad=True),
            torch.tensor([zero], requires_grad=True),
        )
        y = function(v, s, z)
        y.backward(upstream)
        grads.append((y.detach(), v.grad, s.grad, z.grad))
    mine, native = grads
    assert torch.equal(mine[0], native[0])
    assert torch.equal(mine[1], native[1])
    torch.testing.assert_close(mine[2], native[2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mine[3], native[3], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(("low", "high", "zero"), [(-4, 3, 0), (-2, 1, 0), (-1, 1, 0), (0, 3, 0), (0, 15, 6)])
def test_gradients_are_the_papers_formulas_per_channel(low, high, zero, native):
    """Equations 3 and 5: of v and s by the place of v/s itself, also where it still rounds to the outermost level."""
    torch.manual_seed(1)
    s = torch.rand(6, 1) * 0.5 + 0.05
    v = (torch.rand(6, 400) * 1.6 - 0.3) * (high - low) * s + (low - zero) * s
    upstream = torch.randn_like(v)
    z = torch.full((6, 1), float(zero), requires_grad=True)
    v.requires_grad_(), s.requires_grad_()
    with use_native(None if native else False):
        fake_quantize_learned(v, s, z, IntegerGrid(low, high, True), 0.5).backward(upstream)
    step, ratio = (x.detach().numpy().astype(np.float64) for x in (s, v / s))
    below, above = ratio <= low - zero, ratio >= high - zero
    band = above & (np.rint(ratio) <= high - zero)
    assert band.sum() > 20
    term = np.where(below, low - zero, np.where(above, high - zero, np.rint(ratio) - ratio))
    outside = below | above
    np.testing.assert_allclose(
        s.grad.numpy(), 0.5 * (upstream.numpy() * term).sum(1, keepdims=True), rtol=1e-4, atol=1e-4
    )
    np.testing.assert_array_equal(v.grad.numpy(), np.where(outside, 0.0, upstream.numpy()))
    np.testing.assert_allclose(
        z.grad.numpy(), 0.5 * (upstream.numpy() * outside * -step).sum(1, keepdims=True), rtol=1e-4, atol=1e-4
    )


def test_on_the_outermost_level_the_gradient_is_that_of_the_level():
    """|v/s| = Q is no longer inside: eq. 3 has -Q_n < v/s < Q_p."""
    x, s = torch.tensor([1.0, -2.0, -1.0], requires_grad=True), torch.tensor([1.0], requires_grad=True)
    y = fake_quantize_learned(x, s, torch.zeros(1), IntegerGrid(-2, 1))
    (slopes,) = torch.autograd.grad(y, x, torch.ones(3), retain_graph=True)
    assert slopes.tolist() == [0.0, 0.0, 1.0]
    assert [torch.autograd.grad(y[i], s, retain_graph=True)[0].item() for i in range(3)] == [1.0, -2.0, 0.0]


def test_unknown_band_is_refused():
    with pytest.raises(ValueError, match="band must be one of paper, rounded, got 'half'"):
        fake_quantize_learned(torch.ones(1), torch.ones(1), torch.zeros(1), IntegerGrid(-2, 1), band="half")


@pytest.mark.parametrize(
    ("spec", "passes"), [("int2 lsq", 0.0), ("int2 lsq:rounded", 1.0), ("uint2 lsq", 0.0), ("uint2 lsq:rounded", 1.0)]
)
def test_the_spec_chooses_the_band(spec, passes):
    parsed = QuantSpec.parse(spec)
    assert str(parsed) == spec
    assert parsed.learned
    x = torch.tensor([[parsed.grid.quant_max + 0.3]], requires_grad=True)
    quantizer = (
        make_weight_quantizer(parsed, "w", (1, 1)) if parsed.signed else make_activation_quantizer(parsed, "x", 1, -1)
    )
    quantizer.set_calibrated()
    quantizer(x).sum().backward()
    assert x.grad.item() == passes


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
