"""A new format comes in by one file and one registration, and is then a format like any other."""

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lq_plugin import QAT, QuantPlan, QuantSpec, Rule, SpecError, calibrate, prepare
from lq_plugin.errors import ExportError
from lq_plugin.export import export_onnx, load_packed, onnx_session, save_packed
from lq_plugin.export.codes import encode
from lq_plugin.export.onnx_file.containers import container
from lq_plugin.export.onnx_file.faults import onnx_faults
from lq_plugin.export.request import Request
from lq_plugin.model.checkpoint import load_checkpoint
from lq_plugin.model.measure.cost import cost, spec_bits
from lq_plugin.ptq.gptq.quantize import gptq
from lq_plugin.ptq.reconstruction.reconstruct import reconstruct
from lq_plugin.quantizers import Format, WeightQuantizer, register_format
from lq_plugin.report import model_report
from lq_plugin.report.defaults import default_rows
from lq_plugin.search import Space


@pytest.fixture(autouse=True)
def pot(registries_as_they_were):
    return runpy.run_path(str(Path(__file__).with_name("power_of_two.py")))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 5))


def images(count=8, seed=1):
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def ready(plan="pot4 per_channel mse / upot8 mse"):
    model = net()
    prepare(model, plan)
    calibrate(model, [images()])
    return model.eval()


def on_grid(w):
    """The paper-and-pencil definition, in float64: levels -8..7 of a power of two for each channel."""
    w = w.double().numpy()
    rows = w.reshape(len(w), -1)
    step = np.maximum(rows.max(1) / 7, rows.min(1) / -8)
    step = 2.0 ** np.ceil(np.log2(step)).reshape(-1, *[1] * (w.ndim - 1))
    return np.clip(np.round(w / step), -8, 7) * step


def test_its_words_are_read_and_written():
    for text in ("pot4", "pot2 per_channel octav", "upot8 mse", "pot4 group16"):
        spec = QuantSpec.parse(text)
        assert str(spec) == text
        assert QuantSpec.parse(str(spec)) == spec
    assert (QuantSpec("pot").bit_width, QuantSpec.parse("upot4").grid.quant_max) == (8, 15)
    plan = QuantPlan.parse("pot4 per_channel / upot8 ema")
    assert QuantPlan.parse(plan.to_dict()) == plan


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pot3", "bit_width must be one of 2, 4, 8, got 3"),
        ("pot", "unknown word 'pot'; .*Did you mean 'pot8'"),
        ("pot4 affine", "pot has no choice of affine"),
        ("pot4 lsq", "learns float scales, pot has scales of its own"),
        ("pot4 group16:4", "pot has scales of its own, got integer ones"),
        ("pot4:fast", "format 'pot' takes no option, got 'fast'"),
    ],
)
def test_what_it_does_not_take_is_refused(text, message):
    with pytest.raises(SpecError, match=message):
        QuantSpec.parse(text)


def test_weights_lie_on_its_levels():
    model = ready("pot4 per_channel")
    for layer in (model[0], model[3]):
        np.testing.assert_array_equal(
            layer.quantized_weight().detach().double().numpy(), on_grid(layer.weight.detach())
        )


def is_power_of_two(scale):
    return bool((torch.frexp(scale.float()).mantissa == 0.5).all())


def test_calibrated_ranges_and_ptq_passes_keep_to_its_scales():
    model = ready()
    scale, _ = model[3].input_quantizer.qparams()
    assert is_power_of_two(scale)
    assert scale.item() != 1.0
    gptq(model, [images()])
    assert is_power_of_two(model[3].weight_quantizer.scale)
    model = ready()
    before = model[3].weight_quantizer.scale.clone()
    reconstruct(model, [images()], iterations=2, scale_learning_rate=0.1)
    assert torch.equal(model[3].weight_quantizer.scale, before)


class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = net()

    def training_step(self, batch, index):
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_one_step_of_training_and_its_checkpoint(tmp_path):
    module, data = Module(), DataLoader(TensorDataset(images(), torch.arange(8) % 5), 8)
    trainer = Trainer(
        max_steps=1, callbacks=[QAT("pot4 per_channel mse / pot8 ema")], accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    before = module.net[0].weight.detach().clone()
    trainer.fit(module, data)
    assert not torch.equal(module.net[0].weight, before)
    trainer.save_checkpoint(tmp_path / "net.ckpt")
    again = load_checkpoint(Module, tmp_path / "net.ckpt").eval()
    x = images(3, seed=2)
    assert torch.equal(again.net(x), module.eval().net(x))
    assert is_power_of_two(again.net[3].input_quantizer.scale)


def test_a_search_space_and_the_cost_count_its_bits():
    space = Space(weight={"format": "pot", "bit_widths": [2, 4], "granularities": "per_channel"})
    assert [str(choice) for choice in space.weight] == ["pot2 per_channel", "pot4 per_channel"]
    spec = QuantSpec.parse("pot4 per_channel")
    assert spec_bits(spec, (6, 3, 3, 3)) == 6 * 27 * 4 + 6 * 8
    rows = {row.name: row for row in cost(ready())}
    assert (rows["0"].weight_bits, rows["0"].storage_bits, rows["3"].input_bits) == (4, 696, 8)


def test_a_packed_file_holds_it_bit_for_bit(tmp_path):
    model = ready()
    size = save_packed(model, tmp_path / "net.safetensors")
    other = net()
    load_packed(other, tmp_path / "net.safetensors")
    x = images(3, seed=2)
    assert torch.equal(other.eval()(x), model(x))
    assert torch.equal(other[0].weight, model[0].quantized_weight())
    plain = net()
    prepare(plain, "int4 per_channel mse / uint8 mse")
    calibrate(plain, [images()])
    assert save_packed(plain.eval(), tmp_path / "int.safetensors") - size == pytest.approx(3 * 11, abs=16)


def test_its_container_in_onnx_stands_for_the_same_weight():
    layer = ready("pot4 per_channel mse / float")[0]
    spec = layer.weight_quantizer.spec
    held = container(spec, encode(layer.weight_quantizer, layer.weight), "weight")
    assert (held.bits, held.signed) == (4, True)
    values = held.q.double() * held.scale.double().reshape(-1, 1, 1, 1)
    assert torch.equal(values, layer.quantized_weight().detach().double())


@pytest.mark.slow
def test_onnx_runtime_computes_it(tmp_path):
    pytest.importorskip("onnxruntime")
    model, x = ready("pot4 per_channel mse / float"), images(3, seed=2)
    assert onnx_faults(Request(model=model)) == []
    export_onnx(model, (x,), tmp_path / "net.onnx")
    session = onnx_session(tmp_path / "net.onnx", threads=1)
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), model(x).detach(), rtol=1e-4, atol=1e-4)


