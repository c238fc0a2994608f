from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lq_plugin import PTQ, QAT, QuantPlan
from lq_plugin.demo.digits import DigitsCNN, DigitsDataModule
from lq_plugin.errors import QuantizationError
from lq_plugin.search import Evaluator, Rung, Space, evaluate_at, search
from lq_plugin.search.evaluation.rungs import parse_rungs

from .conftest import CPU
from .test_evaluator import Batches, copy_of, quiet_trainer, same

SPACE = Space(
    weight={"bit_widths": [2, 3, 4, 8], "granularities": ["per_channel"], "ranges": ["mse"]}, input="uint8 affine mse"
)
PLAN = QuantPlan.parse("int2 per_channel mse / uint8 affine mse")


def states(model: LightningModule) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_levels_are_read_from_mappings() -> None:
    rungs = parse_rungs(
        [{"batches": 2}, Rung(), {"reconstruct": {"iterations": 5}, "promote_within": 0.1}, {"qat": {"max_steps": 3}}]
    )
    assert [str(rung) for rung in rungs] == [
        "batches=2",
        "PTQ",
        "reconstruct={'iterations': 5}",
        "qat={'max_steps': 3}",
    ]
    assert rungs[2].promote_within == 0.1
    # The margin decides who climbs, not what is measured.
    assert Rung(batches=2, promote_within=0.5).measures() == Rung(batches=2).measures() == {"batches": 2}


FAULTS = [
    {"batches": 0},
    {"batchs": 4},
    {"reconstruct": {"iterations": 5}, "qat": {"max_epochs": 1}},
    {"qat": {"max_epoch": 1}},
    {"promote_within": -1},
    {},
    {},
]


def test_every_fault_is_named_at_once() -> None:
    with pytest.raises(QuantizationError, match="fidelity: 6 faults") as raised:
        parse_rungs(FAULTS)
    for part in (
        "rung 0: batches is an integer from 1, got 0",
        "rung 1: unknown key 'batchs'; valid: batches, reconstruct, qat, promote_within. Did you mean 'batches'?",
        "rung 2: reconstruct and qat are two rungs",
        "unknown option 'max_epoch' of qat. Did you mean 'max_epochs'",
        "qat needs max_epochs or max_steps",
        "rung 4: promote_within is a number from 0, got -1",
        "rung 6: 'PTQ' is there twice",
    ):
        assert part in str(raised.value)
    with pytest.raises(QuantizationError, match="fidelity is a list of rungs"):
        parse_rungs({"batches": 1})  # type: ignore[arg-type]
    with pytest.raises(QuantizationError, match="fidelity is a list of rungs"):
        parse_rungs([])


class NoRate(DigitsCNN):
    """A module whose learning rate has a name of its own."""

    def __init__(self) -> None:
        LightningModule.__init__(self)


def test_what_does_not_fit_the_project_is_told_before_any_work(monkeypatch: Any) -> None:
    monkeypatch.setattr(Evaluator, "__init__", lambda *args, **kwargs: pytest.fail("it began"))
    fidelity = [
        {"reconstruct": {"iterations": -1}},
        {"qat": {"max_epochs": 1, "distill": 2.0}},
        {"qat": {"max_epochs": 1, "lr": 0.1}},
        {"qat": {"max_epochs": 1, "strategy": "ddp", "devices": 2}},
        {"qat": {"max_epochs": 1, "strategy": "dpd"}},
    ]
    with pytest.raises(QuantizationError) as raised:
        search(NoRate(), DigitsDataModule(), SPACE, "val/acc", fidelity=fidelity, trainer=partial(Trainer,
        accelerator="cpu"),
               pruner={"_target_": "optuna.pruners.MedanPruner"}, promote_within=-0.5, promote_first=-1)  # fmt: skip
    for part in (
        "cannot search: 9 faults",
        "rung 0: phase 'reconstruct'",
        "rung 1: ",
        "rung 2: NoRate has no attribute lr or learning_rate that lr could set",
        "rung 3: its strategy would start this search anew for each device; use ddp_spawn",
        "rung 4: ",
        "pruner: cannot find optuna.pruners.MedanPruner",
        "a pruner decides about one objective (cost=None), here are 2",
        "promote_within is a number from 0, got -0.5",
        "promote_first is an integer, 0 or more, got -1",
    ):
        assert part in str(raised.value)
    with pytest.raises(QuantizationError, match="without fidelity there is one rung"):
        search(NoRate(), None, SPACE, "val/acc", cost=None, pruner={"_target_": "optuna.pruners.MedianPruner"})


