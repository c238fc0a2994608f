"""Quantization for PyTorch Lightning: add one callback, train or calibrate quantized.

    from lq_plugin import QAT, PTQ
    Trainer(callbacks=[QAT("w4a8")]).fit(model, datamodule=dm)
    Trainer(callbacks=[PTQ("w4a8", calibration_batches=8)]).validate(model, datamodule=dm)

Without Lightning: `prepare(model, plan)`, `calibrate(model, batches)`, `remove(model)`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

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
# look at `lq_plugin.conf`, and must not pay for torch and Lightning then.
_ROOMS = {
    "callbacks": ("PTQ", "QAT", "Export", "QuantMonitor"),
    "errors": ("CalibrationError", "CoverageError", "PlanError", "QuantizationError", "SpecError"),
    "model": ("Ledger", "calibrate", "load_checkpoint", "prepare", "remove"),
    "plan": ("QuantPlan", "Rule"),
    "schedule": ("Schedule",),
    "spec": ("PerChannel", "PerGroup", "PerTensor", "QuantSpec"),
}
_HOME = {name: f"{__name__}.{room}" for room, names in _ROOMS.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
