"""Shared parts of the benchmarks: command line, interleaved timing, JSON with the environment it was made in."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from lq_plugin.utilities.files import write_file

DEFAULT_DATA = Path("../shared/data")


def parser(description: str | None, data: bool = True) -> argparse.ArgumentParser:
    """Options every benchmark has: `--json`, `--threads`, and `--data` unless it needs none."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--json", type=Path, metavar="FILE", help="write the results here as well")
    result.add_argument("--threads", type=int, default=1, metavar="N", help="threads of torch (default: 1)")
    if data:
        message = f"folder with the data (default: {DEFAULT_DATA})"
        result.add_argument("--data", type=Path, default=DEFAULT_DATA, metavar="FOLDER", help=message)
    return result


def start(options: argparse.Namespace) -> None:
    """Apply the common options; refuse a `--json` file that could not be written after hours of work."""
    torch.set_num_threads(options.threads)
    if options.json is not None and not options.json.parent.is_dir():
        raise SystemExit(f"--json {options.json}: the folder {options.json.parent} does not exist")


class Stopwatch:
    """Seconds a `with` block took."""

    seconds: float = 0.0

    def __enter__(self) -> Stopwatch:
        self._before = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._before


def timed(function: Callable[[], Any]) -> float:
    """Seconds one call takes."""
    with Stopwatch() as watch:
        function()
    return watch.seconds


def interleaved(
    functions: Mapping[str, Callable[[], Any]], rounds: int = 9, warm_up: int = 1
) -> dict[str, list[float]]:
    """Time several functions in turn, so that a machine that slows down slows all of them.

    Every second round runs in reverse order: what runs first in a round has no advantage on average.

    Args:
        functions: what to time, by name.
        rounds: calls of each that count.
        warm_up: rounds before, not counted.

    Returns:
        Seconds of each call, round by round, by name.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for index in range(warm_up + rounds):
        names = list(functions)
        for name in reversed(names) if index % 2 else names:
            seconds = timed(functions[name])
            if index >= warm_up:
                times[name].append(seconds)
    return times


def ratio(times: Mapping[str, list[float]], name: str, base: str) -> dict[str, float]:
    """`name` over `base` by interleaved times: the ratio of medians, and the spread of the pairs.

    Returns:
        `ratio` of the medians; `low` and `high`, smallest and largest ratio within one round.

    >>> ratio({"a": [2.0, 3.0, 2.0], "b": [1.0, 1.0, 1.0]}, "a", "b")
    {'ratio': 2.0, 'low': 2.0, 'high': 3.0}
    """
    pairs = [mine / theirs for mine, theirs in zip(times[name], times[base], strict=True)]
    return {
        "ratio": statistics.median(times[name]) / statistics.median(times[base]),
        "low": min(pairs),
        "high": max(pairs),
    }


def environment(packages: tuple[str, ...] = ("torch", "lightning", "numpy")) -> dict[str, Any]:
    """Returns what numbers depend on: versions, processor, threads, date (UTC)."""

    def version_of(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "packages": {package: version_of(package) for package in ("lq_plugin", *packages)},
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "command": [Path(sys.argv[0]).name, *_without_paths(sys.argv[1:])],
    }


def _without_paths(arguments: list[str]) -> list[str]:
    """Returns arguments without those that say where files lie on this machine, and nothing of what was measured."""
    names = ("--json", "--data")
    pairs = zip(["", *arguments], arguments, strict=False)
    return [
        word
        for before, word in pairs
        if word not in names and before not in names and not word.startswith(tuple(f"{n}=" for n in names))
    ]


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def write_json(path: Path | None, results: Mapping[str, Any], packages: tuple[str, ...] = ()) -> None:
    """Write results plus `environment` to `path`; without a path nothing is written."""
    if path is not None:
        content = {**results, "environment": environment(("torch", "lightning", "numpy", *packages))}
        write_file(path, json.dumps(content, indent=2, allow_nan=False) + "\n")
