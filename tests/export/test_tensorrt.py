"""Target `tensorrt`: its files keep NVIDIA's documented rules, and each rule fires on a graph that breaks it."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lq_plugin import QuantPlan, Rule, calibrate, prepare
from lq_plugin.errors import ExportError
from lq_plugin.export import export_model, verify
from lq_plugin.export.request import Request
from lq_plugin.export.target import TARGETS, target_of
from lq_plugin.intent.spec import QuantSpec
from lq_plugin.model import record
from tests.models import randomize

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from lq_plugin.export import export_onnx  # noqa: E402
from lq_plugin.export.onnx_file.float_model import float_graph  # noqa: E402
from lq_plugin.export.tensorrt import RULES, lint  # noqa: E402
from lq_plugin.export.tensorrt.form import TENSORRT  # noqa: E402

X = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A convolution with a batch norm, depthwise and transposed ones, a residual sum, and linear layers."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.wide, self.head = nn.Linear(4 * 64, 128), nn.Linear(128, 6)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = self.up(x + self.depthwise(x))
        return self.head(torch.tanh(self.wide(x.flatten(1))))


def network():
    torch.manual_seed(0)
    net = randomize(Net()).eval()
    with torch.no_grad():
        net.norm.weight[:3] *= -net.norm.weight[:3].sign()  # some negative factors
    return net


@pytest.fixture(scope="module")
def graph():
    return float_graph(network(), (X,), ({0: torch.export.Dim("batch")},), ["x"])


def quantized(weight="int8 per_channel", activation="int8", rules=()):
    net = network()
    plan = QuantPlan([Rule("*", weight=weight, input=activation), *rules])
    prepare(net, plan, record(net, lambda: net(X)))
    calibrate(net, [X])
    return net


PLANS = {
    "int8": {},
    "int4 as int8": {"weight": "int4 per_channel", "activation": "int6 narrow"},
    "ternary": {"weight": "twn", "activation": "uint7"},
    "int4 blocks": {"rules": [Rule("wide", weight="int4 group64", input="float")]},
    "int3 blocks of integer scales": {"rules": [Rule("wide", weight="int3 group128:4", input="float")]},
    "sum": {"rules": [Rule("add_0", input="int8")]},
}


@pytest.mark.parametrize("plan", PLANS)
def test_files_keep_the_rules_and_the_numbers(plan, graph, tmp_path):
    net, path = quantized(**PLANS[plan]), tmp_path / "net.onnx"
    export_onnx(net, (X,), path, exported=graph, form=TENSORRT)
    assert lint(path) == []
    model = onnx.load(path)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    pairs = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    zeros = [numpy_helper.to_array(constants[node.input[2]]) for node in pairs if len(node.input) == 3]
    assert zeros
    assert all(zero.dtype == np.int8 and not zero.any() for zero in zeros)
    assert all((numpy_helper.to_array(constants[node.input[1]]) > 0).all() for node in pairs)
    kinds = {tensor.data_type for tensor in model.graph.initializer if tensor.name.endswith("weight_codes")}
    assert kinds == ({TensorProto.INT8, TensorProto.INT4} if "blocks" in plan else {TensorProto.INT8})
    result = verify(net, path, [X], target="tensorrt")
    assert result.agreement == 1.0
    assert result.largest_difference < 5e-3  # activations at a boundary may round to the next level


def test_a_negative_factor_next_to_the_lowest_integer_stays_a_batch_norm(graph, tmp_path):
    """-128 has no negative, and TensorRT takes no negative scale."""
    net = quantized()
    # Symmetric int8 on its full range: the lowest level is that of a channel whose extreme is negative enough.
    weight = net.stem.weight.detach().flatten(1).double()
    assert (-weight.amin(1) / 128 > weight.amax(1) / 127)[net.norm.weight < 0].any()
    export_onnx(net, (X,), tmp_path / "net.onnx", exported=graph, form=TENSORRT)
    kinds = [node.op_type for node in onnx.load(tmp_path / "net.onnx").graph.node]
    assert "BatchNormalization" in kinds
    export_onnx(net, (X,), tmp_path / "other.onnx", exported=graph)
    assert "BatchNormalization" not in [node.op_type for node in onnx.load(tmp_path / "other.onnx").graph.node]
    net = quantized("int8 per_channel narrow")
    export_onnx(net, (X,), tmp_path / "net.onnx", exported=graph, form=TENSORRT)
    assert "BatchNormalization" not in [node.op_type for node in onnx.load(tmp_path / "net.onnx").graph.node]


@pytest.mark.parametrize(
    ("layer", "weight", "activation", "message"),
    [
        ("stem", "uint8 affine", None, "signed integers with zero point 0; the nearest that fits is 'int8'"),
        ("stem", "int12 per_channel", None, "at most 8 bits; the nearest that fits is 'int8 per_channel'"),
        ("stem", "kmeans3", None, "no format of this file but int, sign, bwn, twn; .* 'int4 per_channel'"),
        ("wide", "mxfp4", None, "no format of this file but int"),
        ("wide", "int4 group32", None, "at most 4 bits, of 64 or 128 elements; .* 'int4 group64'"),
        ("wide", "int8 group64", None, "groups are those of at most 4 bits"),
        ("head", "int4 group100 ragged", None, "of 64 or 128 elements"),
        ("stem", "int4 group64 ragged", None, "groups are those of linear layers; .* 'int4 per_channel'"),
        ("wide", "int3 group32 mse", None, "of 64 or 128 elements; the nearest that fits is 'int4 group64 mse'"),
        ("wide", "int4 group64", "int8", "groups are next to float inputs; .* 'int4 per_channel'"),
        ("stem", "int8", "uint8 affine", r"stem.input .*zero point 0; the nearest that fits is 'int8'"),
        ("stem", "int8", "int16 per_channel mse", "at most 8 bits and activations have one scale; .* 'int8 mse'"),
    ],
)
def test_what_tensorrt_cannot_hold_is_refused_at_plan_time(layer, weight, activation, message):
    prepare(net := network(), QuantPlan([Rule(layer, weight=weight, input=activation)]))
    faults = TARGETS["tensorrt"].faults(Request(model=net))
    assert len(faults) == 1
    with pytest.raises(ValueError, match=message):
        raise ValueError(faults[0])
    assert faults[0].startswith(f"{layer}.")


def test_the_name_chooses_the_target_and_the_suffix_does_not(tmp_path):
    assert target_of("model.onnx").name == "onnx"
    assert target_of("model.onnx", "tensorrt").name == "tensorrt"
    with pytest.raises(ExportError, match="smallest is an option of onnx, not of tensorrt"):
        export_model(quantized(), tmp_path / "net.onnx", (X,), target="tensorrt", smallest=8)
    with pytest.raises(ExportError, match="runtime is onnxruntime, got 'openvino'"):
        TARGETS["tensorrt"].runtime_of("openvino")


def test_export_model_writes_a_linted_file(graph, tmp_path, monkeypatch):
    net, path = quantized(), tmp_path / "net.onnx"
    raw = graph.SerializeToString()
    monkeypatch.setattr("lq_plugin.export.onnx_file.write.float_graph", lambda *_: onnx.ModelProto.FromString(raw))
    assert export_model(net, path, (X,), target="tensorrt") == path.stat().st_size
    before = path.read_bytes()
    strict = RULES["opset"]._replace(check=lambda view: iter([("model", f"opset {view.opset}")]))
    monkeypatch.setitem(RULES, "opset", strict)
    with pytest.raises(ExportError, match=r"is not written, its graph breaks rules: model: opset 21 \[opset\]"):
        export_model(net, path, (X,), target="tensorrt")
    assert path.read_bytes() == before


# Graphs made by hand, each of which breaks one rule.


def constant(name, values, kind=TensorProto.FLOAT):
    values = np.asarray(values)
    return helper.make_tensor(name, kind, values.shape, values.reshape(-1).tolist())


def product(
    w_scale=(0.1,) * 4, w_kind="INT8", w_shape=(8, 4), axis=1, block=0, zero=0, scale=0.1, kind="INT8", op="MatMul",
    opset=21, dtype="FLOAT",
):  # fmt: skip
    """x [N, 8] through Q/DQ, times a weight through DQ, as a list of nodes and constants that a case may change."""
    kinds = {name: getattr(TensorProto, name) for name in (w_kind, kind, dtype)}
    block = {"block_size": block} if block else {}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], "quantize"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], "dequantize"),
        helper.make_node("DequantizeLinear", ["w", "ws"], ["wd"], "weight", axis=axis, **block),
        helper.make_node(op, ["d", "wd"], ["y"], "product"),
    ]
    tensors = [
        constant("s", scale, kinds[dtype]),
        constant("z", np.full(np.shape(scale), zero), kinds[kind]),
        constant("w", np.ones(w_shape, int), kinds[w_kind]),
        constant("ws", w_scale),
    ]
    return nodes, tensors, opset


def finished(nodes, tensors, opset, shape=("N", 8)):
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    graph = helper.make_graph(nodes, "net", inputs, outputs, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def changed(node, position, name, **options):
    nodes, tensors, opset = product(**options)
    nodes[node].input[position] = name
    return nodes, tensors, opset


def with_node(op, inputs, output, *more, **options):
    nodes, tensors, opset = product(**options)
    return [*nodes, helper.make_node(op, inputs, [output], "extra")], [*tensors, *more], opset


def int4(**options):
    """INT4 in blocks of 64 times a float input."""
    options = {"w_kind": "INT4", "w_shape": (128, 4), "w_scale": np.full((2, 4), 0.1), "axis": 0, "block": 64} | options
    nodes, tensors, opset = product(**options)
    nodes[3].input[0] = "x"
    return nodes[2:], tensors[2:], opset


def quantized_int4():
    nodes, tensors, opset = int4()
    pair, more, _ = product()
    return [*pair[:2], nodes[0], pair[3]], [*more[:2], *tensors], opset


def computed_scale():
    nodes, tensors, opset = with_node("Abs", ["s0"], "s", constant("s0", 0.1))
    return [nodes[-1], *nodes[:-1]], tensors[1:], opset


BROKEN = {
    "opset": product(opset=26),
    "integer-operator": with_node("MatMulInteger", ["x8", "x8"], "i", constant("x8", [[1]], TensorProto.UINT8)),
    "tensor-type": with_node("Sqrt", ["c"], "e", constant("c", [2.0], TensorProto.DOUBLE)),
    "quantized-type": product(kind="UINT8"),
    "quantized-reader": with_node("Cast", ["q"], "c"),
    "zero-point": product(zero=3),
    "constant-scale": computed_scale(),
    "positive-scale": product(w_scale=(0.1, 0.1, -0.1, 0.1)),
    "scale-type": product(dtype="FLOAT16"),
    "scale-shape": product(w_scale=(0.1,) * 3),
    "activation-scale": product(scale=(0.1,) * 8),
    "weight-axis": product(axis=0, w_scale=(0.1,) * 8),
    "block-shape": int4(w_shape=(100, 4)),
    "int4-blocks": int4(w_scale=np.full((4, 4), 0.1), block=32),
    "int4-weights": quantized_int4(),
    "int4-even": int4(w_shape=(128, 3), w_scale=np.full((2, 3), 0.1)),
}


def test_every_rule_has_a_graph_that_breaks_it_and_a_source():
    assert set(BROKEN) == set(RULES)
    assert all(rule.sentence.endswith(".") and rule.source.startswith("https://") for rule in RULES.values())


@pytest.mark.parametrize("rule", BROKEN)
def test_each_rule_fires(rule):
    found = lint(finished(*BROKEN[rule]))
    assert rule in {finding.rule for finding in found}
    # Some faults break a second rule of necessity.
    allowed = {"integer-operator": {"tensor-type"}}.get(rule, set())
    assert {finding.rule for finding in found} <= {rule, *allowed}, [str(finding) for finding in found]


@pytest.mark.parametrize("good", [product(), int4(), product(w_scale=0.1), product(op="Gemm")])
def test_good_graphs_have_no_findings(good):
    assert lint(finished(*good)) == []


@pytest.mark.parametrize(("op", "axis"), [("Conv", 0), ("ConvTranspose", 1)])
def test_output_channels_of_convolutions(op, axis):
    def conv(axis):
        nodes, tensors, opset = product(op=op, w_shape=(4, 4, 1, 1), axis=axis)
        return finished(nodes, tensors, opset, ("N", 4, 5, 5))

    assert lint(conv(axis)) == []
    (found,) = lint(conv(1 - axis))
    assert str(found) == f"weight: axis {1 - axis}, {op} has its output channels along {axis} [weight-axis]"


def test_findings_inside_a_condition_and_of_files(tmp_path):
    nodes, tensors, opset = product(zero=3)
    branches = {}
    for name, content in (("then_branch", nodes), ("else_branch", [helper.make_node("Neg", ["x"], ["n"])])):
        out = [helper.make_tensor_value_info(content[-1].output[0], TensorProto.FLOAT, None)]
        branches[name] = helper.make_graph(content, name, [], out, tensors if content is nodes else [])
    decide = helper.make_node("If", ["yes"], ["y"], "if", **branches)
    model = finished([decide], [constant("yes", True, TensorProto.BOOL)], opset)
    model.graph.node[0].output[0] = model.graph.output[0].name = "result"
    onnx.save(model, tmp_path / "net.onnx")
    assert {(finding.rule, finding.node) for finding in lint(tmp_path / "net.onnx")} == {
        ("zero-point", "quantize"), ("zero-point", "dequantize"),
    }  # fmt: skip
    with pytest.raises(ExportError, match="no such file"):
        lint(tmp_path / "none.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"\xff\xff\xff\xff no model")
    with pytest.raises(ExportError, match="is no ONNX file"):
        lint(tmp_path / "bad.onnx")


def test_a_default_file_breaks_the_rules(graph, tmp_path):
    """Without the target: unsigned activations, and int32 biases."""
    export_onnx(quantized(), (X,), tmp_path / "net.onnx", exported=graph)
    assert {"quantized-type", "zero-point"} <= {finding.rule for finding in lint(tmp_path / "net.onnx")}


@pytest.mark.parametrize("name", ["onnx", "tensorrt", "torchao", "xnor"])
def test_float_layers_are_asked_before_they_are_prepared(name):
    """Each target says of a float layer what it says of the prepared one, and holds what it calls the nearest."""
    target, layer = TARGETS[name], nn.Linear(128, 4)
    prepared = nn.Sequential(nn.Linear(128, 4))
    prepare(prepared, "int8 per_channel")
    for slot in target.takes:
        near = target.nearest(slot, QuantSpec("nvfp4"), layer)
        assert target.spec_fault(slot, near, prepared[0]) is None
    for slot, texts in {"weight": ("int8", "int12", "mxfp4", "bwn", "int4 group64"), "input": ("int8", "mx9")}.items():
        for spec in map(QuantSpec.parse, texts):
            reasons = {target.spec_fault(slot, spec, layer), target.spec_fault(slot, spec, prepared[0])}
            assert len(reasons) == 1
