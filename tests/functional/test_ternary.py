"""TWN and TTQ against brute force, published constants, and autograd through the forward formula."""

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn

from lq_plugin import QuantPlan, Rule, prepare
from lq_plugin.functional.ttq import ternarize_learned
from lq_plugin.functional.twn import approximate_threshold, exact_threshold, ternarize, ternary_scale, ternary_signs


def twn_error(row, threshold):
    keep = np.abs(row) > threshold
    alpha = np.abs(row[keep]).mean() if keep.any() else 0.0
    return np.square(row - alpha * np.sign(row) * keep).sum()


@given(st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=25))
def test_exact_threshold_beats_every_other(values):
    row = np.array(values, np.float32)
    threshold = exact_threshold(torch.from_numpy(row)[None])
    found = twn_error(row.astype(np.float64), threshold.item())
    tried = [twn_error(row.astype(np.float64), t) for t in (0.0, *np.abs(row) * 0.999, *np.abs(row) * 1.001, 10.0)]
    assert found <= min(tried) + 1e-5 * (1 + np.square(row).sum())


@pytest.mark.parametrize(
    ("draw", "exact_ratio", "exact_error", "approximate_error"),
    [
        # Reference values of the paper's families: optimal threshold over E|w|, mean squared error.
        (lambda rng, n: rng.standard_normal(n), 0.767, 0.1902, 0.1916),
        (lambda rng, n: rng.uniform(-1, 1, n), 0.667, None, None),
        (lambda rng, n: rng.laplace(size=n), 1.000, 0.5285, 0.5649),
    ],
    ids=["normal", "uniform", "laplace"],
)
def test_thresholds_of_known_distributions(draw, exact_ratio, exact_error, approximate_error):
    row = draw(np.random.default_rng(0), 2_000_000).astype(np.float32)
    rows = torch.from_numpy(row)[None]
    exact = exact_threshold(rows)
    assert exact.item() / np.abs(row).mean() == pytest.approx(exact_ratio, abs=0.02)
    if exact_error is not None:
        assert twn_error(row, exact.item()) / len(row) == pytest.approx(exact_error, rel=5e-3)
        assert twn_error(row, approximate_threshold(rows).item()) / len(row) == pytest.approx(
            approximate_error, rel=5e-3
        )


@pytest.mark.parametrize("shape", [(1, 700_001), (2, 300_000), (700, 1000)])
def test_large_weights_are_worked_on_in_pieces(shape):
    rows = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    descending = -np.sort(-np.abs(rows).astype(np.float64), 1)
    best = (descending.cumsum(1) ** 2 / np.arange(1, shape[1] + 1)).argmax(1)
    want = [row[index : index + 2].mean() for row, index in zip(descending, best, strict=True)]
    threshold = exact_threshold(torch.from_numpy(rows))
    np.testing.assert_allclose(threshold, want, rtol=1e-6)
    kept = np.abs(rows) > threshold.numpy()[:, None]
    scale = (np.abs(rows).astype(np.float64) * kept).sum(1) / kept.sum(1)
    np.testing.assert_allclose(ternary_scale(torch.from_numpy(rows), threshold), scale, rtol=1e-6)
    signs = np.sign(rows) * kept
    assert np.array_equal(ternary_signs(torch.from_numpy(rows), threshold[:, None]), signs)
    learned = ternarize_learned(
        torch.from_numpy(rows), threshold[:, None], torch.full((1, 1), 0.5), torch.full((1, 1), 2.0)
    )
    assert np.array_equal(learned, np.where(signs > 0, np.float32(0.5), np.float32(2.0) * signs))


