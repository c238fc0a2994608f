"""Quantization for PyTorch Lightning: add one callback, train or calibrate quantized.

    from lq_plugin import QAT, PTQ
    Trainer(callbacks=[QAT("w4a8")]).fit(model, datamodule=dm)
    Trainer(callbacks=[PTQ("w4a8", calibration_batches=8)]).validate(model, datamodule=dm)

Without Lightning: `prepare(model, plan)`, `calibrate(model, batches)`, `remove(model)`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lq_plugin.errors import CalibrationError, CoverageError, PlanError, QuantizationError, SpecError
from lq_plugin.model import Ledger, calibrate, load_checkpoint, prepare, remove
from lq_plugin.plan import QuantPlan, Rule
from lq_plugin.schedule import Schedule
from lq_plugin.spec import PerChannel, PerGroup, PerTensor, QuantSpec

if TYPE_CHECKING:
    from lq_plugin.callbacks import PTQ as PTQ
    from lq_plugin.callbacks import QAT as QAT
    from lq_plugin.callbacks import QuantMonitor as QuantMonitor

__version__ = "0.1.0"

__all__ = [
    "PTQ",
    "QAT",
    "CalibrationError",
    "CoverageError",
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


def __getattr__(name: str) -> Any:
    # The callbacks import Lightning: only those who use them pay for it.
    if name in ("QAT", "PTQ", "QuantMonitor"):
        from lq_plugin import callbacks

        return getattr(callbacks, name)
    raise AttributeError(f"module 'lq_plugin' has no attribute {name!r}")