def test_a_subset_is_the_first_batches(model: DigitsCNN, datamodule: DigitsDataModule) -> None:
    batches, fresh = Batches(2), copy_of(model)
    with Evaluator(model, datamodule, trainer=CPU, calibration_batches=2, dataloader=batches) as evaluator:
        evaluator.calibrate(SPACE)
        found = [evaluate_at(evaluator, PLAN, Rung(batches=count)) for count in (1, 2, 1, 100)]
        whole = evaluator.evaluate(PLAN).metrics
    expected = []
    for count in (1, 2):
        trainer = quiet_trainer(
            callbacks=[PTQ(PLAN, calibration_batches=2, dataloader=batches)], limit_val_batches=count
        )
        expected += trainer.validate(copy_of(fresh), datamodule=DigitsDataModule(batch_size=120), verbose=False)
    assert found == [*expected, expected[0], whole]
    assert len({metrics["val/loss"] for metrics in found}) == 3


def test_a_subset_is_never_more_than_what_the_trainer_reads(model: DigitsCNN, datamodule: DigitsDataModule) -> None:
    with Evaluator(model, datamodule, trainer=partial(CPU, limit_val_batches=0.67), calibration_batches=1) as evaluator:
        evaluator.calibrate(SPACE)
        found = [evaluate_at(evaluator, PLAN, Rung(batches=count)) for count in (1, 3)]
        assert evaluator.evaluate(PLAN).metrics == found[1] != found[0]


def test_learned_rounding_is_that_of_ptq_and_leaves_no_trace(model: DigitsCNN, datamodule: DigitsDataModule) -> None:
    batches, fresh, options = Batches(2), copy_of(model), {"iterations": 15, "by": "layer"}
    with Evaluator(model, datamodule, trainer=CPU, calibration_batches=2, dataloader=batches) as evaluator:
        evaluator.calibrate(SPACE)
        nearest = evaluator.evaluate(PLAN).metrics
        evaluator.apply({})
        before = states(model)
        found = [evaluate_at(evaluator, PLAN, Rung(reconstruct=options)) for _ in range(2)]
        assert same(states(model), before)
        assert evaluator.evaluate(PLAN).metrics == nearest, "the quantizers are those that were calibrated"
    assert same(states(model), states(fresh))
    phases: list[Any] = ["fold_batch_norm", "calibrate", {"reconstruct": options}]
    trainer = quiet_trainer(callbacks=[PTQ(PLAN, calibration_batches=2, phases=phases, dataloader=batches)])
    (expected,) = trainer.validate(fresh, datamodule=DigitsDataModule(batch_size=120), verbose=False)
    assert found == [expected] * 2
    assert found[0]["val/loss"] < nearest["val/loss"]


def test_a_qat_level_is_a_run_of_a_trainer_on_a_float_copy(model: DigitsCNN, datamodule: DigitsDataModule) -> None:
    fresh, rates = copy_of(model), []
    configure = DigitsCNN.configure_optimizers

    class Recorded(DigitsCNN):
        def configure_optimizers(self) -> Any:
            rates.append((self, self.lr))
            return configure(self)

    recorded = Recorded(width=8)
    recorded.load_state_dict(fresh.state_dict())
    rung = Rung(qat={"max_epochs": 2, "limit_train_batches": 6, "lr": 2e-3, "init_batches": 2})
    with Evaluator(recorded, datamodule, trainer=CPU, calibration_batches=1) as evaluator:
        evaluator.calibrate(SPACE)
        nearest = evaluator.evaluate(PLAN).metrics
        before = states(recorded)
        found = [evaluate_at(evaluator, PLAN, rung) for _ in range(2)]
        assert same(states(recorded), before)
        assert evaluator.evaluate(PLAN).metrics == nearest
    assert same(states(recorded), states(fresh))
    assert all(module is not recorded and rate == 2e-3 for module, rate in rates)
    assert recorded.lr == 5e-3

    fresh.lr = 2e-3
    with isolate_rng():
        torch.manual_seed(0)
        trainer = quiet_trainer(callbacks=[QAT(PLAN, init_batches=2)], max_epochs=2, limit_train_batches=6)
        trainer.fit(fresh, datamodule=DigitsDataModule(batch_size=120))
        (expected,) = trainer.validate(fresh, datamodule=DigitsDataModule(batch_size=120), verbose=False)
    assert found[0] == found[1]
    # Tensors of weights come from another copy: sums over them need not agree to the last bit.
    assert {name: found[0][name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert found[0]["val/loss"] < 0.9 * nearest["val/loss"], "it has learned"


@pytest.mark.slow
def test_a_qat_level_may_use_several_processes(model: DigitsCNN, datamodule: DigitsDataModule) -> None:
    rung = Rung(
        qat={"max_epochs": 2, "devices": 2, "strategy": "ddp_spawn", "accelerator": "cpu", "num_sanity_val_steps": 0}
    )
    before = states(model)
    with Evaluator(model, datamodule, trainer=partial(Trainer, accelerator="cpu"), calibration_batches=1) as evaluator:
        evaluator.calibrate(SPACE)
        nearest = evaluator.evaluate(PLAN).metrics
        found = evaluate_at(evaluator, PLAN, rung)
        assert evaluator.evaluate(PLAN).metrics == nearest
    assert found["val/loss"] < 0.9 * nearest["val/loss"]
    assert same(states(model), before)
