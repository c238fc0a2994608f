"""Linear layers as torchao's int8 tensors: the same numbers, the same integers, and what stays behind."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor, nn

import lq_plugin
from lq_plugin import QuantPlan, Rule
from lq_plugin.errors import ExportError
from lq_plugin.export import use_torchao
from lq_plugin.export.torchao import RowsLinear
from lq_plugin.layers import QuantizedLayer

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")


def prepared(net: nn.Module, x: Tensor, weight: str, inputs: str | None) -> nn.Module:
    lq_plugin.prepare(net, QuantPlan([Rule("*", weight=weight, input=inputs)]))
    lq_plugin.calibrate(net, [x])
    return net.eval()


@pytest.mark.parametrize("weight", ["int8 per_channel mse", "int8 per_tensor narrow", "int4 per_channel"])
@pytest.mark.parametrize("inputs", ["uint8 affine mse", "uint8", "int8", "int8 affine", None])
@pytest.mark.parametrize("shape", [(5, 24), (2, 3, 24), (24,)])
def test_the_layer_computes_what_the_quantized_one_does(
    weight: str, inputs: str | None, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    net = prepared(nn.Sequential(nn.Linear(24, 16)), torch.randn(64, 24), weight, inputs)
    x = 2 * torch.randn(shape)  # beyond the range, too
    want, levels = net(x), net[0].weight_quantizer
    scale = levels.qparams(net[0].weight)[0]
    assert use_torchao(net) == {}
    torch.testing.assert_close(net(x), want, rtol=1e-5, atol=1e-5)
    # The reference is plain: whole numbers times scales.
    assert net[0].weight.qdata.dtype == torch.int8
    assert int(net[0].weight.qdata.abs().max()) <= 2 ** (levels.spec.bit_width - 1)
    assert torch.equal(net[0].weight.scale, scale.reshape(-1, 1).expand(16, 1))


def test_integer_products_are_exact() -> None:
    """Against whole-number arithmetic in int64: no rounding hides between quantizing and scaling."""
    torch.manual_seed(1)
    net = prepared(
        nn.Sequential(nn.Linear(300, 8, bias=False)), torch.randn(64, 300), "int8 per_channel", "uint8 affine"
    )
    x, quantizer = torch.randn(4, 300), net[0].input_quantizer
    input_scale, zero_point = (value.detach().reshape(()) for value in quantizer.qparams())
    q_x = ((x / input_scale).round() + zero_point).clamp(0, 255).long() - zero_point.long()
    use_torchao(net)
    exact = (
        (q_x @ net[0].weight.qdata.long().T).double() * input_scale.double() * net[0].weight.scale.flatten().double()
    )
    torch.testing.assert_close(net(x).double(), exact, rtol=1e-5, atol=1e-6)


def test_state_dicts_travel_and_compile() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 6, 24)
    net = prepared(nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 3)), x, "int8 per_channel", "uint8 affine")
    use_torchao(net)
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    other = nn.Sequential(RowsLinear(24, 16), nn.ReLU(), RowsLinear(16, 3))
    other.load_state_dict(torch.load(file, weights_only=True), assign=True)
    assert torch.equal(other(x), net(x))
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), net(x))


def test_what_torchao_has_no_kernel_for_stays_and_is_named() -> None:
    net = nn.Sequential(nn.Conv1d(4, 4, 1), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    rules = [Rule("0", weight="int8"), Rule("1", weight="int8", input="uint4 affine"), Rule("2", weight="int4 group4")]
    rules += [Rule("3", weight="bwn"), Rule("4", weight="int8 per_channel")]
    lq_plugin.prepare(net, QuantPlan(rules))
    lq_plugin.calibrate(net, [torch.randn(2, 4, 8)])
    assert use_torchao(net.eval()) == {
        "0": "QuantizedConv1d has none, linear layers do",
        "1": "its input is 'uint4 affine', not an integer of 8 bits per tensor",
        "2": "its weight is 'int4 group4', not a symmetric integer of at most 8 bits per channel or per tensor",
        "3": "its weight is 'bwn', not a symmetric integer of at most 8 bits per channel or per tensor",
    }
    assert isinstance(net[3], QuantizedLayer)
    assert not isinstance(net[4], QuantizedLayer)


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (
            nn.Sequential(nn.Conv1d(4, 4, 1)),
            "no layer of Sequential has an integer kernel in torchao.*0: QuantizedConv1d has none",
        ),
        (nn.Sequential(nn.Linear(4, 4)), "0: it has no range yet: calibrate it"),
    ],
)
def test_nothing_to_do_is_an_error(net: nn.Module, message: str) -> None:
    lq_plugin.prepare(net, QuantPlan([Rule("*", weight="int8 mse", input="uint8 affine")]))
    with pytest.raises(ExportError, match=f"(?s){message}"):
        use_torchao(net)


@pytest.mark.parametrize(
    ("inputs", "vnni", "said"), [("uint8 affine", False, True), ("uint8 affine", True, False), (None, False, False)]
)
def test_a_processor_that_is_slow_at_it_is_said(
    inputs: str | None, vnni: bool, said: bool, monkeypatch, caplog
) -> None:
    monkeypatch.setattr("lq_plugin.export.torchao.sums_exactly", lambda weight: vnni)
    net = prepared(nn.Sequential(nn.Linear(24, 16)), torch.randn(64, 24), "int8 per_channel", inputs)
    with caplog.at_level("WARNING", "lq_plugin.export.torchao"):
        use_torchao(net)
    assert ("without VNNI" in caplog.text) == said
