"""LSTM, GRU, RNN and attention as ONNX: the runtime's numbers beside ours, and whole numbers in the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lq_plugin import QuantPlan, Rule, calibrate, prepare

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from lq_plugin.errors import ExportError  # noqa: E402
from lq_plugin.export import export_onnx, onnx_session  # noqa: E402


class First(nn.Module):
    """The first output of a module that gives several."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.inner(*inputs)[0]


def attention(**options: Any) -> nn.Module:
    return First(nn.MultiheadAttention(16, 4, batch_first=True, **options))


X, Y, Z = torch.Size((3, 5, 16)), torch.Size((3, 7, 16)), torch.Size((3, 7, 10))
MODELS: dict[str, tuple[Any, list[torch.Size]]] = {
    "lstm": (lambda: First(nn.LSTM(16, 6, batch_first=True)), [X]),
    "bidirectional": (lambda: First(nn.LSTM(16, 6, num_layers=2, batch_first=True, bidirectional=True)), [X]),
    "gru": (lambda: First(nn.GRU(16, 6, batch_first=True)), [X]),
    "projected": (lambda: First(nn.LSTM(16, 6, batch_first=True, proj_size=4)), [X]),
    "rnn": (lambda: First(nn.RNN(16, 6, num_layers=2)), [X]),
    "cell": (lambda: First(nn.LSTMCell(16, 6)), [torch.Size((3, 16))]),
    "gru_cell": (lambda: nn.GRUCell(16, 6), [torch.Size((3, 16)), torch.Size((3, 6))]),
    "encoder": (lambda: nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0), [X]),
    "decoder": (lambda: nn.TransformerDecoderLayer(16, 4, 32, batch_first=True, dropout=0.0), [X, Y]),
    "three_inputs": (attention, [X, Y, Y]),
    "three_weights": (lambda: attention(kdim=16, vdim=10), [X, Y, Z]),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize(
    ("weight", "inputs"),
    [
        ("int8 per_channel", "uint8 affine"),
        pytest.param("int4 group8 mse ragged", None, marks=pytest.mark.slow),
        pytest.param("kmeans3", None, marks=pytest.mark.slow),
        pytest.param("twn per_channel", "int6 mse", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", MODELS)
def test_the_runtime_computes_what_we_do(name: str, weight: str, inputs: str | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, shapes = MODELS[name]
    net, x = make(), [torch.randn(shape) for shape in shapes]
    prepare(net, QuantPlan([Rule("*", weight=weight, input=inputs)]))
    calibrate(net, [x], run=lambda batch: net(*batch))
    with torch.no_grad():
        want = net.eval()(*x)
    path = tmp_path / "model.onnx"
    export_onnx(net, x, path, dynamic_batch=False)
    session = onnx_session(path, threads=1)
    (got,) = session.run(None, {i.name: value.numpy() for i, value in zip(session.get_inputs(), x, strict=True)})
    # One value on the border between two levels may fall to the other side, so most are compared closely and all
    # loosely.
    apart = (torch.from_numpy(got) - want).abs() / want.abs().max()
    assert apart.median() < 1e-5
    assert apart.max() < (0.02 if inputs else 1e-4)
    graph = onnx.load(path).graph
    floats = {tensor.name for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT}
    assert not floats & set(net.state_dict()) - {key for key in net.state_dict() if "bias" in key or "norm" in key}
    quantized = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    assert bool(quantized) == (inputs is not None)


def test_each_input_of_the_projections_is_quantized_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = attention(), [torch.randn(Y), torch.randn(X)]
    prepare(net, QuantPlan([Rule("*in_proj*", weight="int8 per_channel", input="uint8 affine")]))
    calibrate(net, [x], run=lambda batch: net(batch[0], batch[1], batch[1]))
    export_onnx(net.eval(), [x[0], x[1], x[1]], tmp_path / "model.onnx", dynamic_batch=False)
    graph = onnx.load(tmp_path / "model.onnx").graph
    # Of the query, and of the one tensor that is key and value.
    assert sum(node.op_type == "QuantizeLinear" for node in graph.node) == 2
    (codes,) = [tensor for tensor in graph.initializer if tensor.name == "inner.in_proj_weight.weight_codes"]
    levels = onnx.numpy_helper.to_array(codes)
    weight = net.inner.in_proj_weight.detach()
    scale = weight.abs().amax(1, keepdim=True) / 127
    assert abs(torch.from_numpy(levels.astype("int32")) - (weight / scale).round()).max() <= 1


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_a_quantized_state_has_a_node_for_each_step(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, shapes = MODELS[name]
    net, x = make(), torch.randn(shapes[0])
    prepare(net, "w8a8")
    calibrate(net, [x])
    export_onnx(net.eval(), (x,), tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert not {"LSTM", "GRU"} & {node.op_type for node in graph.node}
    state = net.inner.quantized_weights["weight_hh_l0"].input_quantizer
    scales = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    quantized = [
        node for node in graph.node if node.op_type == "QuantizeLinear" and scales[node.input[1]] == state.scale.numpy()
    ]
    assert len(quantized) == x.shape[1]
    more = torch.randn(7, *x.shape[1:])
    (got,) = onnx_session(tmp_path / "model.onnx", threads=1).run(None, {graph.input[0].name: more.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), net(more), rtol=0, atol=1e-4)


INSIDE = {
    "lstm": [
        Rule("*.hidden_l0", input="int8"),
        Rule("*.cell_l0", input="int16"),
        Rule("*.gates_l0", input="uint8 affine"),
    ],
    "bidirectional": [Rule("re:.*(hidden|cell|gates)_l.*", input="int16")],
    "gru": [Rule("*.gates_l0", input="int8"), Rule("*.hidden_l0", input="uint8 affine")],
    "rnn": [Rule("*.hidden_l1", input="int8")],
    "cell": [Rule("*.cell_0", input="int16"), Rule("*.gates_0", input="int8")],
    "encoder": [Rule("type:matmul", input="uint8 affine"), Rule("type:softmax", input="int8")],
    "three_inputs": [Rule("*.matmul_1", input="uint8 affine")],
    "three_weights": [Rule("*.matmul_0", input="int8")],
}


@pytest.mark.parametrize("name", INSIDE)
def test_what_is_quantized_inside_is_in_the_file(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, shapes = MODELS[name]
    net, x = make(), [torch.randn(shape) for shape in shapes]
    prepare(net, QuantPlan([Rule("*", weight="int8 per_channel", input="uint8 affine"), *INSIDE[name]]))
    calibrate(net, [x], run=lambda batch: net(*batch))
    with torch.no_grad():
        want = net.eval()(*x)
    path = tmp_path / "model.onnx"
    export_onnx(net, x, path, dynamic_batch=False)
    session = onnx_session(path, threads=1)
    (got,) = session.run(None, {i.name: value.numpy() for i, value in zip(session.get_inputs(), x, strict=True)})
    apart = (torch.from_numpy(got) - want).abs() / want.abs().max()
    assert apart.median() < 1e-5
    assert apart.max() < 0.02
    plain = make()
    plain.load_state_dict(
        {key: value for key, value in net.state_dict().items() if "quantized_" not in key and "_quantizer" not in key}
    )
    prepare(plain, QuantPlan([Rule("*", weight="int8 per_channel", input="uint8 affine")]))
    calibrate(plain, [x], run=lambda batch: plain(*batch))
    with torch.no_grad():
        assert (plain.eval()(*x) - want).abs().max() > 1e-4, "it makes a difference"


def test_what_no_file_holds_is_refused_by_name(tmp_path: Path) -> None:
    net, x = First(nn.LSTM(16, 6, batch_first=True)), torch.randn(X)
    prepare(
        net, QuantPlan([Rule("*", weight="int8 per_channel", input="uint8 affine"), Rule("*.cell_l0", input="mxint8")])
    )
    calibrate(net, [x])
    with pytest.raises(ExportError, match=r"inner.cell_l0.input_0 \(mxint8\): its scales are found at run time"):
        export_onnx(net.eval(), (x,), tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


def test_a_sequence_that_keeps_its_length_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Dim 0 of a sequence `[L, N, C]` is its length, which the steps of a quantized state fix."""
    torch.manual_seed(0)
    for batch_first in (False, True):
        net, x = First(nn.LSTM(16, 6, batch_first=batch_first)), torch.randn(X)
        prepare(net, "w8a8")
        calibrate(net, [x])
        caplog.clear()
        export_onnx(net.eval(), (x,), tmp_path / "model.onnx")
        assert ("is always 3 in" in caplog.text) == (not batch_first)
        shape = onnx.load(tmp_path / "model.onnx").graph.input[0].type.tensor_type.shape.dim
        assert shape[0].HasField("dim_param") == batch_first
