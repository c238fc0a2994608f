"""Equalization: the float function stays, neighbours share their spread, and every unsafe layer is refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lq_plugin import CalibrationError, QuantizationError, calibrate, prepare, remove
from lq_plugin.model.calibrate import float_forward
from lq_plugin.model.graph.record import Recording, record
from lq_plugin.ptq.batch_norm.fold import find_batch_norm_pairs, fold_batch_norm
from lq_plugin.ptq.equalization.equalize import EqualizationPair, equalize, find_equalization_pairs
from tests.models import Function, MobileNet, randomize, resnet20


@torch.no_grad()
def recorded(model: nn.Module, x: Tensor) -> Recording:
    return record(model.eval(), lambda: model(x))


def fold(model: nn.Module, x: Tensor) -> nn.Module:
    pairs, _ = find_batch_norm_pairs(model, recorded(model, x))
    fold_batch_norm(model, pairs)
    return model


def scaled(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every output channel of every layer times a factor between 1/30 and 30."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
                axis = 1 if "Transpose" in type(module).__name__ else 0
                size = module.weight.shape[axis]
                factor = torch.exp(torch.rand(size, generator=generator) * 6.8 - 3.4).to(module.weight)
                module.weight *= factor.reshape([-1 if dim == axis else 1 for dim in range(module.weight.dim())])
    return model


def makes(layer: nn.Module, channel: int) -> float:
    """Largest |weight| that makes an output channel, by loops over what torch's documentation says of the layout."""
    weight = layer.weight.detach().double().abs().numpy()
    if "Transpose" not in type(layer).__name__:
        return weight[channel].max()
    inputs, outputs = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    group, index = divmod(channel, outputs)
    return weight[group * inputs : (group + 1) * inputs, index].max()


def reads(layer: nn.Module, channel: int) -> float:
    """Largest |weight| that reads an input channel."""
    weight = layer.weight.detach().double().abs().numpy()
    if isinstance(layer, nn.Linear):
        return weight[:, channel].max()
    if "Transpose" in type(layer).__name__:
        return weight[channel].max()
    inputs, outputs = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    group, index = divmod(channel, inputs)
    return weight[group * outputs : (group + 1) * outputs, index].max()


CHAINS: dict[str, tuple[Callable[[], list[nn.Module]], tuple[int, ...], int]] = {
    "linear": (lambda: [nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)], (6, 5), 1),
    "linear sequence": (lambda: [nn.Linear(5, 7), nn.LeakyReLU(0.2), nn.Linear(7, 3)], (2, 4, 5), 1),
    "nothing between": (lambda: [nn.Linear(5, 7, bias=False), nn.Linear(7, 3)], (6, 5), 1),
    "identity, dropout": (lambda: [nn.Linear(5, 7), nn.Identity(), nn.Dropout(0.5), nn.Linear(7, 3)], (6, 5), 1),
    "prelu": (lambda: [nn.Conv2d(3, 6, 3), nn.PReLU(6, init=-0.3), nn.Conv2d(6, 4, 3)], (2, 3, 9, 9), 1),
    "padding": (
        lambda: [nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 3, padding=2, padding_mode="reflect")],
        (2, 3, 8, 8),
        1,
    ),
    "groups": (lambda: [nn.Conv2d(4, 6, 3, groups=2), nn.ReLU(), nn.Conv2d(6, 9, 3, groups=3)], (2, 4, 9, 9), 1),
    "depthwise": (
        lambda: [nn.Conv2d(4, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 5, 1)],
        (2, 4, 7, 7),
        2,
    ),
    "depth multiplier": (
        lambda: [nn.Conv2d(3, 6, 3, groups=3), nn.ReLU(), nn.Conv2d(6, 12, 3, groups=6)],
        (2, 3, 9, 9),
        1,
    ),
    "conv1d": (lambda: [nn.Conv1d(4, 6, 3), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(6, 4, 2)], (2, 4, 12), 1),
    "conv3d": (lambda: [nn.Conv3d(2, 4, 2), nn.ReLU(), nn.AvgPool3d(2), nn.Conv3d(4, 3, 1)], (2, 2, 5, 5, 5), 1),
    "transposed": (
        lambda: [nn.ConvTranspose2d(4, 6, 2), nn.ReLU(), nn.ConvTranspose2d(6, 3, 2), nn.Conv2d(3, 2, 1)],
        (2, 4, 5, 5),
        2,
    ),
    "transposed groups": (
        lambda: [
            nn.ConvTranspose1d(4, 6, 3, groups=2),
            nn.ReLU(),
            nn.ConvTranspose1d(6, 9, 2, groups=3),
            nn.Conv1d(9, 2, 1),
        ],
        (2, 4, 5),
        2,
    ),
    "unbatched": (lambda: [nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveMaxPool2d(2), nn.Conv2d(6, 4, 1)], (3, 9, 9), 1),
    "flatten": (
        lambda: [nn.Conv2d(3, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(54, 4)],
        (2, 3, 8, 8),
        1,
    ),
    "flatten, dropout": (
        lambda: [
            nn.Conv2d(3, 6, 3),
            nn.Flatten(),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(216, 8),
            nn.Linear(8, 3),
        ],
        (2, 3, 8, 8),
        2,
    ),
    "flatten in two steps": (
        lambda: [
            nn.Conv2d(3, 6, 3),
            nn.AdaptiveAvgPool2d((2, 3)),
            nn.Dropout(),
            nn.Flatten(),
            nn.Identity(),
            nn.Linear(36, 4),
        ],
        (2, 3, 8, 8),
        1,
    ),
    "batch norm": (
        lambda: [
            nn.Conv2d(3, 6, 3, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 8, 1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 2, 1),
        ],
        (4, 3, 8, 8),
        2,
    ),
    "batch norm 1d": (lambda: [nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3)], (6, 5), 1),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", CHAINS)
