"""Graphs of unusual shape: outputs in the middle, bodies of conditions, nested inputs, layers that do not run."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lq_plugin import calibrate, prepare
from lq_plugin.errors import ExportError
from tests.models import randomize

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from lq_plugin.export import export_onnx, onnx_session, verify  # noqa: E402


def exported(net, inputs, path, plan="int8 per_channel", **options):
    """The quantized model, written."""
    randomize(net.eval())
    prepare(net, plan)
    calibrate(net, [inputs], run=lambda batch: net(*batch))
    export_onnx(net.eval(), inputs, path, **options)
    return net


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value.detach()]
    return [x for item in (value.values() if isinstance(value, dict) else value) for x in tensors(item)]


def assert_runs_alike(net, inputs, path, tolerance=1e-5):
    session = onnx_session(path, threads=1)
    got = session.run(None, {i.name: x.numpy() for i, x in zip(session.get_inputs(), tensors(inputs), strict=True)})
    for y, want in zip(got, tensors(net(*inputs)), strict=True):
        assert (torch.from_numpy(y) - want).abs().max() <= tolerance * want.abs().max()


class Features(nn.Module):
    """Gives what lies before a batch norm, or behind one that is read on, too."""

    def __init__(self, before):
        super().__init__()
        self.conv, self.norm, self.head, self.before = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1), before

    def forward(self, x):
        y = self.conv(x)
        z = self.norm(y)
        return y if self.before else z, self.head(torch.relu(z))


@pytest.mark.parametrize("before", [True, False])
def test_outputs_beside_a_batch_norm(before, tmp_path):
    x = (torch.randn(2, 3, 6, 6),)
    net = exported(Features(before), x, tmp_path / "net.onnx")
    assert_runs_alike(net, x, tmp_path / "net.onnx")
    kept = [node.op_type for node in onnx.load(tmp_path / "net.onnx").graph.node].count("BatchNormalization")
    assert kept == before  # the convolution's own output is needed


class Condition(nn.Module):
    """The bodies of a condition read what is made outside: a convolution's output, which only a batch norm reads
    elsewhere."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.Linear(8, 8)

    def forward(self, x):
        y = self.conv(x)
        z = self.fc(self.norm(y))
        return torch.cond(z.sum() > 0, lambda a, b: a + b, lambda a, b: a - 2 * b, (z, y))


@torch.no_grad()
def test_bodies_read_what_is_made_outside(tmp_path):
    x = (torch.randn(3, 2, 4, 8),)
    net = exported(Condition(), x, tmp_path / "net.onnx")
    for sign in (1, -1):
        assert_runs_alike(net, (sign * x[0],), tmp_path / "net.onnx")


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 4)

    def forward(self, batch, *others):
        return {"first": self.fc(batch["x"]), "others": [self.fc(x) for pair in others for x in pair]}


def test_dim_0_of_nested_inputs_and_of_any_number_of_them_is_dynamic(tmp_path):
    def inputs(n):
        return {"x": torch.randn(n, 8)}, [torch.randn(n, 8), torch.randn(n, 8)], [torch.randn(n, 8)]

    net = exported(Nested(), inputs(2), tmp_path / "net.onnx")
    for n in (1, 2, 7):
        assert_runs_alike(net, inputs(n), tmp_path / "net.onnx")
    # Of a batch with more behind, as many elements as the file has tensors.
    result = verify(net, tmp_path / "net.onnx", [inputs(5), (*inputs(3), torch.zeros(3))])
    assert (result.samples, result.agreement) == (8, 1.0)
    assert result.largest_difference < 1e-5


def test_a_dictionary_as_last_input(tmp_path):
    """torch.onnx.export takes it for keyword arguments, unless `{}` follows; here both are the same."""

    class OfADictionary(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 4)

        def forward(self, batch):
            return self.fc(batch["x"])

    net = exported(OfADictionary(), ({"x": torch.randn(2, 8)},), tmp_path / "net.onnx")
    assert_runs_alike(net, ({"x": torch.randn(3, 8)},), tmp_path / "net.onnx")
    before = (tmp_path / "net.onnx").read_bytes()
    export_onnx(net, ({"x": torch.randn(2, 8)}, {}), tmp_path / "net.onnx")
    assert (tmp_path / "net.onnx").read_bytes() == before


