"""Error along the network: the layer alone and the whole of what is before it, against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import lq_plugin
from lq_plugin.model.measure.outputs import MAX_ELEMENTS, output_errors
from lq_plugin.model.prepare import quantized_layers


def rounded(w: np.ndarray, bits: int) -> np.ndarray:
    """Symmetric, a scale for each row, over the largest magnitude: levels -2^(b-1) .. 2^(b-1) - 1."""
    scale = np.maximum(w.max(1) / (2 ** (bits - 1) - 1), -w.min(1) / 2 ** (bits - 1))[:, None]
    return np.clip(np.round(w / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale


def decibel(y: np.ndarray, q: np.ndarray) -> float:
    return float(10 * np.log10((y**2).sum() / ((y - q) ** 2).sum()))


def test_alone_and_along_are_those_of_numpy() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(16, 32), nn.ReLU(inplace=True), nn.Linear(32, 32), nn.ReLU(inplace=True), nn.Linear(32, 4)
    )
    x = torch.randn(64, 16)
    lq_plugin.prepare(net, "w4 per_channel minmax")
    lq_plugin.calibrate(net, [])
    found = output_errors(net, lambda: net(x))
    assert list(found) == ["0", "2", "4"]
    y = q = x.double().numpy()
    for name in found:
        layer = dict(quantized_layers(net))[name]
        weight, bias = layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()
        low = layer.quantized_weight().detach().double().numpy()
        np.testing.assert_allclose(low, rounded(weight, 4), atol=1e-6)
        alone, along, wanted = y @ low.T + bias, q @ low.T + bias, y @ weight.T + bias
        assert found[name].alone.sqnr_db == pytest.approx(decibel(wanted, alone), abs=1e-3)
        assert found[name].along.sqnr_db == pytest.approx(decibel(wanted, along), abs=1e-3)
        y, q = np.maximum(wanted, 0), np.maximum(along, 0)
    assert found["4"].along.sqnr_db < found["4"].alone.sqnr_db


def test_the_model_is_as_before_and_moved_weights_are_compared_with_float_ones() -> None:
    torch.manual_seed(0)
    net, x = (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)).train(),
        torch.randn(4, 3, 8, 8),
    )
    lq_plugin.prepare(net, "w3 a8")
    lq_plugin.calibrate(net, [x])
    float_weights = {name: layer.weight.detach() * 1.1 for name, layer in quantized_layers(net)}
    net[0].input_quantizer.set_enabled(False)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    plain, against = output_errors(net, lambda: net(x)), output_errors(net, lambda: net(x), float_weights)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert net.training
    assert not net[0].input_quantizer.is_enabled
    assert net[3].input_quantizer.is_enabled
    first = net[0]
    with torch.no_grad():
        wanted = nn.functional.conv2d(x, float_weights["0"], first.bias)
        got = nn.functional.conv2d(x, first.quantized_weight(), first.bias)
    assert against["0"].alone.sqnr_db == pytest.approx(decibel(wanted.numpy(), got.numpy()), abs=1e-3)
    assert plain["0"].alone.sqnr_db > against["0"].alone.sqnr_db


def test_what_is_called_twice_counts_twice_and_what_is_called_otherwise_is_left_out() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.twice, self.odd, self.lstm = nn.Linear(8, 8), nn.Linear(8, 8), nn.LSTM(8, 8, batch_first=True)
            self.calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            y = self.twice(torch.relu(self.twice(x)))
            for _ in range(self.calls):
                y = self.odd(y)
            return self.lstm(y[None])[0]

    torch.manual_seed(0)
    net, x = Odd(), torch.randn(16, 8)
    lq_plugin.prepare(net, "w4")
    lq_plugin.calibrate(net, [x], run=lambda batch: None)
    found = output_errors(net, lambda: net(x))
    assert list(found) == ["twice"]
    assert found["twice"].alone.elements == found["twice"].along.elements == 2 * 16 * 8


def test_a_large_output_is_not_judged_by_some_of_its_channels() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(64, 512)), torch.randn(8 * MAX_ELEMENTS // 512, 64)
    with torch.no_grad():
        # One scale for all channels rounds each eighth one to zero: of every 8th element nothing would be left.
        net[0].weight[::8] *= 0.01
        net[0].bias.zero_()
    weight = net[0].weight.detach().double().numpy()
    lq_plugin.prepare(net, {"rules": [{"match": "*", "weight": "int4 per_tensor"}]})
    state = torch.get_rng_state()
    errors = output_errors(net, lambda: net(x))["0"]
    assert torch.equal(torch.get_rng_state(), state)
    low, y = net[0].quantized_weight().detach().double().numpy(), x[:4096].double().numpy()
    assert errors.alone.sqnr_db == errors.along.sqnr_db
    assert errors.alone.elements == MAX_ELEMENTS
    assert errors.alone.sqnr_db == pytest.approx(decibel(y @ weight.T, y @ low.T), abs=0.1)
