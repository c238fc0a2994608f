"""The grids of GGUF's types: by hand in float64, and by ggml's own rules as the package gguf has them."""

import numpy as np
import pytest
import torch
from torch import nn

from lq_plugin import QuantSpec, calibrate, prepare
from lq_plugin.errors import SpecError
from lq_plugin.export.codes import decode, encode
from lq_plugin.functional.trits import pack_trits, unpack_trits
from lq_plugin.ptq.gptq.quantize import gptq
from lq_plugin.ptq.reconstruction.reconstruct import reconstruct
from lq_plugin.quantizers import make_weight_quantizer

NAMES = ("q4_0", "q8_0", "tq1_0", "tq2_0")
TERNARY = ("", ":mean", ":exact", ":max")


def weight(rows=6, columns=512, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def quantized(text, w):
    quantizer = make_weight_quantizer(QuantSpec.parse(text), "weight", tuple(w.shape))
    quantizer.calibrate(w)
    return quantizer.eval()(w)


def by_hand(text, w):
    """Float64, block for block; d is rounded to float16 as NumPy does."""
    name, _, rule = text.partition(":")
    rows = w.double().numpy().reshape(-1, 32 if name[0] == "q" else 256)
    out = []
    for block in rows:
        magnitude = np.abs(block)
        if name == "q4_0":
            d, low, high = block[magnitude.argmax()] / -8, -8, 7
        elif name == "q8_0":
            d, low, high = magnitude.max() / 127, -127, 127
        else:
            d, low, high = (
                {"max": magnitude.max(), "exact": least_squares(magnitude)}.get(rule, magnitude.mean()),
                -1,
                1,
            )
        d = float(np.float16(d))
        out.append(np.clip(np.round(block / d), low, high) * d)
    return torch.from_numpy(np.array(out).reshape(w.shape)).float()


def least_squares(magnitude):
    """The scale of the best of all thresholds, each tried."""
    ordered = np.sort(magnitude)[::-1]
    errors = [np.square(ordered[:k] - ordered[:k].mean()).sum() + np.square(ordered[k:]).sum() for k in range(1, 257)]
    return ordered[: 1 + int(np.argmin(errors))].mean()


@pytest.mark.parametrize("text", [*NAMES[:2], *(name + rule for name in NAMES[2:] for rule in TERNARY)])
def test_values_are_those_of_the_definition(text):
    w = weight()
    assert torch.equal(quantized(text, w), by_hand(text, w))


def test_q4_0_reaches_the_largest_magnitude_on_either_side():
    w = torch.tensor([[4.0, -3.5, *[0.25] * 30], [-4.0, 3.5, *[0.25] * 30], [0.0] * 32])
    y = quantized("q4_0", w)
    assert y[:, 0].tolist() == [4.0, -4.0, 0.0]
    assert y[:, 1].tolist() == [-3.5, 3.5, 0.0]
    assert y[0].min() == -3.5  # seven steps of a half; the eighth is on the other side
    assert not y[2].any()


@pytest.mark.parametrize("text", [*NAMES, "tq2_0:exact", "tq1_0:max"])
def test_ggml_reads_the_values_back_bit_for_bit(text):
    quants = pytest.importorskip("gguf").quants
    kind = pytest.importorskip("gguf").GGMLQuantizationType[text.partition(":")[0].upper()]
    w = weight(64)
    y = quantized(text, w).numpy()
    np.testing.assert_array_equal(quants.dequantize(quants.quantize(y, kind), kind), y)


@pytest.mark.parametrize("text", ["q4_0", "q8_0"])
def test_errors_are_no_larger_than_those_of_ggml(text):
    gguf = pytest.importorskip("gguf")
    kind, w = gguf.GGMLQuantizationType[text.upper()], weight(64)
    theirs = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(w.numpy(), kind), kind))
    ours = quantized(text, w)
    step = (w.reshape(64, -1, 32).abs().amax(2) / (8 if text == "q4_0" else 127)).repeat_interleave(32, 1)
    assert ((ours - theirs).abs() <= 1.001 * step).all()
    assert ((ours - theirs).abs() > 0.5 * step).float().mean() < 0.01  # another level
    assert (ours - w).norm() < (theirs - w).norm()


