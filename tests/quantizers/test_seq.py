"""SEQ against plain loops, a search over scales, explicit gradients, and the signal to noise ratios that are known."""

import numpy as np
import pytest
import torch
from torch import nn

from lq_plugin import PlanError, QuantSpec, SpecError, calibrate, prepare
from lq_plugin.export import load_packed, save_packed
from lq_plugin.functional.error import sqnr_db
from lq_plugin.functional.seq import best_scale, fake_quantize_seq
from lq_plugin.quantizers import make_weight_quantizer

#: Levels over α, by number, and where the magnitude of one begins.
LEVELS = {4: np.array([-0.75, -0.25, 0.25, 0.75]), 3: np.array([-2 / 3, 0.0, 2 / 3])}
WORDS = {4: "seq", 3: "seq:ternary"}


def nearest(x: np.ndarray, scale: np.ndarray | float, count: int) -> np.ndarray:
    """The nearest of the levels, in float64."""
    levels = LEVELS[count] * np.asarray(scale, dtype=np.float64)[..., None]
    return np.take_along_axis(
        np.broadcast_to(levels, (*x.shape, count)), np.abs(x[..., None] - levels).argmin(-1)[..., None], -1
    )[..., 0]


@pytest.mark.parametrize("count", LEVELS)
@pytest.mark.parametrize("words", ["per_tensor", "per_channel", "group8 ragged"])
def test_values_are_the_nearest_levels_under_the_largest_weight(words: str, count: int) -> None:
    torch.manual_seed(count)
    w = torch.randn(6, 20, 3) * torch.randn(6, 1, 1).exp()
    array, scale = w.double().numpy(), np.empty((6, 20, 3))
    if words == "per_tensor":
        scale[:] = np.abs(array).max()
    elif words == "per_channel":
        scale[:] = np.abs(array).max((1, 2), keepdims=True)
    else:
        for first in range(0, 20, 8):
            scale[:, first : first + 8] = np.abs(array[:, first : first + 8]).max(1, keepdims=True)
    got = make_weight_quantizer(QuantSpec.parse(f"{WORDS[count]} {words}"), "w", tuple(w.shape))(w)
    np.testing.assert_allclose(got.numpy(), nearest(array, scale, count), rtol=1e-6)


