"""Lower precisions of the Trainer: statistics and scales stay float32, and a resumed run is the uninterrupted one."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn.utils import prune

from lq_plugin import QAT, calibrate, load_checkpoint, prepare
from lq_plugin.model import quantizers
from tests.callbacks.conftest import Module, ResumableLoader

pytestmark = [pytest.mark.filterwarnings("ignore:The dirpath has changed")]


class Loose(Module):
    """The loss in float32, whatever the model computes in."""

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]).float(), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", nn.functional.cross_entropy(self(batch[0]).float(), batch[1]))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-true"])
@pytest.mark.parametrize("plan", ["w4a8", "w4 lsq a4 lsq"])
def test_scales_stay_float32_and_a_resumed_run_is_the_same(plan, precision, trainer, data, tmp_path):
    batches = list(data.train_dataloader())
    data.train_dataloader = lambda: ResumableLoader(batches)

    def run(resume=None):
        L.seed_everything(1, verbose=False)
        module = Loose()
        folder = tmp_path / ("whole" if resume is None else "resumed")
        keep = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=3)
        fit = trainer(QAT(plan), keep, enable_checkpointing=True, precision=precision)
        fit.fit(module, datamodule=data, ckpt_path=resume, weights_only=None if resume is None else True)
        return module, fit

    module, fit = run()
    found = quantizers(module)
    assert all(
        t.dtype == torch.float32 for q in found for t in (*q.parameters(), *q.buffers()) if t.is_floating_point()
    )
    assert all(torch.isfinite(t).all() for q in found for t in q.parameters())
    want = {"bf16-mixed": torch.float32, "bf16-true": torch.bfloat16, "16-true": torch.float16}[precision]
    assert module.net.conv.weight.dtype == want
    again, _ = run(tmp_path / "whole" / "step=3.ckpt")
    states = module.state_dict(), again.state_dict()
    assert all(torch.equal(states[1][key], value) for key, value in states[0].items())
    # Saved and loaded into a module of the same precision, it answers the same.
    fit.save_checkpoint(tmp_path / "end.ckpt")
    fresh = Loose().to(want)
    load_checkpoint(fresh, tmp_path / "end.ckpt")
    x = data.x[:16].to(want)
    with torch.no_grad():
        assert torch.equal(fresh.eval()(x), module.eval()(x))


@pytest.mark.parametrize(
    "make",
    [lambda: nn.Linear(4, 4), lambda: nn.ConvTranspose1d(4, 4, 3), lambda: nn.Conv1d(4, 4, 3)],
    ids=["Linear", "transpose", "conv"],
)
def test_pruned_layers_keep_their_mask(make):
    """torch's pruning computes the weight in a hook and keeps it where quantized weights stand in: it must still be
    there afterwards."""
    torch.manual_seed(0)
    layer = make()
    prune.random_unstructured(layer, "weight", 0.5)
    net = nn.Sequential(layer)
    x = torch.randn(4, 4) if isinstance(layer, nn.Linear) else torch.randn(2, 4, 8)
    prepare(net, "w4a8")
    calibrate(net, [x])
    for training in (True, False):
        net.train(training)
        y = net(x)
        assert torch.equal(layer.weight, layer.weight_orig * layer.weight_mask)
        assert torch.equal(
            layer.quantized_weight()[layer.weight_mask == 0], torch.zeros(int((layer.weight_mask == 0).sum()))
        )
    y.sum().backward()
    assert torch.equal(layer.weight_orig.grad[layer.weight_mask == 0], torch.zeros(int((layer.weight_mask == 0).sum())))
    assert layer.weight_orig.grad.abs().sum() > 0
