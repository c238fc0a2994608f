"""The PTQ callback in real Trainers."""

import copy

import lightning as L
import pytest
import torch
from torchmetrics.functional.classification import multiclass_accuracy

from lq_plugin import PTQ, QAT, CalibrationError, PlanError, remove
from lq_plugin.callbacks import PHASES, register_phase
from lq_plugin.model import float_forward, quantizers
from lq_plugin.ptq import run_phases
from lq_plugin.ptq.batch_norm.reestimate import reestimate_batch_norm
from tests.callbacks.conftest import Data, Module


@pytest.fixture
def trained(trainer, data):
    L.seed_everything(0, verbose=False)
    module = Module()
    trainer(max_epochs=2).fit(module, datamodule=data)
    return module


def val_accuracy(module, data):
    with torch.no_grad():
        return multiclass_accuracy(module.eval()(data.x[64:]), data.y[64:], 4).item()


def test_validate_calibrates_first_and_reports_the_quantized_metric(trained, trainer, data):
    ptq = PTQ("w2a2", calibration_batches=3)
    (reported,) = trainer(ptq).validate(trained, datamodule=data, verbose=False)
    assert all(q.is_calibrated for q in quantizers(trained))
    assert set(ptq.statistics) == {"net.conv.input", "net.conv2.input", "net.fc.input"}
    assert reported["val/acc"] == pytest.approx(val_accuracy(trained, data))
    seen = data.x[:48]
    assert ptq.statistics["net.conv.input"].total.item() == seen.numel()
    quantizer = trained.net.conv.input_quantizer
    torch.testing.assert_close(quantizer.scale, ((seen.max() - seen.min()) / 3).reshape(1))


@pytest.mark.parametrize("entry", ["validate", "test", "predict"])
def test_every_evaluation_entry_calibrates(entry, trained, trainer, data):
    trained.test_step = trained.validation_step
    trained.predict_step = lambda batch, batch_idx: trained(batch[0])
    data.test_dataloader = data.predict_dataloader = data.val_dataloader
    getattr(trainer(PTQ("w4a8")), entry)(trained, datamodule=data)
    assert all(q.is_calibrated for q in quantizers(trained))


def test_calibration_leaves_no_trace(trained, trainer, data):
    """No logged value, no counted metric, no random number drawn, no batch-norm statistics moved."""
    before = copy.deepcopy(trained.state_dict())
    torch.manual_seed(7)
    trainer().validate(trained, datamodule=data, verbose=False)
    expected_next = torch.rand(1)
    torch.manual_seed(7)
    (reported,) = trainer(PTQ("w8a8", phases=["calibrate"])).validate(trained, datamodule=data, verbose=False)
    assert torch.rand(1) == expected_next
    assert set(reported) == {"val/loss", "val/acc"}
    assert reported["val/acc"] == pytest.approx(val_accuracy(trained, data))  # calibration batches are not counted
    assert all(torch.equal(trained.state_dict()[key], value) for key, value in before.items())


def test_folding_keeps_the_function_and_the_keys(trained, trainer, data):
    want = trained.eval()(data.x[64:]).detach()
    keys = set(trained.state_dict())
    trainer(PTQ("w4a4")).validate(trained, datamodule=data, verbose=False)
    assert keys < set(trained.state_dict())
    assert torch.equal(trained.net.bn.weight, torch.ones(8))  # folded: only the shift is left
    with float_forward(trained):
        torch.testing.assert_close(trained(data.x[64:]).detach(), want, rtol=1e-4, atol=1e-5)
    # The folded weights serve a plain float module.
    plain = Module()
    plain.load_state_dict({key: value for key, value in trained.state_dict().items() if key in keys})
    torch.testing.assert_close(plain.eval()(data.x[64:]).detach(), want, rtol=1e-4, atol=1e-5)


def test_calibrated_model_is_used_as_it_is(trained, trainer, data):
    trainer(PTQ("w4a4", calibration_batches=1)).validate(trained, datamodule=data, verbose=False)
    scale = trained.net.conv.input_quantizer.scale.clone()
    again = PTQ("w4a4", calibration_batches=4)
    trainer(again).validate(trained, datamodule=data, verbose=False)
    assert torch.equal(trained.net.conv.input_quantizer.scale, scale)
    assert not again.statistics
    once_more = PTQ("w4a4", calibration_batches=4, recalibrate=True)
    trainer(once_more).validate(trained, datamodule=data, verbose=False)
    assert once_more.statistics["net.conv.input"].total.item() == data.x[:64].numel()


