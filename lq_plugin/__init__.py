"""Quantization for PyTorch Lightning: add one callback, train or calibrate quantized.

    from lq_plugin import QAT, PTQ
    Trainer(callbacks=[QAT("w4a8")]).fit(model, datamodule=dm)
    Trainer(callbacks=[PTQ("w4a8", calibration_batches=8)]).validate(model, datamodule=dm)

Without Lightning: `prepare(model, plan)`, `calibrate(model, batches)`, `remove(model)`.
"""

from typing import TYPE_CHECKING

from lq_plugin.utilities import moved
from lq_plugin.utilities.lazy import attributes

if TYPE_CHECKING:
    from lq_plugin.callbacks import PTQ as PTQ, QAT as QAT, Export as Export, QuantMonitor as QuantMonitor
    from lq_plugin.errors import (
        CalibrationError as CalibrationError,
        CoverageError as CoverageError,
        PlanError as PlanError,
        QuantizationError as QuantizationError,
        SpecError as SpecError,
    )
    from lq_plugin.intent.plan import QuantPlan as QuantPlan, Rule as Rule
    from lq_plugin.intent.schedule import Schedule as Schedule
    from lq_plugin.intent.spec import (
        PerBlock as PerBlock,
        PerChannel as PerChannel,
        PerGroup as PerGroup,
        PerMatrix as PerMatrix,
        PerTensor as PerTensor,
        PerToken as PerToken,
        QuantSpec as QuantSpec,
    )
    from lq_plugin.model import (
        Ledger as Ledger,
        calibrate as calibrate,
        load_checkpoint as load_checkpoint,
        prepare as prepare,
        remove as remove,
    )

__version__ = "0.2.0"

# Loaded on first use: Hydra imports this package whenever an application of the environment starts, to
# look at `lq_plugin.conf.shared`, and must not pay for torch and Lightning then.
__getattr__, __dir__, __all__ = attributes(__name__, __file__)
moved.install()
