"""FP8 against torch's casts, a search of all codes in numpy, and plain loops over squares of a weight."""

import numpy as np
import pytest
import torch
from torch import nn

from lq_plugin import PlanError, QuantPlan, QuantSpec, Rule, SpecError, calibrate, prepare
from lq_plugin.export import load_packed, packed_file, save_packed
from lq_plugin.functional.fp8 import ELEMENTS, fake_quantize_fp8
from lq_plugin.layers.integer.forward import why_never
from lq_plugin.model.measure.cost import cost, spec_bits
from lq_plugin.model.measure.fidelity import layer_fidelity, weight_bounds
from lq_plugin.model.training import commit_observers
from lq_plugin.quantizers import make_activation_quantizer, make_weight_quantizer

#: torch's type, its largest value, and how many codes from 0 up are finite.
KINDS = {
    "e4m3": (torch.float8_e4m3fn, 448.0, 127),
    "e5m2": (torch.float8_e5m2, 57344.0, 124),
}


def by_torch(x: torch.Tensor, scale: torch.Tensor | float, element: str) -> torch.Tensor:
    dtype, largest, _ = KINDS[element]
    return (x.float() / scale).clamp(-largest, largest).to(dtype).float() * scale


def by_search(x: np.ndarray, element: str) -> np.ndarray:
    """Nearest of all finite codes, the even one of two: float64, without a formula of the format."""
    dtype, _, count = KINDS[element]
    values = torch.arange(count, dtype=torch.uint8).view(dtype).double().numpy()
    distance = np.abs(np.minimum(np.abs(x.astype(np.float64)), values[-1])[:, None] - values)
    tied = distance == distance.min(1, keepdims=True)
    return np.copysign(values[(tied * (2 - np.arange(count) % 2)).argmax(1)], x)


@pytest.mark.parametrize("element", KINDS)
def test_values_are_those_of_torch_and_of_all_codes(element: str) -> None:
    dtype, largest, count = KINDS[element]
    values = torch.arange(count, dtype=torch.uint8).view(dtype).float()
    between = (values[1:] + values[:-1]) / 2
    up, down = (torch.nextafter(between, torch.full_like(between, end)) for end in (torch.inf, -torch.inf))
    special = torch.tensor([0.0, 1e-30, 2 * largest, 1e30])
    x = torch.cat([values, between, up, down, special, largest * torch.randn(5000)])
    x = torch.cat([x, -x])
    got = fake_quantize_fp8(x, torch.tensor(1.0), ELEMENTS[element])
    assert torch.equal(got, by_torch(x, 1.0, element))
    assert np.array_equal(got.numpy(), by_search(x.numpy(), element).astype(np.float32))
    assert fake_quantize_fp8(torch.tensor([float("nan")]), torch.tensor(1.0), ELEMENTS[element]).isnan().all()


@pytest.mark.parametrize("element", KINDS)
@pytest.mark.parametrize("shape", [(6, 20), (6, 20, 3, 3)])
def test_weights_of_each_granularity(shape: tuple[int, ...], element: str) -> None:
    torch.manual_seed(len(shape))
    largest, w = KINDS[element][1], torch.randn(shape) * torch.exp(torch.randn(shape[0], *[1] * (len(shape) - 1)))

    def got(words: str) -> torch.Tensor:
        return make_weight_quantizer(QuantSpec.parse(f"fp8:{element} {words}"), "w", shape)(w)

    assert torch.equal(got("per_tensor"), by_torch(w, w.abs().max() / largest, element))
    rows = w.abs().amax(list(range(1, w.ndim)), keepdim=True) / largest
    assert torch.equal(got("per_channel"), by_torch(w, rows, element))

    squares, groups = torch.empty_like(w), torch.empty_like(w)
    for left in range(0, 20, 4):
        for top in range(0, 6, 4):
            square = w[top : top + 4, left : left + 4]
            squares[top : top + 4, left : left + 4] = by_torch(square, square.abs().max() / largest, element)
    for left in range(0, 20, 8):
        part = w[:, left : left + 8]
        groups[:, left : left + 8] = by_torch(part, part.abs().amax(1, keepdim=True) / largest, element)
    assert torch.equal(got("block4"), squares)
    assert torch.equal(got("group8 ragged"), groups)
    assert torch.equal(got("block128"), got("per_tensor")), "a square larger than the weight"


def test_zeros_stay_zeros() -> None:
    for spec in ("fp8", "fp8:e5m2 per_channel", "fp8 block4"):
        quantizer = make_weight_quantizer(QuantSpec.parse(spec), "w", (4, 8))
        assert torch.equal(quantizer(torch.zeros(4, 8)), torch.zeros(4, 8))
        half = torch.randn(4, 8)
        half[0] = half[:, :4] = 0.0
        assert torch.equal(quantizer(half) == 0, half == 0)
    for spec in ("fp8 dynamic", "fp8 group4 dynamic", "fp8 per_token dynamic"):
        quantizer = make_activation_quantizer(QuantSpec.parse(spec), "x", 8, -1)
        assert torch.equal(quantizer(torch.zeros(4, 8)), torch.zeros(4, 8))


