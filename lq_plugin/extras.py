"""Optional packages: the extra that brings each, and an error that names it before the work starts.

Nothing here imports them.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec

from lq_plugin.errors import MissingPackageError

#: What `pip install "lq_plugin[<name>]"` brings for exports, runtimes, pictures and loggers, by the names that Python
#: imports.
EXTRAS = {
    "compressed-tensors": ("compressed_tensors", "transformers"),
    "dashboard": ("optuna_dashboard",),
    "executorch": ("executorch",),
    "gguf": ("gguf",),
    "litert": ("ai_edge_litert", "litert_torch"),
    "mlflow": ("mlflow",),
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
    "openvino": ("openvino",),
    "plots": ("matplotlib", "PIL"),
    "torchao": ("torchao",),
}


def need_packages(what: str, *packages: str) -> None:
    """Refuses to begin something without the packages that it needs.

    Raises:
        MissingPackageError: naming those that are not installed, and the extra that brings them.

    >>> need_packages("a sum", "math")
    >>> need_packages("to=onnx", "math", "onix")
    Traceback (most recent call last):
    lq_plugin.errors.MissingPackageError: to=onnx needs onix, which is not installed: pip install onix
    """
    missing = [package for package in packages if not _installed(package)]
    if missing:
        extras = [extra for extra, brought in EXTRAS.items() if set(brought) & set(missing)]
        command = f'"lq_plugin[{",".join(extras)}]"' if extras else " ".join(missing)
        verb = "is" if len(missing) == 1 else "are"
        raise MissingPackageError(
            f"{what} needs {' and '.join(missing)}, which {verb} not installed: pip install {command}"
        )


def _installed(package: str) -> bool:
    # One that is imported already may have no spec.
    return sys.modules[package] is not None if package in sys.modules else find_spec(package) is not None
