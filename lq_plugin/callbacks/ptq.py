"""PTQ: quantize a trained LightningModule with a few batches, then evaluate it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lq_plugin.callbacks.base import QuantizationCallback
from lq_plugin.callbacks.trainer.data import seeded
from lq_plugin.callbacks.trainer.steps import CalibrationStep
from lq_plugin.errors import PlanError, is_integer
from lq_plugin.export.planned import known_target
from lq_plugin.intent.plan import QuantPlan
from lq_plugin.model.prepare import quantizers
from lq_plugin.model.unreached import REASON, unreached
from lq_plugin.ptq.batch_norm.fold import FoldedBatchNorms
from lq_plugin.ptq.phases import check_phases, names_and_options, run_phase
from lq_plugin.ptq.reconstruction.reconstruct import Reconstruction

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class PTQ(QuantizationCallback):
    """Calibrates at the start of `trainer.validate`, `test` or `predict`; the loop then reports the quantized model.

    A model that is calibrated already, by an earlier call or from a checkpoint, is used as it is.

    Args:
        plan: a short string (`"w4a8"`), a YAML path, a mapping or a `QuantPlan`.
        calibration_batches: how many batches the ranges come from.
        phases: what to do, in this order. Before ranges are found: `reestimate_batch_norm`, `fold_batch_norm`,
            `equalize` (spreads of neighbouring layers, for scales a tensor), `rotate` and `smooth_quant` (outliers of
            activations, in transformers). Then `calibrate`, always. Then one of `correct_batch_norm` (repairs what
            quantization did to means and variances, worth points below 8 bits), `bias_correct` (means only, for models
            without batch norm), `gptq` (rounds column by column) and `reconstruct` (learned rounding, the best and the
            slowest). Last `share_grids` and `round_biases`, which a target adds whose files have one grid a tensor and
            int32 biases: the model then computes what its file does. One with options is a mapping:
            `{"reconstruct": {"iterations": 1000}}`.
        recalibrate: run the phases although the model is calibrated.
        min_coverage, dataloader, calibration_step, target: see `QuantizationCallback`.
        seed: of the order of calibration data that a loader shuffles; None: as the random state is. A plan of a search
            scores exactly what its trial did with the search's seed and number of batches.
    """

    def __init__(
        self,
        plan: QuantPlan | str | Path | Mapping[str, Any],
        calibration_batches: int = 8,
        phases: Sequence[str | Mapping[str, Any]] = ("fold_batch_norm", "calibrate"),
        recalibrate: bool = False,
        min_coverage: float | Mapping[str, float] | None = None,
        dataloader: Iterable[Any] | None = None,
        calibration_step: CalibrationStep | None = None,
        seed: int | None = None,
        target: str | None = None,
    ) -> None:
        super().__init__(plan, min_coverage, dataloader, calibration_step, target)
        if not is_integer(calibration_batches, 1):
            raise PlanError(f"calibration_batches is a number of batches, 1 or more, got {calibration_batches!r}")
        if seed is not None and (not is_integer(seed, 0) or seed >= 2**32):
            raise PlanError(f"seed is an integer from 0 to 2**32 - 1, or None, got {seed!r}")
        names, self.phase_options = names_and_options(phases)
        names = self._for_target(names)
        check_phases(names, self.phase_options)
        self.calibration_batches = calibration_batches
        self.phases = names
        self.seed = seed
        self.recalibrate = recalibrate
        #: What each phase returned, by its name.
        self.results: dict[str, Any] = {}
        #: Weights before learned roundings were written into them, by layer name.
        self.float_weights: dict[str, Tensor] = {}

    def _for_target(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Returns phases with those that let the model compute what a file of the plan's target does."""
        if self.plan.target is None:
            return names
        target = known_target(self.plan.target)
        if target.one_grid and "share_grids" not in names:
            end = names.index("round_biases") if "round_biases" in names else len(names)
            names = (*names[:end], "share_grids", *names[end:])
        return (*names, "round_biases") if target.integer_biases and "round_biases" not in names else names

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            raise PlanError(
                "PTQ quantizes a trained model: use it with trainer.validate, test or predict; for trainer.fit there "
                "is QAT"
            )
        super().setup(trainer, pl_module, stage)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.quantize(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.quantize(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.quantize(trainer, pl_module)

    def quantize(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs the phases, unless the model is calibrated already, as far as data reached it."""
        silent = unreached(pl_module)
        waiting = {id(q) for q in quantizers(pl_module) if not q.is_calibrated} - {
            id(q) for group in silent.values() for q in group
        }
        if not self.recalibrate and not waiting:
            self.ledger.note_unreached(silent, REASON)
        else:
            context = self.context(trainer, pl_module, self.calibration_batches)
            self.results, self.float_weights = context.results, context.float_weights
            with seeded(self.seed):
                for phase in self.phases:
                    run_phase(context, phase, self.phase_options.get(phase))
        self.end_suspension()

    def needs_whole_model(self) -> list[str]:
        return [f"phase {phase}" for phase in self.phases if phase != "calibrate"]

    @property
    def folded(self) -> FoldedBatchNorms | None:
        """The folded batch norms; None before `fold_batch_norm` has run."""
        return self.results.get("fold_batch_norm")

    @property
    def reconstruction(self) -> Reconstruction | None:
        """The result of `reconstruct`; None before it has run."""
        return self.results.get("reconstruct")
