"""C++ sources of this package, compiled on first use.

The result is kept in a folder of the user's (`LQ_NATIVE_CACHE`; else `lq_plugin` in `XDG_CACHE_HOME` or `~/.cache`),
under a name that holds a hash of the sources, the command and the platform, and one of the library itself: a changed
source, or a library that is damaged, is compiled again. It takes a C++ compiler (`CXX`; else
c++) and nothing else. Processes that compile the same source at once each do so aside and move their result into place,
so that a killed one leaves no lock.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import subprocess
from pathlib import Path

import torch

from lq_plugin.errors import QuantizationError
from lq_plugin.utilities.files import sweep, temporary_folder

log = logging.getLogger(__name__)

FOLDER = Path(__file__).parent


class NativeError(QuantizationError):
    """Compiled kernels that are not available here, or that were given what they cannot take."""


@functools.cache
def library(name: str, folder: Path = FOLDER) -> ctypes.CDLL:
    """Returns the compiled and loaded `name.cpp`, which may include headers of its folder and of this one.

    Raises:
        NativeError: without a C++ compiler, saying so; with what the compiler says.
    """
    try:
        return ctypes.CDLL(str(compiled(folder / f"{name}.cpp", cache())))
    except OSError as error:
        raise NativeError(
            f"the compiled kernels ({name}.cpp) need a C++ compiler and a folder to write to: {error}"
        ) from error


def cache() -> Path:
    """Returns the folder of compiled sources."""
    chosen = os.environ.get("LQ_NATIVE_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lq_plugin"


def compiled(source: Path, folder: Path) -> Path:
    """Returns the shared library made of `source`, in `folder`: an existing one, or else compiled now.

    Raises:
        NativeError: with what the compiler says.
        OSError: no compiler, or a folder that cannot be written to.
    """
    # Only what gives the same numbers as torch: no -ffast-math, no fused multiply-add, no -march of one machine.
    command = [
        *shlex.split(os.environ.get("CXX") or "c++"),
        "-O3",
        "-std=c++17",
        "-ffp-contract=off",
        "-fPIC",
        "-shared",
    ]
    if torch.backends.openmp.is_available():
        command.append("-fopenmp")
    parts = [shlex.join(command).encode(), platform.platform().encode()]
    # Sources of other folders include headers of this one.
    headers = {*source.parent.glob("*.h"), *FOLDER.glob("*.h")}
    parts += [path.read_bytes() for path in (source, *sorted(headers))]
    name = f"{source.stem}-{_hash(b'|'.join(parts))}"
    sweep(folder)
    for kept in sorted(folder.glob(f"{name}-*.so")):
        if kept.stem == f"{name}-{_hash(kept.read_bytes())}":
            return kept
        log.warning("%s is damaged and compiled again", kept)
        kept.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    with temporary_folder("compile", folder) as aside:
        made = Path(aside, f"{name}.so")
        done = subprocess.run([*command, str(source), "-o", str(made)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise NativeError(f"{shlex.join(command)} {source} gave {done.returncode}: {done.stderr[-2000:]}")
        # The hash in the name, not in a second file: both appear at once.
        target = folder / f"{name}-{_hash(made.read_bytes())}.so"
        made.replace(target)
    return target


def _hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()
