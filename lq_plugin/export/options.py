"""What can be asked of an export. Nothing here imports torch: what cannot be is said before a command has loaded
anything."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lq_plugin.errors import ExportError, did_you_mean, raise_all
from lq_plugin.extras import need_packages

#: What a file's name ends in, by its kind.
SUFFIXES = {"packed": ".safetensors", "onnx": ".onnx"}
#: Bits that the smallest integer type of an ONNX file may have.
SMALLEST = (2, 4, 8)
#: What runs an ONNX file: each is the name of its package, too.
RUNTIMES = ("onnxruntime", "openvino")


def smallest_faults(smallest: int) -> list[str]:
    """What is wrong with the bits of the smallest integer type."""
    return [] if smallest in SMALLEST else [f"smallest is 2, 4 or 8 bits, got {smallest!r}"]


def dims_faults(dims: Any) -> list[str]:
    """What is wrong with dims behind the batch, as far as that is known without an input."""
    # A ListConfig of Hydra is a sequence, too.
    whole = isinstance(dims, Sequence) and not isinstance(dims, str)
    right = whole and all(isinstance(dim, int) and not isinstance(dim, bool) and dim > 0 for dim in dims)
    return (
        []
        if right
        else [
            f"dynamic_dims are dims of the inputs behind the batch, 1 or more, as [1] for tokens [N, L]; got {dims!r}"
        ]
    )


def check_runtime(runtime: str) -> None:
    """Refuse a runtime that does not exist.

    Raises:
        ExportError: naming the valid ones.
    """
    if runtime not in RUNTIMES:
        raise ExportError(f"runtime is {' or '.join(RUNTIMES)}, got {runtime!r}.{did_you_mean(str(runtime), RUNTIMES)}")


def need_onnx(what: str, runtime: str | None = None) -> None:
    """Refuse to write an ONNX file, and to run it if a runtime is named, without the packages for that.

    Raises:
        MissingPackageError: naming them, and the extra that brings them.
    """
    need_packages(what, "onnx", "onnxscript", *([] if runtime is None else [runtime]))


@dataclass(frozen=True)
class LatencyOptions:
    """Where and how latency is measured.

    Args:
        runtime: `"onnxruntime"` or `"openvino"`.
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
        if self.runtime not in RUNTIMES:
            valid = ", ".join(RUNTIMES)
            faults.insert(0, f"unknown runtime {self.runtime!r}; valid: {valid}.{did_you_mean(self.runtime, RUNTIMES)}")
        raise_all(ExportError, "cannot measure latency", faults)

    @property
    def place(self) -> str:
        """What numbers are comparable within: runtime, processor, threads, batch."""
        processor = platform.processor() or platform.machine()
        info = Path("/proc/cpuinfo")
        names = (
            [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
        )
        name = names[0].partition(":")[2].strip() if names else processor
        return f"{self.runtime} {version(self.runtime)}; {name}; {self.threads} threads; batch {self.batch}"
