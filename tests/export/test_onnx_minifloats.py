"""FP8 and FP4 in ONNX files at their own bits: the file's content read by ml_dtypes, and the runtimes' numbers."""

import numpy as np
import pytest
import torch
from torch import nn

from lq_plugin import QuantPlan, Rule, calibrate, prepare
from lq_plugin.errors import ExportError
from lq_plugin.export import export_model
from lq_plugin.model import quantized_layers
from tests.models import randomize

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
ml_dtypes = pytest.importorskip("ml_dtypes")

from onnx import TensorProto, numpy_helper  # noqa: E402

from lq_plugin.export import OpenVINOSession, export_onnx, onnx_session  # noqa: E402
from lq_plugin.export.onnx_file.float_model import float_graph  # noqa: E402
from tests.export.test_biases import plain  # noqa: E402

E4M3, E5M2, E2M1 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.float4_e2m1fn
#: Spec and `fp4`; the types of the numbers and of their scales in the file; elements of a block; bits a weight takes.
CASES = {
    ("mxfp8", "int8"): ("FLOAT8E4M3FN", E4M3, "FLOAT8E8M0", 32, 8.25),
    ("mxfp8_e5m2:rceil", "int8"): ("FLOAT8E5M2", E5M2, "FLOAT8E8M0", 32, 8.25),
    ("mxfp6_e3m2", "int8"): ("FLOAT8E4M3FN", E4M3, "FLOAT8E8M0", 32, 8.25),
    ("mxfp4", "uint4"): ("UINT4", E2M1, "FLOAT8E8M0", 32, 4.25),
    ("mxfp4:rceil", "float4"): ("FLOAT4E2M1", E2M1, "FLOAT8E8M0", 32, 4.25),
    ("nvfp4", "uint4"): ("UINT4", E2M1, "FLOAT8E4M3FN", 16, 4.5),
    ("nvfp4", "float4"): ("FLOAT4E2M1", E2M1, "FLOAT8E4M3FN", 16, 4.5),
}
IDS = [f"{spec.partition(':')[0]} {fp4}" for spec, fp4 in CASES]


class Net(nn.Module):
    """A convolution before a batch norm, an embedding, linear layers, one of them used twice."""

    def __init__(self, channels=32, outputs=6):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, 64, 3, padding=1), nn.BatchNorm2d(64)
        self.embedding = nn.Embedding(7, 64)
        self.twice, self.head = nn.Linear(64, 64), nn.Linear(64, outputs)

    def forward(self, x, tokens):
        x = torch.relu(self.norm(self.conv(x))).mean((2, 3))
        return self.head(torch.relu(self.twice(torch.relu(self.twice(x)))) + self.embedding(tokens))


def example(channels=32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(5, channels, 6, 6, generator=generator), torch.tensor([0, 3, 6, 2, 2])


def network(**sizes):
    torch.manual_seed(0)
    net = randomize(Net(**sizes)).eval()
    with torch.no_grad():
        net.norm.weight[:5] *= -1
        net.head.weight[1] = 0  # blocks of zeros
        net.twice.weight[:, 32:] *= 1e-4
    return net


@pytest.fixture(scope="module")
def graph():
    """The float model's, which takes the exporter seconds: files of all plans are made of it."""
    return float_graph(network(), example(), tuple({0: torch.export.Dim("batch")} for _ in example()))


def quantized(spec, inputs=None, **sizes):
    net = network(**sizes)
    plan = [Rule("*", weight=spec), Rule("type:Linear", weight=spec, input=inputs)]
    prepare(net, QuantPlan(plan))
    calibrate(net, [example(sizes.get("channels", 32))], run=lambda batch: net(*batch))
    return net


def run(session, *inputs):
    return session.run(None, {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs, strict=True)})[0]


def sessions(path, fp4):
    """Every runtime that has kernels for the file, as we open it."""
    opened = [] if fp4 == "float4" else [onnx_session(path, threads=1)]
    if pytest.importorskip("openvino"):
        opened.append(OpenVINOSession(path, threads=1))
    return opened


