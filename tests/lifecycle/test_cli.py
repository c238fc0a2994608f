"""LightningCLI with our callbacks in its YAML, of both packages of Lightning, in one process and in two."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lq_plugin import PTQ, QAT, load_checkpoint
from lq_plugin.model.prepare import quantized_layers, quantizers
from lq_plugin.utilities.lightning_packages import PACKAGES

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter is intended")


@pytest.fixture(autouse=True)
def what_lightning_uses_of_its_parser_is_not_ours(monkeypatch):
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")


TRAINER = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "max_epochs": 2,
}
QAT_OPTIONS = {
    "plan": {"rules": [{"match": "*", "weight": "int4 lsq", "input": "uint8 affine ema:0.5"}]},
    "schedule": {"activations_start": "step 2"},
    "distill": {"weight": 0.5},
    "init_batches": 2,
}
PTQ_OPTIONS = {
    "plan": "w4a8",
    "calibration_batches": 2,
    "phases": ["calibrate", {"reconstruct": {"iterations": 3}}],
    "seed": 3,
}
CALLBACKS = {"QAT": QAT_OPTIONS, "PTQ": PTQ_OPTIONS}


def classes(package: Any) -> tuple[Any, Any]:
    """A module and data of a package, with options that the command line sets."""

    class Net(package.LightningModule):
        def __init__(self, width: int = 8) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net = nn.Sequential(nn.Conv2d(1, width, 3), nn.ReLU(), nn.Flatten(), nn.Linear(width * 16, 4))

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, batch_idx):
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
            self.log("train/loss", loss)
            return loss

        def validation_step(self, batch, batch_idx):
            self.log("val/loss", nn.functional.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    class Numbers(package.LightningDataModule):
        def __init__(self, batch_size: int = 16) -> None:
            super().__init__()
            self.batch_size = batch_size
            generator = torch.Generator().manual_seed(0)
            self.sets = TensorDataset(
                torch.randn(64, 1, 6, 6, generator=generator), torch.randint(0, 4, (64,), generator=generator)
            )

        def train_dataloader(self):
            return DataLoader(self.sets, batch_size=self.batch_size)

        val_dataloader = train_dataloader

    return Net, Numbers


def run(name: str, arguments: list[str]) -> Any:
    """Runs the command line of a package on its own classes, as a user's script does."""
    command_line = import_module(f"{name}.cli").LightningCLI
    return command_line(*classes(import_module(name)), args=arguments)


def config(folder: Path, callback: str, **trainer: Any) -> Path:
    entry = {"class_path": f"lq_plugin.{callback}", "init_args": CALLBACKS[callback]}
    content = {
        "seed_everything": 7,
        "model": {"width": 4},
        "data": {"batch_size": 8},
        "trainer": TRAINER | {"default_root_dir": str(folder), "callbacks": [entry]} | trainer,
    }
    path = folder / f"{callback}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def by_hand(name: str, fn: str, folder: Path, callback: Any) -> Any:
    package = import_module(name)
    package.seed_everything(7, workers=True, verbose=False)
    net, numbers = classes(package)
    module, data = net(width=4), numbers(batch_size=8)
    trainer = package.Trainer(**TRAINER, default_root_dir=folder, callbacks=[callback])
    getattr(trainer, fn)(module, datamodule=data)
    return trainer, module


def assert_equal(first: nn.Module, second: nn.Module) -> None:
    states = first.state_dict(), second.state_dict()
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize("name", PACKAGES)
def test_qat_from_yaml_is_qat_from_python_and_its_saved_config_repeats_it(name, tmp_path):
    """Plan, schedule and distillation as mappings; `config.yaml`, which the command line writes, is the run again."""
    line = run(name, ["fit", "--config", str(config(tmp_path, "QAT"))])
    assert len(dict(quantized_layers(line.model))) == 2
    assert all(quantizer.is_calibrated for quantizer in quantizers(line.model))
    trainer, module = by_hand(name, "fit", tmp_path / "hand", QAT(**QAT_OPTIONS))
    assert_equal(line.model, module)
    assert line.trainer.callback_metrics == trainer.callback_metrics
    (callback,) = (callback for callback in line.trainer.callbacks if isinstance(callback, QAT))
    assert repr(callback.plan) == repr(QAT(**QAT_OPTIONS).plan)
    again = run(
        name, ["fit", "--config", str(tmp_path / "config.yaml"), "--trainer.default_root_dir", str(tmp_path / "2")]
    )
    assert_equal(again.model, module)
    # Its checkpoint builds the module by the options that the command line set.
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    assert_equal(load_checkpoint(classes(import_module(name))[0], tmp_path / "run.ckpt"), module)


@pytest.mark.parametrize("name", PACKAGES)
def test_ptq_from_yaml_and_options_of_the_command_line(name, tmp_path):
    path = config(tmp_path, "PTQ")
    line = run(name, ["validate", "--config", str(path)])
    trainer, module = by_hand(name, "validate", tmp_path, PTQ(**PTQ_OPTIONS))
    assert_equal(line.model, module)
    assert line.trainer.callback_metrics == trainer.callback_metrics
    plain = yaml.safe_load(path.read_text())
    plain["trainer"]["callbacks"] = None
    path.write_text(yaml.safe_dump(plain))
    options = ["--trainer.callbacks+=lq_plugin.PTQ", "--trainer.callbacks.plan=w2", "--trainer.default_root_dir"]
    options.append(str(tmp_path / "2"))
    line = run(name, ["validate", "--config", str(path), *options])
    assert {q.spec.bit_width for q in quantizers(line.model)} == {2}


@pytest.mark.parametrize("name", PACKAGES)
def test_a_wrong_option_ends_the_command_line_with_our_words(name, tmp_path, capsys):
    arguments = ["fit", "--config", str(config(tmp_path, "QAT")), "--trainer.callbacks.init_batches=-1"]
    with pytest.raises((SystemExit, Exception)) as found:
        run(name, arguments)
    assert "init_batches is a number of batches, 0 or more" in f"{found.value}{capsys.readouterr().err}"


@pytest.mark.slow
@pytest.mark.parametrize("name", PACKAGES)
def test_two_processes_of_either_package(name, tmp_path):
    """DDP by gloo, from YAML: both ranks end with the same model, whose ranges are those of both shares."""
    path = config(tmp_path, "QAT", devices=2, strategy="ddp")
    done = subprocess.run(
        [sys.executable, "-m", "tests.lifecycle.test_cli", name, str(tmp_path), "fit", "--config", str(path)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    # The first layer's input is the data itself. Its average stays inside the extremes, and near.
    x = classes(import_module(name))[1]().sets.tensors[0]
    low, high = (first[f"net.0.input_quantizer.running_{end}"] for end in ("min", "max"))
    assert x.min() <= low < 0.6 * x.min()
    assert 0.6 * x.max() < high <= x.max()


if __name__ == "__main__":
    package, folder, *rest = sys.argv[1:]
    done = run(package, rest)
    torch.save(done.model.state_dict(), f"{folder}/{done.trainer.global_rank}.pt")
