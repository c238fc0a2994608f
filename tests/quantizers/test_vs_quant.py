"""Two-level scales against plain loops over vectors, and the values known for Gaussian data."""

import numpy as np
import pytest
import torch
from torch import nn

from lq_plugin import PlanError, QuantPlan, QuantSpec, Rule, calibrate, prepare
from lq_plugin.functional.error import sqnr_db
from lq_plugin.quantizers import make_weight_quantizer


def vs_quant(x, vector, bits, scale_bits, per_channel=False):
    """The docstring's formula for symmetric narrow levels, row by row and vector by vector, float64."""
    x = np.asarray(x, dtype=np.float64)
    top, most = 2 ** (bits - 1) - 1, 2**scale_bits - 1
    starts = range(0, x.shape[1], vector)
    s = np.array([[np.abs(row[i : i + vector]).max() / top for i in starts] for row in x])
    gamma = np.maximum((s.max(1, keepdims=True) if per_channel else s.max()) / most, 1e-30) * np.ones_like(s)
    integer = np.clip(np.rint(s / gamma), 1, most)
    out = np.empty_like(x)
    for r, row in enumerate(x):
        for g, i in enumerate(starts):
            step = integer[r, g] * gamma[r, g]
            out[r, i : i + vector] = np.clip(np.rint(row[i : i + vector] / step), -top, top) * step
    return out


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize(("bits", "scale_bits", "vector"), [(4, 4, 16), (3, 6, 8), (8, 2, 5), (2, 4, 64)])
def test_weights_equal_the_loops(bits, scale_bits, vector, per_channel):
    torch.manual_seed(bits)
    w = torch.randn(6, 37) * torch.rand(6, 1)
    w[2, :16] = 0.0
    spec = QuantSpec.parse(f"int{bits} narrow group{vector}:{scale_bits}{':channel' if per_channel else ''} ragged")
    got = make_weight_quantizer(spec, "w", w.shape)(w)
    np.testing.assert_allclose(got.numpy(), vs_quant(w, vector, bits, scale_bits, per_channel), rtol=1e-5, atol=1e-6)


def test_convolution_vectors_run_along_the_input_channels():
    torch.manual_seed(0)
    w = torch.randn(4, 20, 3, 2)
    spec = QuantSpec.parse("int4 narrow group8:4 ragged")
    got = make_weight_quantizer(spec, "w", w.shape)(w)
    flat = w.permute(0, 2, 3, 1).reshape(-1, 20)  # one row for each filter and kernel position
    want = torch.from_numpy(vs_quant(flat, 8, 4, 4)).reshape(4, 3, 2, 20).permute(0, 3, 1, 2).float()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("scale_bits", "coarse", "want"),
    [(4, "tensor", 20.25), (4, "channel", 21.24), (6, "channel", 21.30), (None, "", 21.41)],
)
def test_signal_to_noise_on_rows_of_different_spread(scale_bits, coarse, want):
    """4 bits, vectors of 16, rows N(0, s_row²): a float scale per tensor wastes integer codes, one per channel does
    not."""
    torch.manual_seed(0)
    w = torch.randn(512, 1024) * torch.randn(512, 1).abs()
    scales = "" if scale_bits is None else f":{scale_bits}" + (":channel" if coarse == "channel" else "")
    got = make_weight_quantizer(QuantSpec.parse(f"int4 narrow group16{scales}"), "w", w.shape)(w)
    assert sqnr_db(w, got) == pytest.approx(want, abs=0.6 if coarse == "tensor" else 0.15)


