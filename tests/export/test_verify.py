"""Verification measures agreement and errors of the outputs and batches that are asked for."""

import math

import pytest
import torch
from torch import nn

from lq_plugin import QuantPlan, Rule, calibrate, prepare
from lq_plugin.errors import ExportError
from lq_plugin.export import save_packed, verify
from lq_plugin.export.faults import one_input_faults


class Outputs(nn.Module):
    """A layer whose output is changed by `after`."""

    def __init__(self, after=lambda y: y, layer=None):
        super().__init__()
        self.layer, self.after = layer or nn.Linear(4, 3), after

    def forward(self, x):
        return self.after(self.layer(x))


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, a, b):
        return {"logits": self.layer(a) + b, "a": a}


def packed(model, path, batch):
    """The model is prepared, calibrated and written."""
    prepare(model, "w8a8")
    calibrate(model, [batch], run=(lambda x: model(*x)) if isinstance(batch, tuple) else model)
    save_packed(model.eval(), path)
    return model


@pytest.fixture
def path(tmp_path):
    torch.manual_seed(0)
    return tmp_path / "net.safetensors"


@pytest.fixture
def x():
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(1))


def test_nan_is_no_agreement(path, x):
    model = packed(Outputs(), path, x)

    def broken(y):
        return torch.where(torch.arange(3) == 1, torch.nan, y)

    # The first batch is whole: what comes later must not be forgotten, nor forget.
    calls = iter([False, True, False] * 2)
    result = verify(model, path, [x, x, x], lambda: Outputs(lambda y: broken(y) if next(calls) else y))
    assert math.isnan(result.largest_difference)
    assert not result.bit_equal
    assert result.agreement == pytest.approx(2 / 3)
    model.after = broken
    assert verify(model, path, [x], lambda: Outputs(broken)).agreement == 0.0


def test_infinity(path, x):
    def mask(y):
        return torch.where(torch.arange(3) == 1, -torch.inf, y)

    model = packed(Outputs(mask), path, x)
    same = verify(model, path, [x], lambda: Outputs(mask))
    assert (same.bit_equal, same.largest_difference, same.agreement) == (True, 0.0, 1.0)
    assert verify(model, path, [x], Outputs).largest_difference == math.inf


def flipped(y):
    """Another class for every pixel, the same place along the width."""
    return y.flip(1)


def test_classes_of_images_are_dim_1(path):
    images = torch.randn(2, 3, 5, 7)
    model = packed(Outputs(layer=nn.Conv2d(3, 4, 1)), path, images)
    other = lambda: Outputs(flipped, nn.Conv2d(3, 4, 1))  # noqa: E731
    assert verify(model, path, [images], lambda: Outputs(layer=nn.Conv2d(3, 4, 1))).samples == 2 * 5 * 7
    assert verify(model, path, [images], other).agreement == 0.0
    assert verify(model, path, [images], other, classes=-1).samples == 2 * 4 * 5
    with pytest.raises(ExportError, match=r"classes=4 is no dim of the first output, which has shape \[2, 4, 5, 7\]"):
        verify(model, path, [images], other, classes=4)


def test_classes_of_tokens_are_last(path):
    tokens = torch.randn(2, 5, 4)
    model = packed(Outputs(), path, tokens)
    assert verify(model, path, [tokens], Outputs).samples == 10
    assert verify(model, path, [tokens], lambda: Outputs(lambda y: y.roll(1, -1))).agreement == 0.0
    assert verify(model, path, [tokens], Outputs, classes=1).samples == 6


@pytest.mark.parametrize("kind", ["x", "(x,)", "(x, y)"])
def test_batches(path, x, kind):
    model = packed(Outputs(), path, x)
    batch = {"x": x, "(x,)": (x,), "(x, y)": [x, torch.zeros(8)]}[kind]
    if kind == "(x, y)":
        with pytest.raises(ExportError, match=r"batch 0 gives Outputs.forward 2 inputs: too many .*; say n_inputs=1"):
            verify(model, path, [batch], Outputs)
    assert verify(model, path, [batch], Outputs, n_inputs=1).bit_equal