@pytest.mark.parametrize("count", LEVELS)
def test_the_best_scale_is_the_best_of_a_search(count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.cat([torch.randn(20, 37, generator=generator), torch.rand(5, 37, generator=generator).log().neg()])
    rows[3, 5:] = 0.0
    rows[4] = 0.7
    array, found = rows.double().numpy(), best_scale(rows, count).double().numpy()
    error = ((nearest(array, found[:, None], count) - array) ** 2).sum(1)
    for factor in np.linspace(0.2, 3.0, 1401):
        tried = factor * np.sqrt((array**2).mean(1, keepdims=True))
        assert (error <= ((nearest(array, tried, count) - array) ** 2).sum(1) * (1 + 1e-6) + 1e-12).all()


def test_padding_has_no_part_in_a_scale() -> None:
    w = torch.randn(4, 11)
    for word in WORDS.values():
        quantizer = make_weight_quantizer(QuantSpec.parse(f"{word} group8 ragged mse"), "w", (4, 11))
        quantizer.calibrate(w)
        tail = make_weight_quantizer(QuantSpec.parse(f"{word} per_channel mse"), "w", (4, 3))
        tail.calibrate(w[:, 8:])
        torch.testing.assert_close(quantizer(w)[:, 8:], tail(w[:, 8:]))


@pytest.mark.parametrize(("word", "gauss", "laplace"), [("seq", 9.25, 7.02), ("seq:ternary", 7.20, 5.76)])
def test_known_signal_to_noise_ratios(word: str, gauss: float, laplace: float) -> None:
    generator = torch.Generator().manual_seed(0)
    samples = {
        gauss: torch.randn(64, 1024, generator=generator),
        laplace: torch.empty(64, 1024).exponential_(generator=generator)
        * (torch.randint(0, 2, (64, 1024), generator=generator) * 2 - 1),
    }
    for known, w in samples.items():
        ratios = {}
        for spec in (f"{word} per_channel mse", "int2 per_channel mse", "int2 per_channel narrow mse"):
            quantizer = make_weight_quantizer(QuantSpec.parse(spec), "w", tuple(w.shape))
            quantizer.calibrate(w)
            ratios[spec] = sqnr_db(w, quantizer(w)).item()
        assert ratios[f"{word} per_channel mse"] == pytest.approx(known, abs=0.06), ratios
        if word == "seq":
            assert max(ratios, key=ratios.__getitem__).startswith("seq")


@pytest.mark.parametrize("count", LEVELS)
def test_gradients_are_those_of_the_formula(count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(5, 200, generator=generator).requires_grad_()
    scale = (0.5 + torch.rand(5, 1, generator=generator)).requires_grad_()
    upstream = torch.randn(5, 200, generator=generator)
    fake_quantize_seq(w, scale, count, 0.5).backward(upstream)
    x, a, g = w.detach().double().numpy(), scale.detach().double().numpy(), upstream.double().numpy()
    inside = np.abs(x) < a
    assert 0.2 < inside.mean() < 0.9
    np.testing.assert_array_equal(w.grad.numpy(), np.where(inside, upstream.numpy(), 0.0))
    quotient = nearest(x, np.broadcast_to(a, x.shape), count) / a
    slope = np.where(inside, quotient - x / a, quotient)
    np.testing.assert_allclose(scale.grad.numpy(), 0.5 * (slope * g).sum(1, keepdims=True), rtol=1e-4)


def test_zeros_are_no_not_a_number() -> None:
    for count, word in WORDS.items():
        for spec in (word, f"{word} per_channel mse", f"{word} lsq"):
            quantizer = make_weight_quantizer(QuantSpec.parse(spec), "w", (3, 8))
            quantizer.calibrate(torch.zeros(3, 8))
            y = quantizer(torch.zeros(3, 8)).detach()
            assert (y.abs() <= 2.0**-102).all()
            assert count == 4 or not y.any()


@pytest.mark.parametrize("word", WORDS.values())
def test_a_learned_range_trains_and_travels(word: str, tmp_path) -> None:
    torch.manual_seed(0)

    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))

    net, x = make(), torch.randn(32, 3, 8, 8)
    target = net(x).detach()
    prepare(net, f"{word} per_channel lsq")
    calibrate(net, ())
    before = {name: p.detach().clone() for name, p in net.named_parameters() if name.endswith("quantizer.scale")}
    start = make_weight_quantizer(QuantSpec.parse(f"{word} per_channel mse"), "w", (4, 8 * 36))
    start.calibrate(net[3].weight)
    assert torch.equal(before["3.weight_quantizer.scale"], start.scale)
    optimizer = torch.optim.Adam(net.parameters(), 0.003)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (net.train()(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4
    assert all(not torch.equal(before[name], p) for name, p in net.named_parameters() if name in before)
    assert len(net[0].quantized_weight()[0].unique()) <= 4
    save_packed(net.eval(), tmp_path / "net.safetensors")
    other = make()
    load_packed(other, tmp_path / "net.safetensors")
    assert torch.equal(other(x), net(x))


def test_refusals() -> None:
    with pytest.raises(SpecError, match="seq takes the ranges minmax, mse and lsq, got 'kl'"):
        QuantSpec.parse("seq kl")
    with pytest.raises(SpecError, match="seq takes the ranges"):
        QuantSpec.parse("seq dynamic")
    with pytest.raises(PlanError, match="'seq' is for weight, not for its input"):
        prepare(nn.Sequential(nn.Linear(4, 4)), "int8 / seq")
