"""Quantization for PyTorch Lightning: add one callback, train or calibrate quantized.

    from lq_plugin import QAT, PTQ
    Trainer(callbacks=[QAT("w4a8")]).fit(model, datamodule=dm)
    Trainer(callbacks=[PTQ("w4a8", calibration_batches=8)]).validate(model, datamodule=dm)

Without Lightning: `prepare(model, plan)`, `calibrate(model, batches)`, `remove(model)`.
"""

from typing import TYPE_CHECKING

from lq_plugin.lazy import attributes

if TYPE_CHECKING:
    from lq_plugin.callbacks import PTQ, QAT, Export, QuantMonitor
    from lq_plugin.errors import CalibrationError, CoverageError, PlanError, QuantizationError, SpecError
    from lq_plugin.model import Ledger, calibrate, load_checkpoint, prepare, remove
    from lq_plugin.plan import QuantPlan, Rule
    from lq_plugin.schedule import Schedule
    from lq_plugin.spec import PerChannel, PerGroup, PerTensor, QuantSpec

__version__ = "0.1.0"

__all__ = [
    "PTQ",
    "QAT",
    "CalibrationError",
    "CoverageError",
    "Export",
    "Ledger",
    "PerChannel",
    "PerGroup",
    "PerTensor",
    "PlanError",
    "QuantMonitor",
    "QuantPlan",
    "QuantSpec",
    "QuantizationError",
    "Rule",
    "Schedule",
    "SpecError",
    "calibrate",
    "load_checkpoint",
    "prepare",
    "remove",
]

# Loaded on first use: Hydra imports this package whenever an application of the environment starts, to
# look at `lq_plugin.conf.shared`, and must not pay for torch and Lightning then.
_ROOMS = {
    "callbacks": ("PTQ", "QAT", "Export", "QuantMonitor"),
    "errors": ("CalibrationError", "CoverageError", "PlanError", "QuantizationError", "SpecError"),
    "model": ("Ledger", "calibrate", "load_checkpoint", "prepare", "remove"),
    "plan": ("QuantPlan", "Rule"),
    "schedule": ("Schedule",),
    "spec": ("PerChannel", "PerGroup", "PerTensor", "QuantSpec"),
}

__getattr__, __dir__ = attributes(__name__, _ROOMS)
