"""Targets `executorch` and `litert`: their runtimes compute what was trained, with integers alone.

`make test-targets` runs these in an environment that has the runtimes.
"""

import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lq_plugin import QuantPlan, Rule, calibrate, prepare
from lq_plugin.errors import ExportError
from lq_plugin.export import export_model, verify
from lq_plugin.export.target import TARGETS
from lq_plugin.model import record
from tests.models import randomize
from tests.targets.models import MODELS, X, compared, quantized

executorch = pytest.importorskip("executorch", reason="make test-targets installs it")
litert = pytest.importorskip("litert_torch", reason="make test-targets installs it")

pytestmark = pytest.mark.filterwarnings("ignore")  # of the two packages: each import of them gives some
SUFFIXES = ("pte", "tflite")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("weight", ["int8 per_channel narrow", "int4 per_channel"])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_within_one_step_and_every_product_is_of_integers(name, weight, suffix, tmp_path):
    net = quantized(name, weight)
    steps, products = compared(net, tmp_path / f"net.{suffix}")
    assert (steps <= 1.01).float().mean() >= 0.99
    layers = [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert not products.floating
    assert products.total == len(layers)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_plan_of_inputs_alone(suffix, tmp_path, caplog):
    """Tensors that the plan leaves float are rounded also, which a warning says; the answers stay."""
    net, path = quantized("mobilenet", "int8 per_channel narrow", rounds=False), tmp_path / f"net.{suffix}"
    with caplog.at_level(logging.WARNING):
        steps, products = compared(net, path)
    assert "results that the plan leaves float: blocks.0.conv.6" in caplog.text
    assert steps.max() < 4
    assert not products.floating
    assert verify(net, path, [X]).agreement > 0.95


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_batches_and_a_file_that_takes_several(suffix, tmp_path):
    net, path = quantized("mlp", "int4 per_channel"), tmp_path / f"net.{suffix}"
    export_model(net, path, (X,), [X], batch=4)
    target = TARGETS[{"pte": "executorch", "tflite": "litert"}[suffix]]
    reader = target.open(path, None, None)
    assert reader.inputs == 1
    run = reader.run
    assert run(X[:8])[0].shape == (8, 10)
    with pytest.raises(ExportError, match="takes 4 samples at a time"):
        run(X[:6])
    path.write_bytes(b"no such file, and not even as long as a header of one")
    with pytest.raises(ExportError, match=r"net\.\w+ is no (ExecuTorch program|TensorFlow Lite file)"):
        target.open(path, None, None)


class Mixed(nn.Module):
    """Two inputs, a float layer, a transposed convolution, a concatenation, pools, a gate and two outputs."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv1d(4, 4, 3), nn.Conv2d(8, 8, 3, padding=1)
        self.up, self.gate = nn.ConvTranspose2d(16, 4, 2, 2), nn.Linear(8, 8)
        self.left_float = nn.Conv2d(4, 2, 1)

    def forward(self, x, y):
        x = F.leaky_relu(self.a(x), 0.1)
        gate = torch.sigmoid(self.gate(x.mean((2, 3))))
        x = torch.cat([x, self.c(x) * gate[:, :, None, None]], 1)
        x = F.max_pool2d(F.avg_pool2d(x, 2), 2)
        return self.left_float(self.up(x)), self.b(y).relu()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_other_operations(suffix, tmp_path):
    torch.manual_seed(0)
    net, y = randomize(Mixed()), torch.randn(32, 4, 16)
    rule = Rule("*", weight="int8 per_channel narrow", input="uint8 affine")
    # litert_torch writes transposed convolutions in float, which the target says at plan time.
    others = ["left_float", "up"] if suffix == "tflite" else ["left_float"]
    rules = [Rule(name, weight="float", input="float") for name in others]
    prepare(net, QuantPlan([rule, *rules]), record(net, lambda: net(X, y)))
    calibrate(net, [(X, y)], lambda batch: net(*batch))
    path = tmp_path / f"net.{suffix}"
    export_model(net, path, (X, y), [(X, y)])
    result = verify(net, path, [(X, y)])
    assert result.largest_difference < 0.05
    products = next(t for t in TARGETS.values() if t.suffix == path.suffix).products(path, None)
    assert sum(products.integer.values()) == 6 - len(others)
    assert sum(products.floating.values()) == len(others)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("spec", ["twn", "bwn", "uint4 affine", "int7"])
def test_other_weights_that_are_exact(spec, suffix, tmp_path):
    """With few levels `settle_weight_scales` multiplies the stored integers, which gives biases finer steps."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)).eval()
    x = torch.randn(16, 3, 8, 8)
    prepare(net, QuantPlan([Rule("*", weight=spec, input="int8"), Rule("3", output="int8")]))
    calibrate(net, [x])
    path = tmp_path / f"net.{suffix}"
    export_model(net, path, (x,), [x])
    run = next(t for t in TARGETS.values() if t.suffix == path.suffix).open(path, None, None).run
    with torch.no_grad():
        steps = (run(x)[0] - net(x)) / net[3].output_quantizer.scale
    assert steps.abs().max() < 1.01
    assert (steps.abs() > 0.5).float().mean() < 0.05


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_biases_that_would_wrap_around(suffix, tmp_path):
    """A bias of 3 next to weights of 1e-12 is beyond int32 in their steps."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), torch.randn(16, 3, 8, 8)
    with torch.no_grad():
        net[0].weight[0] *= 1e-12
        net[0].bias[0] = 3.0
        net[0].weight[1] = 0.0
    prepare(net, QuantPlan([Rule("*", weight="int8 per_channel narrow", input="int8", output="uint8 affine")]))
    calibrate(net, [x])
    path = tmp_path / f"net.{suffix}"
    export_model(net, path, (x,), [x])
    assert verify(net, path, [x]).largest_difference < 0.01
