"""Bias correction on a trained model: held-out images get better."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning import Trainer, seed_everything
from torch import Tensor

from lq_plugin import calibrate, prepare
from lq_plugin.demo.digits import DigitsCNN, DigitsDataModule
from lq_plugin.model.graph.record import record
from lq_plugin.ptq.batch_norm.fold import find_batch_norm_pairs, fold_batch_norm
from lq_plugin.ptq.bias_correction.correct import bias_correct


@pytest.fixture(scope="module")
def digits() -> tuple[DigitsCNN, Tensor, Tensor, Tensor]:
    """A small CNN after a few epochs with its batch norms folded, training images, test images and labels."""
    seed_everything(0, verbose=False)
    model, data = DigitsCNN(width=8), DigitsDataModule()
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=4,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=data)
    model.eval()
    images = data.splits["train"].tensors[0][:256]
    with torch.no_grad():
        fold_batch_norm(model, find_batch_norm_pairs(model, record(model, lambda: model(images)))[0])
    return model, images, *data.splits["test"].tensors


@torch.no_grad()
def test_four_bit_weights_with_one_scale_a_tensor_get_better(digits: tuple[DigitsCNN, Tensor, Tensor, Tensor]) -> None:
    model, images, test_images, labels = digits
    batches = list(images.split(64))
    mine = copy.deepcopy(model)
    prepare(mine, "w4 per_tensor")
    calibrate(mine, batches)
    target = model(test_images)
    before = mine(test_images)
    result = bias_correct(mine, batches)
    after = mine(test_images)
    assert len(result.layers) == 6
    errors = [float((y - target).square().mean()) for y in (before, after)]
    accuracies = [float((y.argmax(1) == labels).float().mean()) for y in (target, before, after)]
    assert errors[1] < 0.8 * errors[0]
    assert accuracies[2] >= accuracies[1]
