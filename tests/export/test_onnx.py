"""ONNX files run by ONNX Runtime, beside the fake-quantized model."""

import numpy as np
import pytest
import torch
from torch import nn

from lq_plugin import QuantPlan, Rule, calibrate, prepare
from lq_plugin.errors import ExportError
from tests.models import randomize, resnet20

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from lq_plugin.export import export_onnx, onnx_session  # noqa: E402

WEIGHTS = [
    "int8 per_channel", "int8 affine mse", "int4 per_channel mse", "uint4 affine per_channel mse", "int3 group16 mse "
    "ragged",
    "int4 group16:4 ragged", "mx9", "mx4", "mxint8", "mxfp4:rceil", "mxfp8", "mxfp8_e5m2", "mxfp6_e3m2", "mxfp6_e2m3",
    "nvfp4", "fp8", "fp8:e5m2 per_channel percentile:99", "fp8 group16 ragged", "fp8 block16", "sign", "bwn",
    "twn per_channel", "seq per_channel mse", "seq:ternary group16 ragged lsq", "q4_0", "tq1_0",
    "ttq", "kmeans3", "int12 per_channel",
]  # fmt: skip

#: An export takes seconds; the others are run by `make test-all`.
QUICK = ("int4 per_channel mse", "int4 group16:4 ragged", "mxfp4:rceil", "twn per_channel", "kmeans3")


class Everything(nn.Module):
    """One layer of each kind that has a node of its own in ONNX."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(20, 36, 3, bias=False)
        self.depthwise = nn.Conv2d(36, 36, 3, padding=1, groups=36)
        self.up = nn.ConvTranspose2d(36, 20, 2, stride=2)
        self.fc = nn.Linear(20, 18)
        self.sequence = nn.Linear(18, 7, bias=False)
        self.embedding = nn.Embedding(11, 18)

    def forward(self, x, tokens):
        x = torch.relu(self.conv(x))
        x = self.up(x + self.depthwise(x)).mean((2, 3))
        return self.sequence(torch.stack([self.fc(x), self.embedding(tokens)], 1))


def run(path, *inputs):
    session = onnx_session(path, threads=1)
    (y,) = session.run(None, {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs, strict=True)})
    return torch.from_numpy(y)


@pytest.mark.parametrize(
    "spec", [spec if spec in QUICK else pytest.param(spec, marks=pytest.mark.slow) for spec in WEIGHTS]
)
def test_weights_of_every_format(spec, tmp_path):
    """Without quantized activations nothing is rounded differently: the runtime's numbers are ours."""
    torch.manual_seed(0)
    net, x, tokens = Everything(), torch.randn(3, 20, 6, 6), torch.tensor([1, 5, 10])
    rules = [Rule("*", weight=spec)]
    if "group16" in spec:
        rules.append(Rule("depthwise", weight="int8 per_channel"))
    prepare(net, QuantPlan(rules))
    calibrate(net, [(x, tokens)], run=lambda batch: net(*batch))
    export_onnx(net.eval(), (x, tokens), tmp_path / "net.onnx")
    y = net(x, tokens).detach()
    torch.testing.assert_close(run(tmp_path / "net.onnx", x, tokens), y, rtol=1e-4, atol=1e-5 * float(y.abs().max()))
    more = torch.randn(5, 20, 6, 6), torch.randint(0, 11, (5,))  # another batch size
    assert run(tmp_path / "net.onnx", *more).shape == (5, 2, 7)
    content = onnx.load(tmp_path / "net.onnx")
    floats = [
        t.name
        for t in content.graph.initializer
        if t.data_type == onnx.TensorProto.FLOAT and t.name.endswith(".weight")
    ]
    assert not floats, "a float weight stayed in the file"


@pytest.mark.parametrize("activation", ["uint8 affine mse", "int8 mse", "uint4 affine mse", "int6 mse"])
def test_activations(activation, tmp_path):
    torch.manual_seed(0)
    net, x = randomize(resnet20(8)), torch.randn(4, 3, 32, 32)
    prepare(net, QuantPlan([Rule("*", weight="int8 per_channel mse", input=activation)]))
    calibrate(net, [x])
    export_onnx(net, (x,), tmp_path / "net.onnx")
    y, mine = run(tmp_path / "net.onnx", x), net(x).detach()
    # Values that lie half way between two levels may go either way, so a few steps of the last layer.
    assert (y - mine).abs().max() < (0.1 if "uint4" in activation else 0.05) * mine.abs().max()
    assert torch.equal(y.argmax(1), mine.argmax(1))
    tensors = onnx.load(tmp_path / "net.onnx").graph.initializer
    kinds = {t.data_type for t in tensors if t.name.endswith("zero_point") and "weight" not in t.name}
    # Of int8 activations some runtimes have no kernels: signed levels are moved up.
    assert kinds == {onnx.TensorProto.UINT8}


