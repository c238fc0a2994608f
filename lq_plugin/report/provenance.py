"""When, from where and with what the values of a report were made."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from lq_plugin.utilities.passwords import masked

#: Packages whose versions decide about numbers.
PACKAGES = ("lq_plugin", "torch", "lightning", "pytorch-lightning", "optuna")
#: Lightning's `seed_everything` leaves its seed there.
_SEED = "PL_GLOBAL_SEED"
_LONGEST = 400


def provenance(data: str = "", seed: int | None = None) -> dict[str, str]:
    """Returns date, command, data, seed and versions by name; what is not known is left out.

    Args:
        data: what the numbers were measured on, in words.
        seed: of the run; that of Lightning's `seed_everything` when None.
    """
    found = {
        "made": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command(sys.orig_argv),
        "data": data,
        "seed": os.environ.get(_SEED, "") if seed is None else str(seed),
        "versions": ", ".join([f"Python {platform.python_version()}", *_versions()]),
    }
    return {name: text for name, text in found.items() if text}


def command(arguments: Sequence[str]) -> str:
    """Returns a command line without the folders of its programs, and without passwords.

    >>> command(["/home/me/env/bin/python", "/home/me/env/bin/lq-train", "experiment=my qat"])
    "lq-train 'experiment=my qat'"
    >>> command(["/usr/bin/python3", "-m", "lq_plugin.demo"])
    'python3 -m lq_plugin.demo'
    """
    words = list(arguments)
    if len(words) > 1 and not words[1].startswith("-"):
        words = words[1:]
    words = [Path(word).name if index == 0 else word for index, word in enumerate(words)]
    text = str(masked(shlex.join(words)))
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _versions() -> list[str]:
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:  # one of the two packages of Lightning is there
            continue
    return found
