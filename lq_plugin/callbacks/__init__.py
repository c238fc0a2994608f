"""Lightning callbacks: one line in a Trainer."""

from lq_plugin.callbacks.export import Export
from lq_plugin.callbacks.monitor import QuantMonitor
from lq_plugin.callbacks.phases import PHASES, register_phase
from lq_plugin.callbacks.ptq import PTQ
from lq_plugin.callbacks.qat import QAT

__all__ = ["PHASES", "PTQ", "QAT", "Export", "QuantMonitor", "register_phase"]
