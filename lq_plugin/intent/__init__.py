"""Specs, plans and schedules: what a user asks for, as plain values. Nothing here imports torch."""

from lq_plugin.intent import builtin_formats  # noqa: F401 - importing declares them
