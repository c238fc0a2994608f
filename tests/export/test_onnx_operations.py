"""Quantized operands of sums, products and concatenations as ONNX, and in packed files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lq_plugin import QuantPlan, Rule, calibrate, prepare
from lq_plugin.errors import ExportError
from lq_plugin.model.graph.record import record

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from lq_plugin.export import export_onnx, load_packed, onnx_session, save_packed, verify  # noqa: E402
from lq_plugin.export.target import TARGETS  # noqa: E402


class Block(nn.Module):
    """Every operation there is a node for; the layer that is defined first runs last."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.first, self.other = nn.Linear(16, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x) + self.other(x)
        y = y * torch.sigmoid(x) - x
        scores = torch.matmul(y, x.transpose(-1, -2)).softmax(-1)
        y += torch.bmm(scores, x)
        return self.last(torch.cat([x, y], -1) + 1.0)


class Net(nn.Module):
    def __init__(self, calls: int = 1) -> None:
        super().__init__()
        self.block, self.head, self.calls = Block(), nn.Linear(8, 4), calls

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.calls):
            x = x + self.block(x)
        return self.head(x)


OPERATIONS = [
    "add_0",
    "block.add_0",
    "block.mul_0",
    "block.sub_0",
    "block.matmul_0",
    "block.bmm_0",
    "block.add_1",
    "block.cat_0",
]


def prepared(net: nn.Module, x: Tensor, *rules: Rule) -> nn.Module:
    net.eval()
    plan = QuantPlan([Rule("*", weight="int8 per_channel", input="uint8 affine"), *rules])
    prepare(net, plan, record(net, lambda: net(x)))
    calibrate(net, [x])
    return net.eval()


@torch.no_grad()
@pytest.mark.parametrize("spec", ["uint8 affine", "int6"])
def test_the_runtime_computes_what_we_do(spec: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = Net(), torch.randn(3, 5, 8)
    assert set(OPERATIONS) <= {call.name for call in record(net.eval(), lambda: net(x)).functional_calls}
    prepared(net, x, *(Rule(name, input=spec) for name in OPERATIONS))
    layers_only = prepared(Net(), x)
    layers_only.load_state_dict(net.state_dict(), strict=False)
    export_onnx(net, (x,), tmp_path / "net.onnx", input_names=["x"])
    (got,) = onnx_session(tmp_path / "net.onnx", threads=1).run(None, {"x": x.numpy()})
    want = net(x)
    apart = (torch.from_numpy(got) - want).abs() / want.abs().max()
    assert apart.median() < 1e-5
    # A value on the border between two levels may fall to the other side; operands left float are further away than
    # that.
    assert apart.mean() < 0.1 * (layers_only(x) - want).abs().mean() / want.abs().max()
    assert apart.max() < 0.05


@torch.no_grad()
def test_packed_files_hold_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x, other = Net(), torch.randn(3, 5, 8), Net()
    prepared(net, x, *(Rule(name, input="uint4 affine") for name in OPERATIONS))
    save_packed(net, tmp_path / "net.safetensors")
    load_packed(other, tmp_path / "net.safetensors")
    assert torch.equal(other(x), net(x))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        # torch's exporter knows it with heads alone.
        return F.scaled_dot_product_attention(*(y.unsqueeze(1) for y in (self.q(x), self.k(x), x)))


@pytest.mark.parametrize(
    ("net", "name"),
    [(Attention(), "scaled_dot_product_attention_0"), (Net(calls=2), "block.mul_0"), (Net(calls=2), "block.add_0")],
)
def test_what_has_no_one_node_is_refused(net: nn.Module, name: str, tmp_path: Path) -> None:
    x = torch.randn(3, 5, 8)
    prepared(net, x, Rule(name, input="uint8 affine"))
    with pytest.raises(ExportError, match=f"{name}: the exported graph has no one node for this"):
        export_onnx(net, (x,), tmp_path / "net.onnx")
    assert not (tmp_path / "net.onnx").exists()


@torch.no_grad()
def test_layers_of_one_input_may_run_in_another_order_than_they_are_defined(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.second, self.first = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.first(x)) + self.second(x)

    torch.manual_seed(0)
    x = torch.randn(4, 8)
    net = prepared(Two(), x)
    export_onnx(net, (x,), tmp_path / "net.onnx", input_names=["x"])
    (got,) = onnx_session(tmp_path / "net.onnx", threads=1).run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), net(x), rtol=1e-3, atol=1e-3)


class Bent(nn.Module):
    """Two convolutions with activation functions that are no part of them, and a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.act = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Hardswish()
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(self.b(self.act(self.a(x))))
        return self.head(x.mean((2, 3)))


def test_rounding_before_an_activation_function_makes_integer_convolutions(tmp_path: Path) -> None:
    """ONNX Runtime computes a convolution with integers only where its result is rounded."""
    torch.manual_seed(0)
    x, path, integer = torch.randn(8, 3, 16, 16), tmp_path / "net.onnx", []
    for rules in ([], [Rule(name, input="uint8 affine") for name in ("type:hardswish", "sigmoid_0", "mean_0")]):
        net = Bent().eval()
        plan = QuantPlan([Rule("*", weight="int8 per_channel", input="uint8 affine"), *rules])
        prepare(net, plan, record(net, lambda: net(x)))  # noqa: B023
        calibrate(net, [x])
        export_onnx(net, (x,), path)
        assert verify(net, path, [x]).within_one_step == 1
        found = TARGETS["onnx"].products(path, "onnxruntime")
        assert found is not None
        integer.append(dict(found.integer))
    assert integer == [{"QGemm": 1}, {"QLinearConv": 2, "QGemm": 1}]
