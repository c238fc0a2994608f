"""Packed files: bit-equal models, true sizes, and what becomes of damaged files."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lq_plugin import QuantPlan, QuantSpec, Rule, calibrate, prepare
from lq_plugin.errors import ExportError, QuantizationError
from lq_plugin.export import export_onnx, load_packed, save_packed
from lq_plugin.intent.formats import FORMATS
from lq_plugin.model.measure.cost import cost
from tests.models import resnet20
from tests.quantizers.test_format_contract import INPUTS, LAYERS, WEIGHTS

SPECS = [
    *WEIGHTS,
    "mx6",
    "int1 mse",
    "uint4 mse",
    "int3 narrow",
    "int5 affine group16 octav ragged",
    "int8",
    "int2 group16:4:channel mse ragged",
]


def packed(net, x, path, weight, inputs=None):
    prepare(net, QuantPlan([Rule("*", weight=weight, input=inputs)]))
    calibrate(net, [x])
    return save_packed(net.eval(), path)


def test_every_weight_format_is_covered():
    assert {QuantSpec.parse(text).format_name for text in SPECS} == {
        n for n, kind in FORMATS.items() if "weight" in kind.slots
    }


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("spec", SPECS)
def test_the_loaded_model_is_bit_equal(spec, kind, tmp_path):
    if kind == "depthwise" and "group4" in spec:
        pytest.skip("its filters have one input channel, and codebooks are of whole groups")
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    x = torch.randn(shape)
    net = nn.Sequential(make())
    packed(net, x, tmp_path / "net.safetensors", spec, "uint8 affine mse")
    other = nn.Sequential(make())
    load_packed(other, tmp_path / "net.safetensors")
    assert torch.equal(other(x), net(x))
    assert torch.equal(other[0].weight, net[0].quantized_weight())
    assert cost(other).bytes == cost(net).bytes


@pytest.mark.parametrize("spec", INPUTS)
def test_inputs_of_every_format(spec, tmp_path):
    x = torch.randn(5, 20)
    net = nn.Sequential(nn.Linear(20, 6))
    packed(net, x, tmp_path / "net.safetensors", "int4", spec)
    other = nn.Sequential(nn.Linear(20, 6))
    load_packed(other, tmp_path / "net.safetensors")
    assert torch.equal(other(x), net(x))


@pytest.mark.parametrize(
    "spec",
    [
        "int4 per_channel mse",
        "int4 group16:4 ragged",
        "mx6",
        "mxfp4",
        "nvfp4",
        "bwn",
        "twn",
        "ttq",
        "kmeans2",
        "int3",
        "q4_0",
        "tq1_0",
    ],
)
def test_files_are_as_small_as_the_bits_say(spec, tmp_path):
    """Within 2 % of the cost model at 10 million parameters, within 5 % for ResNet-20."""
    large = nn.Sequential(nn.Linear(2500, 2000), nn.ReLU(), nn.Linear(2000, 2500))
    size = packed(large, torch.randn(4, 2500), tmp_path / "large.safetensors", spec)
    assert size == pytest.approx(cost(large).bytes, rel=0.02)
    small = resnet20()
    size = packed(small, torch.randn(4, 3, 32, 32), tmp_path / "small.safetensors", spec)
    assert size == pytest.approx(cost(small).bytes, rel=0.05)


def test_tied_weights_are_stored_once(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(500, 64)
            self.head = nn.Linear(64, 500, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x):
            return self.head(self.embedding(x))

    net, tokens = Tied(), torch.randint(0, 500, (3, 7))
    prepare(net, QuantPlan([Rule("*", weight="int4 per_channel mse")]))
    calibrate(net, [tokens])
    size = save_packed(net.eval(), tmp_path / "net.safetensors")
    assert size < 1.3 * (500 * 64 / 2 + 500 * 4)
    other = Tied()
    load_packed(other, tmp_path / "net.safetensors")
    assert other.head.weight is other.embedding.weight
    assert torch.equal(other(tokens), net(tokens))


def test_the_metadata_is_readable_by_other_tools(tmp_path):
    packed(nn.Sequential(nn.Linear(8, 8)), torch.randn(2, 8), tmp_path / "net.safetensors", "int4 per_channel")
    with safe_open(tmp_path / "net.safetensors", framework="pt") as file:
        metadata = file.metadata()
        assert set(file.keys()) == {"blob", "table"}
    assert json.loads(metadata["plan"]) == {"rules": [{"match": "0", "weight": "int4 per_channel"}]}
    # 64 codes of 4 bits, a scale for each of 8 rows, 8 float biases.
    assert float(metadata["effective_bits"]) == pytest.approx((64 * 4 + 8 * 32 + 8 * 32) / 72)


def test_another_process_without_lightning(tmp_path):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(16, 4)), torch.ones(1, 16)
    packed(net, x, tmp_path / "net.safetensors", "ttq", "uint8 affine")
    code = f"""
