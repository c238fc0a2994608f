"""Linear layers of ExecuTorch programs whose inputs find a range for each token at run time."""

import pytest
import torch
from torch import nn

from lq_plugin import QuantPlan, Rule, calibrate, prepare
from lq_plugin.export import export_model
from lq_plugin.export.target import TARGETS
from tests.models import randomize

pytest.importorskip("executorch", reason="make test-targets installs it")
pytestmark = pytest.mark.filterwarnings("ignore")
TOKEN = "int8 per_token affine dynamic"


class Tokens(nn.Module):
    """A convolution with a fixed range, then linear layers over its positions: odd widths, no bias, a batch norm."""

    def __init__(self):
        super().__init__()
        self.patches, self.up = nn.Conv2d(3, 31, 4, 4), nn.Linear(31, 63)
        self.down, self.norm, self.head = nn.Linear(63, 48, bias=False), nn.BatchNorm1d(48), nn.Linear(48, 10)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = nn.functional.gelu(self.up(x)).mean(1)
        return self.head(self.norm(self.down(x)).relu())


def written(weight, path):
    """A model of one fixed range and three found at run time, its input and float results, and the size of its file."""
    torch.manual_seed(0)
    net, x = randomize(Tokens()), torch.randn(8, 3, 16, 16)
    with torch.no_grad():
        unrounded = net(x)
    rule = Rule("patches", input="uint8 affine", output="uint8 affine")
    prepare(
        net, QuantPlan([Rule("*", weight=weight, input="uint8 affine"), Rule("re:up|down|head", input=TOKEN), rule])
    )
    calibrate(net, [x])
    return net, x, unrounded, export_model(net, path, (x,), [x])


def test_what_was_trained_is_computed_with_integers(tmp_path):
    """The results are float, much nearer to the model's than those to the float ones; 4 bits are half a byte."""
    path, sizes = tmp_path / "net.pte", []
    for weight in ("int8 per_channel narrow", "int4 per_channel"):
        net, x, unrounded, size = written(weight, path)
        target = TARGETS["executorch"]
        with torch.no_grad():
            away = (target.open(path, None, None).run(x)[0] - net(x)).abs().amax(1)
            rounding = (net(x) - unrounded).abs().amax(1)
        # A sum that the convolution rounds to the next level is seen in its sample.
        assert away.median() < 0.05 * rounding.median()
        assert away.max() < 0.5 * rounding.max()
        products = target.products(path, None)
        assert products.integer == {"XNNConv2d": 1, "XNNFullyConnected": 3}
        assert not products.floating
        sizes.append(size)
    weights = 31 * 63 + 63 * 48 + 48 * 10
    # A batch norm makes 8 of some -8 in `down`, which keeps its bytes.
    assert 0.4 * (weights - 63 * 48) < sizes[0] - sizes[1] < 0.6 * weights


def test_a_batch_norm_that_makes_8_of_minus_8(tmp_path):
    """Its weight takes a byte each then, and is right."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8)).eval(), torch.randn(8, 16)
    nn.init.constant_(net[1].weight, -1.0)
    prepare(net, QuantPlan([Rule("0", weight="int4 minmax", input=TOKEN)]))
    calibrate(net, [x])
    with torch.no_grad():
        net[0].weight[0, 0] = -8 * net[0].weight_quantizer.scale
    path = tmp_path / "net.pte"
    export_model(net, path, (x,), [x])
    with torch.no_grad():
        assert torch.allclose(TARGETS["executorch"].open(path, None, None).run(x)[0], net(x), atol=1e-5)


def test_scales_and_zero_points_are_those_of_the_model_for_tokens_of_any_size(tmp_path):
    """XNNPACK multiplies by the reciprocal of the scale, the model divides: of 128,000 levels 3 at most differ."""
    net, x = nn.Sequential(nn.Linear(64, 64, bias=False)).eval(), torch.randn(2000, 64)
    nn.init.eye_(net[0].weight)
    for row, factor in enumerate((0.0, 1e-12, 1e-36, 1e30)):
        x[row] *= factor
    x[4], x[5] = x[4].abs() + 5, -x[5].abs() - 5
    prepare(net, QuantPlan([Rule("*", weight="int8 per_channel narrow", input=TOKEN)]))
    calibrate(net, [x])
    export_model(net, tmp_path / "net.pte", (x,), [x], batch=0)
    (found,) = TARGETS["executorch"].open(tmp_path / "net.pte", None, None).run(x)
    rows = x.double()
    low, high = rows.amin(1, keepdim=True).clamp(max=0), rows.amax(1, keepdim=True).clamp(min=0)
    scale = ((high - low) / 255).where(high > low, torch.ones(1).double())
    zero_point = (-128 - low / scale).round()
    levels = found / scale
    wanted = ((rows / scale).round() + zero_point).clamp(-128, 127) - zero_point
    away = (levels - wanted).abs()
    assert away.max() < 1.001
    assert (away > 1e-3).sum() <= 3
