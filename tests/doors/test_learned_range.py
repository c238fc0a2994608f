"""A new learned range comes in by one class and one registration, and is then a range like any other."""

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lq_plugin import QAT, PlanError, QuantPlan, QuantSpec, SpecError, calibrate, prepare
from lq_plugin.export import export_onnx, load_packed, onnx_session, save_packed
from lq_plugin.functional.grouping import blocks, unblocks
from lq_plugin.model.checkpoint import load_checkpoint
from lq_plugin.ptq.gptq.quantize import gptq
from lq_plugin.quantizers import ActivationQuantizer, WeightQuantizer, register_learned_range
from lq_plugin.ranges import registered_ranges
from lq_plugin.report import model_report
from lq_plugin.search import Space


class Step(WeightQuantizer):
    """Integers whose step the optimizer trains, by the straight-through gradient alone."""

    no_weight_decay = ("scale",)

    def make_qparams(self):
        self.scale = nn.Parameter(torch.ones(self.scale_shape))
        self.register_buffer("zero_point", torch.zeros(self.scale_shape))

    def qparams(self, x=None):
        return self.scale.detach(), self.zero_point

    def quantize_values(self, x):
        group, grid = self.spec.granularity, self.spec.grid
        levels = (blocks(x, group) / self.scale).clamp(grid.quant_min, grid.quant_max)
        rounded = levels + (levels.round() - levels).detach()
        return unblocks(rounded * self.scale, x.shape, group)


class Upper(ActivationQuantizer):
    """A trained upper bound, with parameters of another name than `scale`."""

    def make_qparams(self):
        self.upper = nn.Parameter(torch.ones(self.channels))

    def store_bounds(self, minimum, maximum):
        self.upper.data.copy_(maximum)

    def qparams(self, x=None):
        scale = self.upper.detach() / self.spec.grid.quant_max
        return scale, torch.zeros_like(scale)

    def quantize_values(self, x):
        step = self.broadcastable(self.upper, x) / self.spec.grid.quant_max
        levels = (x / step).clamp(0, self.spec.grid.quant_max)
        return (levels + (levels.round() - levels).detach()) * step


@pytest.fixture(autouse=True)
def learned(registries_as_they_were):
    register_learned_range("step", "a step that the optimizer trains", start="mse", weight=Step)
    register_learned_range(
        "upper",
        "an upper bound that the optimizer trains",
        start=lambda sample, grid, option: (torch.zeros_like(sample.maximum), sample.maximum / 2),
        activation=Upper,
        non_negative=True,
    )


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))


def data(count=64, seed=1):
    return torch.rand(count, 16, generator=torch.Generator().manual_seed(seed))


def ready(plan="int4 per_channel step / uint4 upper"):
    model = net()
    prepare(model, plan)
    calibrate(model, [data()])
    return model


def test_plans_name_it_and_refuse_it_where_it_does_not_fit():
    for text in ("int4 per_channel step", "int3 group4 step", "uint4 upper"):
        assert str(QuantSpec.parse(text)) == text
        assert QuantSpec.parse(text).learned
    assert str(QuantPlan.parse("w4 step a4 upper").rules[0].input) == "uint4 upper"
    for text, message in {
        "int4 upper": "range 'upper' is of non-negative values: use it with uint, without affine",
        "int4 step:fast": "range 'step' takes no option, got 'fast'",
        "int4 step mad": "learns its step with the nearest rounding",
        "int4 group16:4 step": "learns float scales, group16:4 has integer ones",
    }.items():
        with pytest.raises(SpecError, match=message):
            QuantSpec.parse(text)
    with pytest.raises(PlanError, match="weight range 'upper' is for activations"):
        prepare(net(), "uint4 upper / float")
    with pytest.raises(PlanError, match="range 'step' is for weights; activations take"):
        prepare(net(), "int4 / uint4 affine step")