def test_wrong_batches_are_named(path, x):
    model = packed(Outputs(), path, x)
    with pytest.raises(
        ExportError, match=r"batch 1 is a tensor, or .* \(a mapping that is one stands in a tuple\); got dict"
    ):
        verify(model, path, [x, {"x": x}], Outputs)
    with pytest.raises(ExportError, match="nothing to verify with"):
        verify(model, path, [], Outputs)


def test_every_output_is_compared(path, x):
    model = packed(Outputs(lambda y: {"logits": y, "boxes": (y, None)}), path, x)
    assert verify(model, path, [x], lambda: Outputs(model.after)).bit_equal
    result = verify(model, path, [x], lambda: Outputs(lambda y: {"logits": y, "boxes": (2 * y, None)}))
    assert (result.agreement, result.bit_equal, result.largest_difference) == (1.0, False, 1.0)
    with pytest.raises(ExportError, match=r"outputs of shapes \[\[8, 3\], \[8, 3\]\], the file \[\[8, 3\]\]"):
        verify(model, path, [x], Outputs)
    model.after = lambda y: "y"
    with pytest.raises(ExportError, match="the model's output is a tensor, .* got str"):
        verify(model, path, [x], Outputs)


def test_the_training_mode_is_restored(path, x):
    model = packed(Outputs(), path, x).train()
    model.layer.eval()
    verify(model, path, [x], Outputs)
    assert (model.training, model.layer.training) == (True, False)


def test_several_inputs_of_an_onnx_file(path, x, tmp_path):
    pytest.importorskip("onnxruntime")
    from lq_plugin.export import export_onnx

    b = torch.randn(8, 3)
    model = packed(Two(), path, (x, b))
    file = tmp_path / "net.onnx"
    export_onnx(model, (x, b), file)
    result = verify(model, file, [(x, b), (x, b, torch.zeros(8))])
    assert (result.samples, result.agreement) == (16, 1.0)
    assert result.largest_difference < 1e-5
    with pytest.raises(ExportError, match="batch 0 has 1 inputs, the file has 2"):
        verify(model, file, [x])
    with pytest.raises(ExportError, match="batch 0 has 1 inputs, the file has 2"):
        verify(model, file, [(x, b)], n_inputs=1)
    with pytest.raises(ExportError, match=r"n_inputs=3, but .*net.onnx has 2 inputs"):
        verify(model, file, [(x, b, b)], n_inputs=3)
    (fault,) = one_input_faults(model)
    assert fault.startswith("Two.forward needs 2 inputs (a, b)")
    assert not one_input_faults(Outputs())


@pytest.mark.parametrize("tail", [nn.Identity(), nn.Unflatten(1, (2, 3))])
def test_a_quantized_output_is_compared_in_its_own_steps(tail, tmp_path):
    """Its grid was found on other data: a 255th of the range of a batch is less than one of its steps."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 6), tail).eval(), torch.randn(64, 4)
    for rules, own in (([Rule("0", weight="int8", output="uint8 affine")], True), ([Rule("0", weight="int8")], False)):
        fresh = nn.Sequential(nn.Linear(4, 6), tail).eval()
        fresh.load_state_dict(net.state_dict())
        prepare(fresh, QuantPlan(rules))
        calibrate(fresh, [3 * x])
        saved = tmp_path / "net.lqp"
        save_packed(fresh, saved)
        with torch.no_grad():
            y = fresh(x)
            step = fresh[0].output_quantizer.scale if own else (y.max() - y.min()) / 255
            fresh[0].bias += 2 * step
        found = verify(fresh, saved, [x], lambda: nn.Sequential(nn.Linear(4, 6), tail))
        assert found.largest_steps == pytest.approx(2, rel=1e-3)
        assert found.within_one_step == 0
