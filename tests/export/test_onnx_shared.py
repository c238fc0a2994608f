"""Layers that are called several times, and weights that several layers share, in ONNX files."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lq_plugin import QuantPlan, Rule, calibrate, prepare
from lq_plugin.errors import ExportError
from tests.models import randomize

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from lq_plugin.export import OpenVINOSession, export_onnx, onnx_session  # noqa: E402


class Twice(nn.Module):
    """A linear layer and a convolution that are called twice, once with a batch norm behind it."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(4, 4)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x)))
        x = torch.relu(self.conv(x)).mean((2, 3))
        return self.fc(torch.relu(self.fc(x)))


class TwiceInSequence(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8, bias=False)

    def forward(self, x):
        return self.fc(torch.relu(self.fc(x)))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.middle, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(torch.relu(self.middle(self.embedding(tokens))))


class TiedHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def exported(net, x, rules, path):
    torch.manual_seed(0)
    randomize(net)
    prepare(net, QuantPlan(rules))
    calibrate(net, [x])
    export_onnx(net.eval(), (x,), path, input_names=["x"])
    return net(x).detach()


def assert_runs_alike(path, x, want, tolerance):
    for session in (onnx_session(path), OpenVINOSession(path)):
        got = torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
        assert (got - want).abs().max() <= tolerance * want.abs().max()


@pytest.mark.parametrize("inputs", [None, "uint8 affine"])
@pytest.mark.parametrize("make", [Twice, TwiceInSequence])
def test_a_layer_called_twice(make, inputs, tmp_path):
    x = torch.randn(3, 4, 6, 6) if make is Twice else torch.randn(3, 5, 8)
    want = exported(make(), x, [Rule("*", weight="int4 per_channel", input=inputs)], tmp_path / "net.onnx")
    assert_runs_alike(tmp_path / "net.onnx", x, want, 1e-5 if inputs is None else 0.03)
    names = [
        tensor.name
        for tensor in onnx.load(tmp_path / "net.onnx").graph.initializer
        if tensor.name.endswith("fc.weight_codes")
    ]
    assert names == ["fc.weight_codes"]


@pytest.mark.parametrize(
    "rules",
    [
        [Rule("*", weight="int4 per_channel")],
        [Rule("embedding", weight="int8 per_channel"), Rule("head", weight="int4 per_channel")],
        [Rule("head", weight="int4 per_channel", input="uint8 affine")],
        [Rule("embedding", weight="int4 per_channel"), Rule("middle", weight="int8")],
    ],
    ids=str,
)
def test_an_embedding_tied_to_a_head(rules, tmp_path):
    tokens = torch.randint(0, 20, (3, 5))
    want = exported(Tied(), tokens, rules, tmp_path / "net.onnx")
    assert_runs_alike(tmp_path / "net.onnx", tokens, want, 1e-5 if not any(rule.input for rule in rules) else 0.03)


@pytest.mark.parametrize("inputs", [None, "uint8 affine"])
def test_tied_layers_that_compute_alike(inputs, tmp_path):
    """The graph says in which module a node is computed: each layer has its own bits and its own ranges."""
    x = torch.randn(3, 8)
    rules = [
        Rule("first", weight="int4 per_channel", input=inputs),
        Rule("second", weight="int8 per_channel", input=inputs),
    ]
    want = exported(TiedHeads(), x, rules, tmp_path / "net.onnx")
    assert_runs_alike(tmp_path / "net.onnx", x, want, 1e-5 if inputs is None else 0.03)


@pytest.mark.parametrize(("second", "kept"), [("int4 per_channel", 1), ("int3 per_channel", 2)])
def test_the_weight_of_tied_layers_is_in_the_file_once(second, kept, tmp_path):
    x = torch.randn(3, 8)
    rules = [Rule("first", weight="int4 per_channel"), Rule("second", weight=second)]
    want = exported(TiedHeads(), x, rules, tmp_path / "net.onnx")
    assert_runs_alike(tmp_path / "net.onnx", x, want, 1e-5)
    names = [tensor.name for tensor in onnx.load(tmp_path / "net.onnx").graph.initializer]
    assert sum(name.endswith("weight_codes") for name in names) == kept


class ReadPast(nn.Module):
    """An embedding whose weight the model reads as a head, and a layer that only lends its weight, as in Mamba."""

    def __init__(self):
        super().__init__()
        self.embedding, self.lent = nn.Embedding(20, 8), nn.Linear(8, 8)

    def forward(self, tokens):
        x = F.linear(self.embedding(tokens), self.lent.weight)
        return F.linear(torch.relu(x), self.embedding.weight)


def test_what_reads_a_weight_past_its_layer_stays_float_as_in_the_model(tmp_path, caplog):
    tokens = torch.randint(0, 20, (3, 5))
    want = exported(ReadPast(), tokens, [Rule("*", weight="int4 per_channel")], tmp_path / "net.onnx")
    assert_runs_alike(tmp_path / "net.onnx", tokens, want, 1e-5)
    assert "lent does not run on the example inputs" in caplog.text


class Positions(nn.Embedding):
    """A table of which a forward of its own takes the first rows, as in Whisper."""

    def forward(self, x):
        return x + self.weight[: x.shape[1]]


class Standardized(nn.Linear):
    """Computes with something else than its weight."""

    def forward(self, x):
        return F.linear(x, self.weight - self.weight.mean(1, keepdim=True), self.bias)


def test_layers_with_a_forward_of_their_own(tmp_path):
    net, x = nn.Sequential(nn.Linear(8, 8), Positions(9, 8), Standardized(8, 8)), torch.randn(3, 5, 8)
    want = exported(net, x, [Rule("*", weight="int4 per_channel")], tmp_path / "net.onnx")
    assert_runs_alike(tmp_path / "net.onnx", x, want, 1e-5)
    kept = {tensor.name for tensor in onnx.load(tmp_path / "net.onnx").graph.initializer}
    assert not kept & {"0.weight", "1.weight", "2.weight"}
    with pytest.raises(ExportError, match="1: the forward of Standardized has no one node that reads its input"):
        exported(
            nn.Sequential(nn.Linear(8, 8), Standardized(8, 8)),
            x,
            [Rule("*", weight="int4", input="uint8")],
            tmp_path / "other.onnx",
        )


class Product(nn.Module):
    """A parameter of its own as the second factor."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 8))

    def forward(self, x):
        return torch.einsum("bi,oi->bo", x, self.w)


class TurnedProduct(Product):
    """A parameter of its own as the first factor."""

    def forward(self, x):
        return torch.einsum("oi,bi->bo", self.w, x)


@pytest.mark.parametrize("kind", [Product, TurnedProduct])
def test_the_other_factor_of_an_einsum_is_quantized(kind, tmp_path):
    x, net = torch.randn(5, 8), nn.Sequential(nn.Linear(8, 8), kind())
    want = exported(net, x, [Rule("*", weight="int8", input="uint8 affine")], tmp_path / "net.onnx")
    assert_runs_alike(tmp_path / "net.onnx", x, want, 1e-5)
    assert [node.op_type for node in onnx.load(tmp_path / "net.onnx").graph.node].count("QuantizeLinear") == 2
    rules = [Rule("*", weight="int8", input="uint8 affine"), Rule("1.w", input="uint8 affine per_channel")]
    with pytest.raises(ExportError, match="its input has other axes in the product of the file than in the layer"):
        exported(nn.Sequential(nn.Linear(8, 8), kind()), x, rules, tmp_path / "other.onnx")