def unpacked(tensor, dtype):
    """Numbers of a constant by its raw bytes, the first of two in the low bits."""
    raw = np.frombuffer(tensor.raw_data, np.uint8)
    if dtype is E2M1:
        raw = np.stack([raw & 15, raw >> 4], 1).reshape(-1)[: int(np.prod(tensor.dims))]
    return raw.view(dtype).astype(np.float64).reshape(tensor.dims)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_the_content_of_the_file_is_the_weight_bit_for_bit(case, graph, tmp_path):
    (spec, fp4), (kind, dtype, scale_kind, block, bits) = case, CASES[case]
    net = quantized(spec)
    export_onnx(net, example(), tmp_path / "net.onnx", fp4=fp4, exported=graph)
    constants = {tensor.name: tensor for tensor in onnx.load(tmp_path / "net.onnx").graph.initializer}
    for name in ("conv", "twice", "head", "embedding"):
        codes, scales = constants[f"{name}.weight_codes"], constants[f"{name}.weight_scale_codes"]
        assert TensorProto.DataType.Name(codes.data_type) == kind
        assert TensorProto.DataType.Name(scales.data_type) == scale_kind
        numbers = unpacked(codes, dtype)
        scale = unpacked(scales, ml_dtypes.float8_e8m0fnu if scale_kind == "FLOAT8E8M0" else E4M3)
        if f"{name}.weight_scale_of_all" in constants:
            whole = numpy_helper.to_array(constants[f"{name}.weight_scale_of_all"])
            scale = scale.astype(np.float32) * whole
        axis = 0 if name in ("twice", "head") else 1  # runtimes have kernels for [C_in, C_out]
        weight = numbers.astype(np.float32) * scale.astype(np.float32).repeat(block, axis)
        want = getattr(net, name).quantized_weight().detach().numpy()
        np.testing.assert_array_equal(weight.T if axis == 0 else weight, want)
        stored = len(codes.raw_data) + len(scales.raw_data)
        assert 8 * stored / want.size == pytest.approx(bits, abs=0.01)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_runtimes_compute_what_the_model_does(case, graph, tmp_path):
    spec, fp4 = case
    net, path = quantized(spec), tmp_path / "net.onnx"
    assert export_onnx(net, example(), path, fp4=fp4, exported=graph) == path.stat().st_size
    want = net(*example()).detach().numpy()
    for session in sessions(path, fp4):
        np.testing.assert_allclose(run(session, *example()), want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.slow
@pytest.mark.parametrize("case", [("mxfp8", "int8"), ("mxfp4", "uint4"), ("nvfp4", "float4")])
@pytest.mark.parametrize("sizes", [{"channels": 20}, {"outputs": 7}], ids=["ragged blocks", "odd outputs"])
def test_shapes_that_kernels_do_not_take(case, sizes, tmp_path):
    """OpenVINO reads no blocks that do not divide their axis, nor INT4 rows of odd lengths; FLOAT4E2M1 may be odd."""
    spec, fp4 = case
    net, path = quantized(spec, **sizes), tmp_path / "net.onnx"
    inputs = example(sizes.get("channels", 32))
    export_onnx(net, inputs, path, fp4=fp4)
    kinds = {tensor.name: tensor.data_type for tensor in onnx.load(path).graph.initializer}
    if fp4 == "float4":
        ragged = "channels" in sizes
        assert kinds["conv.weight_codes"] == (TensorProto.UINT4 if ragged else TensorProto.FLOAT4E2M1)
        assert kinds["head.weight_codes"] == TensorProto.FLOAT4E2M1
    want = net(*inputs).detach().numpy()
    for session in sessions(path, fp4):
        np.testing.assert_allclose(run(session, *inputs), want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("case", [("mxfp8", "int8"), ("nvfp4", "uint4"), ("mxfp4", "float4")])
def test_next_to_quantized_activations_they_stay_as_they_are(case, graph, tmp_path):
    """ONNX Runtime makes int8 of what it takes for float weights there, one scale for a whole tensor."""
    spec, fp4 = case
    net, path = quantized(spec, "uint8 affine"), tmp_path / "net.onnx"
    export_onnx(net, example(), path, fp4=fp4, exported=graph)
    want = net(*example()).detach().numpy()
    for session in (*sessions(path, fp4), *([plain(path)] if fp4 != "float4" else [])):
        got = run(session, *example())
        # A value between two levels of an activation may go either way.
        assert np.median(np.abs(got - want)) <= 1e-5 * np.abs(want).max()
        assert np.abs(got - want).max() <= 0.02 * np.abs(want).max()


def test_onnx_runtime_makes_float_weights_of_them_once(graph, tmp_path):
    """After loading, products with float constants are left, and no node for each run."""
    import onnxruntime

    export_onnx(quantized("mxfp8"), example(), tmp_path / "net.onnx", exported=graph)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(tmp_path / "net.onnx"), options, providers=["CPUExecutionProvider"])
    left = onnx.load(tmp_path / "optimized.onnx")
    assert not {"Cast", "Expand", "DequantizeLinear", "Slice"}.intersection(node.op_type for node in left.graph.node)
    assert TensorProto.FLOAT8E4M3FN not in {tensor.data_type for tensor in left.graph.initializer}


def test_openvino_multiplies_with_four_bits(graph, tmp_path):
    pytest.importorskip("openvino")
    export_onnx(quantized("mxfp4"), example(), tmp_path / "net.onnx", fp4="float4", exported=graph)
    compiled = OpenVINOSession(tmp_path / "net.onnx", threads=1).compiled
    nodes = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
    kinds = {(node["layerType"].astype(str), node["runtimePrecision"].astype(str)) for node in nodes}
    assert ("FullyConnected", "f4e2m1") in kinds


def test_four_bits_of_onnx_runtime_are_advised_where_it_has_no_kernel(graph, tmp_path):
    export_onnx(quantized("mxfp4"), example(), tmp_path / "net.onnx", fp4="float4", exported=graph)
    with pytest.raises(ExportError, match="no kernels for FLOAT4E2M1: export with fp4=uint4 or fp4=int8"):
        onnx_session(tmp_path / "net.onnx")


def test_the_default_is_bytes_with_a_fast_kernel(graph, tmp_path):
    net = quantized("mxfp4")
    whole, half = tmp_path / "net.onnx", tmp_path / "half.onnx"
    export_onnx(net, example(), whole, exported=graph)
    export_model(net, half, example(), fp4="uint4")
    weights = sum(layer.weight.numel() for _, layer in quantized_layers(net))
    assert whole.stat().st_size - half.stat().st_size > 0.3 * weights  # the graph is a few kilobytes larger
    kinds = {t.name: t.data_type for t in onnx.load(tmp_path / "net.onnx").graph.initializer}
    assert kinds["twice.weight_codes"] == TensorProto.INT8
    with pytest.raises(ExportError, match="fp4 is int8, uint4 or float4, got 'float'. Did you mean 'float4'"):
        export_model(net, tmp_path / "net.onnx", example(), fp4="float")
