"""The command of a finished run, given again: fit returns at once, and everything is as the first run left it."""

import json

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lq_plugin import PTQ, QAT, load_checkpoint
from lq_plugin.callbacks import Export
from lq_plugin.model.prepare import quantizers
from tests.callbacks.conftest import Module

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint"),
]

EMA = {"match": "*", "weight": "int8 per_channel", "input": "uint2 affine ema"}
STAGES = {"match": "*", "weight": "int2 per_channel mse", "start": "epoch 1"}
#: Four batches an epoch: what never comes to be in two epochs must not be there after a restart either.
PLANS = {
    "weights_start": {"rules": [EMA], "schedule": {"weights_start": "epoch 1"}},
    "activations_start": {"rules": [EMA], "schedule": {"activations_start": "epoch 1"}},
    "freezes": {"rules": [EMA], "schedule": {"observer_freeze": "epoch 1", "batch_norm_freeze": "step 3"}},
    "stages": {"rules": [EMA, STAGES]},
    "learned": {
        "rules": [{"match": "*", "weight": "int4 per_channel lsq", "input": "int4 lsq"}],
        "schedule": {"weights_start": "step 6"},
    },
    "not reached": {"rules": [EMA], "schedule": {"activations_start": "step 8", "weights_start": "epoch 2"}},
}


def state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def content(file):
    """Returns the content of a safetensors file, whose metadata has another order each time."""
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:start]), data[start:]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", PLANS)
def test_evaluates_saves_and_exports_what_the_first_run_did(kind, trainer, data, tmp_path):
    exports = kind != "not reached"  # nothing is quantized yet

    def run(checkpoint):
        torch.manual_seed(0)
        module, file = Module(), tmp_path / "model.safetensors"
        more = [Export(file)] if exports else []
        t = trainer(QAT(PLANS[kind]), ModelCheckpoint(tmp_path, save_last=True), *more, enable_checkpointing=True)
        t.fit(module, datamodule=data, ckpt_path=checkpoint)
        left = state(module)
        (result,) = t.validate(module, datamodule=data, verbose=False)
        t.save_checkpoint(tmp_path / "after.ckpt")
        loaded = Module()
        load_checkpoint(loaded, tmp_path / "after.ckpt")
        return left, result, state(loaded), content(file) if exports else None

    first, again = run(None), run(tmp_path / "last.ckpt")
    assert equal(first[0], again[0])
    assert equal(first[2], again[2])
    assert again[1] == first[1]
    assert again[3] == first[3]


def test_after_it_the_callback_starts_another_run_from_the_beginning(trainer, data, tmp_path):
    plan = PLANS["activations_start"]
    torch.manual_seed(0)
    trainer(QAT(plan), ModelCheckpoint(tmp_path, save_last=True), enable_checkpointing=True).fit(
        Module(), datamodule=data
    )
    callback = QAT(plan)
    trainer(callback).fit(Module(), datamodule=data, ckpt_path=tmp_path / "last.ckpt")

    def run(callback):
        torch.manual_seed(0)
        module = Module()
        trainer(callback).fit(module, datamodule=data)
        return state(module)

    assert equal(run(callback), run(QAT(plan)))


@pytest.mark.parametrize("kind", ["weights_start", "activations_start", "stages"])
def test_a_finished_float_run_is_quantized_as_its_epoch_wants(kind, trainer, data, tmp_path):
    torch.manual_seed(0)
    trainer(ModelCheckpoint(tmp_path, save_last=True), enable_checkpointing=True).fit(Module(), datamodule=data)
    module = Module()
    trainer(QAT(PLANS[kind])).fit(module, datamodule=data, ckpt_path=tmp_path / "last.ckpt")
    calibrated = Module()
    ptq = PTQ({"rules": PLANS[kind]["rules"]}, calibration_batches=1, phases=["calibrate"])
    trainer(ptq).validate(calibrated, datamodule=data, ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert all(quantizer.is_enabled for quantizer in quantizers(module))
    assert equal(state(module), state(calibrated))


def test_ptq_again_on_its_own_checkpoint(trainer, data, tmp_path):
    def run(checkpoint, **options):
        torch.manual_seed(0)
        module, file = Module(), tmp_path / "model.safetensors"
        t = trainer(PTQ("w4a4", **options), Export(file))
        (result,) = t.validate(module, datamodule=data, ckpt_path=checkpoint, verbose=False)
        t.save_checkpoint(tmp_path / "ptq.ckpt")
        return state(module), result, content(file)

    first = run(None)
    again = run(tmp_path / "ptq.ckpt", calibration_batches=1)  # ranges of one batch would be others
    assert equal(first[0], again[0])
    assert first[1:] == again[1:]
