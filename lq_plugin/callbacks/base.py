"""The base of QAT and PTQ: injection at the one moment that is right for every strategy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lq_plugin.callbacks.phases import TrainerContext
from lq_plugin.callbacks.trainer.data import new_run, one_float_batch
from lq_plugin.callbacks.trainer.load_guard import guard_load_from_checkpoint
from lq_plugin.callbacks.trainer.other_callbacks import move_before, renew_averages, tuners
from lq_plugin.callbacks.trainer.sharding import refuse_unsupported, resharded, warn_of_copies
from lq_plugin.callbacks.trainer.steps import CalibrationStep
from lq_plugin.callbacks.trainer.traces import without_traces
from lq_plugin.errors import PlanError
from lq_plugin.export.planned import plan_for, refuse_for_target
from lq_plugin.intent.plan import QuantPlan
from lq_plugin.model.calibrate import Statistics, evaluating
from lq_plugin.model.checkpoint import is_quantized
from lq_plugin.model.graph.record import Recording, record
from lq_plugin.model.ledger import Ledger, least_coverage
from lq_plugin.model.older_files import leave_out_newer, put_back_newer
from lq_plugin.model.operations.rules import needs_recording
from lq_plugin.model.prepare import prepare, quantized_layers, quantizers, remove
from lq_plugin.model.quantizer_states import load_missing_states, quantizer_states
from lq_plugin.model.unreached import suspend
from lq_plugin.quantizers import Suspension
from lq_plugin.utilities.lightning_packages import Callback, isolate_rng
from lq_plugin.utilities.shown import as_html

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


#: What the callback's state is called that holds the quantizers of a partial checkpoint.
_QUANTIZERS = "quantizers"

guard_load_from_checkpoint()


class QuantizationCallback(Callback):
    """Injects a plan's quantizers into the LightningModule of a Trainer.

    Injection happens right after `configure_model`: later than any place where layers are built,
    earlier than checkpoints, strategies and optimizers look at the parameters.

    Args:
        plan: anything `QuantPlan.parse` reads.
        min_coverage: smallest share of the model that must be quantized, 0..1; below it the run fails before any work.
            A number is the least share of weights that are quantized and of MACs whose operands are, weight and input
            alike; `{"weights": 0.9, "compute": 0.5}` sets each, or one of them.
        dataloader: calibration data; the datamodule's train dataloader when None.
        calibration_step: runs the model on a batch; its own `validation_step` (else test, predict or training step)
            when None.
        target: name of the export target that the model is for; the plan's own when None. Tensors are quantized on that
            target's grid, and what its files cannot hold is refused before any work.
    """

    #: What happens to tensors that no calibration batch reached.
    if_unreached = TrainerContext.if_unreached

    def __init__(
        self,
        plan: QuantPlan | str | Path | Mapping[str, Any],
        min_coverage: float | Mapping[str, float] | None = None,
        dataloader: Iterable[Any] | None = None,
        calibration_step: CalibrationStep | None = None,
        target: str | None = None,
    ) -> None:
        guard_load_from_checkpoint()  # of a package that was imported after us, also
        self.plan = plan_for(QuantPlan.parse(plan), target)
        least_coverage(min_coverage)
        self.min_coverage = min_coverage
        self.dataloader = dataloader
        self.calibration_step = calibration_step
        self.ledger = Ledger()
        self.recording: Recording | None = None
        self.statistics: Statistics = {}
        self.suspension: Suspension | None = None

    def __repr__(self) -> str:
        rule = self.plan.rules[0].to_dict()
        first = ", ".join(f"{key} {value}" for key, value in rule.items() if key != "match")
        others = len(self.plan.rules) - 1
        more = f" and {others} more rule{'s' * (others > 1)}" if others else ""
        target = "" if self.plan.target is None else f" for {self.plan.target}"
        state = self.ledger.summary() if len(self.ledger) else "in no model yet"
        return f"<{type(self).__name__} {rule['match']!r}: {first}{more}{target}; {state}>"

    def _repr_html_(self) -> str:
        """Returns the plan, or what it came to once a model was prepared, for a notebook."""
        shown = self.ledger if len(self.ledger) else self.plan
        return f"<p>{escape(repr(self))}</p>{as_html(shown.table())}"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        new_run(trainer)
        move_before(trainer, self, tuners())
        original = pl_module.configure_model

        def configure_model() -> None:
            # Put back first: a strategy may call it again, and the user's method must not stay patched.
            pl_module.__dict__.pop("configure_model", None)
            original()
            refuse_unsupported(trainer, pl_module, self.needs_whole_model())
            warn_of_copies(trainer, pl_module)
            self.inject(pl_module, self._operations(trainer, pl_module))
            # What runs the model before it has ranges (a summary, a counter of FLOPs, a logger's graph) sees the float
            # one.
            self.suspension = suspend(pl_module)
            renew_averages(trainer, pl_module)

        pl_module.__dict__["configure_model"] = configure_model

    def end_suspension(self) -> None:
        """Lets the model evaluate quantized from now on."""
        if self.suspension is not None:
            self.suspension.active = False

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.end_suspension()

    def needs_whole_model(self) -> list[str]:
        """Returns what the callback does that is impossible where parameters are split over processes."""
        return []

    def _operations(self, trainer: Trainer, pl_module: LightningModule) -> Recording | None:
        """Returns a recorded batch of the float module where the plan names operations that are not known yet."""
        if not needs_recording(pl_module, self.plan):
            return None
        with resharded(pl_module), without_traces(pl_module), evaluating(pl_module), torch.no_grad(), isolate_rng():
            return record(pl_module, one_float_batch(trainer, pl_module, self.dataloader, self.calibration_step))

    def inject(self, pl_module: LightningModule, recording: Recording | None = None) -> Ledger:
        """Puts the quantizers in; nothing changes when they are in already.

        Args:
            pl_module: the module.
            recording: of one batch, where the plan names operations that hold no quantizers yet.
        """
        before = bool(quantizers(pl_module))
        ledger = prepare(pl_module, self.plan, recording)
        try:
            refuse_for_target(pl_module, self.plan)
        except PlanError:
            if not before:
                remove(pl_module)
            raise
        if not self.ledger.same_layers(ledger):
            self.ledger, self.recording = ledger, None
        rank_zero_info(f"{type(self).__name__}: {self.ledger.summary()}")
        return self.ledger

    def record(self, trainer: Trainer, pl_module: LightningModule) -> Recording:
        """Returns the recorded pass of the float model on one batch; run once, then remembered.

        Fills the ledger with functional calls and MACs.

        Raises:
            CoverageError: when less is quantized than `min_coverage` asks for.
            CalibrationError: when there is no batch.
        """
        if self.recording is None:
            self.recording = self.context(trainer, pl_module).record()
            self.ledger.add_recording(self.recording)
            rank_zero_info(f"{type(self).__name__}: {self.ledger.summary()}")
        self.ledger.require(self.min_coverage)
        return self.recording

    def context(self, trainer: Trainer, pl_module: LightningModule, count: int = 1) -> CallbackContext:
        """Returns what phases are given.

        Args:
            trainer, pl_module: of the run.
            count: calibration batches of each rank.
        """
        return CallbackContext(self, trainer, pl_module, count)

    def calibrate(self, trainer: Trainer, pl_module: LightningModule, count: int, missing_only: bool = False) -> None:
        """Finds ranges; the statistics stay in `self.statistics`.

        Args:
            trainer, pl_module: of the run.
            count: calibration batches of each rank.
            missing_only: leave the ranges that are there.
        """
        self.context(trainer, pl_module, count).calibrate(missing_only)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # A run that failed before configure_model must leave no patch in the module.
        pl_module.__dict__.pop("configure_model", None)
        self.end_suspension()

    def state_dict(self) -> dict[str, Any]:
        return {"plan": self.plan.to_dict()}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # The module's own hook comes later, and may leave out whatever is frozen: ranges that have moved can be found
        # nowhere else.
        if not getattr(pl_module, "strict_loading", True):
            checkpoint["callbacks"][self.state_key][_QUANTIZERS] = quantizer_states(pl_module)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        kept = checkpoint["callbacks"].get(self.state_key, {}).get(_QUANTIZERS)
        state = {*checkpoint.get("state_dict", {}), *(kept or {})}
        known = is_quantized(dict.fromkeys(state))
        if known:
            put_back_newer(pl_module)
        if kept is not None:
            # A sharded checkpoint holds the weights apart: there is no "state_dict" to look into.
            load_missing_states(pl_module, kept, checkpoint.get("state_dict", {}))
        if not known:
            return
        if left_out := leave_out_newer(pl_module, state):
            rank_zero_warn(
                f"{type(self).__name__}: the checkpoint comes from a version without ranges for {', '.join(left_out)}: "
                "they stay float, although the plan quantizes them"
            )
        plans = {name: layer.layer_plan for name, layer in quantized_layers(pl_module)}
        if any(entry.plan != plans.get(entry.name, entry.plan) for entry in self.ledger):
            self.inject(pl_module)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        saved = QuantPlan.from_dict(state_dict["plan"])
        if saved.rules != self.plan.rules:
            raise PlanError(
                "the checkpoint was written with another plan:\n"
                f"  checkpoint: {[rule.to_dict() for rule in saved.rules]}\n  here:       "
                f"{[rule.to_dict() for rule in self.plan.rules]}\n"
                "  resume with the checkpoint's plan, or start from its weights only"
            )


class CallbackContext(TrainerContext):
    """A context that keeps the recording and the statistics in a callback.

    Args:
        callback: whose calibration data, step and ledger are used.
        trainer, pl_module: of the run.
        count: calibration batches of each rank.
    """

    def __init__(
        self, callback: QuantizationCallback, trainer: Trainer, pl_module: LightningModule, count: int
    ) -> None:
        super().__init__(
            trainer, pl_module, callback.dataloader, count, callback.calibration_step,
            ledger=callback.ledger, title=type(callback).__name__,
        )  # fmt: skip
        self.callback = callback
        self.if_unreached = callback.if_unreached

    @property
    def recording(self) -> Recording:
        return self.callback.record(self.trainer, self.model)

    def calibrate(self, missing_only: bool = False) -> Statistics:
        self.callback.statistics = super().calibrate(missing_only)
        self.callback.end_suspension()  # the phases that follow look at the quantized model
        return self.callback.statistics
