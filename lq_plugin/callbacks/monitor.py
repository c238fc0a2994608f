"""Show what quantization does, in whatever loggers the Trainer has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from matplotlib.figure import Figure

from lq_plugin import plots
from lq_plugin.callbacks.base import QuantizationCallback
from lq_plugin.callbacks.loggers import Picture, Report, report_to
from lq_plugin.errors import QuantizationError
from lq_plugin.layers import QuantizedLayer
from lq_plugin.model.cost import Cost, cost
from lq_plugin.model.fidelity import FidelityRow, Measurements, errors_on_statistics, layer_fidelity, watching, weight_bounds
from lq_plugin.model.prepare import quantized_layers, quantizers
from lq_plugin.quantizers import InputQuantizer
from lq_plugin.ranges import compare_ranges
from lq_plugin.report import model_report, render


class QuantMonitor(Callback):
    """Logs bits, ranges, SQNR, clipping, coverage and cost, beside a `QAT` or `PTQ` callback.

    Scalars go to every logger, under `quant/` (`quant/effective_bits`, `quant/conv1/weight_sqnr_db`): when
    training starts, every `every_n_epochs` epochs and `every_n_steps` optimizer steps, and at the end; with
    `trainer.validate`, `test` and `predict` once, after the loop. Tables, the plan and pictures go to the loggers
    that take them, at the start and at the end only:

    * `WandbLogger`: tables, pictures, the plan in the config, and one artifact with all files and the report page;
    * `TensorBoardLogger`: pictures, and the plan and the ledger as text;
    * `CSVLogger`: files and the report page in `<log_dir>/quant`.

    Weights are measured as they are. Activations are measured on a batch that runs anyway: the last before the
    log (the first of an epoch whose length is not known), the first of an evaluation; before that, on the statistics of
    the calibration. No forward pass is added, no random number is drawn, nothing of the Trainer's metrics is touched.
    A compiled model runs that one batch uncompiled.
    Infinite numbers, such as the SQNR of an all-zero weight, stay in the tables and out of the scalars.

    Args:
        every_n_epochs: how often scalars are logged; None: not by epochs.
        every_n_steps: the same by optimizer steps.
        images: draw pictures.
        max_layers: the largest so many layers get a box plot and a histogram of their own.
        page: add the report page (`lq_plugin.report`) to the files of the last report, about 0.2 s a layer.

    Raises:
        QuantizationError: impossible arguments; in `setup`, when the Trainer has neither `QAT` nor `PTQ`.

    >>> from lightning import Trainer
    >>> from lq_plugin.callbacks import QAT
    >>> trainer = Trainer(callbacks=[QAT("w4a8"), QuantMonitor(every_n_epochs=5)], logger=False, accelerator="cpu")
    """

    def __init__(
        self, every_n_epochs: int | None = 1, every_n_steps: int | None = None, images: bool = True, max_layers: int = 8, page: bool = True
    ) -> None:
        for name, value in (("every_n_epochs", every_n_epochs), ("every_n_steps", every_n_steps)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise QuantizationError(f"{name} is a number of 1 or more, or None, got {value!r}")
        if isinstance(max_layers, bool) or not isinstance(max_layers, int) or max_layers < 0:
            raise QuantizationError(f"max_layers is a number of layers, 0 or more, got {max_layers!r}")
        self.every_n_epochs = every_n_epochs
        self.every_n_steps = every_n_steps
        self.images = images
        self.page = page
        self.max_layers = max_layers
        self._measured: Measurements = {}
        self._watch = ExitStack()
        self._logged_step: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        _quantization(trainer)
        self._measured = {}
        self._logged_step = None
        if not trainer.loggers:
            rank_zero_warn("QuantMonitor: the Trainer has no logger, so nothing is shown")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not on_fit_start: there QAT may calibrate after this callback.
        self._log(trainer, pl_module, "start")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        batches = trainer.num_training_batches
        by_epoch = self._epoch_is_due(trainer) and batch_idx == (0 if batches == float("inf") else batches - 1)
        by_step = self.every_n_steps is not None and (trainer.global_step + 1) % self.every_n_steps == 0
        if by_epoch or by_step:
            self._start_watching(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
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
        if trainer.state.fn != TrainerFn.FITTING and batch_idx == dataloader_idx == 0:
            self._start_watching(trainer, pl_module)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            self._watch.close()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
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
        """`moment` is start, scalars, end (of a fit) or once (an evaluation)."""
        if not trainer.is_global_zero or not trainer.loggers:
            return
        state = _State.of(trainer, pl_module, self._measured)
        report = Report(step=trainer.global_step)
        if moment != "end" or self._logged_step != report.step:
            report = replace(report, scalars=state.scalars())
        if moment != "scalars":
            report = replace(report, plan=state.callback.plan, tables=state.tables(), final=moment != "start")
            if self.images:
                pictures = state.pictures(self.max_layers, activations=moment != "end")
                report = replace(report, pictures=list(pictures))
            if self.page and report.final:
                report = replace(report, pages=state.pages(trainer))
        self._logged_step = report.step
        for logger in trainer.loggers:
            report_to(logger, report)


def _quantization(trainer: Trainer) -> QuantizationCallback:
    """The callback that quantizes; of several, the one that has done so."""
    found = [callback for callback in trainer.callbacks if isinstance(callback, QuantizationCallback)]  # type: ignore[attr-defined]
    if not found:
        raise QuantizationError(
            "QuantMonitor shows what QAT or PTQ does, and the Trainer has neither: Trainer(callbacks=[QAT('w4a8'), QuantMonitor()])"
        )
    return next((callback for callback in found if len(callback.ledger)), found[0])


@dataclass(frozen=True)
class _State:
    """A model at one moment, and what can be said of it."""

    callback: QuantizationCallback
    model: LightningModule
    priced: Cost
    rows: list[FidelityRow]
    measured: Measurements

    @classmethod
    def of(cls, trainer: Trainer, model: LightningModule, measured: Measurements) -> _State:
        callback = _quantization(trainer)
        known = {name: errors for name, errors in measured.items() if errors.elements}
        known = known or errors_on_statistics(model, callback.statistics)
        return cls(callback, model, cost(model, callback.recording), layer_fidelity(model, measured=known), known)

    def pages(self, trainer: Trainer) -> dict[str, bytes]:
        """The report page, and what it is made of."""
        callback = self.callback
        data = model_report(
            self.model,
            callback.plan,
            ledger=callback.ledger,
            recording=callback.recording,
            statistics=callback.statistics,
            measured=self.measured,
            reconstruction=getattr(callback, "reconstruction", None),
            float_weights=getattr(callback, "float_weights", None) or None,
            metrics={name: float(value) for name, value in trainer.callback_metrics.items()},
        )
        return {"report.json": data.to_json().encode(), "report.html": render(data).encode()}

    def scalars(self) -> dict[str, float]:
        chosen = quantizers(self.model)
        active = sum(q.is_enabled and (q.is_calibrated or not q.needs_calibration) for q in chosen)
        values: dict[str, float | None] = {
            "quant/coverage": self.callback.ledger.coverage,
            "quant/active": active / len(chosen) if chosen else 0.0,
        }
        values |= {f"quant/{name}": value for name, value in self.priced.totals().items()}
        for layer in self.priced:
            for name in ("weight_bits", "effective_bits", "input_bits"):
                values[f"quant/{layer.name}/{name}"] = getattr(layer, name)
        for row in self.rows:
            prefix = f"quant/{row.layer}/{row.slot}"
            values |= {
                f"{prefix}_sqnr_db": row.sqnr_db,
                f"{prefix}_clipping_share": row.clipping_share,
                f"{prefix}_min": row.minimum,
                f"{prefix}_max": row.maximum,
            }
        return {name: float(value) for name, value in values.items() if value is not None and isfinite(value)}

    def tables(self) -> dict[str, list[dict[str, Any]]]:
        compared = [
            {"name": name, **{key: value for key, value in record.items() if key != "row"}}
            for name, (quantizer, histogram) in self._watched().items()
            for record in compare_ranges(histogram.sample(), quantizer.spec).records()
        ]
        tables: dict[str, list[dict[str, Any]]] = {
            "ledger": self.callback.ledger.rows(),
            "cost": self.priced.records(),
            "fidelity": [row.to_dict() for row in self.rows],
            "ranges": compared,
        }
        return {name: rows for name, rows in tables.items() if rows}

    def pictures(self, max_layers: int, activations: bool) -> Iterator[Picture]:
        layers = dict(quantized_layers(self.model))
        largest = sorted(layers, key=lambda name: -layers[name].weight.numel())[:max_layers]
        shown = [name for name in layers if name in largest]
        yield Picture("bits", "bits", plots.to_png(plots.bits_per_layer(self.priced)))
        if any(row.sqnr_db is not None and isfinite(row.sqnr_db) for row in self.rows):
            yield Picture("sqnr", "sqnr", plots.to_png(plots.sqnr_per_layer(self.rows)))
        for name in shown:
            yield Picture("weights", f"{name}.weight", plots.to_png(_box_plot(name, layers[name])))
        if not activations:
            return
        for name, (quantizer, histogram) in self._watched().items():
            layer, _, slot = name.partition(" (stage")[0].rpartition(".")
            if layer in shown:
                row = next(row for row in self.rows if (row.layer, row.slot) == (layer, slot))
                # Of several stages, one is in force.
                known = not quantizer.per_channel and row.spec == str(quantizer.spec) and None not in (row.minimum, row.maximum)
                in_force = (row.minimum or 0.0, row.maximum or 0.0) if known else None
                figure = plots.activation_histogram(histogram, quantizer.spec, name, in_force=in_force)
                yield Picture("activations", name, plots.to_png(figure))

    def _watched(self) -> dict[str, tuple[InputQuantizer, Any]]:
        """Activations with statistics, by name."""
        known = self.callback.statistics
        chosen = [q for q in quantizers(self.model) if isinstance(q, InputQuantizer)]
        return {q.name: (q, known[q.name]) for q in chosen if q.spec.has_grid and q.name in known and known[q.name].total.all()}


def _box_plot(name: str, layer: QuantizedLayer) -> Figure:
    minimum, maximum = weight_bounds(layer) or (None, None)
    spec = "" if layer.weight_quantizer is None else str(layer.weight_quantizer.spec)
    return plots.weight_box_plot(layer.canonical(layer.weight), minimum, maximum, f"{name}.weight", spec)