import sys, torch
from torch import nn
from lq_plugin.export import load_packed
net = nn.Sequential(nn.Linear(16, 4))
load_packed(net, {str(tmp_path / "net.safetensors")!r})
assert "lightning" not in sys.modules
sys.stdout.write(str(net(torch.ones(1, 16)).double().tolist()))
"""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(answer) == net(x).double().tolist()


def test_what_is_not_ready_is_refused_before_a_file_is_written(tmp_path):
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(ExportError, match="is not quantized"):
        save_packed(net, tmp_path / "net.safetensors")
    prepare(net, "int4 mse / uint8 affine")
    with pytest.raises(ExportError, match=r"0\.weight.*\n.*0\.input.*\n.*1\.weight"):
        save_packed(net, tmp_path / "net.safetensors")
    net = nn.Sequential(nn.Linear(4, 4))
    prepare(net, "sign:float_eval stochastic")
    with pytest.raises(ExportError, match="evaluated with float weights"):
        save_packed(net, tmp_path / "net.safetensors")
    assert not list(tmp_path.iterdir())


def test_damaged_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "net.safetensors"
    packed(nn.Sequential(nn.Linear(8, 8)), torch.randn(2, 8), path, "int4")
    content = path.read_bytes()
    fresh = lambda: nn.Sequential(nn.Linear(8, 8))  # noqa: E731

    path.write_bytes(content[:-7])
    with pytest.raises(ExportError, match="no packed file, or a damaged one"):
        load_packed(fresh(), path)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ExportError, match="checksum"):
        load_packed(fresh(), path)
    path.write_bytes(content.replace(b"int4", b"int3"))
    with pytest.raises(ExportError, match="checksum"):
        load_packed(fresh(), path)
    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(ExportError, match="no packed model of lq_plugin"):
        load_packed(fresh(), path)
    assert load_file(path)["x"].item() == 1
    with pytest.raises(ExportError, match="cannot open"):
        load_packed(fresh(), tmp_path / "absent.safetensors")
    path.write_bytes(content)
    others = [
        [nn.Linear(8, 4)],
        [nn.Linear(8, 8, bias=False)],
        [nn.Linear(8, 8), nn.BatchNorm1d(8)],
        [nn.ReLU(), nn.Linear(8, 8)],
    ]
    for other in (nn.Sequential(*layers) for layers in others):
        with pytest.raises(ExportError, match="is of another model"):
            load_packed(other, path)


def test_a_loaded_model_says_that_it_cannot_be_trained(tmp_path):
    packed(nn.Sequential(nn.Linear(8, 8)), torch.randn(2, 8), tmp_path / "net.safetensors", "int4")
    net = nn.Sequential(nn.Linear(8, 8))
    load_packed(net, tmp_path / "net.safetensors")
    with pytest.raises(QuantizationError, match="no latent weight to train"):
        net.train()(torch.randn(2, 8))
    with pytest.raises(QuantizationError, match="no range to find"):
        calibrate(net, [torch.randn(2, 8)])


def test_modules_with_several_weights(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(16, 24, num_layers=2, bidirectional=True, batch_first=True)
            self.attention = nn.MultiheadAttention(48, 4, batch_first=True)

        def forward(self, x):
            x, _ = self.lstm(x)
            return self.attention(x, x, x, need_weights=False)[0]

    torch.manual_seed(0)
    net, x = Net().requires_grad_(False), torch.randn(2, 5, 16)
    size = packed(net, x, tmp_path / "net.safetensors", "int4 per_channel mse", "uint8 affine mse")
    assert size == pytest.approx(cost(net).bytes, rel=0.15)
    other = Net().requires_grad_(False)
    load_packed(other, tmp_path / "net.safetensors")
    assert torch.equal(other(x), net(x))


class Tied(nn.Module):
    """A language model whose head and embedding share their weight."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(50, 32), nn.Linear(32, 50, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(torch.tanh(self.embedding(tokens)))


@pytest.mark.parametrize(
    "specs",
    [
        {"head": "int4 per_channel"},
        {"embedding": "int4 per_channel"},
        {"embedding": "int4 per_channel", "head": "int8 per_channel"},
        {"embedding": "ttq", "head": "int8"},
        {"embedding": "int8", "head": "int8"},
    ],
    ids=str,
)
def test_tied_weights_of_different_specs(tmp_path, specs):
    """Each layer gets its own values back, be it quantized otherwise or float."""
    torch.manual_seed(0)
    model, tokens = Tied(), torch.randint(0, 50, (4, 7))
    prepare(model, QuantPlan([Rule(name, weight=spec) for name, spec in specs.items()]))
    calibrate(model, [tokens])
    size = save_packed(model.eval(), tmp_path / "tied.safetensors")
    other = Tied()
    load_packed(other, tmp_path / "tied.safetensors")
    assert other.head.weight is other.embedding.weight
    assert torch.equal(other.embedding(tokens), model.embedding(tokens))
    assert torch.equal(other(tokens), model(tokens))
    assert set(other.state_dict()) >= {"head.weight", "embedding.weight"}
    again = copy.deepcopy(other)
    assert torch.equal(again(tokens), model(tokens))
    # One float copy where a float module has it; none otherwise.
    assert (size > 50 * 32 * 4) == (len(specs) == 1)


