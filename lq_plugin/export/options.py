"""Options of latency measurements. Nothing here imports torch: a command refuses them before it loads anything."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from lq_plugin.errors import ExportError, name_faults, raise_all
from lq_plugin.export.target import timed_runtimes


@dataclass(frozen=True)
class LatencyOptions:
    """Options of a latency measurement.

    Args:
        runtime: `"onnxruntime"`, `"openvino"`, `"executorch"` or `"ai_edge_litert"`; a target adds its own.
        batch: samples at a time; latencies are those of one of them.
        threads: of the runtime.
        rounds: runs of each layer that count; the median does.
        cache: JSON file that keeps what was measured; None: nothing is kept.

    Raises:
        ExportError: another runtime, or a number below 1.
    """

    runtime: str = "onnxruntime"
    batch: int = 1
    threads: int = 1
    rounds: int = 25
    cache: str | None = None

    def __post_init__(self) -> None:
        faults = [
            f"{name} must be at least 1, got {value}"
            for name in ("batch", "threads", "rounds")
            if (value := getattr(self, name)) < 1
        ]
        faults = name_faults("runtime", [self.runtime], sorted(timed_runtimes())) + faults
        raise_all(ExportError, "cannot measure latency", faults)

    @property
    def place(self) -> str:
        """Runtime, processor, threads and batch, within which numbers are comparable."""
        processor = platform.processor() or platform.machine()
        info = Path("/proc/cpuinfo")
        names = (
            [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
        )
        name = names[0].partition(":")[2].strip() if names else processor
        return f"{self.runtime} {version(self.runtime)}; {name}; {self.threads} threads; batch {self.batch}"
