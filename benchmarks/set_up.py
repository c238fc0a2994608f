"""From a clone to the demo's table: bytes and seconds of `make demo` in a new environment, next to an earlier commit.

    python -m benchmarks.set_up --json out.json

Each commit is checked out into a folder of its own and `make demo` runs there, in turn, with an empty cache of pip;
the least of `--rounds` counts. `environment`: bytes of the files in .venv. `wheels`: bytes of what pip fetched for it,
from a package index or a folder on this machine, where they take no time of a network. `install`: seconds until the
environment is ready; `demo`: from there to the page; `cpu`: CPU seconds of both together. A Chromium that an earlier
commit wants is counted only where the machine has none and apt-get brings one.
"""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import common
from benchmarks.earlier import tree_of

#: The last commit whose `make demo` installed what the tests need.
EARLIER = "8817788^"
#: Written when an environment is ready, by the Makefiles of both.
STAMPS = (".demo", ".ready")
UNITS = {"bytes": 1, "kB": 1000, "MB": 1000**2, "GB": 1000**3}


def fetched(log: str) -> int:
    """Bytes of the wheels and source archives that a log of pip names.

    >>> fetched("  Downloading a-1-py3-none-any.whl (1.5 MB)\\n  Using cached b.whl (3 kB)\\n")
    1500000
    """
    local = re.findall(r"Processing (/\S+\.(?:whl|tar\.gz))$", log, re.MULTILINE)
    sizes = re.findall(r"Downloading \S+ \(([\d.]+) (bytes|kB|MB|GB)\)", log)
    return sum(Path(name).stat().st_size for name in local) + sum(round(float(n) * UNITS[unit]) for n, unit in sizes)


def measure(revision: str) -> dict[str, float]:
    """Bytes and seconds of `make demo` at a commit, in an environment that it makes itself."""
    with tree_of(revision) as tree, tempfile.TemporaryDirectory() as home:
        assert tree is not None
        log = Path(home, "pip.log")
        environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
        environment |= {"PIP_CACHE_DIR": str(Path(home, "cache")), "PIP_LOG": str(log)}
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.time()
        done = subprocess.run(
            ["make", "demo", f"PYTHON={_python()}"], cwd=tree, env=environment, capture_output=True, text=True
        )
        end, after = time.time(), resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode:
            raise SystemExit(f"make demo at {revision}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        ready = min(path.stat().st_mtime for name in STAMPS if (path := tree / ".venv" / name).is_file())
        return {
            "environment": sum(path.lstat().st_size for path in (tree / ".venv").rglob("*") if not path.is_dir()),
            "wheels": fetched(log.read_text(encoding="utf-8")),
            "install": ready - start,
            "demo": end - ready,
            "cpu": sum(getattr(after, kind) - getattr(before, kind) for kind in ("ru_utime", "ru_stime")),
        }


def _python() -> str:
    """The interpreter that this environment was made of, so that the new ones get none of its packages."""
    return str(Path(sys.base_prefix, "bin", f"python{sys.version_info.major}.{sys.version_info.minor}"))


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = common.parser(__doc__, data=False)
    message = "the commit to compare with; default: the last one whose `make demo` installed what the tests need"
    parser.add_argument("--beside", default=EARLIER, metavar="REV", help=message)
    parser.add_argument("--rounds", type=int, default=2, metavar="N", help="environments of each commit (default: 2)")
    options = parser.parse_args(arguments)
    common.start(options)
    found: dict[str, list[dict[str, float]]] = {"now": [], "earlier": []}
    for index in range(options.rounds):
        for name in reversed(found) if index % 2 else found:
            found[name].append(measure("HEAD" if name == "now" else options.beside))
    results = {name: {key: min(run[key] for run in runs) for key in runs[0]} for name, runs in found.items()}
    table = Table("make demo", *results, "share")
    for name in results["now"]:
        values = [result[name] for result in results.values()]
        shown = [f"{value / 1e9:.2f} GB" if name in ("environment", "wheels") else f"{value:.0f} s" for value in values]
        table.add_row(name, *shown, f"{values[0] / values[1]:.2f}")
    Console().print(table)
    common.write_json(options.json, {"results": results, "beside": options.beside, "all": found})
    return results


if __name__ == "__main__":
    main()
