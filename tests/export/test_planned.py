"""Plans that name the target they are for: quantized on its grid, refused before any work."""

import pytest
import torch
from lightning import Trainer

from lq_plugin import PTQ, QAT, PlanError, QuantPlan, load_checkpoint
from lq_plugin.demo.digits import DigitsCNN, DigitsDataModule
from lq_plugin.export import Target, export_model, register_target
from lq_plugin.export.planned import plan_for
from lq_plugin.export.target import TARGETS
from lq_plugin.export.tensorrt import lint
from lq_plugin.model.prepare import quantizers
from lq_plugin.search import Evaluator, SearchConfig
from tests.callbacks.conftest import Data, Module

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


@pytest.fixture(scope="module")
def digits():
    torch.set_num_threads(1)
    return DigitsCNN(width=8), DigitsDataModule(batch_size=120)


@pytest.fixture
def even():
    """A target whose files hold nothing but symmetric weights of an even number of bits."""

    @register_target
    class Even(Target):
        name, suffix, summary = "even", ".even", "for tests"
        takes = {"weight": ("int8 per_channel narrow", "int4 per_channel narrow"), "input": ()}  # noqa: RUF012

        def spec_fault(self, slot, spec, layer):
            if slot != "weight":
                return "activations are float"
            return "its bits are even" if spec.bit_width % 2 else None

        def own_spec(self, slot, spec):
            return spec.replace(narrow_range=True) if slot == "weight" and spec.is_uniform else spec

        def write(self, request):
            raise AssertionError

    yield
    del TARGETS["even"]


def test_the_target_is_a_part_of_the_plan(tmp_path):
    plan = QuantPlan.parse({"rules": [{"match": "*", "weight": "int4"}], "target": "onnx"})
    assert plan.to_dict()["target"] == "onnx"
    plan.to_yaml(tmp_path / "plan.yaml")
    assert QuantPlan.parse(tmp_path / "plan.yaml") == plan
    assert "target" not in QuantPlan.parse("w4").to_dict()
    with pytest.raises(PlanError, match="target is the name of an export target, such as 'onnx', got 7"):
        QuantPlan(plan.rules, target=7)
    with pytest.raises(PlanError, match="unknown key 'targt'; valid: rules, schedule, target. Did you mean 'target'"):
        QuantPlan.parse(plan.to_dict() | {"targt": "onnx"})


def test_a_plan_comes_onto_the_targets_grid_once():
    plan = plan_for(QuantPlan.parse("w8 a8 percentile:99.9"), "tensorrt")
    assert (str(plan.rules[0].weight), str(plan.rules[0].input)) == ("int8 per_channel", "int8 percentile:99.9")
    assert plan_for(plan) == plan_for(plan, "tensorrt") == plan
    with pytest.raises(PlanError, match="the plan is for the target 'tensorrt', got target='onnx'"):
        plan_for(plan, "onnx")
    with pytest.raises(PlanError, match="no export target 'tensort'.*Did you mean 'tensorrt'"):
        QAT("w8a8", target="tensort")
    staged = QuantPlan.parse({"rules": [{"match": "*", "input": "uint8 affine", "start": "epoch 2"}, {"match": "f*"}]})
    rule, silent = plan_for(staged, "tensorrt").rules
    assert (str(rule.input), str(rule.start), silent.input) == ("int8", "epoch 2", None)


def test_training_is_refused_before_it_begins_and_the_module_is_left_alone(even):
    module = Module()
    before, kinds = dict(module.named_parameters()), [type(m) for m in module.modules()]
    with pytest.raises(PlanError) as caught:
        Trainer(max_epochs=1, callbacks=[QAT("w3a8", target="even")], **QUIET).fit(module, datamodule=Data())
    text = str(caught.value)
    assert "target 'even' cannot hold Module under its plan" in text
    assert (
        "net.conv.weight (int3 per_channel narrow): its bits are even; the nearest that fits is 'int4 per_channel"
        in text
    )
    assert "net.fc.input (uint8 affine ema): activations are float" in text
    assert [type(m) for m in module.modules()] == kinds
    assert dict(module.named_parameters()) == before
    assert not quantizers(module)
    Trainer(callbacks=[PTQ("w4", target="even")], **QUIET).validate(module, datamodule=Data(), verbose=False)
    assert str(module.net.conv.weight_quantizer.spec) == "int4 per_channel narrow"
    with pytest.raises(PlanError, match="target 'even' cannot hold"):
        Trainer(callbacks=[PTQ({"rules": [{"match": "*", "weight": "int3"}], "target": "even"})], **QUIET).validate(
            Module(), datamodule=Data(), verbose=False
        )


def test_what_was_trained_for_tensorrt_passes_its_linter(tmp_path):
    """Under the plan's own words activations are unsigned, which its parser does not read."""
    module = Module()
    trainer = Trainer(max_epochs=1, callbacks=[QAT("w8a8", target="tensorrt")], default_root_dir=tmp_path, **QUIET)
    trainer.fit(module, datamodule=Data())
    trainer.save_checkpoint(tmp_path / "trained.ckpt")
    assert {str(q.spec) for q in quantizers(module)} == {"int8 per_channel", "int8 ema"}
    path = tmp_path / "net.onnx"
    export_model(module.eval(), path, (torch.randn(1, 1, 6, 6),), target="tensorrt")
    assert not lint(path)
    load_checkpoint(loaded := Module(), tmp_path / "trained.ckpt")
    assert {str(q.spec) for q in quantizers(loaded)} == {"int8 per_channel", "int8 ema"}


def test_a_search_has_the_choices_that_the_target_holds(even, digits):
    model, datamodule = digits
    space = {"weight": {"bit_widths": [2, 3, 4], "granularities": ["per_channel"]}, "input": ["float", "uint8 affine"]}
    with Evaluator(model, datamodule, target="even") as evaluator:
        bound = evaluator.calibrate(space)
        assert bound.bit_widths == [2, 4]
        assert {str(c) for unit in bound.units for c in unit.choices} == {
            "int2 per_channel narrow",
            "int4 per_channel narrow",
        }
        name = bound.layers[0].name
        assert any("for even: its bits are even" in reason for reason in bound.excluded[f"{name}.weight"])
        assert any("for even: activations are float" in reason for reason in bound.excluded[f"{name}.input"])
        plan = bound.plan(bound.uniform(4))
        assert plan.target == "even"
        assert bound.params(plan) == bound.uniform(4)
        with pytest.raises(PlanError, match="has no possible choice: .*for even: its bits are even"):
            evaluator.calibrate({"weight": {"bit_widths": [3, 5]}})
    with pytest.raises(Exception, match="there is no export target 'evn'.*Did you mean 'even'"):
        SearchConfig(model, datamodule, space, "val/acc", target="evn")
