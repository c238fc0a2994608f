from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from torch import Tensor, nn

from lq_plugin import PTQ, QuantPlan
from lq_plugin.callbacks.trainer.data import calibration_batches, one_batch
from lq_plugin.demo.digits import DigitsCNN, DigitsDataModule
from lq_plugin.errors import CalibrationError, PlanError
from lq_plugin.model.measure.cost import cost
from lq_plugin.search import Evaluator, Space

from .conftest import CPU

SPACE = Space(
    weight={
        "bit_widths": [2, 3, 4, 8],
        "granularities": ["per_channel", "per_tensor", "group8 ragged"],
        "ranges": ["mse", "minmax", "octav"],
    },
    input=["uint8 affine mse", "uint4 affine percentile:99.9", "float"],
)
MIXED = {
    "rules": [
        {"match": "*", "weight": "int4 per_channel mse", "input": "uint8 affine mse"},
        {"match": "block.*", "weight": "int3 group8 ragged octav", "input": "uint4 affine percentile:99.9"},
        {"match": "stem.0", "weight": "int8", "input": "float"},
    ]
}


def quiet_trainer(**options: Any) -> Trainer:
    return CPU(
        logger=False, enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False, **options
    )


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[key], other[key]) for key in one)


def copy_of(model: DigitsCNN) -> DigitsCNN:
    fresh = DigitsCNN(width=8)
    fresh.load_state_dict(model.state_dict())
    return fresh


class Batches:
    """The calibration batches an evaluator uses, as a loader that always gives these."""

    def __init__(self, count: int) -> None:
        datamodule = DigitsDataModule(batch_size=120)
        datamodule.setup("fit")
        self.batches = [batch for batch, _ in zip(datamodule.train_dataloader(), range(count), strict=False)]

    def __iter__(self) -> Any:
        return iter(self.batches)


@pytest.mark.parametrize(
    "plan", ["int2 per_channel mse / uint8 affine mse", "int3 per_channel octav / uint4 affine percentile:99.9", MIXED]
)
def test_it_reports_exactly_what_ptq_reports_in_validation(
    model: DigitsCNN, datamodule: DigitsDataModule, plan: Any, tmp_path: Any
) -> None:
    plan = QuantPlan.parse(plan)
    batches, fresh = Batches(3), copy_of(model)
    with Evaluator(model, datamodule, trainer=CPU, calibration_batches=3, dataloader=batches) as evaluator:
        evaluator.calibrate(SPACE)
        evaluator.evaluate("int8")  # what was applied before must leave nothing behind
        found = evaluator.evaluate(plan)
        again = evaluator.evaluate(plan)
    plan.to_yaml(tmp_path / "plan.yaml")
    trainer = quiet_trainer(callbacks=[PTQ(tmp_path / "plan.yaml", calibration_batches=3, dataloader=batches)])
    (expected,) = trainer.validate(fresh, datamodule=DigitsDataModule(batch_size=120), verbose=False)
    assert found.metrics == again.metrics == expected
    assert found.cost.effective_bits == cost(fresh).effective_bits
    assert found.cost.bytes == cost(fresh).bytes


def test_plans_differ_and_the_float_metrics_are_those_of_the_float_model(
    model: DigitsCNN, datamodule: DigitsDataModule
) -> None:
    (expected,) = quiet_trainer().validate(copy_of(model), datamodule=DigitsDataModule(batch_size=120), verbose=False)
    with Evaluator(model, datamodule, trainer=CPU, calibration_batches=1) as evaluator:
        space = evaluator.calibrate(SPACE)
        losses = [
            evaluator.evaluate_layers(space.layer_plans(space.uniform(bits))).metrics["val/loss"] for bits in (2, 3, 8)
        ]
        assert evaluator.float_metrics == expected
    assert losses[0] > losses[1] > losses[2]


def test_the_float_model_is_back_bit_for_bit(model: DigitsCNN, datamodule: DigitsDataModule) -> None:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    types = {name: type(module) for name, module in model.named_modules()}
    with Evaluator(model, datamodule, trainer=CPU, calibration_batches=1) as evaluator:
        space = evaluator.calibrate(SPACE)
        assert not torch.equal(before["stem.0.weight"], model.stem[0].weight), "batch norm was not folded"
        folded = {key: value.clone() for key, value in model.named_parameters()}
        evaluator.evaluate(space.plan(space.uniform(2)))
        assert all(torch.equal(folded[key], value) for key, value in model.named_parameters() if key in folded)
        with pytest.raises(PlanError, match="matches no layer"):
            evaluator.evaluate(QuantPlan.parse({"rules": [{"match": "nothing", "weight": "int4"}]}))
    assert same(before, model.state_dict())
    assert types == {name: type(module) for name, module in model.named_modules()}


@pytest.mark.slow
def test_every_process_calibrates_on_the_same_batches(model: DigitsCNN) -> None:
    def loss(torch_seed: int, seed: int) -> float:
        torch.manual_seed(torch_seed)
        # Few, small batches of a shuffling loader: other ones give other ranges.
        with Evaluator(
            copy_of(model), DigitsDataModule(batch_size=8), trainer=CPU, calibration_batches=1, seed=seed
        ) as evaluator:
            evaluator.calibrate(Space(weight=["int8", "int4"], input="uint4 affine"))
            return evaluator.evaluate("int8 / uint4 affine").metrics["val/loss"]

    assert loss(1, seed=0) == loss(2, seed=0)
    assert loss(1, seed=0) != loss(1, seed=7)