def test_the_gradient_stops_where_values_saturate() -> None:
    x = torch.tensor([1.0, 448.0, 463.0, 465.0, -500.0], requires_grad=True)
    fake_quantize_fp8(x, torch.tensor(1.0), ELEMENTS["e4m3"]).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1.0, 1.0, 1.0, 0.0, 0.0]


def test_inputs_have_the_range_of_the_statistics_and_of_the_moving_average() -> None:
    torch.manual_seed(0)
    x = torch.randn(2000, 10)
    net = nn.Sequential(nn.Linear(10, 4))
    prepare(net, "fp8 per_channel / fp8 percentile:99")
    calibrate(net, [x])
    bound = torch.quantile(x.abs().flatten(), 0.99)
    torch.testing.assert_close(net[0].input_quantizer.scale, (bound / 448).reshape(1), rtol=1e-2, atol=0)

    quantizer = make_activation_quantizer(QuantSpec.parse("fp8:e5m2 ema:0.5:constant"), "x", 10, -1).train()
    quantizer.observing = True
    for size in (8.0, 4.0):
        quantizer(torch.tensor([[-size, 1.0]]))
        commit_observers([quantizer])
    assert quantizer.scale.item() == (torch.tensor(6.0) / 57344).item()
    y = quantizer.eval()(x)
    assert torch.equal(y, by_torch(x, quantizer.scale, "e5m2"))


def test_bits_of_storage() -> None:
    assert spec_bits(QuantSpec.parse("fp8"), (64, 64)) == 8 * 64**2 + 32
    assert spec_bits(QuantSpec.parse("fp8 per_channel"), (64, 64)) == 8 * 64**2 + 64 * 32
    assert spec_bits(QuantSpec.parse("fp8 block128"), (300, 200)) == 8 * 300 * 200 + 3 * 2 * 32


@pytest.mark.parametrize("spec", ["fp8 block128", "fp8:e5m2 block32", "fp8 per_channel"])
@pytest.mark.parametrize("shape", [(300, 200), (1, 200), (130, 40, 3, 3)])
def test_packed_files_are_bit_equal_in_several_pieces(
    spec: str, shape: tuple[int, ...], tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_file, "CHUNK", 5000)
    torch.manual_seed(0)
    size = (shape[1], shape[0])
    make = (lambda: nn.Linear(*size)) if len(shape) == 2 else (lambda: nn.Conv2d(*size, 3))
    x = torch.randn(3, size[0]) if len(shape) == 2 else torch.randn(2, size[0], 5, 5)
    net = nn.Sequential(make())
    prepare(net, f"{spec} / fp8 dynamic")
    calibrate(net, ())
    path = f"{tmp_path}/net.safetensors"
    assert save_packed(net.eval(), path) == pytest.approx(cost(net).bytes, rel=0.05)
    other = nn.Sequential(make())
    load_packed(other, path)
    assert torch.equal(other[0].weight, net[0].quantized_weight())
    assert torch.equal(other(x), net(x))


def test_a_convolution_trains_and_is_measured() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(3, 200, 3), nn.ReLU(), nn.Conv2d(200, 5, 3)), torch.randn(4, 3, 12, 12)
    target = net(x).detach().flip(0)
    prepare(net, QuantPlan([Rule("*", weight="fp8 block128", input="fp8 ema")]))
    calibrate(net, [x])
    rows = layer_fidelity(net, lambda: net(x))
    assert [(row.slot, 28 < row.sqnr_db < 45) for row in rows if row.sqnr_db] == [("weight", True), ("input", True)] * 2
    low, high = weight_bounds(net[0])
    assert low.shape == high.shape == (200,)
    assert high[0] == net[0].weight[:128].abs().max()
    assert why_never(net[0])
    before = (net(x) - target).square().mean().item()
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(20):
        optimizer.zero_grad()
        loss = (net.train()(x) - target).square().mean()
        loss.backward()
        optimizer.step()
    assert loss.item() < before


@pytest.mark.parametrize("range_name", ["mse", "kl", "octav", "aciq", "lsq"])
def test_ranges_of_integers_are_refused(range_name: str) -> None:
    with pytest.raises(SpecError, match=range_name):
        QuantSpec.parse(f"fp8 {range_name}")


def test_refusals_say_what_is_valid() -> None:
    with pytest.raises(SpecError, match="'e4m2' is no option; valid: e4m3, e5m2"):
        QuantSpec.parse("fp8:e4m2")
    with pytest.raises(SpecError, match="int has no scales for squares of a weight, fp8 has, got block128"):
        QuantSpec.parse("int8 block128")
    with pytest.raises(SpecError, match="at least 2, got 1"):
        QuantSpec.parse("fp8 block1")
    with pytest.raises(SpecError, match="has no choice of granularity"):
        QuantSpec.parse("mxfp4 block32")
    with pytest.raises(PlanError, match="activations take group128 dynamic"):
        prepare(nn.Sequential(nn.Linear(4, 4)), "fp8 / fp8 block128 dynamic")