def test_per_channel_activations(tmp_path):
    torch.manual_seed(0)
    net, x = (
        nn.Sequential(nn.Conv2d(4, 3, 1), nn.Flatten()),
        torch.randn(2, 4, 3, 3) * torch.tensor([1, 5, 20, 100.0]).view(1, 4, 1, 1),
    )
    prepare(net, "int8 per_channel / uint8 affine per_channel")
    calibrate(net, [x])
    export_onnx(net, (x,), tmp_path / "net.onnx")
    torch.testing.assert_close(run(tmp_path / "net.onnx", x), net(x).detach(), rtol=1e-3, atol=0.3)


@pytest.mark.parametrize("weight", ["int4 per_channel mse", "uint4 affine per_channel mse", "int4 narrow per_channel"])
def test_batch_norm_moves_into_scales_and_bias(weight, tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
    )
    randomize(net)
    with torch.no_grad():
        for norm in (net[1], net[4]):
            norm.weight.abs_()
        net[4].weight[0].neg_()
        net[4].weight[1].zero_()
    x = torch.randn(2, 3, 8, 8)
    prepare(net, weight)
    calibrate(net, [x])
    export_onnx(net, (x,), tmp_path / "net.onnx")
    content = onnx.load(tmp_path / "net.onnx")
    kept = [node.op_type for node in content.graph.node].count("BatchNormalization")
    assert kept == ("affine" in weight)  # a factor of 0 has no exact form beside zero points
    if "narrow" in weight:
        scales = [onnx.numpy_helper.to_array(t) for t in content.graph.initializer if t.name.endswith("weight_scale")]
        assert all((scale > 0).all() for scale in scales), "levels that have all their negatives change sign instead"
    torch.testing.assert_close(run(tmp_path / "net.onnx", x), net(x).detach(), rtol=1e-4, atol=1e-5)


def test_files_are_small(tmp_path):
    net, x = nn.Sequential(nn.Linear(1024, 1024, bias=False)), torch.randn(2, 1024)
    sizes = {}
    for spec in ("int8 per_channel", "int4 per_channel"):
        model = nn.Sequential(nn.Linear(1024, 1024, bias=False))
        prepare(model, QuantPlan([Rule("*", weight=spec)]))
        calibrate(model, [x])
        sizes[spec] = export_onnx(model, (x,), tmp_path / "net.onnx")
    assert sizes["int8 per_channel"] < 1.01 * (2**20 + 4 * 1024)
    assert sizes["int4 per_channel"] < 1.02 * (2**19 + 4 * 1024)
    assert sum(p.numel() for p in net.parameters()) == 2**20


def test_the_weights_in_the_file_are_the_levels(tmp_path):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 4)), torch.randn(2, 6)
    prepare(net, "int8 per_channel")
    calibrate(net, [x])
    export_onnx(net, (x,), tmp_path / "net.onnx")
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "net.onnx").graph.initializer}
    w = net[0].weight.detach().numpy()
    scale = np.abs(w).max(1, keepdims=True) / 127
    levels = np.clip(np.round(w / scale), -128, 127)
    codes = tensors["0.weight_codes"].T  # stored as [C_in, C_out], which runtimes have kernels for
    assert np.abs(codes - levels).max() <= 1  # minmax reaches -128 with a finer scale
    np.testing.assert_allclose(
        codes * tensors["0.weight_scale"][:, None], net[0].quantized_weight().detach(), rtol=1e-6
    )


def test_what_onnx_cannot_say_is_refused_all_at_once(tmp_path):
    net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    plan = [
        Rule("0", weight="kmeans3 per_channel"),
        Rule("1", weight="int4", input="mx6"),
        Rule("2", weight="ttq per_channel", output="uint8 affine"),
    ]
    prepare(net, QuantPlan(plan))
    calibrate(net, [torch.randn(2, 16)])
    with pytest.raises(
        ExportError, match=r"0\.weight \(kmeans3 per_channel\)(.|\n)*1\.input \(mx6\)(.|\n)*2\.weight(.|\n)*2\.output"
    ):
        export_onnx(net, (torch.randn(2, 16),), tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ExportError, match="is not quantized"):
        export_onnx(nn.Linear(2, 2), (torch.randn(2, 2),), tmp_path / "net.onnx")


@pytest.mark.parametrize("first", ["uint8 affine", "float"])
def test_inputs_are_those_of_the_stage_in_force(first, tmp_path):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(64, 8)
    rules = [Rule("*", weight="int8 per_channel", input=first), Rule("*", input="uint2 affine", start="step 5")]
    prepare(net, QuantPlan(rules))
    calibrate(net, [x])
    for layer in (net[0], net[2]):
        layer.input_quantizer.set_stage(epoch=0, step=0)
    if first == "float":
        with pytest.raises(ExportError, match=r"0\.input is float at this stage of its plan"):
            export_onnx(net.eval(), (x,), tmp_path / "net.onnx")
        return
    export_onnx(net.eval(), (x,), tmp_path / "net.onnx")
    # Half a step of 8 bits is a hundredth of one of 2 bits.
    torch.testing.assert_close(run(tmp_path / "net.onnx", x), net(x).detach(), rtol=0, atol=0.01)
