"""Show what quantization does, in whatever loggers the Trainer has."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn

from lq_plugin.callbacks.monitor.live import Flips, History, losses
from lq_plugin.callbacks.monitor.loggers import Report, report_to
from lq_plugin.callbacks.monitor.moment import MonitoredModel, quantization_of
from lq_plugin.callbacks.monitor.scores import Scoreboard
from lq_plugin.errors import QuantizationError, is_integer
from lq_plugin.extras import need_packages
from lq_plugin.model.measure.fidelity import Measurements, watching
from lq_plugin.report import Series
from lq_plugin.utilities.lightning_packages import Callback, logged

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

#: Optimizer steps between two measurements of the float loss: two forward passes a hundred steps are under 1 %.
FLOAT_LOSS_STEPS = 100


class QuantMonitor(Callback):
    """Logs bits, ranges, SQNR, clipping, coverage and cost, next to a `QAT` or `PTQ` callback.

    Scalars go to every logger, under `quant/` and `quant_layer/` (`quant/effective_bits`,
    `quant_layer/conv1/weight_sqnr_db`): when training starts, every `every_n_epochs` epochs and `every_n_steps`
    optimizer steps, and at the end; with `trainer.validate`, `test` and `predict` once, after the loop. Tables, the
    plan and pictures go to the loggers that take them, at the start and at the end only:

    * `WandbLogger`: tables, pictures, the plan in the config, and one artifact with all files and the report page;
    * `TensorBoardLogger`: pictures, the plan and the ledger as text, and a row of HParams with the plan and the scores;
    * `MLFlowLogger`: files, pictures and the report page as artifacts in `quant/`;
    * `CSVLogger`: files and the report page in `<log_dir>/quant`.

    Weights are measured as they are. Activations are measured on a batch that runs anyway: the last before the
    log (the first of an epoch whose length is not known), the first of an evaluation; before that, on the statistics of
    the calibration. No forward pass is added (but by `float_loss`), no random number is drawn, nothing of the Trainer's
    metrics is touched. A compiled model runs that one batch uncompiled.

    Next to them are trained scales (`<layer>/weight_scale_min`, `_scale_max`), and for weights of at most two bits the
    share of zeros and the share whose sign flipped since the last log (`<layer>/weight_zeros`, `_flips`). The same
    numbers and the run's own metrics are the curves of the report page.

    A log costs 0.3 to 0.4 of a training step (ResNet-20, batch 128), so one every 100 steps is far under 1 % of a run.
    Pictures and page cost about 10 steps at the start and at the end. There one calibration batch runs three times
    more, in one process only, to see how error accumulates from layer to layer.
    Infinite numbers, such as the SQNR of an all-zero weight, stay in the tables and out of the scalars.

    Args:
        every_n_epochs: how often scalars are logged; None: not by epochs.
        every_n_steps: the same by optimizer steps.
        images: draw pictures, by matplotlib (`pip install "lq_plugin[plots]"`).
        max_layers: the largest so many layers get a box plot and a histogram of their own.
        page: add the report page (`lq_plugin.report`) to the files of the last report, about 0.2 s a layer.
        float_loss: every `FLOAT_LOSS_STEPS` optimizer steps at most, when scalars are due, run the module's validation
            step on the training batch twice, quantized and float: `quant/quantized/loss`, `quant/float/loss`.
        terminal: print a table of the layers when training starts and when it or an evaluation ends; None: where the
            Trainer shows a progress bar.
        scores: metrics of other variants of this model, for the page: `{"float": {"val/acc": 0.98}}`. The run's own
            evaluations are `PTQ` or `QAT` there; with `Trainer(num_sanity_val_steps=-1)` the sanity check before the
            first step of QAT is `PTQ`.

    Raises:
        QuantizationError: impossible arguments; in `setup`, when the Trainer has neither `QAT` nor `PTQ`.

    >>> from lightning import Trainer
    >>> from lq_plugin.callbacks import QAT
    >>> trainer = Trainer(callbacks=[QAT("w4a8"), QuantMonitor(every_n_epochs=5)], logger=False, accelerator="cpu")
    """

    def __init__(
        self,
        every_n_epochs: int | None = 1,
        every_n_steps: int | None = None,
        images: bool = True,
        max_layers: int = 8,
        page: bool = True,
        float_loss: bool = False,
        terminal: bool | None = None,
        scores: Mapping[str, Mapping[str, float]] | None = None,
    ) -> None:
        for name, value in (("every_n_epochs", every_n_epochs), ("every_n_steps", every_n_steps)):
            if value is not None and not is_integer(value, 1):
                raise QuantizationError(f"{name} is a number of 1 or more, or None, got {value!r}")
        if not is_integer(max_layers, 0):
            raise QuantizationError(f"max_layers is a number of layers, 0 or more, got {max_layers!r}")
        self.every_n_epochs = every_n_epochs
        self.every_n_steps = every_n_steps
        self.images = images
        self.page = page
        self.float_loss = float_loss
        self.terminal = terminal
        self.max_layers = max_layers
        self._measured: Measurements = {}
        self._watch = ExitStack()
        self._logged_step: int | None = None
        self._flips, self._history = Flips(), History()
        self._epoch_steps: int | None = None
        self._losses: dict[str, float] = {}
        self._losses_step: int | None = None
        self.scoreboard = Scoreboard(scores)

    @property
    def training(self) -> list[Series]:
        """Curves of the last fit, for `model_report(training=...)`."""
        return self._history.series()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        quantization_of(trainer)
        if self.images and trainer.loggers:
            need_packages("QuantMonitor with pictures (images=False leaves them out)", "matplotlib", "PIL")
        self._measured = {}
        self._logged_step = self._losses_step = None
        self._flips, self._losses = Flips(), {}
        if stage == "fit":
            self._history, self._epoch_steps = History(), None
        if not trainer.loggers and not self.terminal:
            rank_zero_warn("QuantMonitor: the Trainer has no logger, so nothing is shown")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        batches = trainer.num_training_batches
        self._epoch_steps = (
            None if batches == float("inf") else max(1, -(-int(batches) // trainer.accumulate_grad_batches))
        )
        # Not on_fit_start: there QAT may calibrate after this callback.
        self._log(trainer, pl_module, "start")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        batches = trainer.num_training_batches
        by_epoch = self._epoch_is_due(trainer) and batch_idx == (0 if batches == float("inf") else batches - 1)
        by_step = self.every_n_steps is not None and (trainer.global_step + 1) % self.every_n_steps == 0
        if by_epoch or by_step:
            if self.float_loss and (
                self._losses_step is None or trainer.global_step - self._losses_step >= FLOAT_LOSS_STEPS
            ):
                # On all ranks: a strategy that shards layers needs them all for a forward pass.
                self._losses, self._losses_step = losses(trainer, pl_module, batch), trainer.global_step
            self._start_watching(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._watch.close()
        step = trainer.global_step
        # Gradient accumulation comes here several times at one step.
        if self.every_n_steps is not None and step and step % self.every_n_steps == 0 and step != self._logged_step:
            self._log(trainer, pl_module, "scalars")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._epoch_is_due(trainer) and trainer.global_step != self._logged_step:
            self._log(trainer, pl_module, "scalars")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log(trainer, pl_module, "end")

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == dataloader_idx == 0:
            self.scoreboard.start(trainer)
            if trainer.state.fn != "fit":
                self._start_watching(trainer, pl_module)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.scoreboard.see(batch, dataloader_idx)
        if trainer.state.fn != "fit":
            self._watch.close()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.scoreboard.end(trainer, quantization_of(trainer))
        if trainer.state.fn != "fit":
            self._log(trainer, pl_module, "once")

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start
    on_test_batch_end = on_predict_batch_end = on_validation_batch_end
    on_test_end = on_predict_end = on_validation_end

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._watch.close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._watch.close()
        self._measured = {}

    def _epoch_is_due(self, trainer: Trainer) -> bool:
        return self.every_n_epochs is not None and (trainer.current_epoch + 1) % self.every_n_epochs == 0

    def _start_watching(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and trainer.loggers:
            self._watch.close()
            # Compiled code would not see the hooks.
            self._watch.enter_context(torch.compiler.set_stance("force_eager"))
            self._measured = self._watch.enter_context(watching(pl_module))

    def _log(self, trainer: Trainer, pl_module: LightningModule, moment: str) -> None:
        """Logs at a `moment`: start, scalars, end (of a fit) or once (an evaluation)."""
        shown = (trainer.progress_bar_callback is not None) if self.terminal is None else self.terminal
        if not trainer.is_global_zero or not (trainer.loggers or shown):
            return
        state = MonitoredModel.of(trainer, pl_module, self._measured)
        report = Report(step=trainer.global_step)
        if moment != "end" or self._logged_step != report.step:
            flips = {f"quant_layer/{name}": value for name, value in self._flips.measure(state.layers).items()}
            report = replace(report, scalars=state.scalars() | flips | self._losses)
            self._losses = {}
        metrics = logged(trainer)
        if moment != "once":
            self._history.add(report.step, metrics | state.curves(report.scalars))
        if shown and moment != "scalars":
            pl_module.print(state.text(moment, metrics))
        if moment != "scalars":
            report = replace(
                report,
                plan=state.callback.plan,
                tables=state.tables(),
                final=moment != "start",
                metrics=metrics | state.totals(),
            )
            if self.images:
                pictures = state.pictures(self.max_layers, activations=moment != "end")
                report = replace(report, pictures=list(pictures))
            if self.page and report.final:
                pages = state.pages(trainer, metrics, self.training, self._epoch_steps, self.scoreboard)
                report = replace(report, pages=pages)
        self._logged_step = report.step
        for logger in trainer.loggers:
            report_to(logger, report)