def test_checkpoint_round_trip(trained, trainer, data, tmp_path):
    first = trainer(PTQ("w4 mse a4 mse"))
    (want,) = first.validate(trained, datamodule=data, verbose=False)
    first.save_checkpoint(tmp_path / "ptq.ckpt")
    first.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    for name in ("ptq.ckpt", "weights.ckpt"):
        ptq = PTQ("w4 mse a4 mse")
        (got,) = trainer(ptq).validate(Module(), datamodule=data, ckpt_path=tmp_path / name, verbose=False)
        assert got == want
        assert not ptq.statistics  # nothing was calibrated again


def test_float_checkpoint_is_calibrated(trained, trainer, data, tmp_path):
    plain = trainer()
    plain.strategy.connect(trained)
    plain.save_checkpoint(tmp_path / "float.ckpt", weights_only=True)
    ptq = PTQ("w8a8", calibration_batches=4)
    module = Module()
    trainer(ptq).validate(module, datamodule=data, ckpt_path=tmp_path / "float.ckpt", verbose=False)
    trainer(PTQ("w8a8", calibration_batches=4)).validate(trained, datamodule=data, verbose=False)
    assert all(
        torch.equal(a, b) for a, b in zip(module.state_dict().values(), trained.state_dict().values(), strict=True)
    )


def test_given_loader_and_step(trained, trainer, data):
    seen = []

    def step(module, batch):
        seen.append(batch)
        return module(batch)

    ptq = PTQ(
        "w8a8",
        calibration_batches=2,
        dataloader=[torch.ones(4, 1, 6, 6), torch.full((4, 1, 6, 6), 3.0)],
        calibration_step=step,
    )
    trainer(ptq).validate(trained, datamodule=data, verbose=False)
    assert len(seen) == 3  # one recorded, two calibrated
    torch.testing.assert_close(trained.net.conv.input_quantizer.scale, torch.tensor([3.0 / 255]))


def test_ptq_then_qat(trained, trainer, data):
    trainer(PTQ("w4a4", calibration_batches=4, phases=["calibrate"])).validate(trained, datamodule=data, verbose=False)
    scale = trained.net.conv2.input_quantizer.scale.clone()
    trainer(QAT("w4a4"), max_epochs=1).fit(trained, datamodule=data)
    assert not torch.equal(trained.net.conv2.input_quantizer.scale, scale)
    remove(trained)