@torch.no_grad()
def test_the_function_stays_and_neighbours_share_their_spread(name: str, dtype: torch.dtype) -> None:
    build, shape, count = CHAINS[name]
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=dtype)
    model = scaled(fold(randomize(nn.Sequential(*build())).to(dtype), x))
    expected, before = model(x), copy.deepcopy(model)
    identities = [id(t) for t in (*model.parameters(), *model.buffers())]
    result = equalize(model, recorded(model, x), iterations=100)

    assert len(result.pairs) == count
    assert result.change <= 1e-4
    assert identities == [id(t) for t in (*model.parameters(), *model.buffers())]
    assert list(model.state_dict()) == list(before.state_dict())
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(model(x), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
    for pair in result.pairs:
        first, second = model.get_submodule(pair.producer), model.get_submodule(pair.consumer)
        channels = len(result.factors[pair.producer])
        mine = np.array([makes(first, c) for c in range(channels)])
        theirs = np.array(
            [max(reads(second, c * pair.repeat + k) for k in range(pair.repeat)) for c in range(channels)]
        )
        np.testing.assert_allclose(mine, theirs, rtol=1e-3)
        assert result.factors[pair.producer].max() > 2 * result.factors[pair.producer].min()
    if count == 1:
        (pair,) = result.pairs
        first, second = before.get_submodule(pair.producer), before.get_submodule(pair.consumer)
        one = np.array([makes(first, c) for c in range(channels)])
        two = np.array([max(reads(second, c * pair.repeat + k) for k in range(pair.repeat)) for c in range(channels)])
        np.testing.assert_allclose(result.factors[pair.producer].numpy(), np.sqrt(one * two) / two, rtol=1e-5)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "method": lambda x: x.relu(),
    "in place": lambda x: x.relu_(),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.1),
    "prelu": lambda x: F.dropout(F.rrelu(x), training=False),
    "subclass": type("MyReLU", (nn.ReLU,), {})(),
    "max_pool2d": lambda x: F.max_pool2d(torch.relu(x), 2),
    "avg_pool2d": lambda x: F.avg_pool2d(x, 2),
    "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, 3),
    "adaptive_max_pool2d": lambda x: F.adaptive_max_pool2d(x, 3),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@torch.no_grad()
def test_functions_between(name: str) -> None:
    torch.manual_seed(0)
    model = scaled(
        nn.Sequential(nn.Conv2d(3, 6, 3), Function(lambda _, x: FUNCTIONS[name](x)), nn.Conv2d(6, 4, 2))
    ).double()
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    expected = model(x)
    assert [(pair.producer, pair.consumer) for pair in equalize(model, recorded(model, x)).pairs] == [("0", "2")]
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12 * float(expected.abs().max()))


class Separable(nn.Module):
    """MobileNet's blocks with ReLU: depthwise and pointwise convolutions in turn, one ReLU module for all."""

    def __init__(self, widths: tuple[int, ...] = (8, 12, 16)) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.stem, self.stem_bn = nn.Conv2d(3, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0])
        layers: list[nn.Module] = []
        for a, b in pairwise(widths):
            layers += [nn.Conv2d(a, a, 3, padding=1, groups=a, bias=False), nn.BatchNorm2d(a), self.relu]
            layers += [nn.Conv2d(a, b, 1, bias=False), nn.BatchNorm2d(b), self.relu]
        self.body = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.relu(self.stem_bn(self.stem(x)))))


