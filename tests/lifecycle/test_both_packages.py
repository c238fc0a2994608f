"""Every test runs with `lightning` and with `pytorch_lightning`: the same numbers, the same files."""

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lq_plugin import PTQ, QAT, Export, QuantMonitor, load_checkpoint
from lq_plugin.model.prepare import quantized_layers
from lq_plugin.search import search
from lq_plugin.utilities.instantiate import instantiate_for
from lq_plugin.utilities.lightning_packages import PACKAGES, either, is_overridden, package_of
from tests.test_conf import composed

ROOT = Path(__file__).parents[2]
# Lightning's advice, where PTQ reads a checkpoint of QAT.
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


def make_module(package: Any) -> Any:
    class Module(package.LightningModule):
        def __init__(self, width=8):
            super().__init__()
            self.net = nn.Sequential(
                nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(), nn.Linear(width * 16, 4)
            )

        def training_step(self, batch, batch_idx):
            loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
            self.log("train/loss", loss)
            return loss

        def validation_step(self, batch, batch_idx):
            logits = self.net(batch[0])
            self.log("val/loss", nn.functional.cross_entropy(logits, batch[1]))
            self.log("val/acc", (logits.argmax(1) == batch[1]).float().mean())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    torch.manual_seed(0)
    return Module()


def make_data(package: Any) -> Any:
    class Data(package.LightningDataModule):
        def __init__(self):
            super().__init__()
            generator = torch.Generator().manual_seed(0)
            self.sets = TensorDataset(
                torch.randn(64, 1, 6, 6, generator=generator), torch.randint(0, 4, (64,), generator=generator)
            )

        def train_dataloader(self):
            return DataLoader(self.sets, batch_size=16)

        val_dataloader = train_dataloader

    return Data()


@pytest.fixture(params=PACKAGES)
def package(request) -> Any:
    return import_module(request.param)


@pytest.fixture
def run(tmp_path):
    """Fit, or validate, with callbacks; returns the module and what was logged."""

    def run(package: Any, *callbacks: Any, fn: str = "fit", ckpt_path: Any = None, **options: Any) -> Any:
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "max_epochs": 2}
        quiet |= {
            "logger": False,
            "enable_checkpointing": False,
            "default_root_dir": tmp_path,
            "callbacks": list(callbacks),
        }
        trainer = package.Trainer(**(quiet | options))
        module = make_module(package)
        getattr(trainer, fn)(module, datamodule=make_data(package), ckpt_path=ckpt_path)
        return trainer, module, {name: float(value) for name, value in trainer.callback_metrics.items()}

    return run


def assert_equal(first: nn.Module, second: nn.Module) -> None:
    states = first.state_dict(), second.state_dict()
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def other(package: Any) -> Any:
    return import_module(next(name for name in PACKAGES if name != package.__name__))


@pytest.mark.parametrize("plan", ["w4a8", "w3 lsq a4 lsq"])
def test_training_gives_the_numbers_of_the_other_package(package, run, plan):
    module, metrics = run(package, QAT(plan, distill=0.5))[1:]
    assert len(dict(quantized_layers(module))) == 2
    sibling, same = run(other(package), QAT(plan, distill=0.5))[1:]
    assert_equal(module, sibling)
    assert metrics == same


def test_ptq_with_every_kind_of_phase_gives_the_numbers_of_the_other_package(package, run):
    phases = ["fold_batch_norm", "equalize", "calibrate", {"reconstruct": {"iterations": 5}}]
    module, metrics = run(package, PTQ("w4a8", phases=phases, min_coverage=1.0), fn="validate")[1:]
    sibling, same = run(other(package), PTQ("w4a8", phases=phases), fn="validate")[1:]
    assert_equal(module, sibling)
    assert metrics == same


def test_monitor_and_export_write_their_files(package, run, tmp_path):
    logger = package.loggers.CSVLogger(tmp_path, name="", version="run")
    run(
        package,
        QAT("w4a8"),
        QuantMonitor(float_loss=True, images=False),
        Export(tmp_path / "model.safetensors"),
        logger=logger,
    )
    written = {path.name for path in (tmp_path / "run" / "quant").iterdir()}
    assert {"plan.yaml", "ledger.csv", "report.html"} <= written
    assert "quant/quantized/loss" in (tmp_path / "run" / "metrics.csv").read_text()
    assert (tmp_path / "model.safetensors").stat().st_size > 0


