"""Calibration, distillation, monitoring and search leave nothing behind in the module, in its metrics and in the
loggers."""

import threading
from collections import deque

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger

from lq_plugin import PTQ, QAT, QuantPlan, Rule
from lq_plugin.callbacks import QuantMonitor
from lq_plugin.search import Evaluator
from tests.callbacks.conftest import Data, Module


class Collects(Module):
    """Keeps what its steps see, as people do, and cleans up at the end of an epoch only."""

    def __init__(self):
        super().__init__()
        self.outputs, self.samples, self.last, self.recent = [], 0, None, deque(maxlen=2)
        self.lengths, self.lock = [], threading.Lock()
        self.register_buffer("bank", torch.zeros(4))

    def validation_step(self, batch, batch_idx):
        out = self(batch[0])
        self.outputs.append(out.argmax(1) == batch[1])
        self.samples += len(out)
        self.last = out
        self.recent.append(batch_idx)
        self.bank += out.mean(0).detach()
        self.logger.experiment.add_image("picture", out)
        self.logger.log_metrics({"picture": 1.0})
        self.accuracy(out, batch[1])
        self.log("val/acc", self.accuracy)

    def on_validation_epoch_end(self):
        right = torch.cat(self.outputs)
        self.lengths.append(len(right))
        self.outputs.clear()
        self.log("val/right", right.float().mean())
        self.log("val/samples", float(self.samples))
        self.samples = 0
        self.bank.zero_()

    def teardown(self, stage):
        del self.lock  # cannot be copied


class Lockless(Collects):
    def __init__(self):
        super().__init__()
        del self.lock

    def teardown(self, stage):
        pass


class NeverCleansUp(Lockless):
    """A second validation would report the samples of the first."""

    def on_validation_epoch_end(self):
        self.rows = torch.cat(self.outputs)
        self.log("val/right", self.rows.float().mean())
        self.log("val/samples", float(self.samples))


class Recorder(Logger):
    """Counts what it is sent, by the logger's own methods and by its experiment's."""

    def __init__(self):
        super().__init__()
        self.sent, self.name, self.version = [], "recorder", 0

    name = version = None

    @property
    def experiment(self):
        return self

    def add_image(self, *args):
        self.sent.append("picture")

    def log_metrics(self, metrics, step=None):
        self.sent += [name for name in metrics if name == "picture"]

    def log_hyperparams(self, *args, **kwargs):
        pass


PHASES = {
    "calibrate": ["calibrate"],
    "fold and correct": ["fold_batch_norm", "calibrate", "correct_batch_norm"],
    "equalize and gptq": ["fold_batch_norm", "equalize", "calibrate", "gptq"],
    "reestimate and bias": ["reestimate_batch_norm", "fold_batch_norm", "calibrate", "bias_correct"],
    "reconstruct": ["calibrate", {"reconstruct": {"iterations": 2}}],
}


@pytest.mark.parametrize("phases", PHASES)
def test_ptq_reports_the_validation_set_alone(trainer, data, phases):
    torch.manual_seed(0)
    module, recorder = Collects(), Recorder()
    (result,) = trainer(PTQ("w4a8", phases=PHASES[phases]), logger=recorder).validate(
        module, datamodule=data, verbose=False
    )
    assert module.lengths == [32]
    assert result["val/samples"] == 32.0
    assert recorder.sent == ["picture"] * 4  # two batches, each by the experiment and by the logger
    x, y = data.x[64:], data.y[64:]
    module.eval()
    with torch.no_grad():
        assert result["val/right"] == pytest.approx((module(x).argmax(1) == y).float().mean().item())


@pytest.mark.parametrize("options", [{}, {"distill": 0.5}, {"init_batches": 3}], ids=str)
def test_qat_and_its_teacher_keep_nothing(trainer, data, options):
    torch.manual_seed(0)
    module, recorder, found = Lockless(), Recorder(), []
    callback = QAT("w4a8", **options)

    class Look(Callback):
        def on_train_start(self, trainer, pl_module):
            found.append(
                (
                    list(pl_module.outputs),
                    pl_module.samples,
                    pl_module.last,
                    list(pl_module.recent),
                    pl_module.bank.tolist(),
                )
            )

        def on_train_epoch_end(self, trainer, pl_module):
            if callback.teacher is not None:
                assert not callback.teacher.module.outputs
                assert callback.teacher.module.samples == 0

    quiet = {"num_sanity_val_steps": 0, "max_epochs": 2, "logger": recorder}
    trainer(callback, Look(), **quiet).fit(module, datamodule=data)
    assert found == [([], 0, None, [], [0.0] * 4)]
    assert module.lengths == [32, 32]
    assert recorder.sent == ["picture"] * 8