def test_reestimated_batch_norm_is_the_quantized_models_statistics(trained, trainer, data):
    ptq = PTQ("int2 per_channel mse", calibration_batches=4, phases=["calibrate", "reestimate_batch_norm"])
    trainer(ptq).validate(trained, datamodule=data, verbose=False)
    with torch.no_grad():
        out = trained.net.conv(data.x[:64])
    torch.testing.assert_close(trained.net.bn.running_mean, out.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(trained.net.bn.running_var, out.var((0, 2, 3)), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "phases", [["calibrate", "correct_batch_norm"], ["fold_batch_norm", "calibrate", "correct_batch_norm"]]
)
def test_corrected_batch_norm_restores_each_channels_mean(phases, trained, trainer, data):
    x = data.x[:64]
    with torch.no_grad():
        want = trained.eval().net.bn(trained.net.conv(x)).mean((0, 2, 3))
    ptq = PTQ("int2 per_channel mse", calibration_batches=4, phases=phases)
    trainer(ptq).validate(trained, datamodule=data, verbose=False)
    with torch.no_grad():
        torch.testing.assert_close(trained.net.bn(trained.net.conv(x)).mean((0, 2, 3)), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"calibration_batches": 0}, "1 or more, got 0"),
        ({"phases": ["calibrte"]}, "Did you mean 'calibrate'"),
        ({"phases": []}, "valid: "),
        ({"phases": ["fold_batch_norm"]}, "lack 'calibrate'"),
        ({"phases": ["fold_batch_norm", "calibrate", "reestimate_batch_norm"]}, "put reestimate_batch_norm before"),
        ({"min_coverage": 90}, "share in 0..1, got 90"),
        (
            {"min_coverage": {"weigths": 0.9}},
            "unknown share 'weigths'; valid: weights, compute. Did you mean 'weights'",
        ),
        ({"min_coverage": {"compute": True}}, "compute is a share in 0..1, got True"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(PlanError, match=message):
        PTQ("w8a8", **arguments)


def test_fit_is_refused_and_missing_data_is_explained(trained, trainer, data):
    with pytest.raises(PlanError, match="for trainer.fit there is QAT"):
        trainer(PTQ("w8a8")).fit(trained, datamodule=data)
    with pytest.raises(CalibrationError, match="train_dataloader; give one"):
        trainer(PTQ("w8a8")).validate(trained, dataloaders=data.val_dataloader(), verbose=False)
    with pytest.raises(CalibrationError, match="gave 0 batches"):
        trainer(PTQ("w8a8", dataloader=[])).validate(trained, datamodule=data, verbose=False)


def test_phase_of_the_callback_trainer_and_module_still_runs(trained, trainer, data):
    called = []

    def note(ptq, trainer, module):
        called.append((ptq, trainer, module, sorted(ptq.statistics)))

    with pytest.deprecated_call(match="phase 'note'"):
        register_phase("note")(note)
    try:
        ptq = PTQ("w8a8", phases=["calibrate", "note"])
        run = trainer(ptq)
        run.validate(trained, datamodule=data, verbose=False)
        with pytest.raises(PlanError, match="PTQ alone can call"):
            run_phases(copy.deepcopy(trained.net), None, [data.x], ["calibrate", "note"])
    finally:
        del PHASES["note"]
    assert called == [(ptq, run, trained, ["net.conv.input", "net.conv2.input", "net.fc.input"])]


def test_mixed_precision_keeps_statistics_in_float32(trained, trainer, data):
    for precision in ("bf16-mixed", "bf16-true"):
        module = copy.deepcopy(trained)
        (reported,) = trainer(PTQ("w8a8"), precision=precision).validate(module, datamodule=Data(), verbose=False)
        assert module.net.conv.input_quantizer.scale.dtype == torch.float32
        assert module.net.conv.weight.dtype == (torch.bfloat16 if precision == "bf16-true" else torch.float32)
        assert 0 <= reported["val/acc"] <= 1


def test_batch_norms_are_reestimated_on_the_float_model_before_ranges_are_found(trainer, module, data):
    """Without ranges there is no quantized model yet: the statistics are those of the float one."""
    twin = copy.deepcopy(module)
    reestimate_batch_norm(twin, [batch[0] for batch in data.train_dataloader()], twin.eval())
    ptq = PTQ("w2 mse a4", calibration_batches=4, phases=["reestimate_batch_norm", "calibrate"])
    trainer(ptq).validate(module, datamodule=data, verbose=False)
    for name in ("bn", "bn2"):
        mine, theirs = getattr(module.net, name), getattr(twin.net, name)
        torch.testing.assert_close(mine.running_mean, theirs.running_mean)
        torch.testing.assert_close(mine.running_var, theirs.running_var)
    assert float(module.net.bn.running_mean.abs().sum()) > 0


class WithoutTraining(L.LightningDataModule):
    """Validation data alone, of two loaders."""

    def __init__(self):
        super().__init__()
        self.data = Data()

    def val_dataloader(self):
        return {"a": self.data.val_dataloader(), "b": self.data.val_dataloader()}


class OfTwo(Module):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        super().validation_step(batch, batch_idx)


@pytest.mark.parametrize("plan", ["int4 per_channel", "mx6 / mx9"])
def test_what_needs_no_data_needs_no_training_data(trainer, plan):
    ptq, module = PTQ(plan), OfTwo()
    trainer(ptq).validate(module, datamodule=WithoutTraining(), verbose=False)
    assert all(q.is_calibrated or not q.needs_calibration for q in quantizers(module))
    assert ptq.folded, "one batch of the evaluation shows what may be folded"
    assert any(entry.functional for entry in ptq.ledger)


def test_ranges_of_activations_need_training_data(trainer):
    ptq = PTQ("w4a8")
    with pytest.raises(CalibrationError, match="neither a datamodule nor the LightningModule has a train_dataloader"):
        trainer(ptq).validate(OfTwo(), datamodule=WithoutTraining(), verbose=False)
    assert ptq.folded is None, "the module is as before"


def test_weights_are_calibrated_without_passes(trainer):
    class Once(Data):
        asked = 0

        def train_dataloader(self):
            self.asked += 1
            return super().train_dataloader()

    data = Once()
    trainer(PTQ("int4 per_channel")).validate(Module(), datamodule=data, verbose=False)
    assert data.asked == 1, "for the recorded batch alone"


@pytest.mark.parametrize("given", [False, True])
def test_several_loaders_are_no_calibration_data(trainer, given):
    class Two(Data):
        def train_dataloader(self):
            return [super().train_dataloader(), super().train_dataloader()]

    data = Two()
    name = "dataloader" if given else "train_dataloader"
    ptq = PTQ("w4a8", dataloader=data.train_dataloader() if given else None)
    with pytest.raises(
        CalibrationError, match=rf"batches of one loader, {name} gives 2: say which, as PTQ\(plan, dataloader=...\)"
    ):
        trainer(ptq).validate(Module(), datamodule=data, verbose=False)
