"""Rows of examples/runtimes.md about ExecuTorch and LiteRT: what they do without us; these fail when that changes."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from lq_plugin import QuantPlan, Rule, calibrate, prepare
from lq_plugin.errors import ExportError
from lq_plugin.export import export_model, litert_file, verify
from lq_plugin.export.executorch_file import XNNPACK, lowered
from lq_plugin.export.integer_program import build
from lq_plugin.export.integer_program.build import integer_program
from lq_plugin.export.target import TARGETS
from lq_plugin.model import record
from tests.targets.models import X, quantized

pytest.importorskip("executorch", reason="make test-targets installs it")
pytest.importorskip("litert_torch", reason="make test-targets installs it")
pytestmark = pytest.mark.filterwarnings("ignore")


def test_neither_form_of_a_weight_is_read_by_both(monkeypatch, tmp_path):
    """ExecuTorch takes integer constants alone, LiteRT's converter floats that are quantized in the graph alone."""
    net = quantized("mlp", "int8 per_channel narrow")
    floats = integer_program(net, (X[:1],), [X], replace(XNNPACK, float_weights=True))
    with pytest.raises(ExportError, match="XNNPACK does not compute 3 weights as integers"):
        lowered(floats)
    monkeypatch.setattr(build, "_quantize_weights", lambda module: None)
    with pytest.raises(ExportError, match="uniform_dequantize' op operand #0 must be ranked tensor of per-tensor"):
        export_model(net, tmp_path / "net.tflite", (X,), [X])


@pytest.mark.parametrize("suffix", ["pte", "tflite"])
def test_a_bias_beyond_int32_is_lost_without_a_word(suffix, monkeypatch, tmp_path):
    """With weights of 1e-8 a bias of 3 comes out as 0; `settle_weight_scales` keeps it."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), torch.randn(16, 3, 8, 8)
    with torch.no_grad():
        net[0].weight[0] *= 1e-8
        net[0].bias[0] = 3.0
    prepare(net, QuantPlan([Rule("*", weight="int8 per_channel narrow", input="int8", output="uint8 affine")]))
    calibrate(net, [x])
    path = tmp_path / f"net.{suffix}"
    run = next(target for target in TARGETS.values() if target.suffix == path.suffix).open
    export_model(net, path, (x,), [x])
    assert verify(net, path, [x]).largest_difference < 0.01
    monkeypatch.setattr(build, "settle_weight_scales", lambda module: None)
    export_model(net, path, (x,), [x])
    assert not run(path, None, None).run(x)[0][:, 0].any()


def test_buffers_that_nothing_reads_are_written(monkeypatch, tmp_path):
    """The weights from before batch norms were folded are in ExecuTorch's file, where nobody removes them."""
    net = quantized("mobilenet", "int8 per_channel narrow")
    small = export_model(net, tmp_path / "net.pte", (X,), [X])
    monkeypatch.setattr(build, "_drop_unread", lambda module: None)
    assert export_model(net, tmp_path / "net.pte", (X,), [X]) > 1.2 * small


class _TwoGrids(nn.Module):
    """A tensor that a convolution reads, and, moved by a pixel, a sum."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = self.a(x).relu()
        return self.c(self.b(x) + nn.functional.pad(x[:, :, :, 1:], (0, 1)))


def test_of_two_roundings_in_a_row_the_second_is_lost(monkeypatch, tmp_path):
    """litert-torch's converter leaves one, and asks in its log; a product with 1 between keeps both."""
    torch.manual_seed(0)
    net, path, x = _TwoGrids().eval(), tmp_path / "net.tflite", torch.randn(16, 3, 8, 8)
    rules = [Rule("*", weight="int8 narrow", input="uint8 affine"), Rule("add_0", input="uint8 affine")]
    prepare(net, QuantPlan([*rules, Rule("c", output="uint8 affine")]), record(net, lambda: net(x)))
    calibrate(net, [x])
    net.quantized_operations.add_0.quantizers()[1].scale.mul_(5)
    differing = []
    for form in (litert_file.TFLITE, replace(litert_file.TFLITE, loses_roundings=False)):
        monkeypatch.setattr(litert_file, "TFLITE", form)
        export_model(net, path, (x,), [x])
        (found,) = TARGETS["litert"].open(path, None, None).run(x)
        with torch.no_grad():
            differing.append(float((found - net(x)).abs().gt(1.5 * net.c.output_quantizer.scale).float().mean()))
    assert differing[0] < 0.01
    assert differing[1] > 0.02


@pytest.mark.parametrize("suffix", ["pte", "tflite"])
def test_few_levels_make_wide_steps_of_biases(suffix, monkeypatch, tmp_path):
    """Binary weights: rounding the bias to their steps moves a quarter of the outputs; 64 times the integers do not."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)).eval()
    x, path, differing = torch.randn(64, 3, 8, 8), tmp_path / f"net.{suffix}", []
    prepare(net, QuantPlan([Rule("*", weight="bwn", input="int8"), Rule("3", output="int8")]))
    calibrate(net, [x])
    for settle in (build.settle_weight_scales, lambda module: None):
        monkeypatch.setattr(build, "settle_weight_scales", settle)
        export_model(net, path, (x,), [x])
        (found,) = next(t for t in TARGETS.values() if t.suffix == path.suffix).open(path, None, None).run(x)
        with torch.no_grad():
            differing.append(float((found - net(x)).abs().gt(0.5 * net[3].output_quantizer.scale).float().mean()))
    assert differing[0] < 0.06
    assert differing[1] > 0.2
