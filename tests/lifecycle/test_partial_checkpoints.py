"""Checkpoints that leave the frozen part out, or all that is not trained: a resumed run has the ranges and learned
scales it had."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lq_plugin import QAT
from lq_plugin.model.prepare import quantizers
from tests.callbacks.conftest import Module

pytestmark = pytest.mark.filterwarnings(
    "ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint"
)

PLANS = ["int8 per_channel", "w8a8", "w4 mse a8 mse", "int4 per_channel lsq / int4 lsq"]


class Partial(Module):
    """Its first convolution is frozen."""

    def __init__(self, drop):
        super().__init__()
        self.drop, self.strict_loading = drop, False
        self.net.conv.requires_grad_(False)

    def on_save_checkpoint(self, checkpoint):
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        frozen = {key for key in checkpoint["state_dict"] if key.startswith("net.conv.")}
        kept = trained if self.drop == "what is not trained" else checkpoint["state_dict"].keys() - frozen
        checkpoint["state_dict"] = {key: checkpoint["state_dict"][key] for key in kept}

    def configure_optimizers(self):
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], 1e-2)


def made(drop, batch_norms):
    torch.manual_seed(3)
    module = Partial(drop)
    module.net.load_state_dict({**module.net.state_dict(), **batch_norms})
    return module


def state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def differing(a, b):
    return [name for name in a if not torch.equal(a[name], b[name])]


@pytest.mark.parametrize("drop", ["the frozen part", "what is not trained"])
@pytest.mark.parametrize("plan", PLANS)
def test_resumed_it_is_the_run_that_was_not_stopped(plan, drop, trainer, data, tmp_path):
    batch_norms = {}

    class KeepBatchNorms(Callback):
        """Keeps batch norms apart, as a project does that saves trained parameters alone."""

        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 0:
                batch_norms.update(
                    {k: v.clone() for k, v in pl_module.net.state_dict().items() if k.startswith("bn") and "_" in k}
                )

    whole = made(drop, {})
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer(QAT(plan), saving, KeepBatchNorms(), enable_checkpointing=True).fit(whole, datamodule=data)
    resumed = made(drop, batch_norms)
    # Ranges that were found anew would need these.
    callback = QAT(plan, dataloader=[])
    trainer(callback).fit(resumed, datamodule=data, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert differing(state(whole), state(resumed)) == []


def test_evaluated_it_computes_what_was_saved(trainer, data, tmp_path):
    module = made("the frozen part", {})
    fit = trainer(QAT("w8a8", schedule={"observer_freeze": "epoch 1"}))
    fit.fit(module, datamodule=data)
    fit.save_checkpoint(tmp_path / "part.ckpt")
    (wanted,) = fit.validate(module, datamodule=data, verbose=False)
    other = made("the frozen part", {})
    (result,) = trainer(QAT("w8a8")).validate(other, datamodule=data, ckpt_path=tmp_path / "part.ckpt", verbose=False)
    assert result == wanted


def test_without_the_ranges_only_those_that_are_missing_are_found_anew(trainer, data, tmp_path):
    """Such checkpoints were written before quantizers were kept with them."""
    module = made("the frozen part", {})
    fit = trainer(QAT("w4 mse a8 mse"))
    fit.fit(module, datamodule=data)
    fit.save_checkpoint(tmp_path / "part.ckpt")
    checkpoint = torch.load(tmp_path / "part.ckpt", weights_only=True)
    del checkpoint["callbacks"]["QAT"]["quantizers"]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    other = made("the frozen part", {})
    trainer(QAT("w4 mse a8 mse")).fit(other, datamodule=data, ckpt_path=tmp_path / "old.ckpt")
    assert all(quantizer.is_calibrated for quantizer in quantizers(other))
    assert [name for name in differing(state(module), state(other)) if not name.startswith("net.conv.")] == []


def test_strict_checkpoints_hold_quantizers_once(trainer, data, tmp_path):
    fit = trainer(QAT("w8a8"), max_epochs=1)
    fit.fit(Module(), datamodule=data)
    fit.save_checkpoint(tmp_path / "whole.ckpt")
    assert "quantizers" not in torch.load(tmp_path / "whole.ckpt", weights_only=True)["callbacks"]["QAT"]