def test_ternarize_values_and_gradient():
    x = torch.tensor([[0.1, -0.9, 0.6, -0.2]], requires_grad=True)
    threshold = torch.tensor([0.5])
    alpha = ternary_scale(x.detach(), threshold)
    y = ternarize(x, threshold[:, None], alpha[:, None])
    np.testing.assert_allclose(y.detach(), [[0, -0.75, 0.75, 0]], rtol=1e-6)
    y.backward(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    assert x.grad.tolist() == [[1, 2, 3, 4]]


@pytest.mark.parametrize("scale_shape", [(1, 1), (3, 1)])
def test_ttq_gradients(scale_shape):
    """The scales' rules are autograd's own of the forward formula; the weight's is the paper's straight-through
    rule."""
    generator = torch.Generator().manual_seed(3)
    w = torch.randn(3, 50, generator=generator, requires_grad=True)
    positive = torch.rand(scale_shape, generator=generator).add(0.5).requires_grad_()
    negative = torch.rand(scale_shape, generator=generator).add(0.5).requires_grad_()
    threshold = torch.tensor(0.3)
    g = torch.randn(3, 50, generator=generator)

    above, below = (w > threshold).float(), (w < -threshold).float()
    formula = positive * above - negative * below
    want = torch.autograd.grad(formula, (positive, negative), g)
    got = torch.autograd.grad(ternarize_learned(w, threshold, positive, negative), (w, positive, negative), g)
    torch.testing.assert_close(got[1:], want)
    torch.testing.assert_close(ternarize_learned(w, threshold, positive, negative), formula)
    between = 1 - above - below
    torch.testing.assert_close(got[0], (positive * above + between + negative * below) * g)


def test_ttq_starts_at_the_mean_magnitudes_above_the_threshold():
    layer = nn.Linear(40, 10)
    net = nn.Sequential(layer)
    prepare(net, QuantPlan([Rule("*", weight="ttq:0.1")]))
    layer.calibrate_weight()
    w = layer.weight.detach().numpy()
    threshold = 0.1 * np.abs(w).max()
    quantizer = layer.weight_quantizer
    assert quantizer.positive.item() == pytest.approx(w[w > threshold].mean(), rel=1e-5)
    assert quantizer.negative.item() == pytest.approx(-w[w < -threshold].mean(), rel=1e-5)
    values = layer.quantized_weight().unique().tolist()
    assert values == pytest.approx([-quantizer.negative.item(), 0.0, quantizer.positive.item()])
    assert set(quantizer.no_weight_decay) == {name for name, _ in quantizer.named_parameters()}


def test_twn_per_filter_and_per_tensor_thresholds():
    weight = torch.stack([torch.linspace(-1, 1, 9), torch.linspace(-10, 10, 9)])
    for spec, groups in (
        ("twn", [weight.flatten()]),
        ("twn per_channel", list(weight)),
        ("twn:0.75 per_channel", list(weight)),
    ):
        layer = nn.Linear(9, 2)
        layer.weight.data = weight.clone()
        prepare(nn.Sequential(layer), QuantPlan([Rule("*", weight=spec)]))
        factor = 0.75 if ":" in spec else 0.7
        want = []
        for group in groups:
            row = group.numpy()
            keep = np.abs(row) > factor * np.abs(row).mean()
            want.append(np.sign(row) * keep * np.abs(row[keep]).mean())
        np.testing.assert_allclose(layer.quantized_weight().detach().flatten(), np.concatenate(want), rtol=1e-6)


def test_second_derivatives_of_learned_scales():
    """Σ w̃³ has the derivatives 3 Wp² and 6 Wp for each weight above Δ; those by Wn have a minus sign."""
    x = torch.tensor([0.9, 0.5, -0.8, 0.01], requires_grad=True)
    positive, negative = torch.tensor([0.5], requires_grad=True), torch.tensor([2.0], requires_grad=True)
    loss = (ternarize_learned(x, torch.tensor([0.1]), positive, negative) ** 3).sum()
    by_x, by_positive, by_negative = torch.autograd.grad(loss, (x, positive, negative), create_graph=True)
    assert by_x.tolist() == [0.375, 0.375, 24.0, 0.0]
    assert (by_positive.item(), by_negative.item()) == (1.5, -12.0)
    (by_positive + by_negative).backward()
    assert (positive.grad.item(), negative.grad.item()) == (6.0, -12.0)
