"""Whole-model passes: prepare, record, calibrate, fold, count."""

from lq_plugin.model.calibrate import (
    Statistics as Statistics,
    calibrate as calibrate,
    collect_statistics as collect_statistics,
    evaluating as evaluating,
    float_forward as float_forward,
    load_statistics as load_statistics,
    never_reached as never_reached,
    weight_samples as weight_samples,
    without_levels as without_levels,
)
from lq_plugin.model.checkpoint import load_checkpoint as load_checkpoint
from lq_plugin.model.graph.record import Recording as Recording, record as record
from lq_plugin.model.ledger import Entry as Entry, Ledger as Ledger
from lq_plugin.model.operations.quantized import quantized_operations as quantized_operations
from lq_plugin.model.prepare import (
    prepare as prepare,
    quantized_layers as quantized_layers,
    quantizers as quantizers,
    remove as remove,
)
from lq_plugin.model.training import commit_observers as commit_observers