def test_reports_show_it():
    model = net()
    prepare(model, "pot4 per_channel mse / upot8 mse")
    report = model_report(model, statistics=calibrate(model, [images()]))
    views = [view for layer in report.model.layers for view in layer.views]
    assert {view.spec for view in views} == {"pot4 per_channel mse", "upot8 mse"}
    for view in views:
        assert "in force" in [mark.label for mark in view.marks]
    assert ("`pot8`", "-128..127", "tensor", "no", "minmax, at each step", "nearest, clipped") in default_rows()


class HalfSteps(WeightQuantizer):
    """Levels at the odd multiples of half a step: no integers times a scale."""

    def quantize_values(self, x):
        step, _ = self.qparams(x)
        level = torch.floor(x.detach() / step).clamp(
            -(2 ** (self.spec.bit_width - 1)), 2 ** (self.spec.bit_width - 1) - 1
        )
        return (level + 0.5) * step + (x - x.detach())

    def qparams(self, x=None):
        step = x.detach().abs().amax(tuple(range(1, x.ndim)), keepdim=True) / 2 ** (self.spec.bit_width - 1)
        return step, torch.zeros_like(step)


def test_what_a_format_has_no_code_for_is_refused_before_any_work(tmp_path):
    register_format("half_steps", Format("odd multiples of half a step", (3,), slots=("weight",)), weight=HalfSteps)
    model = net()
    prepare(model, QuantPlan([Rule("*", weight="half_steps")]))
    calibrate(model, [images()])
    assert len(model.eval()[3].quantized_weight()[0].unique()) <= 8
    assert cost(model)["3"].weight_bits == 3
    with pytest.raises(ExportError, match=r"0\.weight \(half_steps\): format 'half_steps' has no stored form"):
        save_packed(model, tmp_path / "net.safetensors")
    assert not (tmp_path / "net.safetensors").exists()
    reason = "format 'half_steps' has no container in ONNX; use the packed file, or another format"
    near = "the nearest that fits is 'int4 per_channel'"
    assert f"3.weight (half_steps): {reason}; {near}" in onnx_faults(Request(model=model))
    with pytest.raises(ExportError, match="has no"):
        export_onnx(model, (images(),), tmp_path / "net.onnx")


@pytest.mark.parametrize(
    ("name", "declared", "code", "message"),
    [
        ("Pot", Format("", (4,)), {}, "lower-case word"),
        ("pot2", Format("", (4, 8)), {}, "without a digit at the end"),
        ("mse", Format("", (4,)), {}, "has a meaning in specs already"),
        ("upot4", Format("", (4,)), {}, "has a meaning in specs already"),
        ("wide", Format("", (4, 32)), {}, r"bit_widths must be 1\.\.16"),
        ("other", Format("", (4,), slots=("input",)), {}, "weight is <class .*: a format for weights"),
        ("other", Format("", (4,)), {"activation": None}, "a format for inputs or outputs has a maker for them"),
        ("other", Format("", (4,)), {"onnx": lambda spec, values: None}, "give storage also"),
        ("pot", Format("", (4,)), {"weight": HalfSteps}, r"the name is taken by \["),
    ],
)
def test_a_registration_that_does_not_fit_is_refused(name, declared, code, message, pot):
    from lq_plugin.intent.formats import FORMATS

    before = dict(FORMATS)
    code = {"weight": WeightQuantizer, "activation": pot["PowerOfTwoActivation"]} | code
    with pytest.raises(SpecError, match=message):
        register_format(name, declared, **code)
    assert before == FORMATS


def test_levels_that_its_bits_cannot_count_are_refused():
    from lq_plugin.intent.spec import IntegerGrid

    declared = Format("", (4,), uniform=True, slots=("weight",), grid=lambda spec: IntegerGrid(-8, 8))
    with pytest.raises(SpecError, match="17 levels of odd do not fit in 4 bits"):
        register_format("odd", declared, weight=WeightQuantizer)
