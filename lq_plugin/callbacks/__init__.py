"""Lightning callbacks: one line in a Trainer."""

from lq_plugin.callbacks.export import Export as Export
from lq_plugin.callbacks.monitor.callback import QuantMonitor as QuantMonitor
from lq_plugin.callbacks.phases import PHASES as PHASES, register_phase as register_phase
from lq_plugin.callbacks.ptq import PTQ as PTQ
from lq_plugin.callbacks.qat import QAT as QAT