@pytest.mark.parametrize("scale", [1e-9, 1e-5, 1e7])
@pytest.mark.parametrize("text", [*NAMES, "tq2_0:exact"])
def test_scales_outside_of_float16_stay_finite(text, scale):
    """Scales that float16 cannot reach are 0, or clipped."""
    w = weight() * 20 * scale
    y = quantized(text, w)
    assert y.isfinite().all()
    d = torch.where(y != 0, y.abs(), torch.inf).min()
    assert (y.abs() <= w.abs().max() + 2.0**-24 * 127).all()
    if scale == 1e7:
        assert d <= 65504


@pytest.mark.parametrize("text", NAMES)
def test_parts_decode_to_the_values(text):
    w = weight(columns=300)  # the last block is shorter
    spec = QuantSpec.parse(text)
    quantizer = make_weight_quantizer(spec, "weight", tuple(w.shape))
    parts = encode(quantizer.eval(), w)
    assert torch.equal(decode(spec, (6, 300), {key: part.values for key, part in parts.items()}), quantizer(w))
    sizes = {key: (tuple(part.values.shape), part.bits) for key, part in parts.items()}
    blocks = 10 if text[0] == "q" else 2
    assert sizes["scale"] == ((6, blocks, 1), 16)
    assert sizes["codes"] == ((6, 300), {"q4_0": 4, "q8_0": 8, "tq1_0": 0, "tq2_0": 2}[text])
    assert ("packed" in sizes) == (text == "tq1_0")


def test_every_trit_comes_back_from_every_byte():
    digits = torch.arange(3**5)[:, None] // torch.tensor([1, 3, 9, 27, 81]) % 3  # all of five digits
    block = torch.zeros(3**5, 256, dtype=torch.int32)
    block[:, 7:160:32] = digits.int()
    block[:, 163:240:16] = digits.int()
    block[:, 242::4] = digits[:, :4].int()
    packed = pack_trits(block)
    assert packed.shape == (243, 52)
    assert packed.min() >= 0
    assert packed.max() <= 255
    assert torch.equal(unpack_trits(packed), block)
    assert len(packed[:, 7].unique()) == len(packed[:, 35].unique()) == 243


@pytest.mark.parametrize("text", ["q4_0", "q8_0", "tq2_0", "tq2_0:exact"])
def test_ptq_passes_keep_to_the_grid(text):
    """GPTQ and reconstruction choose other levels, never another d than float16 has."""
    torch.manual_seed(0)
    batches = [torch.randn(128, 64) @ torch.randn(64, 64)]
    for algorithm in (gptq, lambda net, data: reconstruct(net, data, iterations=20)):
        net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
        prepare(net, text)
        calibrate(net, batches)
        nearest = net[0].quantized_weight().detach().clone()
        algorithm(net, batches)
        y = net[0].quantized_weight().detach()
        assert not torch.equal(y, nearest)
        scale, zero_point = net[0].weight_quantizer.qparams()
        levels = y.reshape(32, scale.shape[1], -1) / scale + zero_point
        grid = net[0].weight_quantizer.spec.grid
        assert torch.equal(levels, levels.round())
        assert (levels >= grid.quant_min).all()
        assert (levels <= grid.quant_max).all()
        assert torch.equal(scale, scale.half().float())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("q4_0 mse", "q4_0 has no choice of range"),
        ("q8_0 group64", "q8_0 has no choice of granularity"),
        ("tq2_0:median", "'median' is no option; valid: mean, exact, max"),
        ("q4_0 affine", "q4_0 has no choice of affine"),
    ],
)
def test_what_the_types_do_not_have_is_refused(text, message):
    with pytest.raises(SpecError, match=message):
        QuantSpec.parse(text)