def test_calibration_reads_its_data_once_whatever_the_plans(
    model: DigitsCNN, datamodule: DigitsDataModule, monkeypatch: Any
) -> None:
    read = []
    monkeypatch.setattr("lq_plugin.callbacks.phases.one_batch", lambda *a: read.append(1) or one_batch(*a))
    monkeypatch.setattr(
        "lq_plugin.callbacks.phases.calibration_batches", lambda *a: read.append(a[3]) or calibration_batches(*a)
    )
    with Evaluator(model, datamodule, trainer=CPU, calibration_batches=2) as evaluator:
        evaluator.calibrate(SPACE)
        for plan in ("int2", "int8 / uint8 affine mse", "int4 / uint4 affine percentile:99.9"):
            evaluator.evaluate(plan)
    assert read == [1, 2], "one batch to record, one pass of two to calibrate"


def test_each_range_is_estimated_once(model: DigitsCNN, datamodule: DigitsDataModule, monkeypatch: Any) -> None:
    from lq_plugin.quantizers import activation, weight

    calls = []
    original = weight.estimate_range
    for module in (activation, weight):
        monkeypatch.setattr(module, "estimate_range", lambda *a: calls.append(a[0]) or original(*a))
    with Evaluator(model, datamodule, trainer=CPU, calibration_batches=1) as evaluator:
        evaluator.calibrate(SPACE)
        calls.clear()
        for _ in range(3):
            evaluator.evaluate("int4 mse / uint8 affine mse")
            evaluator.evaluate("int3 mse / uint8 affine mse")
    layers = 6
    assert calls.count("mse") == len(calls) == 3 * layers  # two weight specs and one input spec


def test_data_is_set_up_once_and_torn_down_in_the_end(model: DigitsCNN) -> None:
    class Counting(DigitsDataModule):
        calls: list[Any]

        def prepare_data(self) -> None:
            self.calls.append("prepare")

        def setup(self, stage: str | None = None) -> None:
            self.calls.append(stage)
            super().setup(stage)

        def teardown(self, stage: str | None = None) -> None:
            self.calls.append(("teardown", stage))
            self.splits.clear()

    datamodule = Counting(batch_size=120)
    datamodule.calls = []
    with Evaluator(model, datamodule, trainer=CPU, calibration_batches=1) as evaluator:
        evaluator.calibrate(Space(weight=["int2", "int4"]))
        evaluator.evaluate("int2")
        evaluator.evaluate("int4")
        assert datamodule.calls == ["prepare", "validate", "fit"]
    assert datamodule.calls[3:] == [("teardown", "validate"), ("teardown", "fit")]
    assert not {"setup", "prepare_data", "teardown"} & set(vars(datamodule))


def test_faults_are_named(model: DigitsCNN, datamodule: DigitsDataModule) -> None:
    with Evaluator(model, datamodule, trainer=CPU, calibration_batches=1) as evaluator:
        with pytest.raises(CalibrationError, match="not calibrated"):
            evaluator.evaluate("int4")
        evaluator.calibrate(Space(weight=["int2", "int4"], rules=[{"match": "head.2", "weight": "float"}]))
        with pytest.raises(PlanError, match=r"keeps float: head\.2"):
            evaluator.evaluate("int4")
        with pytest.raises(CalibrationError, match=r"stem\.0\.input: no statistics"):
            evaluator.evaluate(QuantPlan.parse({"rules": [{"match": "stem.0", "input": "uint8 affine"}]}))


class BuildsInSetup(LightningModule):
    """Builds its layers in `setup`; `anew` does so at every call, which loses their weights and quantizers."""

    def __init__(self, anew: bool) -> None:
        super().__init__()
        self.anew = anew
        self.net: nn.Module | None = None

    def setup(self, stage: str) -> None:
        if self.net is None or self.anew:
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        assert self.net is not None
        self.log("val/loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))


def test_layers_built_in_setup_are_found_and_ones_built_anew_are_refused(datamodule: DigitsDataModule) -> None:
    space = Space(weight=["int2 mse", "int8"])
    with Evaluator(BuildsInSetup(anew=False), datamodule, trainer=CPU, calibration_batches=1) as evaluator:
        evaluator.calibrate(space)
        assert evaluator.evaluate("int2 mse").metrics != evaluator.float_metrics
    with Evaluator(BuildsInSetup(anew=True), datamodule, trainer=CPU, calibration_batches=1) as evaluator:
        evaluator.calibrate(space)
        with pytest.raises(PlanError, match=r"built 1 layers anew .*net\.1"):
            evaluator.evaluate("int2 mse")


def test_activations_of_every_granularity_and_format_report_what_ptq_reports(
    model: DigitsCNN, datamodule: DigitsDataModule
) -> None:
    batches, fresh = Batches(2), copy_of(model)
    inputs = ["uint4 affine mse", "uint4 affine per_channel", "int4 group16:4 ragged", "mx4"]
    with Evaluator(model, datamodule, trainer=CPU, calibration_batches=2, dataloader=batches) as evaluator:
        evaluator.calibrate(Space(weight=["int8", "int4", "mx6"], input=inputs))
        found = {spec: evaluator.evaluate(f"mx6 / {spec}").metrics for spec in inputs}
    assert len({metrics["val/loss"] for metrics in found.values()}) == len(inputs)
    for spec, metrics in found.items():
        trainer = quiet_trainer(callbacks=[PTQ(f"mx6 / {spec}", calibration_batches=2, dataloader=batches)])
        (expected,) = trainer.validate(copy_of(fresh), datamodule=DigitsDataModule(batch_size=120), verbose=False)
        assert metrics == expected
