"""QAT: quantization-aware training of any LightningModule."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lq_plugin.callbacks.base import QuantizationCallback
from lq_plugin.callbacks.distill import Distillation, Teacher
from lq_plugin.callbacks.trainer.data import all_reduce_max, statistics_merger
from lq_plugin.callbacks.trainer.float_resume import is_float, make_room_for_ranges
from lq_plugin.callbacks.trainer.optimizers import (
    RangeOptimizer,
    adopt_learned_ranges,
    hide_learned_ranges,
    show_learned_ranges,
)
from lq_plugin.callbacks.trainer.other_callbacks import renew_averages, start_averages
from lq_plugin.callbacks.trainer.sharding import average_gradients, whole_weights
from lq_plugin.callbacks.trainer.steps import CalibrationStep
from lq_plugin.errors import PlanError, is_integer
from lq_plugin.intent.plan import QuantPlan
from lq_plugin.intent.schedule import Schedule, Switches
from lq_plugin.layers import QuantizedLayer, weight_of
from lq_plugin.layers.integer import (
    disable_integer_forward,
    enable_integer_forward,
    integer_choices,
    integer_report,
    settle_integer_forward,
)
from lq_plugin.model.operations.quantized import quantized_operations
from lq_plugin.model.prepare import late_layers, quantized_layers, quantizers
from lq_plugin.model.training import clip_latent_weights, commit_observers, enter_stage, forget_batch
from lq_plugin.model.unreached import REASON, reached_any, settle, unreached, waiting
from lq_plugin.ptq.batch_norm.reestimate import FrozenBatchNorms, freeze_batch_norm
from lq_plugin.quantizers import ActivationQuantizer, Quantizer, WeightQuantizer
from lq_plugin.quantizers.staged import present_keys

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

#: A way to compute a layer in training.
Forward: TypeAlias = Literal["fake_quantize", "integer", "integer_always"]
FORWARDS = get_args(Forward)


class QAT(QuantizationCallback):
    """Trains with fake-quantized weights and activations.

    At the start of a fit, `init_batches` float batches give every range a first value. Then the
    schedule, a function of epoch and step alone, says what is quantized; ranges by EMA move
    after each training batch, never in validation; ranges of weights by estimators other than
    `minmax` are found anew at the start of each epoch.

    Args:
        plan: a short string (`"w4a8"`), a YAML path, a mapping or a `QuantPlan`.
        schedule: a `Schedule` or a mapping of its moments; the plan's own when None.
        init_batches: batches for the first ranges; 0 leaves layers float until the first training batch is over.
        distill: share of the loss that comes from the float copy's answers, or a `Distillation` (or a mapping of its
            fields); None: the module's own loss alone.
        min_coverage, dataloader, calibration_step, target: see `QuantizationCallback`.
        forward: how layers compute in training: `"fake_quantize"`, with floats that stand for integers; `"integer"`,
            with 8-bit products on a CPU or an NVIDIA GPU (see `lq_plugin.layers.integer`) where a trial on the first
            batch finds them worth it (a CPU's convolutions may take a quarter longer alone: the layers after them gain
            more by the layout they hand on); `"integer_always"`, wherever they can, so that a run can be repeated to
            the bit. The log names what each layer does.

    >>> from lightning import Trainer
    >>> qat = QAT("w4a8", schedule={"activations_start": "epoch 1"})
    >>> trainer = Trainer(callbacks=[qat], logger=False, accelerator="cpu")
    """

    if_unreached = "their layers are float until a training batch reaches them"

    def __init__(
        self,
        plan: QuantPlan | str | Path | Mapping[str, Any],
        schedule: Schedule | Mapping[str, Any] | None = None,
        init_batches: int = 1,
        distill: Distillation | Mapping[str, Any] | float | None = None,
        min_coverage: float | Mapping[str, float] | None = None,
        dataloader: Iterable[Any] | None = None,
        calibration_step: CalibrationStep | None = None,
        forward: Forward = "fake_quantize",
        target: str | None = None,
    ) -> None:
        super().__init__(plan, min_coverage, dataloader, calibration_step, target)
        if schedule is not None:
            self.plan = QuantPlan(self.plan.rules, schedule, self.plan.target)
        if not is_integer(init_batches, 0):
            raise PlanError(f"init_batches is a number of batches, 0 or more, got {init_batches!r}")
        if forward not in FORWARDS:
            raise PlanError(f"forward is one of {', '.join(FORWARDS)}, got {forward!r}")
        self.forward: Forward = forward
        self.integer_choices: dict[str, bool] = {}
        self.integer_named: dict[str, str] = {}
        self.init_batches = init_batches
        self.distill = Distillation.parse(distill)
        self.teacher: Teacher | None = None
        self.teacher_state: Mapping[str, Tensor] | None = None
        self.switches: Switches | None = None
        self.unreached: dict[str, list[Quantizer]] = {}
        self.resumed = False
        self.float_checkpoint: dict[str, Any] | None = None
        self.range_optimizers: list[RangeOptimizer] = []
        self.range_states: list[dict[str, Any]] = []
        #: Whether the run goes on from a checkpoint of a version whose ranges `configure_optimizers` saw.
        self.ranges_were_seen = False
        #: Whether the run began in a version that let learned ranges of earlier stages decay: its groups stay.
        self.stages_decay = False
        self.frozen: FrozenBatchNorms | None = None
        #: Layers that came in after the quantizers, and were named.
        self.late: list[str] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self.resumed, self.float_checkpoint = False, None
        self.range_states, self.ranges_were_seen, self.stages_decay = [], False, False
        if stage == "fit":
            hide_learned_ranges(pl_module, lambda: self.ranges_were_seen)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        renew_averages(trainer, pl_module)  # one that called configure_model itself was not there yet
        silent = {id(quantizer) for group in unreached(pl_module).values() for quantizer in group}
        uncalibrated = [q for q in quantizers(pl_module) if not q.is_calibrated and id(q) not in silent]
        if uncalibrated and self.init_batches:
            self.calibrate(trainer, pl_module, self.init_batches, missing_only=True)
        if self.init_batches:
            self.end_suspension()
        if self.distill is not None:
            self.teacher = Teacher(self.distill, trainer, pl_module, self.calibration_step, self.teacher_state)
            self.teacher.attach(pl_module)
        adopted, clones, self.range_optimizers = adopt_learned_ranges(trainer, pl_module, self.stages_decay)
        for name in adopted:
            rank_zero_info(f"QAT: added {name} to the optimizer")
        for optimizer, state in zip(self.range_optimizers, self.range_states, strict=False):
            optimizer.load_state_dict(state)
        moment = trainer.current_epoch, trainer.global_step
        if self.float_checkpoint is not None:
            make_room_for_ranges(trainer, pl_module, self.float_checkpoint, clones)
            # Lightning restores them later, and comes to no batch where the float run was finished.
            moment = self.float_checkpoint["epoch"], self.float_checkpoint["global_step"]
        disable_integer_forward(pl_module)
        if self.forward != "fake_quantize":
            choices = True if self.forward == "integer_always" else self.integer_choices
            enable_integer_forward(pl_module, choices, trainer.strategy.broadcast)
        self.integer_named = {}
        self._wait_for_unreached(pl_module, moment)
        if not self.resumed:
            # A resumed run is in the state of its last batch: the schedule goes on with the next one, if there is one.
            self._enter_stage(pl_module, moment, calibrate=False)
            self._apply_schedule(pl_module, moment)
        start_averages(trainer, pl_module)
        self.float_checkpoint = None

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.init_batches:
            return
        missing = [q for q in quantizers(pl_module) if q.lacks_range]
        if missing:
            rank_zero_warn(
                f"QAT: the sanity check runs float, {len(missing)} tensors have no range yet (first: {missing[0].name})"
            )

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # An evaluation finds no ranges: without those of a checkpoint it is an error.
        if trainer.state.fn != "fit":
            self.end_suspension()
        # What a step computes in training mode (dropout that draws samples) moves no range; the next batch looks again.
        for quantizer in quantizers(pl_module):
            quantizer.observing = quantizer.observing and not quantizer.is_calibrated

    on_test_start = on_predict_start = on_validation_start

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        forget_batch(quantizers(pl_module))
        # Under some strategies a resumed run has its state only now.
        self._wait_for_unreached(pl_module, (trainer.current_epoch, trainer.global_step))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Resumed in the middle of an epoch, the ranges found at its start are in the checkpoint.
        if trainer.fit_loop.epoch_loop.batch_progress.current.ready == 0:
            with whole_weights(pl_module):
                for layer in self._layers(pl_module):
                    for stage in layer.weight_quantizer.stages() if layer.weight_quantizer is not None else ():
                        if isinstance(stage, WeightQuantizer):
                            # Without first batches a learned range is still to be found.
                            (stage.calibrate if stage.lacks_range else stage.new_epoch)(
                                type(layer).canonical(layer, weight_of(layer))
                            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0 and (late := [n for n in late_layers(pl_module, self.ledger) if n not in self.late]):
            self.late += late
            rank_zero_warn(
                f"QAT: {', '.join(late)} came in after the quantizers and stays float; make it in __init__, setup or "
                "configure_model"
            )
        # Only here: the state that a resumed run starts with is that of its last batch.
        moment = trainer.current_epoch, trainer.global_step
        changed = self._enter_stage(pl_module, moment, calibrate=True)
        if changed:
            rank_zero_info(f"QAT: epoch {moment[0]}, step {moment[1]}: {len(changed)} tensors enter their next stage")
        self._apply_schedule(pl_module, moment)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == 0:
            self._look_again(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look_again(pl_module)

    @staticmethod
    def _look_again(pl_module: LightningModule) -> None:
        # Lightning's weight averages are swapped in and out around the batches of a validation, past all counting.
        for quantizer in quantizers(pl_module):
            quantizer.forget_switches()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        average_gradients(trainer, pl_module)
        for own in self.range_optimizers:
            own.step(trainer, optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        clip_latent_weights(self._layers(pl_module))
        chosen = quantizers(pl_module)
        commit_observers(chosen, all_reduce_max(trainer), statistics_merger(trainer))
        if self.unreached or waiting(chosen):
            self._settle_unreached(pl_module)
        self.end_suspension()
        if self.forward != "fake_quantize":
            self._settle_integer_forward(trainer, pl_module)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        # Its optimizers' states are loaded later, out of this very mapping.
        self.float_checkpoint = (
            checkpoint if trainer.state.fn == "fit" and is_float(checkpoint, self.state_key) else None
        )
        keys = list(checkpoint.get("state_dict", {}))
        self.stages_decay = any(new != old for old, new in present_keys(keys).items())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.teacher_state = state_dict.get("teacher")
        self.integer_choices = dict(state_dict.get("integer_choices", {}))
        self.range_states = list(state_dict.get("range_optimizers", []))
        self.ranges_were_seen = "range_optimizers" not in state_dict
        self.stages_decay |= state_dict.get("stages_decay", False)
        self.resumed = True

    def state_dict(self) -> dict[str, Any]:
        # The resumed module's weights are trained already: its float copy would be another teacher.
        teacher = {} if self.teacher is None else {"teacher": self.teacher.module.state_dict()}
        integer = {"integer_choices": self.integer_choices} if self.integer_choices else {}
        ranges = {"range_optimizers": [optimizer.state_dict() for optimizer in self.range_optimizers]}
        stages = {"stages_decay": True} if self.stages_decay else {}
        return super().state_dict() | teacher | integer | ranges | stages

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.frozen is not None:
            self.frozen.release()
            self.frozen = None
        for quantizer in quantizers(pl_module):
            quantizer.observing = quantizer.waiting = False

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        show_learned_ranges(pl_module)
        if self.teacher is not None:
            Teacher.detach(pl_module)
            self.teacher = self.teacher_state = None

    @staticmethod
    def _layers(pl_module: LightningModule) -> list[QuantizedLayer]:
        return [layer for _, layer in quantized_layers(pl_module)]

    def needs_whole_model(self) -> list[str]:
        return ["distillation"] if self.distill is not None else []

    def _settle_integer_forward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # One choice for all ranks, that of rank 0: what differs in rounding must not differ between ranks.
        if settle_integer_forward(pl_module, trainer.strategy.broadcast):
            self.integer_choices = integer_choices(pl_module)
        report = integer_report(pl_module)
        news = [f"{name}: {how}" for name, how in report.items() if self.integer_named.get(name) != how]
        self.integer_named = report
        if news:
            count = sum(how.startswith("integer") for how in report.values())
            rank_zero_info(
                f"QAT: {count} of {len(report)} layers compute with integers in training\n  " + "\n  ".join(news)
            )

    def _enter_stage(self, pl_module: LightningModule, moment: tuple[int, int], calibrate: bool) -> list[str]:
        operations = [operation for _, operation in quantized_operations(pl_module)]
        whole = partial(whole_weights, pl_module)
        return enter_stage(self._layers(pl_module), *moment, calibrate, operations, whole)

    def _apply_schedule(self, pl_module: LightningModule, moment: tuple[int, int]) -> None:
        """Brings all switches to where the schedule has them at an epoch and optimizer step."""
        self.switches = switches = self.plan.schedule.at(*moment)
        if switches.freeze_batch_norm:
            # Again at each batch: model.train() after a validation switches it back on.
            self.frozen = self.frozen or freeze_batch_norm(pl_module)
            self.frozen.apply()
        # At each batch: somebody may have loaded a state of another moment into the module.
        silent = {id(quantizer) for group in self.unreached.values() for quantizer in group}
        for quantizer in quantizers(pl_module):
            # Frozen ranges are those that there are: what a batch reaches later still gets its first.
            quantizer.observing = (
                isinstance(quantizer, ActivationQuantizer)
                and quantizer.moving
                and (switches.observe or not quantizer.is_calibrated)
            )
            if id(quantizer) not in silent:
                self._switch(quantizer, switches)

    @staticmethod
    def _switch(quantizer: Quantizer, switches: Switches) -> None:
        """Switches a quantizer on or off as the schedule wants it."""
        quantizer.set_enabled(switches.weights if isinstance(quantizer, WeightQuantizer) else switches.activations)

    def _wait_for_unreached(self, pl_module: LightningModule, moment: tuple[int, int]) -> None:
        """Lets what no batch has reached gather a first range in training."""
        switches = self.plan.schedule.at(*moment)
        # Without first batches nothing was missed before the schedule begins.
        self.unreached = unreached(pl_module) if self.init_batches or switches.weights or switches.activations else {}
        for quantizer in (quantizer for group in self.unreached.values() for quantizer in group):
            quantizer.waiting = True

    def _settle_unreached(self, pl_module: LightningModule) -> None:
        """Switches on what a batch has reached for the first time; makes float what still misses its range."""
        assert self.switches is not None
        if not reached_any(pl_module):
            return  # an empty batch tells nothing about any layer
        before = self.unreached
        self.unreached = settle(before, pl_module)
        if before.keys() == self.unreached.keys():
            return
        for name, group in {**before, **self.unreached}.items():
            for quantizer in group:
                quantizer.waiting = name in self.unreached
                if not quantizer.waiting:
                    self._switch(quantizer, self.switches)
        self.ledger.note_unreached(self.unreached, REASON)
        for name in before.keys() - self.unreached.keys():
            rank_zero_info(f"QAT: a batch has reached {name}, it is quantized from now on")
        for name in self.unreached.keys() - before.keys():
            rank_zero_warn(f"QAT: the batch did not reach {name}; {self.if_unreached}")
