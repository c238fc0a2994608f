"""The context of a PTQ phase: the model, its calibration data and a place for results."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lq_plugin.errors import CalibrationError
from lq_plugin.layers import weight_of
from lq_plugin.model.calibrate import (
    Statistics,
    collect_statistics,
    evaluating,
    float_forward,
    load_statistics,
    needs_data,
    never_reached,
    without_levels,
)
from lq_plugin.model.graph.record import Recording, record
from lq_plugin.model.graph.tensor_identity import leading_size
from lq_plugin.model.ledger import Ledger
from lq_plugin.model.prepare import quantized_layers
from lq_plugin.model.unreached import REASON, unreached

log = logging.getLogger(__name__)


class PhaseContext:
    """A model and its calibration data, as phases see them.

    This one serves a plain `nn.Module`; `lq_plugin.callbacks.phases.TrainerContext` a LightningModule in a Trainer.

    Args:
        model: prepared by `lq_plugin.prepare`.
        batches: calibration data, the same batches each time they are iterated; an iterator is read into a list.
        run: runs the model on one batch; `model(batch)` when None.
        recording: one forward pass of the float model; recorded from the first batch when None.
        ledger: of the model; phases write into it what they did to a layer.

    Attributes:
        name, options: of the phase that runs.
        results: what each phase returned, by its name.
        float_weights: weights by layer name, before a phase wrote rounded ones; empty when none did.
    """

    #: What happens to tensors that no calibration batch reached.
    if_unreached = "their layers stay float, weights also: more calibration batches may reach them"
    #: Joins the statistics of several processes, in place; None: there is one process.
    merge: Callable[[Statistics], None] | None = None

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any] = (),
        run: Callable[[Any], Any] | None = None,
        recording: Recording | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        self.model = model
        self._batches = list(batches) if isinstance(batches, Iterator) else batches
        self._run = run or model
        if recording is not None:
            self.recording = recording
        self.ledger = Ledger() if ledger is None else ledger
        self.name = "calibrate"
        self.options: Mapping[str, Any] = {}
        self.results: dict[str, Any] = {}
        self.float_weights: dict[str, Tensor] = {}

    @property
    def batches(self) -> Iterable[Any]:
        """Calibration data, read anew each time it is iterated."""
        return self._batches

    @property
    def batches_if_any(self) -> Iterable[Any]:
        """Calibration data, or nothing where there is none and the ranges do not need it."""
        return self.batches

    def run(self, batch: Any) -> Any:
        """Runs the model on one batch."""
        return self._run(batch)

    def passes(self) -> AbstractContextManager[None]:
        """Returns a context in which the model runs on batches: its own Python state is put back afterwards.

        `run` opens one for each batch where none is open.
        """
        return nullcontext()

    @cached_property
    def recording(self) -> Recording:
        """The recorded pass of the float model on the first batch; made once.

        Raises:
            CalibrationError: there is no batch.
        """
        recording = self.record()
        self.ledger.add_recording(recording)
        return recording

    def first_batch(self) -> Any:
        """Returns the batch that is recorded.

        Raises:
            CalibrationError: there is no batch.
        """
        batch = next(iter(self.batches), None)
        if batch is None:
            raise CalibrationError("no calibration data: the loader gave 0 batches")
        return batch

    def record(self) -> Recording:
        """Runs the float model on the first batch and records what it does.

        Raises:
            CalibrationError: there is no batch.
        """
        batch = self.first_batch()
        with evaluating(self.model), float_forward(self.model), torch.no_grad():
            return record(self.model, lambda: self.run(batch), samples=leading_size(batch))

    def calibrate(self, missing_only: bool = False) -> Statistics:
        """Finds every range, or only those that are missing, and says what has none.

        Returns:
            The statistics of each activation, by the name of its quantizer.

        Raises:
            CalibrationError: no batches where activations need ranges, or NaN or Inf in weights or activations.
        """
        _ = self.recording  # fills the ledger; a callback refuses too small a coverage here, before any work
        batches = self.batches if needs_data(self.model) else self.batches_if_any
        with self.passes():
            statistics = collect_statistics(self.model, batches, self.run, self.merge)
        with self.whole_weights():
            load_statistics(self.model, statistics, missing_only)
            clipped = without_levels(self.model, statistics)
        self.ledger.note_unreached(unreached(self.model), REASON)
        if missed := never_reached(self.model, statistics):
            self.warn(f"no calibration batch reached {', '.join(missed)}; {self.if_unreached}")
        if clipped:
            self.warn("; ".join(clipped))
        return statistics

    def whole_weights(self) -> AbstractContextManager[None]:
        """Returns a context in which no weight is split over processes."""
        return nullcontext()

    def keep_float_weights(self) -> None:
        """Keeps the weights that the phase is about to round, for reports."""
        self.float_weights.clear()
        self.float_weights |= {n: weight_of(layer).detach().clone() for n, layer in quantized_layers(self.model)}

    def note(self, name: str, reason: str) -> None:
        """Writes into the ledger why a module stays float."""
        for entry in self.ledger:
            if entry.name == name:
                entry.reason = reason

    def say(self, message: str) -> None:
        """Tells the user what the phase did."""
        log.info("%s", message)

    def warn(self, message: str) -> None:
        """Tells the user what the phase could not do."""
        log.warning("%s", message)

    def show(self, title: str, done: int, total: int) -> None:
        """Shows the progress of a long part of the phase, inside `passes`.

        Args:
            title: of the part.
            done, total: steps.
        """
