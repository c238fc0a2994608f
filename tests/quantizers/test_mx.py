"""MX4, MX6 and MX9 against plain loops, the paper's statistic, and their own grid."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

from lq_plugin import QuantSpec, SpecError, calibrate, prepare
from lq_plugin.functional.affine import fake_quantize
from lq_plugin.functional.error import sqnr_db
from lq_plugin.functional.mx import mx_step
from lq_plugin.intent.spec import IntegerGrid
from lq_plugin.quantizers import make_weight_quantizer

MANTISSA = {"mx9": 7, "mx6": 4, "mx4": 2}


def mx(row, m, micro=True):
    """One row by the formula, in Python floats."""
    out = []
    for i in range(0, len(row), 16):
        block = [float(v) for v in row[i : i + 16]]
        top = max(map(abs, block))
        if top == 0:
            out += block
            continue
        e = math.frexp(top)[1] - 1
        for j in range(0, len(block), 2):
            pair = block[j : j + 2]
            biggest = max(map(abs, pair))
            tau = (1 if biggest == 0 else min(1, e - (math.frexp(biggest)[1] - 1))) if micro else 0
            step = 2.0 ** (e - tau - (m - 1))
            out += [max(-(2**m - 1), min(2**m - 1, float(np.rint(v / step)))) * step for v in pair]
    return out


rows = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 3), st.integers(1, 40)),
    elements=st.floats(-1e6, 1e6, width=32, allow_subnormal=False),
)


@given(rows, st.sampled_from(sorted(MANTISSA)))
def test_equals_the_formula_and_its_values_are_fixed_points(array, name):
    array[np.abs(array) < 1e-20] = 0  # steps below the smallest normal number are documented to differ
    w = torch.from_numpy(array)
    quantizer = make_weight_quantizer(QuantSpec.parse(name), "w", tuple(w.shape))
    got = quantizer(w)
    want = np.array([mx(row, MANTISSA[name]) for row in array], dtype=np.float32)
    np.testing.assert_array_equal(got.numpy(), want)
    assert torch.equal(quantizer(got), got)


def test_papers_statistic():
    """N(0, σ²) with σ ~ |N(0, 1)| per row: the values of the paper's figure 7, and 3.6 dB from the microexponents."""
    torch.manual_seed(0)
    x = torch.randn(4000, 256) * torch.randn(4000, 1).abs()

    def mean_sqnr(quantized):
        return (10 * torch.log10(x.square().sum() / (x - quantized).square().sum())).item()

    for name, want in (("mx9", 46.6), ("mx6", 28.4), ("mx4", 15.8)):
        got = make_weight_quantizer(QuantSpec.parse(name), "w", tuple(x.shape))(x)
        assert mean_sqnr(got) == pytest.approx(want, abs=0.15)
    blocks = x.reshape(4000, 16, 16)
    plain = fake_quantize(blocks, mx_step(blocks, 7, micro_bits=0), torch.zeros(1), IntegerGrid(-127, 127)).reshape(
        x.shape
    )
    mx9 = make_weight_quantizer(QuantSpec.parse("mx9"), "w", tuple(x.shape))(x)
    assert mean_sqnr(mx9) - mean_sqnr(plain) == pytest.approx(3.6, abs=0.1)


def test_every_step_is_an_exact_power_of_two():
    x = 2.0 ** torch.arange(-110, 128, dtype=torch.float64)
    blocks = torch.zeros(len(x), 1, 16)
    blocks[:, 0, 0] = x.float()
    step = mx_step(blocks, 2)[:, 0, 0].double()
    assert torch.equal(step, x / 2)


def test_weights_and_activations_in_a_network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(20, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 4)).eval()
    x = torch.randn(5, 20, 6, 6)
    want = net(x).detach()
    prepare(net, "mx9 / mx9")
    got = net(x).detach()  # nothing to calibrate
    assert sqnr_db(want, got) > 35
    assert torch.equal(net(x[:1]), got[:1]) or torch.allclose(net(x[:1]), got[:1], atol=1e-6)
    calibrate(net, [x])
    assert torch.equal(net(x), got)
    flat = x.movedim(1, -1).reshape(-1, 20)
    expected = np.array([mx(row, 7) for row in flat.numpy()], dtype=np.float32)
    inner = net[0].input_quantizer(x).movedim(1, -1).reshape(-1, 20)
    np.testing.assert_array_equal(inner.detach().numpy(), expected)
    net.train()(x).square().sum().backward()
    assert net[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("text", ["mx6 affine", "mx6 group32", "mx6 mse", "mx6 int4"])
def test_what_the_format_fixes_cannot_be_chosen(text):
    with pytest.raises(SpecError, match="no choice of|second time"):
        QuantSpec.parse(text)


@pytest.mark.parametrize("name", sorted(MANTISSA))
def test_spec_round_trip(name):
    spec = QuantSpec.parse(name)
    assert str(spec) == name
    assert spec == QuantSpec(format=name) == spec.replace()
    assert (spec.grid.quant_min, spec.grid.quant_max) == (-(2 ** MANTISSA[name]) + 1, 2 ** MANTISSA[name] - 1)
