"""A run that is killed at any step and resumed in a new process is the run that was never killed, bit for bit."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lq_plugin import QAT
from tests.callbacks.conftest import Data, Module, ResumableLoader

ROOT = Path(__file__).parents[2]
#: Learned scales and zero points; stochastic rounding; estimated ranges, found anew each epoch.
PLANS = {
    "learned": [{"match": "*", "weight": "int4 per_channel lsq", "input": "uint4 affine lsq"}],
    "stochastic": [
        {"match": "*", "weight": "int3 per_channel mse stochastic:5", "input": "uint8 affine ema:0.9 stochastic:6"}
    ],
    "stages": [
        {"match": "*", "weight": "int8 per_channel", "input": "uint8 affine ema"},
        {"match": "*", "weight": "twn", "start": "step 5"},
    ],
}
SCHEDULE = {"activations_start": "step 3", "observer_freeze": "step 9", "batch_norm_freeze": "epoch 2"}
EPOCHS, BATCHES = 3, 4


class Killed(L.Callback):
    """SIGKILL in the middle of a training batch: after the backward pass, before the optimizer's step."""

    def __init__(self, step):
        self.step = step

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def optimizers(module):
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-2, total_steps=EPOCHS * BATCHES)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def run(folder, plan, killed_at=None):
    """Entry of a process: train, or go on from the last checkpoint, and write what came out."""
    folder = Path(folder)
    data = Data()
    batches = list(data.train_dataloader())
    data.train_dataloader = lambda: ResumableLoader(batches)
    L.seed_everything(1, verbose=False)
    module = Module(optimizers=optimizers)
    callbacks = [
        QAT({"rules": PLANS[plan], "schedule": SCHEDULE}),
        ModelCheckpoint(folder, save_last=True, every_n_train_steps=1),
    ]
    trainer = L.Trainer(
        accelerator="cpu", callbacks=callbacks + ([] if killed_at is None else [Killed(killed_at)]), max_epochs=EPOCHS,
        logger=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    last = folder / "last.ckpt"
    trainer.fit(
        module, datamodule=data, ckpt_path=last if last.exists() else None, weights_only=True if last.exists() else None
    )
    assert trainer.global_step == EPOCHS * BATCHES
    optimizer, scheduler = trainer.optimizers[0], trainer.lr_scheduler_configs[0].scheduler
    torch.save(
        {"module": module.state_dict(), "optimizer": optimizer.state_dict(), "lr": scheduler.get_last_lr()},
        folder / "end.pt",
    )


def in_new_process(folder, plan, killed_at=None):
    code = f"from tests.lifecycle.test_kill import run; run({str(folder)!r}, {plan!r}, {killed_at})"
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )


def assert_same(got, want, where=""):
    assert type(got) is type(want), where
    if isinstance(want, torch.Tensor):
        assert torch.equal(got, want), where
    elif isinstance(want, dict):
        assert got.keys() == want.keys(), where
        for key, value in want.items():
            assert_same(got[key], value, f"{where}.{key}")
    elif isinstance(want, (list, tuple)):
        assert len(got) == len(want), where
        for index, value in enumerate(want):
            assert_same(got[index], value, f"{where}.{index}")
    else:
        assert got == want, where


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_killed_and_resumed_is_the_uninterrupted_run(plan, tmp_path):
    """Killed twice, each time at a step drawn at random: module, ranges, optimizer and scheduler end bit-equal."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done = in_new_process(whole, plan)
    assert done.returncode == 0, done.stderr[-3000:]
    # Not right after an epoch's last batch: resumed twice from there, Lightning counts that batch again, quantized or
    # not.
    inside = [step for step in range(1, EPOCHS * BATCHES) if step % BATCHES]
    steps = sorted(random.Random(os.urandom(8)).sample(inside, 2))
    for step in steps:
        done = in_new_process(broken, plan, step)
        assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
        assert not (broken / "end.pt").exists()
    done = in_new_process(broken, plan)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(*(torch.load(folder / "end.pt", weights_only=True) for folder in (broken, whole)), f"killed at {steps}")
