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


class Three(nn.Module):
    """One tensor, read by three convolutions as `read` says."""

    def __init__(self, read):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.a, self.b, self.c = (nn.Conv2d(n, 4, 1) for n in (3, 4, 4, 4))
        self.read = read

    def forward(self, x):
        return self.read(self, self.first(x))


def shared(read, *rules):
    net = Three(read).eval()
    plan = QuantPlan([Rule("*", weight="int8", input="uint8 affine"), *rules])
    return run_phases(net, plan, [X], ["calibrate", "share_grids"]).results["share_grids"].changed


def test_readers_that_all_see_it_moved_keep_their_range():
    pooled, padded = (lambda x: F.max_pool2d(x, 4)), (lambda x: F.pad(x, (1, 1, 1, 1)))
    assert shared(lambda net, x: (net.a(pooled(x)), net.b(padded(x)), net.c(x.relu()))) == {}
    assert shared(lambda net, x: (net.a(pooled(x)), net.b(padded(x)), net.c(x))) == {"a.input": "c.input"}


@pytest.mark.parametrize(
    ("options", "found"),
    [({"value": 10.0}, {}), ({"mode": "constant", "value": 0}, {"c.input": "a.input"}), ({}, {"c.input": "a.input"})],
)
def test_a_tensor_padded_with_another_number_than_zero_is_another_one(options, found):
    def read(net, x):
        return net.a(x), net.b(x), net.c(F.max_pool2d(F.pad(x, (1, 1, 1, 1), **options), 9))

    assert shared(read) == found


@pytest.mark.parametrize("spec", ["uint4 affine", "int8 dynamic"])
def test_two_alike_share_after_a_first_one_that_is_not(spec):
    def read(net, x):
        return net.a(x), net.b(x), net.c(F.max_pool2d(x, 4))

    assert shared(read, Rule("a", input=spec)) == {"c.input": "b.input"}


class Inputs(nn.Module):
    """A tensor that a linear layer reads, and another layer that reads it with a second one or keeps a state."""

    def __init__(self, layer, second):
        super().__init__()
        torch.manual_seed(0)
        self.p, self.l, self.layer, self.second = nn.Linear(4, 4), nn.Linear(4, 4), layer, second

    def forward(self, x):
        h = self.p(x)
        return self.l(h), self.layer(h, 100 * x) if self.second else self.layer(h)


@pytest.mark.parametrize(("make", "second"), [(lambda: nn.Bilinear(4, 4, 2), True), (lambda: nn.LSTM(4, 4), False)])
def test_a_quantizer_that_reads_more_than_the_tensor_keeps_its_range(make, second):
    net = Inputs(make(), second).eval()
    found = run_phases(net, "w8a8", [torch.randn(64, 4)], ["calibrate", "share_grids"]).results["share_grids"]
    assert not found.changed
