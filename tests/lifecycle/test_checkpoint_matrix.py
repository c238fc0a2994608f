"""Every kind of checkpoint into every entry of a Trainer: bit-equal, or a clear error, and never silently float."""

import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch

from lq_plugin import PTQ, QAT, CalibrationError, load_checkpoint
from lq_plugin.model import quantizers
from tests.callbacks.conftest import Data, Module

PLAN = "w3 mse a4"
#: The activations are float in the first epoch: a checkpoint of that time is of a half-quantized model.
SCHEDULE = {"activations_start": "epoch 1"}
KINDS = ["qat", "ptq", "mid"]
ENTRIES = ["validate", "test", "predict"]
pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]


class Watched(Module):
    """Keeps what it answers in evaluation."""

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.answers.append(self(batch[0]))

    def test_step(self, batch, batch_idx):
        self.answers.append(self(batch[0]))

    def predict_step(self, batch, batch_idx):
        self.answers.append(self(batch[0]))
        return self.answers[-1]

    def __init__(self):
        super().__init__()
        self.answers = []


class Batches(Data):
    test_dataloader = predict_dataloader = Data.val_dataloader


def make_trainer(folder, *callbacks, epochs=2):
    return L.Trainer(
        accelerator="cpu", callbacks=list(callbacks), max_epochs=epochs, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip


def evaluated(folder, entry, path, *callbacks, module=None):
    """Returns the answers of a new module on the validation data when its Trainer loads the checkpoint."""
    L.seed_everything(7, verbose=False)  # other weights than those that were saved
    module = module or Watched()
    options = {} if entry == "predict" else {"verbose": False}
    getattr(make_trainer(folder, *callbacks), entry)(
        module, datamodule=Batches(), ckpt_path=path, weights_only=True, **options
    )
    return torch.cat(module.answers[-2:])  # a calibration runs the step too, before


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints of all kinds, whole and with weights only, and what their models answer."""
    folder = tmp_path_factory.mktemp("matrix")
    x = torch.cat([batch[0] for batch in Data().val_dataloader()])
    L.seed_everything(0, verbose=False)
    module = Watched()

    def save(name, trainer):
        module.answers.clear()
        trainer.save_checkpoint(folder / f"{name}.ckpt")
        trainer.save_checkpoint(folder / f"{name}-weights.ckpt", weights_only=True)
        with torch.no_grad():
            torch.save(torch.cat([module.eval()(part) for part in x.split(16)]), folder / f"{name}.pt")
        module.train()

    fit = make_trainer(folder, epochs=1)
    fit.fit(module, datamodule=Batches())
    save("float", fit)
    validate = make_trainer(folder, PTQ(PLAN, phases=["calibrate"]))
    validate.validate(module, datamodule=Batches(), verbose=False)
    save("ptq", validate)
    module = Watched()
    fit = make_trainer(folder, QAT(PLAN, schedule=SCHEDULE), epochs=1)
    fit.fit(module, datamodule=Batches())
    save("mid", fit)
    fit = make_trainer(folder, QAT(PLAN, schedule=SCHEDULE))
    fit.fit(module, datamodule=Batches(), ckpt_path=folder / "mid.ckpt", weights_only=True)
    save("qat", fit)
    return folder


def answers(folder, name):
    return torch.load(folder / f"{name}.pt", weights_only=True)


def test_the_four_models_differ(saved):
    found = [answers(saved, name) for name in ("float", *KINDS)]
    assert all(not torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])


@pytest.mark.parametrize("weights", ["", "-weights"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("entry", ENTRIES)
def test_evaluation_is_that_of_the_saved_model(entry, kind, weights, saved):
    callback = PTQ(PLAN) if kind == "ptq" else QAT(PLAN, schedule=SCHEDULE)
    assert torch.equal(evaluated(saved, entry, saved / f"{kind}{weights}.ckpt", callback), answers(saved, kind))


@pytest.mark.parametrize("kind", ["qat", "ptq"])
@pytest.mark.parametrize("entry", ENTRIES)
def test_ptq_and_qat_read_each_other(entry, kind, saved):
    """Calibrated is calibrated: PTQ finds no new ranges."""
    callback = QAT(PLAN, schedule=SCHEDULE) if kind == "ptq" else PTQ(PLAN)
    assert torch.equal(evaluated(saved, entry, saved / f"{kind}.ckpt", callback), answers(saved, kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("entry", ENTRIES)
def test_without_a_callback_a_quantized_checkpoint_is_refused(entry, kind, saved):
    with pytest.raises(RuntimeError, match=r"Unexpected key.*weight_quantizer"):
        evaluated(saved, entry, saved / f"{kind}.ckpt")
    with pytest.raises(RuntimeError, match=r"Unexpected key.*weight_quantizer"):
        Watched.load_from_checkpoint(saved / f"{kind}.ckpt", weights_only=True)
    with pytest.raises(RuntimeError, match=r"lq_plugin\.load_checkpoint\(Watched, path\)"):
        Watched.load_from_checkpoint(saved / f"{kind}.ckpt", weights_only=True)


@pytest.mark.parametrize("weights", ["", "-weights"])
@pytest.mark.parametrize("entry", ENTRIES)
def test_float_checkpoints(entry, weights, saved):
    """PTQ calibrates them; QAT, which has no ranges in an evaluation, says so; without a callback they are what they
    were."""
    path = saved / f"float{weights}.ckpt"
    assert torch.equal(evaluated(saved, entry, path), answers(saved, "float"))
    assert torch.equal(evaluated(saved, entry, path, PTQ(PLAN, phases=["calibrate"])), answers(saved, "ptq"))
    with pytest.raises(CalibrationError, match=r"net\.conv.* has no range yet"):
        evaluated(saved, entry, path, QAT(PLAN))


@pytest.mark.parametrize("weights", ["", "-weights"])
@pytest.mark.parametrize("kind", KINDS)
def test_load_checkpoint_and_a_plain_module(kind, weights, saved):
    path = saved / f"{kind}{weights}.ckpt"
    module = Watched()
    load_checkpoint(module, path, PLAN if weights else None)
    x = torch.cat([batch[0] for batch in Data().val_dataloader()])
    with torch.no_grad():
        assert torch.equal(torch.cat([module.eval()(part) for part in x.split(16)]), answers(saved, kind))
    assert torch.equal(evaluated(saved, "predict", None, module=module), answers(saved, kind))


@pytest.mark.parametrize("kind", ["float", *KINDS])
@pytest.mark.parametrize("weights", ["", "-weights"])
def test_torch_load_takes_all_of_them_as_plain_data(weights, kind, saved):
    content = torch.load(saved / f"{kind}{weights}.ckpt", weights_only=True)
    assert any("quantizer" in key for key in content["state_dict"]) == (kind != "float")


@pytest.mark.parametrize("kind", ["float", "ptq"])
def test_fit_starts_from_float_and_ptq_weights(kind, saved):
    """From a float checkpoint ranges are found first; from a PTQ checkpoint they are there."""
    L.seed_everything(7, verbose=False)
    module, seen = Watched(), []

    class Look(L.Callback):
        def on_train_start(self, trainer, pl_module):
            seen.extend(q.is_calibrated for q in quantizers(pl_module) if q.needs_calibration)

    callback = PTQ(PLAN) if kind == "ptq" else None
    if callback is not None:
        evaluated(saved, "validate", saved / "ptq.ckpt", callback, module=module)
    fit = make_trainer(saved, QAT(PLAN), Look())
    fit.fit(
        module, datamodule=Batches(), ckpt_path=saved / "float.ckpt" if kind == "float" else None, weights_only=True
    )
    assert fit.global_step == 8
    assert seen
    assert all(seen)
    assert fit.current_epoch == 2


def test_fit_cannot_resume_from_weights_alone(saved):
    for kind in ("float", "qat"):
        with pytest.raises(KeyError, match="contains only the model"):
            make_trainer(saved, QAT(PLAN, schedule=SCHEDULE)).fit(
                Watched(), datamodule=Batches(), ckpt_path=saved / f"{kind}-weights.ckpt", weights_only=True
            )


def answer_in_new_process(folder):
    """Entry of the new process: evaluates every kind of checkpoint and compares."""
    folder = Path(folder)
    for kind in KINDS:
        for entry in ENTRIES:
            callback = PTQ(PLAN) if kind == "ptq" else QAT(PLAN, schedule=SCHEDULE)
            assert torch.equal(evaluated(folder, entry, folder / f"{kind}.ckpt", callback), answers(folder, kind)), (
                kind,
                entry,
            )
        module = Watched()
        load_checkpoint(module, folder / f"{kind}.ckpt")
        assert torch.equal(evaluated(folder, "predict", None, module=module), answers(folder, kind)), kind


@pytest.mark.slow
def test_in_a_new_process(saved):
    module = "tests.lifecycle.test_checkpoint_matrix"
    code = f"from {module} import answer_in_new_process; answer_in_new_process({str(saved)!r})"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