def test_it_starts_at_the_bounds_of_its_start():
    model, other = ready(), ready("int4 per_channel mse / uint4 mse")
    assert torch.equal(model[0].weight_quantizer.scale.data, other[0].weight_quantizer.scale)
    assert torch.equal(model[0].quantized_weight(), other[0].quantized_weight())
    assert model[0].input_quantizer.upper.item() == pytest.approx(data().max().item() / 2)


def test_its_gradients_are_those_by_hand():
    layer = ready()[0]
    layer.quantized_weight().mul(torch.arange(16.0)).sum().backward()
    w, s = (t.detach().double().numpy() for t in (layer.weight, layer.weight_quantizer.scale))
    inside = (w / s > -8) & (w / s < 7)
    of_scale = np.where(inside, np.round(w / s) - w / s, np.clip(w / s, -8, 7))
    np.testing.assert_allclose(
        layer.weight_quantizer.scale.grad.numpy(), (of_scale * np.arange(16)).sum(1, keepdims=True), rtol=1e-4
    )


class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = net()

    def training_step(self, batch, index):
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, weight_decay=0.1)


def test_the_optimizer_trains_it_and_a_checkpoint_keeps_it(tmp_path):
    module, batches = Module(), DataLoader(TensorDataset(data(), torch.arange(64) % 4), 16)
    trainer = Trainer(
        max_epochs=2, callbacks=[QAT("int4 per_channel step / uint4 upper")], accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, batches)
    start = ready()
    assert not torch.equal(module.net[0].weight_quantizer.scale, start[0].weight_quantizer.scale)
    assert not torch.equal(module.net[2].input_quantizer.upper, start[2].input_quantizer.upper)
    decay = {id(p): group["weight_decay"] for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert decay[id(module.net[0].weight_quantizer.scale)] == 0
    assert decay[id(module.net[0].input_quantizer.upper)] == 0.1
    trainer.save_checkpoint(tmp_path / "net.ckpt")
    again = load_checkpoint(Module, tmp_path / "net.ckpt").eval()
    assert torch.equal(again.net(data()), module.eval().net(data()))


def test_ptq_files_searches_and_reports_take_it(tmp_path):
    model = ready().eval()
    gptq(model, [data()])
    save_packed(model, tmp_path / "net.safetensors")
    other = net()
    load_packed(other, tmp_path / "net.safetensors")
    assert torch.equal(other.eval()(data()), model(data()))
    report = model_report(model)
    assert {view.spec for layer in report.model.layers for view in layer.views} >= {"int4 per_channel step"}
    space = Space(weight={"bit_widths": 4, "ranges": ["mse", "step"]})
    assert [str(choice) for choice in space.weight] == ["int4 mse", "int4 step"]


@pytest.mark.slow
def test_onnx_runtime_computes_it(tmp_path):
    pytest.importorskip("onnxruntime")
    model = ready().eval()
    export_onnx(model, (data(),), tmp_path / "net.onnx")
    session = onnx_session(tmp_path / "net.onnx", threads=1)
    (y,) = session.run(None, {session.get_inputs()[0].name: data().numpy()})
    torch.testing.assert_close(torch.from_numpy(y), model(data()).detach(), rtol=1e-4, atol=1e-4)


def test_what_cannot_be_registered_is_refused_and_leaves_nothing():
    for name, arguments, message in [
        ("mse", {"start": "minmax", "weight": Step}, "the name is taken"),
        ("per_tensor", {"start": "minmax", "weight": Step}, "it has a meaning in specs"),
        ("bare", {"start": "minmax"}, "give weight, activation, or both"),
        ("lost", {"start": "mxe", "weight": Step}, "unknown range 'mxe'; .*Did you mean 'mse'"),
        ("step", {"start": "mse", "weight": WeightQuantizer}, "the name is taken"),
        ("Big", {"start": "mse", "weight": Step}, "lower-case word"),
    ]:
        with pytest.raises(SpecError, match=message):
            register_learned_range(name, "another", **arguments)
        assert name not in {"bare", "lost", "Big"} or name not in registered_ranges()
    register_learned_range("step", "a step that the optimizer trains", start="mse", weight=Step)  # loaded again