class BiasedAttention(nn.Module):
    """Attention over a learned bias of distances, as in T5."""

    def __init__(self, longest=5):
        super().__init__()
        self.qkv, self.out, self.bias, self.longest = (
            nn.Linear(8, 24),
            nn.Linear(8, 8),
            nn.Embedding(2 * longest - 1, 2),
            longest,
        )

    def forward(self, x):
        n, length, _ = x.shape
        q, k, v = (part.reshape(n, length, 2, 4).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        distance = torch.arange(length)[:, None] - torch.arange(length)
        bias = self.bias(distance + self.longest - 1).permute(2, 0, 1)[None]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.out(y.transpose(1, 2).reshape(n, length, 8))


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.attention, self.head = nn.Embedding(20, 8), BiasedAttention(16), nn.Linear(8, 3)

    def forward(self, tokens, mask, scale):
        return self.head(self.attention(self.embedding(tokens)) * mask[..., None]) * scale[:, None, None]


def test_sequences_of_any_length(tmp_path):
    def inputs(n, length):
        return torch.randint(0, 20, (n, length)), torch.ones(n, length), torch.rand(n)

    x = inputs(2, 5)
    net = exported(Tokens(), x, tmp_path / "net.onnx", dynamic_dims=[1])
    for n, length in ((2, 5), (1, 16), (7, 1)):
        assert_runs_alike(net, inputs(n, length), tmp_path / "net.onnx")
    with pytest.raises(ExportError, match="dynamic_dims are dims after the batch that an input has, 1 to 1; got 2, 3"):
        export_onnx(net, x, tmp_path / "net.onnx", dynamic_dims=[1, 2, 3])
    with pytest.raises(ExportError, match="dynamic_dims are dims of the inputs after the batch, 1 or more"):
        export_onnx(net, x, tmp_path / "net.onnx", dynamic_dims=[0, 1, "L"])


def test_the_model_itself_says_what_inputs_do_not_fit(tmp_path, monkeypatch):
    net = exported(nn.Sequential(nn.Linear(8, 4)), (torch.randn(2, 8),), tmp_path / "net.onnx")
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **options: pytest.fail("the exporter was called"))
    with pytest.raises(TypeError, match="takes 2 positional arguments but 3 were given"):
        export_onnx(net, (torch.randn(2, 8),) * 2, tmp_path / "net.onnx")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        export_onnx(net, (torch.randn(2, 5),), tmp_path / "net.onnx")


def test_a_file_is_the_same_in_every_process(tmp_path):
    """New values are counted in the order of the layers, not of a set of their names."""
    x = (torch.randn(2, 8),)
    exported(nn.Sequential(*(nn.Linear(8, 8) for _ in range(8))), x, tmp_path / "net.onnx", "w8a8")
    made = [node.output[0] for node in onnx.load(tmp_path / "net.onnx").graph.node if node.op_type == "QuantizeLinear"]
    assert [name.rpartition("_")[2] for name in made] == [str(index) for index in range(8)]


def test_a_model_that_is_a_layer_itself(tmp_path):
    x = (torch.randn(2, 8),)
    net = exported(nn.Linear(8, 4), x, tmp_path / "net.onnx", "int4 per_channel / uint8 affine")
    assert_runs_alike(net, x, tmp_path / "net.onnx", 0.02)


class Auxiliary(nn.Module):
    """A head for training only, as in GoogLeNet."""

    def __init__(self):
        super().__init__()
        self.fc, self.aux = nn.Linear(8, 4), nn.Linear(4, 2)

    def forward(self, x):
        y = self.fc(x)
        return (y, self.aux(y)) if self.training else y


def test_a_layer_that_does_not_run_in_evaluation_is_left_out(tmp_path):
    x = (torch.randn(2, 8),)
    net = exported(Auxiliary(), x, tmp_path / "net.onnx")
    assert_runs_alike(net, x, tmp_path / "net.onnx")
    assert not [
        tensor.name for tensor in onnx.load(tmp_path / "net.onnx").graph.initializer if tensor.name.startswith("aux")
    ]


def test_attention_over_a_learned_bias(tmp_path, capfd):
    x = (torch.randn(2, 5, 8),)
    net = exported(BiasedAttention(), x, tmp_path / "net.onnx")
    assert_runs_alike(net, x, tmp_path / "net.onnx")
    assert not capfd.readouterr().err, "warnings that are not about the user's model"


class Branch(nn.Module):
    """Goes one way or the other by its data."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        y = self.fc(x)
        return y * 2 if y.sum() > 0 else y


class Unknown(nn.Module):
    """Calls an operator that ONNX has not."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return torch.linalg.svd(self.fc(x))[1]


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (
            Branch,
            r"of Branch: GuardOnDataDependentSymNode: .*test_onnx_graphs.py.*, in forward: return y \* 2 if y.sum\(\) "
            r"> 0 else y",
        ),
        (Unknown, "of Unknown: DispatchError: No ONNX function found for .*svd"),
    ],
)
def test_what_torch_has_no_graph_for_is_said_in_a_line(model, reason, tmp_path, capfd):
    net, x = model(), torch.randn(4, 8)
    prepare(net, "w8a8")
    calibrate(net, [x])
    with pytest.raises(ExportError, match=f"torch cannot make an ONNX graph {reason}") as caught:
        export_onnx(net.eval(), (x,), tmp_path / "net.onnx")
    assert len(str(caught.value).splitlines()) == 1
    assert capfd.readouterr() == ("", "")
    assert not (tmp_path / "net.onnx").exists()
