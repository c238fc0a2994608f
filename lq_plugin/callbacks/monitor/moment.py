"""A model at one moment of a run, and all that `QuantMonitor` shows of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any

from lq_plugin import plots
from lq_plugin.callbacks.base import QuantizationCallback
from lq_plugin.callbacks.monitor.live import MAX_LAYERS
from lq_plugin.callbacks.monitor.loggers import Picture
from lq_plugin.callbacks.monitor.scores import Scoreboard
from lq_plugin.callbacks.trainer.data import one_batch
from lq_plugin.callbacks.trainer.sharding import resharded
from lq_plugin.callbacks.trainer.traces import without_traces
from lq_plugin.errors import QuantizationError
from lq_plugin.layers import QuantizedLayer, weight_of
from lq_plugin.model.measure.cost import Cost, cost
from lq_plugin.model.measure.fidelity import (
    FidelityRow,
    Measurements,
    errors_on_statistics,
    layer_fidelity,
    weight_bounds,
)
from lq_plugin.model.prepare import quantized_layers, quantizers
from lq_plugin.quantizers import ActivationQuantizer
from lq_plugin.ranges import compare_ranges
from lq_plugin.report import Series, model_report, render
from lq_plugin.report.provenance import provenance
from lq_plugin.report.terminal import summary
from lq_plugin.report.weights import against_originals
from lq_plugin.utilities.lightning_packages import isolate_rng

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from matplotlib.figure import Figure

_MOVING = ("_sqnr_db", "_min", "_max", "_zeros", "_flips")


def quantization_of(trainer: Trainer) -> QuantizationCallback:
    """Returns the callback that quantizes; of several, the one that has done so."""
    found = [callback for callback in trainer.callbacks if isinstance(callback, QuantizationCallback)]  # type: ignore[attr-defined]
    if not found:
        raise QuantizationError(
            "QuantMonitor shows what QAT or PTQ does, and the Trainer has neither: Trainer(callbacks=[QAT('w4a8'), "
            "QuantMonitor()])"
        )
    return next((callback for callback in found if len(callback.ledger)), found[0])


@dataclass(frozen=True)
class MonitoredModel:
    """A model at one moment, with its cost and its errors."""

    callback: QuantizationCallback
    model: LightningModule
    priced: Cost
    rows: list[FidelityRow]
    measured: Measurements

    @classmethod
    def of(cls, trainer: Trainer, model: LightningModule, measured: Measurements) -> MonitoredModel:
        callback = quantization_of(trainer)
        known = {name: errors for name, errors in measured.items() if errors.elements}
        known = known or errors_on_statistics(model, callback.statistics)
        rows = layer_fidelity(model, measured=known)
        rows = against_originals(rows, dict(quantized_layers(model)), getattr(callback, "float_weights", {}))
        return cls(callback, model, cost(model, callback.recording), rows, known)

    @property
    def layers(self) -> dict[str, QuantizedLayer]:
        """The quantized layers, by name."""
        return dict(quantized_layers(self.model))

    def curves(self, scalars: Mapping[str, float]) -> dict[str, float]:
        """Returns the scalars that the report page shows over steps: losses, and values of the largest layers."""
        largest = {row.name for row in sorted(self.priced, key=lambda row: -row.elements)[:MAX_LAYERS]}
        found = {}
        for name, value in scalars.items():
            layer, _, what = name.removeprefix("quant_layer/").rpartition("/")
            if what in ("active", "loss") or (layer in largest and what.endswith(_MOVING)):
                found[name] = value
        return found

    def text(self, moment: str, metrics: dict[str, float]) -> str:
        """Returns a table for a terminal."""
        title = "What is quantized" if moment == "start" else "The quantized model"
        return summary(self.priced, self.rows, self.callback.ledger, title, {} if moment == "start" else metrics)

    def pages(
        self,
        trainer: Trainer,
        metrics: dict[str, float],
        training: list[Series],
        epoch_steps: int | None,
        scoreboard: Scoreboard,
    ) -> dict[str, bytes]:
        """Returns the report page and its data, by file name.

        Args:
            trainer: of the run.
            metrics: of the run, by name.
            training: curves over its steps.
            epoch_steps: optimizer steps of an epoch; None outside of training.
            scoreboard: what its evaluations scored.
        """
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
            metrics=metrics,
            training=training,
            epoch_steps=epoch_steps,
            run=self._one_batch(trainer),
            scores=scoreboard.by_variant,
            samples=scoreboard.samples,
            provenance=provenance(_data_of(trainer, scoreboard.samples)),
        )
        return {"report.json": data.to_json().encode(), "report.html": render(data).encode()}

    def _one_batch(self, trainer: Trainer) -> Callable[[], Any] | None:
        """Returns what runs the module on a calibration batch; None where no such batch has run in this run.

        None also with several processes: this one would wait for the others in a pass of its own.
        """
        callback, module = self.callback, self.model
        if callback.recording is None or trainer.world_size > 1:
            return None
        run, _ = one_batch(trainer, module, callback.dataloader, callback.calibration_step)

        def once() -> None:
            with resharded(module), without_traces(module), isolate_rng():
                run()

        return once

    def totals(self) -> dict[str, float]:
        """Returns what the model takes, by name of the scalar."""
        found = {f"quant/{name}": value for name, value in self.priced.totals().items()}
        return {name: float(value) for name, value in found.items() if value is not None and isfinite(value)}

    def scalars(self) -> dict[str, float]:
        chosen = quantizers(self.model)
        active = sum(q.is_enabled and not q.lacks_range for q in chosen)
        values: dict[str, float | None] = {
            **{f"quant/{name}": value for name, value in self.callback.ledger.coverages().items()},
            "quant/active": active / len(chosen) if chosen else 0.0,
        }
        values |= self.totals()
        for layer in self.priced:
            for name in ("weight_bits", "effective_bits", "input_bits"):
                values[f"quant_layer/{layer.name}/{name}"] = getattr(layer, name)
        layers = self.layers
        for row in self.rows:
            prefix = f"quant_layer/{row.layer}/{row.slot}"
            values |= {
                f"{prefix}_sqnr_db": row.sqnr_db,
                f"{prefix}_clipping_share": row.clipping_share,
                f"{prefix}_min": row.minimum,
                f"{prefix}_max": row.maximum,
            }
            quantizer = getattr(layers[row.layer], f"{row.slot}_quantizer")
            if any(True for _ in quantizer.parameters()):
                values |= {f"{prefix}_scale_min": row.scale_min, f"{prefix}_scale_max": row.scale_max}
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
        layers = self.layers
        largest = sorted(layers, key=lambda name: -weight_of(layers[name]).numel())[:max_layers]
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
                known = (
                    not quantizer.per_channel
                    and row.spec == str(quantizer.spec)
                    and None not in (row.minimum, row.maximum)
                )
                bounds = (row.minimum or 0.0, row.maximum or 0.0) if known else None
                figure = plots.activation_histogram(histogram, quantizer.spec, name, in_force=bounds)
                yield Picture("activations", name, plots.to_png(figure))

    def _watched(self) -> dict[str, tuple[ActivationQuantizer, Any]]:
        """Activations with statistics, by name."""
        known = self.callback.statistics
        chosen = [q for q in quantizers(self.model) if isinstance(q, ActivationQuantizer)]
        return {
            q.name: (q, known[q.name])
            for q in chosen
            if q.spec.has_grid and q.name in known and known[q.name].total.all()
        }


def _data_of(trainer: Trainer, samples: Mapping[str, int]) -> str:
    """Returns the name of the data, and how many samples were evaluated."""
    datamodule = getattr(trainer, "datamodule", None)
    counts = f"{max(samples.values()):,} samples evaluated" if samples else ""
    return ", ".join(part for part in ("" if datamodule is None else type(datamodule).__name__, counts) if part)


def _box_plot(name: str, layer: QuantizedLayer) -> Figure:
    minimum, maximum = weight_bounds(layer) or (None, None)
    spec = "" if layer.weight_quantizer is None else str(layer.weight_quantizer.spec)
    return plots.weight_box_plot(
        type(layer).canonical(layer, weight_of(layer)), minimum, maximum, f"{name}.weight", spec
    )