def test_checkpoints_of_one_package_go_on_in_the_other(package, run, tmp_path):
    trainer, module, _ = run(package, QAT("w4a8"))
    trainer.save_checkpoint(path := tmp_path / "run.ckpt")
    evaluated = run(package, PTQ("w4a8"), fn="validate", ckpt_path=path)
    sibling = run(other(package), PTQ("w4a8"), fn="validate", ckpt_path=path)
    assert evaluated[2] == sibling[2]
    load_checkpoint(plain := make_module(other(package)), path)
    assert_equal(plain, module)
    resumed = run(other(package), QAT("w4a8"), ckpt_path=path, max_epochs=4)[1]
    assert_equal(resumed, run(package, QAT("w4a8"), max_epochs=4)[1])


def test_trainers_take_a_single_callback_of_ours(package, run):
    trainer, module, _ = run(package, callbacks=QAT("w4a8"), limit_train_batches=1, max_epochs=1)
    assert isinstance(trainer.callbacks[0], package.Callback)
    assert len(dict(quantized_layers(module))) == 2


def test_lightnings_own_callbacks_are_known_in_both(package, run):
    seen = {}

    class Probe(package.Callback):
        def on_fit_start(self, trainer, pl_module):
            seen["order"] = [type(callback).__name__ for callback in trainer.callbacks]

    finder = package.callbacks.LearningRateFinder(num_training_steps=3, update_attr=False)
    average = package.callbacks.WeightAveraging()
    run(package, finder, average, Probe(), QAT("w4 lsq"), max_epochs=1)
    # A tuner's trial runs need the ranges, and an average needs a copy of the scales.
    assert seen["order"].index("QAT") < seen["order"].index("LearningRateFinder")
    assert any("weight_quantizer" in name for name in average._average_model.module.state_dict())


def test_a_search_makes_trainers_of_the_models_package(package):
    module = make_module(package)
    space = {"weight": {"bit_widths": [2, 8], "ranges": ["mse"]}, "input": "uint8 affine mse"}
    options = {"uniform": True, "seeds": 0, "progress": False, "calibration_batches": 1}
    fidelity = [{"batches": 2}, {"qat": {"max_epochs": 1, "accelerator": "cpu"}}]
    result = search(module, make_data(package), space, "val/acc", 2, fidelity=fidelity, promote_first=1, **options)
    assert result.candidates
    assert package_of(module.trainer) is package
    assert is_overridden("validation_step", module)
    assert not is_overridden("test_step", module)


def test_configs_build_what_belongs_to_the_models_package(package, tmp_path):
    strategy = "+trainer.strategy={_target_: lightning.pytorch.strategies.SingleDeviceStrategy, device: cpu}"
    cfg = composed("logger=csv", strategy, output_dir=tmp_path)
    module = make_module(package)
    callbacks = [instantiate_for(module, entry) for entry in cfg.callbacks.values()]
    trainer = instantiate_for(module, cfg.trainer, callbacks=callbacks, logger=instantiate_for(module, cfg.logger.csv))
    assert isinstance(trainer.checkpoint_callback, package.callbacks.ModelCheckpoint)
    assert {package_of(part) for part in (trainer, *callbacks, trainer.logger, trainer.strategy)} == {package}
    # And back: a config that was written for the other one.
    cfg = composed("trainer._target_=pytorch_lightning.Trainer", "+trainer.logger=false", output_dir=tmp_path)
    assert type(instantiate_for(module, cfg.trainer)) is package.Trainer


def test_what_is_of_neither_package_is_refused():
    with pytest.raises(TypeError, match="Linear derives from no class of lightning.pytorch or pytorch_lightning"):
        package_of(nn.Linear(1, 1))


def test_every_class_that_we_ask_for_exists_in_both():
    sources = [path.read_text() for path in (ROOT / "lq_plugin").rglob("*.py")]
    paths = {path for source in sources for path in re.findall(r'either\("([\w.]+)"\)', source)}
    assert len(paths) > 10
    for package in PACKAGES:
        import_module(package)
    assert {path: len(set(either(path))) for path in paths} == dict.fromkeys(paths, 2)


@pytest.mark.slow
@pytest.mark.parametrize("mine", PACKAGES)
def test_no_package_is_imported_that_the_user_has_not_imported(mine):
    code = f"import sys, {mine}, lq_plugin.callbacks, lq_plugin.search, lq_plugin.utilities.instantiate; "
    code += f"print(sorted(set({PACKAGES}) & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.stdout.strip() == str([mine]), done.stderr
