"""A callback between a Trainer and the trial of a sweep: costs, metrics, and the pruner's answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optuna import TrialPruned

from lq_plugin.callbacks.base import QuantizationCallback
from lq_plugin.errors import QuantizationError, did_you_mean
from lq_plugin.model.measure.cost import cost
from lq_plugin.model.prepare import quantized_layers
from lq_plugin.search.evaluation.costs import cost_totals
from lq_plugin.search.sweep.job import JobTrial, current_trial
from lq_plugin.utilities.lightning_packages import Callback, logged

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class TrialReport(Callback):
    """Reports to the trial of `hydra/sweeper=lq`; does nothing outside of one.

    The costs of a quantized model are known when a fit starts: a trial that breaks a constraint on them ends there.
    After each validation the metrics are noted with the trial, and `monitor` goes to the pruner. With DDP rank 0
    decides.

    Args:
        monitor: a logged metric, the one that the task returns; None: nothing is pruned.

    Raises:
        QuantizationError: `monitor` was not logged.
        TrialPruned: the trial ends.
    """

    def __init__(self, monitor: str | None = None) -> None:
        self.monitor = monitor

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes the costs that are known before training."""
        self._report_costs(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # BOPs are known once a batch has run.
        """Notes the costs again: BOPs are known once a batch has run."""
        self._report_costs(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes the metrics, and ends the trial where the pruner wants that."""
        if trainer.sanity_checking:
            return
        trial = current_trial()
        metrics = logged(trainer)
        if trial is not None:
            trial.note(metrics)
        if trainer.state.fn != "fit":
            self._report_costs(trainer, pl_module)
            return
        prune = False
        if trial is not None and self.monitor is not None:
            if self.monitor not in metrics:
                hint = f"logged: {', '.join(sorted(metrics)) or 'nothing'}.{did_you_mean(self.monitor, metrics)}"
                raise QuantizationError(f"TrialReport: metric {self.monitor!r} is not logged in validation; {hint}")
            trial.report(metrics[self.monitor], trainer.current_epoch)
            prune = trial.should_prune()
        if self._any_rank(trainer, prune):
            raise TrialPruned(f"epoch {trainer.current_epoch}: {self.monitor} {metrics.get(self.monitor or '', 0.0):g}")

    def _report_costs(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trial = current_trial()
        broken = ""
        if trial is not None and quantized_layers(pl_module):
            broken = self._require(trial, trainer, pl_module)
        if self._any_rank(trainer, bool(broken)):
            raise TrialPruned(broken)

    @staticmethod
    def _require(trial: JobTrial, trainer: Trainer, pl_module: LightningModule) -> str:
        recordings = [
            callback.recording
            for callback in trainer.callbacks  # type: ignore[attr-defined]
            if isinstance(callback, QuantizationCallback)
        ]
        try:
            trial.require(cost_totals(cost(pl_module, next(iter(recordings), None))))
        except TrialPruned as pruned:
            return str(pruned)
        return ""

    @staticmethod
    def _any_rank(trainer: Trainer, decision: bool) -> bool:
        """Returns the decision of rank 0, which alone knows the trial, on all ranks."""
        return bool(trainer.strategy.broadcast(decision)) if trainer.world_size > 1 else decision
