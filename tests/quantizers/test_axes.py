"""Axes and group sizes against real shapes: what does not fit is one of the library's errors, before anything is
kept."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

from lq_plugin import PlanError, QuantizationError, QuantPlan, Rule, calibrate, prepare
from lq_plugin.export import load_packed, save_packed
from lq_plugin.model import quantizers
from lq_plugin.model.graph.record import record


def case(kind: str, batched: bool) -> tuple[nn.Module, Tensor, int]:
    """A layer of one kind, an input of it, and the input's channel axis; no two of its sizes are equal."""
    torch.manual_seed(0)
    layer, shape, axis = {
        "Linear": (nn.Linear(6, 10), (4, 6), 1),
        "Linear of sequences": (nn.Linear(6, 10), (3, 5, 6), 2),
        "Conv1d": (nn.Conv1d(6, 10, 3), (4, 6, 9), 1),
        "Conv2d": (nn.Conv2d(6, 10, 3), (4, 6, 9, 8), 1),
    }[kind]
    return layer, torch.randn(shape if batched else shape[1:]), axis if batched else axis - 1


kinds = st.sampled_from(["Linear", "Linear of sequences", "Conv1d", "Conv2d"])


@settings(max_examples=60, deadline=None)
@given(
    kind=kinds,
    batched=st.booleans(),
    axis=st.one_of(st.none(), st.integers(-6, 8), st.sampled_from([-(10**8), 10**8])),
    bits=st.sampled_from(["int8", "uint8 affine", "int4 lsq", "uint4 pact", "int8 mse", "uint8 affine ema"]),
)
def test_an_input_keeps_its_channel_axis_or_the_plan_is_refused(
    kind: str, batched: bool, axis: int | None, bits: str
) -> None:
    layer, x, channel_axis = case(kind, batched)
    net = nn.Sequential(layer)
    spec = f"{bits} per_channel" + ("" if axis is None else f":{axis}")
    fits = axis is None or (-x.ndim <= axis < x.ndim and axis % x.ndim == channel_axis)

    def run() -> Tensor:
        prepare(net, QuantPlan([Rule("*", weight="int8 per_channel", input=spec)]))
        calibrate(net, [x])
        return net(x)

    if not fits:
        with pytest.raises(QuantizationError, match=f"axis {axis}") as caught:
            run()
        # A plan is refused without looking at data; else the message has the shape that was seen.
        assert isinstance(caught.value, PlanError) or str(list(x.shape)) in str(caught.value)
        return
    assert run().isfinite().all()
    (found,) = [quantizer for quantizer in quantizers(net) if quantizer.name == "0.input"]
    assert len(found.qparams()[0].flatten()) == 6


@settings(max_examples=30, deadline=None)
@given(
    kind=kinds,
    granularity=st.one_of(
        st.integers(-5, 9).map("per_channel:{}".format),
        st.integers(1, 40).map("group{}".format),
        st.integers(1, 40).map("group{} ragged".format),
        st.integers(1, 40).map("group{}:4".format),
    ),
)
def test_a_weight_s_granularity_fits_its_shape_or_the_plan_is_refused(kind: str, granularity: str) -> None:
    layer, x, _ = case(kind, True)
    net = nn.Sequential(copy.deepcopy(layer))
    number = int(re.findall(r"-?\d+", granularity)[0])
    per_channel = granularity.startswith("per_channel")
    fits = number == 0 if per_channel else "ragged" in granularity or 6 % number == 0
    plan = QuantPlan([Rule("*", weight=f"int8 {granularity}")])
    if not fits:
        with pytest.raises(PlanError, match=str(number)):
            prepare(net, plan)
        assert type(net[0]) is type(layer)
        return
    prepare(net, plan)
    torch.testing.assert_close(net(x), layer(x), rtol=0.05, atol=0.1)


def test_a_packed_file_says_what_axis_it_keeps(tmp_path: Path) -> None:
    """The file knows the layer, not what it will read."""
    net = nn.Sequential(nn.Linear(6, 10))
    prepare(net, QuantPlan([Rule("*", weight="int8 per_channel", input="int8 per_channel:2")]))
    x = torch.randn(3, 5, 6)
    calibrate(net, [x])
    save_packed(net, tmp_path / "net.safetensors")
    loaded = nn.Sequential(nn.Linear(6, 10))
    load_packed(loaded, tmp_path / "net.safetensors")
    assert torch.equal(loaded(x), net(x))
    for shape in ((5, 6), (3, 6, 5)):
        with pytest.raises(QuantizationError, match=r"0\.input.*6 channels on axis 2, got a tensor of shape \["):
            loaded(torch.randn(shape))


@pytest.mark.parametrize("axis", [1, 2, 7, -3, -4])
@pytest.mark.parametrize("spec", ["int8", "uint8 affine ema", "int4 lsq", "int8 mse"])
def test_an_output_keeps_its_channel_axis_or_is_refused(axis: int, spec: str) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 10)), torch.randn(4, 6)

    def run() -> Tensor:
        prepare(net, QuantPlan([Rule("*", weight="int8 per_channel", output=f"{spec} per_channel:{axis}")]))
        calibrate(net, [x])
        return net(x)

    if axis == 1:
        assert run().shape == (4, 10)
        return
    with pytest.raises(QuantizationError, match=f"axis {axis}"):
        run()


class Products(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x @ y


@pytest.mark.parametrize("spec", ["int8 per_channel:7", "uint8 affine per_channel:-9", "int8 per_channel:2"])
def test_an_operand_s_axis_that_is_not_there_is_refused(spec: str) -> None:
    """Products of two activations: the layer is an operation, found in a recorded batch."""
    net, x, y = Products(), torch.randn(4, 6), torch.randn(6, 5)
    recording = record(net, lambda: net(x, y))

    def run() -> None:
        prepare(net, QuantPlan([Rule("matmul_0", input=spec)]), recording)
        calibrate(net, [(x, y)], run=lambda batch: net(*batch))
        net(x, y)

    with pytest.raises(QuantizationError, match=r"per_channel|axis"):
        run()


@pytest.mark.parametrize(
    "spec",
    [
        *("int8 dynamic", "uint8 affine per_token dynamic", "int8 group4 dynamic", "int8 group4:8", "mx6", "mxfp8"),
        *("nvfp4", "fp8", "fp8 group4 dynamic", "sign"),
    ],
)
@pytest.mark.parametrize("shape", [(8,), (4, 8), (2, 4, 8), (1, 2, 3, 8), (0, 8)])
def test_inputs_have_any_number_of_dims(spec: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(8, 3)), torch.randn(shape)
    prepare(net, QuantPlan([Rule("*", weight="int8 per_channel", input=spec)]))
    calibrate(net, [torch.randn(4, 8)])
    y = net(x)
    assert y.shape == (*shape[:-1], 3)
    assert y.isfinite().all()


@pytest.mark.parametrize(("axis", "shape"), [(1, (8,)), (2, (4, 8)), (1, (4, 8, 8)), (0, (4, 8))])
def test_a_dynamic_axis_that_is_not_there_is_refused(axis: int, shape: tuple[int, ...]) -> None:
    net = nn.Sequential(nn.Linear(8, 3))
    prepare(net, QuantPlan([Rule("*", weight="int8 per_channel", input=f"int8 per_channel:{axis} dynamic")]))
    calibrate(net, [])
    if axis == 1 and len(shape) == 3:
        assert net(torch.randn(shape)).shape == (4, 8, 3)  # of another axis with as many elements, as it is written
        return
    with pytest.raises(QuantizationError, match=f"axis {axis}"):
        net(torch.randn(shape))
