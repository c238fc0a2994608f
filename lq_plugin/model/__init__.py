"""Whole-model passes: prepare, record, calibrate, fold, count."""

from lq_plugin.model.calibrate import (
    Statistics,
    calibrate,
    collect_statistics,
    evaluating,
    float_forward,
    load_statistics,
    never_reached,
    weight_samples,
    without_levels,
)
from lq_plugin.model.checkpoint import load_checkpoint
from lq_plugin.model.ledger import Entry, Ledger
from lq_plugin.model.observe import commit_observers
from lq_plugin.model.operations import quantized_operations
from lq_plugin.model.prepare import prepare, quantized_layers, quantizers, remove
from lq_plugin.model.record import Recording, record

__all__ = [
    "Entry",
    "Ledger",
    "Recording",
    "Statistics",
    "calibrate",
    "collect_statistics",
    "commit_observers",
    "evaluating",
    "float_forward",
    "load_checkpoint",
    "load_statistics",
    "never_reached",
    "prepare",
    "quantized_layers",
    "quantized_operations",
    "quantizers",
    "record",
    "remove",
    "weight_samples",
    "without_levels",
]
