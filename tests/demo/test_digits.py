"""The demo's data and model, without quantization."""

import sys

import pytest
import torch
from lightning import Trainer, seed_everything

from lq_plugin.demo.digits import DigitsCNN, DigitsDataModule


def test_the_split_is_always_the_same_disjoint_and_complete():
    first, second = DigitsDataModule(), DigitsDataModule(batch_size=32)
    first.setup()
    second.setup("test")
    images = {name: split.tensors[0] for name, split in first.splits.items()}
    assert {name: len(x) for name, x in images.items()} == {"train": 1077, "val": 360, "test": 360}
    assert all(torch.equal(images[name], second.splits[name].tensors[0]) for name in images)
    every = torch.cat([x.flatten(1) for x in images.values()])
    assert len(torch.unique(every, dim=0)) == len(every) == 1797
    assert images["train"].shape[1:] == (1, 8, 8)
    assert (every.min(), every.max()) == (0.0, 1.0)


def test_without_scikit_learn_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'lq_plugin\[demo\]'"):
        DigitsDataModule().setup()


def test_the_cnn_learns_the_digits_in_a_few_epochs():
    seed_everything(0, verbose=False)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(max_epochs=5, accelerator="cpu", **quiet)
    model, datamodule = DigitsCNN(), DigitsDataModule()
    trainer.fit(model, datamodule)
    (metrics,) = trainer.test(model, datamodule, verbose=False)
    assert metrics["test/acc"] > 0.95
