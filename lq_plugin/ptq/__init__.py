"""Post-training quantization: one folder for each algorithm, and the phases that put them in order."""

from typing import TYPE_CHECKING

from lq_plugin.utilities.lazy import attributes

if TYPE_CHECKING:
    from lq_plugin.ptq.phases import (
        PHASES as PHASES,
        PhaseContext as PhaseContext,
        register_phase as register_phase,
        run_phases as run_phases,
    )

__getattr__, __dir__, __all__ = attributes(__name__, __file__)
