"""The units of a model in the order in which they run, with the calibration data in a cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from lq_plugin.errors import CalibrationError
from lq_plugin.layers import QuantizedLayer
from lq_plugin.model.calibrate import float_forward
from lq_plugin.model.graph.record import record
from lq_plugin.model.prepare import quantized_layers
from lq_plugin.model.ranks import require_batches
from lq_plugin.ptq.layerwise.activation_cache import ActivationCache
from lq_plugin.ptq.layerwise.replay import Replay
from lq_plugin.ptq.reconstruction.units import find_units


class UnitWalk:
    """The way through a model that is rounded unit by unit.

    Args:
        model: prepared and calibrated.
        batches: calibration data, read once.
        run: runs the model on one batch.
        cache: keeps the batches, then activations.
        by: what a unit is, see `find_units`.

    Attributes:
        count: batches of this process.
        layers: the quantized layers, by name.
        recording: of the float model on the first batch.
        units: in the order in which they run.
        skipped: layers that no batch reached, with the reason.

    Raises:
        CalibrationError: no quantized layers, or no batches.
        QuantizationError: patterns in `by` that match nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        run: Callable[[Any], Any],
        cache: ActivationCache,
        by: str | Sequence[str],
    ) -> None:
        self.model, self.cache, self._run = model, cache, run
        self.layers: dict[str, QuantizedLayer] = dict(quantized_layers(model))
        if not self.layers:
            raise CalibrationError("the model has no quantized layers: prepare it first (lq_plugin.prepare)")
        self.count = 0
        for batch in batches:
            cache.put(("batch", self.count), batch)
            self.count += 1
        require_batches(self.count)
        with float_forward(model):
            self.recording = record(model, lambda: self.run(0))
        self.units, uncalled = find_units(model, self.recording, by)
        self.skipped = dict.fromkeys(uncalled, "no batch reached it")

    def batch(self, index: int) -> Any:
        """Returns a copy of batch number `index`."""
        return self.cache.get(("batch", index))

    def run(self, index: int) -> Any:
        """Runs the model on batch number `index`."""
        return self._run(self.batch(index))

    def replay(self, kind: str) -> Replay:
        """Returns a `Replay` of the units' layers; `kind` is `"float"` or `"quantized"`."""
        names = [name for unit in self.units for name in unit.layers]
        return Replay(self.model, self._run, self.cache, kind, names, self.recording)