@pytest.mark.parametrize(
    "spec", ["int4 group16:4 mse", "int3 group16:4:channel mse", "int4 affine group12:5 mse ragged"]
)
def test_integer_scales_by_error_are_the_best_of_all(spec):
    """Every multiple of γ is tried on every vector, in numpy."""
    torch.manual_seed(0)
    w = torch.randn(24, 48) * torch.rand(24, 1)
    chosen = QuantSpec.parse(spec)
    quantizer = make_weight_quantizer(chosen, "w", w.shape)
    quantizer.calibrate(w)
    group, grid = chosen.granularity, chosen.grid
    vectors = w.double().numpy().reshape(24, -1, group.group_size)
    scale, zero_point = (of.double().numpy()[..., 0] for of in (quantizer.scale, quantizer.zero_point))
    most = 2**group.scale_bits - 1
    gamma = (scale.max(1, keepdims=True) if group.coarse == "channel" else scale.max()) / most * np.ones_like(scale)
    assert np.rint(scale / gamma).max() == most

    def error(step, zero):
        q = np.clip(np.rint(vectors / step[..., None]) + zero[..., None], grid.quant_min, grid.quant_max)
        return (((q - zero[..., None]) * step[..., None] - vectors) ** 2).sum(-1)

    if not grid.affine:
        best = np.min([error(gamma * k, zero_point) for k in range(1, most + 1)], axis=0)
        np.testing.assert_allclose(error(scale, zero_point), best, rtol=1e-4)
    plain = make_weight_quantizer(QuantSpec.parse(spec.replace("mse", "octav")), "w", w.shape)
    plain.calibrate(w)
    assert error(scale, zero_point).sum() < (plain(w) - w).square().sum().item()


@pytest.mark.parametrize(
    "spec",
    [
        "int4 group4:4 mse",
        "int4 affine group4:4",
        "uint4 group4:4:channel octav",
        "int4 affine group3:6:channel mse ragged",
    ],
)
def test_other_ranges_and_zero_points_land_on_integer_scales(spec):
    torch.manual_seed(0)
    parsed = QuantSpec.parse(spec)
    w = torch.randn(6, 16) + 0.3
    quantizer = make_weight_quantizer(parsed, "w", w.shape)
    quantizer.calibrate(w)
    scale, zero_point = quantizer.qparams(
        torch.nn.functional.pad(w, (0, -16 % parsed.granularity.group_size)).reshape(
            6, -1, parsed.granularity.group_size
        )
    )
    per_channel = parsed.granularity.coarse == "channel"
    top = scale.amax((1, 2), keepdim=True) if per_channel else scale.max()
    integer = scale / top * (2**parsed.granularity.scale_bits - 1)
    torch.testing.assert_close(integer, integer.round(), rtol=0, atol=1e-3)
    assert torch.equal(zero_point, zero_point.round())
    assert sqnr_db(w.clamp(min=0) if not parsed.signed else w, quantizer(w)) > 15


@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.Conv2d(12, 3, 1, bias=False), (4, 12, 5, 6)), (nn.Linear(12, 3, bias=False), (4, 5, 12))]
)
def test_activations_get_their_vectors_at_run_time(layer, shape):
    torch.manual_seed(0)
    net = nn.Sequential(layer).eval()
    prepare(net, QuantPlan([Rule("*", input="int4 narrow group4:4")]))
    x = torch.randn(shape)
    calibrate(net, [x])
    quantizer = layer.input_quantizer
    axis = quantizer.axis % x.ndim
    flat = x.movedim(axis, -1).reshape(-1, 12)
    want = torch.from_numpy(vs_quant(flat, 4, 4, 4)).float().reshape(x.movedim(axis, -1).shape).movedim(-1, axis)
    torch.testing.assert_close(quantizer(x), want, rtol=1e-5, atol=1e-6)
    # A sample gets the same whatever batch it is in.
    assert torch.equal(quantizer(x[:1]), quantizer(x)[:1])
    # Run-time vectors are closer than one scale for all.
    assert (
        sqnr_db(x, quantizer(x))
        > sqnr_db(x, torch.fake_quantize_per_tensor_affine(x, x.abs().max().item() / 7, 0, -7, 7)) + 1
    )


def test_impossible_activations_are_refused():
    net = nn.Sequential(nn.Linear(8, 8))
    for spec, message in (
        ("int4 group4", "write group16:4"),
        ("uint4 affine group4:4", "no zero point"),
        ("int4 group4:4:channel", "group16:4"),
    ):
        with pytest.raises(PlanError, match=message):
            prepare(net, QuantPlan([Rule("*", input=spec)]))


def test_trains_with_straight_through_gradients():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))
    prepare(net, "int4 group4:4 / int8 group4:4")
    x, y = torch.randn(64, 16), torch.randint(0, 2, (64,))
    calibrate(net, [x])
    optimizer = torch.optim.SGD(net.parameters(), 0.5)
    losses = []
    for _ in range(100):
        loss = nn.functional.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
