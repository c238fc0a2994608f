"""Origin of a report's values: when, from where and with what they were made."""

from __future__ import annotations

import os
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from lq_plugin.utilities.passwords import MASK, masked_words

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
    """Returns a command line without the folders of its programs, passwords, keys, and the name of the home folder.

    >>> command(["/home/me/env/bin/python", "/home/me/env/bin/lq-train", "experiment=my qat"])
    "lq-train 'experiment=my qat'"
    >>> command(["/usr/bin/python3", "-m", "lq_plugin.demo"])
    'python3 -m lq_plugin.demo'
    >>> command(["lq-train", "--api-key", "s3cret", f"data.root={Path.home() / 'sets'}"])
    'lq-train --api-key *** data.root=~/sets'
    """
    words = list(arguments)
    if len(words) > 1 and not words[1].startswith("-"):
        words = words[1:]
    words = [Path(word).name if index == 0 else word for index, word in enumerate(words)]
    text = " ".join(_quoted(_without_home(word)) for word in masked_words(words))
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _without_home(word: str) -> str:
    """Returns a word with `~` in place of the home folder, which holds the name of its user."""
    for home in {str(Path.home()), os.path.realpath(Path.home())}:
        if len(Path(home).parts) > 1:
            word = re.sub(rf"(?<![\w.~/-]){re.escape(home)}(?![\w.-])", "~", word)
    return word


def _quoted(word: str) -> str:
    """Returns a word as a shell takes it; what stands in for something else needs no quotes."""
    plain = word.replace(MASK, "x").replace("~", "x")
    return word if shlex.quote(plain) == plain else shlex.quote(word)


def _versions() -> list[str]:
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:  # one of the two packages of Lightning is there
            continue
    return found
