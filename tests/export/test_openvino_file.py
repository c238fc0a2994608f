"""Target `openvino`: OpenVINO's own files have 2 and 3 bits, and compute what the model computes."""

import numpy as np
import pytest
import torch
from torch import nn

from lq_plugin import calibrate, prepare
from lq_plugin.errors import ExportError
from lq_plugin.export import certify, export_model
from lq_plugin.export.target import TARGETS, target_of

openvino = pytest.importorskip("openvino")
pytest.importorskip("onnx")

from lq_plugin.export import OpenVINOSession  # noqa: E402
from lq_plugin.export.openvino_file import narrow, pack  # noqa: E402


def images():
    return torch.randn(9, 8, 6, 6, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """A convolution, a depthwise one, and linear layers of 32 and of 30 inputs."""

    def __init__(self):
        super().__init__()
        self.conv, self.depthwise = nn.Conv2d(8, 32, 3, padding=1), nn.Conv2d(32, 32, 3, groups=32)
        self.wide, self.odd = nn.Linear(32, 30), nn.Linear(30, 5)

    def forward(self, x):
        x = torch.relu(self.depthwise(torch.relu(self.conv(x)))).mean((2, 3))
        return self.odd(torch.relu(self.wide(x)))


def quantized(plan):
    torch.manual_seed(0)
    net = Net()
    prepare(net, plan)
    calibrate(net, [images()])
    return net.eval()


def types(path):
    """Element type of each quantized weight of a file, by its number of elements."""
    constants = [node for node in openvino.Core().read_model(path).get_ops() if node.get_type_name() == "Constant"]
    return {
        int(np.prod(node.shape)): node.get_element_type().get_type_name()
        for node in constants
        if not node.get_element_type().is_real() and len(node.shape) > 1 and np.prod(node.shape) > 100
    }


CONV, DEPTHWISE, WIDE, ODD = 32 * 8 * 9, 32 * 9, 32 * 30, 30 * 5


@pytest.mark.parametrize(
    ("plan", "kept", "small"),
    [
        ("w2 per_channel", {CONV: "u2", DEPTHWISE: "u2", WIDE: "u2"}, {}),
        pytest.param("twn", {CONV: "u2", DEPTHWISE: "u2", WIDE: "u2"}, {}, marks=pytest.mark.slow),
        pytest.param("uint2 per_channel affine", {CONV: "u2", DEPTHWISE: "u2", WIDE: "u2"}, {}, marks=pytest.mark.slow),
        ("int3 per_channel", {CONV: "u3", DEPTHWISE: "u3", WIDE: "i4"}, {WIDE: "u3", ODD: "u3"}),
        pytest.param(
            "uint3 per_channel affine",
            {CONV: "u3", DEPTHWISE: "u3", WIDE: "u4"},
            {WIDE: "u3", ODD: "u3"},
            marks=pytest.mark.slow,
        ),
        ("w2a8", {CONV: "u2", DEPTHWISE: "u2", WIDE: "u2", ODD: "u2"}, {}),
        pytest.param("w4", {CONV: "i4", DEPTHWISE: "i4", WIDE: "i4"}, {}, marks=pytest.mark.slow),
        pytest.param("w8a8", {CONV: "i8", DEPTHWISE: "i8", WIDE: "i8"}, {}, marks=pytest.mark.slow),
    ],
)
def test_weights_take_their_bits_and_the_numbers_are_those_of_the_model(plan, kept, small, tmp_path):
    net = quantized(plan)
    with torch.no_grad():
        wanted = net(images()).numpy()
    for options in [{}, {"three_bits": True}] if small else [{}]:
        path = tmp_path / f"{len(options)}" / "net.xml"
        path.parent.mkdir()
        size = export_model(net, path, (images(),), **options)
        assert size == sum(file.stat().st_size for file in path.parent.iterdir())
        found = types(path)
        expected = kept | (small if options else {})
        assert {count: found[count] for count in expected} == expected
        session = OpenVINOSession(path)
        (got,) = session.run(None, {session.names[0]: images().numpy()})
        # A sum in another order may turn a rounded activation to its next level, seldom.
        assert np.abs(got - wanted).max() < (0.02 if "a8" in plan else 1e-5) * np.abs(wanted).max()
        assert np.abs(got - wanted).mean() < (5e-3 if "a8" in plan else 1e-6) * np.abs(wanted).mean()


@pytest.mark.parametrize("plan", ["w2a8", pytest.param("w3a8", marks=pytest.mark.slow), "w4a8"])
def test_every_product_between_integers_is_one(plan, tmp_path):
    """Whatever the bits of the weights; in an ONNX file 4 bits make the linear layers float."""
    net, path = quantized(plan), tmp_path / "net.xml"
    export_model(net, path, (images(),))
    found = certify(net, path, [images()])
    assert found.products.integer == {"Convolution": 2, "FullyConnected": 2}
    assert not found.products.floating
    assert found.bytes == sum(file.stat().st_size for file in tmp_path.iterdir())


@pytest.mark.parametrize("affine", [False, True], ids=["symmetric", "affine"])
@pytest.mark.parametrize("turned", [False, True], ids=["outputs first", "inputs first"])
def test_linear_layers_of_any_number_of_inputs(turned, affine):
    """Two bits are written where the inputs are a multiple of 4: elsewhere their sums are wrong from 5 rows on."""
    from openvino import opset13 as ops

    rng = np.random.default_rng(0)
    for inputs in range(28, 37):
        q = rng.integers(0, 4, (7, inputs)).astype(np.uint8)
        scale, zero = rng.random((7, 1), np.float32) + 0.5, np.array([[2.0], [1], [0], [3], [2], [1], [2]], np.float32)
        held = openvino.Tensor(openvino.Type.u8, openvino.Shape((inputs, 7) if turned else (7, inputs)))
        held.data[:] = q.T if turned else q
        x, weight = ops.parameter([-1, inputs], np.float32), ops.convert(ops.constant(held), np.float32)
        if affine:
            weight = ops.subtract(weight, ops.constant(zero.T if turned else zero))
        weight = ops.multiply(weight, ops.constant(scale.T if turned else scale))
        model = openvino.Model([ops.matmul(x, weight, False, not turned)], [x])
        narrow(model, False)
        kinds = [n.get_element_type().get_type_name() for n in model.get_ops() if n.get_type_name() == "Constant"]
        assert ("u2" in kinds) == (inputs % 4 == 0)
        settings = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
        compiled = openvino.Core().compile_model(model, "CPU", settings)
        given = rng.standard_normal((9, inputs)).astype(np.float32)
        wanted = given @ ((q - (zero if affine else 0)) * scale).T
        assert np.abs(compiled(given)[0] - wanted).max() < 1e-4


def test_three_bits_are_packed_as_openvino_reads_them():
    """Every number at every place of a block, read back by OpenVINO."""
    from openvino import opset13 as ops

    for bits, kind in ((2, openvino.Type.u2), (3, openvino.Type.u3)):
        numbers = np.random.default_rng(bits).integers(0, 1 << bits, 333)
        held = openvino.Tensor(kind, openvino.Shape([333]))
        held.data.reshape(-1).view(np.uint8)[:] = pack(numbers, bits)
        x = ops.parameter([333], np.float32)
        model = openvino.Model([ops.add(x, ops.convert(ops.constant(held), np.float32))], [x])
        read = openvino.Core().compile_model(model, "CPU")(np.zeros(333, np.float32))[0]
        assert np.array_equal(read, numbers)


def test_paths_and_options(tmp_path):
    assert target_of("net.xml", None) is TARGETS["openvino"]
    net = quantized("w2")
    with pytest.raises(ExportError, match=r"three_bits is true or false, got 3"):
        export_model(net, tmp_path / "net.xml", (images(),), three_bits=3)
    with pytest.raises(ExportError, match="three_bits is an option of openvino, not of onnx"):
        export_model(net, tmp_path / "net.onnx", (images(),), three_bits=True)
    export_model(net, tmp_path / "net.xml", (images(),))
    (tmp_path / "net.bin").unlink()
    with pytest.raises(ExportError, match=r"net\.bin is missing next to it"):
        OpenVINOSession(tmp_path / "net.xml")


@pytest.mark.slow
def test_what_openvino_cannot_open_is_not_written(tmp_path):
    """Its reader of ONNX refuses two LSTM layers in a row with quantized inputs."""

    class Layers(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(6, 8, 2, batch_first=True)

        def forward(self, x):
            return self.lstm(x)[0]

    net, x = Layers().eval(), torch.randn(4, 5, 6)
    prepare(net, "w8a8")
    calibrate(net, [x])
    with pytest.raises(ExportError, match=r"net\.xml: OpenVINO cannot open such a file: .*broadcast"):
        export_model(net, tmp_path / "net.xml", (x,))
    assert not list(tmp_path.iterdir())


def test_what_else_reads_a_weight_stays_as_it_is():
    from openvino import opset13 as ops

    x = ops.parameter([2, 4], np.float32)
    for read in (lambda w: ops.relu(w), lambda w: ops.concat([x, x, w], 0), lambda w: ops.add(x, w)):
        levels = ops.convert(ops.constant(np.array([[0, 1, 2, 3]] * 2, np.int8)), np.float32)
        made = read(ops.multiply(levels, ops.constant(np.float32(0.5))))
        model = openvino.Model([made], [x])
        narrow(model, True)
        compiled = openvino.Core().compile_model(model, "CPU")
        assert np.isfinite(compiled(np.zeros((2, 4), np.float32))[0]).all()