@torch.no_grad()
def test_the_error_of_one_scale_a_tensor_falls_strongly() -> None:
    torch.manual_seed(0)
    x = torch.randn(32, 3, 10, 10)
    model = fold(randomize(Separable()), x)
    target = model(x)
    # Channels with factors up to 30, which the next layer undoes: the function of a well-scaled model, in bad scales.
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    layers = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    for layer, norm, following in zip(layers, norms, layers[1:], strict=False):
        factor = torch.exp(torch.rand(norm.num_features) * 6.8 - 3.4)
        layer.weight *= factor.reshape(-1, 1, 1, 1)
        norm.bias *= factor
        depthwise = isinstance(following, nn.Conv2d) and following.groups > 1
        following.weight /= factor.reshape(
            -1 if depthwise else 1, 1 if depthwise else -1, *[1] * (following.weight.dim() - 2)
        )
    torch.testing.assert_close(model(x), target, rtol=1e-4, atol=1e-4)
    target = model(x)

    def error(plan: str) -> float:
        mine = copy.deepcopy(model)
        prepare(mine, plan)
        calibrate(mine, [x])
        return float((mine(x) - target).square().mean() / target.var())

    before = error("w8 per_tensor")
    result = equalize(model, recorded(model, x))
    torch.testing.assert_close(model(x), target, rtol=1e-5, atol=1e-5 * float(target.abs().max()))
    assert len(result.pairs) == 5
    assert [refused.name for refused in result.refused] == ["head.2"]
    after = error("w8 per_tensor")
    assert before > 0.1
    assert after < 1e-3


@torch.no_grad()
def test_real_architectures() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    model = fold(randomize(resnet20(8)).double(), x)
    expected = model(x)
    result = equalize(model, recorded(model, x))
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-12 * float(expected.abs().max()))
    # Inside each block; what goes into a sum is read twice or comes from two layers.
    assert [pair.producer for pair in result.pairs] == [f"layer{i}.{j}.conv1" for i in (1, 2, 3) for j in (0, 1, 2)]
    assert result.pairs[0].between == ("layer1.0.bn1", "layer1.0.relu_0")
    assert result.pairs[0].batch_norms == ("layer1.0.bn1",)
    assert len(result.refused) == 11

    mobile = MobileNet()
    pairs, refused = find_equalization_pairs(fold(randomize(mobile), x.float()), recorded(mobile, x.float()))
    assert sum("(ReLU6) after it is not known to pass channel scales on" in refusal.reason for refusal in refused) == 7
    # Convolutions without an activation behind: two go into the next block, and one of them into a sum as well.
    assert len(pairs) + len(refused) == 11


@torch.no_grad()
def test_dead_channels_keep_their_weights() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
    model[0].weight[1] = 0.0
    model[2].weight[:, 2] = 0.0
    before, x = copy.deepcopy(model), torch.randn(5, 4)
    result = equalize(model, recorded(model, x))
    assert result.factors["0"][1:].tolist() == [1.0, 1.0]
    assert result.factors["0"][0] != 1.0
    assert torch.equal(model[0].weight[1:], before[0].weight[1:])
    torch.testing.assert_close(model(x), before(x))


@torch.no_grad()
def test_a_prepared_model_is_equalized_until_it_has_ranges() -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 5)
    model = scaled(nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))).eval()
    plain = copy.deepcopy(model)
    equalize(plain, recorded(plain, x))
    prepare(model, "w8a8")
    with float_forward(model):
        recording = recorded(model, x)
    assert equalize(model, recording).pairs == (EqualizationPair("0", "2", ("1",)),)
    calibrate(model, [x])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        CalibrationError, match=r"4 quantizers have ranges already \(0.weight, 0.input, 2.weight.*before calibrating"
    ):
        equalize(model, recording)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    remove(model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


@torch.no_grad()
def test_faults_change_nothing() -> None:
    x = torch.randn(4, 3)
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2)).half().eval()
    recording = recorded(model.float(), x)
    model[0].weight[0], model[0].bias[0] = 1e-7, 6e4
    model[2].weight[:, 0] = 6e4
    model.half()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(QuantizationError, match=r"'0.bias': the new values are not finite in torch.float16"):
        equalize(model, recording)
    with pytest.raises(QuantizationError, match="iterations is an integer from 1, got 0"):
        equalize(model, recording, iterations=0)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
