"""`share_grids`: quantizers that read one tensor round it once, on one grid, as files of integer runtimes do."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lq_plugin import PTQ, QuantPlan, Rule, calibrate, prepare
from lq_plugin.demo.resnet import CifarResNet
from lq_plugin.model import record
from lq_plugin.ptq import run_phases
from lq_plugin.ptq.shared_grids import share_grids
from tests.models import randomize

X = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(0))
ACTIVATION = "uint8 affine mse"


class Readers(nn.Module):
    """One tensor, read by a convolution, padded by a sum, pooled by another convolution, and through a ReLU."""

    def __init__(self):
        super().__init__()
        self.first, self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 3, 1, 1), nn.Conv2d(4, 4, 1)
        self.c, self.pool = nn.Conv2d(4, 4, 1), nn.MaxPool2d(4)

    def forward(self, x):
        x = self.first(x)
        y = F.pad(x, (0, 0, 0, 0, 2, 2)) + self.a(x)
        return y, self.b(self.pool(x)), self.c(x.relu())


@pytest.mark.parametrize("prepared_first", [False, True])
def test_readers_of_one_tensor_have_the_range_of_the_first_that_reads_it_as_it_is(prepared_first):
    torch.manual_seed(0)
    net = Readers().eval()
    recording = record(net, lambda: net(X))
    plan = QuantPlan([Rule("*", weight="int8", input=ACTIVATION), Rule("add_0", input=ACTIVATION)])
    prepare(net, plan, recording)
    calibrate(net, [X])
    before = {name: float(getattr(net, name).input_quantizer.scale) for name in "abc"}
    first, second = net.quantized_operations.add_0.quantizers()
    assert float(first.scale) != before["a"] != before["b"]
    # A pass of the prepared model shows the quantizers of operations also.
    found = share_grids(net, record(net, lambda: net(X)) if prepared_first else recording)
    assert found.changed == {"b.input": "a.input", "add_0.input_0": "a.input"}
    assert float(net.a.input_quantizer.scale) == before["a"]
    assert float(net.c.input_quantizer.scale) == before["c"]
    for quantizer in (net.b.input_quantizer, first):
        assert torch.equal(quantizer.scale, net.a.input_quantizer.scale)
        assert torch.equal(quantizer.zero_point, net.a.input_quantizer.zero_point)
    assert float(second.scale) not in before.values()
    assert not share_grids(net, recording).changed


def test_quantizers_of_other_levels_keep_their_range():
    torch.manual_seed(0)
    net = Readers().eval()
    plan = QuantPlan(
        [Rule("a", input="uint8 affine mse"), Rule("b", input="uint8 affine per_channel mse"),
         Rule("add_0", input="int8 mse")]
    )  # fmt: skip
    context = run_phases(net, plan, [X], ["calibrate", "share_grids"])
    assert not context.results["share_grids"].changed


def test_padded_shortcuts_of_a_residual_network():
    torch.manual_seed(0)
    net = randomize(CifarResNet(8, 8)).eval()
    plan = QuantPlan([Rule("*", weight="int8", input=ACTIVATION), Rule("layer*.add_0", input=ACTIVATION)])
    found = run_phases(net, plan, [X], ["calibrate", "share_grids", "round_biases"]).results["share_grids"]
    assert found.changed == {
        f"layer{stage}.0.add_0.input_1": f"layer{stage}.0.conv1.input" for stage in (2, 3)
    }  # fmt: skip


def test_ptq_for_a_target_with_one_grid_a_tensor_does_it():
    for name in ("executorch", "litert"):
        assert PTQ("w8a8", target=name).phases == ("fold_batch_norm", "calibrate", "share_grids", "round_biases")
        given = ["calibrate", "round_biases"]
        assert PTQ("w8a8", phases=given, target=name).phases == ("calibrate", "share_grids", "round_biases")
    assert "share_grids" not in PTQ("w8a8", target="onnx").phases
