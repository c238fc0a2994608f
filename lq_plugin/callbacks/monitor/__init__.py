"""`QuantMonitor`: what quantization does, in the Trainer's loggers and on a page."""

from lq_plugin.callbacks.monitor.callback import QuantMonitor as QuantMonitor
