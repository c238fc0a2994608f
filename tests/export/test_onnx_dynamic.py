"""Ranges found at run time in ONNX files: DynamicQuantizeLinear computes what was trained, for any batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lq_plugin import QuantPlan, Rule, calibrate, prepare
from lq_plugin.errors import ExportError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from lq_plugin.export import export_model, export_onnx, onnx_session, verify  # noqa: E402


class Net(nn.Module):
    """Two readers of one tensor, a convolution, and a product of two activations."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.left, self.right = nn.Linear(8, 16), nn.Linear(8, 16)
        self.last = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.relu(self.conv(x)).flatten(2).transpose(1, 2)
        y: Tensor = self.last(torch.tanh(self.left(rows)) * self.right(rows))
        return y


def prepared(plan: object) -> Net:
    torch.manual_seed(0)
    net = Net()
    prepare(net, plan)
    calibrate(net, [torch.randn(16, 3, 6, 6)])
    return net.eval()


@pytest.mark.parametrize("level", [1, 4])
@pytest.mark.parametrize(
    "plan",
    [
        "int8 per_channel / uint8 affine dynamic",
        QuantPlan(
            [
                Rule("*", weight="int4 per_channel", input="uint8 affine dynamic"),
                Rule("right", weight="int8 per_channel", input="uint8 affine mse"),
                Rule("last", weight="float"),
            ]
        ),
    ],
    ids=["all", "mixed"],
)
def test_the_runtime_has_the_range_of_each_batch(plan: object, level: int, tmp_path: Path) -> None:
    net = prepared(plan)
    path = tmp_path / "net.onnx"
    export_onnx(net, (torch.randn(2, 3, 6, 6),), path)
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    # `left` and `right` read one tensor: one node where both find its range.
    assert kinds.count("DynamicQuantizeLinear") == 3
    session = onnx_session(path, level, threads=1)
    name = session.get_inputs()[0].name
    for size, batch in ((1.0, 5), (100.0, 1), (0.01, 2), (0.0, 2)):
        x = size * torch.randn(batch, 3, 6, 6)
        (y,) = session.run(None, {name: x.numpy()})
        with torch.no_grad():
            want = net(x)
        # A sum in another order may cross the middle of two levels of the next layer: one step of 255.
        torch.testing.assert_close(torch.from_numpy(y), want, rtol=0, atol=1e-5 + float(want.abs().max()) / 100)
        close = torch.isclose(torch.from_numpy(y), want, rtol=1e-4, atol=1e-5 * max(size, 1.0))
        assert close.float().mean() > 0.9


def test_one_layer_is_exact_up_to_the_order_of_sums(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 32))
    prepare(net, "w8a8 dynamic")
    calibrate(net, ())
    export_model(net.eval(), tmp_path / "net.onnx", (torch.randn(4, 64),))
    session = onnx_session(tmp_path / "net.onnx", 1, threads=1)
    for size in (1e-3, 1.0, 1e4):
        x = size * torch.randn(50, 64) + size
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), net(x).detach(), rtol=1e-5, atol=1e-5 * size)


def test_what_the_operator_does_not_compute_is_refused(tmp_path: Path) -> None:
    for spec in ("int8 dynamic", "uint8 dynamic", "uint4 affine dynamic", "fp8 dynamic", "uint8 affine group8 dynamic"):
        net = prepared(QuantPlan([Rule("left", weight="int8 per_channel", input=spec)]))
        with pytest.raises(ExportError, match=r"left\.input .*DynamicQuantizeLinear has unsigned 8-bit integers"):
            export_onnx(net, (torch.randn(2, 3, 6, 6),), tmp_path / "net.onnx")
    net = prepared("int8 per_channel / uint8 affine dynamic")
    with pytest.raises(ExportError, match="its range is found at run time, these files hold fixed ones"):
        export_onnx(net, (torch.randn(2, 3, 6, 6),), tmp_path / "net.onnx", signed=True)


def test_verify_runs_it(tmp_path: Path) -> None:
    net, x = prepared("int8 per_channel / uint8 affine dynamic"), torch.randn(2, 3, 6, 6)
    export_onnx(net, (x,), tmp_path / "net.onnx")
    assert verify(net, tmp_path / "net.onnx", [x]).agreement == 1.0