def test_the_monitors_float_loss(trainer, data):
    torch.manual_seed(0)
    module, recorder = Collects(), Recorder()
    monitor = QuantMonitor(every_n_steps=2, float_loss=True, images=False, page=False, terminal=False)
    trainer(QAT("w4a8"), monitor, logger=recorder, num_sanity_val_steps=0).fit(module, datamodule=data)
    assert module.lengths == [32, 32]
    assert recorder.sent == ["picture"] * 8


def test_search_trials_find_the_same_module(data):
    torch.manual_seed(0)
    module = NeverCleansUp()
    with Evaluator(module, data) as evaluator:
        evaluator.calibrate({"weight": ["int4", "int8"]})
        first = evaluator.evaluate("int8").metrics
        evaluator.evaluate("int4")
        assert evaluator.evaluate("int8").metrics == first
        assert first["val/samples"] == 32.0
    assert module.lengths == []
    assert module.outputs == []
    assert module.samples == 0
    assert module.bank.tolist() == [0.0] * 4
    assert not hasattr(module, "rows")


class Transfers:
    """Counts the batches that each transfer hook sees, and those of training apart."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen, self.devices = {"before": 0, "to device": 0, "after": []}, 0

    def on_before_batch_transfer(self, batch, dataloader_idx):
        self.seen["before"] += 1
        return super().on_before_batch_transfer(batch, dataloader_idx)

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        self.seen["to device"] += 1
        self.devices += 1
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        self.seen["after"].append(len(batch[0]))
        return super().on_after_batch_transfer(batch, dataloader_idx)


class CountingData(Transfers, Data):
    pass


class CountingModule(Transfers, Module):
    train_dataloader, val_dataloader = Data.train_dataloader, Data.val_dataloader
    batch_size, x, y = 16, Data().x, Data().y


#: Such a plan records a batch before the strategy has moved the module.
NAMES_AN_OPERATION = QuantPlan([*QuantPlan.parse("w4a8").rules, Rule("type:add", input="int8 ema")])
RUNS = {
    "ptq": lambda: ("validate", PTQ("w4a8", phases=PHASES["fold and correct"])),
    "qat": lambda: ("fit", QAT("w4a8", init_batches=3)),
    "operations, teacher and monitor": lambda: (
        "fit",
        QAT(NAMES_AN_OPERATION, distill=0.5),
        QuantMonitor(images=False, float_loss=True),
    ),
}


@pytest.mark.parametrize("kinds", [(Module, CountingData), (CountingModule, type(None))])
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_hooks_that_transfer_batches_count_those_of_the_float_run(run, kinds, trainer):
    counts = []
    for quantized in (False, True):
        torch.manual_seed(0)
        task, *callbacks = run()
        module, data = (kind() for kind in kinds)
        runner = trainer(*(callbacks if quantized else ()), num_sanity_val_steps=0, logger=Recorder())
        getattr(runner, task)(module, datamodule=data)
        counter = data or module
        assert counter.devices == len(counter.seen["after"]) > 1
        counts.append(counter.seen)
    assert counts[0] == counts[1]


def test_loggers_keep_their_class_name_and_folder_while_they_are_silent(trainer, data, tmp_path):
    seen = []

    class Asks(Module):
        def validation_step(self, batch, batch_idx):
            seen.append(
                (
                    type(self.logger).__name__,
                    isinstance(self.logger, TensorBoardLogger),
                    self.logger.log_dir,
                    self.trainer.log_dir,
                )
            )
            self.logger.experiment.add_scalar("mine", 1.0, batch_idx)
            super().validation_step(batch, batch_idx)

    logger = TensorBoardLogger(tmp_path)
    written = []
    logger.experiment.add_scalar = lambda *args, **kwargs: written.append(args[0])
    trainer(PTQ("w4a8"), logger=logger).validate(Asks(), datamodule=data, verbose=False)
    assert len(seen) > 2
    assert set(seen) == {("TensorBoardLogger", True, logger.log_dir, logger.log_dir)}
    assert written.count("mine") == 2
