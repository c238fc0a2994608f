from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lq_plugin import QuantPlan
from lq_plugin.demo.digits import DigitsCNN, DigitsDataModule
from lq_plugin.demo.resnet import CifarResNet
from lq_plugin.errors import PlanError
from lq_plugin.model.graph.record import record
from lq_plugin.model.survey import Survey
from lq_plugin.search import Evaluator, Space
from lq_plugin.search.space.residual import ResidualTies, residual_ties

from .conftest import CPU
from .test_evaluator import copy_of, same
from .test_study import run

SPACE = {
    "weight": ["int2 per_channel mse", "int4 per_channel mse", "int8 per_channel"],
    "input": "uint8 affine mse",
    "tie": "residual",
}


def ties_of(model: nn.Module, *shape: int) -> ResidualTies:
    with torch.no_grad():
        recording = record(model.eval(), lambda: model(torch.zeros(shape)))
    return residual_ties(recording, [info.name for info in Survey.of(model).infos()])


def test_a_resnet_with_padded_shortcuts_has_one_stream() -> None:
    # The shortcut between two stages is a slice with zeros around it: what comes out of stage 1 meets stage 2 in a sum.
    blocks = [f"layer{stage}.{block}.conv2" for stage in (1, 2, 3) for block in (0, 1, 2)]
    assert ties_of(CifarResNet(20, width=4), 1, 3, 32, 32) == ResidualTies(weight=(("conv1", *blocks),), input=())


def test_the_digits_model_has_one_sum() -> None:
    assert ties_of(DigitsCNN(width=4), 1, 1, 8, 8) == ResidualTies(weight=(("down.0", "block.conv2"),), input=())


class Block(nn.Module):
    """A block whose shortcut is a convolution where the shape changes."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        same = channels == out and stride == 1
        self.downsample = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        )
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += self.downsample(x)
        return self.relu(y)


class Net(nn.Module):
    """Network like ResNet-18: stem, pooling, two stages."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2)
        )
        self.stages = nn.Sequential(Block(4, 4, 1), Block(4, 4, 1), Block(4, 8, 2), Block(8, 8, 1))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.adaptive_avg_pool2d(self.stages(self.stem(x)), 1).flatten(1))


def test_a_convolution_in_the_shortcut_begins_a_new_stream() -> None:
    assert ties_of(Net(), 1, 3, 16, 16) == ResidualTies(
        weight=(
            ("stem.0", "stages.0.conv2", "stages.1.conv2"),
            ("stages.2.conv2", "stages.2.downsample.0", "stages.3.conv2"),
        ),
        input=(("stages.2.conv1", "stages.2.downsample.0"),),
    )


class PreNorm(nn.Module):
    """A transformer block whose norm stands in front of three projections."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 4)
        self.norm1, self.norm2 = nn.LayerNorm(4), nn.LayerNorm(4)
        self.q, self.k, self.v, self.out = (nn.Linear(4, 4) for _ in range(4))
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.scale
        x = x + self.scale * self.down(F.gelu(self.up(self.norm1(x))))
        y = self.norm2(x)
        attention = F.softmax(self.q(y) @ self.k(y).transpose(-1, -2), -1)
        return x + self.out(attention @ self.v(y))


def test_projections_that_read_the_same_sum_share_their_input() -> None:
    # The first addition is of a parameter, which meets nothing.
    ties = ties_of(PreNorm(), 2, 3, 4)
    assert ties.input == (("q", "k", "v"),)
    assert ties.weight == (("embed", "out", "down"),)


def plain(**layers: nn.Module) -> Callable[[Callable[[nn.ModuleDict, Tensor], Tensor]], ResidualTies]:
    def ties(forward: Callable[[nn.ModuleDict, Tensor], Tensor]) -> ResidualTies:
        model = nn.ModuleDict(layers)
        with torch.no_grad():
            recording = record(model.eval(), lambda: forward(model, torch.ones(2, 4)))
        return residual_ties(recording, list(layers))

    return ties


def test_what_is_no_sum_of_streams_ties_nothing() -> None:
    ties = plain(a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 4))
    assert ties(lambda m, x: m["a"](x) * m["b"](x) - m["c"](x)) == ResidualTies((), ())
    assert ties(lambda m, x: m["a"](x) + x) == ResidualTies((), ())
    # A softmax makes other values of what it gets.
    assert ties(lambda m, x: F.softmax(m["a"](x), -1) + m["b"](x)) == ResidualTies((), ())
    assert ties(lambda m, x: F.relu(m["a"](x)).view(2, 4) + m["b"](x)) == ResidualTies((("a", "b"),), ())
    assert ties(lambda m, x: torch.cat([m["a"](x), m["b"](x)])) == ResidualTies((), ())


def test_a_space_has_one_parameter_for_what_is_tied(model: DigitsCNN, datamodule: DigitsDataModule) -> None:
    fresh = copy_of(model)
    with Evaluator(model, datamodule, trainer=CPU, calibration_batches=1) as evaluator:
        space = evaluator.calibrate(SPACE)
        names = {
            "stem.0.weight.bits",
            "residual:down.0.weight.bits",
            "block.conv1.weight.bits",
            "mix.0.weight.bits",
            "head.2.weight.bits",
        }
        assert {name.replace(".bits", "") for name in space.distributions} == {
            name.replace(".bits", "") for name in names
        }
        assert "down.0.weight = block.conv2.weight" in space.describe()
        params = space.uniform(4)
        plans = space.layer_plans(params)
        assert plans["down.0"].weight == plans["block.conv2"].weight
        assert space.params(space.plan(params)) == params
        untied = QuantPlan.parse(
            {"rules": [*space.plan(params).to_dict()["rules"], {"match": "down.0", "weight": "int8 per_channel"}]}
        )
        with pytest.raises(
            PlanError, match=r"residual:down\.0\.weight ties down\.0, block\.conv2, the plan gives them"
        ):
            space.params(untied)
    assert same(model.state_dict(), fresh.state_dict())


def test_a_search_with_ties(model: DigitsCNN) -> None:
    for candidate in run(model, 5, space=SPACE).candidates:
        by_layer = {rule.match: rule.weight for rule in candidate.plan.rules}
        assert by_layer["down.0"] == by_layer["block.conv2"]


def test_faults_name_what_is_wrong() -> None:
    layers = Survey.of(DigitsCNN(width=4)).infos()
    with pytest.raises(PlanError, match="tie 'residual' needs a recording"):
        Space.parse(SPACE).bind(layers)
    model = DigitsCNN(width=4).eval()
    with torch.no_grad():
        recording = record(model, lambda: model(torch.zeros(1, 1, 8, 8)))
    both = Space.parse({**SPACE, "tie": ["residual", "block.*"]})
    with pytest.raises(PlanError, match=r"block\.conv2\.weight is tied by the pattern 'block\.\*' and by 'residual'"):
        both.bind(layers, None, recording)
    apart = Space.parse({**SPACE, "tie": ["residual", "head.*"]}).bind(layers, None, recording)
    assert {unit.name for unit in apart.units if len(unit.layers) > 1} == {"residual:down.0.weight"}
    flat = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        straight = record(flat, lambda: flat(torch.zeros(1, 4)))
    with pytest.raises(PlanError, match="tie 'residual': the model has no sum"):
        Space.parse(SPACE).bind(Survey.of(flat).infos(), None, straight)
