"""Binary weights and inputs against formulas in numpy and torch's autograd."""

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn
from torch.nn import functional as F

from lq_plugin import QuantPlan, Rule, prepare
from lq_plugin.functional.binary_connect import hard_sigmoid, sign
from lq_plugin.functional.xnor_net import binary_weight, filter_scale


def test_sign_of_zero_is_plus_one():
    assert sign(torch.tensor([0.0, -0.0, 1e-30, -1e-30])).tolist() == [1, 1, 1, -1]


@given(st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=20))
def test_sign_gradient_is_that_of_hard_tanh(values):
    x = torch.tensor(values, requires_grad=True)
    g = torch.linspace(-1, 1, len(values))
    sign(x).backward(g)
    # BNN writes 1{|x| <= 1}: the ends belong to the interval.
    want = np.where(np.abs(np.array(values, np.float32)) <= 1, g.numpy(), 0)
    np.testing.assert_array_equal(x.grad.numpy(), want)


def test_stochastic_signs_have_the_probability_of_the_hard_sigmoid():
    generator = torch.Generator().manual_seed(0)
    for value in (-1.2, -0.5, 0.0, 0.8, 1.0):
        x = torch.full((40_000,), value)
        share = (sign(x, torch.rand(x.shape, generator=generator)) > 0).float().mean().item()
        probability = min(max((value + 1) / 2, 0), 1)
        # Five standard deviations of a binomial share.
        assert abs(share - probability) <= 5 * (probability * (1 - probability) / len(x)) ** 0.5 + 1e-9
        assert hard_sigmoid(x[:1]).item() == pytest.approx(probability)


@pytest.mark.parametrize("shape", [(4, 6), (3, 5, 3, 3)])
def test_filter_scale_minimises_the_error(shape):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    scale_shape = (shape[0], *[1] * (len(shape) - 1))
    alpha = filter_scale(w, scale_shape)
    np.testing.assert_allclose(alpha.flatten(), np.abs(w.numpy()).reshape(shape[0], -1).mean(1), rtol=1e-6)

    def error(a):
        return (w - a * w.sign()).square().flatten(1).sum(1)

    assert (error(alpha) <= error(alpha * 1.01)).all()
    assert (error(alpha) <= error(alpha * 0.99)).all()


def test_both_gradients_of_a_binary_weight():
    w = torch.tensor([[0.5, -0.25, 1.5], [-2.0, 0.1, 0.0]], requires_grad=True)
    g = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    alpha = filter_scale(w, (2, 1))
    (plain,) = torch.autograd.grad(binary_weight(w, alpha), w, g)
    assert plain.tolist() == [[1, 2, 0], [0, 5, 6]]
    (paper,) = torch.autograd.grad(binary_weight(w, alpha, paper_gradient=True), w, g)
    a, inside = alpha.detach().numpy(), np.array([[1, 1, 0], [0, 1, 1]])
    np.testing.assert_allclose(paper, g.numpy() * (1 / 3 + a * inside), rtol=1e-6)


def quantized(layer, weight, inputs):
    net = nn.Sequential(layer)
    prepare(net, QuantPlan([Rule("*", weight=weight, input=inputs)]))
    return net.train()


def test_xnor_linear_is_the_paper_s_formula():
    layer = nn.Linear(6, 3)
    net = quantized(layer, "bwn", "xnor")
    x = torch.randn(5, 6)
    w, b = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    signs = lambda a: np.where(a >= 0, 1.0, -1.0)  # noqa: E731
    k = np.abs(x.numpy()).mean(1, keepdims=True)
    want = signs(x.numpy()) @ signs(w).T * k * np.abs(w).mean(1) + b
    np.testing.assert_allclose(net(x).detach(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("stride", "padding", "mode"), [(1, 1, "zeros"), (2, 0, "zeros"), (1, 1, "reflect")])
def test_xnor_convolution_multiplies_by_the_window_means(stride, padding, mode):
    layer = nn.Conv2d(4, 3, 3, stride, padding, padding_mode=mode)
    net = quantized(layer, "bwn", "xnor")
    x = torch.randn(2, 4, 7, 7)
    pad = {"zeros": "constant", "reflect": "reflect"}[mode]
    signs = F.pad(torch.where(x >= 0, 1.0, -1.0), [padding] * 4, mode=pad)
    magnitude = F.pad(x.abs().mean(1, keepdim=True), [padding] * 4, mode=pad)
    k = F.avg_pool2d(magnitude, 3, stride)
    w = layer.weight
    weight = torch.where(w >= 0, 1.0, -1.0) * w.abs().mean((1, 2, 3), keepdim=True)
    want = F.conv2d(signs, weight, stride=stride) * k + layer.bias.view(1, -1, 1, 1)
    torch.testing.assert_close(net(x), want)


def test_xnor_is_for_plain_layers_only():
    from lq_plugin import PlanError

    net = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.ConvTranspose2d(4, 4, 3))
    with pytest.raises(PlanError, match=r"0: input 'xnor'.*\n.*1: input 'xnor'"):
        prepare(net, "bwn / xnor")


def test_float_evaluation_must_be_asked_for():
    layer = nn.Linear(8, 8)
    x = torch.randn(3, 8)
    plain = F.linear(x, layer.weight, layer.bias)
    net = quantized(layer, "sign:float_eval stochastic", "float")
    assert not torch.equal(net(x), plain)
    assert torch.equal(net.eval()(x), plain)
    net = quantized(nn.Linear(8, 8), "sign stochastic", "float").eval()
    assert set(net[0].quantized_weight().unique().tolist()) == {-1.0, 1.0}


def test_second_derivatives_of_the_sign():
    """∂/∂x of Σ b³ is 3 b² inside; of the sum of its squares 2 · 3 b² · 6 b = 36 b."""
    x = torch.tensor([-2.0, -0.5, 0.25, 1.0, 1.5], requires_grad=True)
    (first,) = torch.autograd.grad((sign(x) ** 3).sum(), x, create_graph=True)
    assert first.tolist() == [0.0, 3.0, 3.0, 3.0, 0.0]
    first.square().sum().backward()
    assert x.grad.tolist() == [0.0, -36.0, 36.0, 36.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_bound_of_the_gradient_is_inside(dtype):
    eps = torch.finfo(dtype).eps
    x = torch.tensor([-1 - eps, -1, -0.0, 1, 1 + eps], dtype=dtype, requires_grad=True)
    y = sign(x)
    y.sum().backward()
    assert (y.dtype, y.tolist(), x.grad.tolist()) == (dtype, [-1.0, -1.0, 1.0, 1.0, 1.0], [0.0, 1.0, 1.0, 1.0, 0.0])


def test_threshold_and_literal_gradient():
    x = torch.tensor([-1.5, -0.3, -0.25, 0.0, 0.2, 2.0], requires_grad=True)
    y = sign(x, threshold=-0.25, clipped=False)
    assert y.tolist() == [-1, -1, 1, 1, 1, 1]
    y.sum().backward()
    assert x.grad.tolist() == [1.0] * 6
