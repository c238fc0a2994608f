"""What can be asked of an export. Nothing here imports torch: what cannot be is said before a command has loaded anything."""

from __future__ import annotations

from lq_plugin.errors import ExportError, did_you_mean
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