def test_a_model_from_a_packed_file_is_not_exported_again(tmp_path):
    x = torch.randn(4, 8)
    packed(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), x, tmp_path / "net.safetensors", "int4 per_channel")
    other = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    load_packed(other, tmp_path / "net.safetensors")
    for export in (save_packed, lambda model, path: export_onnx(model, (x,), path)):
        with pytest.raises(
            ExportError, match=r"(?s)0\.weight was read from a packed file.*checkpoint.*1\.weight was read"
        ):
            export(other, tmp_path / "again")
    assert not (tmp_path / "again").exists()


class Buffers(nn.Module):
    """Buffers of every kind of number, rotary frequencies as complex ones among them."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.register_buffer("frequencies", torch.polar(torch.ones(4), torch.arange(4.0)))
        self.register_buffer("table", torch.tensor([1, 65535]).to(torch.uint16))
        self.register_buffer("small", torch.tensor([0.5, -2.0]).to(torch.float8_e4m3fn))

    def forward(self, x):
        return torch.view_as_real(torch.view_as_complex(self.fc(x).reshape(-1, 4, 2)) * self.frequencies)


def test_buffers_of_every_kind_of_number(tmp_path):
    net, x = Buffers(), torch.randn(3, 8)
    packed(net, x, tmp_path / "net.safetensors", "int4 per_channel", "uint8 affine")
    other = Buffers()
    for buffer in other.buffers():
        buffer.zero_()
    load_packed(other, tmp_path / "net.safetensors")
    assert torch.equal(other(x), net(x))
    for name, buffer in net.named_buffers(recurse=False):
        assert torch.equal(other.get_buffer(name).view(torch.uint8), buffer.view(torch.uint8)), name


class ExtraState(nn.Linear):
    def get_extra_state(self):
        return {"steps": 3}

    def set_extra_state(self, state):
        pass


def test_what_no_tensor_holds_is_refused_before_a_file_is_written(tmp_path):
    net, x = nn.Sequential(ExtraState(8, 8)), torch.randn(2, 8)
    net.register_buffer("sparse", torch.eye(3).to_sparse())
    with pytest.raises(
        ExportError, match=r"2 faults(.|\n)*sparse is a tensor of torch\.float32(.|\n)*0\._extra_state is a dict"
    ):
        packed(net, x, tmp_path / "net.safetensors", "int4 per_channel")
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_a_layer_itself(tmp_path):
    torch.manual_seed(0)
    net, x = nn.Linear(64, 64), torch.randn(3, 64)
    size = packed(net, x, tmp_path / "net.safetensors", "int4 per_channel", "uint8 affine")
    assert size < 64 * 64 / 2 + 64 * 8 + 1000, "the float weight is in the file, too"
    other = nn.Linear(64, 64)
    load_packed(other, tmp_path / "net.safetensors")
    assert torch.equal(other(x), net(x))


def test_another_precision_and_no_memory_are_refused(tmp_path):
    def make():
        return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))

    net, x = make().bfloat16(), torch.randn(4, 8, dtype=torch.bfloat16)
    packed(net, x, tmp_path / "net.safetensors", "int4 per_channel", "uint8 affine")
    with pytest.raises(
        ExportError,
        match=r"is torch\.bfloat16 in the file and torch\.float32 here(.|\n)*load it into a model of torch\.bfloat16",
    ):
        load_packed(make(), tmp_path / "net.safetensors")
    other = make().bfloat16()
    load_packed(other, tmp_path / "net.safetensors")
    assert torch.equal(other(x), net(x))
    with torch.device("meta"):
        nowhere = make().bfloat16()
    with pytest.raises(ExportError, match=r"Sequential is on the meta device(.|\n)*to_empty"):
        load_packed(nowhere, tmp_path / "net.safetensors")


class TwoNames(nn.Module):
    """One layer under two names."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 2)
        self.again = self.layer

    def forward(self, x):
        return self.head(self.again(self.layer(x).relu()).relu())


def test_a_layer_of_two_names(tmp_path):
    torch.manual_seed(0)
    net, fresh, x = TwoNames(), TwoNames().eval(), torch.randn(8, 6)
    packed(net, x, tmp_path / "net.safetensors", "int4 per_channel", "uint8 affine")
    load_packed(fresh, tmp_path / "net.safetensors")
    assert torch.equal(fresh(x), net(x))
