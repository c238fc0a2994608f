"""`round_biases`: model and file of an integer runtime then compute the same, far into a network."""

import copy

import pytest
import torch
from lightning import Trainer
from torch import nn

from lq_plugin import PTQ, QuantPlan, Rule, calibrate, prepare
from lq_plugin.demo.resnet import CifarResNet
from lq_plugin.export import certify, export_model
from lq_plugin.model import record
from lq_plugin.ptq import run_phases
from lq_plugin.ptq.integer_biases import round_biases
from tests.callbacks.conftest import Data, Module
from tests.models import randomize

X = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(0))
ACTIVATION = "uint8 affine"


def steps_of(layer):
    """By hand: minmax on the full range of signed bytes, for each output channel."""
    w = layer.weight.detach().double().flatten(1)
    return torch.maximum(w.amax(1) / 127, -w.amin(1) / 128) * layer.input_quantizer.scale.double()


def test_a_bias_is_a_whole_number_of_steps_and_has_moved_by_half_a_step_at_most():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 14 * 14, 5)).eval()
    before = [net[0].bias.detach().clone(), net[3].bias.detach().clone()]
    context = run_phases(net, "w8a8", [X], ["calibrate", "round_biases"])
    assert context.results["round_biases"].changed == {"0": "0.bias", "3": "3.bias"}
    for layer, old in zip((net[0], net[3]), before, strict=True):
        counts = layer.bias.detach().double() / steps_of(layer)
        torch.testing.assert_close(counts, counts.round(), rtol=0, atol=1e-2)
        moved = (layer.bias.detach() - old).double().abs() / steps_of(layer)
        assert 0 < float(moved.max()) <= 0.51


def test_the_shift_of_a_batch_norm_takes_the_difference():
    """The file holds the folded bias, by hand β - μ g + b g with g = γ / sqrt(σ² + ε)."""
    torch.manual_seed(0)
    net = randomize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())).eval()
    mean, bias = net[1].running_mean.clone(), net[0].bias.detach().clone()
    prepare(net, "w8a8")
    calibrate(net, [X])
    assert round_biases(net, record(net, lambda: net(X))).changed == {"0": "1.bias"}
    assert torch.equal(net[1].running_mean, mean)
    assert torch.equal(net[0].bias, bias)
    gain = net[1].weight.double() / (net[1].running_var.double() + net[1].eps).sqrt()
    total = net[1].bias.double() - mean.double() * gain + bias.double() * gain
    counts = total / (steps_of(net[0]) * gain.abs())
    torch.testing.assert_close(counts, counts.round(), rtol=0, atol=1e-2)


def test_what_has_no_integer_sum_is_left_alone():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4, bias=False)).eval()
    plan = QuantPlan(
        [Rule("0", weight="int8"), Rule("1", weight="int4 group8", input=ACTIVATION),
         Rule("2", weight="int8", input=ACTIVATION), Rule("3", weight="int8", input=ACTIVATION)]
    )  # fmt: skip
    with torch.no_grad():
        net[2].weight.zero_()
    before = copy.deepcopy(net.state_dict())
    prepare(net, plan)
    x = torch.randn(8, 16)
    calibrate(net, [x])
    found = round_biases(net, record(net, lambda: net(x)))
    assert not found.changed
    assert found.skipped["0"] == "its weight or its input is float"
    assert "has no scale that a sum of integers shares" in found.skipped["1"]
    assert found.skipped["2"] == "no channel's bias fits into 32 bits"
    assert found.skipped["3"] == "it has no bias"
    assert all(torch.equal(net.state_dict()[key], value) for key, value in before.items())


@pytest.mark.slow
def test_a_file_reads_the_same_in_every_layer(tmp_path):
    """Without it single outputs round to the next level, and the differences grow from layer to layer."""
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    plan = QuantPlan(
        [Rule("*", weight="int8 per_channel", input=ACTIVATION), Rule("layer*.add_0", input=ACTIVATION)],
        target="onnx",
    )
    differing = {}
    for phases in (["fold_batch_norm", "calibrate"], ["fold_batch_norm", "calibrate", "round_biases"]):
        net = randomize(CifarResNet(20, 16)).eval()
        run_phases(net, plan, [X], phases)
        path = tmp_path / "net.onnx"
        export_model(net, path, (X,), target="onnx")
        found = certify(net, path, [X])
        differing[len(phases)] = sum(layer.differing for layer in found.layers)
    assert differing[3] < 0.2 * differing[2]


def test_ptq_for_a_target_with_int32_biases_does_it(tmp_path):
    assert PTQ("w8a8", target="onnx").phases == ("fold_batch_norm", "calibrate", "round_biases")
    assert PTQ("w8a8", phases=["calibrate", "round_biases"], target="onnx").phases == ("calibrate", "round_biases")
    assert "round_biases" not in PTQ("w8a8").phases
    assert "round_biases" not in PTQ("w8a8", target="tensorrt").phases
    ptq = PTQ("w8a8", target="onnx")
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    Trainer(accelerator="cpu", callbacks=[ptq], **quiet).validate(Module(), datamodule=Data(), verbose=False)
    assert ptq.results["round_biases"].changed == {
        "net.conv": "net.bn.bias", "net.conv2": "net.bn2.bias", "net.fc": "net.fc.bias"
    }  # fmt: skip
